"""What a prompt stands for before a model reads it: styles around it, wildcards in it.

A style is a template, `{prompt}, watercolour`, with a negative part. A wildcard `__colour__` stands for a
line of colour.txt in GEN_HOME/wildcards or, looked into first, the folder that GEN_WILDCARDS_DIR names. Empty
lines and those that begin with # are passed over, and a line may hold wildcards itself. The picture's seed
picks the line. So both are settled before anything is stored: a recipe holds the words that were drawn, and
beside them what was asked for.

Only names found in those folders are looked up, never a path. Nothing here loads torch; brackets are in
`pipelines.prompts`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen.errors import GenError, did_you_mean
from gen.texts import read_text
from weights import store

if TYPE_CHECKING:
    from gen.request import Input, Request

TEXTS = ("prompt", "negative_prompt")  # inputs that all this is about
LONGEST = 16_000  # characters of a prompt read in chunks, about 4000 tokens
FILE_LIMIT = 2**22  # bytes of a file of wildcards or styles
MOST_PICKS = 200  # wildcards in one text, those inside of lines counted
NO_STYLE = "none"


@dataclass(frozen=True)
class Style:
    """Templates around the two prompts."""

    prompt: str  # with {prompt} where the words go
    negative_prompt: str = ""  # added to what is there


STYLES: Mapping[str, Style] = {
    "photo": Style(
        "a photograph of {prompt}, natural light, sharp focus, fine detail",
        "drawing, painting, illustration, blurry",
    ),
    "film": Style(
        "cinematic film still, {prompt}, shallow depth of field, dramatic light, film grain",
        "drawing, flat light, overexposed",
    ),
    "watercolour": Style(
        "watercolour painting of {prompt}, soft washes of colour, paper texture",
        "photograph, 3d render, hard edges",
    ),
    "oil": Style(
        "oil painting of {prompt}, visible brush strokes, rich colours, canvas", "photograph, 3d render"
    ),
    "line-art": Style(
        "clean line drawing of {prompt}, black ink on white paper", "photograph, colour, shading, blurry"
    ),
    "pixel-art": Style("pixel art of {prompt}, low resolution, few colours", "photograph, smooth, blurry"),
    "3d": Style("3d render of {prompt}, studio light, soft shadows", "photograph, drawing, noise"),
}


def styles_file() -> Path:
    return store.home() / "styles.json"


def styles() -> dict[str, Style]:
    """Ours and those of GEN_HOME/styles.json, of which one may take the place of ours. Raises bad_input."""
    path = styles_file()
    if not path.exists():
        return dict(STYLES)
    try:
        found = json.loads(read_text(path, FILE_LIMIT, "Check the file."))
    except ValueError as error:
        message = f"{path} is not JSON: {error}."
        raise GenError(message, "Mend the file or move it away.", "bad_input") from None
    if not isinstance(found, dict):
        raise _bad_style(path, "it is no object of names")
    return dict(STYLES) | {_style_name(path, name): _style(path, name, one) for name, one in found.items()}


def style_names() -> tuple[str, ...]:
    """What `style` may be; only ours when styles.json is damaged, which a request is told."""
    try:
        return (NO_STYLE, *styles())
    except GenError:
        return (NO_STYLE, *STYLES)


def _style_name(path: Path, name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > 60 or name == NO_STYLE:
        raise _bad_style(path, f"{name[:60]!r} is no name for a style")
    return name


def _style(path: Path, name: str, one: Any) -> Style:
    known = {"prompt", "negative_prompt"}
    if not isinstance(one, dict) or not all(isinstance(value, str) for value in one.values()):
        raise _bad_style(path, f"'{name}' is not an object with texts")
    if strange := sorted(set(one) - known):
        raise _bad_style(path, f"'{name}' has '{strange[0][:60]}', which no style has")
    if one.get("prompt", "").count("{prompt}") != 1:
        raise _bad_style(path, f"the prompt of '{name}' must hold {{prompt}} once, where the words go")
    return Style(one["prompt"], one.get("negative_prompt", ""))


def _bad_style(path: Path, why: str) -> GenError:
    form = '{"name": {"prompt": "{prompt}, at night", "negative_prompt": "sun"}}'
    return GenError(f"{path} cannot be used: {why}.", f"Write it like this: {form}", "bad_input")


# --- Wildcards ----------------------------------------------------------------------------------------

_WILDCARD = re.compile(r"\\__\S+?__|__([^\s_]\S*?)__")  # the first form is escaped: text


def wildcard_folders() -> list[Path]:
    """Where files are looked for, the first one first."""
    given = os.environ.get("GEN_WILDCARDS_DIR")
    own = [Path(given).expanduser().absolute()] if given else []
    if own and not own[0].is_dir():
        raise GenError(
            f"GEN_WILDCARDS_DIR names {own[0]}, which is no folder.",
            "Name a folder, or unset it.",
            "bad_input",
        )
    return [*own, store.home() / "wildcards"]


def wildcards() -> dict[str, Path]:
    """Name -> file, by name."""
    found: dict[str, Path] = {}
    for folder in wildcard_folders():
        for path in folder.glob("*.txt"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


class Wildcards:
    """The files as they are when they are first asked for, each read once."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._checked: set[str] = set()

    @cached_property
    def files(self) -> dict[str, Path]:
        return wildcards()

    def lines(self, name: str) -> list[str]:
        """What the name may stand for. Raises bad_input."""
        if name not in self._lines:
            self._lines[name] = self._read(name)
        return self._lines[name]

    def _read(self, name: str) -> list[str]:
        path = self.files.get(name)
        if path is None:
            plain = r"Write \__ for underscores that are text."
            known = f"Known are {_listed(self.files)}." if self.files else f"There are none in {_folders()}."
            hint = f"{did_you_mean(name[:60], self.files) or known} {plain}"
            raise GenError(f"There is no wildcard '{name[:60]}'.", hint, "bad_input")
        lines = [line.strip() for line in read_text(path, FILE_LIMIT, "Check the file.").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise GenError(f"No line of {path} holds words.", "Write one choice a line.", "bad_input")
        if any(len(line) > LONGEST for line in lines):
            message = f"A line of {path} has more than {LONGEST:,} characters."
            raise GenError(message, "Write one choice a line.", "bad_input")
        return lines

    def check(self, text: str) -> None:
        """Refuse what could not be resolved, whichever lines are picked: names that do not exist, files that
        are not text, and names that lead back to themselves."""

        def follow(name: str, chain: tuple[str, ...]) -> None:
            if name in chain:
                way = " -> ".join((*chain[chain.index(name) :], name))
                raise GenError(
                    f"The wildcards lead back to themselves: {way}.", "Change one of the files.", "bad_input"
                )
            if name in self._checked:
                return
            if len(chain) == MOST_PICKS:
                message = f"More than {MOST_PICKS} wildcards stand inside each other."
                raise GenError(message, "Change the files.", "bad_input")
            for inside in dict.fromkeys(one for line in self.lines(name) for one in names(line)):
                follow(inside, (*chain, name))
            self._checked.add(name)

        for name in names(text):
            follow(name, ())

    def resolve(self, text: str, seed: int, use: str) -> str:
        """The text with a line in place of each wildcard. `use`: two texts of one picture pick differently.

        Each wildcard picks for itself: by the seed, its name, and how many of that name stand before it in
        the same text or line.
        """
        self.check(text)
        picks = itertools.count(1)

        def filled(text: str, place: str) -> str:
            before: Counter[str] = Counter()

            def pick(found: re.Match[str]) -> str:
                name = found[1]
                if name is None:
                    return found[0]
                if next(picks) > MOST_PICKS:
                    message = f"The wildcards bring in more than {MOST_PICKS} lines."
                    raise GenError(message, "Use fewer of them.", "bad_input")
                own = f"{place}\0{name}\0{before[name]}"
                before[name] += 1
                lines = self.lines(name)
                digest = hashlib.sha256(own.encode()).digest()
                return filled(lines[int.from_bytes(digest[:8], "big") % len(lines)], own)

            return _WILDCARD.sub(pick, text)

        return filled(text, f"wildcard\0{seed}\0{use}")


def names(text: str) -> Iterator[str]:
    """The wildcards in a text."""
    return (found[1] for found in _WILDCARD.finditer(text) if found[1] is not None)


def _listed(known: Mapping[str, Any]) -> str:
    shown = [*known][:20]
    return ", ".join(shown) + (", ..." if len(known) > len(shown) else "")


def _folders() -> str:
    return " or ".join(map(str, wildcard_folders()))


# --- Requests -----------------------------------------------------------------------------------------


def on(inputs: Mapping[str, Any]) -> bool:
    """Whether brackets and wildcards mean something."""
    return inputs.get("prompt_syntax", "off") == "on"


def as_recorded(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's inputs as they were meant: before there was syntax, brackets were text."""
    return {"prompt_syntax": "off", **inputs} if "prompt" in inputs else inputs


def resolve(inputs: Mapping[str, Any], seed: int, files: Wildcards) -> dict[str, Any]:
    """Those of the inputs that change when the style is put around the prompts and wildcards are picked, for
    the picture of this seed. Doing it again changes nothing. Raises bad_input."""
    texts = {name: inputs[name] for name in TEXTS if name in inputs}
    if not texts:
        return {}
    changed: dict[str, Any] = {}
    style = inputs.get("style", NO_STYLE)
    if style != NO_STYLE:
        one = styles()[style]
        changed["style"] = NO_STYLE
        texts["prompt"] = one.prompt.replace("{prompt}", texts["prompt"])
        negative = filter(None, (texts.get("negative_prompt", ""), one.negative_prompt))
        texts["negative_prompt"] = ", ".join(negative)
    if on(inputs):
        texts = {name: files.resolve(text, seed, name) for name, text in texts.items()}
    return changed | {name: text for name, text in texts.items() if text != inputs.get(name)}


def asked(whole: Request, alone: Request) -> dict[str, Any]:
    """What was written, where the picture's own request holds something else: for the recipe."""
    written = {name: whole.inputs.get(name) for name in (*TEXTS, "style")}
    return {name: value for name, value in written.items() if value != alone.inputs.get(name)}


def inputs_for(inputs: Mapping[str, Input], given: Mapping[str, Any]) -> dict[str, Input]:
    """A model's inputs by name, as they are with these values: prompts read in chunks may be longer. Raises
    bad_input when the style that is wished for may lie in a file that cannot be read."""
    if "style" in inputs and given.get("style") not in (None, "", *(inputs["style"].choices or ())):
        styles()
    most = LONGEST if "long_prompt" in inputs and given.get("long_prompt") == "chunks" else None
    return {
        name: replace(one, maximum=most) if most and one.kind == "text" else one
        for name, one in inputs.items()
    }


def read_texts(inputs: Mapping[str, Any], name: str) -> list[str]:
    """What the model reads of this input in the course of the steps, brackets and weights left out."""
    from pipelines.prompts import variants

    text = inputs[name]
    if not on(inputs) or name not in TEXTS:
        return [text]
    rows, _ = variants([text], int(inputs.get("steps") or 1))
    return [row[0].text for row in rows]


def check(inputs: Mapping[str, Any], known: Mapping[str, Input]) -> None:
    """Refuse texts that cannot be read, in the form in which a picture is drawn of them. Raises bad_input."""
    texts = {name: known[name].check(inputs[name]) for name in TEXTS if inputs.get(name)}
    if not texts or not on(inputs):
        return
    from pipelines.prompts import variants

    steps = int(inputs.get("steps") or 1)
    for names in (*([name] for name in texts), [*texts]):  # each by itself first, to say which one it is
        try:
            variants([texts[name] for name in names], steps)
        except ValueError as error:
            what = " and ".join(known[name].label for name in names)
            hint = "`gen prompts` shows how a prompt is read; --prompt-syntax off takes brackets for text."
            raise GenError(f"{what}: {error}.", hint, "bad_input") from error
