"""Results on stdout: lines, tables, and the JSON envelope {ok, data} or {ok, error}."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Unwritable(Exception):
    """stdout cannot be written to; not an OSError, so that nobody takes it for a fault of the picture's
    file."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def line(text: str) -> None:
    """To stdout at once: a reader of a pipe must not wait for the end. Raises Unwritable."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        raise Unwritable(error) from error


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their longest cell, two spaces between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def as_json(value: Any) -> None:
    """One JSON object on one line."""
    line(json.dumps(value, ensure_ascii=False, allow_nan=False))


def ok(data: Mapping[str, Any]) -> None:
    """The envelope of a success."""
    as_json({"ok": True, "data": data})
