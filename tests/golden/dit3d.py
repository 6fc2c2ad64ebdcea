"""What the cases dit3d_* of a golden set hold, computed with our DiT-3D, its sampler and its metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from gen import point_metrics
from pipelines.models.dit3d import DiT3DModel, from_cubes
from pipelines.models.layers import time_features
from pipelines.models.voxels import devoxelize, voxel_coordinates, voxelize
from pipelines.point_diffusion import PointDiffusion
from tests.golden.dit import official_shapes as dit_shapes
from tests.golden.numbers import FORWARD, SAMPLING, Case, listed, read_meta
from tests.golden.pixart import build
from weights import convert


def official_shapes(model: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the official DiT-3D, for cases that do not list them."""
    D, p, C = model["hidden_size"], model["patch_size"], model["in_channels"]
    side = model["input_size"] // p
    shapes = dit_shapes(model)
    shapes["pos_embed"] = [1, side**3, D]
    shapes["x_embedder.proj.weight"] = [D, C, p, p, p]
    out = p**3 * C * (2 if model["learn_sigma"] else 1)
    shapes["final_layer.linear.weight"], shapes["final_layer.linear.bias"] = [out, D], [out]
    if model.get("use_rel_pos"):
        for index in range(model["depth"]):
            windowed = model.get("window_size") and index in model.get("window_block_indexes", ())
            length = model["window_size"] if windowed else side
            for axis in "xyz":
                shapes[f"blocks.{index}.attn.rel_pos_{axis}"] = [2 * length - 1, D // model["num_heads"]]
    return shapes


def transformer(case: Case, **given: Any) -> DiT3DModel:
    state = case.fill(case.shapes() or official_shapes(case.model))
    (part,) = convert.convert(state, "dit-3d", case.model | given).parts
    return build(part, DiT3DModel)


def clouds(case: Case, key: str = "x") -> torch.Tensor:
    """The input `key`, of the form of the case's answer."""
    shape = list(case.arrays["out"].shape)
    shape[2] = case.inputs.get("N", shape[2])
    return case.named(key, shape)


def companion(case: Case, text: str) -> Case:
    """The case that a description names: "as dit3d_forward"."""
    name = re.search(r"\b(dit3d_\w+)", text)[1]
    return Case(case.folder, name, read_meta(case.folder)["cases"][name])


@torch.inference_mode()
def check_forward(case: Case) -> None:
    model, given = transformer(case), case.inputs
    timesteps, labels = torch.tensor(given["t"]), torch.tensor(given["y"])
    points, side = clouds(case), case.model["input_size"]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
            seen.setdefault(name, out)

        return hook

    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(keep(f"block{index}"))
    model.pos_embed.register_forward_hook(keep("x_embedder"))
    model.proj_out_2.register_forward_hook(keep("final_tokens"))
    found: dict[str, Any] = {"out": model(points, timesteps, labels).sample, **seen}
    found["unpatchified"] = from_cubes(seen["final_tokens"], model.config.tokens, model.config.patch_size)
    found["norm_coords"] = voxel_coordinates(points, side)
    found["vox"] = voxelize(points, found["norm_coords"], side)
    found["t_emb"] = model.timestep_embedder(time_features(timesteps))
    found["y_emb"] = model.class_embedder(labels)
    found["pos_embed"] = model.positions(torch.float32, torch.device("cpu"))
    if "cfg" in given:
        scale = case.number(r"scale ([\d.]+)", "cfg")
        both = torch.cat([labels, torch.full_like(labels, case.model["num_classes"])])
        of_class, of_none = model(points, timesteps.repeat(2), both).sample.chunk(2)
        found["cfg_out"] = (of_none + scale * (of_class - of_none)).repeat(2, 1, 1)
    case.check_any(found)


@torch.inference_mode()
def check_window(case: Case) -> None:
    """What the official code makes of windows is told by the name or the note; the rest is as intended."""
    literal = case.name.endswith("official_literal") or case.entry.get("note", "").startswith("LITERAL")
    model = transformer(case, **({"window_kind": "literal"} if literal else {}))
    given = clouds(case), torch.tensor(case.inputs["t"]), torch.tensor(case.inputs["y"])
    found = {"out": model(*given).sample}
    plain = case.model | {"window_size": 0, "window_block_indexes": []}
    if "out_plain" in case.arrays:
        found["out_plain"] = transformer(Case(case.folder, case.name, case.entry | {"model": plain}))(
            *given
        ).sample
    case.check_any(found)


def check_voxops(case: Case) -> None:
    side, arrays = case.entry["resolution"], case.arrays
    points = torch.from_numpy(arrays["points"])
    features = case.named("features", arrays["grad_features"].shape).requires_grad_()
    grid = case.named("grid", arrays["grad_grid"].shape).requires_grad_()
    coordinates = voxel_coordinates(points, side)
    vox = voxelize(features, coordinates, side)
    (vox * case.named("grad_features", vox.shape)).sum().backward()
    at = torch.from_numpy(arrays["devox_coords"])
    devox = devoxelize(grid, at)
    (devox * case.named("grad_grid", devox.shape)).sum().backward()
    plain = voxel_coordinates(
        case.number(r"on ([\d.]+)\*points", "vox_nonorm") * points, side, normalize=False
    )
    wider = voxel_coordinates(points, side, eps=case.number(r"eps=([\d.]+)", "vox_eps"))
    case.check_any(
        {
            "points": points,
            "norm_coords": coordinates,
            "vox": vox,
            "norm_coords_nonorm": plain,
            "vox_nonorm": voxelize(features, plain, side),
            "norm_coords_eps": wider,
            "vox_eps": voxelize(features, wider, side),
            "grad_features": features.grad,
            "devox_coords": at,
            "devox": devox,
            "grad_grid": grid.grad,
        }
    )


def our_names(official: str) -> list[str]:
    """What the converter makes of an official name: one name, or those of its parts along the rows."""
    block, number = re.match(r"blocks\.(\d+)\.(.*)", official), ""
    rules = convert.DIT
    if block:
        number, official = f"transformer_blocks.{block[1]}.", block[2]
        rules = convert.DIT_BLOCK + convert.RELATIVE
    return [number + name for rule in rules if rule.official == official for name in rule.ours]


def check_grads(case: Case) -> None:
    text = case.inputs["loss"]
    other = companion(case, text)
    model = transformer(case)
    labels = torch.tensor(other.inputs["y"]) % case.model["num_classes"]
    points = other.named("x", case.arrays["out"].shape)
    out = model(points, torch.tensor(other.inputs["t"]), labels).sample
    (out - case.named("loss", out.shape)).square().mean().backward()
    found: dict[str, Any] = {"out": out}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key in case.arrays:
        if key.startswith("g:"):
            found[key] = torch.cat([gradients[name] for name in our_names(key.removeprefix("g:"))])
    case.check_any(found)


def scheduler(schedule: list[Any]) -> PointDiffusion:
    kind, start, end, count = schedule
    return PointDiffusion(beta_schedule=kind, beta_start=start, beta_end=end, num_train_timesteps=count)


def check_schedules(case: Case) -> None:
    found: dict[str, Any] = {}
    for name, schedule in case.entry["schedules"].items():
        tables, index = scheduler(schedule), torch.from_numpy(case.arrays[f"idx_{name}"])
        found[f"idx_{name}"] = index
        for key in case.arrays:
            if key.startswith(f"{name}_"):
                found[key] = getattr(tables, key.removeprefix(f"{name}_"))[index]
    case.check_any(found)


@torch.inference_mode()
def check_diffusion(case: Case) -> None:
    model, given = transformer(case), case.inputs
    labels, shape = torch.tensor(given["y"]), case.arrays["q_sample"].shape
    noise, found = case.named("noise", shape), {}

    def predict(points: torch.Tensor, timesteps: Any) -> torch.Tensor:
        return model(points, timesteps, labels).sample

    walk = scheduler(case.entry["schedule"])
    points = case.named("x_t", shape)
    for key in case.arrays:
        if match := re.fullmatch(r"t(\d+)_clip([01])_sample", key):
            timestep, clipped = int(match[1]), match[2] == "1"
            kind, start, end, count = case.entry["schedule"]
            one = PointDiffusion(
                beta_schedule=kind,
                beta_start=start,
                beta_end=end,
                num_train_timesteps=count,
                clip_sample=clipped,
            )
            (found[key],) = one.step(predict(points, timestep), timestep, points, variance_noise=noise)
            found[key.replace("sample", "x0")] = one.denoised

    original = case.named("q_sample/loss", shape)
    last = case.entry["schedule"][3]
    timesteps = torch.tensor(listed(given["q_sample/loss"][given["q_sample/loss"].index("t =") :])) % last
    found["q_sample"] = walk.add_noise(original, noise, timesteps)
    found["loss"] = (noise - predict(found["q_sample"], timesteps)).square().mean((1, 2))

    for key in case.arrays:
        if match := re.fullmatch(r"loop(\d+)", key):
            count = int(match[1])
            start, end = re.search(r"linspace\(([-\d.e]+), ([-\d.e]+)", given[key]).groups()
            walk = scheduler(["linear", float(start), float(end), count])
            name = re.search(r"z\('([^']+)\.0'", given[key])[1]
            points = case.z(f"{name}.0", shape)
            for index, timestep in enumerate(walk.timesteps):
                drawn = case.z(f"{name}.{index + 1}", shape)
                (points,) = walk.step(predict(points, timestep), timestep, points, variance_noise=drawn)
            found[key] = points
    case.check_any(found, SAMPLING)


def check_metrics(case: Case) -> None:
    given = case.inputs
    S, R, P = given["S"], given["R"], given["P"]
    samples = case.number(r"([\d.]+)\*z", "gen") * case.named("gen", (S, P, 3))
    references = case.number(r"([\d.]+)\*z", "ref") * case.named("ref", (R, P, 3))
    references[: R // 2] += case.number(r"shifted by \+?([-\d.]+)", "ref")
    found: dict[str, Any] = {}
    for name, matrix in point_metrics.DISTANCES.items():
        rs = matrix(references, samples)
        rr, ss = matrix(references, references), matrix(samples, samples)
        scores = point_metrics.coverage_scores(rs) | point_metrics.neighbour_scores(rr, rs, ss)
        matrices = {f"{name}_rs": rs, f"{name}_rr": rr, f"{name}_ss": ss}
        found |= matrices | {f"{name}_{key}": value for key, value in scores.items()}
    found["JSD"] = point_metrics.jsd(samples, references)
    for key in case.arrays:
        if match := re.fullmatch(r"exact_assignment_sq_cost_ref(\d+)_gen(\d+)", key):
            found[key] = point_metrics.exact_emd(references[int(match[1])], samples[int(match[2])])
    case.check_any(found, FORWARD)


# By what a case holds, for a set may call it something else after "dit3d_"
KINDS: tuple[tuple[Callable[[Case], bool], Callable[[Case], None]], ...] = (
    (lambda case: "resolution" in case.entry, check_voxops),
    (lambda case: "schedules" in case.entry, check_schedules),
    (lambda case: "schedule" in case.entry, check_diffusion),
    (lambda case: "gen" in case.inputs, check_metrics),
    (lambda case: "loss" in case.inputs, check_grads),
    (lambda case: "window_size" in case.model, check_window),
    (lambda case: True, check_forward),
)


def check_dit3d(case: Case) -> None:
    next(check for holds, check in KINDS if holds(case))(case)
