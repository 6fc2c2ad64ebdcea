import errno
import json
import resource
import sqlite3
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from gen import artifacts, library
from gen.errors import GenError

RECIPE = {
    "request": {
        "model": "pixart-sigma",
        "weights": "toy",
        "inputs": {
            "prompt": "ein Würfel — 🧊",
            "negative_prompt": "blurry",
            "width": 64,
            "height": 96,
            "steps": 20,
            "guidance": 4.5,
        },
        "seed": 7,
        "count": 1,
    },
    "weights": {"key": "pixart-sigma-toy", "fingerprint": "0123456789ab", "toy": True},
    "settings": {"device": "cpu", "dtype": "float32", "attention": "sdpa"},
    "versions": {"gen": "0.1.0"},
}


def fields(**changes) -> dict:
    known = {
        "id": library.new_id(),
        "created": 1_700_000_000.0,
        "model": "pixart-sigma",
        "weights": "toy",
        "fingerprint": "0123456789ab",
        "seed": 7,
        "prompt": "a red cube",
        "width": 64,
        "height": 96,
        "seconds": 1.5,
        "peak_bytes": 1000,
        "toy": True,
        "recipe": RECIPE,
    }
    return known | changes


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((64, 96), 100).convert("RGB")


def save(image: Image.Image, output: Path | None = None, **changes) -> library.Entry:
    return artifacts.save(image, output, artifacts.prepare(output, 1, 64 * 96), fields(**changes))


@contextmanager
def largest_file(size: int):
    """Files may not grow beyond `size` bytes: the kernel's own way to say that there is no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_pixels_and_recipe_come_back_as_they_went_in(image):
    entry = save(image)
    with Image.open(entry.path) as saved:
        assert saved.convert("RGB").tobytes() == image.tobytes()
    assert artifacts.read_recipe(entry.path) == RECIPE
    assert library.get(entry.id) == entry


def test_other_programs_find_their_paragraph(image):
    with Image.open(save(image).path) as saved:
        text = saved.info["parameters"]
    assert text.splitlines() == [
        "ein Würfel — 🧊",
        "Negative prompt: blurry",
        "Steps: 20, CFG scale: 4.5, Seed: 7, Size: 64x96, Model hash: 0123456789ab, Model: pixart-sigma-toy, "
        "Version: gen-studio 0.1.0",
    ]


def test_pictures_go_to_a_folder_a_day_under_speaking_names(image):
    entry = save(image)
    assert entry.path.parent.parent == library.home() / "outputs"
    assert entry.path.name.endswith("-7-a-red-cube.png")


def test_a_taken_name_gets_a_number(image, tmp_path):
    names = [save(image, tmp_path / "out").path.name for _ in range(3)]
    stem = names[0].removesuffix(".png")
    assert names == [f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"]


def test_a_file_named_by_the_user_is_never_overwritten(image, tmp_path):
    path = tmp_path / "mine.png"
    assert save(image, path).path == path
    before = path.read_bytes()
    with pytest.raises(GenError, match="exists already"):
        artifacts.prepare(path, 1, 1)
    with pytest.raises(GenError, match="exists already"):  # also when it appeared while drawing
        artifacts.save(image, path, tmp_path, fields())
    assert path.read_bytes() == before
    assert len(library.search()) == 1


def test_several_pictures_cannot_have_one_name(tmp_path):
    with pytest.raises(GenError) as caught:
        artifacts.prepare(tmp_path / "mine.png", 2, 1)
    assert caught.value.code == "bad_input"


@pytest.mark.parametrize("output", ["file/below", "file/below/mine.png", "/proc/nowhere", "/dev/null/x.png"])
def test_a_place_that_cannot_be_written_to_is_noticed_before_any_work(tmp_path, output):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GenError) as caught:
        artifacts.prepare(tmp_path / output, 1, 1)
    assert caught.value.code == "output_not_writable"
    assert caught.value.exit_code == 1


def test_a_disk_with_too_little_room_is_noticed_before_any_work(tmp_path):
    with pytest.raises(GenError, match="MiB are free") as caught:
        artifacts.prepare(tmp_path, 10**6, 10**9)
    assert caught.value.exit_code == 6


def test_preparing_leaves_no_file(tmp_path):
    artifacts.prepare(tmp_path / "out", 1, 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_leaves_neither_file_nor_row(image, tmp_path):
    place = artifacts.prepare(tmp_path / "out", 1, 1)
    with largest_file(5000), pytest.raises(GenError) as caught:
        artifacts.save(image, tmp_path / "out", place, fields())
    assert caught.value.code == "disk_full"
    assert list(place.iterdir()) == []
    assert library.search() == []


def test_a_row_that_cannot_be_written_takes_its_file_along(image, tmp_path):
    place = artifacts.prepare(tmp_path / "out", 1, 1)
    with pytest.raises(TypeError):  # a recipe that is no JSON: the PNG is refused before it is written
        artifacts.save(image, place, place, fields(recipe=RECIPE | {"bad": object()}))
    taken = save(image, tmp_path / "out")
    with pytest.raises(sqlite3.IntegrityError):  # the row fails after the file has its name
        artifacts.save(image, place, place, fields(id=taken.id, prompt="another"))
    assert [*place.iterdir()] == [taken.path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cube", "a-red-cube"),
        ("  A  Rød Würfel!! ", "a-rd-wurfel"),
        ("../../etc/passwd", "etc-passwd"),
        ("🧊", ""),
        ("con\\aux:nul", "con-aux-nul"),
        ("word " * 30, "word-word-word-word-word-word-word-word"),
        ("x" * 100, "x" * 40),
    ],
)
def test_slugs_are_short_and_harmless(text, expected):
    assert artifacts.slug(text) == expected


def broken(kind: str, path: Path) -> None:
    """Write something that is no picture with a recipe."""
    image = Image.new("RGB", (4, 4))
    if kind == "text":
        path.write_text("no picture")
    elif kind == "empty":
        path.touch()
    elif kind == "jpeg":
        image.save(path, "JPEG")
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        texts = {"not json": "{", "a list": "[]", "no request": json.dumps({"weights": {"fingerprint": "x"}})}
        if kind in texts:
            info.add_itxt(artifacts.RECIPE, texts[kind])
        image.save(path, "PNG", pnginfo=info)
        if kind == "cut short":
            path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    "kind",
    [
        "nothing",
        "text",
        "empty",
        "jpeg",
        "folder",
        "plain png",
        "not json",
        "a list",
        "no request",
        "cut short",
    ],
)
def test_files_without_a_recipe_are_refused_kindly(tmp_path, kind):
    broken(kind, tmp_path / "x.png")
    with pytest.raises(GenError) as caught:
        artifacts.read_recipe(tmp_path / "x.png")
    assert caught.value.code == "bad_input"
    assert "x.png" in caught.value.message


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EROFS, "output_not_writable"),
        (errno.EACCES, "output_not_writable"),
    ],
)
def test_the_kernels_reasons_are_sorted(number, code, tmp_path):
    import os

    assert library.disk_error(OSError(number, os.strerror(number)), tmp_path).code == code
