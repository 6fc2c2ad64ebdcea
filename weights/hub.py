"""The Hugging Face hub: what a repository holds, and its files brought into the Hugging Face cache.

The only module of ours that opens a connection, and only through huggingface_hub: its session, headers,
token, errors and lock. The bytes are read here, because the client's own download begins anew in every
process and compares no sums: what has come stays in blobs/<name>.incomplete, the next pull asks for the rest
of it, and a file gets its name only when its sum is the one that the hub published. The cache stays the
client's: blobs are named by SHA-256 (large files) or by git's SHA-1 (small ones), snapshots/<commit> holds
links to them.

Variables: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, read at every call.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from weights import store

ENDPOINT = "https://huggingface.co"
TIMEOUT = 30  # seconds without a byte, after which a connection counts as lost
WAITS = (1, 2, 4, 8, 15)  # seconds before each further try; begun anew whenever bytes came
LONGEST_WAIT = 120  # seconds; a busy hub may ask for more, and is then left alone
AGAIN = (408, 429, 500, 502, 503, 504)  # statuses that pass
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

Say = Callable[[str], None]
T = TypeVar("T")


class HubError(Exception):
    """What kept a repository or file from coming. `kind` is one of: offline, unreachable, busy, server,
    gated, refused, no_repository, no_revision, no_file, corrupt, disk_full, unwritable."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class File:
    """One file of a revision."""

    path: str  # inside the repository
    size: int  # bytes
    blob: str  # its name in the cache: SHA-256 of large files, git's SHA-1 of small ones


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a repository holds at one commit."""

    repo_id: str
    asked: str  # branch, tag or commit
    revision: str  # the commit
    files: tuple[File, ...]
    licence: str  # as the repository's card has it; empty when it says nothing
    gated: bool  # only for people who accepted its terms


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def offline() -> str:
    """The variable by which all connections are forbidden; empty when they are not."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return ""


def look(repo_id: str, revision: str = "main", say: Say = lambda text: None) -> Listing:
    """What the repository holds. Raises HubError."""
    _online(repo_id)
    from huggingface_hub import HfApi

    with _explained(repo_id, revision):
        api = HfApi(endpoint=endpoint())
        info = _again(
            lambda: api.model_info(repo_id, revision=revision, timeout=TIMEOUT, files_metadata=True), say
        )
    card = info.card_data
    licence = card.get("license_name") or card.get("license") if card else None
    files = tuple(
        File(one.rfilename, one.lfs.size, one.lfs.sha256)
        if one.lfs
        else File(one.rfilename, one.size if one.size is not None else -1, one.blob_id or "")
        for one in info.siblings or ()
    )
    for file in files:
        path = PurePosixPath(file.path)
        strange = path.is_absolute() or ".." in path.parts or "\\" in file.path or not path.name
        if strange or file.size < 0 or not BLOB.fullmatch(file.blob):
            raise HubError("server", f"{endpoint()} lists {file.path!r} of {repo_id} without size or sum")
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise HubError("server", f"{endpoint()} does not say which commit '{revision}' of {repo_id} is")
    return Listing(
        repo_id=repo_id,
        asked=revision,
        revision=commit,
        files=files,
        licence=str(licence or ""),
        gated=bool(info.gated),
    )


# --- one file ----------------------------------------------------------------------------------------


def blob(repo_id: str, file: File) -> Path:
    """Where the bytes of a file are kept."""
    return store.repository(repo_id) / "blobs" / file.blob


def partial(repo_id: str, file: File) -> Path:
    """Where the bytes that have come so far are kept."""
    path = blob(repo_id, file)
    return path.with_name(f"{path.name}.incomplete")


def here(repo_id: str, file: File) -> bool:
    """Whether the cache has the file, in full length."""
    return _size(blob(repo_id, file)) == file.size


def twin(repo_id: str, file: File) -> Path | None:
    """The same bytes in the cache of another repository."""
    if len(file.blob) != 64:
        return None
    own = blob(repo_id, file)
    for path in store.hub_cache().glob(f"models--*/blobs/{file.blob}"):
        if path != own and _size(path) == file.size:
            return path
    return None


