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
from gen.embeddings import Embeddings
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
    exact: str  # lean, plain
    quantize: str  # none, int8
    compiled: bool
    fingerprint: str  # of the weights
    bytes: int
    lora: str = ""  # fingerprint of what is merged into them
    streamed: tuple[str, ...] = ()  # parts that are read layer by layer when they are called


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What a kept pipeline is asked for by."""

    pipeline: str
    fingerprint: str
    index: str  # model_index.json, which may change without the tensors
    device: str
    dtype: str
    attention: str
    exact: str
    quantize: str
    compile: bool
    stream: bool
    adapter: str = ""
    adapter_scale: float = 1.0


# Weights of fewer parameters stay float32 on a CPU: bfloat16 saves a tenth of little, and would give other
# pixels on processors with units for it than on those without.
SMALL = 50_000_000
ENCODER = "text_encoder"
ROOM = 0.6  # of the memory for weights; the rest is for what is computed, and for other programs

_kept: OrderedDict[_Key, Loaded] = OrderedDict()  # least recently used first
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
            fresh = not any(key.fingerprint == fingerprint for key in _kept)
            verified = other.submit(store.verify, folder) if fresh else None
            pipeline_class = resolve(row.pipeline)
            device, dtype = choose_device(settings, store.parameters(folder))
            if verified is not None:
                verified.result()
        merged = adapter(lora) if lora else None
        key = _Key(
            pipeline=row.pipeline,
            fingerprint=fingerprint,
            index=(folder / "model_index.json").read_text(encoding="utf-8"),
            device=device,
            dtype=dtype,
            attention=settings.attention,
            exact=settings.exact,
            quantize=settings.quantize,
            compile=settings.compile,
            stream=must_stream(folder, device, dtype, settings.memory),
            adapter=store.fingerprint(merged.parent) if merged else "",
            adapter_scale=lora_scale if merged else 1.0,
        )
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        return _keep(key, pipeline_class, folder, merged)


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


def _keep(key: _Key, pipeline_class: Any, folder: Path, merged: Path | None) -> Loaded:
    import torch

    from pipelines import attention

    attention.remember(store.home() / "attention.json")  # what was measured, so that pixels stay the same
    needed = needs(folder, key.dtype, key.stream)
    while _kept and needed + sum(one.bytes for one in _kept.values()) > memory(key.device) // 2:
        old, _ = _kept.popitem(last=False)
        log.info("dropped %s to make room", old)
    options: dict[str, Any] = {"stream_text_encoder": True} if key.stream else {}
    try:
        pipeline = pipeline_class.from_pretrained(
            folder, torch_dtype=getattr(torch, key.dtype), device=key.device, **options
        )
    except ValueError as error:  # whole files, and yet they do not fit together
        raise store.CorruptWeights(str(error)) from error
    try:
        chosen = pipeline.set_attention(key.attention)
    except ValueError as error:
        message = str(error)
        raise GenError(
            f"{message[0].upper()}{message[1:]}.", "Leave --attention out.", "bad_input"
        ) from error
    if merged is not None:
        _merge(pipeline.transformer, merged, key.adapter_scale)
    _ready(pipeline, key)
    encoder = folder / ENCODER
    if encoder.is_dir() and store.parameters(encoder) >= SMALL:
        pipeline.embeddings = Embeddings(folder, key.dtype)
    loaded = Loaded(
        pipeline=pipeline,
        device=key.device,
        dtype=key.dtype,
        attention=chosen,
        exact=key.exact,
        quantize=key.quantize,
        compiled=key.compile,
        fingerprint=key.fingerprint,
        bytes=needed,
        lora=key.adapter,
        streamed=(ENCODER,) if key.stream else (),
    )
    _kept[key] = loaded
    return loaded


def _ready(pipeline: Any, key: _Key) -> None:
    try:
        if key.compile:  # it does with plain layers what the lean path does by hand
            from pipelines.compiled import compile_blocks

            compile_blocks(pipeline.transformer, store.home() / "compiled")
        else:
            pipeline.prepare(key.exact, int8=key.quantize == "int8")
    except ValueError as error:
        message = str(error)
        raise GenError(
            f"{message[0].upper()}{message[1:]}.", "Leave --quantize and --compile out.", "bad_input"
        ) from error


def needs(folder: Path, dtype: str, stream: bool) -> int:
    """Bytes of the weights that are in memory throughout."""
    parameters = store.parameters(folder)
    if stream:
        parameters -= store.parameters(folder / ENCODER)
    return parameters * (4 if dtype == "float32" else 2)


def must_stream(folder: Path, device: str, dtype: str, wish: str = "auto") -> bool:
    """Whether the text encoder has to stay in its file: when all weights would fill more than `ROOM` of the
    memory, or when as little memory as possible is wished for."""
    if not (folder / ENCODER).is_dir():
        return False
    return wish == "least" or needs(folder, dtype, False) > ROOM * memory(device)


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


def choose_device(settings: Settings, parameters: int | None = None) -> tuple[str, str]:
    """The device and dtype to use for weights of so many parameters (None: many), from the settings and what
    this machine has. Raises bad_input."""
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
    return device, choose_dtype(device, parameters)


def choose_dtype(device: str, parameters: int | None = None) -> str:
    """What `auto` means. float16 never: a CPU takes 16 times as long with it, and it overflows where
    bfloat16 does not."""
    from gen.optim import bfloat16_units

    if device == "cuda":
        return "bfloat16"
    small = parameters is not None and parameters < SMALL
    return "bfloat16" if device == "cpu" and not small and bfloat16_units(device) else "float32"


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
