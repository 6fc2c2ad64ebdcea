"""Low-rank adapters merged into a network: Hu et al. 2021, arXiv:2106.09685. LCM-LoRA of PixArt-delta.

An adapted layer computes W x + s B A x, with A of r rows, B of r columns and s = alpha / r. Merged, the sum
W + s B A is the layer's weight, so that a step costs what it cost without. A convolution is adapted in the
same way: A has its window, B is 1 x 1. Several adapters are summed before the sum is rounded.

Files are those of PEFT, diffusers and kohya's scripts: see `pipelines.lora_keys`. Reading them needs no PEFT.
`LoraPipeline` gives pipelines the methods by which people know adapters from diffusers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import lean, lora_keys
from pipelines.int8 import Int8Linear
from pipelines.lora_keys import CONFIG, HALVES, PEFT, PREFIX, WEIGHTS, listed
from pipelines.models.network import read_json, read_tensors
from pipelines.packed import PackedLinear

log = logging.getLogger(__name__)

# Options of PEFT that would change the numbers: only these values are computed here.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, {}),
}
HEADER = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a file's header


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one layer gains."""

    down: Tensor  # A: (r, in), or (r, in, Y, X) for a convolution
    up: Tensor  # B: (out, r), or (out, r, 1, 1)
    scale: float  # s

    def change(self, device: torch.device) -> Tensor:
        """s B A, float32, in the shape of the layer's weight."""
        down, up = self.down.to(device, torch.float32), self.up.to(device, torch.float32)
        return self.scale * (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The pairs of a file by the names that it gives to layers, and the names it says it was made for."""

    pairs: Mapping[str, Pair]
    targets: tuple[str, ...] | str  # ends of names, or one regular expression
    source: str  # the file, for messages
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # of both halves in the file
    left_out: tuple[str, ...] = ()  # keys for text encoders, which are not adapted here
    base: str = ""  # the weights that the file says it was made for

    def aims_at(self, layer: str) -> bool:
        """Whether PEFT would adapt a layer of this name."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, layer) is not None
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)

    def places(self, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, tuple[str, ...]]:
        """Name in the file -> the layers it changes. Raises ValueError, listing what does not fit."""
        return lora_keys.places(
            {name: (tuple(pair.down.shape), tuple(pair.up.shape)) for name, pair in self.pairs.items()},
            {name: tuple(layer.weight.shape) for name, layer in layers.items()},
            self.source,
            self.keys,
            self.base,
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge` did, and what `unmerge` needs: the weights as they were, which take their memory again."""

    layers: tuple[str, ...]
    untouched: tuple[str, ...]  # layers the adapter is made for by name, for which its file has no numbers
    originals: Mapping[str, Tensor]


def load_lora(path: Path | str) -> LoRA:
    """Read a safetensors file, or the one in a folder; PEFT's has its configuration beside it.

    Raises ValueError naming the file: it is missing, not safetensors, of another kind of adapter, has a half
    without the other, another rank than its configuration says, or numbers that are not finite.
    """
    file = lora_keys.adapter_file(Path(path))
    tensors = read_tensors(file.parent, file.name)
    metadata = _header(file)
    keys = lora_keys.parse(tensors, str(file))
    source = file.parent / CONFIG if keys.style == PEFT else file
    config = read_json(source) if keys.style == PEFT else _config_in(metadata, file)
    for name, values in PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{source}: {name} {config[name]!r} is not supported")
    for key, tensor in tensors.items():
        _check_finite(file, key, tensor)
    pairs = {}
    for layer, slot in keys.slots.items():
        down, up = tensors[slot.down], tensors[slot.up]
        said = config if "r" in config or keys.style == PEFT else _own(slot, tensors, file)
        if slot.alpha and "r" in config:
            raise ValueError(f"{file} says the strength of {layer} twice: in its header, and by {slot.alpha}")
        pairs[layer] = _pair(layer, down, up, said, source)
    targets = config.get("target_modules") or ()
    return LoRA(
        pairs=pairs,
        targets=targets if isinstance(targets, str) else tuple(targets),
        source=str(file),
        keys={layer: (slot.down, slot.up) for layer, slot in keys.slots.items()},
        left_out=keys.text,
        base=str(config.get("base_model_name_or_path") or metadata.get("base_model") or ""),
    )


def _header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:  # which `read_tensors` could open
        return dict(opened.metadata() or {})


def _config_in(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What diffusers wrote into the header, or nothing. Raises ValueError for words that are not JSON."""
    if HEADER not in metadata:
        return {}
    try:
        entries = json.loads(metadata[HEADER])
    except ValueError as error:
        raise ValueError(f"{file}: {HEADER} in its header is not JSON") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: {HEADER} in its header is no JSON object")
    parts = ("transformer.", "unet.")
    return {key.removeprefix(next(filter(key.startswith, parts), "")): entries[key] for key in entries}


def _own(slot: lora_keys.Slot, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Rank and strength of a layer in a file without a configuration: alpha as it says, or else the rank."""
    rank = len(tensors[slot.down]) if tensors[slot.down].ndim else 0
    if not slot.alpha:
        return {"r": rank, "lora_alpha": rank}
    if tensors[slot.alpha].numel() != 1:
        raise ValueError(f"{file}: {slot.alpha} must be one number, not {tuple(tensors[slot.alpha].shape)}")
    return {"r": rank, "lora_alpha": tensors[slot.alpha].item()}


def _check_finite(file: Path, key: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{file}: {key} holds numbers that are not finite (NaN or infinity)")


def _pair(layer: str, down: Tensor, up: Tensor, config: Mapping[str, Any], path: Path) -> Pair:
    """Checked against the configuration, which may name other ranks and strengths for some layers."""
    rank = _of_layer(config.get("rank_pattern"), layer, config.get("r"))
    alpha = _of_layer(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r must be a positive integer, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha must be a number, not {alpha!r}")
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[2:].numel() != 1:
        raise ValueError(f"{path}: {layer} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}")
    if (down.shape[0], up.shape[1]) != (rank, rank):
        raise ValueError(f"{path}: {layer} has rank {down.shape[0]} and {up.shape[1]}, r means {rank}")
    return Pair(down=down, up=up, scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_layer(pattern: Mapping[str, Any] | None, layer: str, otherwise: Any) -> Any:
    """The entry whose key ends the layer's name, as a regular expression; PEFT takes the first."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return otherwise


def save_lora(
    folder: Path | str,
    pairs: Mapping[str, tuple[Tensor, Tensor]],  # layer -> A and B, as in Pair
    rank: int,
    alpha: float,
    targets: Sequence[str],  # ends of the names of the layers it is made for
    metadata: Mapping[str, str] | None = None,  # words for the header, such as "base_model": its weights
) -> Path:
    """Write a folder that `load_lora`, PEFT and diffusers read, the numbers in their own dtype; returns it.

    Layers of another rank than `rank` keep alpha / rank as their strength. Raises ValueError, and writes
    nothing, for what `load_lora` would refuse.
    """
    from safetensors.torch import save_file

    folder, metadata = Path(folder), dict(metadata or {})
    if not pairs:
        raise ValueError(f"{folder}: there are no layers to write")
    ranks = {layer: len(down) for layer, (down, _) in pairs.items() if down.ndim and len(down) != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(layer): own for layer, own in ranks.items()},
        "alpha_pattern": {re.escape(layer): alpha / rank * own for layer, own in ranks.items()},
        "target_modules": list(targets),
        "base_model_name_or_path": metadata.get("base_model"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for layer, halves in sorted(pairs.items()):
        _pair(layer, *halves, config, folder / CONFIG)
        for end, half in zip(HALVES, halves, strict=True):
            tensors[f"{PREFIX}{layer}{end}"] = half.detach().cpu().contiguous()
            _check_finite(folder / WEIGHTS, f"{PREFIX}{layer}{end}", half)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})
    # safetensors makes it readable by its owner only, whatever the umask says
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    return folder


def merge(model: nn.Module, lora: LoRA, scale: float = 1.0, *, keep_originals: bool = True) -> Merged:
    """`merge_all` of a single adapter."""
    return merge_all(model, [(lora, scale)], keep_originals=keep_originals)


@torch.no_grad()
def merge_all(
    model: nn.Module,
    adapters: Sequence[tuple[LoRA, float]],  # each with how many times it is added
    *,
    keep_originals: bool = True,
) -> Merged:
    """Add adapters to the model's weights; more may be merged on top of them.

    Without originals kept the memory of the replaced weights is free again, and `unmerge` refuses.

    The sum is taken in float32 and rounded once to the weights' dtype. Raises ValueError, and changes
    nothing, unless every tensor of the files finds a layer of its shape.
    """
    for _, scale in adapters:
        check_scale(scale)
    modules = dict(model.named_modules())
    for lora, _ in adapters:
        _check_open(model, lora.source)
    layers = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    placed = [lora.places(layers) for lora, _ in adapters]
    parts: dict[str, list[tuple[LoRA, str, float, int]]] = {}  # layer -> what it gains, and which part of it
    for (lora, scale), places in zip(adapters, placed, strict=True):
        for name, own in places.items():
            for index, layer in enumerate(own):
                parts.setdefault(layer, []).append((lora, name, scale, index))
    originals = {}
    for layer, gains in parts.items():
        weight: Tensor = layers[layer].weight
        total = weight.float()
        for lora, name, scale, index in gains:
            change = lora.pairs[name].change(weight.device)
            rows = len(weight)
            total = total + scale * change[index * rows : (index + 1) * rows]
        if keep_originals:
            originals[layer] = weight.data
        weight.data = total.to(weight.dtype)
    merged = Merged(
        layers=tuple(parts),
        untouched=tuple(
            name
            for name in layers
            if any(
                lora.aims_at(name) and not any(name in own for own in places.values())
                for (lora, _), places in zip(adapters, placed, strict=True)
            )
        ),
        originals=originals,
    )
    _stack(model).append(merged)
    return merged


def check_scale(scale: Any) -> None:
    """Raises ValueError unless it is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a number, not {scale!r}")


def _check_open(model: nn.Module, source: str) -> None:
    """Raises ValueError for a model whose weights are no longer there to be changed."""
    if getattr(model, "streamed_on", None) is not None:
        raise ValueError(
            f"{source}: the model leaves its weights elsewhere until they are called, where adapters cannot "
            "be merged; load it anew without that"
        )
    if any(
        isinstance(module, PackedLinear | Int8Linear) or getattr(module, "to_qkv", None) is not None
        for module in model.modules()
    ):
        raise ValueError(
            f"{source}: the model was made ready for drawing; call pipelines.lean.restore, or load it anew"
        )


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Put back the very weights that `merge` replaced, to the bit, wherever the model is now.

    Raises ValueError when it is not the last that was merged. After a change of dtype the weights are those
    that the same change makes of the originals.
    """
    _check_open(model, "this adapter cannot be taken out")
    stack = _stack(model)
    if not any(one is merged for one in stack):
        raise ValueError("this adapter is not merged into this model")
    if stack[-1] is not merged:
        raise ValueError("another adapter was merged after this one; unmerge that first")
    if merged.layers and not merged.originals:
        raise ValueError("this adapter was merged without keeping the originals; load the weights again")
    for name, original in merged.originals.items():
        weight: Any = model.get_submodule(name).weight
        weight.data = original.to(weight.device, weight.dtype)
    stack.pop()


def _stack(model: nn.Module) -> list[Merged]:
    """What is merged into a model, in order. It lies on the model: a copy or another model has its own."""
    if "_merged_adapters" not in vars(model):
        vars(model)["_merged_adapters"] = []
    return vars(model)["_merged_adapters"]


# --- adapters of a pipeline ----------------------------------------------------------------------------


class Adapters:
    """What is loaded for one network, what of it is merged, and what was made part of its weights."""

    def __init__(self) -> None:
        self.loaded: dict[str, LoRA] = {}
        self.active: dict[str, float] = {}
        self.fused: dict[str, float] = {}
        self._merged: Merged | None = None
        self._fused: Merged | None = None

    def add(self, network: nn.Module, lora: LoRA, name: str | None) -> str:
        """Merge it beside those that are active; returns its name."""
        if name is None:
            name = next(
                f"default_{n}" for n in range(len(self.loaded) + 1) if f"default_{n}" not in self.loaded
            )
        if name in self.loaded:
            raise ValueError(f"there is an adapter '{name}' already; give another name, or delete that first")
        if lora.left_out:
            log.warning(
                "%s: %d tensors for text encoders are left out: %s",
                lora.source,
                len(lora.left_out),
                listed(lora.left_out),
            )
        self._merge(network, {**self.loaded, name: lora}, {**self.active, name: 1.0})
        return name

    def activate(self, network: nn.Module, weights: Mapping[str, float]) -> None:
        """Merge these and no others."""
        for name, weight in weights.items():
            self._named(name)
            check_scale(weight)
        if dict(weights) != self.active or list(weights) != list(self.active):
            self._merge(network, self.loaded, dict(weights))

    def fuse(self, network: nn.Module, names: Sequence[str] | None, scale: float) -> None:
        if self._fused is not None:
            raise ValueError(f"{', '.join(self.fused)} is fused already; call unfuse_lora first")
        wanted = self.active if names is None else names
        chosen = {name: self.active.get(name, 1.0) * scale for name in wanted}
        for name, weight in chosen.items():
            self._named(name)
            check_scale(weight)
        if not chosen:
            raise ValueError("no adapter is active, so there is nothing to fuse")
        others = {name: weight for name, weight in self.active.items() if name not in chosen}
        with _plainly(network):
            self._unmerge(network)
            self._fused = merge_all(network, [(self.loaded[name], chosen[name]) for name in chosen])
            self.fused = chosen
            self._merge(network, self.loaded, others)

    def unfuse(self, network: nn.Module) -> None:
        if self._fused is None:
            raise ValueError("no adapter is fused")
        with _plainly(network):
            self._unmerge(network)
            unmerge(network, self._fused)
            again, self._fused, self.fused = {**self.fused, **self.active}, None, {}
            self._merge(network, self.loaded, again)

    def remove(self, network: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            self._named(name)
            if name in self.fused:
                raise ValueError(f"'{name}' is fused into the weights; call unfuse_lora first")
        left = {name: lora for name, lora in self.loaded.items() if name not in names}
        self._merge(network, left, {name: self.active[name] for name in self.active if name in left})

    def unload(self, network: nn.Module) -> None:
        """Forget all: the weights are as loaded, to the bit, but for what is fused, which stays for good."""
        self._merge(network, {}, {})
        if self._fused is not None:
            _stack(network).remove(self._fused)
            self._fused, self.fused = None, {}

    def _named(self, name: str) -> None:
        if name not in self.loaded:
            known = ", ".join(self.loaded) or "none"
            raise ValueError(f"there is no adapter '{name}'; loaded: {known}")

    def _merge(self, network: nn.Module, loaded: dict[str, LoRA], weights: dict[str, float]) -> None:
        """Replace what is merged. When that fails, all is as it was."""
        if not weights and self._merged is None:
            self.loaded, self.active = loaded, weights
            return
        with _plainly(network):
            self._unmerge(network)
            try:
                if weights:
                    self._merged = merge_all(network, [(loaded[name], weights[name]) for name in weights])
            except ValueError:
                if self.active:
                    self._merged = merge_all(network, [(self.loaded[n], w) for n, w in self.active.items()])
                raise
        self.loaded, self.active = loaded, weights

    def _unmerge(self, network: nn.Module) -> None:
        if self._merged is not None:
            unmerge(network, self._merged)
            self._merged = None


@contextmanager
def _plainly(network: nn.Module) -> Iterator[None]:
    """The network as it was loaded, for the time of a change; made ready for drawing again if it was.

    Raises ValueError for one that cannot go back.
    """
    if any(isinstance(module, Int8Linear) for module in network.modules()):
        raise ValueError(
            "the transformer is in int8, and adapters are merged before that: load the pipeline anew, call "
            "load_lora_weights, then prepare(int8=True)"
        )
    recorded = not isinstance(network, nn.Module)  # pipelines.compiled.Replayed
    if recorded or any("_regions" in vars(module) for module in network.modules()):
        raise ValueError("the transformer is compiled; load the pipeline anew, and its adapters before that")
    ready = any(
        isinstance(module, PackedLinear) or getattr(module, "to_qkv", None) is not None
        for module in network.modules()
    )
    if ready:
        lean.restore(network)
    try:
        yield
    finally:
        if ready:
            lean.prepare(network)


class LoraPipeline:
    """The methods of a pipeline by which adapters come and go; they speak diffusers' words.

    Adapters are always merged, so that a step costs what it costs without, on the lean path too: changing
    them turns the transformer back, merges and readies it again, which for a large one takes seconds.
    """

    transformer: Any
    _lora_adapters: Adapters

    @property
    def _adapters(self) -> Adapters:
        if "_lora_adapters" not in vars(self):
            self._lora_adapters = Adapters()
        return self._lora_adapters

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Path | str,  # a folder or file on this machine
        adapter_name: str | None = None,  # None: default_0 and so on
        weight_name: str | None = None,  # the file in the folder, where there are several
    ) -> None:
        """Read an adapter and merge it, with weight 1, beside those that are active.

        Raises ValueError, and changes nothing: see `load_lora` and `merge_all`; a name that is taken; a
        transformer in int8, compiled, or with its weights elsewhere.
        """
        path = Path(pretrained_model_name_or_path_or_dict)
        self._adapters.add(
            self.transformer, load_lora(path / weight_name if weight_name else path), adapter_name
        )

    def set_adapters(
        self,
        adapter_names: Sequence[str] | str,
        adapter_weights: Sequence[float] | float | None = None,  # None: 1 for each
    ) -> None:
        """Merge these loaded adapters, so many times each, and no others; an empty list is none."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, int | float):
            weights = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters and {len(weights)} weights")
        if len(set(names)) < len(names):
            raise ValueError(f"an adapter is named twice: {', '.join(names)}")
        self._adapters.activate(self.transformer, dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of those that are merged, but for fused ones."""
        return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Part of the pipeline -> the names of all that are loaded for it."""
        return {"transformer": list(self._adapters.loaded)} if self._adapters.loaded else {}

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Forget some. Raises ValueError for one that is not loaded or is fused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._adapters.remove(self.transformer, names)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Make the active adapters, or those named, part of the weights: `unload_lora_weights` leaves them.

        Raises ValueError when there are none, or some are fused already.
        """
        self._adapters.fuse(self.transformer, adapter_names, lora_scale)

    def unfuse_lora(self) -> None:
        """Make fused adapters active ones again, with the weights they were fused with."""
        self._adapters.unfuse(self.transformer)

    def unload_lora_weights(self) -> None:
        """Forget all adapters. The weights are those that were loaded, to the bit, and what was fused."""
        self._adapters.unload(self.transformer)
