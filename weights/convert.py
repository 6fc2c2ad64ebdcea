"""Official checkpoints to our names: tables of name maps, and the pure functions that follow them.

State dict in, state dicts out; no network is imported. What a checkpoint does not say (which configuration it
was trained with) is read from the shapes of its tensors where they tell, and from `given` where they do not.
`given` speaks the words of the official configurations: input_size, hidden_size, depth, num_heads,
pe_interpolation or lewei_scale, kv_compress_config, and so on.

Pickles are opened here and nowhere else, and only for tensors (`weights_only=True`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights.store import CorruptWeights, read_header

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]


class ConversionError(ValueError):
    """The file is not a checkpoint of the family it should be, or not a whole one."""


@dataclass(frozen=True)
class Rule:
    """One official name and what becomes of it: one name, several equal parts along the rows, or nothing."""

    official: str
    ours: tuple[str, ...] = ()  # none: the tensor can be computed, and is dropped
    group: str = ""  # optional tensors: of one group all must be there, or none


def _both(official: str, *ours: str, group: str = "") -> tuple[Rule, Rule]:
    """A layer: weight and bias."""
    return tuple(  # type: ignore[return-value]
        Rule(f"{official}.{kind}", tuple(f"{name}.{kind}" for name in ours), group)
        for kind in ("weight", "bias")
    )


def _time(ours: str) -> tuple[Rule, ...]:
    return (
        *_both("t_embedder.mlp.0", f"{ours}.linear_1"),
        *_both("t_embedder.mlp.2", f"{ours}.linear_2"),
    )


_BODY = (
    *_both("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    *_both("attn.proj", "attn1.to_out.0"),
    *_both("mlp.fc1", "ff.net.0.proj"),
    *_both("mlp.fc2", "ff.net.2"),
)
DIT_BLOCK = (*_BODY, *_both("adaLN_modulation.1", "norm1.linear"))
PIXART_BLOCK = (
    *_BODY,
    Rule("scale_shift_table", ("scale_shift_table",)),
    *_both("cross_attn.q_linear", "attn2.to_q"),
    *_both("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    *_both("cross_attn.proj", "attn2.to_out.0"),
    *_both("attn.q_norm", "attn1.q_norm", group="qk_norm"),
    *_both("attn.k_norm", "attn1.k_norm", group="qk_norm"),
    *_both("attn.sr", "attn1.sr", group="kv_compress"),
    *_both("attn.norm", "attn1.norm", group="kv_compress"),
)
DIT = (
    Rule("pos_embed", group="pos_embed"),
    *_both("x_embedder.proj", "pos_embed.proj"),
    *_time("timestep_embedder"),
    Rule("y_embedder.embedding_table.weight", ("class_embedder.embedding_table.weight",)),
    *_both("final_layer.adaLN_modulation.1", "proj_out_1"),
    *_both("final_layer.linear", "proj_out_2"),
)
# Of DiT-3D with relative positions: embeddings of the distance along each axis
RELATIVE = tuple(Rule(f"attn.rel_pos_{axis}", (f"attn1.rel_pos_{axis}",)) for axis in "xyz")
_MICRO = "adaln_single.emb.{}_embedder.linear_{}"
PIXART = (
    Rule("pos_embed", group="pos_embed"),
    *_both("x_embedder.proj", "pos_embed.proj"),
    *_time("adaln_single.emb.timestep_embedder"),
    *_both("t_block.1", "adaln_single.linear"),
    Rule("y_embedder.y_embedding", group="y_embedding"),
    *_both("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    *_both("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    *_both("csize_embedder.mlp.0", _MICRO.format("resolution", 1), group="micro"),
    *_both("csize_embedder.mlp.2", _MICRO.format("resolution", 2), group="micro"),
    *_both("ar_embedder.mlp.0", _MICRO.format("aspect_ratio", 1), group="micro"),
    *_both("ar_embedder.mlp.2", _MICRO.format("aspect_ratio", 2), group="micro"),
    *_both("final_layer.linear", "proj_out"),
    Rule("final_layer.scale_shift_table", ("scale_shift_table",)),
)

# The network that finds edges for control; we keep its names
HED = (
    Rule("norm", ("norm",)),
    *(
        rule
        for block, convs in enumerate((2, 2, 3, 3, 3), start=1)
        for layer in (*(f"convs.{index}" for index in range(convs)), "projection")
        for rule in _both(f"block{block}.{layer}", f"block{block}.{layer}")
    ),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a checkpoint, under our names."""

    name: str  # folder of a pipeline: transformer, controlnet
    class_name: str
    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    parts: tuple[Part, ...]
    tensors: int  # read from the checkpoint
    dropped: tuple[str, ...]  # tensors that are computed instead
    facts: dict[str, Any] = field(default_factory=dict)  # what else the checkpoint tells: caption length


