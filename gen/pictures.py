"""Pictures that go in: looked at with care, brought to plain RGB, and kept under their SHA-256.

Whatever somebody hands in (a path, bytes, base64, a PIL image, an array) becomes a file
GEN_HOME/inputs/<sha256>.png, and a request holds only the reference {"sha256", "name"}. So a request is plain
JSON, survives a restart, and draws the same when the original has been moved or edited since.

Pillow is imported in the functions: the command line must answer without it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen import library
from gen.errors import GenError

if TYPE_CHECKING:
    from PIL.Image import Image

# Those whose decoders run no other program. Everything else is refused by name, SVG and PDF among them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ENDING = ".png"  # of kept files
MOST_BYTES = 64 * 2**20  # of a file
MOST_PIXELS = 64_000_000
SMALLEST = 16  # pixels per side, what edges need
GREYS_16 = ("I;16", "I;16L", "I;16B", "I;16N")
CHANGES = "gen_changes"  # the text in a kept file that says what was done to the original
HINT = f"Give a PNG, JPEG or WebP of at least {SMALLEST} pixels per side and at most 64 megapixels."


def keep(source: Any, label: str = "The picture", *, mask: bool = False) -> dict[str, str]:
    """Keep a picture and return its reference. A reference is checked and returned as it is.

    A mask is kept in black and white, its transparent parts black: what is painted in white on nothing is a
    mask as well.

    `source`: a path, bytes, a data URL, {"data": base64 or data URL, "name": ...}, a PIL image, or an array
    (Y, X), (Y, X, 3) or (Y, X, 4) of uint8, uint16 or floats in 0..1. Raises bad_input, disk_full,
    output_not_writable.
    """
    if isinstance(source, Mapping) and "data" not in source:
        return reference(source, label)
    source, name = received(source, label, HINT)
    image = opened(source, label) if isinstance(source, bytes) else _drawn(source, label)
    image, changes = normal(image, label, "black" if mask else "white")
    if mask:
        image, changes = _black_and_white(image, changes)
    return {"sha256": _store(image, changes), "name": name or "picture.png"}


def received(source: Any, label: str, hint: str) -> tuple[Any, str]:
    """The bytes of whatever was handed in, and its name; what has no bytes comes back as it is.

    Raises bad_input for files that cannot be read, text that is no base64, and what is too large.
    """
    if isinstance(source, Mapping):
        return _decoded(source.get("data"), label, hint), _plain(source.get("name", ""))
    if isinstance(source, str) and source.startswith("data:"):
        return _decoded(source, label, hint), ""
    if isinstance(source, str | os.PathLike):
        return _read(Path(source), label, hint), _plain(Path(source).name)
    return bytes(source) if isinstance(source, bytearray) else source, ""


def named(name: str) -> dict[str, str]:
    """The part of a reference that says the picture's name; none when there is nothing to say."""
    plain = _plain(name)
    return {"name": plain} if plain else {}


def read(reference: Mapping[str, str]) -> Image:
    """The picture of a reference, RGB or a mask's grey. Raises bad_input when it is gone or was changed."""
    return opened(kept(reference), reference["name"])


def is_painted(content: bytes) -> bool:
    """Whether a layer of paint has any. Raises bad_input for what is no picture."""
    return opened(content, "The mask").convert("RGBA").getchannel("A").getbbox() is not None


def painted_on(content: bytes, image: Mapping[str, str]) -> Image:
    """A layer of paint as a mask for a kept picture, brought to its size."""
    from PIL import Image

    paint = opened(content, "The mask").convert("RGBA").getchannel("A")
    return paint.resize(size(image), Image.Resampling.BILINEAR)


def size(reference: Mapping[str, str]) -> tuple[int, int]:
    """(width, height) of the picture of a reference, which has been checked."""
    from PIL import Image

    with Image.open(place(reference["sha256"])) as picture:
        return picture.size


def kept(reference: Mapping[str, str], ending: str = ENDING, noun: str = "picture") -> bytes:
    """The bytes of a reference's file. Raises bad_input when it is gone or has been changed."""
    path = place(reference["sha256"], ending)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _gone(reference, ending, noun) from None
    except OSError as error:
        raise GenError(f"Cannot read {path}: {error.strerror}.", "Check its rights.", "bad_input") from error
    if hashlib.sha256(content).hexdigest() != reference["sha256"]:
        raise GenError(
            f"{path} is no longer the {noun} {reference['name']}: its SHA-256 is another.",
            f"Delete the file, and give the {noun} again.",
            "bad_input",
        )
    return content


def changes(picture: Image) -> str:
    """What was done to the original of a picture from `read`, for people; empty when nothing was."""
    return str(picture.info.get(CHANGES, ""))


