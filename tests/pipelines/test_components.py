"""Pipeline folders: what is in them, what is refused, and that drawing needs no slow import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import components
from pipelines.models.autoencoder import AutoencoderKL
from pipelines.pixart_sigma import PixArtSigmaPipeline


@pytest.fixture
def folder(tiny_toy_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_toy_folder, tmp_path / "pixart-sigma")
    return tmp_path / "pixart-sigma"


def change_index(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text()) | changes
        (folder / "model_index.json").write_text(json.dumps(index))

    return change


def narrow_text(folder: Path) -> None:
    from pipelines.models.t5 import T5EncoderModel

    options = dict(vocab_size=200, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    T5EncoderModel(**options).save_pretrained(folder / "text_encoder")


def more_latents(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    AutoencoderKL(replace(vae.config, latent_channels=16)).save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"model_index\.json is missing"),
        (lambda folder: shutil.rmtree(folder / "vae"), r"vae is missing"),
        (
            lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
            r"scheduler_config\.json is mis",
        ),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), r"is not a tokenizer"),
        (change_index(_class_name="FluxPipeline"), r"holds a FluxPipeline, not a PixArtSigmaPipeline"),
        (change_index(vae=None), r"lists no vae"),
        (change_index(vae=["os", "system"]), r"vae is a system, which is not supported"),
        (narrow_text, r"the text encoder writes 16 numbers per token, the transformer reads 32"),
        (more_latents, r"the VAE has 16 latent channels, the transformer draws 4"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        PixArtSigmaPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", components.PARTS)
def test_every_class_of_the_table_exists(name: str) -> None:
    part = components.PARTS[name]
    for reference in filter(None, (part.ours, part.theirs)):
        assert isinstance(components.resolve(reference), type)


def test_configurations_ours_do_not_cover_get_the_library_class(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": True}))
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "elsewhere.json")
    from diffusers import DPMSolverMultistepScheduler

    scheduler = components.load(folder / "scheduler", "DPMSolverMultistepScheduler")
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert scheduler.config.use_karras_sigmas


def test_library_classes_name_a_damaged_file_too(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vae.*diffusion_pytorch_model"):
        components.load(folder / "vae", "AutoencoderKL", own=False)


def test_drawing_imports_neither_diffusers_nor_transformers_nor_the_compiler(tiny_toy_folder: Path) -> None:
    """Their imports take several times as long as the picture: this is what makes a cold start short."""
    program = (
        "import sys\n"
        "from pipelines.pixart_sigma import PixArtSigmaPipeline\n"
        "pipeline = PixArtSigmaPipeline.from_pretrained(sys.argv[1])\n"
        "pipeline('a red cube', num_inference_steps=2)\n"
        "slow = {'diffusers', 'transformers', 'torch._dynamo', 'sympy', 'scipy', 'pandas', 'accelerate'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_toy_folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "[]"
