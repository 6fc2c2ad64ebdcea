"""The control branch, and the base it must not disturb. The published numbers are in tests/golden."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.attention import set_attention
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet

SMALL: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    num_layers=4,
    cross_attention_dim=48,
    caption_channels=20,
    sample_size=16,
)
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro": {"use_additional_conditions": True},
    "affine": {"norm_elementwise_affine": True, "attention_bias": False, "out_channels": None},
    "unprojected": {"caption_channels": None, "cross_attention_dim": 20},
    "compressed": {
        "qk_norm": True,
        "kv_compress_sampling": "conv",
        "kv_compress_factor": 2,
        "kv_compress_layers": (1, 3),
    },
}
TOLERANCE = 1e-5  # relative, float32: rounding of different orders of the same sums


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def shaken(model: torch.nn.Module) -> Any:
    """Random everywhere, zero layers and offsets too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pair(copies: int = 2, **options: Any) -> ControlledPixArt:
    torch.manual_seed(0)
    base = shaken(PixArtTransformer2DModel(**SMALL | options))
    return ControlledPixArt(base, shaken(PixArtControlNet.from_transformer(base, copies)))


def inputs(batch: int = 2, rows: int = 8, columns: int = 12, channels: int = 20) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, rows, columns),
        "encoder_hidden_states": torch.randn(batch, 7, channels),
        "timestep": torch.randint(0, 1000, (batch,)),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[128.0, 128.0], [96.0, 160.0]])[:batch],
            "aspect_ratio": torch.tensor([[1.0], [0.6]])[:batch],
        },
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] + [0] * 6])[:batch],
    }


def edges(batch: int = 2, rows: int = 8, columns: int = 12) -> Tensor:
    return torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(2))


def test_the_published_size() -> None:
    with torch.device("meta"):
        control = PixArtControlNet()
    assert sum(parameter.numel() for parameter in control.parameters()) == 294_917_760


# ----------------------------------------------------------------------------------- what it must not change


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
@torch.inference_mode()
def test_a_new_branch_changes_nothing(options: dict[str, Any]) -> None:
    base = pair(**options).base
    model = ControlledPixArt(base, PixArtControlNet.from_transformer(base, 3))
    given = inputs(channels=20)
    assert torch.equal(model(**given, control_latents=edges()).sample, base(**given).sample)


@torch.inference_mode()
def test_without_a_branch_a_picture_or_strength_the_base_runs_alone() -> None:
    model, given = pair(), inputs()
    expected = model.base(**given).sample
    assert torch.equal(model(**given).sample, expected)
    assert torch.equal(model(**given, control_latents=edges(), conditioning_scale=0.0).sample, expected)
    assert torch.equal(ControlledPixArt(model.base)(**given, control_latents=edges()).sample, expected)
    assert relative(model(**given, control_latents=edges()).sample, expected) > 1e-2  # it can do something


@torch.inference_mode()
def test_the_scale_multiplies_what_the_copies_give() -> None:
    model, given = pair(), inputs()
    found = model(**given, control_latents=edges(), conditioning_scale=0.5).sample
    assert model.control is not None
    for copy in model.control.controlnet_blocks:
        copy.after_proj.weight *= 0.5
        copy.after_proj.bias *= 0.5
    assert relative(found, model(**given, control_latents=edges()).sample) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ shortcuts


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
@pytest.mark.parametrize("attention", ["sdpa", "math"])
@torch.inference_mode()
def test_text_and_modulation_computed_before_equal_the_plain_way(
    options: dict[str, Any], attention: str
) -> None:
    model, given = pair(**options), inputs(channels=20)
    assert model.control is not None
    set_attention(model.base, attention)
    set_attention(model.control, attention)
    expected = model(**given, control_latents=edges()).sample
    text = model.text_states(given["encoder_hidden_states"], given["encoder_attention_mask"])
    modulation = model.modulation(given["timestep"], given["added_cond_kwargs"])
    found = model(given["hidden_states"], text=text, modulation=modulation, control_latents=edges()).sample
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("batch", "pictures"), [(1, 1), (2, 1), (2, 2), (2, 4)])
@torch.inference_mode()
def test_latents_taken_twice_over_equal_latents_given_twice(batch: int, pictures: int) -> None:
    model, given = pair(use_additional_conditions=True), inputs(batch)
    captions = torch.randn(2 * batch, 7, 20)
    picture = edges(pictures)
    expected = model(
        given["hidden_states"].repeat(2, 1, 1, 1),
        captions,
        given["timestep"].repeat(2),
        {name: value.repeat(2, 1) for name, value in given["added_cond_kwargs"].items()},
        control_latents=picture.repeat(2, 1, 1, 1) if pictures == batch else picture,
    ).sample
    modulation = model.modulation(given["timestep"], given["added_cond_kwargs"])
    text = model.text_states(captions)
    found = model(given["hidden_states"], text=text, modulation=modulation, control_latents=picture).sample
    assert relative(found, expected) <= TOLERANCE


