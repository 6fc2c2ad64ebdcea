"""Find checkpoints on this machine and tell whether their bytes are whole. Never touches the network, nor
torch.

Embedded weights lie in weights/toy/<name>; the folder named by the environment variable GEN_WEIGHTS_DIR is
looked into first (it holds toy/<name>, or <key> for any other checkpoint). Published ones are found in the
Hugging Face cache. Many published repositories hold the transformer alone: `prepare` joins it with the parts
of a companion repository, by links, in GEN_HOME/assembled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
ADAPTER = "adapter_model.safetensors"


class CorruptWeights(ValueError):
    """A folder of weights is not what it should be; the message names the file."""


def home() -> Path:
    """GEN_HOME: the folder of everything the studio keeps. Not created here."""
    if given := os.environ.get("GEN_HOME"):
        return Path(given).expanduser().absolute()
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "gen-studio"


def find(key: str) -> Path | None:
    """The folder of this checkpoint, or None when it, or a part of it, is not on this machine.

    Where the folder has to be put together first, `prepare` makes it. KeyError for an unknown key.
    """
    if key not in registry.CHECKPOINTS:
        from weights import added

        return added.place(added.row(key))
    row = registry.CHECKPOINTS[key]
    own = _own(row)
    if own is None or row.folder or row.pipeline not in PARTS or _whole(own, row):
        return own
    try:
        return None if lacking(key) else _assembled(row, _plan(row))
    except CorruptWeights:
        return own  # `prepare` tells which file is damaged


def prepare(key: str) -> Path:
    """The folder that `find` names, put together if it was not yet. Raises CorruptWeights, OSError."""
    if key not in registry.CHECKPOINTS:
        from weights import added

        return added.prepare(added.row(key))
    row, folder = registry.CHECKPOINTS[key], find(key)
    assert folder is not None, f"{key} is not here: ask `find` first"
    if folder == _own(row) and (row.folder or row.pipeline not in PARTS or _whole(folder, row)):
        return folder
    plan = _plan(row)
    return assemble(_assembled(row, plan), plan)


def assemble(folder: Path, plan: Mapping[str, Path | str]) -> Path:
    """Make the folder of links to files and of written texts that a plan names, unless it is there. Raises
    OSError."""
    if folder.is_dir():
        return folder
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)  # of a process that died
    for name, source in plan.items():
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            (building / name).symlink_to(source)
        else:
            (building / name).write_text(source, encoding="utf-8")
    try:
        building.rename(folder)
    except OSError:
        shutil.rmtree(building)
        if not folder.is_dir():  # else another process was quicker, and what has this name has this content
            raise
    return folder


def lacking(key: str) -> list[str]:
    """The parts of a published checkpoint that are not on this machine; all of them when nothing is."""
    if key not in registry.CHECKPOINTS:
        from weights import added

        return added.lacking(added.row(key))
    row = registry.CHECKPOINTS[key]
    own = _own(row)
    if row.folder or row.pipeline not in PARTS:
        return [] if own else [key]
    if own is not None and _whole(own, row):
        return []
    found = sources(row)
    return [name for name in PARTS[row.pipeline] if name not in found and name != "scheduler"]


def checkpoint(key: str) -> registry.Checkpoint:
    """The facts of a checkpoint of the registry, or of one that was added. KeyError for an unknown key."""
    if key in registry.CHECKPOINTS:
        return registry.CHECKPOINTS[key]
    from weights import added

    return added.row(key).checkpoint


def files(key: str) -> dict[str, Path]:
    """Name inside the folder -> the file it is read from, of a checkpoint that is on this machine, also where
    `prepare` has not put it together yet. Links are not followed. Raises CorruptWeights."""
    folder = find(key)
    if folder is None:
        return {}
    if key not in registry.CHECKPOINTS:
        from weights import added

        plan = added.plan(added.row(key))
    elif folder == _own(registry.CHECKPOINTS[key]):
        return {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    else:
        plan = _plan(registry.CHECKPOINTS[key])
    return {name: source for name, source in plan.items() if isinstance(source, Path)}


def sound_parts(row: registry.Checkpoint) -> dict[str, Path]:
    """Part -> the folder it is taken from, for those that are on this machine and whole in structure."""
    found = sources(row) if row.pipeline in PARTS else {}
    return {name: folder for name, folder in found.items() if _sound(folder)}


def _sound(folder: Path) -> bool:
    try:
        _verify_component(folder)
        for path in _files(folder, ".safetensors"):
            read_header(path)
    except CorruptWeights:
        return False
    return True


def _own(row: registry.Checkpoint) -> Path | None:
    """The folder of this checkpoint itself, whole or not."""
    places = [Path(__file__).parent / row.folder] if row.folder else []
    if extra := os.environ.get("GEN_WEIGHTS_DIR"):
        places.insert(0, Path(extra).expanduser() / (row.folder or row.key))
    for folder in places:
        if folder.is_dir():
            return folder.resolve()
    return snapshot(row.repo_id) if row.repo_id else None


def hub_cache() -> Path:
    """The Hugging Face cache, by the variables that huggingface_hub reads. Not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("HF_HOME") or f"{base}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{cache}/hub"
    return Path(os.path.expandvars(hub)).expanduser().absolute()


