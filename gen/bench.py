"""`gen bench`: our speed beside diffusers', measured in turns in one process, with a word about quality.

A case says what is drawn, a side who draws it and how. Here are the tables, the rounds and the arithmetic;
what needs torch is in gen.bench_subjects and gen.bench_sides, and gen.bench_report writes the document. A
ratio is taken within a round, where both sides met the same machine, and the median and the least of all
rounds are told.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gen import catalog, doctor
from gen.errors import GenError, did_you_mean
from weights import registry

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (5, 20, 100, 300)  # of a prompt, its end token included
LEAST_SECONDS = 0.2  # of one measurement: short forwards are repeated
Report = Callable[[str], None]
Step = Callable[[int], Any]  # index of a step -> its prediction


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is drawn."""

    name: str
    summary: str
    unit: str  # what one measurement is
    subject: str = ""  # key of bench_subjects.SUBJECTS; empty: fresh processes
    config: Mapping[str, Any] = field(default_factory=dict)  # of the network
    size: int = 0  # pixels
    takes: frozenset[str] = frozenset()  # options, of Options, that mean something to it
    pictures: bool = False  # whole pictures are compared, not predictions
    guided: bool = True


@dataclass(frozen=True, kw_only=True)
class Side:
    """Who draws, and how."""

    name: str
    summary: str
    whose: str  # "diffusers" or "ours"
    dtype: str
    treatment: str = "as loaded"  # key of bench_sides.TREATMENTS
    promise: str = "B"  # A: bit-equal, B: as exact as diffusers in this type, C: bounded drift
    asked: bool = False  # only runs when it is named
    products: str = ""  # type that its matrix products are held against; empty: dtype


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure; None: the case's own."""

    rounds: int = 5
    size: int | None = None
    tokens: tuple[int, ...] | None = None
    layers: int | None = None
    sides: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int | None = None
    attention: bool = False  # time the attention functions too
    batch: int | None = None  # pictures at once


@dataclass(kw_only=True)
class Line:
    """What was measured of one side in one case."""

    side: str
    summary: str
    missing: str | None = None  # why it did not run
    seconds: list[float] = field(default_factory=list)  # for a unit, one number a round
    first_call: float | None = None  # of the process: compiling and filling caches included
    first_step: float | None = None  # of a picture: what is computed once per picture included
    quality: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # times as fast as this baseline
    plain_tflops: float | None = None  # a second, as if everything the published network asks were computed
    tflops: float | None = None  # a second, of what was computed
    peak_percent: float | None = None  # of the fastest matrix product measured in its type
    weights_bytes: int | None = None
    peak_bytes: int | None = None  # on a GPU above what was held; for a process all of it
    done: tuple[str, ...] = ()  # what the treatment did

    def to_json(self) -> dict[str, Any]:
        fields = {key: value for key, value in vars(self).items() if key != "seconds"}
        return fields | {"done": list(self.done), "seconds": spread(self.seconds) if self.seconds else None}


def _table(*rows: Any) -> dict[str, Any]:
    return {row.name: row for row in rows}


NETWORK = frozenset({"size", "layers", "sides", "batch"})


def _network(name: str, subject: str, words: str, takes: frozenset[str], guided: bool = True) -> Case:
    facts = registry.CHECKPOINTS[name]
    return Case(
        name=name,
        summary=f"{words} parameters, random weights",
        unit="guided step" if guided else "step",
        guided=guided,
        subject=subject,
        config=facts.config,
        size=facts.native_size,
        takes=takes,
    )