# ------------------------------------------------------------------------------------------------- training


def test_gradients_reach_the_branch_and_not_the_base() -> None:
    base = pair().base.requires_grad_(False)
    control = PixArtControlNet.from_transformer(base, 2)
    model, given = ControlledPixArt(base, control), inputs()

    def reached() -> set[str]:
        control.zero_grad()
        model(**given, control_latents=edges()).sample.square().mean().backward()
        return {name for name, parameter in control.named_parameters() if parameter.grad.abs().max() > 0}

    # While the layers after the copies are zero, nothing behind them matters.
    last = {f"controlnet_blocks.{j}.after_proj.{kind}" for j in (0, 1) for kind in ("weight", "bias")}
    assert reached() == last
    torch.optim.SGD(control.parameters(), lr=0.1).step()
    # Softmax does not see what all keys have in common.
    blind = {name for name, _ in control.named_parameters() if name.endswith("to_k.bias")}
    assert reached() | blind == {name for name, _ in control.named_parameters()}
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_few_steps_teach_it_something() -> None:
    base = pair().base.requires_grad_(False)
    control = PixArtControlNet.from_transformer(base, 2)
    model, given, picture = ControlledPixArt(base, control), inputs(), edges()
    optimizer = torch.optim.Adam(control.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (model(**given, control_latents=picture).sample[:, :4] - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------- folders and refusals


@torch.inference_mode()
def test_it_survives_a_round_trip(tmp_path: Path) -> None:
    model, given = pair(**BASES["compressed"]), inputs()
    assert model.control is not None
    model.control.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert {name for name in names if "_proj." in name} == {
        f"controlnet_blocks.{place}.{kind}"
        for place in ("0.before_proj", "0.after_proj", "1.after_proj")
        for kind in ("weight", "bias")
    }
    blocks = {f"{j}.{name}" for j in (0, 1) for name in model.base.transformer_blocks[j].state_dict()}
    prefix = r"controlnet_blocks\.(\d)\.transformer_block"
    assert {re.sub(prefix, r"\1", name) for name in names if "transformer_block." in name} == blocks
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "PixArtControlNet"
    again = ControlledPixArt(model.base, PixArtControlNet.from_pretrained(tmp_path))
    expected = model(**given, control_latents=edges()).sample
    assert torch.equal(again(**given, control_latents=edges()).sample, expected)


@pytest.mark.parametrize("copies", [0, 4])
def test_some_but_not_all_blocks_are_copied(copies: int) -> None:
    with pytest.raises(ValueError, match="1 to 3 can"):
        PixArtControlNet.from_transformer(PixArtTransformer2DModel(**SMALL), copies)


def test_a_branch_of_another_base_is_refused() -> None:
    control = PixArtControlNet.from_transformer(PixArtTransformer2DModel(**SMALL), 2)
    for options, message in (
        ({"num_layers": 2}, "its base must have more, not 2"),
        ({"num_attention_heads": 4, "attention_head_dim": 12}, "num_attention_heads 2, not 4"),
        ({"qk_norm": True}, "qk_norm False, not True"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlledPixArt(PixArtTransformer2DModel(**SMALL | options), control)


def test_what_does_not_fit_is_refused() -> None:
    model, given = pair(), inputs()
    with pytest.raises(ValueError, match=r"control latents are \(4, 8, 8\), the latents are \(4, 8, 12\)"):
        model(**given, control_latents=edges(columns=8))
    with pytest.raises(ValueError, match="3 control pictures do not fit 2 latents"):
        model(**given, control_latents=edges(3))
    text = model.base.text_states(given["encoder_hidden_states"])
    with pytest.raises(ValueError, match="the text is the base's alone"):
        model(given["hidden_states"], timestep=given["timestep"], text=text, control_latents=edges())
    with pytest.raises(ValueError, match="give encoder_hidden_states or text"):
        model(given["hidden_states"], control_latents=edges())