def repository(repo_id: str) -> Path:
    """Where the cache keeps a repository: refs, blobs and snapshots. There or not."""
    return hub_cache() / f"models--{repo_id.replace('/', '--')}"


def record_path(repo_id: str) -> Path:
    """The file in which `gen pull` keeps what it took of a repository: revision, files, their sums."""
    return home() / "pulled" / f"{repo_id.replace('/', '--')}.json"


def record(repo_id: str) -> dict[str, Any]:
    """What `gen pull` took of a repository; empty when it took nothing, or when the record cannot be read."""
    try:
        return _json(record_path(repo_id))
    except CorruptWeights:
        return {}


def snapshot(repo_id: str) -> Path | None:
    """The folder of this repository in the Hugging Face cache, whole or not: of the revision that `gen pull`
    recorded, else of the one that refs/main names.

    Done by hand because importing huggingface_hub takes longer than the whole of `gen list`. Layout:
    hub/models--<org>--<name>/{refs/main, snapshots/<commit>/...}.
    """
    snapshots = repository(repo_id) / "snapshots"
    pinned = str(record(repo_id).get("revision") or "")
    if pinned and (snapshots / pinned).is_dir():
        return snapshots / pinned
    try:
        folder = snapshots / (snapshots.parent / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


# --- checkpoints of several repositories -------------------------------------------------------------

PARTS = {
    name: ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    for name in ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
} | {"DiTPipeline": ("vae", "transformer", "scheduler")}
MORE = ("controlnet", "hed")  # read where they are present
LIBRARIES = {"tokenizer": "transformers", "text_encoder": "transformers"}  # of all others: diffusers
_LINEAR = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
# Walk of a checkpoint -> the scheduler it is given: the one it was distilled for, and for others, which bring
# or share one, the published solver in case that is missing.
SCHEDULERS = {
    "": {**_LINEAR, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 2},
    "lcm": {**_LINEAR, "_class_name": "LCMScheduler", "original_inference_steps": 50, "clip_sample": False},
    "one-step": {**_LINEAR, "_class_name": "DDPMScheduler", "timestep": 400, "clip_sample": False},
}
# What a part must hold, so that half a download is not taken for one.
MARKS = {**CONFIGS, "transformer": "config.json", "text_encoder": "config.json", "vae": "config.json"}


def _whole(folder: Path, row: registry.Checkpoint) -> bool:
    """Whether the folder can be loaded as it is: every part is there, and the settings are right."""
    try:
        there = all((folder / part).is_dir() for part in components(folder))
        return there and not _mended(folder, row)
    except CorruptWeights:
        return False


def _mended(folder: Path, row: registry.Checkpoint) -> dict[str, str]:
    """File -> content, for settings that the published files leave to the reader to know."""
    files = {}
    path = folder / "transformer" / "config.json"
    if "use_additional_conditions" in row.config and path.is_file():
        # Left out, diffusers takes it for True at 1024 pixels, and PixArt-Sigma has no such layers.
        config = _json(path)
        if config.get("use_additional_conditions") is None:
            config["use_additional_conditions"] = row.config["use_additional_conditions"]
            files["transformer/config.json"] = json.dumps(config, indent=2)
    path = folder / "scheduler" / "scheduler_config.json"
    stored = _json(path) if path.is_file() else {}
    wanted = SCHEDULERS[row.walk]
    # One step is not written in any published file.
    if row.walk and (
        stored.get("_class_name") != wanted["_class_name"] or "timestep" in wanted.keys() - stored
    ):
        files["scheduler/scheduler_config.json"] = json.dumps(wanted, indent=2)
    return files


def sources(row: registry.Checkpoint) -> dict[str, Path]:
    """Part -> the folder it is taken from: the checkpoint's own, else that of the first companion with it."""
    own = _own(row)
    shared = {name for name in PARTS[row.pipeline] if name != "transformer"}
    if row.walk:
        shared.discard("scheduler")  # a companion's walk is not the one this was distilled for
    places = [(own, set(PARTS[row.pipeline])), *((_companion(repo), shared) for repo in row.companions)]
    found: dict[str, Path] = {}
    for place, names in places:
        for name in names:
            if place is not None and (place / name / MARKS[name]).is_file():
                found.setdefault(name, place / name)
    return found


def _companion(repo_id: str) -> Path | None:
    """Like `snapshot`, after a folder of the repository's name in GEN_WEIGHTS_DIR."""
    extra = os.environ.get("GEN_WEIGHTS_DIR")
    folder = Path(extra).expanduser() / repo_id.rpartition("/")[2] if extra else None
    return folder.resolve() if folder is not None and folder.is_dir() else snapshot(repo_id)


def _plan(row: registry.Checkpoint) -> dict[str, Path | str]:
    """File of the assembled folder -> the file it is a link to, or its content. Raises CorruptWeights."""
    own = _own(row)
    assert own is not None
    parts = sources(row) | {name: own / name for name in MORE if (own / name).is_dir()}
    return joined(row, parts, _mended(own, row))


def joined(
    row: registry.Checkpoint, parts: Mapping[str, Path], written: Mapping[str, Path | str]
) -> dict[str, Path | str]:
    """A plan of all files of these parts, of others that are `written` instead, and of what is still lacking:
    the walk's scheduler, and the index."""
    plan: dict[str, Path | str] = {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in parts.items()
        for path in _files(folder)
    }
    plan |= written
    plan.setdefault("scheduler/scheduler_config.json", json.dumps(SCHEDULERS[row.walk], indent=2))
    index: dict[str, Any] = {"_class_name": row.pipeline}
    for name in PARTS[row.pipeline]:
        index[name] = [LIBRARIES.get(name, "diffusers"), _class_of(name, plan[f"{name}/{MARKS[name]}"])]
    plan["model_index.json"] = json.dumps(index, indent=2) + "\n"
    return plan


def _class_of(part: str, config: Path | str) -> str:
    """The class that a part's configuration names."""
    entries = _json(config) if isinstance(config, Path) else json.loads(config)
    usual = {"tokenizer": "T5Tokenizer", "text_encoder": "T5EncoderModel"}
    return usual.get(part) or str(entries.get("_class_name", ""))


def _assembled(row: registry.Checkpoint, plan: dict[str, Path | str]) -> Path:
    """Where a plan is carried out. The name follows from the content: a folder is never changed."""
    digest = hashlib.sha256(repr(sorted((name, str(source)) for name, source in plan.items())).encode())
    return home() / "assembled" / row.key / digest.hexdigest()[:12]


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


def verify_adapter(path: Path) -> None:
    """Raise CorruptWeights, naming the file, unless a folder or file holds a low-rank adapter, whole."""
    file = path / ADAPTER if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise CorruptWeights(f"{file} is neither a folder nor a safetensors file")
    if not file.is_file():
        raise CorruptWeights(f"{file}: this file is missing")
    _json(file.with_name("adapter_config.json"))
    read_header(file)


def _verify_sums(folder: Path) -> None:
    for name, expected in sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise CorruptWeights(f"{path}: this file is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CorruptWeights(f"{path}: its SHA-256 is not the one in {SUMS}")


def sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 from the folder's SHA256SUMS (lines as `sha256sum` writes them); empty without
    one."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if len(digest) != 64 or not name or name.startswith("/") or ".." in Path(name).parts:
            raise CorruptWeights(f"{path}: a line of it is not 'sha256  file'")
        found[name] = digest.lower()
    return found


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
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                pickled = start[:1] == b"\x80" or start[:2] == b"PK"
                what = "a pickle, and only safetensors are read" if pickled else "not a safetensors file"
                raise CorruptWeights(f"{path}: cut short, or {what}")
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


def family(folder: Path) -> str:
    """The class of pipeline that a folder is for, as its index says; empty when it says nothing."""
    try:
        return str(_json(folder / "model_index.json").get("_class_name") or "")
    except CorruptWeights:
        return ""


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
    return sum(numbers(path) for path in _files(folder, ".safetensors"))


def numbers(path: Path) -> int:
    """Numbers in one safetensors file, from its header. Raises CorruptWeights."""
    return sum(_count(entry["shape"]) for name, entry in read_header(path).items() if name != "__metadata__")


def fingerprint(folder: Path) -> str:
    """Twelve hex digits that tell these weights from others, without reading every byte.

    From SHA256SUMS when there is one; else from each weight file's size, header and 16 samples of 16 KiB, so
    that two trainings of the same network differ.
    """
    digest = hashlib.sha256()
    listed = sums(folder)
    for path in _files(folder, ".safetensors"):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode())
        if name in listed:
            digest.update(listed[name].encode())
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
