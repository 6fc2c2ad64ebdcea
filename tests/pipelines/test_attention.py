"""Attention functions: every one equals the written-out one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.attention import ATTENTION, set_attention
from pipelines.models.pixart import PixArtTransformer2DModel


@pytest.mark.parametrize("name", [name for name, row in ATTENTION.items() if row.missing() is None])
@pytest.mark.parametrize("masked", [False, True])
def test_every_backend_equals_math(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8) for length in (17, 5, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])[:, None, None] if masked else None
    expected = ATTENTION["math"].attend(q, k, v, mask)
    torch.testing.assert_close(ATTENTION[name].attend(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


def test_masked_keys_weigh_exactly_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.tensor([True, True, True, False])[None, None, None]
    expected = ATTENTION["math"].attend(q, k[:, :, :3], v[:, :, :3], None)
    torch.testing.assert_close(ATTENTION["math"].attend(q, k, v, mask), expected, rtol=1e-6, atol=1e-7)


def test_setting_attention_reaches_every_layer_and_no_other_model() -> None:
    options = dict(
        num_layers=2,
        num_attention_heads=1,
        attention_head_dim=8,
        cross_attention_dim=8,
        caption_channels=4,
        sample_size=4,
    )
    model, other = PixArtTransformer2DModel(**options), PixArtTransformer2DModel(**options)
    assert set_attention(model, "math") == "math"
    chosen = [module.attend for module in model.modules() if hasattr(module, "attend")]
    assert chosen == [ATTENTION["math"].attend] * 4
    assert other.transformer_blocks[0].attn1.attend is ATTENTION["sdpa"].attend
    assert set_attention(model) == "sdpa"


def test_unknown_attention_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no attention called 'flsh'; there are auto, .*math"):
        set_attention(nn.Linear(1, 1), "flsh")


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention layers"):
        set_attention(nn.Linear(1, 1), "math")