def place(sha256: str, ending: str = ENDING) -> Path:
    """The file of this SHA-256."""
    return library.home() / "inputs" / f"{sha256}{ending}"


def words(reference: Mapping[str, str]) -> str:
    """A reference for people to read: the file's name and enough digits to tell it from others."""
    return f"{reference['name']} (SHA-256 {reference['sha256'][:12]})"


def edges(
    reference: Mapping[str, str], kind: str, width: int, height: int, weights: Path | None = None
) -> Image:
    """The edges that would steer a picture of this size, in grey. Loads no weights but those of HED.

    Raises bad_input, with the reason, for a kind that cannot be had here.
    """
    from PIL import Image

    from pipelines.models import hed

    network = hed.load_hed(weights / "hed") if kind == "hed" and weights is not None else None
    try:
        found = hed.edges_at(read(reference), kind, height, width, network)
    except ValueError as error:
        raise GenError(f"No edges: {error}.", "Choose another kind of control.", "bad_input") from error
    return Image.fromarray((found * 255).round().astype("uint8"))


def reference(
    given: Mapping[Any, Any], label: str, ending: str = ENDING, noun: str = "picture"
) -> dict[str, str]:
    """What was given, checked to be the reference of a file that is here. Raises bad_input."""
    sha256, name = given.get("sha256"), given.get("name", "")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise GenError(
            f"{label} is not a {noun}, nor the reference of one.",
            f'A reference is {{"sha256": 64 hexadecimal digits, "name": ...}}; a new {noun} is sent as '
            '{"data": base64, "name": ...}.',
            "bad_input",
        )
    checked = {"sha256": sha256, "name": _plain(name) or f"{noun}{ending}"}
    if not place(sha256, ending).is_file():
        raise _gone(checked, ending, noun)
    return checked


def _gone(reference: Mapping[str, str], ending: str, noun: str) -> GenError:
    return GenError(
        f"The {noun} {words(reference)} is no longer in {place(reference['sha256'], ending).parent}.",
        f"Give the {noun} again; one that was not changed gets the same SHA-256.",
        "bad_input",
    )


def _plain(name: Any) -> str:
    """The last part of a file name, short and printable."""
    text = re.split(r"[/\\]", str(name))[-1] if isinstance(name, str) else ""
    return "".join(c for c in text if c.isprintable())[-80:].strip()


def _read(path: Path, label: str, hint: str) -> bytes:
    """The bytes of an ordinary file of a bearable size."""
    path = path.expanduser()
    try:
        if path.exists() and not path.is_file():  # a folder, or a device that never ends
            raise GenError(f"{label}: {path} is no file.", hint, "bad_input")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise GenError(f"{label}: there is no file {path}.", "Check the name.", "bad_input") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise GenError(f"{label}: cannot read {path}: {reason}.", "Check its rights.", "bad_input") from None
    return content


def _decoded(text: Any, label: str, hint: str) -> bytes:
    """The bytes of a data URL or of plain base64."""
    if not isinstance(text, str):
        raise GenError(f"{label}: the data must be base64 text.", hint, "bad_input")
    if len(text) > MOST_BYTES * 4 // 3 + 200:
        raise too_large(label)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise GenError(f"{label}: the data URL is not base64.", hint, "bad_input")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise GenError(
            f"{label}: the text is not base64.",
            "Send the file itself as base64 or as a data URL; paths are not accepted here.",
            "bad_input",
        ) from None


def too_large(label: str) -> GenError:
    """Of a file with more than MOST_BYTES."""
    return GenError(f"{label} is larger than {MOST_BYTES // 2**20} MiB.", "Save it smaller.", "bad_input")


