"""How much memory a request will take, before anything is loaded: a plan to compare with the measured peak.

Weights are counted from the files' headers, exactly. What is computed beside them is estimated: a transformer
needs some vectors per token, a decoder some numbers per pixel at its widest. Both factors were fitted to
measured peaks (benchmarks/README.md, full_size.py), hence the error bar.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen import catalog, image_inputs, loader
from gen.outputs import OUTPUTS
from gen.request import Request
from weights import registry, store

PROGRAM = 280 * 2**20  # Python and torch with nothing loaded
PER_TOKEN = 14  # vectors of the transformer's width: queries, keys, values, four of the feed-forward, copies
PER_PIXEL = 880  # numbers of a decoder whose narrowest layer has 128 channels
TILE = 512 * 512  # pixels decoded at a time when the picture is too large for one go
ERROR = 0.25  # of what is estimated
PACKED = ("transformer", "controlnet")  # see pipelines.packed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes."""

    weights: Mapping[str, int]  # of each part that stays in memory
    streamed: Mapping[str, int]  # of each part whose large layers are brought when they are called
    pages: int  # of the file of what was packed or converted for a CPU; the system may drop them
    drawing: int  # beside the weights, at most, during a step
    decoding: int
    memory: int  # of the device as a whole

    @property
    def peak(self) -> int:
        return PROGRAM + sum(self.weights.values()) + self.pages + self.beside

    @property
    def beside(self) -> int:
        return max(self.drawing, self.decoding)

    @property
    def error(self) -> int:
        """The peak may be this much more or less."""
        return int(ERROR * (PROGRAM + self.beside))

    @property
    def fits(self) -> bool:
        return self.peak + self.error <= self.memory

    def to_json(self) -> dict[str, Any]:
        return {
            "weights_bytes": dict(self.weights),
            "streamed_bytes": dict(self.streamed),
            "pages_bytes": self.pages,
            "drawing_bytes": self.drawing,
            "decoding_bytes": self.decoding,
            "peak_bytes": self.peak,
            "error_bytes": self.error,
            "memory_bytes": self.memory,
            "fits": self.fits,
        }


def plan(
    folder: Path,
    device: str,
    dtype: str,
    *,
    height: int | None = None,  # pixels; None: nothing is decoded
    width: int | None = None,
    rows: int = 2,  # of the batch: with guidance, two for each result
    wish: str = "auto",  # Settings.memory
) -> Plan:
    """For one result of these weights. Raises CorruptWeights when a file cannot be read."""
    item = 4 if dtype == "float32" else 2
    offload = loader.offloads(folder, device, dtype, wish)
    parts = {
        path.name: store.parameters(path) * item
        for path in sorted(folder.iterdir())
        if path.is_dir() and any(path.glob("*.safetensors"))
    }
    streamed = {name: parts.pop(name) for name in offload}
    drawing = decoding = 0
    config = _config(folder / "transformer")
    wide = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    if height and width:
        vae = _config(folder / "vae")
        widths = vae.get("block_out_channels") or [128]
        factor = 2 ** (len(widths) - 1) * config.get("patch_size", 2)
        tokens = (height // factor) * (width // factor)
        decoding = min(height * width, TILE if height * width > _tiled_from() else height * width)
        decoding *= int(PER_PIXEL * widths[0] / 128) * item
    else:
        tokens = (config.get("sample_size", 32) // config.get("patch_size", 4)) ** 3
    drawing = rows * tokens * wide * PER_TOKEN * item
    return Plan(
        weights=parts,
        streamed=streamed,
        pages=sum(store.size_on_disk(folder / name) for name in PACKED if device == "cpu" and name in parts),
        drawing=drawing,
        decoding=decoding,
        memory=loader.memory(device),
    )


def of_request(
    request: Request, facts: registry.Checkpoint, folder: Path, device: str, dtype: str, wish: str = "auto"
) -> Plan:
    """The plan for one result of a request; `wish` is Settings.memory. Raises CorruptWeights, GenError."""
    sized = OUTPUTS[catalog.MODELS[request.model].makes].sized
    height, width = image_inputs.seen(request.inputs, facts.native_size) if sized else (None, None)
    return plan(
        folder,
        device,
        dtype,
        height=height,
        width=width,
        rows=1 if request.inputs.get("guidance", 1) <= 1 else 2,
        wish=wish,
    )


def forget_peak(device: str) -> None:
    """Let `peak` begin anew, where the system can."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone has it; elsewhere it stays the whole process's
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The most bytes that were in use since `forget_peak`: of the GPU, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def _tiled_from() -> int:
    from pipelines.latent_images import TILED_FROM

    return TILED_FROM


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # what loads it will say so
    return found if isinstance(found, dict) else {}