class _Taker:
    """Takes tensors out of a state dict by rules, and remembers what was asked for in vain."""

    def __init__(self, state: State) -> None:
        self.left = dict(state)
        self.count = len(self.left)
        self.missing: list[str] = []
        self.dropped: list[str] = []

    def take(self, rules: tuple[Rule, ...], prefix: str = "", ours: str = "") -> dict[str, Tensor]:
        there = {rule.group for rule in rules if rule.group and prefix + rule.official in self.left}
        taken: dict[str, Tensor] = {}
        for rule in rules:
            name = prefix + rule.official
            if name not in self.left:
                if not rule.group or rule.group in there:
                    self.missing.append(name)
                continue
            tensor = self.left.pop(name)
            if not rule.ours:
                self.dropped.append(name)
                continue
            if tensor.ndim == 0 or tensor.shape[0] % len(rule.ours):
                raise ConversionError(f"{name} is {tuple(tensor.shape)}: not {len(rule.ours)} parts")
            for target, piece in zip(rule.ours, tensor.chunk(len(rule.ours)), strict=True):
                taken[ours + target] = piece
        return taken

    def blocks(self, rules: tuple[Rule, ...], prefix: str, ours: str) -> dict[str, Tensor]:
        """Every `<prefix><number>.` that is there; a gap in the numbers shows as missing tensors."""
        taken: dict[str, Tensor] = {}
        for index in range(count_blocks(self.left, prefix)):
            taken |= self.take(rules, f"{prefix}{index}.", f"{ours}{index}.")
        return taken

    def finish(self, kind: str) -> None:
        """Raises ConversionError unless everything was there and everything was used."""
        found = []
        for problem, names in (
            (f"{len(self.missing)} tensors are missing", self.missing),
            (f"{len(self.left)} of its {self.count} are unknown", sorted(self.left)),
        ):
            if names:
                more = [f"and {len(names) - 40} more"] if len(names) > 40 else []
                found.append("\n  ".join([f"{problem}:", *names[:40], *more]))
        if found:
            raise ConversionError(f"read as {kind}, " + "\n".join(found))


