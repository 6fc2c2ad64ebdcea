"""How files of low-rank adapters name their tensors, and which network they fit: by names and shapes alone.

Three styles are in use, in which one half of one layer is called

- PEFT       base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight, alpha in adapter_config.json;
- diffusers  transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, or unet. or no prefix; alpha in the
             header, as .alpha, or else it is the rank;
- kohya      lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight; alpha as .alpha, or else the rank.

Each may call layers by the authors' own names, such as blocks.0.attn.qkv, which is three layers here.

Nothing here needs torch: whoever lists adapters, or checks a request, has only headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (WEIGHTS, "pytorch_lora_weights.safetensors")  # what PEFT and diffusers call them
PREFIX, HALVES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
PEFT, DIFFUSERS, KOHYA = STYLES = ("peft", "diffusers", "kohya")

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape]  # of A and B

# Before a layer's name, by style; the first that fits is taken off.
PREFIXES: Mapping[str, str] = {
    PREFIX: PEFT,
    "model.diffusion_model.": DIFFUSERS,
    "diffusion_model.": DIFFUSERS,
    "transformer.": DIFFUSERS,
    "unet.": DIFFUSERS,
    "lora_unet_": KOHYA,
    "lora_transformer_": KOHYA,
    "": DIFFUSERS,
}
# Parts for text encoders, which are not adapted here
_TEXT = re.compile(r"text_encoder(_\d)?\.|lora_te\d?_|lora_prior_te_|text_encoders\.|te\d?\.|conditioner\.")
_HALF = re.compile(
    r"(?P<layer>.+)\.(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(\.(?!weight)\w+)?\.weight"  # PEFT writes the adapter's name in between while it trains
)
_DOWN = ("lora_A", "lora_down", "lora.down")
# What is no LoRA, or more than one: name -> how its keys end
OTHERS: Mapping[str, str] = {
    "DoRA": r"\.(dora_scale|lora_magnitude_vector.*)",
    "LoHa": r"\.hada_(w[12]_[ab]|t[12])",
    "LoKr": r"\.lokr_(w[12](_[ab])?|t[12])",
    "LoRA with a third factor (Tucker)": r"\.lora_mid\.weight",
    "OFT or BOFT": r"\.b?oft_\w+(\..*)?",
    "IA3": r"\.(ia3_l.*|on_input)",
    "LoRA of biases": r"\.(lora_[AB]|lora_down|lora_up)(\.\w+)?\.bias",
    "whole differences of weights": r"\.(diff|diff_b|w_norm|b_norm)",
}
# The authors' name -> ours, equal parts along the rows; # is the number of a block
OFFICIAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("blocks.#.attn.qkv", tuple(f"transformer_blocks.#.attn1.to_{part}" for part in "qkv")),
    ("blocks.#.attn.proj", ("transformer_blocks.#.attn1.to_out.0",)),
    ("blocks.#.cross_attn.q_linear", ("transformer_blocks.#.attn2.to_q",)),
    ("blocks.#.cross_attn.kv_linear", tuple(f"transformer_blocks.#.attn2.to_{part}" for part in "kv")),
    ("blocks.#.cross_attn.proj", ("transformer_blocks.#.attn2.to_out.0",)),
    ("blocks.#.mlp.fc1", ("transformer_blocks.#.ff.net.0.proj",)),
    ("blocks.#.mlp.fc2", ("transformer_blocks.#.ff.net.2",)),
    ("blocks.#.adaLN_modulation.1", ("transformer_blocks.#.norm1.linear",)),
    ("x_embedder.proj", ("pos_embed.proj",)),
    ("t_embedder.mlp.0", ("adaln_single.emb.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("adaln_single.emb.timestep_embedder.linear_2",)),
    ("t_embedder.mlp.0", ("timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("timestep_embedder.linear_2",)),
    ("t_block.1", ("adaln_single.linear",)),
    ("csize_embedder.mlp.0", ("adaln_single.emb.resolution_embedder.linear_1",)),
    ("csize_embedder.mlp.2", ("adaln_single.emb.resolution_embedder.linear_2",)),
    ("ar_embedder.mlp.0", ("adaln_single.emb.aspect_ratio_embedder.linear_1",)),
    ("ar_embedder.mlp.2", ("adaln_single.emb.aspect_ratio_embedder.linear_2",)),
    ("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
    ("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
    ("final_layer.adaLN_modulation.1", ("proj_out_1",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.linear", ("proj_out_2",)),
)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The keys of one layer in a file."""

    down: str
    up: str
    alpha: str = ""  # where the file holds it


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a file holds, by the names that it gives to layers, its prefix taken off."""

    style: str
    slots: Mapping[str, Slot]
    text: tuple[str, ...]  # keys for text encoders, which are left out


def adapter_file(path: Path) -> Path:
    """The safetensors file that a path means: itself, or the one in the folder.

    Raises ValueError for a folder with none or several, and for another kind of file.
    """
    if not os.path.isdir(path):  # unlike Path's, it takes names that are too long for names of none
        if path.suffix != ".safetensors":
            kind = "a safetensors file; adapters are read from nothing else"
            raise ValueError(
                f"{path} is not {kind}" if os.path.exists(path) else f"{path} is neither a folder nor {kind}"
            )
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        raise ValueError(f"{path} holds several files ({listed([one.name for one in found])}); name one")
    return found[0] if found else path / WEIGHTS


def parse(names: Collection[str], source: str) -> Keys:
    """Sort the keys of a file. Raises ValueError naming the file and keys: another kind of adapter, keys that
    are no part of one, a half without the other, two styles at once, nothing at all."""
    if not names:
        raise ValueError(f"{source} holds no tensors")
    for kind, ending in OTHERS.items():
        if of_kind := [key for key in names if re.search(f"{ending}$", key)]:
            raise ValueError(
                f"{source} holds {kind}, which is not computed here, only plain LoRA is: {listed(of_kind)}"
            )
    text = tuple(sorted(key for key in names if _TEXT.match(key)))
    found: dict[str, dict[str, str]] = {}
    styles: set[str] = set()
    strange = []
    for key in names:
        if _TEXT.match(key):
            continue
        prefix = next(one for one in PREFIXES if key.startswith(one))
        rest = key.removeprefix(prefix)
        if match := _HALF.fullmatch(rest):
            part, layer = "down" if match["half"] in _DOWN else "up", match["layer"]
        elif rest.endswith(".alpha") and prefix != PREFIX:
            part, layer = "alpha", rest.removesuffix(".alpha")
        else:
            strange.append(key)
            continue
        if part in found.setdefault(layer, {}):
            raise ValueError(f"{source} has two tensors for one place: {found[layer][part]} and {key}")
        found[layer][part] = key
        styles.add(PREFIXES[prefix])
    if strange:
        raise ValueError(f"{source}: tensors that are no part of a LoRA: {listed(strange)}")
    if not found:
        raise ValueError(f"{source} is for a text encoder, and those are not adapted here: {listed(text)}")
    alone = [layer for layer, parts in found.items() if not {"down", "up"} <= parts.keys()]
    if alone:
        raise ValueError(f"{source}: lora_A or lora_B (lora_down or lora_up) is missing for {listed(alone)}")
    if len(styles) > 1:
        raise ValueError(f"{source} mixes the keys of {' and '.join(sorted(styles))}")
    slots = {layer: Slot(**found[layer]) for layer in sorted(found)}
    return Keys(style=styles.pop(), slots=slots, text=text)


def places(
    pairs: Mapping[str, Shapes],  # by the names in the file
    layers: Mapping[str, Shape],  # the network's linear and convolution layers -> shape of the weight
    source: str,
    keys: Mapping[str, tuple[str, str]] | None = None,  # of both halves, for messages; None: those of PEFT
    base: str = "",  # the weights that the file says it was made for
) -> dict[str, tuple[str, ...]]:
    """Name in the file -> the network's layers that it changes, several for a joined one.

    Raises ValueError, listing what does not fit and saying what it seems to be for, unless all fits.
    """
    known = _aliases(layers)
    placed = {name: known[name] for name in pairs if name in known}
    judgement = seems_for(pairs, base)
    meant = f". It seems to be for {judgement}" if judgement else ""
    if lost := [name for name in pairs if name not in placed]:
        names = [
            key for name in lost for key in (keys or {}).get(name, [f"{PREFIX}{name}{h}" for h in HALVES])
        ]
        raise ValueError(f"{source}: the model has no layers for {listed(names)}{meant}")
    wrong = []
    for name, own in placed.items():
        down, up = pairs[name]
        shape, rows = (up[0], *down[1:]), sum(layers[one][0] for one in own)
        wanted = (rows, *layers[own[0]][1:])
        if shape != wanted:
            wrong.append(f"{name} is for weights of {shape}, the model's are {wanted}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{source}: {'; '.join(wrong[:8])}{more}{meant}")
    taken: dict[str, str] = {}
    for name, own in placed.items():
        for one in own:
            if one in taken:
                raise ValueError(f"{source}: {taken[one]} and {name} are both for {one}")
            taken[one] = name
    return placed


def _aliases(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every name that a file may have for a layer, or for several that the authors joined."""
    known: dict[str, tuple[str, ...]] = {layer: (layer,) for layer in layers}
    numbers = {match[1] for layer in known if (match := re.match(r"transformer_blocks\.(\d+)\.", layer))}
    joined: dict[str, tuple[str, ...]] = {}
    for official, ours in OFFICIAL:
        for number in numbers if "#" in official else ("",):
            names = tuple(one.replace("#", number) for one in ours)
            if all(one in known for one in names):
                joined[official.replace("#", number)] = names
    known = joined | known  # a network's own name goes first
    return {name.replace(".", "_"): own for name, own in known.items()} | known


