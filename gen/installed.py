"""`gen verify` and `gen rm`: weights on this machine are proved whole, mended, and removed.

Published weights may share files: a text encoder of 19 GB serves several, and the Hugging Face cache keeps
the same bytes of one repository once. So a check names files by the repository that they came from, and a
removal asks first who else is read from a file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen import pull
from gen.errors import GenError
from weights import added, hub, registry, store

Report = Callable[[pull.State], None]


# --- checking ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what was published."""

    path: Path
    why: str
    repo_id: str = ""  # and `name` in it, where it can be pulled again
    name: str = ""

    def to_json(self) -> dict[str, str]:
        return {"path": str(self.path), "why": self.why, "repository": self.repo_id, "name": self.name}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found about weights."""

    name: str
    files: int  # compared with a sum
    bytes: int
    unsummed: int  # files for which there is no sum: their structure was checked
    damages: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "files": self.files,
            "bytes": self.bytes,
            "unsummed": self.unsummed,
            "damages": [one.to_json() for one in self.damages],
        }


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A file of installed weights and what is known about it."""

    path: Path
    blob: str = ""  # sum by which the cache names it
    sha256: str = ""
    size: int | None = None
    repo_id: str = ""
    name: str = ""

    @property
    def summed(self) -> bool:
        return bool(self.blob or self.sha256)


def names() -> list[str]:
    """All weights of which something is on this machine."""
    tagged = [f"{row.name}:{tag}" for row, tag, key in pull.tagged() if store.find(key) is not None]
    return tagged + [key for key in pull.untagged() if pull.whole(key) is not None]


def verify(name: str, report: Report = lambda state: None) -> Check:
    """Read every byte of installed weights and compare with the sums that were recorded, that name the files
    of the cache, or that stand in SHA256SUMS; where there are none, check the structure alone.

    Raises GenError: unknown_model, not_installed.
    """
    key, name = pull.find(name)
    try:
        held = _held(key)
    except store.CorruptWeights as error:
        return Check(name=name, files=0, bytes=0, unsummed=0, damages=(_damage(error),))
    if not held:
        raise GenError(f"{name} is not on this machine.", f"Get it: {pull.way(key)}", "not_installed")
    facts = store.checkpoint(key)
    total, done, damages = sum(_bytes(one.path) for one in held), 0, []
    for one in held:
        tell = pull.counter(report, one.name or one.path.name, done, total)
        if why := _compare(one, tell):
            damages.append(Damage(path=one.path, why=why, repo_id=one.repo_id, name=one.name))
        done += _bytes(one.path)
    if not damages and facts.pipeline and not facts.files:  # whole files, and is it all of them?
        if store.find(key) is None:
            lacking = ", ".join(store.lacking(key))
            raise GenError(
                f"{name} is on this machine without {lacking}; what is there is whole.",
                f"Get the rest: {pull.way(key)}",
                "not_installed",
            )
        # A home that cannot be written to is no fault of the weights.
        with contextlib.suppress(OSError):
            try:
                store.verify(store.prepare(key), checksums=False)
            except store.CorruptWeights as error:
                damages.append(_damage(error))
    summed = [one for one in held if one.summed]
    return Check(
        name=name,
        files=len(summed),
        bytes=sum(_bytes(one.path) for one in summed),
        unsummed=len(held) - len(summed),
        damages=tuple(damages),
    )


def _damage(error: store.CorruptWeights) -> Damage:
    path, _, why = str(error).partition(": ")
    return Damage(path=Path(path), why=why or "damaged")


def _compare(one: _Held, tell: Callable[[int], None]) -> str:
    """What is wrong with a file, in words; empty when nothing is."""
    try:
        size = one.path.stat().st_size
        if one.size is not None and size != one.size:
            return f"{size:,} bytes long, published with {one.size:,}"
        if not one.summed:
            if one.path.suffix == ".safetensors":
                store.read_header(one.path)
            return ""
        name, sha256 = hub.sums(one.path, hub.File(one.name, size, one.blob), tell)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except store.CorruptWeights as error:
        return str(error).removeprefix(f"{one.path}: ")
    if (one.sha256 and sha256 != one.sha256) or (one.blob and name != one.blob):
        return "its SHA-256 is not the published one"
    return ""


