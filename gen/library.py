"""The history of what was made, in one SQLite file in the user's folder, and where that folder is.

Everything the studio keeps lies under GEN_HOME (default ~/.local/share/gen-studio): library.sqlite3, outputs/
and logs/. A row and its file come into being together, see `add`.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gen.errors import GenError
from weights.store import home as home

# Applied in order, each once, and never edited afterwards: a library in the wild has already run them.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE results (
        id          TEXT PRIMARY KEY,
        created     REAL NOT NULL,      -- seconds since 1970
        model       TEXT NOT NULL,
        weights     TEXT NOT NULL,      -- the tag
        fingerprint TEXT NOT NULL,      -- of the weights' bytes
        seed        INTEGER NOT NULL,
        prompt      TEXT NOT NULL,
        path        TEXT NOT NULL,      -- relative to GEN_HOME when inside it
        width       INTEGER NOT NULL,   -- pixels
        height      INTEGER NOT NULL,   -- pixels
        seconds     REAL NOT NULL,
        peak_bytes  INTEGER NOT NULL,
        toy         INTEGER NOT NULL,   -- 1: made with toy weights
        recipe      TEXT NOT NULL       -- JSON, as inside the file; recipe.request makes the picture again
    ) STRICT
    """,
    "CREATE INDEX results_by_time ON results (created DESC)",
    # The result's files, JSON: kind -> name, all beside `path`, which is one of them. Empty: `path` alone.
    "ALTER TABLE results ADD COLUMN files TEXT NOT NULL DEFAULT '{}'",
)


def outputs() -> Path:
    """Where pictures go unless told otherwise: one folder a day."""
    return home() / "outputs" / time.strftime("%Y-%m-%d")


def log_bug(error: BaseException) -> Path | None:
    """Write the traceback of an unexpected error under GEN_HOME/logs; None when that is not possible
    either."""
    path = home() / "logs" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return None
    return path


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row: a picture, or a cloud of points, that was made."""

    id: str
    created: float  # seconds since 1970
    model: str
    weights: str
    fingerprint: str
    seed: int
    prompt: str
    path: Path  # absolute; the file may have been moved away since
    width: int
    height: int
    seconds: float
    peak_bytes: int
    toy: bool
    recipe: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)  # kind -> name, beside `path`; empty: it alone

    @property
    def paths(self) -> dict[str, Path]:
        """All files, by kind."""
        if not self.files:
            return {self.path.suffix.lower().removeprefix("."): self.path}
        return {kind: self.path.with_name(name) for kind, name in self.files.items()}

    @property
    def request(self) -> dict[str, Any]:
        """What Request.from_json takes to make the picture again."""
        return dict(self.recipe["request"])

    def to_json(self) -> dict[str, Any]:
        files = {kind: str(path) for kind, path in self.paths.items()}
        return {**vars(self), "path": str(self.path), "files": files}


def new_id() -> str:
    return secrets.token_hex(6)


def prepare() -> None:
    """Prove that rows can be written, before any work is done. Raises output_not_writable, disk_full,
    failed."""
    with _open() as db, _transaction(db):
        pass


@contextmanager
def adding() -> Iterator[Callable[[Entry], None]]:
    """`with adding() as add:` put the file in its place, then add(entry). When the body fails there is no
    row.

    The body holds SQLite's write lock, so processes that share a GEN_HOME pick file names one after the
    other.
    """
    with _open() as db, _transaction(db):

        def add(entry: Entry) -> None:
            row = vars(entry) | {
                "path": _stored(entry.path),
                "recipe": json.dumps(entry.recipe),
                "files": json.dumps(dict(entry.files)),
            }
            names = ", ".join(row)
            places = ", ".join(f":{name}" for name in row)
            db.execute(f"INSERT INTO results ({names}) VALUES ({places})", row)

        yield add


def holds(path: Path) -> bool:
    """Whether there is a row for this file."""
    return bool(_select("WHERE path = ?", (_stored(path),)))


def get(id: str) -> Entry:
    """The row of this id. Raises not_found."""
    rows = _select("WHERE id = ?", (id,))
    if not rows:
        raise GenError(f"No result '{id[:60]}' in the library.", "`gen history` lists them.", "not_found")
    return rows[0]


def search(text: str = "", model: str | None = None, limit: int = 50) -> list[Entry]:
    """Newest first: rows whose prompt holds every word of the text, or whose id or seed is the text."""
    where, values = ["1"], list[object]()
    words = text.split()
    if words:
        # % and _ are wildcards of LIKE, and people do write 100%.
        escaped = (word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for word in words)
        every = " AND ".join("prompt LIKE ? ESCAPE '\\'" for _ in words)
        where.append(f"(({every}) OR id = ? OR CAST(seed AS TEXT) = ?)")
        values += [*(f"%{word}%" for word in escaped), text.strip(), text.strip()]
    if model is not None:
        where.append("model = ?")
        values.append(model)
    return _select(f"WHERE {' AND '.join(where)} ORDER BY created DESC, rowid DESC LIMIT ?", (*values, limit))


def delete(id: str) -> None:
    """Remove the row and its files. A file that is already gone is no error. Raises not_found."""
    entry = get(id)
    with _open() as db, _transaction(db):
        db.execute("DELETE FROM results WHERE id = ?", (id,))
        for path in entry.paths.values():
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Typical:
    """Medians over past pictures."""

    loading_seconds: float  # of those that had to wait for it
    drawing_seconds: float
    peak_bytes: int


def typical(model: str, weights: str, inputs: Mapping[str, Any], native: int | None) -> Typical | None:
    """What the last results took of which the same size and steps were asked, or None without any. `native`:
    pixels per side of models that draw in one size; None for what is not measured in pixels."""
    width, height = inputs.get("width", native), inputs.get("height", native)
    rows = _select(
        "WHERE model = ? AND weights = ? "
        "AND IFNULL(json_extract(recipe, '$.request.inputs.width'), width) = IFNULL(?, width) "
        "AND IFNULL(json_extract(recipe, '$.request.inputs.height'), height) = IFNULL(?, height) "
        "AND json_extract(recipe, '$.request.inputs.points') IS ? "
        "AND json_extract(recipe, '$.request.inputs.hires') IS ? "
        "AND json_extract(recipe, '$.request.inputs.outpaint') IS ? "
        "AND json_extract(recipe, '$.request.inputs.steps') = ? ORDER BY created DESC LIMIT 9",
        (model, weights, width, height, *map(inputs.get, ("points", "hires", "outpaint")), inputs["steps"]),
    )
    if not rows:
        return None
    import statistics  # slow to import, and only estimates need it

    loading = [row.recipe["seconds"]["loading"] for row in rows]
    return Typical(
        loading_seconds=statistics.median([seconds for seconds in loading if seconds] or [0.0]),
        drawing_seconds=statistics.median(
            row.seconds - waited for row, waited in zip(rows, loading, strict=True)
        ),
        peak_bytes=int(statistics.median(row.peak_bytes for row in rows)),
    )


def _select(clause: str, values: tuple[object, ...]) -> list[Entry]:
    if not _path().exists():
        return []  # looking creates nothing
    with _open() as db, _translated():
        rows = db.execute(f"SELECT * FROM results {clause}", values).fetchall()
    return [_entry(row) for row in rows]


def _entry(row: sqlite3.Row) -> Entry:
    fields = dict(row)
    return Entry(
        **{
            **fields,
            "path": home() / fields["path"],
            "toy": bool(row["toy"]),
            "recipe": json.loads(row["recipe"]),
            "files": json.loads(row["files"]),
        }
    )


def _stored(path: Path) -> str:
    """Relative to GEN_HOME when inside, so that the folder as a whole may be moved."""
    return str(path.relative_to(home()) if path.is_relative_to(home()) else path)


def _path() -> Path:
    return home() / "library.sqlite3"


@contextmanager
def _open() -> Iterator[sqlite3.Connection]:
    """A fresh connection: they cost a fraction of a millisecond and may not be shared between threads."""
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, home()) from error
    with _translated():
        # isolation_level None: transactions are ours to begin, Python starts none behind our back.
        db = sqlite3.connect(_path(), timeout=30, isolation_level=None)
    try:
        with _translated():
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")  # readers do not wait for the writer
            migrate(db)
        yield db
    finally:
        db.close()


def migrate(db: sqlite3.Connection, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    """Bring the file to the newest form. A file from a newer program is refused, not guessed at."""
    if _version(db) == len(migrations):
        return
    with _transaction(db):
        db.execute(
            "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, applied REAL NOT NULL)"
        )
        done = _version(db)  # again: another process may have migrated while we waited
        if done > len(migrations):
            raise GenError(
                f"The library {_path()} was written by a newer gen-studio (form {done}; this one knows "
                f"{len(migrations)}).",
                "Update gen-studio, or set GEN_HOME to another folder.",
                "failed",
            )
        for number, script in enumerate(migrations[done:], done + 1):
            db.execute(script)
            db.execute("INSERT INTO migrations VALUES (?, ?)", (number, time.time()))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the body or nothing of it, also on Ctrl-C."""
    with _translated():
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _version(db: sqlite3.Connection) -> int:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone() is None:
        return 0
    return int(db.execute("SELECT COALESCE(MAX(number), 0) FROM migrations").fetchone()[0])


