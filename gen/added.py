"""`gen add`: weights of one's own under a tag of one's own, used where they lie.

Everything that can be told without reading tensors is checked here: that files are whole, that every name has
its place and every tensor the shape that the network wants, and that the parts fit together. The table itself
is in weights.added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen import catalog
from gen.convert import read_config
from gen.errors import GenError
from weights import added, convert, registry, store
from weights.added import NAMES, NETWORK, TAG, Added
from weights.store import CorruptWeights

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
LORA = ("lora_A", "lora_B", "lora_up", "lora_down", ".lora.", "lora_unet")
FLOATS = ("F64", "F32", "BF16", "F16")
FACTOR = 8  # pixels to a latent, of all published autoencoders
# Length of captions that a checkpoint stores -> its family: that tells Sigma from alpha
CAPTIONS = {300: "pixart-sigma", 120: "pixart-alpha"}
# Family of a transformer -> model, class of pipeline, tokens of a prompt
FAMILIES = {
    "pixart-sigma": ("pixart-sigma", "PixArtSigmaPipeline", 300),
    "pixart-alpha": ("pixart-delta", "PixArtAlphaPipeline", 120),
}
TOKENS = {pipeline: tokens for _, pipeline, tokens in FAMILIES.values()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was added, and what is to be said about it."""

    row: Added
    layout: str  # "folder", "official" or "diffusers"
    parts: Mapping[str, Path]
    left_out: tuple[str, ...] = ()  # tensors of other networks in the file

    def to_json(self) -> dict[str, Any]:
        facts = self.row.checkpoint
        return {
            "name": self.row.reference,
            "path": str(self.row.path),
            "layout": self.layout,
            "native_size": facts.native_size,
            "parameters": facts.parameters,
            "bytes": sum(size for size, _ in self.row.stamps.values()),
            "parts": {name: str(folder) for name, folder in sorted(self.parts.items())},
            "left_out": list(self.left_out),
            "licence": facts.licence,
            "toy": facts.is_toy,
        }


def add(
    path: Path,
    name: str | None = None,  # MODEL:TAG, or TAG; what is left out is told from the files
    *,
    companion: str | None = None,  # folder or MODEL:TAG with the other parts, for a single file
    size: int | None = None,  # pixels per side of the native picture, where the files do not say
    config: Path | None = None,  # for a single file: what shapes do not tell, in the official words
    licence: str | None = None,
    report: Callable[[str], None] = lambda words: None,
) -> Found:
    """Add a folder of diffusers or a .safetensors file to a model, in place. Nothing is copied.

    Raises GenError: bad_input, unknown_model, corrupt_weights, not_installed, output_not_writable, disk_full.
    """
    path = path.expanduser().absolute()
    model, tag = _named(name, path)
    with _explained(path):
        if path.is_dir():
            if companion or config:
                raise GenError(
                    f"{path} is a folder, which has all its parts and says what they are.",
                    "Leave --with and --config out; they are for single files.",
                    "bad_input",
                )
            found = _folder(path, model, tag, size)
        else:
            _check_file(path)
            found = _file(path, model, tag, size, companion, read_config(config), report)
        one = found.row
        if licence:
            facts = {**one.facts, "licence": licence}
            found = Found(**vars(found) | {"row": Added(**vars(one) | {"facts": facts})})
        _check_free(one.model, one.tag)
        return _kept(found)


def forget(model: str, tag: str) -> Added:
    """Take added weights off the list. Their files stay. Raises unknown_model."""
    try:
        return added.forget(model, tag)
    except KeyError:
        row, _ = catalog.find(model)
        known = ", ".join(tag for tag in row.weights if tag not in catalog.published(row)) or "none"
        raise GenError(
            f"No weights were added as {model}:{tag}.", f"Added to {model}: {known}.", "unknown_model"
        ) from None
    except CorruptWeights as error:
        raise GenError(f"{error}.", "Move the file away.", "corrupt_weights") from error
    except OSError as error:
        from gen import library

        raise library.disk_error(error, store.home()) from error


@contextmanager
def _explained(path: Path) -> Any:
    """What is expected to be wrong with files, as GenError."""
    try:
        yield
    except CorruptWeights as error:
        raise GenError(f"{error}.", "Fetch the file again, from its publisher.", "corrupt_weights") from error
    except convert.ConversionError as error:
        raise GenError(
            f"{path.name} cannot be used: {error}.",
            "Is it a PixArt transformer? What shapes do not tell can be said: --as, --size, --config.",
            "bad_input",
        ) from error