def count_blocks(state: State, prefix: str = "blocks.") -> int:
    """One more than the highest number of a block."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    return max((int(match[1]) + 1 for name in state if (match := pattern.match(name))), default=0)


def _shape(state: State, name: str, kind: str) -> tuple[int, ...]:
    if name not in state:
        raise ConversionError(f"this is no {kind} checkpoint: it has no {name}")
    return tuple(state[name].shape)


def _heads(width: int, given: Mapping[str, Any], head_dims: tuple[int, ...]) -> int:
    """The number of heads, which no shape tells; published models have heads of one of `head_dims`."""
    if "num_heads" in given:
        heads = int(given["num_heads"])
    else:
        heads = next((width // size for size in head_dims if width % size == 0), 0)
    if heads < 1 or width % heads:
        raise ConversionError(
            f"a width of {width} does not tell the number of heads: say num_heads in the configuration"
        )
    return heads


def _input_size(
    state: State,
    name: str,
    patch: int,
    given: Mapping[str, Any],
    kind: str,
    axes: int = 2,
    meaning: str = "latent rows of the native picture: pixels / 8",
) -> int:
    """The side of what the network sees: from the configuration, or from the stored position table."""
    if "input_size" in given:
        return int(given["input_size"])
    if name in state:
        tokens = state[name].shape[-2]
        side = round(tokens ** (1 / axes))
        if side**axes == tokens:
            return side * patch
    raise ConversionError(
        f"this {kind} checkpoint stores no position table: say input_size in the configuration ({meaning})"
    )


def _patches(state: State, kind: str, axes: int) -> tuple[int, int, int]:
    """Width, channels and patch size of the first layer, which cuts along so many axes."""
    shape = _shape(state, "x_embedder.proj.weight", kind)
    if len(shape) != 2 + axes:
        raise ConversionError(
            f"this is no {kind} checkpoint: its x_embedder.proj.weight is {shape}, "
            f"which cuts along {len(shape) - 2} axes and not {axes}"
        )
    return shape[0], shape[1], shape[2]


def _dit_config(state: State, given: Mapping[str, Any], kind: str, axes: int, **size: str) -> dict[str, Any]:
    width, channels, patch = _patches(state, kind, axes)
    rows = _shape(state, "y_embedder.embedding_table.weight", kind)[0]
    out = _shape(state, "final_layer.linear.weight", kind)[0]
    heads = _heads(width, given, (72, 64))
    dropout = float(given.get("class_dropout_prob", 0.1)) > 0
    classes = int(given.get("num_classes", rows - dropout))
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out // patch**axes,
        "num_layers": count_blocks(state),
        "sample_size": _input_size(state, "pos_embed", patch, given, kind, axes, **size),
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
        "class_dropout": rows > classes,
    }


def convert_dit(state: State, given: Mapping[str, Any]) -> Conversion:
    """Class-conditional DiT, section a of the facts."""
    config = _dit_config(state, given, "dit", axes=2)
    taker = _Taker(state)
    renamed = taker.blocks(DIT_BLOCK, "blocks.", "transformer_blocks.") | taker.take(DIT)
    taker.finish("dit")
    part = Part(name="transformer", class_name="DiTTransformer2DModel", config=config, state=renamed)
    return Conversion(parts=(part,), tensors=taker.count, dropped=tuple(taker.dropped))


def convert_dit3d(state: State, given: Mapping[str, Any]) -> Conversion:
    """DiT-3D, section d of the facts, with its windows.

    A checkpoint attends globally unless `given` says window_size and window_block_indexes in true numbers, or
    relative positions show windows: the published command line reads "0,3,6,9" as characters, which name no
    block, so whatever it trained never had windows.
    """
    config = _dit_config(state, given, "dit-3d", axes=3, meaning="voxels per side")
    relative = any(".attn.rel_pos_" in name for name in state)
    if given.get("use_rel_pos", relative) != relative:
        there = "there" if relative else "not there"
        raise ConversionError(f"use_rel_pos is {given['use_rel_pos']}, but rel_pos tensors are {there}")
    config |= _windows(state, given, config["sample_size"] // config["patch_size"]) if relative else {}
    facts: dict[str, Any] = {}
    wanted = given.get("window_block_indexes") or ()
    layers = tuple(index for index in wanted if isinstance(index, int))
    if layers and not relative:
        if not given.get("window_size"):
            raise ConversionError("window_block_indexes is said, and window_size is not: say both")
        config |= {"window_size": int(given["window_size"]), "window_layers": layers}
    elif wanted and not layers:
        facts["windows"] = f"none: window_block_indexes {wanted!r} are characters and name no block"
    if "window_kind" in given:
        config["window_kind"] = given["window_kind"]
    taker = _Taker(state)
    block = DIT_BLOCK + RELATIVE if relative else DIT_BLOCK
    renamed = taker.blocks(block, "blocks.", "transformer_blocks.") | taker.take(DIT)
    taker.finish("dit-3d")
    part = Part(name="transformer", class_name="DiT3DModel", config=config, state=renamed)
    return Conversion(parts=(part,), tensors=taker.count, dropped=tuple(taker.dropped), facts=facts)


def _windows(state: State, given: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Which blocks have windows, told by their relative positions: one row for each distance within."""
    sides = {
        index: (state[name].shape[0] + 1) // 2
        for index in range(count_blocks(state))
        if (name := f"blocks.{index}.attn.rel_pos_x") in state
    }
    # A window may be the whole grid; only the configuration tells such a block from a global one.
    said = given.get("window_block_indexes") or ()
    layers = tuple(i for i, side in sides.items() if side != tokens or i in said)
    sizes = {sides[index] for index in layers}
    if len(sizes) > 1:
        raise ConversionError(f"relative positions are for windows of several sizes: {sorted(sizes)}")
    found: dict[str, Any] = {"relative_positions": True}
    return found | ({"window_size": sizes.pop(), "window_layers": layers} if layers else {})