# --- what it is for ------------------------------------------------------------------------------------

_UNET = re.compile(r"(^|[._])((down|up|input|output)_blocks|(mid|middle)_block)[._]")
_DOUBLE = re.compile(r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]\d")
_SD3 = re.compile(r"(^|[._])(joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._])")
_WAN = re.compile(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo]$")
_TEXT_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_KEYS_OF_TEXT = re.compile(r"attn2[._]to_[kv]$")
_PIXART = re.compile(
    r"attn2[._]|cross_attn[._]|adaln_single|caption_projection|(^|[._])(t_block|y_embedder[._]y_proj)"
)
_MICRO = re.compile(r"resolution_embedder|aspect_ratio_embedder|csize_embedder|ar_embedder")
_COMPRESSED = re.compile(r"attn1?[._]sr$")
_DIT = re.compile(r"norm1[._]linear$|adaLN_modulation[._]1$|proj_out_[12]$")
_BLOCK = re.compile(r"(?:^|[._])(?:transformer_)?blocks[._](\d+)[._]")
_OWN = re.compile(
    r"attn1?[._](to_q|qkv)$|attn1?[._](to_out[._]0|proj)$|attn2[._]to_q$|cross_attn[._]q_linear$"
)


def seems_for(pairs: Mapping[str, Shapes], base: str = "") -> str:
    """The model that the names and shapes speak of, in words; empty when they say nothing."""
    if any(_DOUBLE.search(name) for name in pairs):
        return "Flux"
    if any(_UNET.search(name) for name in pairs):
        widths = {down[1] for name, (down, _) in pairs.items() if _KEYS_OF_TEXT.search(name)}
        told = [words for width, words in _TEXT_WIDTHS.items() if width in widths]
        return told[0] if len(told) == 1 else "a U-Net, such as Stable Diffusion 1.5 or SDXL"
    if any(_SD3.search(name) for name in pairs):
        return "Stable Diffusion 3"
    if any(_WAN.search(name) for name in pairs):
        return "Wan"
    if not any(_BLOCK.search(name) or _PIXART.search(name) or _DIT.search(name) for name in pairs):
        return ""
    return _of_our_kin(pairs, base) + _size(pairs)