def _held(key: str) -> list[_Held]:
    """Every file of installed weights, those included that should be there and are not. Raises
    CorruptWeights."""
    facts, cache = store.checkpoint(key), store.hub_cache()
    own = store.snapshot(facts.repo_id) if facts.repo_id else None
    paths = [*_read_from(key)]
    found: dict[Path, _Held] = {}
    folders = {} if own is None else {own: own}  # folder of the cache that is read -> its snapshot
    for path in paths:
        if path.is_relative_to(cache):
            snapshot = cache.joinpath(*path.relative_to(cache).parts[:3])  # models--a--b, snapshots, commit
            folders[own if snapshot == own else path.parent] = snapshot
        elif path.name != store.SUMS:
            found[path] = _Held(path=path, sha256=_listed(path))
    for folder, snapshot in folders.items():
        # Links that lead nowhere count too, and what the record promises.
        there = {one for one in folder.rglob("*") if not one.is_dir()}
        there |= {one for one in map(snapshot.joinpath, _recorded(snapshot)) if one.is_relative_to(folder)}
        for path in sorted(there):
            if not (snapshot == own and facts.files) or path.relative_to(own).as_posix() in facts.files:
                found[path] = _in_cache(path, snapshot)
    if facts.folder and (place := store.find(key)) is not None and place.is_dir():
        for name, sha256 in store.sums(place).items():
            found.setdefault(place / name, _Held(path=place / name, sha256=sha256))
    return [*found.values()]


def _read_from(key: str) -> list[Path]:
    """The files that weights are read from, links not followed, also those that lead nowhere. Nothing is
    opened: a damaged file must not hide others."""
    facts = store.checkpoint(key)
    if key not in registry.CHECKPOINTS:
        one = added.row(key)
        return [*([one.path] if one.alone else []), *_inside(added.parts(one).values())]
    if facts.folder:
        place = store.find(key)
        return [*_inside([place] if place else [])]
    own = store.snapshot(facts.repo_id)
    if facts.files:
        found = [own / name for name in facts.files] if own else []
        return [path for path in found if path.is_symlink() or path.exists()]
    parts = store.sources(facts) if facts.pipeline in store.PARTS else {}
    if own is None and "transformer" not in parts:  # companions may be here for others
        return []
    return [*_inside([*([own] if own else []), *parts.values()])]


def _inside(folders: Iterable[Path]) -> dict[Path, None]:
    """All files below folders."""
    return dict.fromkeys(path for one in folders for path in sorted(one.rglob("*")) if not path.is_dir())


def _in_cache(path: Path, snapshot: Path) -> _Held:
    """A file of the cache: its link leads to a name that is its sum, and there may be a record of ours."""
    name = path.relative_to(snapshot).as_posix()
    entry = _recorded(snapshot).get(name, {})
    goal = path.parent / path.readlink() if path.is_symlink() else path
    return _Held(
        path=path,
        blob=str(entry.get("blob") or (goal.name if hub.BLOB.fullmatch(goal.name) else "")),
        sha256=str(entry.get("sha256", "")),
        size=int(entry["size"]) if entry else None,
        repo_id=pull.origin(snapshot),
        name=name,
    )


def _recorded(snapshot: Path) -> Mapping[str, Any]:
    """What the record says about the files of a snapshot."""
    record = store.record(pull.origin(snapshot))
    return record.get("files", {}) if record.get("revision") == snapshot.name else {}


def _listed(path: Path) -> str:
    """The sum of a file in the SHA256SUMS of its folder, or of the one above; empty without one."""
    for folder in path.parents[:2]:
        name = path.relative_to(folder).as_posix()
        if name in (sums := store.sums(folder)):
            return sums[name]
    return ""


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def repair(
    check: Check, report: Report = lambda state: None, say: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Pull the damaged files of a check again, these alone, at their own revision, and return them.

    Raises GenError: corrupt_weights where one came from no hub, network, no_access, disk_full.
    """
    if stuck := [one for one in check.damages if not one.name]:
        raise GenError(
            f"{stuck[0].path}: {stuck[0].why}; it came from no hub, so that nothing can be pulled.",
            "Restore the file from where it came: for embedded weights, install gen-studio again.",
            "corrupt_weights",
        )
    mended = []
    for snapshot in dict.fromkeys(_snapshot(one.path) for one in check.damages):
        damages = {one.name: one for one in check.damages if _snapshot(one.path) == snapshot}
        repo_id, sums, done = pull.origin(snapshot), {}, 0
        with pull.told(repo_id), hub.alone(repo_id, say):
            listing = hub.look(repo_id, snapshot.name, say)
            files = [one for one in listing.files if one.path in damages]
            total = sum(one.size for one in files)
            for file in files:
                tell = pull.counter(report, file.path, done, total)
                others = hub.forget(repo_id, file)
                sums[file.path] = hub.fetch(listing, file, tell, say)
                hub.renew(repo_id, file, others)
                done += file.size
            hub.place(listing, files)
            if store.record(repo_id).get("revision") == listing.revision:
                hub.remember(listing, files, sums)
        mended += [snapshot / one.path for one in files]
    return mended


def _snapshot(path: Path) -> Path:
    cache = store.hub_cache()
    return cache.joinpath(*path.relative_to(cache).parts[:3])


# --- removing ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What removing weights would do."""

    name: str
    key: str
    links: tuple[Path, ...]  # names in snapshots that go
    blobs: tuple[Path, ...]  # files of the cache that nothing names then
    freed: int  # bytes
    kept: Mapping[str, tuple[str, ...]]  # repository/part -> installed weights that are read from it too

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "files": [str(one) for one in self.links],
            "freed_bytes": self.freed,
            "kept": {place: list(users) for place, users in self.kept.items()},
        }