def _pixart_config(state: State, given: Mapping[str, Any], kind: str, alpha: bool) -> dict[str, Any]:
    width, channels, patch = _patches(state, kind, axes=2)
    out = _shape(state, "final_layer.linear.weight", kind)[0]
    heads = _heads(width, given, (72,))
    size = _input_size(state, "pos_embed", patch, given, kind)
    # Published rule: pixels / 512 for Sigma; for alpha 1 up to 512 pixels and 2 at 1024
    usual = max(1.0, size / 64) if alpha else size / 64
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "in_channels": channels,
        "out_channels": out // patch**2,
        "num_layers": count_blocks(state),
        "sample_size": size,
        "patch_size": patch,
        "caption_channels": _shape(state, "y_embedder.y_proj.fc1.weight", kind)[1],
        "interpolation_scale": float(given.get("pe_interpolation", given.get("lewei_scale", usual))),
        "use_additional_conditions": any(name.startswith("csize_embedder.") for name in state),
    }
    if any(".attn.q_norm." in name for name in state):
        config["qk_norm"] = True
    thinned = [n for n in range(config["num_layers"]) if f"blocks.{n}.attn.sr.weight" in state]
    wanted = given.get("kv_compress_config") if given.get("kv_compress", True) else None
    if thinned:
        config |= {
            "kv_compress_sampling": "conv",
            "kv_compress_factor": state[f"blocks.{thinned[0]}.attn.sr.weight"].shape[-1],
            "kv_compress_layers": tuple(thinned),
        }
    elif wanted and wanted.get("kv_compress_layer") and int(wanted["scale_factor"]) > 1:
        config |= {
            "kv_compress_sampling": wanted["sampling"],
            "kv_compress_factor": int(wanted["scale_factor"]),
            "kv_compress_layers": tuple(wanted["kv_compress_layer"]),
        }
    return config


def _convert_pixart(state: State, given: Mapping[str, Any], kind: str, alpha: bool) -> Conversion:
    config = _pixart_config(state, given, kind, alpha)
    facts = {}
    if "y_embedder.y_embedding" in state:
        facts["caption_length"] = state["y_embedder.y_embedding"].shape[0]
    taker = _Taker(state)
    renamed = taker.blocks(PIXART_BLOCK, "blocks.", "transformer_blocks.") | taker.take(PIXART)
    taker.finish(kind)
    part = Part(name="transformer", class_name="PixArtTransformer2DModel", config=config, state=renamed)
    return Conversion(parts=(part,), tensors=taker.count, dropped=tuple(taker.dropped), facts=facts)


def convert_pixart_sigma(state: State, given: Mapping[str, Any]) -> Conversion:
    """PixArt-Sigma, section b of the facts; with key and value compression and normalised queries."""
    return _convert_pixart(state, given, "pixart-sigma", alpha=False)


def convert_pixart_alpha(state: State, given: Mapping[str, Any]) -> Conversion:
    """PixArt-alpha, and what was distilled from it (LCM, DMD): sections b and c of the facts."""
    return _convert_pixart(state, given, "pixart-alpha", alpha=True)