def kin(words: str) -> str:
    """Which of our family the name of some weights speaks of; empty for others."""
    said = words.casefold()
    if "sigma" in said:
        return "PixArt-Sigma"
    if "pixart" in said:  # published ones without that word are all alpha's
        return "PixArt-alpha"
    return "DiT" if re.search(r"\bdit\b", said) else ""


def _of_our_kin(pairs: Iterable[str], base: str) -> str:
    if any(_DIT.search(name) for name in pairs) and not any(_PIXART.search(name) for name in pairs):
        return "DiT"
    if any(_MICRO.search(name) for name in pairs):
        return "PixArt-alpha"  # at 1024 pixels, where it reads sizes; Sigma has no such layers
    if any(_COMPRESSED.search(name) for name in pairs):
        return "PixArt-Sigma"
    if said := kin(base):
        return said
    if any(_PIXART.search(name) for name in pairs):
        return "PixArt-alpha or PixArt-Sigma"
    return "PixArt or DiT"


def _size(pairs: Mapping[str, Shapes]) -> str:
    """` of width 1152 with 28 blocks or more`, as far as the shapes tell."""
    widths = {down[1] for name, (down, _) in pairs.items() if _OWN.search(name) and len(down) == 2}
    blocks = [int(match[1]) for name in pairs if (match := _BLOCK.search(name))]
    width = f" of width {widths.pop()}" if len(widths) == 1 else ""
    return width + (f" with {max(blocks) + 1} blocks or more" if blocks else "")


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first few, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
