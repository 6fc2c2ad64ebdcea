"""Find checkpoints on this machine and tell whether their bytes are whole. Never touches the network, nor
torch.

Embedded weights lie in weights/toy/<name>; the folder named by the environment variable GEN_WEIGHTS_DIR is
looked into first (it holds toy/<name>, or <key> for any other checkpoint). Published ones are found in the
Hugging Face cache when they are complete there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weights import registry

HEADER_LIMIT = 100 * 2**20  # bytes; the safetensors library refuses longer headers too
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
SUMS = "SHA256SUMS"


class CorruptWeights(ValueError):
    """A folder of weights is not what it should be; the message names the file."""


def find(key: str) -> Path | None:
    """The folder of this checkpoint, or None when it is not on this machine. KeyError for an unknown key."""
    row = registry.CHECKPOINTS[key]
    places = [Path(__file__).parent / row.folder] if row.folder else []
    if extra := os.environ.get("GEN_WEIGHTS_DIR"):
        places.insert(0, Path(extra).expanduser() / (row.folder or row.key))
    for folder in places:
        if folder.is_dir():
            return folder.resolve()
    return _cached(row.repo_id) if row.repo_id else None


def _cached(repo_id: str) -> Path | None:
    """The snapshot that refs/main of the Hugging Face cache names, if every component of the pipeline is in
    it.

    Done by hand because importing huggingface_hub takes longer than the whole of `gen list`. Layout:
    hub/models--<org>--<name>/{refs/main, snapshots/<commit>/...}.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repo = hub.expanduser() / f"models--{repo_id.replace('/', '--')}"
    try:
        commit = (repo / "refs" / "main").read_text().strip()
        folder = repo / "snapshots" / commit
        parts = components(folder)
    except (OSError, CorruptWeights):
        return None
    return folder if all((folder / part).is_dir() for part in parts) else None


def components(folder: Path) -> list[str]:
    """The sub-folders that model_index.json promises. Raises CorruptWeights."""
    index = _json(folder / "model_index.json")
    return [
        name
        for name, origin in index.items()
        if not name.startswith("_") and isinstance(origin, list) and len(origin) == 2 and None not in origin
    ]


def verify(folder: Path, checksums: bool = True) -> None:
    """Raise CorruptWeights, naming the file, unless all components are there, whole and unchanged.

    Structure (JSON that parses, safetensors whose header and size agree) takes milliseconds. With
    `checksums`, files listed in the folder's SHA256SUMS are read as well; folders without that file have only
    their structure checked.
    """
    for part in components(folder):
        if not (folder / part).is_dir():
            raise CorruptWeights(f"{folder / part}: this folder is missing")
        _verify_component(folder / part)
    for path in _files(folder, ".safetensors"):
        read_header(path)
    if checksums:
        _verify_sums(folder)


def _verify_component(folder: Path) -> None:
    if folder.name in CONFIGS:
        _json(folder / CONFIGS[folder.name])
        return
    _json(folder / "config.json")
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        for name in sorted(set(_json(index).get("weight_map", {}).values())):
            if not (folder / str(name)).is_file():
                raise CorruptWeights(f"{folder / str(name)}: this file is missing")
    elif not any(folder.glob("*.safetensors")):
        raise CorruptWeights(f"{folder}: the *.safetensors file is missing")


def _verify_sums(folder: Path) -> None:
    for name, expected in _sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise CorruptWeights(f"{path}: this file is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CorruptWeights(f"{path}: its SHA-256 is not the one in {SUMS}")


def _sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 from the folder's SHA256SUMS (lines as `sha256sum` writes them); empty without
    one."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    sums = {}
    for line in path.read_text().splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if len(digest) != 64 or not name or name.startswith("/") or ".." in Path(name).parts:
            raise CorruptWeights(f"{path}: a line of it is not 'sha256  file'")
        sums[name] = digest.lower()
    return sums


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over all other files of the folder; the last step of making weights."""
    lines = []
    for path in _files(folder):
        if path.name != SUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(lines))


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, after checking that the file is as long as it says.

    Format: 8 bytes little-endian header length, the header, then the tensors without gaps.
    Raises CorruptWeights.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise CorruptWeights(f"{path}: cut short, or not a safetensors file")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted(entry["data_offsets"] for entry in tensors.values())
        ends = [0, *(end for _, end in spans)]
        consistent = all(begin == end for (begin, _), end in zip(spans, ends, strict=False)) and all(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            == _count(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]
            for entry in tensors.values()
        )
    except OSError as error:
        raise CorruptWeights(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CorruptWeights):
            raise
        raise CorruptWeights(f"{path}: its header is damaged") from None
    if not consistent:
        raise CorruptWeights(f"{path}: its header contradicts itself")
    if 8 + length + ends[-1] != size:
        raise CorruptWeights(
            f"{path}: {size:,} bytes long, but its header promises {8 + length + ends[-1]:,}"
        )
    return header


def _count(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of each class of a class-conditional pipeline, by its number; empty where it has none.

    Raises CorruptWeights for a folder without the number of its classes.
    """
    path = folder / "transformer" / "config.json"
    count = _json(path).get("num_embeds_ada_norm")
    if not isinstance(count, int) or not 0 < count <= 1_000_000:
        raise CorruptWeights(f"{path} does not say how many classes there are")
    names = _json(folder / "model_index.json").get("id2label") or {}
    return tuple(str(names.get(str(number), "")) for number in range(count))


def size_on_disk(folder: Path) -> int:
    """Bytes of all safetensors files: what loading reads."""
    return sum(path.stat().st_size for path in _files(folder, ".safetensors"))


def parameters(folder: Path) -> int:
    """Numbers in all safetensors files, from their headers. Raises CorruptWeights."""
    return sum(
        _count(entry["shape"])
        for path in _files(folder, ".safetensors")
        for name, entry in read_header(path).items()
        if name != "__metadata__"
    )


def fingerprint(folder: Path) -> str:
    """Twelve hex digits that tell these weights from others, without reading every byte.

    From SHA256SUMS when there is one; else from each weight file's size, header and 16 samples of 16 KiB, so
    that two trainings of the same network differ.
    """
    digest = hashlib.sha256()
    sums = _sums(folder)
    for path in _files(folder, ".safetensors"):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode())
        if name in sums:
            digest.update(sums[name].encode())
            continue
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT)
            digest.update(file.read(length))
            for sample in range(16):
                file.seek(8 + length + max(0, size - 8 - length - 2**14) * sample // 15)
                digest.update(file.read(2**14))
    return digest.hexdigest()[:12]


def _files(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Files below the folder in a fixed order."""
    return (path for path in sorted(folder.rglob(f"*{suffix}")) if path.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptWeights(f"{path}: this file is missing") from None
    except OSError as error:
        raise CorruptWeights(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise CorruptWeights(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptWeights(f"{path}: not a JSON object")
    return value
