"""Files that carry their recipe: write a result with everything that is needed to make it again, and read it
back. What is written for each kind of result is in gen.outputs.

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
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen import library
from gen.errors import GenError
from gen.outputs import OUTPUTS, Output

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE = "gen_recipe"
PICTURE = OUTPUTS["image"]
OTHER_FORMATS = {
    *(".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".gltf", ".stl", ".off", ".xyz", ".pcd", ".usdz"),
    *(ending for of in OUTPUTS.values() for ending in of.endings.values()),
}
SPARE = 2**20  # bytes that must stay free beside the results: rows, journal, logs


def prepare(output: Path | None, results: int, room: int, of: Output = PICTURE) -> Path:
    """Make the output folder, prove that files and rows can be written, and return the folder.

    Called before any work is done. `output` is a folder, or for one result the path of its own file. `room`:
    bytes that a result may need. Raises bad_input, output_not_writable, disk_full.
    """
    folder = (output or library.outputs()).expanduser().absolute()
    if names_file(output, of):
        output, folder = folder, folder.parent
        if results > 1:
            raise GenError(
                f"{results} {of.noun}s cannot all be {output.name}.",
                "Give a folder as the output.",
                "bad_input",
            )
        for taken in (output, *(output.with_suffix(of.endings[kind]) for kind in of.always)):
            if taken.exists():
                raise _exists(taken)
    elif folder.suffix.lower() in OTHER_FORMATS and not folder.is_dir():
        also = [kind.upper() for kind in of.always[1:]]
        beside = f", with {' and '.join(also)} beside it" if also else ""
        raise GenError(
            f"{folder.name} names another format; {of.noun}s are saved as {of.always[0].upper()}{beside}.",
            f"Say {folder.with_suffix(of.ending).name}, or a folder.",
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
    needed = results * room + SPARE
    if free < needed:
        raise GenError(
            f"Only {free // 2**20} MiB are free in {folder}; the {of.noun}s may need {needed // 2**20} MiB.",
            "Free some space, or write elsewhere with --output.",
            "disk_full",
        )
    return folder


def names_file(output: Path | None, of: Output = PICTURE) -> bool:
    """Whether the output is the name of the result's own file rather than a folder."""
    return output is not None and output.suffix.lower() == of.ending and not output.is_dir()


def _exists(path: Path) -> GenError:
    return GenError(
        f"{path} exists already, and files are never overwritten.",
        "Choose another name, or move the old one away.",
        "output_not_writable",
    )


def save(
    thing: Any,
    output: Path | None,
    folder: Path,
    fields: dict[str, Any],
    of: Output = PICTURE,
    note: Callable[[str], None] = lambda words: None,
) -> library.Entry:
    """`saving`, in one go."""
    steps = saving(thing, output, folder, fields, of, note)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            entry: library.Entry = end.value
            return entry


def saving(
    thing: Any,
    output: Path | None,
    folder: Path,
    fields: dict[str, Any],
    of: Output = PICTURE,
    note: Callable[[str], None] = lambda words: None,
) -> Generator[str, None, library.Entry]:
    """Write the files of a result into `folder` and its row into the library, all or none.

    Yields the kind of file before each, and after each piece of one that takes long; who stops iterating
    stops the saving, and nothing of it stays. `fields` holds the other fields of library.Entry. The bytes go
    to hidden files in the same folder first, and get their names inside the library's transaction. A file
    that is made only where it can be, and cannot, is left out; `note` is told why. Raises disk_full,
    output_not_writable.
    """
    recipe = fields["recipe"]
    with ExitStack() as stack:
        parts: dict[str, Path] = {}
        for kind in of.kinds(recipe["request"]["inputs"]):
            yield kind
            part = stack.enter_context(part_in(folder))
            try:
                for _ in of.write(thing, kind, part, recipe) or ():
                    yield kind
            except GenError as error:
                if kind in of.always or error.code not in ("failed", "not_installed"):
                    raise
                note(f"No {of.endings[kind]} file: {error.message} {error.hint}".rstrip())
                continue
            with part.open("rb") as file:
                os.fsync(file.fileno())  # the row must not survive a power cut that the file does not
            parts[kind] = part
        fixed = output is not None and names_file(output, of)
        own = output.name if output is not None and fixed else _file_name(fields) + of.ending
        return _move(parts, folder / own, fields, of, fixed)


