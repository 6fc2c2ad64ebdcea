"""The data that travels: what to make (Request), how to run it (Settings), what happens (Event, Result).

An Input describes one value a model takes. The same tuple of Inputs becomes the flags of the command line,
the form of the page and the schema of the API, and `check` is the one door through which a value comes in.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gen.errors import GenError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

SEED_LIMIT = 2**63  # seeds are 0 <= seed < SEED_LIMIT, what torch.Generator and SQLite both hold
TEXT_LIMIT = 4000  # characters; about three times what 300 tokens hold


@dataclass(frozen=True, kw_only=True)
class Input:
    """One value that a model takes.

    `default` None means: left out, the weights (width, height), the walk (`by_walk`) or the program (seed)
    decide. `argument` is the pipeline's own word for it; empty for values that the engine uses itself.
    """

    name: str
    kind: str  # text | integer | number | choice | size | seed | image | mask and so on, as in CHECKS
    label: str
    help: str
    argument: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None  # for sizes a rule (values are multiples of it), else only the step of a slider
    choices: tuple[str, ...] | None = None
    required: bool = False
    advanced: bool = False
    by_walk: Mapping[str, Any] | None = None  # scheduler -> what None becomes; "": those not named
    only_with: str | None = None  # the input without which this one changes nothing
    needs: Mapping[str, str] | None = None  # value -> the sub-folder of the weights it needs; "" is any value

    def check(self, value: Any) -> Any:
        """The value in its normal form and type; None, or "" for what is no text, becomes the default."""
        if left_out(value) and (value is None or self.kind != "text"):
            if self.required:
                raise self.error(f"{self.label} is missing.", f"Give one: {self.help}")
            return self.default
        return CHECKS[self.kind](self, value)

    def check_parts(self, value: Any, folder: Path) -> None:
        """Raise bad_input when the weights in the folder lack the part that this value needs."""
        for wanted, part in (self.needs or {}).items():
            if wanted in ("", value) and not (folder / part).is_dir():
                what = f"{self.label} '{wanted}'" if wanted else self.label
                raise self.error(
                    f"{what} needs the part {part}/ of the weights, and these have none.",
                    f"Take other weights, leave it out, or put the part into {folder}.",
                )

    def error(self, message: str, hint: str) -> GenError:
        return GenError(message, hint, "bad_input")

    def limits(self) -> str:
        """`64 to 256` and the like, for messages and help."""
        if self.kind == "label":
            return f"{len(self.choices)} classes, by name or number" if self.choices else ""
        if self.choices and self.kind != "lora":
            return "one of " + ", ".join(self.choices)
        if self.minimum is None or self.maximum is None:
            return ""
        steps = f" in steps of {self.step:g}" if self.kind == "size" else ""
        return f"{self.minimum:g} to {self.maximum:g}{steps}"

    def default_words(self) -> str:
        """What is taken when it is left out: `20`, or `20 (4 with lcm)`; empty for nothing."""
        if self.by_walk is None:
            return "" if self.default in (None, "") else f"{self.default}"
        if "default" in self.by_walk:  # these weights' own
            return f"{self.by_walk['default']:g}"
        walks: dict[Any, list[str]] = {}
        for walk, value in self.by_walk.items():
            walks.setdefault(value, []).append(walk)
        others = (f"{value:g} with {' or '.join(of)}" for value, of in walks.items() if "" not in of)
        return f"{self.by_walk['']:g} ({', '.join(others)})"

    def to_json(self) -> dict[str, Any]:
        """The schema of this input, as `gen show --json` and the API give it."""
        hidden = ("argument", "needs")
        shown = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in hidden}
        return {name: value for name, value in shown.items() if value is not None}


def value_words(value: Any) -> Any:
    """A value of a request as a line of text."""
    if isinstance(value, dict):
        from gen import pictures

        return pictures.words(value)
    return ", ".join(value) if isinstance(value, list) else value


def left_out(value: Any) -> bool:
    """None and empty text; an array is asked nothing."""
    return value is None or (isinstance(value, str) and not value)


def _shown(value: Any) -> str:
    """A value as an error message quotes it: never longer than a line."""
    text = str(value) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_text(of: Input, value: Any) -> str:
    if not isinstance(value, str):
        raise of.error(f"{of.label} must be text, not {_shown(value)}.", "Put the words in quotes.")
    if of.required and not value.strip():
        raise of.error(
            f"{of.label} is empty, so there is nothing to draw.", 'Say what to draw, e.g. "a red cube".'
        )
    most = int(of.maximum or TEXT_LIMIT)  # more where it is read in chunks
    if len(value) > most:
        reads = ", and the model reads only about the first 1,300" if of.maximum is None else ""
        raise of.error(
            f"{of.label} has {len(value):,} characters; at most {most:,} are accepted{reads}.",
            "Shorten it to what the picture shows.",
        )
    if not value.isprintable():
        # Surrogates are bytes that were no UTF-8; NUL and other controls cannot be stored in a PNG text.
        bad = next((c for c in value if not c.isprintable() and not c.isspace() and not _is_format(c)), None)
        if bad is not None:
            raise of.error(
                f"{of.label} contains the character U+{ord(bad):04X}, which is not text.",
                "Remove it, or save the file as UTF-8.",
            )
    return value.strip()


def _is_format(character: str) -> bool:
    """Joiners and direction marks are not `printable` to Python and yet belong to emoji and many scripts."""
    import unicodedata

    return unicodedata.category(character) == "Cf"


def _check_integer(of: Input, value: Any) -> int:
    hint = f"Give a whole number, {of.limits()}."
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(value, str):
            number = int(value.strip())
        elif isinstance(value, float):  # forms and JSON write 20 as 20.0
            number = int(value)
            if number != value:
                raise ValueError
        else:
            number = operator.index(value)
    except (TypeError, ValueError, OverflowError):
        raise of.error(f"{of.label} must be a whole number, not {_shown(value)}.", hint) from None
    _check_limits(of, number, hint)
    return number


def _check_number(of: Input, value: Any) -> float:
    hint = f"Give a number, {of.limits()}."
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise of.error(f"{of.label} must be a number, not {_shown(value)}.", hint) from None
    if not math.isfinite(number):
        raise of.error(f"{of.label} must be a finite number, not {number}.", hint)
    _check_limits(of, number, hint)
    return number


def _check_limits(of: Input, number: float, hint: str) -> None:
    low, high = of.minimum, of.maximum
    if low is not None and number < low:
        raise of.error(f"{of.label} {_shown(number)} is too small; the smallest is {low:g}.", hint)
    if high is not None and number > high:
        raise of.error(f"{of.label} {_shown(number)} is too large; the largest is {high:g}.", hint)


def _check_choice(of: Input, value: Any) -> str:
    choices = of.choices or ()
    if value not in choices:
        hint = did_you_mean(str(value), choices) or f"Choose one of {', '.join(choices)}."
        raise of.error(f"{of.label} cannot be {_shown(value)}.", hint)
    return str(value)


def class_name(names: tuple[str, ...], number: int) -> str:
    """How a class is written down: its first name, or its number where that name is shared or missing."""
    first = names[number].split(",")[0].strip()
    return first if first and _called(names, first) == [number] else str(number)


def _called(names: tuple[str, ...], text: str) -> list[int]:
    """Numbers of the classes with this among their names, in whatever letters."""
    wanted = text.strip().casefold()
    alike = [[one.strip().casefold() for one in row.split(",")] for row in names]
    return [number for number, row in enumerate(alike) if wanted and wanted in row]


def _check_label(of: Input, value: Any) -> str:
    """A class by number or by one of its names. `choices` holds the names of each class, comma-separated."""
    names = of.choices or ()
    if not names:
        message = "These weights do not say which classes they know: they are damaged, or not here."
        raise of.error(message, "Fetch them again, or see `gen list` for others.")
    if not isinstance(value, str) or value.strip().isdecimal():
        whole = Input(
            name=of.name,
            kind="integer",
            label=of.label,
            help=of.help,
            argument="",
            minimum=0,
            maximum=len(names) - 1,
        )
        return class_name(names, _check_integer(whole, value))
    found = _called(names, value) or [n for n, row in enumerate(names) if row and row == value.strip()]
    if len(found) == 1:
        return class_name(names, found[0])
    if found:
        listed = ", ".join(f"{number} ({names[number]})" for number in found)
        raise of.error(f"{_shown(value)} names several classes: {listed}.", "Give the number.")
    known = [one.strip() for row in names for one in row.split(",") if one.strip()]
    hint = did_you_mean(value.strip(), known) or f"`gen show` lists the {len(names)} classes."
    raise of.error(f"There is no class {_shown(value)}.", hint)


def _check_seed(of: Input, value: Any) -> int:
    hint = f"Give a whole number from 0 to {SEED_LIMIT - 1}, or leave the seed out to have one drawn."
    try:
        seed = _check_integer(of, value)
    except GenError as error:
        raise of.error(error.message, hint) from None
    if not 0 <= seed < SEED_LIMIT:
        raise of.error(f"Seed {_shown(seed)} is out of range.", hint)
    return seed


def _check_size(of: Input, value: Any) -> int:
    size = _check_integer(of, value)
    multiple = int(of.step or 1)
    if size % multiple:
        near = sorted({size // multiple * multiple, -(-size // multiple) * multiple})
        allowed = [str(n) for n in near if (of.minimum or 1) <= n <= (of.maximum or math.inf)]
        raise of.error(
            f"{of.label} {size} is not a multiple of {multiple}, the smallest step these weights can draw.",
            f"Try {' or '.join(allowed)}.",
        )
    return size


def _check_image(of: Input, value: Any) -> dict[str, str]:
    """Anything that is a picture becomes its reference; see `gen.pictures`."""
    from gen import pictures

    return pictures.keep(value, of.label)


def _check_mask(of: Input, value: Any) -> dict[str, str]:
    """Anything that is a picture becomes the reference of one in black and white; see `gen.pictures`."""
    from gen import pictures

    return pictures.keep(value, of.label, mask=True)


def _check_sides(of: Input, value: Any) -> str:
    """Pixels for sides of a picture, written `left=64,right=64`."""
    from pipelines import canvas  # needs no torch

    try:
        return canvas.margins_text(canvas.margins(value))
    except (TypeError, ValueError):
        sides = ", ".join(canvas.SIDES)
        raise of.error(
            f"{of.label} cannot be {_shown(value)}.",
            f"Write left=64,right=64, or four numbers for {sides}, or one for all; each up to "
            f"{canvas.MOST_GROWTH}, and at least one above 0.",
        ) from None


def _check_points(of: Input, value: Any) -> dict[str, str]:
    """Anything that holds points becomes its reference; see `gen.point_inputs`."""
    from gen import point_inputs

    return point_inputs.keep(value, of.label)


def _check_lora(of: Input, value: Any) -> str | list[str] | None:
    """Adapters by name or path: one, or several with a scale each; see `gen.adapters`."""
    from gen import adapters

    return adapters.check(of, value)


CHECKS = {
    "text": _check_text,
    "integer": _check_integer,
    "number": _check_number,
    "choice": _check_choice,
    "label": _check_label,
    "seed": _check_seed,
    "size": _check_size,
    "image": _check_image,
    "mask": _check_mask,
    "sides": _check_sides,
    "points": _check_points,
    "lora": _check_lora,
}


def _sent_file(of: Input, value: Any) -> Any:
    """Text from a stranger is base64 and never a path: that would read any file of this machine."""
    return {"data": value} if isinstance(value, str) and value else value


def _sent_lora(of: Input, value: Any) -> Any:
    """A stranger may name what is listed here, and no path."""
    from gen import adapters

    return adapters.sent(of, value)


# Kinds that are narrower for strangers
SENT = {"image": _sent_file, "mask": _sent_file, "points": _sent_file, "lora": _sent_lora}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make: complete, checked and immutable. Make one with `Request.build` or `Request.from_json`.

    Picture n of `count` has the seed (seed + n) % 2**63 and is bit-equal to the single picture of that seed.
    With a second seed all have the first one, and lie evenly spread on the way from the one to the other.
    """

    model: str
    weights: str  # the tag, e.g. "toy"
    inputs: Mapping[str, Any]
    seed: int
    count: int = 1

    @classmethod
    def build(
        cls,
        model: str,  # "pixart-sigma" (the best installed weights) or "pixart-sigma:toy"
        values: Mapping[str, Any],  # by the names of the model's inputs; "seed" and "count" may be among them
        seed: int | None = None,  # None: as in values, else drawn
        count: int | None = None,  # None: as in values, else 1
    ) -> Request:
        """Check everything that can be checked without loading weights, and fill in the defaults.

        Raises GenError: unknown_model, not_installed, unknown_option, bad_input.
        """
        from gen import catalog, prompts
        from gen.outputs import OUTPUTS

        row, tag = catalog.find(model)
        tag, _, folder = catalog.choose(row, tag)
        inputs = {one.name: one for one in row.inputs_for(tag)}
        given = dict(values)
        for name, value in (("seed", seed), ("count", count)):
            if value is not None:
                given[name] = value
        for name in given:
            if name not in inputs:
                raise catalog.not_taken(row, name)
        for name, one in inputs.items():
            if not left_out(given.get(name)) and (
                one.only_with is None or not left_out(given.get(one.only_with))
            ):
                one.check_parts(given[name], folder)
        inputs = prompts.inputs_for(inputs, given)
        checked = {name: one.check(given.get(name)) for name, one in inputs.items()}
        for name, one in inputs.items():
            if checked[name] is None and one.by_walk is not None:
                checked[name] = one.by_walk.get(checked["scheduler"], one.by_walk[""])
        absent = {name for name in inputs if left_out(given.get(name))}
        checked |= OUTPUTS[row.makes].settle(checked, absent, inputs)
        OUTPUTS[row.makes].check(checked, folder)
        if checked.get("lora") is not None:
            from gen import adapters

            adapters.check_fit(checked, folder)
        drawn = checked.pop("seed")
        request = cls(
            model=row.name,
            weights=tag,
            seed=draw_seed() if drawn is None else drawn,
            count=checked.pop("count"),
            inputs=MappingProxyType(checked),
        )
        for alone in request.each():
            prompts.check(alone.inputs, inputs)
        return request

    @property
    def subject(self) -> str:
        """What is to be seen, in words: the prompt, or the name of the class."""
        from gen import catalog

        return str(self.inputs[catalog.MODELS[self.model].subject])

    @property
    def seeds(self) -> list[int]:
        return [one.seed for one in self._each()]

    def each(self) -> list[Request]:
        """The requests for single results that this one means, their prompts with the style around them and
        with the words that the wildcards stand for. Raises bad_input when those are not to be had."""
        from gen import prompts

        files = prompts.Wildcards()
        drawn = [(one, prompts.resolve(one.inputs, one.seed, files)) for one in self._each()]
        return [replace(one, inputs=MappingProxyType({**one.inputs, **said})) for one, said in drawn]

    def _each(self) -> list[Request]:
        if self.inputs.get("second_seed") is None:
            seeds = [(self.seed + n) % SEED_LIMIT for n in range(self.count)]
            return [replace(self, seed=seed, count=1) for seed in seeds]
        if self.count == 1:
            return [self]
        blends = [n / (self.count - 1) for n in range(self.count)]
        return [
            replace(self, inputs=MappingProxyType({**self.inputs, "blend": blend}), count=1)
            for blend in blends
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": self.weights,
            "inputs": dict(self.inputs),
            "seed": self.seed,
            "count": self.count,
        }

    @classmethod
    def from_json(cls, data: Any, trusted: bool = False) -> Request:
        """Read what to_json wrote, or what a stranger sent: everything is checked again.

        `trusted`: it comes from this machine, from its library say, and may name files.
        """
        from gen import catalog

        if not isinstance(data, Mapping):
            raise GenError(
                "A request must be a JSON object.", 'Send {"model": ..., "inputs": {...}}.', "bad_input"
            )
        known = ("model", "weights", "inputs", "seed", "count")
        for key in data:
            if key not in known:
                raise GenError(
                    f"A request has no field {_shown(key)}.",
                    did_you_mean(str(key), known) or f"Its fields are {', '.join(known)}.",
                    "bad_input",
                )
        model, weights, inputs = data.get("model"), data.get("weights"), data.get("inputs", {})
        if (
            not isinstance(model, str)
            or not isinstance(weights, str | None)
            or not isinstance(inputs, Mapping)
        ):
            raise GenError(
                "A request needs a model (text), and may have weights (text) and inputs (an object).",
                'Send {"model": "pixart-sigma", "inputs": {"prompt": "a red cube"}}.',
                "bad_input",
            )
        reference = f"{model}:{weights}" if weights else model
        if trusted:
            from gen import prompts

            inputs = prompts.as_recorded(inputs)
        else:
            row, tag = catalog.find(reference)
            careful = {
                one.name: one for one in row.inputs_for(tag or next(iter(row.weights))) if one.kind in SENT
            }
            inputs = {
                name: SENT[careful[name].kind](careful[name], value) if name in careful else value
                for name, value in inputs.items()
            }
        return cls.build(reference, inputs, data.get("seed"), data.get("count"))


