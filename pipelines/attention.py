"""Attention functions: the table, and how a model is given one.

A function takes queries (B, H, N, K), keys and values (B, H, L, K) and a mask that broadcasts to (B, H, N,
L), True where a query may look, or None. It returns (B, H, N, K). `math` is the twin the others are tested
against. The choice is stored on the modules, so that no environment variable and no global decides about a
picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def math_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of scaled scores, written out."""
    scores_BHNL = (q_BHNK * q_BHNK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2)
    if mask is not None:
        scores_BHNL = scores_BHNL.masked_fill(~mask, -torch.inf)
    return scores_BHNL.softmax(-1) @ v_BHLK


def sdpa_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention, which picks its own kernel for the device."""
    return functional.scaled_dot_product_attention(q_BHNK, k_BHLK, v_BHLK, attn_mask=mask)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A row of the table."""

    attend: Attend
    summary: str
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here, or None


ATTENTION = {
    "sdpa": Backend(attend=sdpa_attention, summary="torch's fused scaled dot product attention"),
    "math": Backend(attend=math_attention, summary="plain matrix products and softmax, for comparing"),
}


def set_attention(model: nn.Module, name: str = "auto") -> str:
    """Give every attention layer of the model this function; `auto` takes the first that can run here.

    Returns the name chosen. Raises ValueError for an unknown name, one that cannot run here, or a model that
    has no attention to set.
    """
    if name == "auto":
        name = next(key for key, row in ATTENTION.items() if row.missing() is None)
    if name not in ATTENTION:
        raise ValueError(f"no attention called '{name}'; there are auto, {', '.join(ATTENTION)}")
    reason = ATTENTION[name].missing()
    if reason is not None:
        raise ValueError(f"attention '{name}' cannot run here: {reason}")
    layers = [module for module in model.modules() if hasattr(module, "attend")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layers that could be set")
    for layer in layers:
        layer.attend = ATTENTION[name].attend
    return name