@contextmanager
def part_in(folder: Path) -> Iterator[Path]:
    """A hidden file that is gone afterwards, whatever happens."""
    part = folder / f".gen-{library.new_id()}.part"
    try:
        yield part
    except OSError as error:
        raise library.disk_error(error, folder) from error
    finally:
        part.unlink(missing_ok=True)


def write_png(image: Image, path: Path, recipe: dict[str, Any]) -> None:
    """A picture with its recipe, in our form and in that of other programs."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    info.add_itxt("parameters", parameters_text(recipe))
    with path.open("wb") as file:
        image.save(file, format="PNG", pnginfo=info)


def _move(
    parts: dict[str, Path], own: Path, fields: dict[str, Any], of: Output, fixed: bool
) -> library.Entry:
    """Give the files their names, or unless `fixed` the next free ones, and add the row, in one transaction.

    `own` is the path of the result's own file; the others have its name with their endings.
    """
    stem, last = own.name[: -len(of.ending)], own.name[-len(of.ending) :]  # as the user spelled it
    moved: list[Path] = []
    try:
        with library.adding() as add:
            for number in itertools.count(1):
                name = stem if number == 1 else f"{stem}-{number}"
                own = own.with_name(name + last)
                paths = {kind: own.with_name(name + of.endings[kind]) for kind in parts}
                paths[next(iter(of.endings))] = own
                taken = [path for path in paths.values() if path.exists()]
                if not taken:
                    break
                if fixed:
                    raise _exists(taken[0])
            entry = library.Entry(**fields, path=own, files={kind: path.name for kind, path in paths.items()})
            for kind, part in parts.items():
                moved.append(paths[kind])
                part.rename(paths[kind])
            add(entry)
        return entry
    except (
        BaseException
    ):  # Ctrl-C too; it may also come just after the commit, and then all are there and stay
        if moved and not library.holds(own):
            for path in moved:
                path.unlink(missing_ok=True)
        raise


def _file_name(fields: dict[str, Any]) -> str:
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(fields["created"]))
    words = slug(fields["prompt"])
    return f"{moment}-{fields['seed']}{'-' + words if words else ''}"


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
        "Denoising strength": inputs.get("strength") if inputs.get("image") else None,
        "Hires upscale": inputs.get("hires"),
        "Model hash": weights["fingerprint"],
        "Model": weights["key"],
        "Version": f"gen-studio {recipe['versions']['gen']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe inside a file made here, of any kind. Raises bad_input for anything else."""
    text = _recipe_of_cloud if path.suffix.lower() in CLOUDS else _recipe_of_picture
    recipe = text(path)
    try:
        whole = all(isinstance(_at(recipe, key), kind) for key, kind in SHAPE.items())
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise GenError(f"{path} carries no recipe of gen-studio.", HINT, "bad_input")
    return recipe


HINT = "Give a file that gen-studio saved; other programs often strip what they do not know."
CLOUDS = {ending for ending in OUTPUTS["cloud"].endings.values() if ending != PICTURE.ending}


def _recipe_of_cloud(path: Path) -> Any:
    from gen import point_files

    return point_files.read_recipe(path)


def _recipe_of_picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(RECIPE)  # our texts stand before the pixels: nothing is decoded here
    except FileNotFoundError:
        raise GenError(f"There is no file {path}.", "Check the name.", "bad_input") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise GenError(
            f"{path} cannot be read as a PNG ({type(error).__name__}).", HINT, "bad_input"
        ) from None
    try:
        return json.loads(text or "")
    except ValueError:
        return None


# What a recipe needs for its result to be made again. A Request that is built of it checks the values.
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
