"""DiT-3D's speed: a step of S/4 against the same network written plainly, 50 steps against 1000, and window
attention against global at XL/4 with 64 voxels. Random numbers for weights; what is measured is time and
memory, and that the plain network gives the same numbers.

    .venv/bin/python -m benchmarks.dit3d [--threads N] [--part step|sampling|window]
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.models.dit3d import SIZES, WINDOWS, DiT3DModel, position_table_3d
from pipelines.models.voxels import voxel_coordinates

POINTS = 2048


def random_model(**options) -> DiT3DModel:
    """With every number drawn: what starts as zero would be skipped by nobody, but tells nothing."""
    torch.manual_seed(0)
    model = DiT3DModel(num_embeds_ada_norm=1, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model


class PlainBlock(nn.Module):
    """One block as one writes it down: scores and softmax by hand, a new table each time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.heads = heads

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        batch, tokens, width = y.shape
        q, k, v = self.qkv(y).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1[:, None] * self.proj(y)
        y = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.fc2(nn.functional.gelu(self.fc1(y)))


class Plain(nn.Module):
    """DiT-3D without windows, voxels by loops over corners, nothing kept between steps."""

    def __init__(self, model: DiT3DModel) -> None:
        super().__init__()
        config = model.config
        width, patch = config.width, config.patch_size
        self.config = config
        self.embed = nn.Conv3d(3, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.num_embeds_ada_norm + config.class_dropout, width)
        self.blocks = nn.ModuleList(
            PlainBlock(width, config.num_attention_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, patch**3 * 3)
        self.register_buffer("positions", position_table_3d(config.tokens, width))
        self.take(model)

    @torch.no_grad()
    def take(self, model: DiT3DModel) -> None:
        def copy(ours: nn.Module, *theirs: nn.Module) -> None:
            ours.weight.copy_(torch.cat([one.weight for one in theirs]))
            if getattr(ours, "bias", None) is not None:
                ours.bias.copy_(torch.cat([one.bias for one in theirs]))

        copy(self.embed, model.pos_embed.proj)
        copy(self.time[0], model.timestep_embedder.linear_1)
        copy(self.time[2], model.timestep_embedder.linear_2)
        copy(self.label, model.class_embedder.embedding_table)
        for block, other in zip(self.blocks, model.transformer_blocks, strict=True):
            attention = other.attn1
            copy(block.qkv, attention.to_q, attention.to_k, attention.to_v)
            copy(block.proj, attention.to_out[0])
            copy(block.fc1, other.ff.net[0].proj)
            copy(block.fc2, other.ff.net[2])
            copy(block.modulation[1], other.norm1.linear)
        copy(self.final[1], model.proj_out_1)
        copy(self.out, model.proj_out_2)

    def forward(self, points: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        side, patch, r = self.config.tokens, self.config.patch_size, self.config.sample_size
        coordinates = voxel_coordinates(points, r)
        x, y, z = coordinates.round().long().unbind(1)
        index = (x * r + y) * r + z
        sums = points.new_zeros(len(points), 3, r**3).scatter_add(2, index[:, None].expand(-1, 3, -1), points)
        counts = points.new_zeros(len(points), 1, r**3)
        counts.scatter_add_(2, index[:, None], points.new_ones(len(points), 1, points.shape[2]))
        grid = (sums / counts.clamp(min=1)).reshape(len(points), 3, r, r, r)
        h = self.embed(grid).flatten(2).transpose(1, 2) + self.positions
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None].float() * frequencies
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(labels)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final(c).chunk(2, dim=1)
        h = self.out(self.norm(h) * (1 + scale[:, None]) + shift[:, None])
        h = h.reshape(len(h), side, side, side, patch, patch, patch, 3)
        grid = h.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(h), 3, r**3)
        low = coordinates.floor()
        share = coordinates - low
        answer = torch.zeros_like(points)
        for corner in range(8):
            ends = [(corner >> axis) & 1 for axis in range(3)]
            weight, place = torch.ones_like(share[:, 0]), torch.zeros_like(index)
            for axis, end in enumerate(ends):
                weight = weight * (share[:, axis] if end else 1 - share[:, axis])
                place = place * r + (low[:, axis].long() + end).clamp(max=r - 1)
            answer = answer + weight[:, None] * grid.gather(2, place[:, None].expand(-1, 3, -1))
        return answer


def seconds(work: Callable[[], object], least: float = 4.0) -> float:
    """The fastest of several runs: what disturbs a run makes it slower, never faster."""
    work()
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < least:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def step() -> None:
    model = random_model(**SIZES["S/4"], sample_size=32)
    plain = Plain(model).eval()
    for batch in (1, 8):
        points = torch.randn(batch, 3, POINTS)
        t, labels = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)
        modulation = model.modulation(t[:1], labels[:1])
        ours, theirs = model(points, modulation=modulation).sample, plain(points, t, labels)
        off = float((ours - theirs).abs().max() / theirs.abs().max())

        def fast(points: Tensor = points, modulation=modulation) -> Tensor:
            return model(points, modulation=modulation).sample

        def slow(points: Tensor = points, t: Tensor = t, labels: Tensor = labels) -> Tensor:
            return plain(points, t, labels)

        one, other = seconds(fast), seconds(slow)
        print(f"S/4, 32 voxels, {batch} clouds: ours {1e3 * one:.1f} ms a step, plain {1e3 * other:.1f} ms,")
        print(f"  {other / one:.2f} times as fast; largest relative difference {off:.1e}", flush=True)


@torch.inference_mode()
def sampling() -> None:
    from pipelines.dit3d import DiT3DPipeline
    from pipelines.point_diffusion import PointDiffusion

    pipeline = DiT3DPipeline(random_model(**SIZES["S/4"], sample_size=32), PointDiffusion())
    for steps, scheduler in ((50, "dpm++"), (1000, "default")):
        start = time.perf_counter()
        seed = torch.Generator().manual_seed(0)
        pipeline([0], num_inference_steps=steps, scheduler=scheduler, generator=seed)
        print(f"S/4, one cloud, {steps} steps ({scheduler}): {time.perf_counter() - start:.1f} s", flush=True)


@torch.inference_mode()
def window(kind: str) -> None:
    more = WINDOWS["XL"] if kind == "windows" else {}
    model = random_model(**SIZES["XL/4"], sample_size=64, **more)
    points = torch.randn(1, 3, POINTS)
    t, labels = torch.tensor([500]), torch.tensor([0])
    idle = peak()
    start = time.perf_counter()
    model(points, t, labels)
    taken = time.perf_counter() - start
    above = (peak() - idle) / 2**30
    print(f"XL/4, 64 voxels, {kind}: {taken:.1f} s a forward, {above:.2f} GiB above the weights")


def peak() -> int:
    """Bytes that this process has held at most, since it began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("there is no VmHWM here: measure on Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", choices=("step", "sampling", "windows", "global"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = {"step": step, "sampling": sampling}
    if arguments.part in parts:
        parts[arguments.part]()
    elif arguments.part:
        window(arguments.part)
    else:  # each in its own process: peaks of memory do not go down again
        for part in (*parts, "windows", "global"):
            options = ["--part", part, "--threads", str(arguments.threads)]
            subprocess.run([sys.executable, "-m", "benchmarks.dit3d", *options], check=True)


if __name__ == "__main__":
    main()
