"""The autoencoder against diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.models.autoencoder import AutoencoderKL

SMALL: dict[str, Any] = dict(
    block_out_channels=(8, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4,
    latent_channels=4,
)


def twins(**options: Any):
    """diffusers' autoencoder with random weights, and ours with the same."""
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    theirs = Theirs(**{**SMALL, **options}).eval()
    ours = AutoencoderKL(**{**SMALL, **options}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 2, "latent_channels": 3},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    ids=["plain", "two layers", "no quantizer", "no attention"],
)
@torch.inference_mode()
def test_it_equals_diffusers_in_both_directions(options: dict[str, Any]) -> None:
    ours, theirs = twins(**options)
    picture = torch.rand(2, 3, 24, 32) * 2 - 1
    expected = theirs.encode(picture).latent_dist
    found = ours.encode(picture).latent_dist
    torch.testing.assert_close(found.mode(), expected.mode(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(found.sample(seeded[0]), expected.sample(seeded[1]), rtol=1e-5, atol=1e-5)
    latents = torch.randn(2, options.get("latent_channels", 4), 6, 8)
    torch.testing.assert_close(
        ours.decode(latents, return_dict=False)[0], theirs.decode(latents).sample, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours(picture).sample, theirs(picture).sample, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_folders_go_both_ways(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL as Theirs

    ours, theirs = twins(scaling_factor=0.7)
    latents = torch.randn(1, 4, 4, 4)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert loaded.config.scaling_factor == 0.7
    assert torch.equal(loaded.decode(latents)[0], ours.decode(latents)[0])
    ours.save_pretrained(tmp_path / "ours")
    again = Theirs.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again.decode(latents)[0], ours.decode(latents)[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_attention_layers_of_older_files_are_renamed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(path).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    assert any(".query." in key for key in state)
    save_file(state, path)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path).decode(latents)[0], ours.decode(latents)[0])


def test_configurations_it_cannot_compute_are_left_to_diffusers(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert AutoencoderKL.supports(entries)
    mixed = ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    for change in ({"act_fn": "relu"}, {"down_block_types": mixed}, {"block_out_channels": [8, 16]}):
        assert not AutoencoderKL.supports(entries | change), change


@torch.inference_mode()
def test_the_attention_of_an_autoencoder_can_be_chosen() -> None:
    ours, _ = twins()
    ours.to(torch.bfloat16)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = ours.float().decode(latents.float())[0]
    errors = {}
    for name in ("sdpa", "heads"):
        ours.to(torch.bfloat16).set_attention_backend(name)
        errors[name] = float((ours.decode(latents)[0].float() - exact).square().mean())
    assert errors["heads"] != errors["sdpa"]  # it was another function
    assert errors["heads"] < 1.5 * errors["sdpa"]
