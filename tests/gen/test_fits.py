"""What weights take, told without torch, beside what the real classes count."""

from __future__ import annotations

import math

import pytest

from gen import cli, doctor, fits, loader, memory
from weights import registry, store


def test_the_registry_counts_the_text_encoder_and_the_autoencoder_as_their_classes_do():
    import torch

    from pipelines.models.autoencoder import AutoencoderKL
    from pipelines.models.t5 import T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    for network, count in ((encoder, registry.T5_XXL), (vae, registry.VAE)):
        assert sum(math.prod(one.shape) for one in network.parameters()) == count


def test_large_pictures_are_decoded_as_the_pipeline_does():
    from pipelines.latent_images import TILED_FROM

    assert fits.DECODED_WHOLE == TILED_FROM


def test_weights_that_are_here_are_counted(installed):
    fit = fits.fit("pixart-sigma-toy")
    folder = store.find("pixart-sigma-toy")
    assert fit.counted and fit.fits and not fit.streams
    assert fit.disk == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    plan = memory.plan(folder, "cpu", "float32", height=128, width=128)
    assert fit.memory == pytest.approx(plan.peak, rel=0.02)


def test_weights_that_are_not_here_are_estimated(installed, monkeypatch):
    monkeypatch.setattr(loader, "memory", lambda device: 64 * 2**30)
    monkeypatch.setattr(doctor, "available_memory", lambda device: 60 * 2**30)
    fit = fits.fit("pixart-sigma-xl-1024")
    facts = registry.XL_1024
    assert not fit.counted and fit.disk == 4 * (facts.parameters + facts.beside)
    assert fit.fits and not fit.streams
    monkeypatch.setattr(loader, "memory", lambda device: 8 * 2**30)
    monkeypatch.setattr(doctor, "available_memory", lambda device: 7 * 2**30)
    small = fits.fit("pixart-sigma-xl-1024")
    assert small.streams and small.memory < fit.memory and small.fits
    monkeypatch.setattr(doctor, "available_memory", lambda device: 2**30)
    assert fits.fit("pixart-sigma-xl-1024").fits is False


def test_nothing_is_claimed_where_nothing_is_known(installed):
    assert fits.fit("dit-3d").fits is None
    assert fits.fit("pixart-delta-xl-1024-lora").memory is None


def test_the_list_shows_it(installed, capsys):
    assert cli.execute(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["WEIGHTS"].split()[3:6] == ["DISK", "MEMORY", "FITS"]
    assert "~20.3" in lines["pixart-sigma:1024"]
