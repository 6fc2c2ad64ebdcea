"""The text encoder against transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.models.t5 import T5EncoderModel

SMALL: dict[str, Any] = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2)


def twins(folder: Path, **options: Any):
    """transformers' encoder with random weights, saved, and ours from the same folder."""
    from transformers import T5Config
    from transformers import T5EncoderModel as Theirs

    torch.manual_seed(0)
    options = {"feed_forward_proj": "gated-gelu", **options}
    theirs = Theirs(T5Config(**SMALL, **options)).eval()
    theirs.save_pretrained(folder)
    return T5EncoderModel.from_pretrained(folder), theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feed_forward_proj": "relu"},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ],
    ids=["gated", "relu", "few buckets"],
)
@pytest.mark.parametrize("length", [1, 9, 200])
@torch.inference_mode()
def test_it_equals_transformers(tmp_path: Path, options: dict[str, Any], length: int) -> None:
    ours, theirs = twins(tmp_path, **options)
    ids = torch.randint(3, 50, (2, length))
    mask = torch.ones_like(ids)
    if length > 1:
        mask[1, length // 2 :] = 0
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    found = ours(input_ids=ids, attention_mask=mask)
    assert torch.equal(found[0], found.last_hidden_state)
    real = mask.bool()  # what stands at padding is nobody's business
    difference = (found.last_hidden_state - expected)[real].abs().max() / expected[real].abs().max()
    assert difference <= 1e-5


@torch.inference_mode()
def test_real_tokens_alone_give_the_same_as_with_padding(tmp_path: Path) -> None:
    ours, theirs = twins(tmp_path)
    ids = torch.randint(3, 50, (1, 12))
    padded = torch.cat([ids, torch.zeros(1, 288, dtype=torch.long)], dim=1)
    expected = theirs(padded, attention_mask=(padded != 0).long()).last_hidden_state[:, :12]
    torch.testing.assert_close(ours(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_transformers_loads_what_we_save(tmp_path: Path) -> None:
    from transformers import T5EncoderModel as Theirs

    ours = T5EncoderModel(**SMALL).eval()
    ours.save_pretrained(tmp_path)
    ids = torch.randint(3, 50, (1, 12))
    theirs = Theirs.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_words_may_be_stored_under_either_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours, _ = twins(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, tmp_path / "model.safetensors")
    ids = torch.randint(3, 50, (1, 5))
    assert torch.equal(T5EncoderModel.from_pretrained(tmp_path)(ids)[0], ours(ids)[0])


@torch.inference_mode()
def test_float16_keeps_the_layer_that_overflows_in_float32(tmp_path: Path) -> None:
    ours, _ = twins(tmp_path)
    half = T5EncoderModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert half.encoder.block[0].layer[1].DenseReluDense.wi_0.weight.dtype == torch.float16
    ids = torch.randint(3, 50, (1, 12))
    torch.testing.assert_close(half(ids)[0].float(), ours(ids)[0], rtol=0.05, atol=0.05)


def test_configurations_it_cannot_compute_are_left_to_transformers(tmp_path: Path) -> None:
    twins(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert T5EncoderModel.supports(entries)
    for change in (
        {"feed_forward_proj": "gated-silu"},
        {"dense_act_fn": "silu"},
        {"model_type": "umt5"},
        {"quantization_config": {}},
    ):
        assert not T5EncoderModel.supports(entries | change), change
