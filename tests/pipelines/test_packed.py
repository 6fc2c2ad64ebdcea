"""Packed layers against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipelines.packed import DTYPES, PackedLinear, missing

HERE = [dtype for dtype in DTYPES if missing(dtype) is None]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # one rounding of the result


def linear(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(72, 100, bias=bias).to(dtype)


def test_something_can_be_packed_on_this_machine() -> None:
    assert torch.float32 in HERE, missing(torch.float32)


@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
@pytest.mark.parametrize("shape", [(72,), (1, 72), (2, 33, 72), (512, 72)], ids=str)
@torch.inference_mode()
def test_it_computes_what_the_plain_layer_does(dtype, bias, gelu, shape) -> None:
    plain = linear(dtype, bias)
    x = torch.randn(shape).to(dtype)
    expected = functional.linear(x.double(), plain.weight.double(), None if not bias else plain.bias.double())
    if gelu:
        expected = functional.gelu(expected, approximate=gelu)
    found = PackedLinear(plain, gelu)(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 100)
    assert (found.double() - expected).abs().max() <= BOUND[dtype] * expected.abs().max()


@torch.inference_mode()
def test_it_reads_slices_of_a_wider_tensor() -> None:
    plain = linear(torch.float32)
    x = torch.randn(4, 9, 144)[..., ::2]
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x))


@pytest.mark.parametrize("dtype", HERE, ids=str)
def test_the_plain_layer_comes_back_to_the_bit(dtype) -> None:
    plain = linear(dtype)
    again = PackedLinear(plain).plain()
    assert torch.equal(again.weight, plain.weight) and torch.equal(again.bias, plain.bias)


def test_it_is_saved_as_the_plain_layer_and_refuses_to_be_loaded_into() -> None:
    plain = linear(torch.float32)
    network = nn.Sequential(PackedLinear(plain))
    state = network.state_dict()
    assert list(state) == ["0.weight", "0.bias"]
    assert torch.equal(state["0.weight"], plain.weight)
    with pytest.raises(ValueError, match="0 is packed for inference"):
        network.load_state_dict(state)


def test_moving_it_is_refused_unless_nothing_changes() -> None:
    network = nn.Sequential(PackedLinear(linear(torch.float32)))
    network.to(torch.float32).to("cpu").eval()
    with pytest.raises(ValueError, match=r"cannot become torch\.float64 on cpu; .*pipelines\.lean\.restore"):
        network.to(torch.float64)
    with pytest.raises(ValueError, match=r"cannot become torch\.float32 on meta"):
        network.to("meta")


def test_what_cannot_be_packed_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no packed weights in float64"):
        PackedLinear(linear(torch.float64))
    with pytest.raises(ValueError, match="weights on meta cannot be packed"):
        PackedLinear(linear(torch.float32).to("meta"))