def draw_seed() -> int:
    """A fresh seed. Below 2**32 although more is accepted: short enough to be read out and typed."""
    import secrets

    return secrets.randbelow(2**32)


DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MEMORY = ("auto", "least", "sequential", "group")
QUANTIZE = ("none", "int8")
EXACT = ("lean", "plain")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run a request: changes speed, memory and place, and pixels only by rounding, `quantize` and
    `saver` apart."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    memory: str = "auto"  # where networks stay until they are called, see gen.loader.offloads
    quantize: str = "none"  # "int8": large layers in int8, not quite the same picture
    compile: bool = False  # torch.compile, which takes its time before the first picture
    exact: str = "lean"  # "plain": every operation as it was published, for comparing
    saver: str = ""  # step savers, see pipelines.step_savers: less work, and not quite the same picture
    output: Path | None = None  # a folder, or for one result its own file, as x.png; None: GEN_HOME/outputs
    preview: bool = True  # attach a small picture to step events

    def __post_init__(self) -> None:
        """Raises bad_input for a device or dtype there is none of; what this machine has shows when
        loading."""
        for label, value, known in (
            ("Device", self.device, DEVICES),
            ("Dtype", self.dtype, DTYPES),
            ("Memory", self.memory, MEMORY),
            ("Quantize", self.quantize, QUANTIZE),
            ("Exact", self.exact, EXACT),
        ):
            if value not in known:
                hint = f"Choose one of {', '.join(known)}."
                raise GenError(f"{label} cannot be {_shown(value)}.", hint, "bad_input")
        if self.quantize != "none" and (self.compile or self.exact == "plain"):
            raise GenError(
                f"{self.quantize} goes neither with --compile nor with --exact plain.",
                "Leave one of them out.",
                "bad_input",
            )
        if self.memory in ("sequential", "group") and (self.quantize != "none" or self.compile):
            raise GenError(
                f"--memory {self.memory} leaves weights elsewhere: they are neither quantised nor compiled.",
                "Leave one of them out.",
                "bad_input",
            )
        if self.compile and self.exact == "plain":
            raise GenError(
                "--compile is no plain computation.", "Leave --compile or --exact plain out.", "bad_input"
            )
        from pipelines.step_savers import parse  # needs no torch

        try:
            parse(self.saver)
        except ValueError as error:
            words = str(error)
            hint = "Leave --saver out, or see `gen run --help`."
            raise GenError(f"{words[0].upper()}{words[1:]}.", hint, "bad_input") from error


