"""A hub for tests: a real HTTP server on this machine that speaks what huggingface_hub asks a hub for.

/api/models/<repository>/revision/<revision> and .../tree/<revision> list a commit, and
/<repository>/resolve/<commit>/<file> gives a file, with ranges, ETags and the hub's own headers. It can be
told to misbehave.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE = 1024  # bytes from which a file counts as stored in Git LFS, with a SHA-256


@dataclass
class Repository:
    """Its files by revision, and what is asked of those who read it."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    main: str = ""
    gated: bool = False
    token: str = ""  # without which everything is refused
    licence: str = "openrail++"


@dataclass
class Fault:
    """One way to misbehave, for requests of the files or of the list whose path holds `path`."""

    path: str
    status: int = 0  # to answer instead
    times: int = 10**9  # how often
    cut: int | None = None  # close the connection after so many bytes of a body
    reset: bool = False  # by a reset instead of an end
    flip: bool = False  # change a byte on the way
    headers: dict[str, str] = field(default_factory=dict)
    slow: float = 0.0  # seconds between pieces of 64 KiB
    redirect: str = ""  # address of another server that has the file
    ranges: bool = True  # False: send all of it, whatever was asked for


class Hub:
    """The server and what it holds."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, str]] = []  # method, path, Range
        self.tokens: set[str] = set()
        self.sent = 0  # bytes of file bodies
        self.lock = threading.Lock()

    def publish(self, repo_id: str, files: dict[str, bytes], **facts: object) -> str:
        """A new commit with these files alone; main from then on. Returns it."""
        repo = self.repositories.setdefault(repo_id, Repository())
        digest = hashlib.sha1(repr(sorted((n, hashlib.sha1(c).digest()) for n, c in files.items())).encode())
        digest.update(repo_id.encode())
        commit = digest.hexdigest()
        repo.revisions[commit], repo.main = files, commit
        for name, value in facts.items():
            setattr(repo, name, value)
        return commit

    def misbehave(self, path: str, **facts: object) -> Fault:
        self.faults.append(Fault(path, **facts))
        return self.faults[-1]

    def asked(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for."""
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for m, path, _ in self.seen
            if m == method and "/resolve/" in path
        ]

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for one in self.faults:
                if one.path in path and one.times > 0:
                    one.times -= 1
                    return one
        return None