def convert_pixart_control(state: State, given: Mapping[str, Any]) -> Conversion:
    """PixArt-delta's ControlNet-Transformer: the base and its control branch, section c of the facts."""
    base_state = {name[11:]: tensor for name, tensor in state.items() if name.startswith("base_model.")}
    control = {name: tensor for name, tensor in state.items() if not name.startswith("base_model.")}
    base = convert_pixart_alpha(base_state, given)
    copies = count_blocks(control, "controlnet.")
    if not copies:
        raise ConversionError("this is no pixart-control checkpoint: it has no controlnet.0")
    taker = _Taker(control)
    renamed: dict[str, Tensor] = {}
    for index in range(copies):
        old, new = f"controlnet.{index}.", f"controlnet_blocks.{index}."
        renamed |= taker.take(PIXART_BLOCK, old + "copied_block.", new + "transformer_block.")
        renamed |= taker.take(_both("after_proj", "after_proj"), old, new)
        if index == 0:
            renamed |= taker.take(_both("before_proj", "before_proj"), old, new)
    taker.finish("pixart-control")
    kept = ("num_attention_heads", "attention_head_dim", "cross_attention_dim", "qk_norm")
    config = {key: value for key, value in base.parts[0].config.items() if key in kept}
    if thinned := tuple(n for n in base.parts[0].config.get("kv_compress_layers", ()) if n < copies):
        config |= {key: base.parts[0].config[key] for key in ("kv_compress_sampling", "kv_compress_factor")}
        config["kv_compress_layers"] = thinned
    branch = Part(
        name="controlnet",
        class_name="PixArtControlNet",
        config={**config, "num_layers": copies},
        state=renamed,
    )
    return Conversion(
        parts=(*base.parts, branch),
        tensors=base.tensors + taker.count,
        dropped=(*base.dropped, *taker.dropped),
        facts=base.facts,
    )


def convert_hed(state: State, given: Mapping[str, Any]) -> Conversion:
    """HED, which has one size only: for the folder `hed` beside a control branch."""
    taker = _Taker(state)
    renamed = taker.take(HED)
    taker.finish("hed")
    part = Part(name="hed", class_name="HED", config={}, state=renamed)
    return Conversion(parts=(part,), tensors=taker.count, dropped=())


Converter = Callable[[State, Mapping[str, Any]], Conversion]
FAMILIES: Mapping[str, Converter] = {
    "dit": convert_dit,
    "dit-3d": convert_dit3d,
    "pixart-alpha": convert_pixart_alpha,
    "pixart-sigma": convert_pixart_sigma,
    "pixart-control": convert_pixart_control,
    "hed": convert_hed,
}


def convert(state: State, kind: str, given: Mapping[str, Any] | None = None) -> Conversion:
    """An official state dict to our networks' names and configurations.

    Raises ConversionError, listing them, when tensors are missing or left over, or when the configuration
    cannot be told.
    """
    if kind not in FAMILIES:
        raise ConversionError(f"no family called {kind!r}; there are {', '.join(FAMILIES)}")
    given = dict(given or {})
    return FAMILIES[kind](unwrap(state, averaged=bool(given.get("use_ema", True))), given)


# ------------------------------------------------------------------------- reading names, and no tensors


