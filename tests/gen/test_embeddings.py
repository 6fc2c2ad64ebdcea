"""Encoded prompts on disk: used again, never mixed up, and no loss when they cannot be kept."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from gen import embeddings, loader
from gen.catalog import MODELS
from gen.embeddings import Embeddings
from gen.request import Settings
from pipelines.pixart_sigma import PixArtSigmaPipeline

VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_what_was_kept_comes_back_to_the_bit(tiny_toy_folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        kept = Embeddings(tiny_toy_folder, str(dtype))
        assert kept.get("a cube", 3) is None
        kept.put("a cube", 3, VECTORS.to(dtype))
        assert torch.equal(Embeddings(tiny_toy_folder, str(dtype)).get("a cube", 3), VECTORS.to(dtype))


def test_no_two_cases_share_a_file(tiny_toy_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_toy_folder, other)
    (other / "SHA256SUMS").unlink(missing_ok=True)
    config = other / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    kept = Embeddings(tiny_toy_folder, "float32")
    paths = {
        kept.path("a cube", 3),
        kept.path("a cube", 4),
        kept.path("a cone", 3),
        Embeddings(tiny_toy_folder, "bfloat16").path("a cube", 3),
        Embeddings(other, "float32").path("a cube", 3),
    }
    assert len(paths) == 5
    assert all("cube" not in path.name for path in paths)


def test_a_pipeline_encodes_a_prompt_once(tiny_toy_folder: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, torch_dtype=torch.float32)
    expected = pipeline.encode(["a red cube", ""])
    calls: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline.embeddings = Embeddings(tiny_toy_folder, "float32")
    for times in (2, 2):
        for found, wanted in zip(pipeline.encode(["A red cube ", ""]), expected, strict=True):
            assert torch.equal(found, wanted)
        assert len(calls) == times
    pipeline.encode(["a red cube", "a cone"])
    assert len(calls) == 3


def test_a_damaged_file_is_made_again(tiny_toy_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Embeddings(tiny_toy_folder, "float32")
    kept.put("a cube", 3, VECTORS)
    kept.path("a cube", 3).write_bytes(b"nonsense")
    assert kept.get("a cube", 3) is None and "encoded again" in caplog.text
    kept.put("a cube", 3, VECTORS)
    assert torch.equal(kept.get("a cube", 3), VECTORS)


def test_a_disk_that_takes_nothing_is_no_error(
    tiny_toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings.folder().parent.mkdir(parents=True, exist_ok=True)
    embeddings.folder().write_text("a file where the folder should be")
    Embeddings(tiny_toy_folder, "float32").put("a cube", 3, VECTORS)
    assert "was not kept" in caplog.text


def test_the_longest_unused_go_first(tiny_toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Embeddings(tiny_toy_folder, "float32")
    for age, text in enumerate(("new", "older", "oldest")):
        kept.put(text, 3, VECTORS)
        os.utime(kept.path(text, 3), (1e9 - age, 1e9 - age))
    assert kept.get("oldest", 3) is not None  # and now it is the newest
    monkeypatch.setattr(embeddings, "MOST_BYTES", 3 * kept.path("new", 3).stat().st_size)
    kept.put("next", 3, VECTORS)
    assert kept.get("older", 3) is None
    assert all(kept.get(text, 3) is not None for text in ("new", "oldest", "next"))


def test_only_large_encoders_are_worth_it(tiny_toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> loader.Loaded:
        loader.forget()
        return loader.load(MODELS["pixart-sigma"], tiny_toy_folder, Settings(device="cpu"))

    assert load().pipeline.embeddings is None
    monkeypatch.setattr(loader, "SMALL", 1)
    assert load().pipeline.embeddings is not None


def test_logging_is_silent_when_all_is_well(tiny_toy_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        kept = Embeddings(tiny_toy_folder, "float32")
        kept.put("a cube", 3, VECTORS)
        kept.get("a cube", 3)
    assert caplog.text == ""