@dataclass(frozen=True, kw_only=True)
class Result:
    """One picture or other thing on disk with its row in the library."""

    id: str
    path: Path  # its own file
    seed: int
    width: int  # pixels
    height: int  # pixels
    seconds: float
    recipe: dict[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)  # by kind; `path` is among them

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "path": str(self.path),
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "seconds": round(self.seconds, 3),
            "recipe": self.recipe,
            "files": {kind: str(path) for kind, path in self.files.items()},
        }


STAGES = ("loading", "encoding", "denoising", "decoding", "saving")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened during a run.

    kind      fields that matter
    stage     stage (one of STAGES), note, image, images
    step      index (from 1) of count, image, images, preview, eta_seconds (whole request; None: not known)
    note      note: a warning, or a choice made for the user
    result    result: one picture is saved
    done      results: all pictures of the request
    failed    error: {code, message, hint}. Only from gen.jobs; engine.run raises instead
    """

    kind: str
    stage: str = ""
    note: str = ""
    index: int = 0
    count: int = 0
    image: int = 0  # which picture of the request, from 0
    images: int = 1
    eta_seconds: float | None = None
    preview: Image | None = None
    result: Result | None = None
    results: tuple[Result, ...] = ()
    error: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Only the fields that matter to the kind; previews are left out."""
        shown: dict[str, Any] = {"event": self.kind}
        if self.kind in ("stage", "step"):
            shown |= {"image": self.image, "images": self.images}
        if self.kind == "stage":
            shown["stage"] = self.stage
        if self.kind == "step":
            eta = None if self.eta_seconds is None else round(self.eta_seconds, 2)
            shown |= {"index": self.index, "count": self.count, "eta_seconds": eta}
        if self.note:
            shown["note"] = self.note
        if self.result is not None:
            shown["result"] = self.result.to_json()
        if self.kind == "done":
            shown["results"] = [result.to_json() for result in self.results]
        if self.kind == "failed":
            shown["error"] = dict(self.error)
        return shown
