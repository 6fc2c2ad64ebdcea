"""PixArt-Sigma XL at full size with random numbers: does it fit, and how long does a step take?

Writes a whole pipeline folder in bfloat16 (the 611 M transformer, SDXL's autoencoder, T5 at XXL's width with
one layer, the toy tokenizer), reads it back in a fresh process and draws at 256 pixels on the CPU. The
picture is noise; what is measured is memory and time. Needs 3 GB of disk and about as much memory.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path) -> None:
    """The folder, one network at a time."""
    import torch

    from pipelines import components
    from pipelines.dpm_solver import DPMSolver
    from pipelines.models.autoencoder import AutoencoderKL
    from pipelines.models.pixart import PixArtTransformer2DModel
    from pipelines.models.t5 import T5EncoderModel
    from weights.registry import CHECKPOINTS

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = CHECKPOINTS["pixart-sigma-xl-256"].config
    PixArtTransformer2DModel(**config).save_pretrained(folder / "transformer")
    T5EncoderModel(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64
    ).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        scaling_factor=0.13025,
    ).save_pretrained(folder / "vae")
    DPMSolver().save_pretrained(folder / "scheduler")
    shutil.copytree(ROOT / "weights" / "toy" / "pixart-sigma" / "tokenizer", folder / "tokenizer")
    components.write_index(
        folder,
        "PixArtSigmaPipeline",
        {
            "tokenizer": ("transformers", "T5Tokenizer"),
            "text_encoder": ("transformers", "T5EncoderModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "transformer": ("diffusers", "PixArtTransformer2DModel"),
            "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
        },
    )


def draw(folder: Path, steps: int) -> None:
    """Read and draw, and print what it took."""
    import torch

    from pipelines.pixart_sigma import PixArtSigmaPipeline

    began = time.perf_counter()
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    loaded = time.perf_counter()
    moments = []
    latents = None
    for step in pipeline.denoise("a red cube", num_inference_steps=steps, generator=torch.manual_seed(0)):
        moments.append(time.perf_counter())
        latents = step.latents
    image = pipeline.decode(latents)[0]
    done = time.perf_counter()
    per_step = (moments[-1] - moments[0]) / (len(moments) - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"| picture | {image.width} x {image.height} |")
    print(f"| reading | {loaded - began:.1f} s |")
    print(f"| text and first step | {moments[0] - loaded:.1f} s |")
    print(f"| each further step | {per_step:.2f} s |")
    print(f"| decoding | {done - moments[-1]:.1f} s |")
    print(f"| largest memory of the process | {peak / 2**30:.1f} GiB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)  # the second process
    chosen = parser.parse_args()
    if chosen.draw:
        draw(chosen.draw, chosen.steps)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pixart-sigma-xl-256"
        write(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"| | |\n|---|---|\n| folder | {size / 2**30:.2f} GiB, bfloat16 |", flush=True)
        command = [sys.executable, __file__, "--steps", str(chosen.steps), "--draw", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