def removal(name: str) -> Removal:
    """What removing these weights would free, and what stays because others are read from it.

    Raises GenError: unknown_model, bad_input (embedded weights, or a folder of one's own), not_installed.
    """
    key, name = pull.find(name)
    facts, cache = store.checkpoint(key), store.hub_cache()
    mine = [path for path in _read_from(key) if not path.is_relative_to(cache)]
    if not facts.repo_id or (mine and not facts.files):
        raise _not_ours(name, key, facts)
    own = store.snapshot(facts.repo_id)
    paths = [path for path in _read_from(key) if path.is_relative_to(cache)]
    users = _users(key)
    links = tuple(path for path in paths if path not in users)
    begun = _begun(facts, own)
    if not paths and not begun:
        raise GenError(f"{name} is not on this machine.", "`gen list` marks what is.", "not_installed")
    kept: dict[str, set[str]] = {}
    for path in paths:
        if path in users:
            part = path.relative_to(_snapshot(path)).parts[0]
            kept.setdefault(f"{pull.origin(path)}/{part}", set()).update(users[path])
    blobs = tuple(dict.fromkeys((*_unnamed(links), *begun)))
    gone = [*blobs, *(one for one in links if not one.is_symlink())]
    return Removal(
        name=name,
        key=key,
        links=links,
        blobs=blobs,
        freed=sum(one.stat().st_size for one in gone if one.stat().st_nlink == 1),  # else others link to it
        kept={place: tuple(sorted(names)) for place, names in kept.items()},
    )


def _users(key: str) -> dict[Path, set[str]]:
    """File of the cache -> the other installed weights that are read from it."""
    users: dict[Path, set[str]] = {}
    known = {one: f"{row.name}:{tag}" for row, tag, one in pull.tagged()} | {
        one: one for one in pull.untagged()
    }
    for other, name in known.items():
        for path in _read_from(other) if other != key else ():
            users.setdefault(path, set()).add(name)
    return users


def _begun(facts: registry.Checkpoint, own: Path | None) -> tuple[Path, ...]:
    """Files in the cache that a pull of these weights brought before it was cut off."""
    blobs = store.repository(facts.repo_id) / "blobs"
    named = {one.resolve() for one in own.rglob("*") if one.is_symlink()} if own else set()
    blamed = [
        str(one) for one in store.record(facts.repo_id).get("begun", ()) if hub.BLOB.fullmatch(str(one))
    ]
    places = [blobs / f"{name}{end}" for name in blamed for end in ("", ".incomplete")]
    return tuple(one for one in dict.fromkeys(places) if one.is_file() and one.resolve() not in named)


def _unnamed(links: tuple[Path, ...]) -> list[Path]:
    """The blobs that no snapshot names any more when these links have gone."""
    going, blobs = set(links), {one.resolve() for one in links if one.is_symlink() and one.exists()}
    for snapshots in {_snapshot(one).parent for one in links}:
        for path in snapshots.rglob("*"):
            if path.is_symlink() and path not in going:
                blobs.discard(path.resolve())
    return sorted(blobs)


def _not_ours(name: str, key: str, facts: registry.Checkpoint) -> GenError:
    folder = store.find(key)
    if facts.is_toy:
        message, hint = f"{name} is embedded, a part of the program.", "It is small: leave it where it is."
    elif folder is None:
        return GenError(f"{name} is not on this machine.", "`gen list` marks what is.", "not_installed")
    else:
        message = f"{name} lies in a folder of your own, {folder}, and is not removed."
        hint = "Remove the folder yourself, if nothing else needs it."
    return GenError(message, hint, "bad_input")


def remove(work: Removal, say: Callable[[str], None] = lambda text: None) -> None:
    """Carry out a removal. Raises GenError: output_not_writable."""
    repos = dict.fromkeys(pull.origin(one) for one in (*work.links, *work.blobs))
    with contextlib.ExitStack() as stack:
        for repo_id in sorted(repos):
            stack.enter_context(pull.told(repo_id))
            stack.enter_context(hub.alone(repo_id, say))
        if (assembled := store.home() / "assembled" / work.key).exists():
            shutil.rmtree(assembled)
        # Configurations go first: what is half gone must not be taken for installed.
        for link in sorted(work.links, key=lambda one: one.suffix != ".json"):
            link.unlink(missing_ok=True)
        for path in work.blobs:
            path.unlink(missing_ok=True)
        for repo_id in repos:
            hub.tidy(repo_id)
