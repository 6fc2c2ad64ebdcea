"""The attention functions themselves: one of our own for CPUs, and the doors to those of other packages.

All take and give what `pipelines.attention` says. Packages are imported where they are called.

Shapes: B batch, N tokens that look, L tokens looked at, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 1024  # queries at a time: half as many were a tenth slower on two cores with 32 MiB of shared cache
SCORES = 2**19  # at a time: 1 MB in bfloat16, which stays in the cache of a core


def math_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of scaled scores, written out."""
    scores_BHNL = (q_BHNK * q_BHNK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2)
    if mask is not None:
        scores_BHNL = scores_BHNL.masked_fill(~mask, -torch.inf)
    return scores_BHNL.softmax(-1) @ v_BHLK


def sdpa_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention, which picks its own kernel for the device."""
    return functional.scaled_dot_product_attention(q_BHNK, k_BHLK, v_BHLK, attn_mask=mask)


def heads_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain products of one head at a time, or of as many as are small together, a block of queries each.

    The scores of a block are written, normalised and used while they are in the cache. They are as precise
    as the arguments, like those of `math`; only the scale enters before they are rounded. The writing in
    place leaves nothing to differentiate, so where a gradient is wanted this is `sdpa`.
    """
    if needs_gradient(q_BHNK, k_BHLK, v_BHLK):
        return sdpa_attention(q_BHNK, k_BHLK, v_BHLK, mask)
    batch, heads, tokens, width = q_BHNK.shape
    looked_at = k_BHLK.shape[2]
    hidden = None if mask is None else (~mask).expand(batch, heads, tokens, looked_at)
    rows = min(tokens, ROWS)
    together = min(heads, max(1, SCORES // (rows * looked_at)))
    # Laid out by tokens, so that whoever puts the heads together again has nothing to copy.
    y_BHNK = q_BHNK.new_empty(batch, tokens, heads, v_BHLK.shape[-1]).transpose(1, 2)
    room = q_BHNK.new_empty(together * rows * looked_at)
    for b in range(batch):
        for h in range(0, heads, together):
            few = slice(h, h + together)
            k_HKL, v_HLK = k_BHLK[b, few].transpose(1, 2), v_BHLK[b, few]
            for n in range(0, tokens, rows):
                part = (b, few, slice(n, n + rows))
                q_HNK = q_BHNK[part]
                shape = (*q_HNK.shape[:2], looked_at)
                weights_HNL = room[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.baddbmm(weights_HNL, q_HNK, k_HKL, beta=0, alpha=width**-0.5, out=weights_HNL)
                if hidden is not None:
                    weights_HNL.masked_fill_(hidden[part], -torch.inf)
                torch.softmax(weights_HNL, -1, out=weights_HNL)
                torch.bmm(weights_HNL, v_HLK, out=y_BHNK[part])
    return y_BHNK


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether torch records what is computed with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def cudnn_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q_BHNK, k_BHLK, v_BHLK, mask)


def torch_flash_attention(
    q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None
) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q_BHNK, k_BHLK, v_BHLK, mask)


def flash2_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, _: Tensor | None = None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*_by_tokens(q_BHNK, k_BHLK, v_BHLK)).transpose(1, 2)


def flash3_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, _: Tensor | None = None) -> Tensor:
    from flash_attn_interface import flash_attn_func

    y_BNHK = flash_attn_func(*_by_tokens(q_BHNK, k_BHLK, v_BHLK))
    if isinstance(y_BNHK, tuple):  # older ones return the logarithms of the sums as well
        y_BNHK = y_BNHK[0]
    return y_BNHK.transpose(1, 2)


def xformers_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, _: Tensor | None = None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_by_tokens(q_BHNK, k_BHLK, v_BHLK)).transpose(1, 2)


def sage_attention(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, _: Tensor | None = None) -> Tensor:
    from sageattention import sageattn

    return sageattn(q_BHNK, k_BHLK, v_BHLK, tensor_layout="HND", is_causal=False)


def _by_tokens(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, K) to (B, N, H, K)."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
