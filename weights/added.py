"""Weights of one's own, used where they lie: the table GEN_HOME/added.json, and the folder that each is
loaded from.

A row is a folder as diffusers writes it, or one .safetensors file that holds a transformer. No tensor is
copied: a folder is loaded as it is; a file becomes a link in a folder of GEN_HOME/assembled, with links to
the other parts of the pipeline, and a list by which its tensors are renamed, and joined ones cut into views,
while they are read. What was added is remembered with the size and time of its files, so that a file that
has changed since is told and not drawn with.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from weights import registry, store
from weights.store import CorruptWeights

TABLE = "added.json"
FORM = 1  # of the table, and of the folders that are put together
NETWORK = "diffusion_pytorch_model.safetensors"  # as pipelines.models.network reads it
NAMES = NETWORK + ".names.json"  # there too: name in the file -> names of the network
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Added:
    """One row of the table."""

    model: str  # name of a model of the catalog
    tag: str
    path: Path  # absolute: a folder, or a .safetensors file
    base: str  # key of the row of the registry that it is most like
    facts: Mapping[str, Any]  # fields of Checkpoint that differ from those of the base
    stamps: Mapping[str, list[int]]  # file, relative to a folder -> bytes, time of change in ns
    companion: str = ""  # key, or path of a folder, with the other parts; empty: they are the base's
    written: Mapping[str, str] = field(default_factory=dict)  # file of the pipeline -> text instead of it

    @property
    def key(self) -> str:
        return f"{self.model}-added-{self.tag}"

    @property
    def reference(self) -> str:
        return f"{self.model}:{self.tag}"

    @property
    def alone(self) -> bool:
        """Whether it is one file, to which the other parts are joined."""
        return self.path.suffix.lower() == ".safetensors"

    @property
    def checkpoint(self) -> registry.Checkpoint:
        """Its facts, in the form of the registry's."""
        return replace(
            registry.CHECKPOINTS[self.base],
            key=self.key,
            folder=str(self.path),
            repo_id="",
            recipe="",
            files=(),
            companions=(),
            family="",
            network="",
            config={},
            revision="",
            **self.facts,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


# ------------------------------------------------------------------------------------------------- the table

_read: tuple[tuple[Any, ...], dict[str, Added]] = ((), {})  # a state of the file, and what it held


def rows() -> dict[str, Added]:
    """All rows by key, in the order in which they were added. Raises CorruptWeights for a damaged table."""
    global _read
    path = store.home() / TABLE
    try:
        state = path.stat()
    except OSError:
        return {}
    seen = (str(path), state.st_mtime_ns, state.st_size, state.st_ino)
    if _read[0] != seen:
        _read = (seen, {one.key: one for one in _parsed(path)})
    return _read[1]


def _parsed(path: Path) -> Iterator[Added]:
    table = store._json(path)
    if table.get("form") != FORM:
        raise CorruptWeights(f"{path} was written by another gen-studio (form {table.get('form')!r})")
    try:
        for row in table["added"]:
            one = Added(**row | {"path": Path(row["path"])})
            if one.base in registry.CHECKPOINTS:  # else of a later version: nothing is known about it here
                yield one
    except (KeyError, TypeError, AttributeError):
        raise CorruptWeights(f"{path} is no table of added weights") from None


def row(key: str) -> Added:
    """KeyError for an unknown key."""
    return rows()[key]


def tags(model: str, published: Mapping[str, str]) -> dict[str, str]:
    """Tag -> key of a model's weights, best first: published ones, added ones, toys. Raises
    CorruptWeights."""
    own = {one.tag: one.key for one in rows().values() if one.model == model and one.tag not in published}
    toys = {tag: key for tag, key in published.items() if own and registry.CHECKPOINTS[key].is_toy}
    return {tag: key for tag, key in published.items() if tag not in toys} | own | toys


def put(new: Added) -> None:
    """Add a row. Raises ValueError when its tag is taken or no tag, OSError, CorruptWeights."""
    if not TAG.fullmatch(new.tag):
        raise ValueError(f"'{new.tag}' is no tag")
    with _changing() as table:
        if new.key in table:
            raise ValueError(f"{new.reference} is there already")
        table[new.key] = new


def forget(model: str, tag: str) -> Added:
    """Remove a row, and the links that were made for it; the files themselves stay. KeyError where there is
    none."""
    with _changing() as table:
        gone = table.pop(f"{model}-added-{tag}")
    shutil.rmtree(store.home() / "assembled" / gone.key, ignore_errors=True)
    return gone


@contextmanager
def _changing() -> Iterator[dict[str, Added]]:
    """The rows, to be changed by one process at a time; written when the body ends well."""
    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{TABLE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = dict(rows())
        yield table
        part = home / f".{TABLE}.{os.getpid()}"
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump({"form": FORM, "added": [one.to_json() for one in table.values()]}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            part.replace(home / TABLE)
        finally:
            part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- finding and joining


def stamps(path: Path) -> dict[str, list[int]]:
    """Size and time of a file, or of all files of a folder that say what is drawn. Raises OSError."""
    files = [path] if path.is_file() else [*store._files(path, ".safetensors"), *store._files(path, ".json")]
    found = {}
    for file in files:
        state = file.stat()
        name = file.name if file == path else file.relative_to(path).as_posix()
        found[name] = [state.st_size, state.st_mtime_ns]
    return found


def place(one: Added) -> Path | None:
    """The folder that it is loaded from, there or to be made by `prepare`; None when something has gone."""
    if lacking(one):
        return None
    return _assembled(one) if one.alone or one.written else one.path


def lacking(one: Added) -> list[str]:
    """The parts that are no longer on this machine."""
    if not (one.path.is_file() if one.alone else (one.path / "model_index.json").is_file()):
        return ["transformer"]
    found = parts(one)
    wanted = store.PARTS.get(one.checkpoint.pipeline, ()) if one.alone else ()
    return [name for name in wanted if name not in found and name not in ("transformer", "scheduler")]


def parts(one: Added) -> dict[str, Path]:
    """Part -> its folder, of those that are not in the file itself."""
    if not one.alone:
        return _parts_in(one.path)
    if not one.companion:
        return parts_of_base(registry.CHECKPOINTS[one.base])
    return companion_parts(one.companion)


def parts_of_base(base: registry.Checkpoint) -> dict[str, Path]:
    """Part -> its folder, of those that a file without a companion is joined with."""
    found = _shared(store.sources(base)) if base.pipeline in store.PARTS else {}
    if "scheduler" in found and not base.walk and walk_of(found["scheduler"]):
        del found["scheduler"]  # of a distilled companion; the published solver is written instead
    return found


def walk_of(scheduler: Path) -> str:
    """The walk that a scheduler's folder means: "lcm", "one-step", or "" for any of many steps."""
    path = scheduler / store.CONFIGS["scheduler"]
    stored = store._json(path) if path.is_file() else {}
    if stored.get("_class_name") == "LCMScheduler":
        return "lcm"
    return "one-step" if stored.get("_class_name") == "DDPMScheduler" and "timestep" in stored else ""


def companion_parts(companion: str) -> dict[str, Path]:
    """Part -> its folder, of a checkpoint of the registry, one that was added, or a folder."""
    if companion in registry.CHECKPOINTS:
        of = registry.CHECKPOINTS[companion]
        return _shared(store.sources(of)) if of.pipeline in store.PARTS else {}
    if companion in rows():
        return _shared(parts(row(companion)))
    return {} if os.sep not in companion else _shared(_parts_in(Path(companion)))


def _shared(found: Mapping[str, Path]) -> dict[str, Path]:
    return {name: folder for name, folder in found.items() if name != "transformer"}


def _parts_in(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name, mark in store.MARKS.items() if (folder / name / mark).is_file()} | {
        name: folder / name for name in store.MORE if (folder / name).is_dir()
    }


def changed(one: Added) -> str:
    """What has happened to its files since it was added, in words; empty for nothing."""
    try:
        now = stamps(one.path)
    except OSError as error:
        return f"{one.path} cannot be read ({error.strerror})"
    for name in sorted(one.stamps.keys() | now.keys()):
        before, after = one.stamps.get(name), now.get(name)
        file = one.path if one.alone else one.path / name
        if before is None or after is None:
            return f"{file} {'is new' if before is None else 'has gone'} since {one.reference} was added"
        if before != after:
            size = f" ({before[0]:,} bytes then, {after[0]:,} now)" if before[0] != after[0] else ""
            return f"{file} has changed since it was added as {one.reference}{size}"
    return ""


def prepare(one: Added) -> Path:
    """The folder that `place` names, put together if it was not yet. Raises CorruptWeights, OSError."""
    if words := changed(one):
        raise CorruptWeights(words)
    folder = place(one)
    assert folder is not None, f"{one.key} is not here: ask `place` first"
    return folder if folder == one.path else store.assemble(folder, plan(one))


def _assembled(one: Added) -> Path:
    """Where its links are. The name follows from what they lead to: a folder is never changed."""
    import hashlib

    found = sorted((name, str(folder)) for name, folder in parts(one).items())
    digest = hashlib.sha256(repr((FORM, json.dumps(one.to_json(), sort_keys=True), found)).encode())
    return store.home() / "assembled" / one.key / digest.hexdigest()[:12]


def plan(one: Added) -> dict[str, Path | str]:
    """File of the folder -> the file it is a link to, or its text."""
    if not one.alone:
        plan: dict[str, Path | str] = {
            path.relative_to(one.path).as_posix(): path
            for path in store._files(one.path)
            if path.name != store.SUMS  # sums of texts that are replaced
        }
        return plan | dict(one.written)
    written: dict[str, Path | str] = {**one.written, f"transformer/{NETWORK}": one.path}
    return store.joined(one.checkpoint, parts(one), written)
