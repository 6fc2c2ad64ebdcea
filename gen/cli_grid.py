"""`gen grid`: the options of `gen run`, two of which may have several values, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gen import catalog, cli_run, grid, outputs, printing
from gen.errors import GenError, cancelled, did_you_mean
from gen.progress import Progress
from gen.request import Request, Settings, draw_seed

# Options of `gen run` that mean nothing for a cell
LEFT_OUT = ("prompts", "repeat", "count", "dry_run", "stream", "output")
SETTINGS = ("device", "dtype", "attention", "memory", "quantize", "exact", "saver")
MORE = ("size", "weights", *SETTINGS)  # axes beside the inputs of the model
BARS_ONLY = ("text", "sides")  # kinds of inputs whose values have commas of their own


def run(ctx: click.Context, /, **params: Any) -> None:
    """Draw a grid of pictures in which one or two values change.

    An axis is NAME=VALUE,VALUE,...: any option of the model, the size, the weights, or a setting such as
    quantize. Texts have a bar between them, as in "prompt=a red cube|a blue ball", and so may all others. All
    other options are those of `gen run`. Without --seed one is drawn for all cells.

    The folder gets cells/ with ordinary results, grid.png and grid.html. The same command again draws what is
    missing, after Ctrl-C say, and cells that failed; another command in the same folder is refused.

    \b
      gen grid pixart-sigma "a red cube" --x steps=4,10,20 --y guidance=1,3,5 --output steps/
      gen grid pixart-sigma --x "prompt=a red cube|a blue ball" --y seed=1,2,3 --output seeds/
    """
    ranks = {
        name: cli_run.RANKS.get(source, 0)
        for name in params
        if (source := ctx.get_parameter_source(name)) is not None
    }
    talk = Progress(quiet=params["quiet"])
    if params["output"] is None:
        raise GenError("A grid needs a folder of its own.", "Say which: --output FOLDER", "bad_input")
    whole = _grid(params, ranks)
    kept = sum("picture" in one for one in grid.results(whole)) if whole.folder.is_dir() else 0
    if kept:
        talk.say(f"{kept} of {len(whole.cells)} cells are there already")
    _draw(whole, talk)
    cells = grid.results(whole)
    data: dict[str, Any] = {
        "png": str(whole.folder / grid.PICTURE),
        "html": str(whole.folder / grid.PAGE),
        "folder": str(whole.folder),
        "axes": {"x": whole.x.name, "y": whole.y.name if whole.y else None},
        "drawn": sum("picture" in one for one in cells) - kept,
        "kept": kept,
        "cells": cells,
    }
    failed = [one for one in cells if "picture" not in one]
    if not params["json"]:
        printing.line(data["png"])
    elif not failed:
        printing.ok(data)
    if failed:
        error = GenError(
            f"{len(failed)} of {len(cells)} cells failed; they are marked in {data['png']}.",
            "The same command tries them again.",
            "failed",
        )
        error.finished = [one for one in cells if "picture" in one]
        raise error


def _draw(whole: grid.Grid, talk: Progress) -> None:
    """Draw, and tell what happens."""
    last = None
    try:
        with closing(grid.run(whole)) as events:
            for cell, event in events:
                if cell is not last and not talk.quiet:
                    talk.say(whole.label(cell))
                last = cell
                if event.kind == "failed":
                    talk.say(f"failed: {event.error['message']} {event.error['hint']}".rstrip())
                else:
                    talk.noun = outputs.OUTPUTS[catalog.MODELS[cell.request.model].makes].noun
                    talk.show(event)
    except (GenError, KeyboardInterrupt) as stop:
        error = stop if isinstance(stop, GenError) else cancelled()
        if whole.folder.is_dir() and error.code != "bad_input":
            error.finished = [one for one in grid.results(whole) if "picture" in one]
        raise error from stop
    finally:
        talk.clear()


# --- from flags to cells --------------------------------------------------------------------------


def _grid(params: Mapping[str, Any], ranks: Mapping[str, int]) -> grid.Grid:
    """Every cell, checked. Raises GenError before anything is drawn."""
    row, _ = catalog.find(cli_run._reference(params["model"], params["weights"], None))
    x, y = _axis(row, params["x"]), _axis(row, params["y"]) if params["y"] else None
    names = {axis.name for axis in (x, y) if axis}
    if y and x.name == y.name:
        raise GenError(f"Both axes are {x.name}.", "Let them be two.", "bad_input")
    if {"size"} < names & {"size", "width", "height"}:
        raise GenError("Size is width and height at once.", "Give one of them.", "bad_input")
    for name in sorted(names):
        typed = params["words"] or params["prompt"] if name == row.subject else False
        if typed or ranks.get(name, 0) == cli_run.TYPED:
            raise GenError(
                f"{name} is an axis, and given besides.", "Leave it out but for the axis.", "bad_input"
            )
    folder = params["output"].expanduser().absolute()
    seed = grid.stored_seed(folder) if not params["seed"] and "seed" not in names else None
    fixed = {**params, "seed": params["seed"] or (str(draw_seed() if seed is None else seed),)}
    cells = tuple(
        grid.Cell(
            column=column,
            row=line,
            **_made(row, fixed, ranks, [(x, column), *([(y, line)] if y else [])]),
        )
        for column in range(len(x.values))
        for line in range(len(y.values) if y else 1)
    )
    whole = grid.Grid(x=x, y=y, cells=cells, folder=folder)
    grid.check(whole)
    return whole


def _axis(row: catalog.Model, text: str) -> grid.Axis:
    """`steps=4,10` -> the axis. Whether the values are any good shows when the cells are built."""
    name, equals, rest = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    inputs = {one.name: one for one in row.inputs if one.name != "count"}
    known = [*inputs, *(one for one in MORE if one != "size" or "width" in inputs)]
    if not equals or not rest.strip():
        raise GenError(
            f"The axis '{text[:60]}' has no values.",
            "Write NAME=VALUE,VALUE, e.g. steps=4,10,20",
            "bad_input",
        )
    if name not in known:
        if any(name == one.name for other in catalog.MODELS.values() for one in other.inputs):
            raise catalog.not_taken(row, name)
        hint = did_you_mean(name[:60], known) or f"An axis may be {', '.join(known)}."
        raise GenError(f"There is no axis '{name[:60]}'.", hint, "bad_input")
    bars = name == "saver" or (name in inputs and inputs[name].kind in BARS_ONLY)
    values = tuple(one.strip() for one in rest.split("|" if bars or "|" in rest else ","))
    empty = name in ("saver", "negative_prompt") or (name in inputs and inputs[name].kind == "lora")
    if not empty and not all(values):
        raise GenError(f"A value of {name} is empty: '{rest[:60]}'.", "Take the comma out.", "bad_input")
    if len(set(values)) < len(values):
        raise GenError(f"A value of {name} stands twice: '{rest[:60]}'.", "Give each once.", "bad_input")
    return grid.Axis(name, values)


def _made(
    row: catalog.Model,
    fixed: Mapping[str, Any],
    fixed_ranks: Mapping[str, int],
    places: list[tuple[grid.Axis, int]],
) -> dict[str, Any]:
    """The request and the settings of a cell, built and checked as `gen run` does it with its flags."""
    params = {**dict.fromkeys(LEFT_OUT), **fixed}
    ranks = {**dict.fromkeys(LEFT_OUT, 0), **fixed_ranks}
    for axis, index in places:
        value = axis.values[index]
        for name, typed in _typed(row, axis.name, value):
            params[name], ranks[name] = typed, cli_run.TYPED
    try:
        requests: list[Request] = cli_run._requests({**params, "output": None}, ranks, None)
        settings: Settings = cli_run._settings({**params, "output": None}, ranks, None)
    except GenError as error:
        where = ", ".join(axis.label(index) for axis, index in places)
        raise GenError(f"The cell {where} cannot be: {error.message}", error.hint, error.code) from error
    if len(requests) != 1:
        raise GenError(
            "A cell holds one picture, and several prompts or seeds are given.",
            'Let them be an axis: --x "prompt=a red cube|a blue ball", --y seed=1,2,3',
            "bad_input",
        )
    return {"request": requests[0], "settings": replace(settings, output=None)}


def _typed(row: catalog.Model, name: str, value: str) -> Iterator[tuple[str, Any]]:
    """Parameters of `gen run` for a value of an axis."""
    if name == row.subject:
        yield "words", (value,)
    elif name == "seed":
        yield name, (value,)
    elif any(one.name == name and one.kind == "lora" for one in row.inputs):
        yield name, (value,) if value else ()
    else:
        yield name, value


def _options() -> list[click.Parameter]:
    kept = [one for one in cli_run.options() if one.name not in LEFT_OUT]
    axis = "NAME=VALUE,VALUE,..."
    return [
        *(one for one in kept if isinstance(one, click.Argument)),
        click.Option(["--x"], metavar=axis, required=True, help="What changes from column to column."),
        click.Option(["--y"], metavar=axis, help="What changes from row to row."),
        click.Option(
            ["--output", "-o"], metavar="FOLDER", type=click.Path(path_type=Path), help="Where it goes."
        ),
        *(one for one in kept if not isinstance(one, click.Argument)),
    ]


command = click.Command(
    "grid",
    callback=click.pass_context(run),
    params=_options(),
    help=run.__doc__,
    short_help="Draw a grid: one or two values change.",
)
