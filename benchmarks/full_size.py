"""PixArt-Sigma XL at full size with random numbers: does it fit, as planned, and how long does a step take?

Writes a whole pipeline folder in bfloat16 (the 611 M transformer, SDXL's autoencoder, T5 at XXL's width with
as many layers as asked for, the toy tokenizer), reads it back in a fresh process as `gen run` would and draws
on the CPU. The picture is noise; what is measured is memory, beside what `gen.memory` planned, and time.
Needs 2 GB of disk, 11 with all 24 layers of T5. Fails when a picture takes 24 GiB.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 24 * 2**30  # bytes that the drawing process may take


def write(folder: Path, size: int, layers: int) -> None:
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
    config = CHECKPOINTS[f"pixart-sigma-xl-{size}"].config
    PixArtTransformer2DModel(**config).save_pretrained(folder / "transformer")
    T5EncoderModel(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64
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


def memory(field: str) -> int:
    """Bytes of this very process. Its `getrusage` would count the parent's largest memory as its own.

    VmHWM is the most so far and RssAnon what is its own by now; the difference to VmRSS are mapped files,
    which the system may drop.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def draw(folder: Path, steps: int, dtype: str, wish: str) -> None:
    """Read and draw, and print what it took."""
    import torch

    from gen.loader import offloads
    from gen.memory import plan
    from pipelines.pixart_sigma import PixArtSigmaPipeline

    rows = {"imports": gib(memory("VmHWM"))}
    began = time.perf_counter()
    pipeline = PixArtSigmaPipeline.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), offload=offloads(folder, "cpu", dtype, wish)
    ).prepare()
    loaded = time.perf_counter()
    side = pipeline.native_size
    planned = plan(folder, "cpu", dtype, height=side, width=side, wish=wish)
    own = Own()
    own.start()
    rows |= {"weights": gib(sum(planned.weights.values())), "reading": f"{loaded - began:.1f} s"}
    rows["largest memory after reading"] = gib(memory("VmHWM"))
    rows["memory after reading"] = f"{gib(memory('VmRSS'))}, of it own {gib(memory('RssAnon'))}"
    moments = []
    for step in pipeline.denoise("a red cube", num_inference_steps=steps, generator=torch.manual_seed(0)):
        moments.append(time.perf_counter())
        latents = step.latents
    rows["largest memory after the steps"] = gib(memory("VmHWM"))
    image = pipeline.decode(latents)[0]
    done = time.perf_counter()
    colours = image.getcolors(image.width * image.height) or []
    assert torch.isfinite(latents).all() and len(colours) > 1000, "a picture of random weights is colourful"
    rows |= {
        "picture": f"{image.width} x {image.height}, {steps} steps, guidance 4.5",
        "text and first step": f"{moments[0] - loaded:.1f} s",
        "each further step": f"{(moments[-1] - moments[0]) / (steps - 1):.2f} s",
        "decoding": f"{done - moments[-1]:.1f} s",
        "largest memory, pages of files included": gib(memory("VmHWM")),
        "largest memory of its own": gib(own.most),
        "planned": f"{gib(planned.peak)} +- {gib(planned.error)}",
    }
    print(f"\n| {dtype}, memory {wish} | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()), flush=True)
    if memory("VmHWM") > MOST:
        sys.exit(f"more than {gib(MOST)}")


class Own(threading.Thread):
    """Looks all the time how much memory is the process's own: pages of mapped files, which the system may
    drop, count as little as it counts them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory("RssAnon"))
            time.sleep(0.02)


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="2 or more (default 5)")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"], help="to compute in"
    )
    parser.add_argument("--size", type=int, default=256, choices=[256, 512, 1024], help="pixels")
    parser.add_argument("--text-layers", type=int, default=1, help="of T5; the published one has 24")
    wishes = ["auto", "least", "sequential"]
    parser.add_argument("--memory", nargs="+", default=["auto"], choices=wishes, help="of gen run")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)  # the second process
    chosen = parser.parse_args()
    if chosen.steps < 2:
        parser.error("--steps must be at least 2: the first is not like the others")
    if chosen.draw:
        draw(chosen.draw, chosen.steps, *chosen.dtype, *chosen.memory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"pixart-sigma-xl-{chosen.size}"
        write(folder, chosen.size, chosen.text_layers)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"folder: {gib(size)}, bfloat16; load {os.getloadavg()[0]:.1f}", flush=True)
        for dtype, wish in itertools.product(chosen.dtype, chosen.memory):
            command = [sys.executable, "-m", "benchmarks.full_size", "--steps", str(chosen.steps)]
            command += ["--dtype", dtype, "--memory", wish, "--draw", str(folder)]
            subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
