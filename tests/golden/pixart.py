"""What the cases sigma_* and delta_* of a golden set hold, computed with our networks."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.models.layers import time_features
from pipelines.models.pixart import PixArtTransformer2DModel
from tests.golden.numbers import SAMPLING, Case, listed
from weights import convert


def official_shapes(model: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the official PixArt network, for cases that do not list them."""
    D, p, C = model["hidden_size"], model["patch_size"], model["in_channels"]
    tokens = (model["input_size"] // p) ** 2
    shapes: dict[str, list[int]] = {"pos_embed": [1, tokens, D]}

    def layer(name: str, rows: int, columns: int, *more: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [rows, columns, *more], [rows]

    layer("x_embedder.proj", D, C, p, p)
    layer("t_embedder.mlp.0", D, 256)
    layer("t_embedder.mlp.2", D, D)
    layer("t_block.1", 6 * D, D)
    shapes["y_embedder.y_embedding"] = [model["model_max_length"], model["caption_channels"]]
    layer("y_embedder.y_proj.fc1", D, model["caption_channels"])
    layer("y_embedder.y_proj.fc2", D, D)
    for index in range(model["depth"]):
        block = f"blocks.{index}"
        shapes[f"{block}.scale_shift_table"] = [6, D]
        layer(f"{block}.attn.qkv", 3 * D, D)
        layer(f"{block}.attn.proj", D, D)
        layer(f"{block}.cross_attn.q_linear", D, D)
        layer(f"{block}.cross_attn.kv_linear", 2 * D, D)
        layer(f"{block}.cross_attn.proj", D, D)
        layer(f"{block}.mlp.fc1", 4 * D, D)
        layer(f"{block}.mlp.fc2", D, 4 * D)
        norms = ["q_norm", "k_norm"] if model.get("qk_norm") else []
        thinned = model.get("kv_compress_config") or {}
        if thinned.get("sampling") == "conv" and index in thinned["kv_compress_layer"]:
            factor = thinned["scale_factor"]
            norms.append("norm")
            layer(f"{block}.attn.sr", D, 1, factor, factor)
        for name in norms:
            shapes[f"{block}.attn.{name}.weight"] = shapes[f"{block}.attn.{name}.bias"] = [D]
    shapes["final_layer.scale_shift_table"] = [2, D]
    layer("final_layer.linear", p * p * 2 * C, D)
    if model.get("micro_condition"):
        for name in ("csize_embedder", "ar_embedder"):
            layer(f"{name}.mlp.0", D // 3, 256)
            layer(f"{name}.mlp.2", D // 3, D // 3)
    return shapes


def build(part: convert.Part, network: Any) -> Any:
    """The network of a converted checkpoint, with its numbers."""
    model = network(**part.config)
    model.load_state_dict(part.state)
    return model.eval()


def transformer(case: Case) -> PixArtTransformer2DModel:
    state = case.fill(case.shapes() or official_shapes(case.model))
    (part,) = convert.convert(state, "pixart-sigma", case.model).parts
    return build(part, PixArtTransformer2DModel)


def inputs(case: Case) -> dict[str, Any]:
    """Latents, captions, timesteps, mask and micro-conditions."""
    given, model = case.inputs, case.model
    timesteps = torch.tensor(given["t"])
    B, L = len(timesteps), model["model_max_length"]
    lengths = torch.tensor(listed(given["mask"]))
    return {
        "hidden_states": case.named("x", (B, model["in_channels"], *given["hw_latent"])),
        "encoder_hidden_states": case.named("y", (B, 1, L, model["caption_channels"]))[:, 0],
        "timestep": timesteps,
        "encoder_attention_mask": torch.arange(L) < lengths[:, None],
        "added_cond_kwargs": {
            "resolution": torch.tensor(given["img_hw"], dtype=torch.float32),
            "aspect_ratio": torch.tensor(given["aspect_ratio"], dtype=torch.float32),
        },
    }


@torch.inference_mode()
def check_forward(case: Case) -> None:
    model, given = transformer(case), inputs(case)
    seen: dict[str, torch.Tensor] = {}

    def between(index: int, x_BND: torch.Tensor, _: Any) -> torch.Tensor:
        seen[f"block{index - 1}"] = x_BND
        return x_BND

    model.norm_out.register_forward_pre_hook(lambda _, inputs: seen.update(block_last=inputs[0]))
    found: dict[str, Any] = {"out": model(**given, between=between).sample}
    found |= seen
    embedder = model.adaln_single.emb
    found["t_emb"] = embedder.timestep_embedder(time_features(given["timestep"]))  # before size and ratio
    vector = embedder(given["timestep"], given["added_cond_kwargs"])
    found["t0"] = model.adaln_single.linear(torch.nn.functional.silu(vector))
    found["y_proj"] = model.caption_projection(given["encoder_hidden_states"])[:, None]
    grid = [side // model.config.patch_size for side in given["hidden_states"].shape[-2:]]
    found["pos_embed"] = model.positions(*grid, torch.float32, torch.device("cpu"))[0]
    found["out_nomask"] = model(**given | {"encoder_attention_mask": None}).sample
    for key in case.arrays:
        if key.startswith("out_cfg"):
            found[key] = guided(case, model, given, float(key.removeprefix("out_cfg")))
    case.check_any(found)


def guided(case: Case, model: Any, given: dict[str, Any], scale: float) -> torch.Tensor:
    """Both halves after guidance of the first three channels, in the order of the description."""
    captions = given["encoder_hidden_states"]
    empty = case.named("ynull", (len(captions), 1, *captions.shape[1:]))[:, 0]
    double = {
        "hidden_states": given["hidden_states"].repeat(2, 1, 1, 1),
        "encoder_hidden_states": torch.cat([captions, empty]),
        "timestep": given["timestep"].repeat(2),
        "encoder_attention_mask": given["encoder_attention_mask"].repeat(2, 1),
        "added_cond_kwargs": {k: v.repeat(2, 1) for k, v in given["added_cond_kwargs"].items()},
    }
    out = model(**double).sample
    with_text, without = out[:, :3].chunk(2)
    mixed = without + scale * (with_text - without)
    return torch.cat([torch.cat([mixed, mixed]), out[:, 3:]], dim=1)


@torch.inference_mode()
def check_solver(case: Case) -> None:
    """The official solver at its fractional timesteps, with the official mask of the empty caption."""
    from pipelines.dpm_solver import DPMSolver

    model = transformer(case)
    other = _companion(case)
    given = inputs(other)
    shape = given["hidden_states"].shape
    captions = given["encoder_hidden_states"]
    empty = other.named("ynull", (len(captions), 1, *captions.shape[1:]))[:, 0]
    scale = case.number(r"([\d.]+) on all", "cfg")
    text = model.text_states(
        torch.cat([empty, captions]), given["encoder_attention_mask"].repeat(2, 1), trim=False
    )
    solver = DPMSolver(timestep_spacing="continuous")
    solver.set_timesteps(case.entry["steps"])
    latents = case.named("x_T", shape)
    for timestep in solver.timesteps:
        modulation = model.modulation(timestep.reshape(1), given["added_cond_kwargs"])
        out = model(latents, text=text, modulation=modulation).sample[:, : shape[1]]
        without, with_text = out.chunk(2)
        (latents,) = solver.step(without + scale * (with_text - without), timestep, latents)
    found = {"final": latents, "model_timesteps": solver.timesteps}
    case.check_any(found, SAMPLING)


def _companion(case: Case) -> Case:
    """The case of the same network that describes the captions which this one takes over."""
    from tests.golden.numbers import cases

    return next(
        other
        for other in cases()
        if other.folder == case.folder
        and other.entry.get("model") == case.model
        and "ynull" in other.inputs
        and "t" in other.inputs
    )


def check_sigma(case: Case) -> None:
    (check_solver if "steps" in case.entry else check_forward)(case)
