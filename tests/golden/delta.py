"""What the cases delta_* of a golden set hold, computed with our control branch, HED and LCM."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.lcm import LCMSolver
from pipelines.models.hed import HED, control_picture
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet
from tests.golden import pixart
from tests.golden.numbers import FORWARD, SAMPLING, Case, cases
from weights import convert

ALPHA_1024 = {"img_hw": [[1024.0, 1024.0]], "aspect_ratio": [[1.0]]}


def control_shapes(case: Case) -> dict[str, Any]:
    """Names and shapes of base and branch, for cases that do not list them."""
    base = pixart.official_shapes(case.model | {"micro_condition": case.entry["ms"]})
    shapes = {f"base_model.{name}": shape for name, shape in base.items()}
    width = case.model["hidden_size"]
    for index in range(case.entry["copy_blocks_num"]):
        for name, shape in base.items():
            if name.startswith(f"blocks.{index}."):
                inner = name.removeprefix(f"blocks.{index}.")
                shapes[f"controlnet.{index}.copied_block.{inner}"] = shape
        for layer in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            shapes[f"controlnet.{index}.{layer}.weight"] = [width, width]
            shapes[f"controlnet.{index}.{layer}.bias"] = [width]
    return shapes


@torch.inference_mode()
def check_control(case: Case) -> None:
    state = case.fill(case.shapes() or control_shapes(case))
    parts = {part.name: part for part in convert.convert(state, "pixart-control", case.model).parts}
    base = pixart.build(parts["transformer"], PixArtTransformer2DModel)
    control = pixart.build(parts["controlnet"], PixArtControlNet)
    assert len(control.controlnet_blocks) == case.entry["copy_blocks_num"]
    model = ControlledPixArt(base, control)
    given = pixart.inputs(case)
    picture = case.named("c", given["hidden_states"].shape)
    gains: list[torch.Tensor] = []
    hooks = [
        copy.after_proj.register_forward_hook(lambda *call: gains.append(call[-1]))
        for copy in control.controlnet_blocks
    ]
    found = {"out": model(**given, control_latents=picture).sample}
    for hook in hooks:
        hook.remove()
    found |= {
        "cskip0": gains[0],
        "cskip_last": gains[-1],
        "out_no_control": model(**given).sample,
        "out_c_batch1": model(**given, control_latents=picture[:1]).sample,
    }
    case.check_any(found)


@torch.inference_mode()
def check_hed(case: Case) -> None:
    network = HED()
    state = case.fill(case.shapes() or {k: v.shape for k, v in network.state_dict().items()})
    (part,) = convert.convert(state, "hed").parts
    network.load_state_dict(part.state)
    image = case.named("image", _image_shape(case)).sigmoid()
    projections = network.projections(image)
    found: dict[str, Any] = {f"proj{index}": one for index, one in enumerate(projections, 1)}
    found["logit"] = network.logits(image)
    found["edge"] = network(image)
    found["vae_input"] = control_picture(found["edge"])
    case.check_any(found)


def _image_shape(case: Case) -> list[int]:
    return [1, 3, *case.arrays["edge"].shape[-2:]]


@torch.inference_mode()
def check_lcm(case: Case) -> None:
    other = next(
        one
        for one in cases()
        if one.folder == case.folder and one.entry.get("ms") and one.entry["model"] == case.model
    )
    listed = other.shapes() or control_shapes(other)
    shapes = {k.removeprefix("base_model."): v for k, v in listed.items() if k.startswith("base_model.")}
    (part,) = convert.convert(case.fill(shapes), "pixart-alpha", case.model).parts
    model = pixart.build(part, PixArtTransformer2DModel)
    # The captions are the control case's, the size is the published model's own
    given = pixart.inputs(other)
    batch, channels = given["hidden_states"].shape[:2]
    conditions = {
        "resolution": torch.tensor(ALPHA_1024["img_hw"]).expand(batch, -1),
        "aspect_ratio": torch.tensor(ALPHA_1024["aspect_ratio"]).expand(batch, -1),
    }
    text = model.text_states(given["encoder_hidden_states"], given["encoder_attention_mask"])
    solver = LCMSolver()
    solver.set_timesteps(case.inputs["steps"])
    latents = case.named("x_T", given["hidden_states"].shape)
    for index, timestep in enumerate(solver.timesteps):
        modulation = model.modulation(timestep.repeat(batch), conditions)
        prediction = model(latents, text=text, modulation=modulation).sample[:, :channels]
        noise = case.named("noise", latents.shape, index)
        latents, denoised = solver.step(prediction, timestep, latents, variance_noise=noise)
        case.check(f"denoised{index}", denoised, SAMPLING)
    assert torch.equal(latents, denoised)  # the picture is what the last step expects
    found: dict[str, Any] = {key: case.arrays[key] for key in case.arrays if key.startswith("denoised")}
    found["c_skip_c_out"] = torch.tensor(
        [LCMSolver().boundary(t) for t in case.inputs["c_skip_c_out_at"]], dtype=torch.float64
    )
    for key in case.arrays:
        if key.startswith("timesteps_"):
            _, steps, _, origin = key.split("_")
            solver = LCMSolver(original_inference_steps=int(origin))
            solver.set_timesteps(int(steps))
            found[key] = solver.timesteps
    case.check_any(found, FORWARD)


def check_delta(case: Case) -> None:
    if "copy_blocks_num" in case.entry:
        check_control(case)
    elif "edge" in case.arrays:
        check_hed(case)
    else:
        check_lcm(case)