def begun(repo_id: str, file: File) -> int:
    """Bytes of it that came in an earlier attempt, and will not be asked for again."""
    size = _size(partial(repo_id, file)) or 0
    return size if size <= file.size else 0


def link(repo_id: str, file: File, source: Path) -> bool:
    """Take a file from the cache of another repository, stored once: whether its sum is right, and the file
    system can do that."""
    if sums(source, file)[0] != file.blob:
        return False
    goal = blob(repo_id, file)
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.unlink(missing_ok=True)
        os.link(source, goal)
    except OSError:
        return False  # then it is pulled
    partial(repo_id, file).unlink(missing_ok=True)
    return True


def fetch(
    listing: Listing,
    file: File,
    tell: Callable[[int], None] = lambda count: None,
    say: Say = lambda text: None,
) -> str:
    """Bring one file, going on where an earlier attempt ended, and return its SHA-256.

    `tell` is called with every count of bytes that came; a negative one takes back what proved useless. What
    has other bytes than were published is removed, tried once more from its beginning, and refused.
    Raises HubError.
    """
    _online(listing.repo_id)
    from huggingface_hub.utils import WeakFileLock

    goal, part = blob(listing.repo_id, file), partial(listing.repo_id, file)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(listing.repo_id, listing.asked, file.path))
        goal.parent.mkdir(parents=True, exist_ok=True)
        # The client's own lock of this file: another program may be at it.
        stack.enter_context(WeakFileLock(_locks(listing.repo_id) / f"{file.blob}.lock"))
        if here(listing.repo_id, file) and (found := sums(goal, file))[0] == file.blob:
            tell(file.size - begun(listing.repo_id, file))
            return found[1]
        for last in (False, True):
            if (_size(part) or 0) > file.size:
                part.unlink()
            _complete(listing, file, part, tell, say)
            own, sha256 = sums(part, file)
            if own == file.blob:
                with part.open("rb") as written:
                    os.fsync(written.fileno())  # a file of this name is taken for whole from now on
                part.replace(goal)
                return sha256
            part.unlink()
            tell(-file.size)
            if not last:
                say(f"{file.path} came with other bytes than were published: pulling it once more")
    raise HubError(
        "corrupt",
        f"{file.path} of {listing.repo_id} came twice with other bytes than the hub published: its sum is "
        f"{own}, and should be {file.blob}",
    )


def _complete(listing: Listing, file: File, part: Path, tell: Callable[[int], None], say: Say) -> None:
    """Bring what is missing of a file, in as many attempts as it takes while each brings something."""
    came = 0

    def count(size: int) -> None:
        nonlocal came
        came += max(0, size)
        tell(size)

    _again(lambda: _stream(listing, file, part, count), say, progress=lambda: came)


def _stream(listing: Listing, file: File, part: Path, tell: Callable[[int], None]) -> None:
    """Ask for what is missing of a file and write it as it comes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    done = _size(part) or 0
    if done == file.size and part.exists():
        return
    url = hf_hub_url(listing.repo_id, file.path, revision=listing.revision, endpoint=endpoint())
    # Ranges are of the bytes as stored, so nothing may be packed on the way.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # what is here is not the beginning of what is there
            part.unlink()
            tell(-done)
            raise _Interrupted("the hub would not go on from where the last attempt ended")
        hf_raise_for_status(response)
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if done and (response.status_code != 206 or start != str(done)):
            tell(-done)
            done = 0  # it sends all of it, whatever was asked for
        with part.open("r+b" if part.exists() else "wb") as writing:
            writing.seek(done)
            writing.truncate()
            for chunk in response.iter_bytes():
                done += len(chunk)
                if done > file.size:
                    break
                writing.write(chunk)
                tell(len(chunk))
    if done < file.size:
        raise _Interrupted(f"the connection ended after {done:,} of {file.size:,} bytes")
    if done > file.size:
        part.write_bytes(b"")
        raise HubError("corrupt", f"{file.path} of {listing.repo_id} is longer than the hub published")


def sums(path: Path, file: File, tell: Callable[[int], None] = lambda count: None) -> tuple[str, str]:
    """The sum that names the file in the cache, of these bytes, and their SHA-256. Raises OSError."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as reading:
        while chunk := reading.read(2**20):
            sha256.update(chunk)
            if len(file.blob) == 40:
                git.update(chunk)
            tell(len(chunk))
    return (git if len(file.blob) == 40 else sha256).hexdigest(), sha256.hexdigest()


