"""Folders of captioned pictures: what is read, and that everything wrong is named before work begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gen import captioned
from gen.errors import GenError


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def refused(folder: Path, **options) -> GenError:
    with pytest.raises(GenError) as caught:
        captioned.read_folder(folder, **options)
    assert caught.value.code == "bad_input"
    return caught.value


def test_captions_come_from_text_files_metadata_and_the_trigger(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("  a red\n square \n", encoding="utf-8-sig")
    picture(tmp_path / "a.JPG", (64, 48), "blue")
    picture(tmp_path / "c.webp", colour="green")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.JPG", "text": "blue"}) + "\n\n")
    (tmp_path / "notes.md").write_text("no picture")
    found = captioned.read_folder(tmp_path, "something green")
    assert [(one.path.name, one.caption) for one in found] == [
        ("a.JPG", "blue"),
        ("b.png", "a red square"),
        ("c.webp", "something green"),
    ]
    assert (found[0].width, found[0].height) == (64, 48)
    assert found[1].read().getpixel((0, 0)) == (255, 0, 0)


def test_pictures_are_made_upright_and_opaque(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture(tmp_path / "turned.jpg", (40, 30), exif=turned)
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    clear, upright = captioned.read_folder(tmp_path, "x")
    assert (upright.width, upright.height) == upright.read().size == (30, 40)
    assert clear.read().getpixel((5, 5)) == (255, 255, 255)


def test_missing_captions_are_listed(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.txt").write_text("a caption")
    error = refused(tmp_path)
    assert "11 of 12 pictures have no caption: 00.png, 01.png, 02.png, 04.png" in error.message
    assert "and 3 more" in error.message
    assert "metadata.jsonl" in error.hint and "--trigger" in error.hint


def test_all_pictures_that_do_not_serve_are_named_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "good.png", (40, 40))
    (tmp_path / "text.png").write_text("this is text")
    (tmp_path / "empty.png").touch()
    whole = picture(tmp_path / "cut.png", (80, 80)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture(tmp_path / "tiny.png", (31, 200))
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "red")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    error = refused(tmp_path, trigger="x", smallest=32)
    lines = error.message.splitlines()
    assert lines[0].endswith("5 of 6 pictures cannot be learnt from:")
    for words in (
        "cut.png is damaged or cut short",
        "empty.png is empty",
        "moves.gif has 3 frames",
        "text.png is not a picture",
        "tiny.png is 31 x 200 pixels; these weights need at least 32 per side",
    ):
        assert any(words in line for line in lines[1:]), words


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "nowhere").message
    (tmp_path / "notes.txt").write_text("hello")
    picture(tmp_path / "below" / "deep.png")
    assert "holds no pictures" in refused(tmp_path, trigger="x").message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 1 is no"),
        ('{"file_name": "a.png"}', "line 1 is no"),
        ('{"file_name": "a.png", "text": 5}', "line 1 is no"),
        ('["a.png", "text"]', "line 1 is no"),
        ('{"file_name": "z.png", "text": "x"}', "names pictures that are not in the folder: z.png"),
        ('{"file_name": "a.png", "text": " "}', "a.png has a caption that is empty"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "line 2: a.png stands"),
    ],
)
def test_broken_metadata_are_named_by_line(tmp_path: Path, line: str, words: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    assert words in refused(tmp_path, trigger="x").message


def test_captions_that_contradict_or_cannot_be_read_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "not text in UTF-8" in refused(tmp_path).message
    (tmp_path / "a.txt").write_text("x" * 4001)
    assert "of 4001 characters" in refused(tmp_path).message
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    assert "in metadata.jsonl and in text files for a.png" in refused(tmp_path).message


def test_the_digest_is_of_contents_not_of_names(tmp_path: Path) -> None:
    for folder, name, caption in (("a", "1", "x"), ("b", "2", "x"), ("c", "1", "y")):
        picture(tmp_path / folder / f"{name}.png")
        (tmp_path / folder / f"{name}.txt").write_text(caption)
    a, b, c = (captioned.digest(captioned.read_folder(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_a_picture_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    [found] = captioned.read_folder(tmp_path, "x")
    picture(tmp_path / "a.png", colour="blue")
    with pytest.raises(GenError, match="changed meanwhile"):
        found.read()
