"""`gen pull`: published weights come to this machine.

A plan first: which files of which repositories, what of them is here already, what is shared with other
weights, whether the disk has room. Then the files, each proved by its sum. What was taken is recorded per
repository in GEN_HOME/pulled, and its revision is pinned by that: a later pull completes the same revision
unless another is asked for. How weights are checked and removed is in gen.installed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gen import catalog
from gen.errors import GenError, did_you_mean
from weights import hub, registry, store

SPARE = 32 * 2**20  # bytes of disk that are left alone
TEXTS = (".json", ".txt", ".model")  # configurations and vocabularies
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Say = Callable[[str], None]

# Kind of hub.HubError -> the code, and what to do now.
KINDS: Mapping[str, tuple[str, str]] = {
    "offline": (
        "network",
        "Unset the variable to pull weights. Drawing with installed ones needs no network.",
    ),
    "unreachable": ("network", "Check the connection and HF_ENDPOINT, and pull again: what came is kept."),
    "busy": ("network", "Wait some minutes, or set HF_TOKEN, and pull again: what came is kept."),
    "server": ("network", "That is the hub's own trouble. Pull again later: what came is kept."),
    "gated": (
        "no_access",
        "Log in at {page} and accept them; then set HF_TOKEN to a token of your account "
        "({endpoint}/settings/tokens), or run: hf auth login",
    ),
    "refused": (
        "no_access",
        "It is private or gated, or not there: the hub does not tell strangers which. Look at {page}, and "
        "set HF_TOKEN to a token that may read it ({endpoint}/settings/tokens).",
    ),
    "no_repository": (
        "unknown_model",
        "It may have been renamed, withdrawn or made private: look at {page}, and at HF_ENDPOINT.",
    ),
    "no_revision": ("bad_input", "{page}/commits/main lists them. Without --revision, main is taken."),
    "no_file": ("unknown_model", "The repository has changed: look at {page}/tree/main."),
    "corrupt": ("corrupt_weights", "They were removed. Does something change what you load? Pull again."),
    "disk_full": (
        "disk_full",
        "Free some space, or move HF_HOME to a larger disk, and pull again: what came is kept.",
    ),
    "unwritable": ("output_not_writable", "See who may write there, or set HF_HOME to a folder of yours."),
}


# --- the plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Take:
    """What is taken of one repository."""

    listing: hub.Listing
    files: tuple[hub.File, ...]
    why: str  # "weights", or the parts that are missing there


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What pulling weights would do."""

    name: str  # as people type it
    key: str
    licence: str
    takes: tuple[Take, ...] = ()
    shared: Mapping[str, str] = field(
        default_factory=dict
    )  # part -> repository or folder that has it already
    free: int = 0  # bytes of disk below the cache
    folder: Path | None = None  # set when all is here already
    then: str = ""  # what is left to do when all has come

    def _each(self) -> Iterator[tuple[str, hub.File]]:
        """Every file once, also when two names have the same bytes."""
        seen = set()
        for take in self.takes:
            for file in take.files:
                if (take.listing.repo_id, file.blob) not in seen:
                    seen.add((take.listing.repo_id, file.blob))
                    yield take.listing.repo_id, file

    @property
    def count(self) -> int:
        return sum(len(take.files) for take in self.takes)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for _, file in self._each())

    @property
    def missing(self) -> int:
        """Bytes that must still come."""
        total, coming = 0, set()
        for repo, file in self._each():
            if not hub.here(repo, file) and not hub.twin(repo, file) and file.blob not in coming:
                total += file.size - hub.begun(repo, file)
                coming.add(file.blob)
        return total

    @property
    def begun(self) -> int:
        """Bytes that came in an attempt that was cut off."""
        return sum(hub.begun(repo, file) for repo, file in self._each() if not hub.here(repo, file))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "licence": self.licence,
            "installed": str(self.folder) if self.folder else None,
            "bytes": self.bytes,
            "missing_bytes": self.missing,
            "begun_bytes": self.begun,
            "free_bytes": self.free,
            "shared": dict(self.shared),
            "then": self.then,
            "repositories": [
                {
                    "repository": take.listing.repo_id,
                    "asked": take.listing.asked,
                    "revision": take.listing.revision,
                    "licence": take.listing.licence,
                    "gated": take.listing.gated,
                    "why": take.why,
                    "files": [
                        {
                            "path": file.path,
                            "bytes": file.size,
                            "sum": file.blob,
                            "here": hub.here(take.listing.repo_id, file),
                        }
                        for file in take.files
                    ],
                }
                for take in self.takes
            ],
        }


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a pull or a check is."""

    file: str
    done: int  # bytes
    total: int  # bytes


def find(name: str) -> tuple[str, str]:
    """What people type -> the key of the weights, and their name. `model` alone means its best published
    ones; keys of the registry that no model has by a tag (adapters, authors' own files) are names too.

    Raises unknown_model.
    """
    if name in registry.CHECKPOINTS:
        return name, next((f"{row.name}:{tag}" for row, tag, key in tagged() if key == name), name)
    if name.partition(":")[0] not in catalog.MODELS:
        names = [*catalog.MODELS, *(f"{row.name}:{tag}" for row, tag, _ in tagged()), *untagged()]
        others = f"Beside the models of `gen list` there are {', '.join(untagged())}."
        hint = did_you_mean(name[:60], names) or others
        raise GenError(f"There are no weights '{name[:60]}'.", hint, "unknown_model")
    row, tag = catalog.find(name)
    if tag is None:
        tags = [*row.weights]
        tag = next((one for one in tags if row.checkpoint(one).repo_id), tags[0])
    return row.weights[tag], f"{row.name}:{tag}"


def untagged() -> list[str]:
    """Keys of published weights that no model has by a tag."""
    keys = {key for _, _, key in tagged()}
    return [key for key, facts in registry.CHECKPOINTS.items() if facts.repo_id and key not in keys]


def tagged() -> list[tuple[catalog.Model, str, str]]:
    """Model, tag and key of all weights that models draw with."""
    return [(row, tag, key) for row in catalog.MODELS.values() for tag, key in row.weights.items()]


def plan(
    name: str, *, revision: str | None = None, update: bool = False, say: Say = lambda text: None
) -> Plan:
    """What pulling these weights would do. Asks the hub, unless all is here; fetches nothing.

    `revision`: branch, tag or commit of the weights' own repository; None: the one recorded, else the
    registry's, else main. `update`: main as it is now. Raises GenError: unknown_model, bad_input, network,
    no_access, not_installed (no safetensors there).
    """
    key, name = find(name)
    facts = store.checkpoint(key)
    if not facts.repo_id:
        raise _not_published(name, facts)
    with told(facts.repo_id):
        if revision is None and not update and (folder := whole(key)) is not None:
            return Plan(
                name=name, key=key, licence=facts.licence, folder=folder, free=_free(), then=_then(facts)
            )
    if revision is None:
        pinned = str(store.record(facts.repo_id).get("revision") or "")
        revision = "main" if update else pinned or facts.revision or "main"
    listing = _look(facts.repo_id, revision, say)
    files, wanted = _own_files(facts, listing)
    shared = _shared(facts, _beside(facts) if facts.files else wanted)
    if facts.pipeline in store.PARTS and not facts.files:
        own = [part for part in wanted if _has(listing, part)]
        chosen = [one for part in own if part not in shared for one in choose(listing, part)]
        files = chosen + files if chosen else []
        wanted = [part for part in wanted if part not in own]
    takes = [Take(listing=listing, files=_and_earlier(listing, files), why="weights")] if files else []
    takes += _companions(facts, [part for part in wanted if part not in shared], say)
    return Plan(
        name=name,
        key=key,
        licence=facts.licence,
        takes=tuple(takes),
        shared=shared,
        free=_free(),
        then=_then(facts),
    )


def _own_files(facts: registry.Checkpoint, listing: hub.Listing) -> tuple[list[hub.File], list[str]]:
    """What is taken of the weights' own repository in any case, and the parts that they need beside it."""
    if facts.files:
        known = {one.path: one for one in listing.files}
        if gone := [one for one in facts.files if one not in known]:
            error = hub.HubError("no_file", f"{facts.repo_id} has no {', '.join(gone)}")
            raise explained(error, facts.repo_id)
        return [known[one] for one in facts.files], _beside(facts)
    if facts.pipeline not in store.PARTS:
        return choose(listing, ""), []
    files = [one for one in listing.files if one.path == "model_index.json"]
    files += [one for part in store.MORE if _names(listing, part) for one in choose(listing, part)]
    return files, [*store.PARTS[facts.pipeline]]


def _and_earlier(listing: hub.Listing, files: list[hub.File]) -> tuple[hub.File, ...]:
    """With what other weights took of this repository: at another revision they must find it too."""
    record = store.record(listing.repo_id)
    before = record.get("files", {}) if record.get("revision") != listing.revision else {}
    own = {one.path for one in files}
    return (*files, *(one for one in listing.files if one.path in before and one.path not in own))


def _shared(facts: registry.Checkpoint, parts: list[str]) -> dict[str, str]:
    """Part -> where it is already, for those that companions or a folder of one's own hold: the registry says
    that they are the same, so that they are stored once."""
    own = store.snapshot(facts.repo_id)
    return {
        part: origin(folder)
        for part, folder in store.sound_parts(facts).items()
        if part in parts and part != "scheduler" and folder.parent != own
    }


def _companions(facts: registry.Checkpoint, wanted: list[str], say: Say) -> list[Take]:
    """The missing parts from the first companions that have them; a schedule comes along where it may."""
    takes = []
    for repo in facts.companions:
        if repo == facts.repo_id or not set(wanted) - {"scheduler"}:
            continue
        listing = _look(repo, str(store.record(repo).get("revision") or "main"), say)
        found = [
            part
            for part in wanted
            if _has(listing, part)
            and part != "transformer"
            and not (part == "scheduler" and facts.walk)  # it was distilled for another
        ]
        if found:
            files = [one for part in found for one in choose(listing, part)]
            takes.append(Take(listing=listing, files=_and_earlier(listing, files), why=", ".join(found)))
        wanted = [part for part in wanted if part not in found]
    if left := [part for part in wanted if part != "scheduler"]:
        where = ", ".join(dict.fromkeys((facts.repo_id, *facts.companions)))
        raise explained(hub.HubError("no_file", f"{where} has no {', '.join(left)}"), facts.repo_id)
    return takes


def _beside(facts: registry.Checkpoint) -> list[str]:
    """The parts that a checkpoint in the authors' layout needs beside what it is converted to, where a model
    draws with it."""
    if facts.pipeline not in store.PARTS or facts.key not in {key for _, _, key in tagged()}:
        return []
    return [part for part in store.PARTS[facts.pipeline] if part not in ("transformer", "scheduler")]


def _names(listing: hub.Listing, part: str) -> list[hub.File]:
    """The files of one folder of a repository, or without `part` of its top."""
    return [one for one in listing.files if one.path.rpartition("/")[0] == part]


def _has(listing: hub.Listing, part: str) -> bool:
    return any(one.path == f"{part}/{store.MARKS[part]}" for one in listing.files)


def choose(listing: hub.Listing, part: str) -> list[hub.File]:
    """What is needed of one folder: configurations, vocabularies, and the network once, in safetensors.

    Other precisions (model.fp16.safetensors) and pickles of the same numbers are left. Raises not_installed
    where there are only these.
    """
    found = _names(listing, part)
    names = {one.path.rpartition("/")[2]: one for one in found}
    texts = [one for name, one in names.items() if name.endswith(TEXTS) and not name.endswith(".index.json")]
    weights = {name: one for name, one in names.items() if name.endswith(".safetensors")}
    plain = {name: one for name, one in weights.items() if "." not in name.removesuffix(".safetensors")}
    index = f"{_stem(plain)}.safetensors.index.json"
    if index in names:  # in pieces; a single file beside them holds the same
        plain = {name: one for name, one in plain.items() if "-of-" in name} | {index: names[index]}
    if not plain and (weights or any(name.endswith(PICKLES) for name in names)):
        held = ", ".join(sorted(name for name in names if name.endswith((*PICKLES, ".safetensors"))))
        place = "/".join(filter(None, (listing.repo_id, part)))
        raise GenError(
            f"{place} has its numbers only as {held}. Pickles may run programs and are not read, nor are "
            "variants of other precision.",
            "Files in the authors' own layout can be converted to safetensors: gen convert FILE --as "
            f"{_family(listing.repo_id)}",
            "not_installed",
        )
    return [*texts, *plain.values()]


def _stem(names: Mapping[str, Any]) -> str:
    """`model` of model-00001-of-00002.safetensors and model.safetensors."""
    first = min(names, default="")
    return first.removesuffix(".safetensors").partition("-0")[0]


def _family(repo_id: str) -> str:
    rows = [row for row in registry.CHECKPOINTS.values() if row.repo_id == repo_id]
    if any(row.pipeline == "DiTPipeline" for row in rows):
        return "dit"
    return "pixart-alpha" if any(row.pipeline == "PixArtAlphaPipeline" for row in rows) else "pixart-sigma"


def _look(repo_id: str, revision: str, say: Say) -> hub.Listing:
    with told(repo_id):
        return hub.look(repo_id, revision, say)


def origin(path: Path) -> str:
    """The repository of a file or folder of the cache; of any other, its own path."""
    cache = store.hub_cache()
    if path.is_relative_to(cache):
        return path.relative_to(cache).parts[0].removeprefix("models--").replace("--", "/", 1)
    return str(path)


def _free() -> int:
    place = store.hub_cache()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _then(facts: registry.Checkpoint) -> str:
    """What is left to do with files in the authors' layout."""
    if not facts.family:
        return ""
    drawn = facts.key in {key for _, _, key in tagged()} or facts.key == registry.HED.key
    output = f" --output $GEN_WEIGHTS_DIR/{facts.key}" if drawn else ""
    return f"gen convert FILE --as {facts.family}{output}"


def whole(key: str) -> Path | None:
    """The folder of weights that are here with all their parts, by structure and not by their sums; of files
    in the authors' layout, the folder that holds them."""
    facts = store.checkpoint(key)
    try:
        if facts.files:
            folder = store.snapshot(facts.repo_id)
            there = folder is not None and all((folder / one).is_file() for one in facts.files)
            parts = store.sound_parts(facts) if _beside(facts) else {}
            return folder if there and all(part in parts for part in _beside(facts)) else None
        if store.find(key) is None:
            return None
        folder = store.prepare(key)
        if facts.pipeline in store.PARTS:
            store.verify(folder, checksums=False)
        elif facts.adapts:
            store.verify_adapter(folder)
        return folder
    except store.CorruptWeights:
        return None


def _not_published(name: str, facts: registry.Checkpoint) -> GenError:
    if facts.is_toy:
        hint = f"They come with the program; to make others: gen train {facts.recipe}"
        return GenError(f"{name} is embedded: there is nothing to pull.", hint, "bad_input")
    return GenError(f"{name} is published on no hub.", f"Your own: {catalog._way(facts)}", "bad_input")


# --- pulling -----------------------------------------------------------------------------------------


def pull(
    work: Plan, report: Callable[[State], None] = lambda state: None, say: Say = lambda text: None
) -> Path:
    """Carry out a plan and return the folder of the weights. What came before an interruption is kept, and
    not asked for again.

    Raises GenError: disk_full (before anything is fetched, if the disk is too small), network, no_access,
    corrupt_weights.
    """
    if work.folder is not None:
        return work.folder
    missing, free = work.missing, _free()
    if missing + SPARE > free:
        raise GenError(
            f"{work.name} needs {gib(missing)}, and {gib(SPARE)} to spare, on the disk of "
            f"{store.hub_cache()}, where {gib(free)} are free. Nothing was fetched.",
            "Free some space (`gen list` shows what is installed, `gen rm` removes it), or move HF_HOME.",
            "disk_full",
        )
    done, total = 0, work.bytes
    for take in work.takes:
        repo, sums = take.listing.repo_id, {}
        with told(repo), hub.alone(repo, say):
            hub.begin(take.listing, take.files)
            for file in take.files:
                tell = counter(report, file.path, done + hub.begun(repo, file), total)
                if not hub.here(repo, file):
                    other = hub.twin(repo, file)
                    if other is None or not hub.link(repo, file, other):
                        sums[file.path] = hub.fetch(take.listing, file, tell, say)
                if not sums.get(file.path):
                    big = len(file.blob) == 64  # then its name is its sum
                    sums[file.path] = file.blob if big else hub.sums(hub.blob(repo, file), file)[1]
                done += file.size
                report(State(file=file.path, done=done, total=total))
            hub.place(take.listing, take.files)
            hub.remember(take.listing, take.files, sums)
    with told(work.name):
        folder = whole(work.key)
    if folder is None:
        raise GenError(
            f"All files of {work.name} have come, and yet they are not whole: {_why(work.key)}.",
            "The repository is not what this program knows: try another --revision.",
            "corrupt_weights",
        )
    return folder


def counter(report: Callable[[State], None], file: str, done: int, total: int) -> Callable[[int], None]:
    """A function that is told how many more bytes of a file have come or been read, and reports the sum."""

    def tell(count: int) -> None:
        nonlocal done
        done += count
        report(State(file=file, done=done, total=total))

    return tell


def _why(key: str) -> str:
    """What is wrong with weights that are not whole."""
    try:
        folder = store.find(key)
        if folder is None:
            return f"{', '.join(store.lacking(key))} missing"
        store.verify(store.prepare(key), checksums=False)
    except store.CorruptWeights as error:
        return str(error)
    return "of another layout"


# --- words -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def told(repo_id: str) -> Iterator[None]:
    """What goes wrong with the hub or the cache, as GenError."""
    try:
        yield
    except hub.HubError as error:
        raise explained(error, repo_id) from error
    except OSError as error:
        full = error.errno in hub.FULL
        words = f"{error.filename or store.hub_cache()}: {error.strerror or error}"
        raise explained(hub.HubError("disk_full" if full else "unwritable", words), repo_id) from error


def explained(error: hub.HubError, repo_id: str) -> GenError:
    """In the form of an error towards people."""
    code, hint = KINDS[error.kind]
    hint = hint.format(page=f"{hub.endpoint()}/{repo_id}", endpoint=hub.endpoint())
    return GenError(f"{error}.", hint, code)


def way(key: str) -> str:
    """The command by which weights come to this machine."""
    facts = store.checkpoint(key)
    if not facts.repo_id:
        return catalog._way(facts)
    return f"gen pull {find(key)[1]}"


def gib(count: int) -> str:
    """Bytes in words."""
    from gen.doctor import gib as words

    return words(count)
