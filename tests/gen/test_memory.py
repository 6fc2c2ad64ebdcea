"""Plans of memory: what is counted is exact, what is estimated grows with what is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen import loader, memory
from pipelines.dit3d import DiT3DPipeline
from pipelines.pixart_sigma import PixArtSigmaPipeline

PARTS = ("text_encoder", "transformer", "vae")


def test_weights_are_counted_to_the_byte(tiny_toy_folder: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, torch_dtype=torch.bfloat16)
    plan = memory.plan(tiny_toy_folder, "cpu", "bfloat16", height=64, width=64)
    for name in PARTS:
        tensors = getattr(pipeline, name).state_dict().values()
        assert plan.weights[name] == sum(one.numel() * one.itemsize for one in tensors)
    assert plan.streamed == {} and plan.fits


def test_what_is_streamed_is_not_counted(tiny_toy_folder: Path) -> None:
    whole = memory.plan(tiny_toy_folder, "cpu", "float32", height=64, width=64)
    least = memory.plan(tiny_toy_folder, "cpu", "float32", height=64, width=64, wish="least")
    assert least.streamed == {"text_encoder": whole.weights["text_encoder"]}
    assert whole.peak - least.peak == whole.weights["text_encoder"]


@pytest.mark.parametrize("change", [{"height": 128}, {"rows": 4}])
def test_larger_requests_need_more(tiny_toy_folder: Path, change: dict[str, int]) -> None:
    asked = {"height": 64, "width": 64}
    small = memory.plan(tiny_toy_folder, "cpu", "float32", **asked)
    large = memory.plan(tiny_toy_folder, "cpu", "float32", **asked | change)
    assert large.drawing == 2 * small.drawing
    assert large.weights == small.weights


def test_decoding_stops_growing_where_tiles_begin(tiny_toy_folder: Path) -> None:
    found = [
        memory.plan(tiny_toy_folder, "cpu", "float32", height=side, width=side).decoding
        for side in (256, 512, 1024, 2048, 4096)
    ]
    assert found[0] * 16 == found[1] * 4 == found[2]
    assert found[3] == found[4] == found[1]


def test_a_cloud_has_no_decoder(tiny_dit3d_folder: Path) -> None:
    plan = memory.plan(tiny_dit3d_folder, "cpu", "float32", rows=1)
    config = DiT3DPipeline.from_pretrained(tiny_dit3d_folder).transformer.config
    assert plan.decoding == 0
    assert plan.drawing == config.tokens**3 * config.width * memory.PER_TOKEN * 4


def test_what_does_not_fit_is_said(tiny_toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "memory", lambda _: memory.PROGRAM)
    plan = memory.plan(tiny_toy_folder, "cpu", "float32", height=64, width=64)
    assert not plan.fits and not plan.to_json()["fits"]