# What SQLite says, in order of asking -> how we say it.
_SQLITE_ERRORS: tuple[tuple[str, Callable[[], GenError]], ...] = (
    (
        "disk is full",
        lambda: GenError(
            f"No space left for the library {_path()}.", "Free some space, or set GEN_HOME.", "disk_full"
        ),
    ),
    (
        "unable to open|readonly|attempt to write|disk I/O",
        lambda: GenError(
            f"The library {_path()} cannot be opened for writing.",
            "Check the folder's permissions, or set GEN_HOME to a folder that you may write to.",
            "output_not_writable",
        ),
    ),
    (
        "malformed|not a database",
        lambda: GenError(
            f"The library {_path()} is damaged.",
            "Move it away: a new one is made. The pictures keep their recipes inside.",
            "failed",
        ),
    ),
    (
        "locked",
        lambda: GenError(
            f"The library {_path()} has been in use by another program for 30 seconds.",
            "Try again, or end the other program.",
            "failed",
        ),
    ),
)


@contextmanager
def _translated() -> Iterator[None]:
    """Expected failures of SQLite, as GenError."""
    import re

    try:
        yield
    except sqlite3.DatabaseError as error:
        for words, make in _SQLITE_ERRORS:
            if re.search(words, str(error)):
                raise make() from error
        raise


def disk_error(error: OSError, place: Path) -> GenError:
    """The kind way to say that a file could not be written."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return GenError(
            f"No space left while writing to {place}; nothing half-written was kept.",
            "Free some space, or write elsewhere with --output.",
            "disk_full",
        )
    return GenError(
        f"Cannot write to {place}: {error.strerror or error}.",
        "Check that it is a folder you may write to, or choose another with --output.",
        "output_not_writable",
    )
