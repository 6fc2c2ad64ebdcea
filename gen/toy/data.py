"""Rendered toy scenes on disk, as shards that training reads: pictures, and what is seen in each 16 px
patch.

A shard is `<start>.safetensors`: `images` (N, 3, 128, 128) uint8 and `owners` (N, 8, 8) int8, the thing
that fills most of the objects' part of a patch (-1: ground). The scenes themselves are not stored: scene
i is a function of (seed, i).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gen.toy.render import render
from gen.toy.world import Scene
from gen.toy.world import scenes as scene_stream

SHARD = 1000
PATCH = 16


def patch_owners(owners: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """(B, Y, X) thing numbers per pixel -> (B, Y/patch, X/patch) int8: the thing with most pixels there,
    or -1 where things fill less than a sixth of the patch."""
    B, Y, X = owners.shape
    cells = owners.view(B, Y // patch, patch, X // patch, patch).permute(0, 1, 3, 2, 4).flatten(3)
    counts = torch.stack([(cells == k).sum(-1) for k in range(3)], dim=-1)
    winner = counts.argmax(-1)
    return torch.where(counts.sum(-1) * 6 >= patch * patch, winner, -1).to(torch.int8)


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:07d}.safetensors"


def write_shards(
    folder: Path,
    count: int,
    make: Callable[[int], dict[str, torch.Tensor]],  # from the start of a shard to what it holds
    *,
    verb: str,
    rank: int = 0,
    world: int = 1,
    report: Callable[[str], None] = print,
) -> None:
    """Make what is missing of the shards of samples 0..count-1; `rank` of `world` processes takes every
    world-th one."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = _share(folder, count, rank, world)
    began = time.monotonic()
    for done, start in enumerate(todo, 1):
        temporary = folder / f".{start:07d}.{os.getpid()}"
        save_file(make(start), temporary)
        temporary.replace(shard_path(folder, start))
        rate = done * SHARD / (time.monotonic() - began)
        left = (len(todo) - done) * SHARD / rate
        report(f"{verb} {done * SHARD}/{len(todo) * SHARD} scenes, {rate:.0f}/s, {left:.0f} s left")


def render_shards(
    folder: Path,
    seed: int,
    count: int,
    *,
    which: str = "seen",
    stream: Callable[..., Iterator[Scene]] = scene_stream,  # takes the seed, start and which
    device: torch.device | str = "cpu",
    **share: Any,  # rank, world, report: see write_shards
) -> None:
    """Render what is missing of scenes 0..count-1 into shards."""
    batch = 32 if str(device) == "cpu" else 500

    def make(start: int) -> dict[str, torch.Tensor]:
        shard = itertools.islice(stream(seed, start=start, which=which), SHARD)
        images, owners = [], []
        while chunk := list(itertools.islice(shard, batch)):
            picture, owner = render(chunk, device=device, return_owner=True)
            images.append((picture * 255).round().to("cpu", torch.uint8))
            owners.append(patch_owners(owner).cpu())
        return {"images": torch.cat(images), "owners": torch.cat(owners)}

    write_shards(folder, count, make, verb="rendered", **share)


def load_shards(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, 128, 128) uint8 and owners (N, 8, 8) int8 of the first `count` scenes that are
    rendered."""
    shards = list(_shards(folder, count))
    if not shards:
        raise FileNotFoundError(f"no rendered scenes in {folder}")
    return torch.cat([s["images"] for s in shards]), torch.cat([s["owners"] for s in shards])


def encode_shards(
    scenes: Path,
    latents: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    **share: Any,  # rank, world, report: see write_shards
) -> None:
    """What is missing of the latents of scenes 0..count-1, from their pictures."""

    def make(start: int) -> dict[str, torch.Tensor]:
        shard = load_file(shard_path(scenes, start))
        return {"latents": encode(shard["images"]), "owners": shard["owners"]}

    write_shards(latents, count, make, verb="encoded", **share)


def load_latents(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 4, 16, 16) float16 and owners (N, 8, 8) int8 of the first `count` scenes that are
    encoded."""
    shards = list(_shards(folder, count))
    if not shards:
        raise FileNotFoundError(f"no encoded scenes in {folder}")
    return torch.cat([s["latents"] for s in shards]), torch.cat([s["owners"] for s in shards])


def _share(folder: Path, count: int, rank: int, world: int) -> list[int]:
    """Starts of the shards that process `rank` makes. Shares do not depend on what is there already: the
    processes look at different moments."""
    return [s for s in range(0, count, SHARD)[rank::world] if not shard_path(folder, s).exists()]


def _shards(folder: Path, count: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, count, SHARD):
        path = shard_path(folder, start)
        if not path.exists():
            return
        yield load_file(path)
