"""The tokenizer against transformers', from the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.tokenizer import Tokenizer

TEXTS = [
    "",
    "a red cube",
    "  a   red\tcube \n left of a blue sphere.  ",
    "a Red cübe, and 漢字 🙂 <pad> </s> <unk> <extra_id_0>",
    "shiny-metal 'ball' (2x)",
    "word " * 400,
]


@pytest.fixture(scope="module")
def theirs(tiny_toy_folder: Path):
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(tiny_toy_folder / "tokenizer")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [None, 2, 7, 300])
def test_ids_equal_transformers(theirs, tiny_toy_folder: Path, text: str, length: int | None) -> None:
    ours = Tokenizer.from_pretrained(tiny_toy_folder / "tokenizer")
    cut = {"truncation": True, "max_length": length} if length else {}
    encoding = ours(text, **cut)
    assert encoding.input_ids == theirs(text, **cut).input_ids
    assert encoding.attention_mask == [1] * len(encoding.input_ids)
    assert ours.decode(encoding.input_ids, skip_special_tokens=True) == theirs.decode(
        encoding.input_ids, skip_special_tokens=True
    )


def test_the_empty_prompt_is_one_token_and_words_are_known(tiny_toy_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_toy_folder / "tokenizer")
    assert tokenizer("").input_ids == [1]
    unknown = 2
    assert len(tokenizer("a red cube").input_ids) == 4
    assert unknown not in tokenizer("a red cube").input_ids


def test_it_can_be_saved_after_its_folder_is_gone(tiny_toy_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_toy_folder / "tokenizer", tmp_path / "first")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "second")
    again = Tokenizer.from_pretrained(tmp_path / "second")
    assert again("a red cube").input_ids == tokenizer("a red cube").input_ids


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
