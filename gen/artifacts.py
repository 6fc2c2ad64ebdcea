"""Files that carry their recipe: write a picture with everything that is needed to make it again, and read it
back.

A PNG holds two texts: `gen_recipe`, the whole recipe as JSON, and `parameters`, the one-paragraph form that
other programs of this kind show.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen import library
from gen.errors import GenError

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = "gen_recipe"
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPARE = 2**20  # bytes that must stay free beside the picture: rows, journal, logs


def prepare(output: Path | None, pictures: int, pixels: int) -> Path:
    """Make the output folder, prove that files and rows can be written, and return the folder.

    Called before any work is done. `output` is a folder, or for one picture the file's own path ending in
    .png. Raises bad_input, output_not_writable, disk_full.
    """
    folder = (output or library.outputs()).expanduser().absolute()
    if names_file(output):
        output, folder = folder, folder.parent
        if pictures > 1:
            raise GenError(
                f"{pictures} pictures cannot all be {output.name}.",
                "Give a folder as the output.",
                "bad_input",
            )
        if output.exists():
            raise _exists(output)
    elif folder.suffix.lower() in OTHER_FORMATS and not folder.is_dir():
        raise GenError(
            f"{folder.name} names a picture of another format; pictures are saved as PNG.",
            f"Say {folder.with_suffix('.png').name}, or a folder.",
            "bad_input",
        )
    if not str(folder).isprintable():  # the library's text columns hold no bytes that are no characters
        raise GenError(f"The folder's name {str(folder)!r} is not text.", "Choose another.", "bad_input")
    library.prepare()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".gen-{library.new_id()}.part"
        trial.touch(exist_ok=False)
        trial.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise library.disk_error(error, folder) from error
    needed = pictures * pixels * 3 + SPARE  # a PNG of noise is as large as its pixels
    if free < needed:
        raise GenError(
            f"Only {free // 2**20} MiB are free in {folder}; the pictures may need {needed // 2**20} MiB.",
            "Free some space, or write elsewhere with --output.",
            "disk_full",
        )
    return folder


def names_file(output: Path | None) -> bool:
    """Whether the output is the picture's own name rather than a folder."""
    return output is not None and output.suffix.lower() == ".png" and not output.is_dir()


def _exists(path: Path) -> GenError:
    return GenError(
        f"{path} exists already, and pictures are never overwritten.",
        "Choose another name, or move the old picture away.",
        "output_not_writable",
    )


def save(
    image: Image, output: Path | None, folder: Path, entry_without_path: dict[str, Any]
) -> library.Entry:
    """Write the picture into `folder` and its row into the library, both or neither.

    `entry_without_path` holds the other fields of library.Entry. The bytes go to a hidden file in the same
    folder first, and get their name inside the library's transaction. Raises disk_full, output_not_writable.
    """
    with _part(folder) as part:
        _write_png(image, part, entry_without_path["recipe"])
        name = output.name if output is not None and names_file(output) else None
        path = folder / (name or _file_name(entry_without_path))
        return _move(part, path, entry_without_path, fixed=name is not None)


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A hidden file that is gone afterwards, whatever happens."""
    part = folder / f".gen-{library.new_id()}.part"
    try:
        yield part
    except OSError as error:
        raise library.disk_error(error, folder) from error
    finally:
        part.unlink(missing_ok=True)


def _write_png(image: Image, path: Path, recipe: dict[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    info.add_itxt("parameters", parameters_text(recipe))
    with path.open("wb") as file:
        image.save(file, format="PNG", pnginfo=info)
        file.flush()
        os.fsync(file.fileno())  # the row must not survive a power cut that the picture does not


def _move(part: Path, path: Path, fields: dict[str, Any], fixed: bool) -> library.Entry:
    """Give the file its name, or unless `fixed` the next free one, and add the row, in one transaction."""
    moved = None
    try:
        with library.adding() as add:
            stem = path.stem
            for number in itertools.count(2):
                if not path.exists():
                    break
                if fixed:
                    raise _exists(path)
                path = path.with_stem(f"{stem}-{number}")
            entry = library.Entry(**fields, path=path)
            moved = path
            part.rename(path)
            add(entry)
        return entry
    except (
        BaseException
    ):  # Ctrl-C too; it may also come just after the commit, and then both are there and stay
        if moved is not None and not library.holds(moved):
            moved.unlink(missing_ok=True)
        raise


def _file_name(fields: dict[str, Any]) -> str:
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(fields["created"]))
    words = slug(fields["prompt"])
    return f"{moment}-{fields['seed']}{'-' + words if words else ''}.png"


def slug(text: str, limit: int = 40) -> str:
    """The first words of a text as part of a file name: lower-case ASCII letters, digits and single
    hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words if len(words) <= limit else words[: limit + 1].rpartition("-")[0] or words[:limit]


def parameters_text(recipe: dict[str, Any]) -> str:
    """The paragraph that A1111 and its relatives write into their pictures."""
    request, weights = recipe["request"], recipe["weights"]
    inputs = request["inputs"]
    lines = [str(inputs.get("prompt") or inputs.get("class_label", ""))]
    if inputs.get("negative_prompt"):
        lines.append(f"Negative prompt: {inputs['negative_prompt']}")
    facts = {
        "Steps": inputs.get("steps"),
        "CFG scale": inputs.get("guidance"),
        "Seed": request["seed"],
        "Size": f"{inputs['width']}x{inputs['height']}" if "width" in inputs else None,
        "Model hash": weights["fingerprint"],
        "Model": weights["key"],
        "Version": f"gen-studio {recipe['versions']['gen']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe inside a picture made here. Raises bad_input for anything else."""
    from PIL import Image, UnidentifiedImageError

    hint = "Give a PNG that gen-studio saved; other programs often strip what they do not know."
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(RECIPE)  # our texts stand before the pixels: nothing is decoded here
    except FileNotFoundError:
        raise GenError(f"There is no file {path}.", "Check the name.", "bad_input") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise GenError(
            f"{path} cannot be read as a PNG ({type(error).__name__}).", hint, "bad_input"
        ) from None
    try:
        recipe = json.loads(text or "")
        whole = all(isinstance(_at(recipe, key), kind) for key, kind in SHAPE.items())
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise GenError(f"{path} carries no recipe of gen-studio.", hint, "bad_input")
    return recipe


# What a recipe needs for its picture to be made again. A Request that is built of it checks the values.
SHAPE = {
    "request.model": str,
    "request.weights": str,
    "request.inputs": dict,
    "request.seed": int,
    "weights.fingerprint": str,
    "settings.device": str,
    "settings.dtype": str,
    "settings.attention": str,
    "versions": dict,
}


def _at(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = recipe[name]
    return recipe