def forget(repo_id: str, file: File) -> list[Path]:
    """Remove the bytes of a file, and return where else in the cache the same bytes are linked."""
    path = blob(repo_id, file)
    partial(repo_id, file).unlink(missing_ok=True)
    if not path.exists():
        return []
    found = store.hub_cache().glob(f"models--*/blobs/{file.blob}")
    others = [one for one in found if one != path and one.samefile(path)]
    path.unlink()
    return others


def renew(repo_id: str, file: File, others: Sequence[Path]) -> None:
    """Put the bytes of a file, now sound, where those that `forget` told of were linked."""
    for path in others:
        part = path.with_name(f".{path.name}.{os.getpid()}")
        os.link(blob(repo_id, file), part)
        part.replace(path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


# --- the cache ---------------------------------------------------------------------------------------


def place(listing: Listing, files: Sequence[File]) -> Path:
    """Give the files their names in the snapshot of their commit, once all are here, and return its folder.
    Raises HubError."""
    with _explained(listing.repo_id, listing.asked):
        base = store.repository(listing.repo_id)
        folder = base / "snapshots" / listing.revision
        # Configurations say that a part is there, and the index that all are: they come last.
        order = sorted(files, key=lambda one: (one.path.endswith(".json"), one.path == "model_index.json"))
        for file in order:
            name, goal = folder / file.path, blob(listing.repo_id, file)
            if name.exists() and name.samefile(goal):
                continue
            name.parent.mkdir(parents=True, exist_ok=True)
            name.unlink(missing_ok=True)
            name.symlink_to(os.path.relpath(goal, name.parent))
        if not COMMIT.fullmatch(listing.asked):
            _write(base / "refs" / listing.asked, listing.revision)
        return folder


def begin(listing: Listing, files: Sequence[File]) -> None:
    """Note in the repository's record which blobs a pull is about to bring, so that what it leaves behind
    when it is cut off can be found. Raises HubError."""
    content = {"repository": listing.repo_id, **store.record(listing.repo_id)}
    content["begun"] = [one.blob for one in files]
    with _explained(listing.repo_id, listing.asked):
        _write(store.record_path(listing.repo_id), json.dumps(content, indent=2) + "\n")


def remember(listing: Listing, files: Sequence[File], sha256: Mapping[str, str]) -> None:
    """Write into GEN_HOME what was taken: its revision is pinned from then on. What was recorded of the same
    revision stays. Raises HubError."""
    old = store.record(listing.repo_id)
    same = old.get("revision") == listing.revision
    entries = {one.path: {"size": one.size, "blob": one.blob, "sha256": sha256[one.path]} for one in files}
    content = {
        "repository": listing.repo_id,
        "asked": old.get("asked", listing.asked) if same else listing.asked,
        "revision": listing.revision,
        "hub": endpoint(),
        "licence": listing.licence,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {**(old.get("files", {}) if same else {}), **entries},
    }
    with _explained(listing.repo_id, listing.asked):
        _write(store.record_path(listing.repo_id), json.dumps(content, indent=2) + "\n")


def tidy(repo_id: str) -> None:
    """Remove what is empty after files were removed: folders, the repository, its record. Raises OSError."""
    base, record = store.repository(repo_id), store.record(repo_id)
    for folder in sorted((base / "snapshots").rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    snapshot = base / "snapshots" / str(record.get("revision", ""))
    files = {name: one for name, one in record.get("files", {}).items() if (snapshot / name).exists()}
    if not files:
        store.record_path(repo_id).unlink(missing_ok=True)
    elif files != record["files"]:
        _write(store.record_path(repo_id), json.dumps(record | {"files": files}, indent=2) + "\n")
    if not any((base / "snapshots").glob("*")):
        shutil.rmtree(base, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def alone(repo_id: str, say: Say = lambda text: None) -> Iterator[None]:
    """Let no other process of ours change this repository's part of the cache; waits for one that does. The
    lock dies with its process. Raises HubError."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        with _explained(repo_id, ""):
            path = _locks(repo_id) / "gen.lock"
            try:
                stack.enter_context(WeakFileLock(path, timeout=0.2))
            except Timeout:
                say(f"another process pulls or removes {repo_id}: waiting for it")
                stack.enter_context(WeakFileLock(path))
        yield


def _locks(repo_id: str) -> Path:
    """The client's folder of locks of a repository."""
    path = store.hub_cache() / ".locks" / store.repository(repo_id).name
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- what goes wrong ---------------------------------------------------------------------------------


class _Interrupted(Exception):
    """An answer that ended early; trying again helps."""


def _again(call: Callable[[], T], say: Say, progress: Callable[[], int] = lambda: 0) -> T:
    """The call's answer, tried again after each pause of `WAITS` while what is wrong may pass."""
    waits, before = list(WAITS), 0
    while True:
        try:
            return call()
        except Exception as error:
            if progress() > before:
                waits, before = list(WAITS), progress()
            reason = _passing(error)
            if reason is None or not waits:
                raise
            asked = _asked_to_wait(error)
            if asked > LONGEST_WAIT:
                raise
            pause = max(waits.pop(0), asked)
            say(f"{reason}; trying again in {pause:g} s")
            time.sleep(pause)


def _passing(error: Exception) -> str | None:
    """In a few words what is wrong, when it may pass by itself; else None."""
    if isinstance(error, _Interrupted):
        return str(error)
    if isinstance(error, _transport()):
        return f"no connection to {endpoint()} ({error or type(error).__name__})"
    status = _status(error)
    return f"{endpoint()} answers {status}" if status in AGAIN else None


def _asked_to_wait(error: Exception) -> float:
    """Seconds of a Retry-After header; 0 without one, or when it gives a date."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", "")).strip()
    return float(value) if value.isdecimal() else 0.0


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _transport() -> Any:
    """The class of all errors of connections, of the HTTP library that this huggingface_hub is built on."""
    import importlib

    from huggingface_hub.errors import HfHubHTTPError

    library = HfHubHTTPError.__bases__[0].__module__.partition(".")[0]
    return importlib.import_module(library).TransportError


def _online(repo_id: str) -> None:
    if name := offline():
        raise HubError("offline", f"{repo_id} is not asked for, because {name} is set")


@contextlib.contextmanager
def _explained(repo_id: str, revision: str, file: str = "") -> Iterator[None]:
    """What may go wrong, as HubError."""
    from huggingface_hub import errors

    what = f"{file} of {repo_id}" if file else repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError("gated", f"{repo_id} is gated: its authors ask you to accept their terms") from error
    except errors.RevisionNotFoundError as error:
        raise HubError("no_revision", f"{repo_id} has no revision '{revision}'") from error
    except errors.EntryNotFoundError as error:
        raise HubError("no_file", f"{repo_id} has no file {file} at '{revision}'") from error
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        raise _refusal(error, repo_id, what) from error
    except errors.HFValidationError as error:
        raise HubError("no_repository", f"{repo_id!r} cannot be the name of a repository") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError("offline", f"{what} is not asked for: huggingface_hub is offline") from error
    except (_Interrupted, _transport()) as error:
        reason = f"{error or type(error).__name__}"
        raise HubError("unreachable", f"{what} could not be pulled from {endpoint()}: {reason}") from error
    except OSError as error:
        kind = "disk_full" if error.errno in FULL else "unwritable"
        raise HubError(kind, f"{error.filename or store.hub_cache()}: {error.strerror or error}") from error


def _refusal(error: Exception, repo_id: str, what: str) -> HubError:
    """An HTTP status in words."""
    from huggingface_hub.errors import RepositoryNotFoundError

    status = _status(error)
    if status == 404:
        return HubError("no_repository", f"{endpoint()} has no {what}")
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return HubError("refused", f"{endpoint()} does not hand out {what} to you (status {status})")
    if status == 429:
        return HubError("busy", f"{endpoint()} answers that it is asked too often (status 429)")
    return HubError("server", f"{endpoint()} answers {status} when asked for {what}")