# --- names ----------------------------------------------------------------------------------------


def _named(name: str | None, path: Path) -> tuple[str | None, str]:
    """The model, if it is said, and the tag: said, or made of the file's name."""
    model, colon, tag = (name or "").rpartition(":")
    if colon:
        catalog.find(model)  # raises unknown_model
    if not name:
        alone = path.suffix.lower() == ".safetensors"
        stem = path.stem if alone else path.name
        stem = path.parent.name if stem in ("diffusion_pytorch_model", "model", "transformer") else stem
        tag = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:40].rstrip("-._")
    if not TAG.fullmatch(tag):
        raise GenError(
            f"'{tag[:60]}' is no tag: letters, digits and . _ - are, at most 40 of them, a letter or digit "
            "first.",
            "Say another, e.g. --as pixart-sigma:mine",
            "bad_input",
        )
    return model or None, tag


def _check_free(model: str, tag: str) -> None:
    row, _ = catalog.find(model)
    if tag in catalog.published(row):
        raise GenError(
            f"{model}:{tag} is the name of published or embedded weights.",
            f"Choose another tag: --as {model}:my-{tag}"[:120],
            "bad_input",
        )
    if tag in row.weights:
        where = store.checkpoint(row.weights[tag]).folder
        raise GenError(
            f"{model}:{tag} is there already: {where}.",
            f"Choose another tag, or forget that one first: gen rm {model}:{tag}",
            "bad_input",
        )


# --- folders --------------------------------------------------------------------------------------


def _folder(path: Path, model: str | None, tag: str, size: int | None) -> Found:
    """A pipeline as diffusers writes it."""
    if not (path / "model_index.json").is_file():
        raise _no_pipeline(path)
    if path.suffix.lower() == ".safetensors":  # which tells files from folders in the table
        raise GenError(f"{path.name} is a folder with the name of a file.", "Rename it.", "bad_input")
    family = store.family(path)
    rows = [row for row in catalog.MODELS.values() if family in _families(row)]
    if not rows:
        known = sorted({name for row in catalog.MODELS.values() for name in _families(row)})
        raise GenError(
            f"{path} holds a {family or 'pipeline without a name'}, which no model here draws with.",
            f"What can be added: {', '.join(known)}.",
            "bad_input",
        )
    walk = added.walk_of(path / "scheduler")
    if model is None:
        # PixArt of either family: what is distilled or has a control branch is pixart-delta's
        wanted = "pixart-delta" if walk or (path / "controlnet").is_dir() else rows[0].name
        model = next((row.name for row in rows if row.name == wanted), rows[0].name)
    elif model not in [row.name for row in rows]:
        raise GenError(
            f"{path} holds a {family}, and {model} cannot draw with it.",
            f"Add it to {' or '.join(row.name for row in rows)}.",
            "bad_input",
        )
    store.verify(path, checksums=False)
    network = store._json(path / "transformer" / "config.json")
    facts: dict[str, Any] = {
        "summary": f"Yours, in {path}",
        "licence": "not known here",
        "pipeline": family,
        "walk": walk,
        "is_toy": (path / "toy.json").is_file(),
        "parameters": store.parameters(path / "transformer"),
    }
    if family in TOKENS:
        facts["max_tokens"] = TOKENS[family]
    if (path / "vae").is_dir():
        facts |= _sizes(network, path / "vae", size, free=family in TOKENS)
    base = _nearest(model, facts.get("native_size", 0), walk)
    one = Added(
        model=model,
        tag=tag,
        path=path,
        base=base.key,
        facts=facts,
        stamps=added.stamps(path),
        written=_mended(path, network) if family in TOKENS else {},
    )
    return Found(row=one, layout="folder", parts={})


def _families(row: catalog.Model) -> list[str]:
    """Classes of pipelines whose folders a model reads, as their index names them; its own first."""
    own = row.pipeline.rpartition(":")[2]
    return [own, *(registry.CHECKPOINTS[key].pipeline for key in catalog.published(row).values())]


def _no_pipeline(path: Path) -> GenError:
    if (path / "adapter_config.json").is_file():
        return _lora(path)
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("transformer/*.safetensors"))
    hint = (
        f"A transformer alone is added as a file: gen add {files[0]}"
        if files
        else "Give the folder of a complete pipeline as diffusers writes it, or one .safetensors file."
    )
    return GenError(f"{path} holds no pipeline: it has no model_index.json.", hint, "bad_input")


