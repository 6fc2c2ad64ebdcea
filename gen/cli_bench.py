"""`gen bench` and `gen doctor`: from flags to measurements and findings, and how they are printed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gen import bench, printing
from gen.errors import GenError
from gen.progress import Progress
from gen.request import DEVICES


class Words(click.ParamType):
    """Several words or numbers, separated by commas."""

    def __init__(self, name: str, whole_numbers: bool = False) -> None:
        self.name = name
        self.whole_numbers = whole_numbers

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",") if word.strip()]
        if not words or (self.whole_numbers and not all(word.isdecimal() for word in words)):
            kind = "numbers" if self.whole_numbers else "names"
            self.fail(f"{value!r} are not {kind} separated by commas", param, ctx)
        return tuple(int(word) for word in words) if self.whole_numbers else tuple(words)


def _cases() -> str:
    width = max(map(len, bench.CASES))
    return "\n".join(f"  {case.name.ljust(width)}  {case.summary}" for case in bench.CASES.values())


def _sides() -> str:
    width = max(map(len, bench.SIDES))
    return "\n".join(
        f"  {side.name.ljust(width)}  {side.summary}{' (only when named)' if side.asked else ''}"
        for side in bench.SIDES.values()
    )


BENCH_HELP = f"""Measure our speed beside diffusers', in turns and in one process.

The same weights, text states, noise and schedule on both sides. Every time stands beside a word about
quality: class A is bit-equal to diffusers in float32, B as exact as diffusers in that type, C bounded drift
with its PSNR. CASE is one or more of these (default: toy).

\b
{_cases()}

\b
Sides:
{_sides()}

Full-size networks take several GB of memory: --sides and --layers make it less. Numbers mean something on an
idle machine only; the load is in the report.
"""


def run_bench(cases: tuple[str, ...], as_json: bool, output: Path | None, **options: Any) -> None:
    """Parse, measure, print."""
    if output is not None and not output.absolute().parent.is_dir():
        raise GenError(
            f"{output} cannot be written: its folder does not exist.", "Make the folder first.", "bad_input"
        )
    command = shlex.join(["gen", *sys.argv[1:]])
    talk = Progress()
    data = bench.run(cases or ("toy",), bench.Options(**options), talk.say, command)
    from gen.bench_report import markdown

    text = markdown(data)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise GenError(
                f"{output} cannot be written: {error.strerror}.", "Give another place.", "output_not_writable"
            ) from error
    if as_json:
        printing.ok(data)
    elif output is not None:
        printing.line(os.path.abspath(output))
    else:
        printing.line(text.rstrip())


bench_command = click.Command(
    "bench",
    callback=run_bench,
    help=BENCH_HELP,
    short_help="Measure speed against diffusers.",
    params=[
        click.Argument(["cases"], nargs=-1, metavar="[CASE]..."),
        click.Option(
            ["--rounds"], type=click.IntRange(1, 1000), default=5, show_default=True, help="Measured rounds."
        ),
        click.Option(
            ["--size"], type=click.IntRange(1), metavar="PX", help="Width and height instead of the case's."
        ),
        click.Option(
            ["--tokens"],
            type=Words("N,N,...", whole_numbers=True),
            help=f"Lengths of the prompt (default: {','.join(map(str, bench.TOKENS))}).",
        ),
        click.Option(["--layers"], type=click.IntRange(1, 28), help="Fewer blocks than the network has."),
        click.Option(
            ["--batch"],
            type=click.IntRange(1, 256),
            help="Pictures at a time, where the case is a network alone; left out, one.",
        ),
        click.Option(["--sides"], type=Words("NAME,NAME,..."), help="Which sides to run."),
        click.Option(
            ["--device"],
            type=click.Choice(DEVICES),
            default="auto",
            envvar="GEN_DEVICE",
            help="Where to compute.",
        ),
        click.Option(["--threads"], type=click.IntRange(1), help="CPU threads to use."),
        click.Option(
            ["--attention"], is_flag=True, help="Time the attention functions too, at head size 72."
        ),
        click.Option(
            ["--output", "-o"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE.md",
            help="Write the report to a file, and print its path.",
        ),
        click.Option(["as_json", "--json"], is_flag=True, help="One JSON object on stdout."),
    ],
)


@click.command("doctor", short_help="Examine this machine.")
@click.option("--quick", is_flag=True, help="Measure nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor_command(quick: bool, as_json: bool) -> None:
    """Examine this machine: what it has, what `auto` takes, which weights fit, what would give more.

    Matrix products are measured, for some seconds. Problems come last, each with what to do.
    """
    from gen import doctor

    found = doctor.examine(probe=not quick)
    if as_json:
        printing.ok(found)
    else:
        doctor.show(found)
