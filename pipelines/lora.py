"""Low-rank adapters merged into a network: Hu et al. 2021, arXiv:2106.09685. LCM-LoRA of PixArt-delta.

An adapted layer computes W x + s B A x, with A of r rows, B of r columns and s = alpha / r. Merged, the sum
W + s B A is the layer's weight, so that a step costs what it cost without. A convolution is adapted in the
same way: A has its window, B is 1 x 1.

Files are those that PEFT publishes: `adapter_config.json` and `adapter_model.safetensors`, with two tensors
per layer, `base_model.model.<layer>.lora_A.weight` and `lora_B.weight`. Reading them needs no PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.int8 import Int8Linear
from pipelines.models.network import read_json, read_tensors
from pipelines.packed import PackedLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, HALVES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
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
    """The pairs of a file by the names of their layers, and the names it says it was made for."""

    pairs: Mapping[str, Pair]
    targets: tuple[str, ...] | str  # ends of names, or one regular expression
    source: str  # the file, for messages

    def aims_at(self, layer: str) -> bool:
        """Whether PEFT would adapt a layer of this name."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, layer) is not None
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge` did, and what `unmerge` needs: the weights as they were, which take their memory again."""

    layers: tuple[str, ...]
    untouched: tuple[str, ...]  # layers the adapter is made for by name, for which its file has no numbers
    originals: Mapping[str, Tensor]


def load_lora(path: Path | str) -> LoRA:
    """Read a folder with the two files, or the safetensors file with its configuration beside it.

    Raises ValueError naming the file: it is missing, not safetensors, of another kind of adapter, has a half
    without the other, another rank than its configuration says, or numbers that are not finite.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a safetensors file; adapters are read from nothing else")
    config_path = file.parent / CONFIG
    config = read_json(config_path)
    for name, values in PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{config_path}: {name} {config[name]!r} is not supported")
    halves = _halves(read_tensors(file.parent, file.name), file)
    pairs = {layer: _pair(layer, *halves[layer], config, config_path) for layer in sorted(halves)}
    targets = config.get("target_modules") or ()
    return LoRA(
        pairs=pairs,
        targets=targets if isinstance(targets, str) else tuple(targets),
        source=str(file),
    )


def _halves(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A and B."""
    shape = re.compile(f"{re.escape(PREFIX)}(?P<layer>.+)\\.lora_(?P<half>[AB])\\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = shape.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite (NaN or infinity)")
        found.setdefault(match["layer"], {})[match["half"]] = tensor
    if strange:
        raise ValueError(f"{file}: tensors that are no part of a LoRA: {_listed(strange)}")
    if not found:
        raise ValueError(f"{file} holds no tensors")
    alone = [layer for layer, halves in found.items() if len(halves) == 1]
    if alone:
        raise ValueError(f"{file}: lora_A or lora_B is missing for {_listed(alone)}")
    return {layer: (halves["A"], halves["B"]) for layer, halves in found.items()}


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


@torch.no_grad()
def merge(model: nn.Module, lora: LoRA, scale: float = 1.0, *, keep_originals: bool = True) -> Merged:
    """Add the adapter to the model's weights, `scale` times; several may be merged one after the other.

    Without originals kept the memory of the replaced weights is free again, and `unmerge` refuses.

    The sum is taken in float32 and rounded once to the weights' dtype. Raises ValueError, and changes
    nothing, unless every tensor of the file finds a layer of its shape.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a number, not {scale!r}")
    modules = dict(model.named_modules())
    if any(
        isinstance(module, PackedLinear | Int8Linear) or getattr(module, "to_qkv", None) is not None
        for module in modules.values()
    ):
        raise ValueError(
            f"{lora.source}: the model was made ready for drawing; "
            "call pipelines.lean.restore, or load it anew"
        )
    layers = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    lost = [name for name in lora.pairs if name not in layers]
    if lost:
        keys = [f"{PREFIX}{name}{half}" for name in lost for half in HALVES]
        raise ValueError(f"{lora.source}: the model has no layers for {_listed(keys)}")
    for name, pair in lora.pairs.items():
        shape = (pair.up.shape[0], *pair.down.shape[1:])
        if layers[name].weight.shape != shape:
            raise ValueError(
                f"{lora.source}: {name} is for weights of {shape}, "
                f"the model's are {tuple(layers[name].weight.shape)}"
            )
    originals = {}
    for name, pair in lora.pairs.items():
        weight = layers[name].weight
        if keep_originals:
            originals[name] = weight.data
        weight.data = (weight.float() + scale * pair.change(weight.device)).to(weight.dtype)
    merged = Merged(
        layers=tuple(lora.pairs),
        untouched=tuple(name for name in layers if lora.aims_at(name) and name not in lora.pairs),
        originals=originals,
    )
    _stack(model).append(merged)
    return merged


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Put back the very weights that `merge` replaced, to the bit, wherever the model is now.

    Raises ValueError when it is not the last that was merged. After a change of dtype the weights are those
    that the same change makes of the originals.
    """
    stack = _stack(model)
    if not any(one is merged for one in stack):
        raise ValueError("this adapter is not merged into this model")
    if stack[-1] is not merged:
        raise ValueError("another adapter was merged after this one; unmerge that first")
    if merged.layers and not merged.originals:
        raise ValueError("this adapter was merged without keeping the originals; load the weights again")
    for name, original in merged.originals.items():
        weight = model.get_submodule(name).weight
        weight.data = original.to(weight.device, weight.dtype)
    stack.pop()


def _stack(model: nn.Module) -> list[Merged]:
    """What is merged into a model, in order. It lies on the model: a copy or another model has its own."""
    if "_merged_adapters" not in vars(model):
        model._merged_adapters = []
    return vars(model)["_merged_adapters"]


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