def _mended(path: Path, network: Mapping[str, Any]) -> dict[str, str]:
    """The configuration of the transformer with what published files leave to the reader: whether it is told
    the size of the picture. The tensors tell."""
    if network.get("use_additional_conditions") is not None:
        return {}
    micro = any(".resolution_embedder." in name for name in _shapes(path / "transformer"))
    if micro == (network.get("sample_size") == 128):  # what diffusers takes it for
        return {}
    config = {**network, "use_additional_conditions": micro}
    return {"transformer/config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}


def _nearest(model: str, size: int, walk: str) -> registry.Checkpoint:
    """The row of the registry that is most like it: of this walk, then of this size, and rather no toy."""
    rows = [registry.CHECKPOINTS[key] for key in catalog.published(catalog.MODELS[model]).values()]
    return min(
        rows,
        key=lambda row: (
            row.walk != walk,
            row.is_toy,
            not row.pipeline,
            row.family == "pixart-control",
            abs(row.native_size - size),
        ),
    )


def _sizes(network: Mapping[str, Any], vae: Path, size: int | None, free: bool) -> dict[str, int]:
    """Facts about sizes in pixels. `free`: it draws others than its native one."""
    factor = _factor(vae)
    native = size or int(network.get("sample_size") or 0) * factor
    if native < 1:
        raise GenError("The transformer does not say what size it draws.", "Say it: --size 512", "bad_input")
    patch = int(network.get("patch_size") or 2)
    # For sizes with published bins the pipeline draws the nearest bin and crops.
    multiple = factor if native in (256, 512, 1024, 2048) else factor * patch
    if not free:
        return {"native_size": native, "smallest": native, "largest": native, "size_multiple": factor * patch}
    least = max(multiple, native // 2 // multiple * multiple)
    return {"native_size": native, "smallest": least, "largest": native * 2, "size_multiple": multiple}


def _factor(vae: Path) -> int:
    """Pixels per side of a latent."""
    return int(2 ** (len(store._json(vae / "config.json").get("block_out_channels") or [0] * 4) - 1))


# --- single files ---------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    """Raises bad_input for what is no .safetensors file."""
    ending = path.suffix.lower()
    if not path.exists():
        raise GenError(f"There is no file or folder {path}.", "Check the name.", "bad_input")
    if ending in PICKLES:
        raise GenError(
            f"{path.name} is a pickle, which may hold code; weights are drawn from safetensors only.",
            f"Convert it first: gen convert {path} --as pixart-sigma --with FOLDER -o OUT, then gen add OUT",
            "bad_input",
        )
    if ending != ".safetensors":
        raise GenError(
            f"{path.name} is no .safetensors file.",
            "Give a folder of diffusers, or a .safetensors file in the official layout or ComfyUI's.",
            "bad_input",
        )


def _file(
    path: Path,
    model: str | None,
    tag: str,
    size: int | None,
    companion: str | None,
    given: dict[str, Any],
    report: Callable[[str], None],
) -> Found:
    """A transformer alone: official names, ComfyUI's, or those of diffusers."""
    header = {name: row for name, row in store.read_header(path).items() if name != "__metadata__"}
    shapes = {name: tuple(row["shape"]) for name, row in header.items()}
    _check_kind(path, header)
    family = _family(shapes, model)
    model = model or FAMILIES[family][0]
    if model not in ("pixart-sigma", "pixart-delta") or (model, family) == ("pixart-sigma", "pixart-alpha"):
        what = "PixArt-alpha" if family == "pixart-alpha" else "PixArt-Sigma"
        fits = FAMILIES[family][0]
        raise GenError(
            f"{path.name} is a transformer of {what}, and {model} cannot draw with it.",
            f"Add it to {fits}: --as {fits}:{tag}",
            "bad_input",
        )
    key, others = _companion(companion) if companion else ("", {})
    factor = _factor(others["vae"]) if "vae" in others else FACTOR
    if size is not None:
        if size < 1 or size % (2 * factor):
            raise GenError(f"Size {size} cannot be: it must be a multiple of {2 * factor}.", "", "bad_input")
        given = {**given, "input_size": size // factor}
    given = _beside(path) | given
    renaming = convert.pixart_names(shapes, family, given)
    walk = added.walk_of(others["scheduler"]) if "scheduler" in others else ""
    if key in registry.CHECKPOINTS:
        walk = registry.CHECKPOINTS[key].walk
    native = renaming.config["sample_size"] * factor
    base = _nearest(model, native, walk)
    if not companion:
        others = added.parts_of_base(base)
        _check_companions(base, model, others)
        report(f"the other parts are those of {base.key}")
    _check_fit(renaming.config, others)
    written = {"transformer/config.json": _config_text(renaming.config)}
    if any(targets != (name,) for name, targets in renaming.names.items()):
        written[f"transformer/{NAMES}"] = json.dumps(renaming.names)
    toy = key in added.rows() and store.checkpoint(key).is_toy
    toy = toy or any((folder.parent / "toy.json").is_file() for folder in others.values())
    facts = {
        "summary": f"Yours, in {path}",
        "licence": "not known here",
        "pipeline": FAMILIES[family][1],
        "walk": walk,
        "is_toy": toy,
        "parameters": sum(_count(shape) for shape in renaming.shapes.values()),
        "max_tokens": FAMILIES[family][2],
        **_sizes(renaming.config, others["vae"], None, free=True),
    }
    one = Added(
        model=model,
        tag=tag,
        path=path,
        base=base.key,
        facts=facts,
        stamps=added.stamps(path),
        companion=key,
        written=written,
    )
    return Found(row=one, layout=renaming.layout, parts=others, left_out=renaming.elsewhere)


def _check_kind(path: Path, header: Mapping[str, Any]) -> None:
    """Raises bad_input for files of another kind, saying what they are."""
    if any(mark in name for name in header for mark in LORA):
        raise _lora(path)
    for mark, words, family in (
        ("controlnet.", "a control branch", "pixart-control"),
        ("y_embedder.embedding_table.", "a DiT", "dit"),
    ):
        if any(mark in name for name in header):
            raise GenError(
                f"{path.name} holds {words}, and single files are added of PixArt transformers only.",
                f"Convert it, and add the folder: gen convert {path} --as {family} --with FOLDER -o OUT",
                "bad_input",
            )
    other = sorted({row["dtype"] for row in header.values()} - {*FLOATS})
    if other and convert.prefixes(header):
        raise GenError(
            f"{path.name} holds numbers as {', '.join(other)}, which are not drawn with here.",
            f"Take the file in {', '.join(FLOATS[1:])}; --quantize int8 makes it small again when drawing.",
            "bad_input",
        )


def _lora(path: Path) -> GenError:
    return GenError(
        f"{path.name} is a LoRA: changes to weights, and no weights.",
        f'Draw with it instead: gen run pixart-delta "a red cube" --lora {path}',
        "bad_input",
    )


def _family(shapes: Mapping[str, tuple[int, ...]], model: str | None) -> str:
    """pixart-sigma or pixart-alpha: by the captions' length, by what only alpha has, or as said."""
    for name, shape in shapes.items():
        if name.endswith("y_embedder.y_embedding") and shape[0] in CAPTIONS:
            return CAPTIONS[shape[0]]
        if "csize_embedder." in name or ".resolution_embedder." in name:
            return "pixart-alpha"
    if model is None and convert.prefixes(shapes):
        raise GenError(
            "Whether this is PixArt-Sigma or PixArt-alpha does not show in the file.",
            "Say it: --as pixart-sigma:TAG, or for alpha --as pixart-delta:TAG",
            "bad_input",
        )
    return "pixart-alpha" if model == "pixart-delta" else "pixart-sigma"


def _beside(path: Path) -> dict[str, Any]:
    """What a configuration of diffusers beside the file says, in the official words."""
    config = path.with_name("config.json")
    stored = store._json(config) if config.is_file() else {}
    if stored.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        return {}
    words = {
        "num_heads": "num_attention_heads",
        "input_size": "sample_size",
        "pe_interpolation": "interpolation_scale",
    }
    return {ours: stored[theirs] for ours, theirs in words.items() if stored.get(theirs) is not None}


def _companion(text: str) -> tuple[str, dict[str, Path]]:
    """What --with names: how it is remembered, and its parts."""
    folder = Path(text).expanduser().absolute()
    if folder.is_dir():
        key = str(folder)
    elif text in registry.CHECKPOINTS:
        key = text
    elif "/" in text:
        raise GenError(f"There is no folder {folder}.", "Check --with.", "bad_input")
    else:
        row, tag = catalog.find(text)
        tag = tag or next(iter([*catalog.installed(row), *row.weights]))
        key = row.weights[tag]
    parts = added.companion_parts(key)
    if lacking := [name for name in ("tokenizer", "text_encoder", "vae") if name not in parts]:
        raise GenError(
            f"{text} has no {' and no '.join(lacking)} on this machine.",
            "Give another with --with: a folder, or installed weights as MODEL:TAG."
            if key == str(folder)
            else f"Get it first: gen pull {text}",
            "not_installed",
        )
    return key, parts


def _check_companions(base: registry.Checkpoint, model: str, parts: Mapping[str, Path]) -> None:
    if lacking := [name for name in ("tokenizer", "text_encoder", "vae") if name not in parts]:
        tags = {key: tag for tag, key in catalog.published(catalog.MODELS[model]).items()}
        raise GenError(
            f"A single file holds the transformer alone, and no {' or '.join(lacking)} to go with it is on "
            "this machine.",
            f"Get them: gen pull {model}:{tags[base.key]}, or name a folder or weights that have them: "
            "--with FOLDER",
            "not_installed",
        )


def _check_fit(config: Mapping[str, Any], parts: Mapping[str, Path]) -> None:
    """Raises bad_input unless the text encoder and the autoencoder speak the transformer's sizes."""
    for part, entry, default, wanted, what in (
        ("text_encoder", "d_model", 512, "caption_channels", "wide captions"),
        ("vae", "latent_channels", 4, "in_channels", "latent channels"),
    ):
        has = store._json(parts[part] / "config.json").get(entry, default)
        if has != config[wanted]:
            raise GenError(
                f"The transformer reads {config[wanted]} {what}, and {parts[part]} gives {has}.",
                "Name parts that fit: --with FOLDER, or --with MODEL:TAG",
                "bad_input",
            )


def _config_text(config: Mapping[str, Any]) -> str:
    entries = {"_class_name": "PixArtTransformer2DModel", "_diffusers_version": "0.42.1", **config}
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"


# --- shapes ---------------------------------------------------------------------------------------


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a network's folder is loaded from. Raises CorruptWeights."""
    index = folder / f"{NETWORK}.index.json"
    names = [NETWORK]
    if not (folder / NETWORK).is_file() and index.is_file():
        names = sorted({str(name) for name in (store._json(index).get("weight_map") or {}).values()})
    if lacking := [name for name in names if not (folder / name).is_file()]:
        there = ", ".join(path.name for path in sorted(folder.glob("*.safetensors")))
        raise CorruptWeights(f"{folder / lacking[0]} is missing; variants are not read (there: {there})")
    renaming = store._json(folder / NAMES) if (folder / NAMES).is_file() else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in names:
        for name, row in store.read_header(folder / file).items():
            targets = () if name == "__metadata__" else renaming.get(name, [name])
            for target in targets:
                rows, *rest = row["shape"] or [1]
                shapes[target] = (rows // len(targets), *rest)
    return shapes


def _check_shapes(folder: Path, path: Path) -> None:
    """Raises bad_input when the transformer's tensors are not those that its configuration means."""
    from pipelines import components
    from pipelines.models.network import Network

    try:
        entry = store._json(folder / "model_index.json").get("transformer")
        part = components.PARTS.get(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None
        if part is None or not part.ours:
            raise ValueError(f"{folder / 'model_index.json'}: the transformer is a {entry!r}")
        network_class = components.resolve(part.ours)
        config = network_class.read_config(folder / "transformer")
        if network_class.rename is not Network.rename:
            return  # what older files mean shows when they are loaded
        rows = {name: convert.Rows(name, shape) for name, shape in _shapes(folder / "transformer").items()}
        network_class.empty(config).check_shapes(rows, path)
    except (ValueError, TypeError) as error:
        if isinstance(error, CorruptWeights):
            raise
        raise GenError(
            f"{path.name} cannot be used: {error}.",
            "The files do not fit together: are all of one model? --config FILE.json says what shapes do not "
            "tell.",
            "bad_input",
        ) from error


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _kept(found: Found) -> Found:
    """Written into the table, and its links made: what could go wrong later goes wrong now."""
    one = found.row
    try:
        added.put(one)
        try:
            folder = added.prepare(one)
            store.verify(folder, checksums=False)
            _check_shapes(folder, one.path)
        except BaseException:
            added.forget(one.model, one.tag)
            raise
    except OSError as error:
        from gen import library

        raise library.disk_error(error, store.home()) from error
    except ValueError as error:
        if isinstance(error, CorruptWeights):
            raise
        raise GenError(f"{error}.", "Choose another tag.", "bad_input") from error
    return found
