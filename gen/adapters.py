"""Low-rank adapters by name: those that are published, those in GEN_HOME/loras, and any by its path.

A request holds them as text: one name, or a list of NAME=SCALE. What can be told from headers alone is told
here, before torch or any weights are loaded: whether a file is a LoRA, and which weights it fits. Merging is
in `pipelines.lora`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen.errors import GenError, did_you_mean
from pipelines import lora_keys  # needs no torch
from weights import registry, store

if TYPE_CHECKING:
    from gen.request import Input

LEAST, MOST = -2.0, 2.0  # scales of one adapter
MOST_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One adapter of a request."""

    name: str  # of a published or a local one, or an absolute path
    scale: float  # its own, times that of all


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the header of an adapter's file tells."""

    file: Path
    style: str  # one of lora_keys.STYLES
    pairs: Mapping[str, lora_keys.Shapes]  # by the names in the file
    keys: Mapping[str, tuple[str, str]]
    text: tuple[str, ...]  # keys for text encoders, which are left out
    base: str  # the weights that it says it was made for; empty when it says nothing

    @property
    def ranks(self) -> list[int]:
        return sorted({down[0] for down, _ in self.pairs.values()})

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size

    @property
    def seems_for(self) -> str:
        return lora_keys.seems_for(self.pairs, self.base)


def home() -> Path:
    """The folder of one's own adapters: NAME/ with a file in it, or NAME.safetensors."""
    return store.home() / "loras"


def published() -> list[str]:
    """Names of all published ones, here or not."""
    return [key for key, row in registry.CHECKPOINTS.items() if row.adapts]


def local() -> dict[str, Path]:
    """Name -> place, of those in `home`."""
    found: dict[str, Path] = {}
    for path in sorted(home().iterdir()) if home().is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir() and any(path.glob("*.safetensors")):
            found[path.name] = path
        elif path.suffix == ".safetensors":
            found.setdefault(path.stem, path)
    return found


def names() -> tuple[str, ...]:
    """Those that can be named here: published ones that are installed, then one's own."""
    return (*(key for key in published() if store.find(key)), *local())


def place(name: str) -> Path:
    """The folder or file that a name or path means. Raises not_installed for a published one that is not
    here."""
    if name in published():
        folder = store.find(name)
        if folder is None:
            message = f"The adapter {name} is not on this machine."
            raise GenError(message, f"Get it: gen pull {name}", "not_installed")
        return folder
    return local().get(name) or Path(os.path.expanduser(name)).absolute()


def facts(name: str) -> Facts:
    """Read an adapter's header. Raises GenError: not_installed, bad_input."""
    try:
        return _facts(place(name))
    except ValueError as error:  # CorruptWeights are too
        known = (*published(), *local())
        hint = did_you_mean(name, known) or f"`gen lora list` shows those with a name: {', '.join(known)}."
        raise GenError(f"The LoRA cannot be used: {error}.", hint, "bad_input") from error


def _facts(path: Path) -> Facts:
    file = lora_keys.adapter_file(path)
    if not os.path.isfile(file):
        raise store.CorruptWeights(f"{file}: this file is missing")
    header = store.read_header(file)
    metadata = header.pop("__metadata__", {})
    keys = lora_keys.parse(header, str(file))
    config: Mapping[str, Any] = {}
    if keys.style == lora_keys.PEFT:
        store.verify_adapter(file)
        config = json.loads(file.with_name(lora_keys.CONFIG).read_text(encoding="utf-8"))
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    return Facts(
        file=file,
        style=keys.style,
        pairs={layer: (shapes[slot.down], shapes[slot.up]) for layer, slot in keys.slots.items()},
        keys={layer: (slot.down, slot.up) for layer, slot in keys.slots.items()},
        text=keys.text,
        base=str(config.get("base_model_name_or_path") or metadata.get("base_model") or ""),
    )


def fingerprint(file: Path) -> str:
    """Twelve hex digits of an adapter's numbers, and of the configuration that scales them."""
    digest = hashlib.sha256()
    for path in (file, file.with_name(lora_keys.CONFIG)):
        if path.is_file():
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


# --- in requests ---------------------------------------------------------------------------------------


def check(of: Input, value: Any) -> str | list[str] | None:
    """The normal form of one adapter or several: a name alone, or a list of NAME=SCALE; None for none.

    Takes a name or path, either with =SCALE, or a list of them. Raises GenError: bad_input, not_installed.
    """
    given = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str | os.PathLike) for one in given):
        shown = f"{value!r}"[:60]
        raise of.error(f"{of.label} must be a name or a path, or a list of them, not {shown}.", f"{of.help}.")
    found: dict[str, float | None] = {}
    for one in filter(os.fspath, given):
        name, scale = split(of, os.fspath(one))
        if not name:
            raise of.error(f"{of.label} {str(one)!r} names nothing.", "Write NAME or NAME=SCALE.")
        facts(name)
        name = name if name in (*published(), *local()) else str(place(name))
        if name in found:
            raise of.error(f"{of.label} {name} is named twice.", f"Give it one scale: {name}=0.8")
        found[name] = scale
    if len(found) > MOST_AT_ONCE:
        message = f"{len(found)} LoRAs are too many; the most at once is {MOST_AT_ONCE}."
        raise of.error(message, "Fuse some: gen lora fuse")
    if len(found) == 1 and None in found.values():
        return next(iter(found))
    return [f"{name}={1.0 if scale is None else scale!r}" for name, scale in found.items()] or None