def git_sum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One connection; `server.hub` is the Hub."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, self.headers.get("Range", "")))
        if token := self.headers.get("Authorization", "").removeprefix("Bearer "):
            self.hub.tokens.add(token)
        fault = self.hub.fault(path)
        if fault is not None and fault.status:
            self.refuse(fault.status, **fault.headers)
        elif fault is not None and fault.redirect:
            self.refuse(302, Location=f"{fault.redirect}{self.path}")
        elif found := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self.list(*found.groups())
        elif found := re.fullmatch(r"/api/models/(.+?)/tree/(.+)", path):
            self.list(*found.groups(), tree=True)
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self.send_file(*found.groups(), fault)
        else:
            self.refuse(404)

    def refuse(self, status: int, error: str = "", **headers: str) -> None:
        body = b"" if self.command == "HEAD" else json.dumps({"error": error or str(status)}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def repository(self, repo_id: str, files: bool) -> Repository | None:
        """None when the reader was refused."""
        repo = self.hub.repositories.get(repo_id)
        authorised = repo is not None and repo.token in (
            "",
            self.headers.get("Authorization", "").removeprefix("Bearer "),
        )
        if repo is None:
            self.refuse(404, "Repository not found", X_Error_Code="RepoNotFound")
        elif repo.gated and files and not authorised:
            message = f"Access to model {repo_id} is restricted"
            self.refuse(403 if "Authorization" in self.headers else 401, message, X_Error_Code="GatedRepo")
        elif not repo.gated and not authorised:
            self.refuse(401, "Invalid username or password.")
        else:
            return repo
        return None

    def list(self, repo_id: str, revision: str, tree: bool = False) -> None:
        repo = self.repository(repo_id, files=False)
        if repo is None:
            return
        commit = repo.main if revision == "main" else revision
        if commit not in repo.revisions:
            self.refuse(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
            return
        siblings, entries = [], []
        for name, content in repo.revisions[commit].items():
            size, blob = len(content), git_sum(content)
            one: dict[str, object] = {"rfilename": name, "size": size, "blobId": blob}
            other: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": blob}
            if size >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
                other["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            siblings.append(one)
            entries.append(other)
        about = {"id": repo_id, "sha": commit, "gated": "auto" if repo.gated else False, "private": False}
        about |= {"cardData": {"license": repo.licence}, "siblings": siblings}
        body = json.dumps(entries if tree else about).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, repo_id: str, revision: str, name: str, fault: Fault | None) -> None:
        repo = self.repository(repo_id, files=True)
        if repo is None:
            return
        commit = repo.main if revision == "main" else revision
        if commit not in repo.revisions:
            self.refuse(404, X_Error_Code="RevisionNotFound")
            return
        if name not in repo.revisions[commit]:
            self.refuse(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content = repo.revisions[commit][name]
        large = len(content) >= LARGE
        etag = hashlib.sha256(content).hexdigest() if large else git_sum(content)
        start = 0
        if (asked := self.headers.get("Range")) and (fault is None or fault.ranges):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                self.refuse(416, Content_Range=f"bytes */{len(content)}")
                return
        body = bytearray(content[start:])
        if fault is not None and fault.flip and body:
            body[len(body) // 2] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.send_body(bytes(body), fault)

    def send_body(self, body: bytes, fault: Fault | None) -> None:
        end = len(body) if fault is None or fault.cut is None else min(fault.cut, len(body))
        for at in range(0, end, 2**16):
            piece = body[at : min(at + 2**16, end)]
            try:
                self.wfile.write(piece)
            except OSError:  # the reader has gone
                self.close_connection = True
                return
            self.hub.sent += len(piece)
            if fault is not None and fault.slow:
                time.sleep(fault.slow)
        if end < len(body):
            self.close_connection = True
            if fault is not None and fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_: object) -> None:  # a reader that goes away is what tests are about
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A running hub."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A running hub that this process and its children take for theirs, with a cache of their own."""
    from huggingface_hub import constants

    with serving() as hub:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HOME", "GEN_WEIGHTS_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read once, when it was imported
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setattr("weights.hub.WAITS", (0.01, 0.01, 0.01))
        yield hub


def safetensors(seed: int, size: int = 4096) -> bytes:
    """A real safetensors file with one tensor of `size` bytes."""
    import random

    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


def pixart(
    *parts: str, seed: int = 0, size: int = 4096, more: dict[str, bytes] | None = None
) -> dict[str, bytes]:
    """The files of a repository with these parts of a PixArt pipeline, in structure; its numbers draw
    nothing."""
    files = {".gitattributes": b"*.safetensors filter=lfs", "README.md": b"# Weights"}
    config = {"transformer": {"_class_name": "PixArtTransformer2DModel", "use_additional_conditions": False}}
    for number, part in enumerate(parts):
        if part == "tokenizer":
            files["tokenizer/tokenizer_config.json"] = b'{"tokenizer_class": "T5Tokenizer"}'
            files["tokenizer/spiece.model"] = bytes([seed]) * 2000
        elif part == "scheduler":
            files["scheduler/scheduler_config.json"] = b'{"_class_name": "DPMSolverMultistepScheduler"}'
        else:
            files[f"{part}/config.json"] = json.dumps(config.get(part, {"_class_name": part})).encode()
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            files[f"{part}/{stem}.safetensors"] = safetensors(seed * 10 + number, size)
    if len(parts) == 5:
        index = {part: ["diffusers", part] for part in parts}
        files["model_index.json"] = json.dumps({"_class_name": "PixArtSigmaPipeline", **index}).encode()
    return files | (more or {})
