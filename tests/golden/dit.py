"""What the cases dit_* of a golden set hold, computed with our DiT and its sampler."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.learned_range import LearnedRangeScheduler
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.layers import time_features
from tests.golden.numbers import SAMPLING, Case
from tests.golden.pixart import build
from weights import convert


def official_shapes(model: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the official DiT, for cases that do not list them."""
    D, p, C = model["hidden_size"], model["patch_size"], model["in_channels"]
    tokens = (model["input_size"] // p) ** 2
    rows = model["num_classes"] + (model.get("class_dropout_prob", 0.1) > 0)
    shapes: dict[str, list[int]] = {
        "pos_embed": [1, tokens, D],
        "y_embedder.embedding_table.weight": [rows, D],
    }
    layers: dict[str, list[int]] = {
        "x_embedder.proj": [D, C, p, p],
        "t_embedder.mlp.0": [D, 256],
        "t_embedder.mlp.2": [D, D],
        "final_layer.linear": [p * p * C * (2 if model["learn_sigma"] else 1), D],
        "final_layer.adaLN_modulation.1": [2 * D, D],
    }
    for index in range(model["depth"]):
        layers |= {
            f"blocks.{index}.attn.qkv": [3 * D, D],
            f"blocks.{index}.attn.proj": [D, D],
            f"blocks.{index}.mlp.fc1": [4 * D, D],
            f"blocks.{index}.mlp.fc2": [D, 4 * D],
            f"blocks.{index}.adaLN_modulation.1": [6 * D, D],
        }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def transformer(case: Case) -> DiTTransformer2DModel:
    state = case.fill(case.shapes() or official_shapes(case.model))
    (part,) = convert.convert(state, "dit", case.model).parts
    return build(part, DiTTransformer2DModel)


def guided(
    model: DiTTransformer2DModel, latents: torch.Tensor, t: Any, labels: torch.Tensor, scale: float
) -> torch.Tensor:
    """All channels of both halves: the first half's latents for both, three channels guided."""
    half = latents[: len(latents) // 2]
    timesteps = torch.as_tensor(t).reshape(-1)
    if len(timesteps) > 1:
        timesteps = timesteps.repeat(2)
    out = model(half, timesteps, labels).sample
    of_class, of_none = out[:, :3].chunk(2)
    mixed = of_none + scale * (of_class - of_none)
    return torch.cat([torch.cat([mixed, mixed]), out[:, 3:]], dim=1)


@torch.inference_mode()
def check_forward(case: Case) -> None:
    model, given = transformer(case), case.inputs
    timesteps, labels = torch.tensor(given["t"]), torch.tensor(given["y"])
    side, channels = case.model["input_size"], case.model["in_channels"]
    latents = case.named("x", (len(timesteps), channels, side, side))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
            seen.setdefault(name, out)

        return hook

    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(keep(f"block{index}"))
    found: dict[str, Any] = {"out": model(latents, timesteps, labels).sample, **seen}
    found["x_embedder"] = model.pos_embed(latents)
    found["t_emb"] = model.timestep_embedder(time_features(timesteps))
    found["y_emb"] = model.class_embedder(labels)
    tokens = side // model.config.patch_size
    found["pos_embed"] = model.positions(tokens, tokens, torch.float32, torch.device("cpu"))
    both = torch.cat([labels, torch.full_like(labels, case.model["num_classes"])])
    scale = case.number(r"cfg_scale=([\d.]+)", "cfg")
    found["cfg_out"] = guided(model, latents.repeat(2, 1, 1, 1), timesteps, both, scale)
    case.check_any(found)


@torch.inference_mode()
def check_sampling(case: Case) -> None:
    model, given, steps = transformer(case), case.inputs, case.entry["steps"]
    labels = torch.tensor(given["y"])
    side, channels = case.model["input_size"], case.model["in_channels"]
    latents = case.named("x_T", (len(labels) // 2, channels, side, side)).repeat(2, 1, 1, 1)
    scheduler = LearnedRangeScheduler()
    scheduler.set_timesteps(steps)
    found: dict[str, Any] = {
        "timestep_map": scheduler.timesteps.flip(0),
        "betas_respaced": scheduler.betas,
        "posterior_log_variance_clipped": scheduler.posterior_log_variance_clipped,
    }
    for index, timestep in enumerate(scheduler.timesteps):
        answer = guided(model, latents, timestep, labels, given["cfg_scale"])
        noise = case.named("noise", latents.shape, index)
        (latents,) = scheduler.step(answer, timestep, latents, variance_noise=noise)
        if index == 0:
            found["after_step0"] = latents
        if index == steps // 2:
            found["mid"] = latents
    found["final"] = latents[: len(latents) // 2]
    for key in case.arrays:
        if key.startswith("timestep_map_"):
            scheduler.set_timesteps(int(key.removeprefix("timestep_map_")))
            found[key] = scheduler.timesteps.flip(0)
            found[key.replace("timestep_map", "betas")] = scheduler.betas
    case.check_any(found, SAMPLING)


def check_dit(case: Case) -> None:
    (check_sampling if "steps" in case.entry else check_forward)(case)