def split(of: Input, text: str) -> tuple[str, float | None]:
    """NAME=SCALE in two; a name or path that has a = in it is left whole. Raises bad_input."""
    name, equals, number = text.rpartition("=")
    if not equals or text in (*published(), *local()) or os.path.exists(os.path.expanduser(text)):
        return text.strip(), None
    try:
        scale = float(number)
    except ValueError:
        hint = "Write NAME=SCALE, such as stars=0.8."
        raise of.error(f"{of.label} '{text[:60]}': {number[:30]!r} is no number.", hint) from None
    if not math.isfinite(scale) or not LEAST <= scale <= MOST:
        hint = f"Give a number, {LEAST:g} to {MOST:g}."
        raise of.error(f"{of.label} '{text[:60]}': the scale {number[:30]} is out of range.", hint)
    return name.strip(), scale


def sent(of: Input, value: Any) -> Any:
    """What a stranger may send: names of what is listed here, and no paths. Raises bad_input."""
    given = value if isinstance(value, list) else [value]
    choices = of.choices or ()
    for one in given:
        if one in (None, "") or one in choices:
            continue
        if isinstance(one, str) and one.rpartition("=")[0].strip() in choices:
            continue
        known = ", ".join(choices) or "none are installed"
        raise of.error(f"{of.label} cannot be {str(one)[:60]!r}.", f"Those that can be named here: {known}.")
    return value


def wanted(inputs: Mapping[str, Any]) -> tuple[Wanted, ...]:
    """The adapters of a request's inputs, in order."""
    held, all_of_them = inputs.get("lora"), inputs.get("lora_scale", 1.0)
    if held is None:
        return ()
    if isinstance(held, str):
        return (Wanted(name=held, scale=all_of_them),)
    pairs = (one.rpartition("=") for one in held)
    return tuple(Wanted(name=name, scale=float(scale) * all_of_them) for name, _, scale in pairs)


def check_fit(inputs: Mapping[str, Any], folder: Path) -> None:
    """Raise bad_input, listing keys, unless each adapter of the inputs fits the weights in the folder."""
    for one in wanted(inputs):
        if problem := misfit(facts(one.name), folder):
            raise GenError(
                f"The LoRA cannot be merged into these weights: {problem}.",
                "Take weights that it is made for (`gen lora show` tells), or leave --lora out.",
                "bad_input",
            )


def misfit(of: Facts, folder: Path) -> str:
    """Why an adapter cannot be merged into the weights in this folder; empty when it can."""
    try:
        layers = _layers(folder / "transformer")
        if not layers:
            return f"{folder / 'transformer'} holds no plain weights; LoRA is merged before quantising"
        lora_keys.places(of.pairs, layers, str(of.file), of.keys, of.base)
    except ValueError as error:
        return str(error)
    return ""


