"""Whether weights fit this machine, told before anything is loaded and without torch: what they take on the
disk and in the memory of the processor.

Weights that are here are counted from their files' headers, others from the registry. What drawing takes
beside them is estimated as in gen.memory, whose plan (`gen run --dry-run`) is for one request and counts a
GPU's memory too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen import doctor, loader, memory
from weights import registry, store

DECODED_WHOLE = (
    1536 * 1536
)  # pixels; TILED_FROM of pipelines.latent_images, which loads torch; a test compares
UNITS = {"avx512_bf16", "amx_bf16"}  # with these the loader takes bfloat16 for large weights


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Bytes; None where nothing is known."""

    disk: int | None  # of the files, or what a pull would about bring
    memory: int | None  # at most, while a picture of the weights' own size is drawn
    streams: bool  # the text encoder would be read from the disk, layer by layer
    fits: bool | None  # into what is available now
    counted: bool  # from files, not from the registry

    def to_json(self) -> dict[str, Any]:
        return {
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
            "text_encoder_from_disk": self.streams,
            "fits": self.fits,
            "counted": self.counted,
        }


def fit(key: str) -> Fit:
    """Of these weights on this machine, as it is now."""
    facts = store.checkpoint(key)
    try:
        files = store.files(key)
        parts: dict[str, int] = {}
        for name, path in files.items():
            if name.endswith(".safetensors"):
                part = name.partition("/")[0]
                parts[part] = parts.get(part, 0) + store.numbers(path)
        disk = sum(path.stat().st_size for path in files.values())
        config = {**facts.config, **_json(files.get("transformer/config.json"))}
        widths = _json(files.get("vae/config.json")).get("block_out_channels") or [128] * 4
    except (store.CorruptWeights, OSError, ValueError):
        return Fit(disk=None, memory=None, streams=False, fits=None, counted=False)
    counted = bool(parts)
    if not counted:
        encoder = registry.T5_XXL if facts.beside > registry.T5_XXL else 0
        parts = {"transformer": facts.parameters, loader.ENCODER: encoder, "vae": facts.beside - encoder}
        here = store.sound_parts(facts) if facts.repo_id else {}
        disk = 4 * sum(count for part, count in parts.items() if part not in here)
    if not sum(parts.values()):
        return Fit(disk=None, memory=None, streams=False, fits=None, counted=False)
    item = 2 if sum(parts.values()) >= loader.SMALL and _bfloat16() else 4
    encoder = parts.get(loader.ENCODER, 0)
    streams = encoder > 0 and item * sum(parts.values()) > loader.ROOM * loader.memory("cpu")
    kept = item * (sum(parts.values()) - (encoder if streams else 0))
    peak = memory.PROGRAM + kept + _beside(facts, config, widths, item)
    return Fit(
        disk=disk,
        memory=peak,
        streams=streams,
        fits=peak <= doctor.available_memory("cpu"),
        counted=counted,
    )


@functools.cache
def _bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 fast."""
    return bool(UNITS & {*doctor.cpu()["instructions"]})


def _beside(facts: registry.Checkpoint, config: Mapping[str, Any], widths: Sequence[int], item: int) -> int:
    """Bytes that a step or the decoding takes beside the weights: the larger."""
    wide = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    patch, side = config.get("patch_size", 2), facts.native_size
    if facts.pipeline.startswith("DiT3D"):
        return 2 * (config.get("sample_size", 32) // patch) ** 3 * wide * memory.PER_TOKEN * item
    tokens = (side // (2 ** (len(widths) - 1) * patch)) ** 2
    decoded = side * side if side * side <= DECODED_WHOLE else memory.TILE
    return max(
        2 * tokens * wide * memory.PER_TOKEN * item,
        decoded * memory.PER_PIXEL * widths[0] // 128 * item,
    )


def _json(path: Path | None) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return found if isinstance(found, dict) else {}
