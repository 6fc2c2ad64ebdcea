"""A table of pictures in which one or two values change: drawn cell by cell, and gone on with after a stop.

A folder holds all of it: `cells/` with ordinary results, each with its recipe and its row in the library;
`grid.json`, which says what is to be drawn and which cells are; `grid.png` and `grid.html` to look at. The
file is written after every cell, so a second call draws what is missing and nothing twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gen import catalog, outputs
from gen.errors import GenError
from gen.request import Event, Request, Settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

FORM = 1  # of grid.json
MOST_CELLS = 1024
STATE, PICTURE, PAGE, CELLS = "grid.json", "grid.png", "grid.html", "cells"
# Errors of one cell that would be those of all others
FOR_ALL = ("not_installed", "corrupt_weights", "disk_full", "output_not_writable", "cancelled")


@dataclass(frozen=True)
class Axis:
    """What changes along rows or columns: the name of an input or setting, and its values as typed."""

    name: str
    values: tuple[str, ...]

    def label(self, index: int) -> str:
        value = self.values[index]
        return f"{self.name} = {value}" if value else f"no {self.name}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture to draw: its column and row, and what to make, which is checked."""

    column: int
    row: int
    request: Request
    settings: Settings

    @property
    def key(self) -> str:
        return f"{self.column},{self.row}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All that is to be drawn into a folder. `y` None: a single row."""

    x: Axis
    y: Axis | None
    cells: tuple[Cell, ...]
    folder: Path

    def plan(self) -> dict[str, Any]:
        """What is compared when a folder is gone on with: everything that the pictures depend on."""
        return json.loads(
            json.dumps(
                {
                    "x": [self.x.name, self.x.values],
                    "y": [self.y.name, self.y.values] if self.y else None,
                    "cells": {
                        cell.key: {"request": cell.request.to_json(), "settings": _said(cell.settings)}
                        for cell in self.cells
                    },
                }
            )
        )

    def label(self, cell: Cell) -> str:
        parts = [self.x.label(cell.column), self.y.label(cell.row) if self.y else ""]
        return ", ".join(filter(None, parts))


def _said(settings: Settings) -> dict[str, Any]:
    """Settings but for places and looks."""
    return {
        one.name: getattr(settings, one.name)
        for one in fields(settings)
        if one.name not in ("output", "preview")
    }


# --- what is drawn, and what was ------------------------------------------------------------------


def stored_seed(folder: Path) -> int | None:
    """The seed that was drawn for a grid in this folder; None where there is none. Raises bad_input."""
    seed = _state(folder).get("seed")
    return seed if isinstance(seed, int) else None


def _state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["form"] != FORM or not isinstance(state["cells"], dict):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise GenError(
            f"{path} is no grid that this version can go on with.", "Give another --output.", "bad_input"
        ) from None
    return dict(state)


def _is_there(folder: Path, entry: Mapping[str, Any] | None) -> bool:
    return bool(entry and entry.get("picture") and (folder / entry["picture"]).is_file())


def check(grid: Grid) -> None:
    """Raises bad_input for what the first cell would not show: too many cells, a folder with another grid."""
    if len(grid.cells) > MOST_CELLS:
        raise GenError(
            f"A grid of {len(grid.cells)} cells is too large; {MOST_CELLS} are possible.",
            "Give fewer values.",
            "bad_input",
        )
    for cell in grid.cells:
        row = catalog.MODELS[cell.request.model]
        if cell.settings.saver and not row.savers:
            raise GenError(f"{row.name} has no step savers.", "Leave --saver out.", "bad_input")
        if cell.request.count != 1:
            raise GenError(
                "A cell holds one picture, and the count is more.",
                "Leave --count out, or show several seeds: --y seed=1,2,3",
                "bad_input",
            )
    state = _state(grid.folder)
    if state and state.get("plan") != grid.plan():
        raise GenError(
            f"{grid.folder} holds another grid, which is kept as it is.",
            "Give another --output, or the same command as then to draw what is missing.",
            "bad_input",
        )