@dataclass(frozen=True)
class Rows:
    """Stands for a tensor of which name and shape are known, or for some of its rows: all that rules ask."""

    name: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def chunk(self, parts: int) -> tuple[Rows, ...]:
        return (Rows(self.name, (self.shape[0] // parts, *self.shape[1:])),) * parts


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """How a file with a transformer can be read in place, under our names."""

    layout: str  # "official" or "diffusers"
    config: dict[str, Any]
    names: dict[str, tuple[str, ...]]  # in the file -> ours; several: equal parts of its rows; none: idle
    shapes: dict[str, tuple[int, ...]]  # our names -> shapes
    elsewhere: tuple[str, ...]  # tensors of other networks in the file
    facts: dict[str, Any]


# By which a PixArt transformer is known in a file, whatever stands before its names
_ANCHORS = {"official": "x_embedder.proj.weight", "diffusers": "pos_embed.proj.weight"}
# Other networks in one file with it, as ComfyUI saves whole checkpoints
_ELSEWHERE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")


def prefixes(names: Iterable[str]) -> list[tuple[str, str]]:
    """(layout, what stands before the names) of each transformer whose names are among these."""
    return [
        (layout, name.removesuffix(anchor))
        for layout, anchor in _ANCHORS.items()
        for name in sorted(names)
        if name == anchor or name.endswith(f".{anchor}")
    ]


def pixart_names(shapes: Mapping[str, tuple[int, ...]], kind: str, given: Mapping[str, Any]) -> Renaming:
    """The names of a file with a PixArt transformer, in the official layout or in diffusers', with or without
    a prefix as ComfyUI has it. `kind`: pixart-sigma or pixart-alpha; `given` as for `convert`.

    Raises ConversionError, listing them, when tensors are missing or left over, or when the configuration
    cannot be told.
    """
    found = prefixes(shapes)
    if len(found) != 1:
        shown = ", ".join([*sorted(shapes)[:5], "..."] if len(shapes) > 5 else sorted(shapes)) or "none"
        there = f"there are {len(found) or 'no'} PixArt transformers"
        raise ConversionError(f"{there} among its {len(shapes)} tensors: {shown}")
    [(layout, prefix)] = found
    other = tuple(name for name in shapes if prefix and name.startswith(_ELSEWHERE))
    state = {
        (name[len(prefix) :] if name.startswith(prefix) else name): Rows(name, tuple(shape))
        for name, shape in shapes.items()
        if name not in other
    }
    official: Mapping[str, Any] = state if layout == "official" else _official(state)
    conversion = FAMILIES[kind](official, given)  # rules ask no more than Rows knows
    (part,) = conversion.parts
    ours: dict[str, Any] = {**part.state} if layout == "official" else state
    names: dict[str, tuple[str, ...]] = dict.fromkeys(other, ())
    if layout == "official":
        names |= {state[name].name: () for name in conversion.dropped}
    for name, rows in ours.items():
        names[rows.name] = (*names.get(rows.name, ()), name)
    return Renaming(
        layout=layout,
        config=part.config,
        names=names,
        shapes={name: tuple(rows.shape) for name, rows in ours.items()},
        elsewhere=other,
        facts=conversion.facts,
    )


def _official(state: Mapping[str, Rows]) -> dict[str, Rows]:
    """Our names of a PixArt transformer back to the official ones, with the shapes of joined matrices. Names
    that are not ours stay, so that the rules can refuse them."""
    left = dict(state)
    found: dict[str, Rows] = {}
    blocks = count_blocks(state, "transformer_blocks.")  # type: ignore[arg-type]
    places = [("", "", PIXART)]
    places += [(f"blocks.{n}.", f"transformer_blocks.{n}.", PIXART_BLOCK) for n in range(blocks)]
    for official, ours, rules in places:
        for rule in rules:
            pieces = [left.pop(ours + name, None) for name in rule.ours]
            there = [piece for piece in pieces if piece is not None]
            if there and len(there) == len(pieces):
                rows = sum(piece.shape[0] for piece in there)
                found[official + rule.official] = Rows(official + rule.official, (rows, *there[0].shape[1:]))
            else:  # named as missing, and these as left over
                left |= {piece.name: piece for piece in there}
    return found | left


# --------------------------------------------------------------------------------------- reading files

# Where training scripts keep the numbers, best first: DiT's averaged ones, PixArt's plain ones
_WRAPPERS = ("ema", "state_dict", "model_state", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def unwrap(checkpoint: Mapping[str, Any], averaged: bool = True) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without the prefixes of wrapped models.

    Where a checkpoint holds averaged weights too, they are taken unless `averaged` is False.

    Raises ConversionError when there are no tensors in it.
    """
    for name in _WRAPPERS if averaged else _WRAPPERS[1:]:
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        if not hasattr(tensor, "shape"):
            raise ConversionError(f"{str(name)[:80]!r} in the checkpoint is no tensor")
        stripped = True
        while stripped:
            stripped = False
            for prefix in _PREFIXES:
                if name.startswith(prefix):
                    name, stripped = name[len(prefix) :], True
        state[name] = tensor
    if not state:
        raise ConversionError("there are no tensors in the checkpoint")
    return state


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A .safetensors file, or a .pt, .pth, .bin or .ckpt file of tensors.

    Raises CorruptWeights naming the file: cut short, not what its name says, or holding code.
    """
    if not path.is_file():
        raise CorruptWeights(f"{path} is not a file")
    if path.suffix == ".safetensors":
        read_header(path)  # sizes and names are checked before any memory is taken
        from safetensors.torch import load_file

        return load_file(path)
    import argparse

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training options
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that this is no file of tensors
        reason = type(error).__name__
        raise CorruptWeights(
            f"{path} cannot be read as tensors only: it is cut short, no file of torch, or holds code "
            f"({reason})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise CorruptWeights(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def not_finite(state: State) -> Iterator[str]:
    """Names of tensors that hold NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield name