CASES: dict[str, Case] = _table(
    Case(
        name="toy",
        summary="embedded PixArt-Sigma, prompt to picture, 20 steps",
        unit="picture",
        subject="toy",
        size=registry.TOY.native_size,
        takes=frozenset({"size", "sides"}),
        pictures=True,
    ),
    *(
        _network(f"pixart-sigma-xl-{size}", "pixart", "PixArt-Sigma XL/2, 611 M", NETWORK | {"tokens"})
        for size in (256, 512, 1024)
    ),
    _network(
        "pixart-delta-xl-1024",
        "pixart",
        "PixArt-delta XL/2, 611 M",
        NETWORK | {"tokens"},
        guided=False,  # distilled: four such steps are a picture
    ),
    # One size alone: its table of positions is that of its training
    _network("dit-xl-256", "dit", "DiT-XL/2, 675 M", NETWORK - {"size"}),
    Case(
        name="cold",
        summary="a first picture from a fresh process, embedded PixArt-Sigma, 20 steps",
        unit="process",
        pictures=True,
    ),
)
BASELINES = ("diffusers-fp32", "diffusers-bf16")
SIDES: dict[str, Side] = _table(
    Side(
        name="diffusers-fp32",
        summary="diffusers, its defaults",
        whose="diffusers",
        dtype="float32",
        promise="A",
    ),
    Side(name="diffusers-bf16", summary="diffusers in bfloat16", whose="diffusers", dtype="bfloat16"),
    Side(
        name="diffusers-bf16-compiled",
        summary="diffusers in bfloat16, every block compiled",
        whose="diffusers",
        dtype="bfloat16",
        treatment="compiled",
        asked=True,
    ),
    Side(
        name="ours-fp32-plain",
        summary="ours, every operation as published",
        whose="ours",
        dtype="float32",
        treatment="plain",
    ),
    Side(name="ours-fp32", summary="ours", whose="ours", dtype="float32", treatment="lean"),
    Side(
        name="ours-bf16-plain",
        summary="ours in bfloat16, every operation as published",
        whose="ours",
        dtype="bfloat16",
        treatment="plain",
        asked=True,
    ),
    Side(
        name="ours-bf16",
        summary="ours in bfloat16",
        whose="ours",
        dtype="bfloat16",
        treatment="lean",
    ),
    Side(
        name="ours-int8",
        summary="ours with linears in int8",
        whose="ours",
        dtype="bfloat16",
        treatment="int8",
        promise="C",
        products="int8",
    ),
)


# --- running -----------------------------------------------------------------------------------------


def run(names: Sequence[str], options: Options, report: Report, command: str = "") -> dict[str, Any]:
    """Measure the cases and return all that is known; `command` is noted in it. Raises GenError: bad_input,
    not_installed, out_of_memory."""
    cases = [named(name) for name in names]
    check(cases, options)
    began = os.getloadavg()
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    if any(case.subject for case in cases):
        from gen import bench_sides

        found = bench_sides.measure([case for case in cases if case.subject], options, report)
    for case in cases:
        results += found["cases"].get(case.name, []) if case.subject else [cold(case, options.rounds, report)]
    return {
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "commit": commit(),
        "command": command,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "threads": found.get("threads"),
        "device": found.get("device"),
        "load": {"start": began[0], "end": os.getloadavg()[0]},
        "rounds": options.rounds,
        "products": found.get("products", []),
        "attention": found.get("attention", []),
        "cases": results,
    }


def named(name: str) -> Case:
    """The case of this name. Raises bad_input."""
    if name in CASES:
        return CASES[name]
    hint = did_you_mean(name, CASES) or f"The cases are {', '.join(CASES)}."
    if name.isdigit():
        hint = "Several numbers are one word: --tokens 5,20,100,300"
    raise GenError(f"There is no case '{name}' to measure.", hint, "bad_input")


def check(cases: Sequence[Case], options: Options) -> None:
    """Refuse what no case could do with these options, before any work. Raises bad_input, not_installed."""
    for name in ("size", "tokens", "layers", "sides", "batch"):
        if getattr(options, name) is not None and not any(name in case.takes for case in cases):
            takers = ", ".join(case.name for case in CASES.values() if name in case.takes)
            names = ", ".join(case.name for case in cases)
            raise GenError(f"{names} takes no --{name}.", f"These do: {takers}.", "bad_input")
    for side in options.sides or ():
        if side not in SIDES:
            hint = did_you_mean(side, SIDES) or f"The sides are {', '.join(SIDES)}."
            raise GenError(f"There is no side '{side}'.", hint, "bad_input")
    if options.tokens and not all(1 <= count <= max(TOKENS) for count in options.tokens):
        raise GenError(
            f"A prompt cannot have {max(options.tokens, key=lambda count: abs(count - 150))} tokens.",
            f"diffusers pads to {max(TOKENS)}: give numbers from 1 to {max(TOKENS)}.",
            "bad_input",
        )
    if options.size is not None and (options.size % 16 or not 64 <= options.size <= 2048):
        raise GenError(
            f"{options.size} pixels cannot be drawn by these networks.",
            "Give a multiple of 16 from 64 to 2048.",
            "bad_input",
        )
    from importlib.util import find_spec

    if find_spec("diffusers") is None:
        raise GenError(
            "The package diffusers is not installed, and speed is measured against it.",
            "Install it: pip install 'diffusers>=0.42,<1'",
            "not_installed",
        )


def chosen(options: Options) -> list[Side]:
    """The sides to run, in the order of the table."""
    if options.sides is None:
        return [side for side in SIDES.values() if not side.asked]
    return [side for side in SIDES.values() if side.name in options.sides]


