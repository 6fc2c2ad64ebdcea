"""From a row and settings to a pipeline that is ready to draw, keeping the last ones that fit in memory."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gen import adapters
from gen.catalog import Model
from gen.embeddings import Embeddings
from gen.errors import GenError
from gen.request import Settings
from weights import store

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
    loras: tuple[dict[str, Any], ...] = ()  # name, scale and fingerprint of what is merged into them
    offloaded: Mapping[str, str] = field(default_factory=dict)  # part -> where its large layers stay


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What a kept pipeline is asked for by."""

    pipeline: str
    fingerprint: str
    index: str  # model_index.json and the parts' settings, which may change without the tensors
    device: str
    dtype: str
    attention: str
    exact: str
    quantize: str
    compile: bool
    offload: tuple[tuple[str, str], ...]  # as `offloads` has it
    loras: tuple[tuple[str, float], ...] = ()  # fingerprints and scales, in order


# Weights of fewer parameters stay float32 on a CPU: bfloat16 saves a tenth of little, and would give other
# pixels on processors with units for it than on those without.
SMALL = 50_000_000
ENCODER = "text_encoder"
ROOM = 0.6  # of the memory for weights; the rest is for what is computed, and for other programs

_kept: OrderedDict[_Key, Loaded] = OrderedDict()  # least recently used first
_lock = threading.Lock()  # one load at a time: two would need the memory twice


