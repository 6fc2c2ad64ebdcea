"""The parts of a pipeline folder: which class reads which, and reading them.

Parts named in `model_index.json` are looked up in a table, so a folder cannot name code to run. Where a part
has a class of ours and one of the libraries', ours is taken when it covers the configuration: it computes the
same numbers (tests compare them) and saves importing the library, which takes longer than a small picture.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.models.network import read_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class NotOffloadable(ValueError):
    """A part whose class has no way to leave its weights elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One class that a folder may name. Classes are "module:name", imported when needed."""

    ours: str = ""
    theirs: str = ""
    config: str = "config.json"
    kind: str = "model"  # what it is loaded as: "model", "tokenizer" or "scheduler"


def _scheduler(name: str, ours: str = "") -> Part:
    return Part(ours=ours, theirs=f"diffusers:{name}", config="scheduler_config.json", kind="scheduler")


_TOKENIZER = Part(
    ours="pipelines.tokenizer:Tokenizer",
    theirs="transformers:AutoTokenizer",
    config="tokenizer_config.json",
    kind="tokenizer",
)
_PIXART = Part(ours="pipelines.models.pixart:PixArtTransformer2DModel")

PARTS: Mapping[str, Part] = {
    "PixArtTransformer2DModel": _PIXART,
    "Transformer2DModel": _PIXART,  # what it was called when the checkpoints were published
    "PixArtControlNet": Part(ours="pipelines.models.pixart_control:PixArtControlNet"),
    "DiTTransformer2DModel": Part(ours="pipelines.models.dit:DiTTransformer2DModel"),
    "HED": Part(ours="pipelines.models.hed:HED"),
    "DiT3DModel": Part(ours="pipelines.models.dit3d:DiT3DModel"),
    "AutoencoderKL": Part(
        ours="pipelines.models.autoencoder:AutoencoderKL", theirs="diffusers:AutoencoderKL"
    ),
    "T5EncoderModel": Part(ours="pipelines.models.t5:T5EncoderModel", theirs="transformers:T5EncoderModel"),
    "T5Tokenizer": _TOKENIZER,
    "T5TokenizerFast": _TOKENIZER,
    "PreTrainedTokenizerFast": _TOKENIZER,
    "DPMSolverMultistepScheduler": _scheduler(
        "DPMSolverMultistepScheduler", "pipelines.dpm_solver:DPMSolver"
    ),
    "LearnedRangeScheduler": Part(
        ours="pipelines.learned_range:LearnedRangeScheduler",
        config="scheduler_config.json",
        kind="scheduler",
    ),
    "PointDiffusion": Part(
        ours="pipelines.point_diffusion:PointDiffusion", config="scheduler_config.json", kind="scheduler"
    ),
    "LCMScheduler": _scheduler("LCMScheduler", "pipelines.lcm:LCMSolver"),
    "DDPMScheduler": _scheduler("DDPMScheduler", "pipelines.lcm:OneStep"),  # ours if it names one timestep
    **{
        name: _scheduler(name)
        for name in (
            "DDIMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        )
    },
}


def resolve(name: str) -> Any:
    """ "module:Class" to the class."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def read_index(folder: Path, families: str | tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
    """Part -> class name, from model_index.json, whose `_class_name` is one of the families.

    Raises ValueError: the file is missing, belongs to another family, or does not list all parts.
    """
    index = read_json(folder / "model_index.json")
    family = index.get("_class_name")
    families = (families,) if isinstance(families, str) else families
    if family not in families:
        raise ValueError(f"{folder} holds a {family}, not a {' or '.join(families)}")
    classes = {}
    for name in names:
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ValueError(f"{folder / 'model_index.json'} lists no {name}")
        if entry[1] not in PARTS:
            raise ValueError(f"{folder / 'model_index.json'}: {name} is a {entry[1]}, which is not supported")
        classes[name] = entry[1]
    return classes


def write_index(
    folder: Path, pipeline: str, classes: Mapping[str, tuple[str, str]], more: Mapping[str, Any] | None = None
) -> None:
    """model_index.json, as diffusers writes it: part -> (library, class), and entries that are no parts."""
    entries: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    entries |= {name: list(entry) for name, entry in sorted(classes.items())}
    entries |= more or {}
    (folder / "model_index.json").write_text(json.dumps(entries, indent=2) + "\n")


def load_all(
    folder: Path, classes: Mapping[str, str], *, offload: Mapping[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """All parts of a pipeline's folder: `classes` as `read_index` gives them, `options` as `load` takes them,
    `offload` the names of those whose large layers stay elsewhere, and where.

    Raises ValueError as `load` does, and when the VAE's latents are not those that the transformer draws.
    """
    loaded = {
        name: load(folder / name, class_name, offload=(offload or {}).get(name), **options)
        for name, class_name in classes.items()
    }
    channels, drawn = loaded["vae"].config.latent_channels, loaded["transformer"].config.in_channels
    if channels != drawn:
        raise ValueError(f"{folder}: the VAE has {channels} latent channels, the transformer draws {drawn}")
    return loaded


def load(
    folder: Path,
    class_name: str,
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    own: bool = True,
    offload: str | None = None,
) -> Any:
    """One part from its folder. `own` False takes the library's class wherever there is one; `offload` leaves
    a network's large layers in the "file" or on the "host" until they are called: see `pipelines.streaming`.

    Raises ValueError: the folder or a file in it is missing or does not fit, or the class is the library's
    and cannot be offloaded.
    """
    part = PARTS[class_name]
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing")
    entries = read_json(folder / part.config)
    class_ = _choose(part, entries, folder, own)
    if part.kind != "model":
        return class_.from_pretrained(folder)
    if class_.__module__.startswith("pipelines."):
        return class_.from_pretrained(folder, torch_dtype=torch_dtype, device=device, offload=offload)
    if offload is not None:
        raise NotOffloadable(f"{folder}: a {class_.__name__} of the library cannot be offloaded")
    try:
        # Never pickles, and never a look at the network for a file that is not there.
        options = {"use_safetensors": True, "local_files_only": True}
        model = class_.from_pretrained(folder, torch_dtype=torch_dtype or "auto", **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return model.to(device).eval()


def _choose(part: Part, entries: Mapping[str, Any], folder: Path, own: bool) -> Any:
    if part.ours and (own or not part.theirs):
        class_ = resolve(part.ours)
        arguments = (entries, folder) if part.kind == "tokenizer" else (entries,)
        if not part.theirs or class_.supports(*arguments):
            return class_
        log.info("%s: %s does not cover this configuration, taking %s", folder, part.ours, part.theirs)
    return resolve(part.theirs)
