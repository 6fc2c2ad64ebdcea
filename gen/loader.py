"""From a row and settings to a pipeline that is ready to draw, keeping the last ones that fit in memory."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen.catalog import Model
from gen.errors import GenError
from gen.request import Settings
from weights import registry, store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A pipeline and what was decided about it."""

    pipeline: Any
    device: str  # cpu, cuda, mps
    dtype: str  # float32, bfloat16, float16
    attention: str
    fingerprint: str  # of the weights
    bytes: int
    lora: str = ""  # fingerprint of what is merged into them


_kept: OrderedDict[tuple[str, ...], Loaded] = OrderedDict()  # least recently used first
_lock = threading.Lock()  # one load at a time: two would need the memory twice


def load(
    row: Model, folder: Path, settings: Settings, lora: str | None = None, lora_scale: float = 1.0
) -> Loaded:
    """The pipeline of these weights with these settings, from memory or from disk.

    `lora`: low-rank changes to merge into them, as Request holds them. A pipeline with such changes is one of
    its own: runs that go on with the plain weights do not see them.

    Raises GenError: corrupt_weights, not_installed, bad_input (a device that is not there), out_of_memory.
    """
    with _lock, explained(folder):
        # Structure first: that takes milliseconds and needs no torch. The bytes are then read in a second
        # thread while this one spends its time importing.
        store.verify(folder, checksums=False)
        fingerprint = store.fingerprint(folder)
        with ThreadPoolExecutor(1) as other:
            fresh = not any(key[1] == fingerprint for key in _kept)
            verified = other.submit(store.verify, folder) if fresh else None
            pipeline_class = resolve(row.pipeline)
            device, dtype = choose_device(settings)
            if verified is not None:
                verified.result()
        merged = adapter(lora) if lora else None
        change = (store.fingerprint(merged.parent), f"{lora_scale:g}") if merged else ("", "")
        key = (row.pipeline, fingerprint, device, dtype, settings.attention, *change)
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        return _keep(key, pipeline_class, folder, merged, lora_scale)


def adapter(lora: str) -> Path:
    """The safetensors file of an adapter. Raises bad_input when it is gone or damaged."""
    folder = store.find(lora) if lora in registry.CHECKPOINTS else Path(lora)
    try:
        if folder is None:
            raise store.CorruptWeights(f"{lora} is no longer on this machine")
        store.verify_adapter(folder)
    except store.CorruptWeights as error:
        hint = "Give another, or draw without it."
        raise GenError(f"The LoRA cannot be used: {error}.", hint, "bad_input") from error
    return folder / store.ADAPTER if folder.is_dir() else folder


def forget() -> None:
    """Drop all kept pipelines, to make room."""
    with _lock:
        _kept.clear()


def _keep(
    key: tuple[str, ...], pipeline_class: Any, folder: Path, merged: Path | None, scale: float
) -> Loaded:
    import torch

    _, fingerprint, device, dtype, attention, lora, _ = key
    needed = store.parameters(folder) * getattr(torch, dtype).itemsize
    while _kept and needed + sum(one.bytes for one in _kept.values()) > memory(device) // 2:
        old, _ = _kept.popitem(last=False)
        log.info("dropped %s to make room", old)
    try:
        pipeline = pipeline_class.from_pretrained(folder, torch_dtype=getattr(torch, dtype), device=device)
    except ValueError as error:  # whole files, and yet they do not fit together
        raise store.CorruptWeights(str(error)) from error
    try:
        chosen = pipeline.set_attention(attention)
    except ValueError as error:
        message = str(error)
        raise GenError(
            f"{message[0].upper()}{message[1:]}.", "Leave --attention out.", "bad_input"
        ) from error
    if merged is not None:
        _merge(pipeline.transformer, merged, scale)
    loaded = Loaded(
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        attention=chosen,
        fingerprint=fingerprint,
        bytes=needed,
        lora=lora,
    )
    _kept[key] = loaded
    return loaded


def _merge(transformer: Any, file: Path, scale: float) -> None:
    from pipelines import lora

    try:
        lora.merge(transformer, lora.load_lora(file), scale, keep_originals=False)
    except ValueError as error:
        raise GenError(
            f"The LoRA cannot be merged into these weights: {error}.",
            "Is it made for them? Leave --lora out to draw without it.",
            "bad_input",
        ) from error


def resolve(name: str) -> Any:
    """`module:Class` -> the class. A third-party package that is missing is not_installed."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("pipelines", "gen", "weights"):
            raise  # ours: a bug, not an incomplete installation
        raise GenError(
            f"The package {error.name} is not installed, and this model needs it.",
            "Install gen-studio with its requirements: pip install -r requirements.txt",
            "not_installed",
        ) from error
    return found


def choose_device(settings: Settings) -> tuple[str, str]:
    """The device and dtype to use, from the settings and what this machine has. Raises bad_input."""
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = settings.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present.get(device):
        raise GenError(
            f"There is no device '{device}' that PyTorch {torch.__version__} can use here.",
            f"Use one of: auto, {', '.join(name for name, there in present.items() if there)}.",
            "bad_input",
        )
    if settings.dtype != "auto":
        return device, settings.dtype
    return device, "bfloat16" if device == "cuda" else "float32"


def memory(device: str) -> int:
    """Bytes of memory that belong to the device as a whole."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What is expected to go wrong with files of weights, as GenError."""
    hint = (
        f"Restore {folder}: install gen-studio again, fetch the weights again, or see `gen list` for others."
    )
    try:
        yield
    except store.CorruptWeights as error:
        raise GenError(f"The weights are damaged: {error}.", hint, "corrupt_weights") from error
