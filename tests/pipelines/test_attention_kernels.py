"""Our own kernel is the written-out attention, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipelines import attention_kernels
from pipelines.attention_kernels import ROWS, heads_attention, math_attention, sdpa_attention

# B, H, N, L, K, V
SHAPES = {
    "self": (2, 16, 64, 64, 72, 72),
    "one token": (2, 3, 1, 1, 72, 72),
    "one key": (2, 3, 9, 1, 24, 24),
    "odd": (1, 5, 67, 37, 72, 72),
    "blocks": (1, 2, 2 * ROWS + 3, 130, 24, 24),
    "longer queries": (2, 2, 64, 64, 36, 24),
    "text": (2, 16, 256, 20, 72, 72),
}


def inputs(shape: str, *, strided: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Float32; strided as parts of one product are."""
    batch, heads, tokens, looked_at, width, values = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, count, 3, heads, size)[:, :, place].transpose(1, 2)
        for place, (count, size) in enumerate([(tokens, width), (looked_at, width), (looked_at, values)])
    )
    return (q, k, v) if strided else (q.contiguous(), k.contiguous(), v.contiguous())


def masks(shape: str) -> dict[str, Tensor | None]:
    """Every query may look at the first key."""
    batch, heads, tokens, looked_at, *_ = SHAPES[shape]
    forms = {
        "rows": (batch, 1, 1, looked_at),
        "full": (batch, heads, tokens, looked_at),
        "one for all": (tokens, looked_at),
    }
    found: dict[str, Tensor | None] = {"none": None}
    for name, form in forms.items():
        mask = torch.rand(form) < 0.6
        mask[..., 0] = True
        found[name] = mask
    return found


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("mask", ["none", "rows", "full", "one for all"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_in_float32_it_equals_math(shape: str, mask: str) -> None:
    given = (*inputs(shape), masks(shape)[mask])
    assert error(heads_attention(*given), math_attention(*given).double()) <= 1e-6


@pytest.mark.parametrize("mask", ["none", "rows", "full", "one for all"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_in_bfloat16_it_is_as_exact_as_what_torch_offers(shape: str, mask: str) -> None:
    """Against float64 from the same rounded arguments. `sdpa` keeps its scores in float32, `math` does not;
    ours are rounded like those of `math`."""
    q, k, v = (tensor.bfloat16() for tensor in inputs(shape))
    hidden = masks(shape)[mask]
    exact = math_attention(q.double(), k.double(), v.double(), hidden)
    theirs = max(error(attend(q, k, v, hidden), exact) for attend in (sdpa_attention, math_attention))
    assert error(heads_attention(q, k, v, hidden), exact) <= 1.05 * theirs


@pytest.mark.parametrize(("rows", "scores"), [(4, 1), (4, 100), (16, 200), (1000, 10**6)])
@torch.inference_mode()
def test_blocks_and_groups_of_any_size_give_the_same(
    rows: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*inputs("odd"), masks("odd")["full"])
    monkeypatch.setattr(attention_kernels, "ROWS", rows)
    monkeypatch.setattr(attention_kernels, "SCORES", scores)
    assert error(heads_attention(*given), math_attention(*given).double()) <= 1e-6


@torch.inference_mode()
def test_strides_do_not_matter_and_arguments_stay_as_they_are() -> None:
    strided, plain = inputs("odd"), inputs("odd", strided=False)
    before = [tensor.clone() for tensor in strided]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert error(heads_attention(*strided), heads_attention(*plain).double()) <= 1e-6
    assert all(torch.equal(*pair) for pair in zip(strided, before, strict=True))


@torch.inference_mode()
def test_heads_are_put_together_without_a_copy() -> None:
    found = heads_attention(*inputs("self"))
    assert found.shape == (2, 16, 64, 72)
    assert found.transpose(1, 2).flatten(2).data_ptr() == found.data_ptr()


def test_where_a_gradient_is_wanted_there_is_one() -> None:
    given = [tensor.detach().requires_grad_() for tensor in inputs("odd")]
    found = torch.autograd.grad(heads_attention(*given).square().sum(), given)
    expected = torch.autograd.grad(math_attention(*given).square().sum(), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
