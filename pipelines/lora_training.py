"""Low-rank adapters that learn: Hu et al. 2021, arXiv:2106.09685. `pipelines.lora` merges what comes out.

`insert` puts a `LowRank` in the place of each chosen linear layer of a network: W x + s B A x, of which W is
frozen and in whatever dtype it was loaded, and A and B learn in float32. B starts at zero, so that the
network computes at first what it did. `remove` puts the layers back as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# What can learn, from the least to the most: ends of names as PEFT's target_modules has them; None: every
# linear layer.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS: Mapping[str, tuple[str, ...] | None] = {
    "attn": ATTENTION,
    "attn+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
    "all": None,
}


class LowRank(nn.Module):
    """A frozen linear layer and the low-rank change that it learns."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.active = True  # see `inactive`
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))  # A
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a linear layer of that size starts

    # A network may ask any layer of its own for these
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the frozen layer's answer."""
        y = self.base(x)
        if not self.active:
            return y
        low = functional.linear(x.to(self.down.dtype), self.down)
        return y + self.scale * functional.linear(low, self.up).to(y.dtype)

    def halves(self) -> tuple[Tensor, Tensor]:
        """A and B as they are now, copied: what `pipelines.lora.save_lora` writes."""
        return self.down.detach().clone(), self.up.detach().clone()


def insert(model: nn.Module, layers: str, rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze the model and put a `LowRank` around each of these linear layers; returns them by name.

    Raises ValueError for an unknown choice of layers, a model without such layers, one that has adapters
    already or was made ready for drawing, and a rank that is no positive integer.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {', '.join(LAYERS)}, not {layers!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    modules = dict(model.named_modules())
    if any(isinstance(one, LowRank) for one in modules.values()):
        raise ValueError("the model has adapters that learn already; remove them first")
    if any(getattr(one, "to_qkv", None) is not None for one in modules.values()):
        raise ValueError("the model was made ready for drawing; load it anew to train it")
    ends = LAYERS[layers]
    chosen = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and (ends is None or any(name == end or name.endswith(f".{end}") for end in ends))
    }
    if not chosen:
        raise ValueError(f"a {type(model).__name__} has no layers {', '.join(ends or ('nn.Linear',))}")
    model.requires_grad_(False)
    adapters = {name: LowRank(module, rank, alpha) for name, module in chosen.items()}
    for name, adapter in adapters.items():
        _put(model, name, adapter)
    return adapters


def remove(model: nn.Module) -> None:
    """Put every layer back that `insert` took; the numbers of the model are what they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            _put(model, name, module.base)


@contextmanager
def inactive(adapters: Mapping[str, LowRank]) -> Iterator[None]:
    """Within it the network computes what it did before it had adapters."""
    for adapter in adapters.values():
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.active = True


_CHECKPOINTED = ("attend_image", "attend_text", "feed_forward")


def save_memory(transformer: Any) -> Callable[[], None]:
    """Let a PixArt keep only what stands between the parts of its blocks, and compute the rest again on the
    way back: a third more work, for a tenth of the memory. Returns what undoes it. Same numbers."""

    def again(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            return checkpoint(part, *arguments, use_reentrant=False)

        return run

    for block in transformer.transformer_blocks:
        for name in _CHECKPOINTED:
            setattr(block, name, again(getattr(block, name)))

    def undo() -> None:
        for block in transformer.transformer_blocks:
            for name in _CHECKPOINTED:
                vars(block).pop(name, None)

    return undo


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