def opened(content: bytes, label: str) -> Image:
    """Decoded, the first frame only. The size is looked at before a pixel is decoded."""
    import warnings

    from PIL import Image, UnidentifiedImageError

    if not content:
        raise GenError(f"{label} is empty: the file has no bytes.", HINT, "bad_input")
    if len(content) > MOST_BYTES:
        raise too_large(label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below, and of strange metadata
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # old Pillows have no AVIF
            image = Image.open(io.BytesIO(content), formats=known)
            return _loaded(image, label)
    except GenError:
        raise
    except UnidentifiedImageError:
        raise GenError(f"{label} is not a picture that can be read here.", HINT, "bad_input") from None
    except Image.DecompressionBombError:
        raise GenError(
            f"{label} has more than {MOST_PIXELS // 10**6} megapixels.", "Save it smaller.", "bad_input"
        ) from None
    except Exception as error:
        raise _damaged(error, label) from None


def _loaded(image: Image, label: str) -> Image:
    """With its pixels. PIL reads them late, also those of a file that is cut short."""
    _check_size(image.size, label)
    try:
        image.load()
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise _damaged(error, label) from None
    return image


def _damaged(error: Exception, label: str) -> GenError:
    return GenError(
        f"{label} is damaged or cut short ({type(error).__name__}: {error}).",
        "Save it again with another program, or give another picture.",
        "bad_input",
    )


def _drawn(source: Any, label: str) -> Image:
    """From a PIL image or an array."""
    import numpy
    from PIL import Image

    if isinstance(source, Image.Image):
        return _loaded(source, label)
    if not isinstance(source, numpy.ndarray):
        raise GenError(f"{label} must be a picture, not {type(source).__name__}.", HINT, "bad_input")
    if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
        raise GenError(
            f"{label} must be an array (Y, X), (Y, X, 3) or (Y, X, 4), not {source.shape}.",
            HINT,
            "bad_input",
        )
    _check_size((source.shape[1], source.shape[0]), label)
    if source.dtype == numpy.uint16:
        source = source / 65535
    if source.dtype == numpy.bool_:
        source = source.astype(float)
    if numpy.issubdtype(source.dtype, numpy.floating):
        if not (source.min() >= 0 and source.max() <= 1):  # also false for NaN
            raise GenError(f"{label}: an array of floats must be in 0..1.", HINT, "bad_input")
        source = (source * 255).round().astype("uint8")
    if source.dtype != numpy.uint8:
        raise GenError(f"{label}: an array of {source.dtype} has no known white.", HINT, "bad_input")
    return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)


def _check_size(size: tuple[int, int], label: str) -> None:
    width, height = size
    if min(size) < SMALLEST:
        raise GenError(
            f"{label} is {width} x {height} pixels; at least {SMALLEST} per side are needed.",
            "Give a larger picture.",
            "bad_input",
        )
    if width * height > MOST_PIXELS:
        raise GenError(
            f"{label} is {width} x {height} pixels; at most {MOST_PIXELS // 10**6} megapixels are accepted.",
            "Save it smaller: it is brought to the size of the picture to draw anyway.",
            "bad_input",
        )


def normal(image: Image, label: str, ground: str = "white") -> tuple[Image, str]:
    """RGB, upright and opaque on this colour, and what was done for that where it is a matter of taste."""
    from PIL import Image, ImageOps

    changed = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a second picture in a photo is no frame
        changed.append(f"the first of {frames} frames")
    try:
        upright = ImageOps.exif_transpose(image)
        image = image if upright is None else upright
    except Exception:  # damaged metadata say nothing about the pixels
        changed.append("its orientation could not be read")
    if image.mode in GREYS_16 or image.mode == "I":
        image = _eight_bits(image, label)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if layered.getchannel("A").histogram()[255] < layered.width * layered.height:
            changed.append(f"transparent parts laid on {ground}")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, ground), layered)
    try:
        image = image.convert("RGB") if image.mode != "F" else _no_white(image, label)
    except ValueError:
        raise GenError(
            f"{label} has colours of the kind {image.mode}, which cannot be shown as RGB.",
            "Save it as an ordinary PNG or JPEG.",
            "bad_input",
        ) from None
    return image, "; ".join(changed)


def _black_and_white(image: Image, changed: str) -> tuple[Image, str]:
    """A mask, and what was done for that where there was anything between black and white."""
    from pipelines.canvas import as_mask  # needs no torch

    grey = sum(image.convert("L").histogram()[16:240]) > image.width * image.height / 100
    greys = "greys taken for black or white, whichever is nearer" if grey else ""
    return as_mask(image), "; ".join(filter(None, (changed, greys)))


def _eight_bits(image: Image, label: str) -> Image:
    """Greys of 16 bits: white is 65535."""
    import numpy
    from PIL import Image

    values = numpy.asarray(image).astype("int64")
    if values.min() < 0 or values.max() > 65535:
        return _no_white(image, label)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype("uint8"))


def _no_white(image: Image, label: str) -> Image:
    raise GenError(
        f"{label} holds numbers without a known white (mode {image.mode}).",
        "Save it as an ordinary PNG or JPEG.",
        "bad_input",
    )


def _store(image: Image, changed: str) -> str:
    """Keep a picture as PNG, and return its SHA-256."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if changed:
        info.add_itxt(CHANGES, changed)
    image.info.clear()  # profiles, places, cameras: nothing of it is needed
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=3)
    return store(buffer.getvalue())


def store(content: bytes, ending: str = ENDING) -> str:
    """Write a file of GEN_HOME/inputs, whole or not at all, and return its SHA-256."""
    sha256 = hashlib.sha256(content).hexdigest()
    path = place(sha256, ending)
    if path.is_file() and path.stat().st_size == len(content):
        return sha256
    part = path.with_name(f".{library.new_id()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a request that survives a power cut must find its picture
        part.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise library.disk_error(error, path.parent) from error
    return sha256