def run(grid: Grid) -> Generator[tuple[Cell, Event], None, None]:
    """Draw the cells that are missing, and at the end or when stopped write the picture and the page.

    Yields what the engine tells, with the cell it belongs to; a cell that cannot be drawn yields an Event
    "failed", and the next one follows. Raises GenError for what would go wrong with every cell.
    """
    from gen import engine, library

    check(grid)
    folder = grid.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise library.disk_error(error, folder) from error
    with _alone(folder):
        state = _state(folder) or {"form": FORM, "plan": grid.plan(), "cells": {}}
        state["seed"] = grid.cells[0].request.seed
        _write_state(folder, state)
        try:
            for cell in _in_order(grid.cells):
                if _is_there(folder, state["cells"].get(cell.key)):
                    continue
                settings = replace(cell.settings, output=folder / CELLS, preview=False)
                try:
                    with closing(engine.run(cell.request, settings)) as events:
                        for event in events:
                            if event.result is not None:
                                state["cells"][cell.key] = _entry(folder, cell, event)
                                _write_state(folder, state)
                            yield cell, event
                except GenError as error:
                    if error.code in FOR_ALL:
                        raise
                    state["cells"][cell.key] = {"error": error.to_json()}
                    _write_state(folder, state)
                    yield cell, Event(kind="failed", error=error.to_json())
        finally:
            _show(grid, state)


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of the same loaded pipeline one after the other, else in reading order."""
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda one: (one.row, one.column)):
        inputs = cell.request.inputs
        loaded = (cell.request.weights, inputs.get("lora"), inputs.get("lora_scale"), _said(cell.settings))
        groups.setdefault(repr(loaded), []).append(cell)
    return [cell for group in groups.values() for cell in group]


def _entry(folder: Path, cell: Cell, event: Event) -> dict[str, Any]:
    result = event.result
    assert result is not None
    of = outputs.OUTPUTS[catalog.MODELS[cell.request.model].makes]
    return {
        "id": result.id,
        "file": result.path.relative_to(folder).as_posix(),
        "picture": result.files[of.picture].relative_to(folder).as_posix(),
        "seed": result.seed,
        "width": result.width,
        "height": result.height,
        "seconds": round(result.seconds, 3),
        "toy": bool(result.recipe["weights"]["toy"]),
    }


def results(grid: Grid) -> list[dict[str, Any]]:
    """Every cell in reading order, with its picture's absolute path, its error, or neither."""
    stored = _state(grid.folder).get("cells", {})
    found = []
    for cell in sorted(grid.cells, key=lambda one: (one.row, one.column)):
        entry = stored.get(cell.key) or {}
        about: dict[str, Any] = {"x": grid.x.values[cell.column]}
        about |= {"y": grid.y.values[cell.row]} if grid.y else {}
        if _is_there(grid.folder, entry):
            paths = {name: str(grid.folder / entry[name]) for name in ("file", "picture")}
            about |= {**entry, **paths}
        elif "error" in entry:
            about["error"] = entry["error"]
        found.append(about)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time in a folder."""
    with (folder / ".grid.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GenError(
                f"Another gen grid is at work in {folder}.", "Let it end first.", "failed"
            ) from None
        yield


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    _write(
        folder / STATE, json.dumps(state, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    )


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing. Raises disk_full, output_not_writable."""
    from gen import library

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise library.disk_error(error, path.parent) from error
    finally:
        part.unlink(missing_ok=True)


# --- to look at -----------------------------------------------------------------------------------


def _show(grid: Grid, state: Mapping[str, Any]) -> None:
    import io

    sheet = io.BytesIO()
    _sheet(grid, state["cells"]).save(sheet, format="PNG")
    _write(grid.folder / PICTURE, sheet.getvalue())
    _write(grid.folder / PAGE, _page(grid, state["cells"]).encode("utf-8", "xmlcharrefreplace"))


def _title(grid: Grid, cells: Mapping[str, Any]) -> str:
    """Which weights, and that they are toys where they are."""
    names = {f"{cell.request.model}:{cell.request.weights}": None for cell in grid.cells}
    toy = any(entry.get("toy") for entry in cells.values())
    return " and ".join(names) + (" (TOY weights)" if toy else "")