def load(row: Model, folder: Path, settings: Settings, loras: Sequence[adapters.Wanted] = ()) -> Loaded:
    """The pipeline of these weights with these settings, from memory or from disk.

    `loras`: low-rank changes to merge into them. A pipeline with such changes has a transformer of its own,
    read anew from disk, and shares the rest: runs that go on with others, or with none, do not see them.

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
        merged = adapters.recipe(loras)
        key = _Key(
            pipeline=row.pipeline,
            fingerprint=fingerprint,
            index=_settings_of(folder),
            device=device,
            dtype=dtype,
            attention=settings.attention,
            exact=settings.exact,
            quantize=settings.quantize,
            compile=settings.compile,
            offload=tuple(offloads(folder, device, dtype, settings.memory).items()),
            loras=tuple((one["fingerprint"], one["scale"]) for one in merged),
        )
        if key in _kept:
            _kept.move_to_end(key)
            found = _kept[key]  # the same adapters may have had other names
            return found if found.loras == tuple(merged) else replace(found, loras=tuple(merged))
        return _keep(key, pipeline_class, folder, loras, merged)


def _settings_of(folder: Path) -> str:
    """The index of a pipeline and the configurations of its parts: folders of one's own may share tensors and
    differ in these."""
    files = [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def forget() -> None:
    """Drop all kept pipelines, to make room."""
    with _lock:
        _kept.clear()


def _keep(
    key: _Key,
    pipeline_class: Any,
    folder: Path,
    loras: Sequence[adapters.Wanted],
    merged: Sequence[dict[str, Any]],
) -> Loaded:
    import torch

    from pipelines import attention, components

    attention.remember(store.home() / "attention.json")  # what was measured, so that pixels stay the same
    offload = dict(key.offload)
    if loras and "transformer" in offload:
        raise GenError(
            "A LoRA is merged into the weights, and --memory sequential and group leave them elsewhere.",
            "Leave --lora or --memory out.",
            "bad_input",
        )
    needed = needs(folder, key.dtype, offload)
    like = next((one for other, one in _kept.items() if replace(other, loras=key.loras) == key), None)
    while _kept and needed + sum(one.bytes for one in _kept.values()) > memory(key.device) // 2:
        old, _ = _kept.popitem(last=False)
        log.info("dropped %s to make room", old)
    try:
        options = {"torch_dtype": getattr(torch, key.dtype), "device": key.device}
        if like is None or "transformer" in offload:
            pipeline = pipeline_class.from_pretrained(folder, **options, offload=offload)
        else:  # other adapters: all but the transformer is the same
            pipeline = copy.copy(like.pipeline)
            name = components.read_index(folder, store.family(folder), ("transformer",))["transformer"]
            pipeline.transformer = components.load(folder / "transformer", name, **options)
    except components.NotOffloadable as error:
        raise GenError(
            f"These weights need more memory than there is, or than you allow: {error}.",
            "Leave --memory out, or take --dtype bfloat16 or another machine.",
            "out_of_memory",
        ) from error
    except ValueError as error:  # whole files, and yet they do not fit together
        raise store.CorruptWeights(str(error)) from error
    try:
        chosen = pipeline.set_attention(key.attention)
    except ValueError as error:
        message = str(error)
        raise GenError(
            f"{message[0].upper()}{message[1:]}.", "Leave --attention out.", "bad_input"
        ) from error
    if loras:
        merge(pipeline.transformer, loras)
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
        loras=tuple(merged),
        offloaded=offload,
    )
    _kept[key] = loaded
    return loaded


def _ready(pipeline: Any, key: _Key) -> None:
    try:
        if key.compile and key.device == "cuda" and _small(pipeline.transformer):
            # Such networks wait for Python, not for the GPU
            from pipelines.compiled import Replayed

            pipeline.prepare(key.exact)
            pipeline.transformer = Replayed(pipeline.transformer)
        elif key.compile:  # it does with plain layers what the lean path does by hand
            from pipelines.compiled import compile_blocks

            compile_blocks(pipeline.transformer, store.home() / "compiled")
        else:
            pipeline.prepare(key.exact, int8=key.quantize == "int8")
    except ValueError as error:
        message = str(error)
        raise GenError(
            f"{message[0].upper()}{message[1:]}.", "Leave --quantize and --compile out.", "bad_input"
        ) from error


def _small(network: Any) -> bool:
    return sum(one.numel() for one in network.parameters()) < SMALL


def needs(folder: Path, dtype: str, offload: Mapping[str, str]) -> int:
    """Bytes of the weights that are on the device throughout."""
    parameters = store.parameters(folder) - sum(store.parameters(folder / name) for name in offload)
    return parameters * (4 if dtype == "float32" else 2)


def offloads(folder: Path, device: str, dtype: str, wish: str = "auto") -> dict[str, str]:
    """Part -> where its large layers stay until they are called, "file" or "host"; see pipelines.streaming.

    `wish` is Settings.memory. "auto": the text encoder stays in its file where all weights would fill more
    than `ROOM` of the memory. Raises bad_input for a wish that means nothing for these weights or here.
    """
    parts = [name for name in (ENCODER, "transformer", "controlnet") if (folder / name).is_dir()]
    reads = ENCODER in parts
    if wish == "auto":
        full = reads and needs(folder, dtype, {}) > ROOM * memory(device)
        return {ENCODER: "file"} if full else {}
    if wish == "least":
        if not reads:
            raise GenError(
                "These weights have no text encoder, which is what --memory least leaves on disk.",
                "Take --memory sequential, which leaves all networks there, or leave it out.",
                "bad_input",
            )
        return {ENCODER: "file"}
    if wish == "group" and device == "cpu":
        raise GenError(
            "--memory group keeps weights outside of a GPU, and this runs on the CPU.",
            "Take --memory least or sequential, or leave it out.",
            "bad_input",
        )
    return {name: "file" if name == ENCODER or wish == "sequential" else "host" for name in parts}


def merge(transformer: Any, loras: Sequence[adapters.Wanted]) -> int:
    """Add adapters to a network's weights for good; returns how many layers changed. Raises bad_input."""
    from pipelines import lora

    try:
        found = [(lora.load_lora(adapters.facts(one.name).file), one.scale) for one in loras]
        return len(lora.merge_all(transformer, found, keep_originals=False).layers)
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
