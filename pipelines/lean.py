"""Networks made ready for drawing: the same numbers, in fewer passes over memory.

What a loaded network is turned into, and `restore` turns back:

- queries, keys and values of self-attention are one product;
- on a CPU the weights of the blocks are packed, their GELU included: see `pipelines.packed`;
- a modulation that all rows of the batch share becomes the norm's own scale and shift.

Results differ from the plain network's by rounding only. What is computed once per picture (text states,
modulation tables) is an argument of the networks and needs none of this.
"""

from __future__ import annotations

import torch
from torch import nn

from pipelines import packed
from pipelines.int8 import Int8Linear, quantize_linears
from pipelines.models.layers import AdaLayerNorm, Attention, Gelu

LEAN, PLAIN = EXACT = ("lean", "plain")


def prepare_all(exact: str, *networks: nn.Module | None, int8: bool = False) -> str:
    """`prepare` or `restore` those that are there; returns `exact`. Raises ValueError for another word."""
    if exact not in EXACT:
        raise ValueError(f"exact must be one of {', '.join(EXACT)}, not {exact!r}")
    if int8 and exact != LEAN:
        raise ValueError("int8 is no plain computation; take one of the two")
    for network in networks:
        if network is None:
            continue
        if exact == LEAN:
            prepare(network, int8=int8)
        else:
            restore(network)
    return exact


@torch.no_grad()
def prepare(network: nn.Module, *, int8: bool = False) -> list[str]:
    """Ready `network` for inference in its present dtype and place; returns what was done, in words.

    Afterwards it can be neither trained nor moved nor merged with an adapter: `restore` first. `state_dict`
    and saving see no difference. Doing it twice changes nothing.

    `int8` quantises the large layers first, which does change results: see `pipelines.int8`. Such a network
    can be neither saved nor restored.

    Of a network whose weights stay elsewhere (`pipelines.streaming`) only the norms change.

    Raises ValueError for a network without blocks, without layers large enough for int8, or without weights
    that could be quantised.
    """
    blocks = _blocks(network)
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no transformer blocks to make ready")
    if getattr(network, "streamed_on", None) is not None:
        if int8:
            raise ValueError("weights that stay elsewhere until they are called cannot be quantised")
        _norms(network, True)
        return ["norms"]
    done = []
    unfused = [block.attn1 for block in blocks if block.attn1.to_qkv is None]
    for layer in unfused:
        layer.fuse()
    if unfused:
        done.append(f"{len(unfused)} projections joined")
    _norms(network, True)
    if int8 and not _quantized(network):
        found = quantize_linears(network)
        done.append(f"{len(found.layers)} layers in int8 ({found.product})")
    first = next(network.parameters())
    if first.device.type == "cpu" and packed.missing(first.dtype) is None:
        count = sum(_pack(block) for block in blocks)
        if count:
            done.append(f"{count} layers packed")
    return done


@torch.no_grad()
def restore(network: nn.Module) -> None:
    """The plain network again, as it was loaded. Raises ValueError for one in int8."""
    if _quantized(network):
        raise ValueError("int8 weights cannot be turned back; load the network anew")
    for block in _blocks(network):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, packed.PackedLinear):
                    setattr(parent, name, child.plain())
            if isinstance(parent, Gelu):
                parent.fused = False
        if block.attn1.to_qkv is not None:
            block.attn1.unfuse()
    _norms(network, False)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Those with self-attention, of a network or of a control branch."""
    return [module for module in network.modules() if isinstance(getattr(module, "attn1", None), Attention)]


def _quantized(network: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in network.modules())


def _norms(network: nn.Module, lean: bool) -> None:
    for module in network.modules():
        if isinstance(module, AdaLayerNorm):
            module.lean = lean


def _pack(block: nn.Module) -> int:
    """Replace the layers of a block that run at every step; returns how many."""
    count = 0
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name in ONCE:
                continue
            gelu = parent.approximate if isinstance(parent, Gelu) else None
            setattr(parent, name, packed.PackedLinear(child, gelu))
            if isinstance(parent, Gelu):
                parent.fused = True
            count += 1
    return count


# Layers of a block that run once per picture: keys and values of the text, and adaLN's tables
ONCE = ("to_k", "to_v", "linear")
