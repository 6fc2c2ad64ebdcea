"""A folder of pictures and what each shows, as people keep them for training.

Captions stand in `name.txt` beside `name.png`, or in `metadata.jsonl`, a line
{"file_name": "name.png", "text": "a red cube"} for each picture, or one caption serves all. Everything is
looked at before any weights are loaded, and all that is wrong is told at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen import pictures
from gen.errors import GenError

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MOST = 20_000  # pictures of a folder
LONGEST = 4000  # characters of a caption
NAMED = 8  # of those that are wrong


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """One picture. Its pixels are read when they are needed: a thousand photos would fill the memory."""

    path: Path
    sha256: str  # of the file
    caption: str
    width: int  # pixels, upright
    height: int

    def read(self) -> Image:
        """The RGB picture, upright and opaque. Raises bad_input when the file is another by now."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise GenError(f"{self.path} has been changed meanwhile.", "Start again.", "bad_input")
        return _decoded(content, self.path.name)


def read_folder(folder: Path, trigger: str = "", smallest: int = pictures.SMALLEST) -> list[Captioned]:
    """All pictures of the folder itself, in the order of their names.

    `trigger`: the caption of those that have none of their own. `smallest`: pixels that both sides must have.
    Raises bad_input, naming the files: no folder or pictures, captions that are missing or empty or name no
    picture, pictures that cannot be read, move, or are too small.
    """
    files = _files(folder)
    captions = _captions(folder, files)
    captions |= {
        file.name: trigger.strip() for file in files if file.name not in captions and trigger.strip()
    }
    if lost := [file.name for file in files if file.name not in captions]:
        raise GenError(
            f"{folder}: {len(lost)} of {len(files)} pictures have no caption: {_some(lost)}.",
            f"Write what each shows into a text file of its name (cat.png, cat.txt), or all into {METADATA}, "
            'lines {"file_name": "cat.png", "text": "..."}, or give one for all: --trigger "...".',
            "bad_input",
        )
    found, wrong = [], []
    for file in files:
        try:
            found.append(_looked_at(file, captions[file.name], smallest))
        except GenError as error:
            wrong.append(error.message)
    if wrong:
        more = f"\n... and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise GenError(
            f"{folder}: {len(wrong)} of {len(files)} pictures cannot be learnt from:\n"
            + "\n".join(wrong[:NAMED])
            + more,
            "Replace them or take them out of the folder.",
            "bad_input",
        )
    return found


def digest(found: Sequence[Captioned]) -> str:
    """Twelve hex digits that tell these pictures and captions from others, whatever the files are called."""
    lines = sorted(json.dumps([one.sha256, one.caption]) for one in found)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _files(folder: Path) -> list[Path]:
    try:
        if not folder.is_dir():
            raise GenError(f"There is no folder {folder}.", "Check the name.", "bad_input")
        files = [one for one in sorted(folder.iterdir()) if one.suffix.lower() in ENDINGS]
    except OSError as error:
        raise GenError(f"Cannot read {folder}: {error.strerror}.", "Check its rights.", "bad_input") from None
    files = [one for one in files if one.is_file() and not one.name.startswith(".")]
    if not files:
        raise GenError(
            f"{folder} holds no pictures.",
            f"Put pictures into the folder itself: {', '.join(ENDINGS)}.",
            "bad_input",
        )
    if len(files) > MOST:
        raise GenError(
            f"{folder} holds {len(files)} pictures; an adapter learns from at most {MOST}.",
            "Take fewer: some dozens are enough for one thing or one style.",
            "bad_input",
        )
    return files


def _captions(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """File name -> caption, for those that have one."""
    listed = _metadata(folder / METADATA)
    if strange := sorted(listed.keys() - {file.name for file in files}):
        raise GenError(
            f"{folder / METADATA} names pictures that are not in the folder: {_some(strange)}.",
            "Put them there, or take their lines out.",
            "bad_input",
        )
    captions = dict(listed)
    twice = []
    for file in files:
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            continue
        if file.name in captions:
            twice.append(file.name)
        captions[file.name] = _text(beside)
    if twice:
        raise GenError(
            f"{folder}: captions stand in {METADATA} and in text files for {_some(twice)}.",
            "Keep one of the two.",
            "bad_input",
        )
    for name, caption in captions.items():
        if not caption.strip() or len(caption) > LONGEST:
            what = f"of {len(caption)} characters" if caption.strip() else "that is empty"
            raise GenError(
                f"{folder}: {name} has a caption {what}.",
                f"Say in 1 to {LONGEST} characters what the picture shows.",
                "bad_input",
            )
    return {name: " ".join(caption.split()) for name, caption in captions.items()}


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
            name, caption = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise GenError(
                f'{path}, line {number} is no {{"file_name": "...", "text": "..."}}.',
                "Write one such object into each line.",
                "bad_input",
            ) from None
        if name in captions:
            raise GenError(f"{path}, line {number}: {name} stands there twice.", "Keep one.", "bad_input")
        captions[name] = caption
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise GenError(f"Cannot read {path}: {error.strerror}.", "Check its rights.", "bad_input") from None
    except ValueError:
        raise GenError(f"{path} is not text in UTF-8.", "Save it as UTF-8.", "bad_input") from None


def _looked_at(file: Path, caption: str, smallest: int) -> Captioned:
    content, _ = pictures.received(file, file.name, pictures.HINT)
    image = _decoded(content, file.name)
    if min(image.size) < smallest:
        raise GenError(
            f"{file.name} is {image.width} x {image.height} pixels; these weights need at least {smallest} "
            "per side.",
            "Give a larger picture.",
            "bad_input",
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return Captioned(path=file, sha256=sha256, caption=caption, width=image.width, height=image.height)


def _decoded(content: bytes, label: str) -> Image:
    """RGB, upright, transparency laid on white. Raises bad_input for what cannot be read, or moves."""
    image = pictures.opened(content, label)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a second picture in a photo is no frame
        raise GenError(f"{label} has {frames} frames.", "Save the one that is meant.", "bad_input")
    return pictures.normal(image, label)[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
