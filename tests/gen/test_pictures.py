"""The door for pictures: what is one comes in as plain RGB, everything else is refused in words."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gen import library, pictures
from gen.errors import GenError


def photo(width: int = 40, height: int = 24) -> Image.Image:
    """Left half red, right half blue, so that a turn is seen."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def kept(source) -> Image.Image:
    return pictures.read(pictures.keep(source))


def test_a_kept_picture_is_named_by_the_sha256_of_its_file():
    reference = pictures.keep(photo())
    path = library.home() / "inputs" / f"{reference['sha256']}.png"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == reference["sha256"]
    assert pictures.keep(photo()) == reference
    assert pictures.keep(reference) == reference
    assert [one.name for one in path.parent.iterdir()] == [path.name], "nothing half-written stays"


def test_the_same_pixels_from_everywhere_are_the_same_picture(tmp_path):
    content = encoded(photo())
    path = tmp_path / "my photo.png"
    path.write_bytes(content)
    plain = base64.b64encode(content).decode()
    sources = [
        photo(),
        np.asarray(photo()),
        np.asarray(photo()).astype(float) / 255,
        np.asarray(photo()).astype("uint16") * 257,
        content,
        path,
        str(path),
        f"data:image/png;base64,{plain}",
        {"data": plain, "name": "C:\\photos\\my photo.png"},
        encoded(photo(), "BMP"),
        encoded(photo().convert("RGBA")),
        encoded(photo().quantize(4)),
    ]
    found = [pictures.keep(source) for source in sources]
    assert len({reference["sha256"] for reference in found}) == 1
    assert [found[index]["name"] for index in (0, 5, 6, 8)] == ["picture.png", *["my photo.png"] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "RGBX"])
def test_every_mode_of_colour_becomes_rgb(mode):
    grey = Image.new("L", (20, 20), 255)
    source = grey.convert("RGBA").convert(mode) if mode == "PA" else grey.convert(mode)
    if mode == "I":
        source = Image.fromarray(np.full((20, 20), 65535, "int32"))
    found = kept(source)
    assert found.mode == "RGB"
    assert found.getpixel((3, 3)) == (255, 255, 255)
    assert pictures.changes(found) == ""


def test_sixteen_bits_keep_their_greys():
    greys = np.arange(0, 65536, 64, dtype="uint16").reshape(32, 32)
    for source in (Image.fromarray(greys), encoded(Image.fromarray(greys)), greys):
        found = np.asarray(kept(source))[..., 0].astype(float)
        assert np.abs(found - greys / 257).max() <= 0.5001


def test_a_turned_photo_stands_upright():
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    found = kept(encoded(photo(), "JPEG", exif=exif, quality=100, subsampling=0))
    assert found.size == (24, 40)
    assert found.getpixel((12, 5))[0] > 200 and found.getpixel((12, 35))[2] > 200
    assert not found.getexif()


def test_what_is_changed_by_taste_is_written_down():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    found = kept(encoded(clear))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert pictures.changes(found) == "transparent parts laid on white"
    moving = encoded(photo(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24), "green")])
    found = kept(moving)
    assert found.getpixel((0, 0))[0] > 200
    assert pictures.changes(found) == "the first of 2 frames"


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


REFUSED = {
    "empty": (b"", "is empty"),
    "text": (b"hello, I am no picture" * 10, "is not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "is not a picture"),
    "cut short": (encoded(photo(200, 200), "JPEG")[:900], "damaged or cut short"),
    "cut short png": (encoded(Image.effect_noise((99, 99), 90))[:3000], "damaged or cut short"),
    "no pixels": (png(64, 64), "damaged or cut short"),
    "a bomb": (png(60_000, 60_000, zlib.compress(b"\0" * 10**6)), "megapixels"),
    "a larger bomb": (png(10_000, 10_000), "megapixels"),
    "zero size": (png(0, 0), ""),
    "small": (encoded(photo(15, 100)), "15 x 100 pixels; at least 16"),
    "floats": (encoded(Image.new("F", (20, 20)), "TIFF"), "without a known white"),
    "wide integers": (Image.fromarray(np.full((20, 20), 70_000, "int32")), "without a known white"),
    "nan": (np.full((20, 20), np.nan), "in 0..1"),
    "large floats": (np.full((20, 20, 3), 200.0), "in 0..1"),
    "int64": (np.zeros((20, 20), "int64"), "no known white"),
    "five channels": (np.zeros((20, 20, 5), "uint8"), "must be an array"),
    "a number": (3, "must be a picture, not int"),
    "a list": ([1, 2], "must be a picture, not list"),
    "no file": ("/nowhere/at/all.png", "there is no file"),
    "a folder": ("/tmp", "is no file"),
    "a device": ("/dev/zero", "is no file"),
    "a nul": ("a\0b.png", "cannot read"),
    "not base64": ("data:image/png;base64,%%%", "not base64"),
    "no data": ("data:image/png", "not base64"),
    "data that is no text": ({"data": 5}, "must be base64"),
    "no reference": ({}, "nor the reference"),
    "a path for a hash": ({"sha256": "../../etc/passwd"}, "nor the reference"),
    "an unknown hash": ({"sha256": "0" * 64, "name": "x.png"}, "is no longer in"),
}


@pytest.mark.parametrize(("source", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_a_control_picture_is_refused_and_leaves_nothing(source, words):
    with pytest.raises(GenError) as caught:
        pictures.keep(source, "Control image")
    assert caught.value.code == "bad_input"
    assert words in caught.value.message
    assert len(caught.value.message) < 250
    assert caught.value.hint
    assert not library.home().exists() or not [*(library.home()).rglob("*.png")]


def test_a_file_of_too_many_bytes_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.effect_noise((99, 99), 90)))
    for source in (path, {"data": base64.b64encode(path.read_bytes()).decode()}, path.read_bytes()):
        with pytest.raises(GenError, match="is larger than"):
            pictures.keep(source)


def test_a_picture_that_is_gone_or_changed_is_told(tmp_path):
    reference = pictures.keep(photo())
    path = pictures.place(reference["sha256"])
    path.write_bytes(encoded(photo(80, 80)))
    with pytest.raises(GenError, match="its SHA-256 is another"):
        pictures.read(reference)
    path.unlink()
    with pytest.raises(GenError, match="is no longer in") as caught:
        pictures.read(reference)
    assert "gets the same SHA-256" in caught.value.hint
    assert pictures.keep(photo()) == reference


def test_a_home_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GEN_HOME", str(tmp_path / "file"))
    with pytest.raises(GenError) as caught:
        pictures.keep(photo())
    assert caught.value.code == "output_not_writable"


def test_the_preview_shows_the_edges_that_the_pipeline_finds(tiny_delta_folder):
    from pipelines.pixart_delta import PixArtDeltaPipeline

    pipeline = PixArtDeltaPipeline.from_pretrained(tiny_delta_folder)
    source = photo(200, 150)
    for kind in ("soft", "canny", "edges"):
        shown = np.asarray(pictures.edges(pictures.keep(source), kind, 96, 128), dtype=float)
        steering = np.asarray(pipeline.control_preview(source, kind, 128, 96), dtype=float)
        assert shown.shape == (128, 96)
        assert np.abs(shown - steering).max() <= 4, kind  # 8 bits before, floats there
        assert kind == "edges" or 0.001 < (shown > 128).mean() < 0.3
    with pytest.raises(GenError, match="hed") as caught:
        pictures.edges(pictures.keep(source), "hed", 96, 128)
    assert caught.value.code == "bad_input"
