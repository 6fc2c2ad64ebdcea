"""`gen convert`: an official checkpoint to a folder that pipelines read, or a list of what does not fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gen.errors import GenError

DTYPES = ("keep", "float32", "bfloat16", "float16")


def convert_file(
    path: Path,
    family: str,
    output: Path,
    *,
    config: Path | None = None,
    companions: Path | None = None,
    dtype: str = "keep",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the networks of checkpoint `path` under `output`, one folder each; returns what was found.

    `config`: a JSON file in the words of the official configurations, for what shapes do not tell; for clouds
    of points also "category", "mean" and "std", see `_clouds`.
    `companions`: a pipeline folder whose other parts (autoencoder, text encoder, scheduler) are copied too.

    Raises GenError: bad_input, corrupt_weights, output_not_writable. Nothing is written unless every tensor
    of the checkpoint has found its place, and every place its tensor.
    """
    if not path.is_file():
        raise GenError(f"There is no file {path}.", "Check the name.", "bad_input")
    given = read_config(config)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise GenError(
            f"{output} is there already.", "Choose another --output, or move it away.", "bad_input"
        )
    if companions is not None and not (companions / "model_index.json").is_file():
        raise GenError(
            f"{companions} holds no pipeline: it has no model_index.json.",
            "Give the folder of a complete pipeline, e.g. of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers.",
            "bad_input",
        )
    from weights import convert
    from weights.store import CorruptWeights

    report(f"reading {path}")
    try:
        converted = convert.convert(convert.read_checkpoint(path), family, given)
        networks = {part.name: _build(part) for part in converted.parts}
        whole = PIPELINES[family](networks, given, report) if family in PIPELINES and not companions else None
    except CorruptWeights as error:
        raise GenError(f"{error}.", "Fetch the file again, from its publisher.", "corrupt_weights") from error
    except (convert.ConversionError, ValueError, TypeError) as error:
        raise GenError(
            f"{path.name} was not converted: {error}.",
            "Is --as right? What shapes do not tell can be said with --config FILE.json.",
            "bad_input",
        ) from error
    _write(networks, output, companions, dtype, report, whole)
    return {
        "file": str(path),
        "family": family,
        "folder": str(output),
        "tensors": converted.tensors,
        "converted": converted.tensors - len(converted.dropped),
        "computed": list(converted.dropped),
        "missing": [],
        "unused": [],
        "parameters": {
            name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()
        },
        **converted.facts,
    }


def read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenError(f"{path} cannot be read: {error}.", "Give a JSON file.", "bad_input") from error
    if not isinstance(entries, dict):
        raise GenError(f"{path} must hold a JSON object.", 'For example {"num_heads": 16}.', "bad_input")
    return entries


def _build(part: Any) -> Any:
    """The network with its numbers; costs no memory beyond the checkpoint's."""
    from pipelines import components

    network_class: Any = components.resolve(components.PARTS[part.class_name].ours)
    network = network_class.empty(network_class.config_class(**part.config))
    network.check_state(part.state, Path(part.name))
    network.load_state_dict(part.state, strict=True, assign=True)
    return network


def _clouds(networks: dict[str, Any], given: Mapping[str, Any], report: Callable[[str], None]) -> Any:
    """A pipeline of clouds, with the published noise. `given` says what no checkpoint does: the names of the
    classes ("category", as many as there are) and the units of the data ("mean" of x, y, z and "std").

    Raises ValueError for names and units that cannot be.
    """
    from gen import shapenet

    names = given.get("category", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"category must be a name or a list of names, not {names!r}")
    if not names:
        report("--config says no category: classes go by number")
    if not {"mean", "std"} <= given.keys():
        report("--config says no mean and std of the data: clouds come around 0 with a spread of 1")
    units = given.get("mean", [0.0, 0.0, 0.0]), given.get("std", 1.0)
    return shapenet.assemble(networks["transformer"], shapenet.build_scheduler(names), names, units)


# Families whose networks, with what --config says, are all that a pipeline needs
PIPELINES: Mapping[str, Callable[[dict[str, Any], Mapping[str, Any], Callable[[str], None]], Any]] = {
    "dit-3d": _clouds
}


def _write(
    networks: dict[str, Any],
    output: Path,
    companions: Path | None,
    dtype: str,
    report: Callable[[str], None],
    whole: Any = None,  # the pipeline that they make up
) -> None:
    """Build beside the place, then move: a folder is whole or not there."""
    import torch

    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        for name, network in networks.items():
            report(f"writing {output / name}")
            network = network if dtype == "keep" else network.to(getattr(torch, dtype))  # the same module
            if whole is None:
                network.save_pretrained(building / name)
        if whole is not None:
            whole.save_pretrained(building)
        if companions is not None:
            shutil.copytree(
                companions, building, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*networks)
            )
        if output.exists():
            output.rmdir()
        building.rename(output)
    except OSError as error:
        code = "disk_full" if error.errno == 28 else "output_not_writable"
        raise GenError(
            f"{output} cannot be written: {error.strerror}.", "Choose another --output.", code
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