def _layers(folder: Path) -> dict[str, lora_keys.Shape]:
    """Linear and convolution layers of a network -> shapes of their weights, from headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, entry in store.read_header(path).items():
            shape = () if key == "__metadata__" else tuple(entry["shape"])
            table = key.endswith(("embedding_table.weight", "embed_tokens.weight"))
            if key.endswith(".weight") and len(shape) in (2, 4) and not table and entry["dtype"] != "I8":
                found[_COPIES.sub("", key.removesuffix(".weight"))] = shape
    return found


# Published DiTs repeat their embedders in each block; networks of ours have them once.
_COPIES = re.compile(r"^transformer_blocks\.\d+\.norm1\.emb\.(?=timestep_embedder\.)")


def remarks(inputs: Mapping[str, Any], row: registry.Checkpoint) -> Iterator[str]:
    """Sentences about adapters that are merged, though perhaps not as was meant."""
    here = "" if row.is_toy else lora_keys.kin(f"{row.repo_id} {row.key}")
    for one in wanted(inputs):
        found = facts(one.name)
        if found.text:
            yield (
                f"LoRA {one.name}: {len(found.text)} tensors for a text encoder are left out, only the "
                "transformer is adapted."
            )
        said = lora_keys.kin(found.base)
        if said and here and said != here:
            yield (
                f"LoRA {one.name} says that it was made for {said} ({found.base}), and these weights are "
                f"{here}: it may do nothing good."
            )


# --- listing -------------------------------------------------------------------------------------------


def describe(name: str) -> dict[str, Any]:
    """All about an adapter as JSON; `problem` is why it cannot be used, if it cannot."""
    where = "published" if name in published() else "local" if name in local() else "path"
    about: dict[str, Any] = {"name": name, "where": where, "installed": True, "problem": ""}
    if where == "published":
        row = registry.CHECKPOINTS[name]
        about |= {"summary": row.summary, "licence": row.licence}
        if store.find(name) is None:
            hint = f"not on this machine: gen pull {name}"
            return about | {"installed": False, "problem": hint, "for": row.adapts}
    try:
        found = facts(name)
    except GenError as error:
        return about | {"problem": error.message}
    fits, seems = fitting(found), found.seems_for
    return about | {
        "file": str(found.file),
        "style": found.style,
        "ranks": found.ranks,
        "layers": len(found.pairs),
        "bytes": found.bytes,
        "fingerprint": fingerprint(found.file),
        "base": found.base,
        "seems_for": seems,
        "fits": [reference for reference, problem in fits.items() if not problem],
        "fits_not": {reference: problem for reference, problem in fits.items() if problem},
        "left_out": list(found.text),
    }


def fitting(of: Facts) -> dict[str, str]:
    """MODEL:TAG of all installed weights that take adapters -> why this one does not fit, or ""."""
    from gen import catalog

    found = {}
    for row in catalog.MODELS.values():
        if not any(one.kind == "lora" for one in row.inputs):
            continue
        for tag in catalog.installed(row):
            folder = store.find(row.weights[tag])
            assert folder is not None
            found[f"{row.name}:{tag}"] = misfit(of, folder)
    return found


# --- fusing --------------------------------------------------------------------------------------------


def fuse(
    reference: str,  # "pixart-sigma:toy"
    held: str | list[str],  # as `check` gives it
    output: Path,
    dtype: str = "keep",  # of the transformer that is written; keep: as it is stored
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the weights with adapters merged into them: a whole folder that needs no adapter any more.

    Sums are rounded to the dtype; drawing with adapters in float32 rounds less than a file of halves.

    Raises GenError: bad_input, not_installed, corrupt_weights, disk_full, output_not_writable; then nothing
    is written.
    """
    from gen import catalog, library, loader

    row, tag = catalog.find(reference)
    tag, about, folder = catalog.choose(row, tag)
    if not any(one.kind == "lora" for one in row.inputs):
        raise catalog.not_taken(row, "lora")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise GenError(
            f"{output} is there already.", "Choose another --output, or move it away.", "bad_input"
        )
    inputs = {"lora": held}
    check_fit(inputs, folder)
    for words in remarks(inputs, about):
        report(words)
    report(f"reading {folder / 'transformer'}")
    with loader.explained(folder):
        store.verify(folder)
        network = _transformer(folder / "transformer", dtype)
    layers = loader.merge(network, wanted(inputs))
    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        report(f"writing {output}")
        shutil.copytree(folder, building, ignore=shutil.ignore_patterns("transformer", store.SUMS))
        network.save_pretrained(building / "transformer")
        store.write_sums(building)
        if output.exists():
            output.rmdir()
        building.rename(output)
    except OSError as error:
        raise library.disk_error(error, output) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {
        "folder": str(output),
        "model": row.name,
        "weights": tag,
        "loras": recipe(wanted(inputs)),
        "layers": layers,
        "fingerprint": store.fingerprint(output),
    }


def _transformer(folder: Path, dtype: str) -> Any:
    import torch

    from pipelines import components

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = None if dtype == "keep" else getattr(torch, dtype)
    try:
        return components.load(folder, config["_class_name"], torch_dtype=kind)
    except ValueError as error:  # whole files, and yet they do not fit together
        raise store.CorruptWeights(str(error)) from error


def recipe(of: Sequence[Wanted]) -> list[dict[str, Any]]:
    """What a recipe says of adapters: which bytes they were, and how much of them was added."""
    return [
        {"name": one.name, "scale": one.scale, "fingerprint": fingerprint(facts(one.name).file)} for one in of
    ]


def changed(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """A sentence for each adapter that is not the one of a recipe's `weights`, older recipes included."""
    then = {one["name"]: one["fingerprint"] for one in weights.get("loras", ())}
    now = wanted(inputs)
    files = {one.name: facts(one.name).file for one in now}
    here = {name: fingerprint(file) for name, file in files.items()}
    if not then and (old := weights.get("lora_fingerprint")):  # of the one folder, without its configuration
        name = next(iter(files), "")
        then, here = {name: old}, {name: store.fingerprint(files[name].parent)} if files else {}
    return [
        f"the LoRA{f' {name}' if len(then) > 1 else ''} is not that of then "
        f"({one}, now {here.get(name, 'none')}): expect another picture"
        for name, one in then.items()
        if here.get(name) != one
    ]