def in_turns(
    steps: Mapping[str, Step], rounds: int, synchronise: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds for a unit of every side, `rounds` of them, taken in turns. One unmeasured call each comes
    first."""

    def seconds(step: Step, index: int, times: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(times):
            step(index)
        synchronise()
        return (time.perf_counter() - start) / times

    times = {name: max(1, math.ceil(LEAST_SECONDS / seconds(step, 1, 1))) for name, step in steps.items()}
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            measured[name].append(seconds(step, 1 + number, times[name]))
    return measured


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and all in the order of the rounds."""
    import statistics

    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": [*values]}


def compare(lines: Sequence[Line], baselines: Sequence[str] = BASELINES) -> None:
    """Fill in how many times as fast each line is as each baseline that ran, round by round."""
    import statistics

    ran = {line.side: line.seconds for line in lines if line.seconds}
    for line in lines:
        for name in baselines:
            if line.seconds and name in ran:
                ratios = [slow / fast for slow, fast in zip(ran[name], line.seconds, strict=True)]
                line.ratios[name] = {"median": statistics.median(ratios), "min": min(ratios)}


# --- fresh processes ---------------------------------------------------------------------------------


def cold(case: Case, rounds: int, report: Report) -> dict[str, Any]:
    """A first picture: `gen run` and the plainest diffusers script, each in fresh processes."""
    import tempfile

    script = _first_pictures()
    _, _, folder = catalog.choose(catalog.MODELS["pixart-sigma"], "toy")
    with tempfile.TemporaryDirectory() as scratch:
        home, os.environ["GEN_HOME"] = os.environ.get("GEN_HOME"), scratch
        try:
            sides = script.sides(folder, Path(scratch))
            for number in range(rounds + 1):
                report(f"{case.name}: round {number} of {rounds}")
                for side in sides:
                    side.run(counted=number > 0)  # the first fills the disk cache
        finally:
            if home is None:
                del os.environ["GEN_HOME"]
            else:
                os.environ["GEN_HOME"] = home
        ours, plain = sides
        quality = _picture_quality(ours.output, plain.output)
    lines = [
        Line(
            side=plain.name, summary="benchmarks/plain_diffusers.py", seconds=plain.seconds,
            quality={"class": "A", "words": "the reference"}, peak_bytes=plain.peak_bytes,
        ),
        Line(
            side=ours.name, summary="gen run pixart-sigma:toy", seconds=ours.seconds,
            quality=quality, peak_bytes=ours.peak_bytes,
        ),
    ]  # fmt: skip
    compare(lines, (plain.name,))
    return entry(case, lines, {"baselines": [plain.name]})


def _first_pictures() -> ModuleType:
    """benchmarks/run.py, which knows how. Benchmarks are no part of the wheel. Raises not_installed."""
    import importlib.util

    path = ROOT / "benchmarks" / "run.py"
    spec = importlib.util.spec_from_file_location("gen_first_pictures", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise GenError(
            "The case 'cold' needs benchmarks/run.py, which is not part of the installed package.",
            "Run it from a clone of the repository, or measure another case.",
            "not_installed",
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data class looks itself up
    spec.loader.exec_module(module)
    return module


def _picture_quality(found: Path, expected: Path) -> dict[str, Any]:
    import numpy
    from PIL import Image

    pictures = [
        numpy.asarray(Image.open(path).convert("RGB"), numpy.float64) / 255 for path in (found, expected)
    ]
    quality = picture_quality(*(picture.ravel() for picture in pictures))
    most = round(255 * float(abs(pictures[0] - pictures[1]).max()))
    return quality | {"words": f"{quality['words']}, at most {most} of 255 apart"}


def picture_quality(found: Any, expected: Any) -> dict[str, Any]:
    """Of two arrays of numbers 0..1: equal, or how far apart."""
    error = float(((found - expected) ** 2).mean())
    if error == 0:
        return {"class": "A", "words": "the same picture"}
    psnr = -10 * math.log10(error)
    return {"class": "-", "psnr": psnr, "words": f"{psnr:.1f} dB"}


def entry(case: Case, lines: Sequence[Line], more: Mapping[str, Any]) -> dict[str, Any]:
    """A case as it stands in the result."""
    about = {"case": case.name, "summary": case.summary, "unit": case.unit}
    return about | {**more, "lines": [line.to_json() for line in lines]}


def commit() -> str:
    """The short commit of the tree, with a mark when files differ from it; else the version."""
    import subprocess

    from gen import __version__

    if not (ROOT / ".git").exists():
        return f"of gen-studio {__version__}"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return done.stdout.strip()