def _fixed(grid: Grid) -> str:
    """What all cells have in common and is worth a word."""
    first = grid.cells[0].request
    axes = {grid.x.name, grid.y.name if grid.y else ""}
    subject = catalog.MODELS[first.model].subject
    words = [f'"{first.subject}"'] if subject not in axes else []
    for name in ("steps", "guidance"):
        if (
            name in first.inputs
            and name not in axes
            and len({c.request.inputs[name] for c in grid.cells}) == 1
        ):
            words.append(f"{name} {first.inputs[name]}")
    words += [f"seed {first.seed}"] if "seed" not in axes else []
    return ", ".join(words)


INK, SOFT, PAPER, EDGE = "#161a22", "#555e6e", "#ffffff", "#dde1e8"
ALARM, ALARM_PAPER = "#912018", "#fdecea"
MOST_SIDE = 12_000  # pixels of the sheet; larger pictures are made smaller to fit
SMALLEST = 144, 96  # pixels of a cell, wide and high, for its labels to have room
GAP = 12  # pixels between pictures


def _sheet(grid: Grid, cells: Mapping[str, Any]) -> Image:
    """The pictures in rows and columns, with labels above and on the left."""
    from PIL import Image, ImageDraw, ImageFont

    columns, rows = len(grid.x.values), len(grid.y.values) if grid.y else 1
    there = [one for one in cells.values() if _is_there(grid.folder, one)]
    room = (MOST_SIDE - 600) // max(columns, rows) - GAP
    wide = max([SMALLEST[0], *(one["width"] for one in there)])
    high = max([SMALLEST[1], *(one["height"] for one in there)])
    shrink = min(1.0, room / wide, room / high)
    wide, high = round(wide * shrink), round(high * shrink)

    font = ImageFont.load_default(size=min(40, max(15, wide // 14)))
    title_font = ImageFont.load_default(size=min(56, max(20, wide // 10)))
    line = _height(font)
    heads = [_wrapped(grid.x.label(index), font, wide) for index in range(columns)]
    sides = [_wrapped(grid.y.label(index), font, max(wide, 200)) for index in range(rows)] if grid.y else [[]]
    side = max([0, *(round(font.getlength(text)) for lines in sides for text in lines)])
    left = GAP * 2 + (side + GAP if side else 0)
    width = left + columns * (wide + GAP) + GAP
    titles = _wrapped(_title(grid, cells), title_font, width - 4 * GAP, most=2)
    fixed = _wrapped(_fixed(grid), font, width - 4 * GAP, most=3)
    top = GAP * 2 + len(titles) * _height(title_font) + len(fixed) * line + GAP * 2
    head = max(len(lines) for lines in heads) * line + GAP
    sheet = Image.new("RGB", (width, top + head + rows * (high + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (GAP * 2, GAP * 2), titles, title_font, INK)
    _text(draw, (GAP * 2, GAP * 2 + len(titles) * _height(title_font)), fixed, font, SOFT)
    for column, lines in enumerate(heads):
        below = top + head - GAP // 2 - len(lines) * line  # labels of several lines end at the picture
        _text(draw, (left + column * (wide + GAP), below), lines, font, INK, width=wide)
    for row, lines in enumerate(sides):
        middle = top + head + row * (high + GAP) + (high - len(lines) * line) // 2
        _text(draw, (GAP * 2, middle), lines, font, INK)
    for cell in grid.cells:
        place = left + cell.column * (wide + GAP), top + head + cell.row * (high + GAP)
        entry = cells.get(cell.key) or {}
        if _is_there(grid.folder, entry):
            with Image.open(grid.folder / entry["picture"]) as file:
                picture = file.convert("RGB")
            if shrink < 1:
                size = round(picture.width * shrink), round(picture.height * shrink)
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            offset = (wide - picture.width) // 2, (high - picture.height) // 2
            sheet.paste(picture, (place[0] + offset[0], place[1] + offset[1]))
            continue
        error = entry.get("error")
        box = (*place, place[0] + wide - 1, place[1] + high - 1)
        draw.rectangle(box, fill=ALARM_PAPER if error else PAPER, outline=ALARM if error else EDGE)
        words = f"failed: {error['message']}" if error else "not drawn yet"
        most = max(1, (high - 2 * GAP) // line)
        lines = _wrapped(words, font, wide - 2 * GAP, most=most)
        _text(draw, (place[0] + GAP, place[1] + GAP), lines, font, ALARM if error else SOFT)
    return sheet


def _height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return int((ascent + descent) * 1.15)


def _text(
    draw: ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Any, colour: str, width: int = 0
) -> None:
    """Lines from a corner down; with a width each is centred in it."""
    for index, text in enumerate(lines):
        shift = (width - font.getlength(text)) / 2 if width else 0
        draw.text((place[0] + shift, place[1] + index * _height(font)), text, fill=colour, font=font)


def _wrapped(text: str, font: Any, width: int, most: int = 4) -> list[str]:
    """Words in lines of at most this width; what goes beyond `most` lines is cut, with dots."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        while font.getlength(word) > width and len(word) > 1:  # a word that is longer than a line
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] = word
    lines = [one for one in lines if one]
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}..."]
    return lines


STYLE = """
:root { color-scheme: light dark; --ink: #161a22; --soft: #555e6e; --paper: #ffffff; --edge: #dde1e8;
  --link: #4338ca; --alarm: #912018; --alarm-paper: #fdecea }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf1; --soft: #a6b0c0; --paper: #0e1117;
  --edge: #2b3340; --link: #a5b4fc; --alarm: #fda29b; --alarm-paper: #331614 } }
body { margin: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.3rem; margin: 0 }
p { margin: .3rem 0 1rem; color: var(--soft); max-width: 60rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: separate; border-spacing: 10px }
caption { text-align: left; color: var(--soft) }
th { font-weight: 600; overflow-wrap: break-word; min-width: 7rem; max-width: 18rem }
th[scope=row] { text-align: left; position: sticky; left: 0; background: var(--paper); padding-right: .5rem }
thead th { vertical-align: bottom }
td { text-align: center; vertical-align: middle }
img { display: block; max-width: min(70vw, 32rem); height: auto; margin: auto }
a { color: var(--link) } a:focus-visible { outline: 2px solid var(--link); outline-offset: 3px }
.failed { color: var(--alarm); background: var(--alarm-paper); border: 1px solid; padding: .75rem;
  max-width: 16rem; text-align: left }
.missing { color: var(--soft); border: 1px dashed var(--edge); padding: .75rem }
"""


def _page(grid: Grid, cells: Mapping[str, Any]) -> str:
    """The same as a page: a table with headers, every picture a link to itself."""
    by_place = {(cell.column, cell.row): cell for cell in grid.cells}
    columns = range(len(grid.x.values))
    corner = "<td></td>" if grid.y else ""
    head = "".join(f'<th scope="col">{escape(grid.x.label(column))}</th>' for column in columns)
    body = []
    for row in range(len(grid.y.values) if grid.y else 1):
        side = f'<th scope="row">{escape(grid.y.label(row))}</th>' if grid.y else ""
        line = (_html_cell(grid, by_place[column, row], cells) for column in columns)
        body.append(f"<tr>{side}{''.join(line)}</tr>")
    title, fixed = escape(_title(grid, cells)), escape(_fixed(grid))
    lines = "\n".join(body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {escape(grid.x.name)}{f" and {escape(grid.y.name)}" if grid.y else ""}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{fixed}</p>
<div class="scroll" role="region" aria-label="Grid" tabindex="0">
<table>
<caption>Every picture is a link to its file, which holds its recipe.</caption>
<thead><tr>{corner}{head}</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
</main>
</body>
</html>
"""


def _html_cell(grid: Grid, cell: Cell, cells: Mapping[str, Any]) -> str:
    entry = cells.get(cell.key) or {}
    if _is_there(grid.folder, entry):
        words = escape(f"{cell.request.subject}: {grid.label(cell)}, seed {entry['seed']}")
        source, file = quote(entry["picture"]), quote(entry["file"])
        return (
            f'<td><a href="{file}"><img src="{source}" width="{entry["width"]}" height="{entry["height"]}" '
            f'alt="{words}" loading="lazy"></a></td>'
        )
    if "error" in entry:
        error = entry["error"]
        words = escape(" ".join(filter(None, (error["message"], error["hint"]))))
        return f'<td><div class="failed"><strong>Failed:</strong> {words}</div></td>'
    return '<td><div class="missing">not drawn yet</div></td>'
