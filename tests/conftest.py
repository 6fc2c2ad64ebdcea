"""What tests share: a user folder of their own, no network, and a tiny model of the real classes.

torch is imported inside the fixtures, so that tests of the command line can prove it is not needed.
"""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest

WORDS = """
    a an the and or of in on to is left right front behind top under above below with two three one
    red green blue yellow orange purple pink cyan white black gray grey brown cube sphere cylinder cone
    torus pyramid capsule prism ball ring small medium large tiny big matte shiny metal rubber glossy
"""

# Started in the background by a shell, a process has Ctrl-C ignored, and so have those it starts: tests that
# press it would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's folder or the network."""
    monkeypatch.setenv("GEN_HOME", str(tmp_path / "gen-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("pipelines").setLevel(logging.NOTSET)  # the command line silences it for its process


@pytest.fixture(scope="session")
def tiny_toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the embedded weights' form, smaller and with random numbers: 128 pixels, 5 parts.

    Copy it before changing it: it is shared by the whole session.
    """
    import torch

    from pipelines.dpm_solver import DPMSolver
    from pipelines.models.autoencoder import AutoencoderKL
    from pipelines.models.pixart import PixArtTransformer2DModel
    from pipelines.models.t5 import T5EncoderModel
    from pipelines.pixart_sigma import PixArtSigmaPipeline
    from pipelines.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("toy") / "pixart-sigma"
    write_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PixArtSigmaPipeline(
            tokenizer,
            T5EncoderModel(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
            AutoencoderKL(
                block_out_channels=(8, 8, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=4,
                sample_size=128,
                scaling_factor=0.5,
            ),
            PixArtTransformer2DModel(
                sample_size=16,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=24,
                cross_attention_dim=48,
                caption_channels=32,
                use_additional_conditions=False,
            ),
            DPMSolver(prediction_type="v_prediction"),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dit_folder(tiny_toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline with random numbers: 128 pixels, 4 classes, one without a name of its
    own."""
    import torch

    from pipelines.dit import DiTPipeline
    from pipelines.dpm_solver import DPMSolver
    from pipelines.models.autoencoder import AutoencoderKL
    from pipelines.models.dit import DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("toy") / "dit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = DiTTransformer2DModel(
            sample_size=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_embeds_ada_norm=4,
        )
    vae = AutoencoderKL.from_pretrained(tiny_toy_folder / "vae")
    names = {0: "red cube, crimson box", 1: "blue ball", 2: "crane", 3: "crane, heron"}
    pipeline = DiTPipeline(vae, network, DPMSolver(prediction_type="v_prediction"), names)
    pipeline.save_pretrained(folder, published=False)
    return folder


@pytest.fixture(scope="session")
def tiny_delta_folder(tiny_toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny toy folder with an LCM schedule and a control branch of random numbers that does something."""
    import torch

    from pipelines.lcm import LCMSolver
    from pipelines.models.pixart_control import PixArtControlNet
    from pipelines.pixart_delta import PixArtDeltaPipeline

    folder = tmp_path_factory.mktemp("toy") / "pixart-delta"
    pipeline = PixArtDeltaPipeline.from_pretrained(tiny_toy_folder)
    pipeline.scheduler = LCMSolver(prediction_type="v_prediction")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        # At initialisation the transformer's last layers are as good as silent, and the branch's are zero.
        for network in (pipeline.transformer, PixArtControlNet.from_transformer(pipeline.transformer, 1)):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        pipeline.attach(network)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dit3d_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of clouds with random numbers: 8 voxels per side, 3 classes. Its clouds are of the size of
    the data, but of no shape."""
    import torch

    from pipelines.dit3d import DiT3DPipeline
    from pipelines.dpm_solver import DPMSolver
    from pipelines.models.dit3d import DiT3DModel

    folder = tmp_path_factory.mktemp("toy") / "dit-3d"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = DiT3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            num_embeds_ada_norm=3,
            sample_size=8,
            patch_size=2,
        )
    names = {0: "airplane, plane", 1: "chair", 2: "mug"}
    solver = DPMSolver(prediction_type="v_prediction")
    DiT3DPipeline(network, solver, names, mean=(0.0, 0.02, 0.0), std=0.17).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A T5 tokenizer of whole words and letters; the empty prompt is one token, the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in specials] + [(f"▁{word}", -3.0) for word in WORDS.split()]
    pieces += [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    spaces = {"replacement": "▁", "prepend_scheme": "always"}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces, split=True)]
    )
    backend.decoder = decoders.Metaspace(**spaces)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    backend.add_special_tokens(specials)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "backend": "tokenizers",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 300,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
