"""DiT-3D: its sizes, its windows against plain attention, every shortcut against the plain way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.attention import set_attention, usable
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.dit3d import (
    SIZES,
    VOXELS,
    WINDOWS,
    DiT3DModel,
    from_cubes,
    from_windows,
    position_table_3d,
    to_windows,
)

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=4,
)
WINDOWED = {"window_size": 2, "window_layers": (0, 2)}
TOLERANCE = 1e-5  # relative, float32: rounding of different orders of the same sums


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def network(**options: Any) -> DiT3DModel:
    """Random numbers, biases and relative positions too, large enough to be missed if they were not used."""
    torch.manual_seed(0)
    model = DiT3DModel(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "rel_pos" in name else 0.05) * torch.randn_like(parameter))
    return model


def like(model: DiT3DModel, **options: Any) -> DiT3DModel:
    """Another configuration with the same weights."""
    other = DiT3DModel(**{**SMALL, **options}).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def inputs(batch: int = 2, points: int = 60, channels: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, channels, points),
        "timestep": torch.linspace(7.0, 999.0, batch),
        "class_labels": torch.arange(batch) % 5,  # 4 is no class
    }


COUNTS = {  # of the official code, at 32 voxels and for one class, the position table counted
    "XL/2": 678_402_456,
    "XL/4": 674_660_928,
    "XL/8": 677_242_752,
    "L/2": 582_781_848,
    "L/4": 579_040_320,
    "L/8": 581_622_144,
    "B/2": 132_694_296,
    "B/4": 130_200_000,
    "B/8": 131_921_664,
    "S/2": 34_054_296,
    "S/4": 32_807_232,
    "S/8": 33_668_736,
}


def parameters(**options: Any) -> int:
    with torch.device("meta"):
        model = DiT3DModel(**options)
    return sum(p.numel() for p in model.parameters()) + model.config.tokens**3 * model.config.width


@pytest.mark.parametrize("name", list(COUNTS))
def test_every_size_has_as_many_parameters_as_the_official_one(name: str) -> None:
    assert parameters(**SIZES[name]) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("S/4", {"num_embeds_ada_norm": 55}, 32_827_968),
        ("XL/4", {"num_embeds_ada_norm": 55}, 674_723_136),
        ("S/4", WINDOWS["S"], 32_807_232),
        ("S/4", {**WINDOWS["S"], "relative_positions": True}, 32_835_648),
        ("XL/4", {**WINDOWS["XL"], "relative_positions": True}, 674_736_096),
    ],
)
def test_classes_and_windows_add_what_they_add_in_the_official_one(
    name: str, options: dict[str, Any], wanted: int
) -> None:
    assert parameters(**{**SIZES[name], **options}) == wanted


def test_there_are_no_other_sizes_and_all_fit_all_grids() -> None:
    assert SIZES.keys() == COUNTS.keys()
    for name in SIZES:
        for voxels in VOXELS:
            assert DiT3DModel.config_class(**SIZES[name], sample_size=voxels).tokens * int(name[-1]) == voxels


def test_positions_code_each_axis_in_a_third_of_the_width() -> None:
    table = position_table_3d(4, 24).unflatten(0, (4, 4, 4))
    for axis in range(3):
        own = table[..., 8 * axis : 8 * axis + 8].movedim(axis, 0)
        assert torch.equal(own, own[:, :1, :1].expand_as(own))  # nothing of the other axes
        assert len(own[:, 0, 0].unique(dim=0)) == 4
        assert torch.equal(own[0, 0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))  # sines first


def test_cubes_come_back_as_they_were_cut() -> None:
    grid = torch.arange(2 * 3 * 4**3).float().reshape(2, 3, 4, 4, 4)
    cut = grid.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)  # (B, C, 2, 2, 2, x, y, z)
    tokens = cut.permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(2, 8, 24)
    assert torch.equal(from_cubes(tokens, 2, 2), grid)


def test_the_gelu_is_the_exact_one() -> None:
    model = network()
    x = torch.linspace(-4, 4, 48 * 5).reshape(1, 5, 48)
    layers = model.transformer_blocks[0].ff.net
    wanted = layers[2](nn.functional.gelu(layers[0].proj(x)))
    assert torch.equal(model.transformer_blocks[0].ff(x), wanted)


# Windows


def test_windows_hold_neighbours_and_come_back() -> None:
    tokens = torch.arange(2 * 64).float().reshape(2, 64, 1)
    windows = to_windows(tokens, 4, 2)
    assert windows.shape == (16, 8, 1)
    assert windows[0, :, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]  # a corner of a 4 x 4 x 4 grid
    assert windows[1, 0, 0] == 2  # the next window lies along Z
    assert torch.equal(from_windows(windows, 4, 2), tokens)


@pytest.mark.parametrize("relative_positions", [False, True])
@torch.inference_mode()
def test_a_window_as_large_as_the_grid_is_global_attention(relative_positions: bool) -> None:
    model = network(relative_positions=relative_positions)
    windowed = like(model, relative_positions=relative_positions, window_size=4, window_layers=(0, 1, 2))
    given = inputs()
    assert relative(windowed(**given).sample, model(**given).sample) <= TOLERANCE


@torch.inference_mode()
def test_small_windows_are_another_model_and_keep_to_themselves() -> None:
    model = network()
    windowed = like(model, **WINDOWED)
    given = inputs()
    assert relative(windowed(**given).sample, model(**given).sample) > 1e-2
    block = windowed.transformer_blocks[0]
    x = torch.randn(1, 64, 48)
    changed = x.clone()
    changed[0, 0] += 1  # a token of the first window
    moved = (block.look_around(changed) - block.look_around(x)).abs().amax(2)[0] > 0
    assert moved.nonzero().flatten().tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


@pytest.mark.parametrize("attention", usable("cpu"))
@torch.inference_mode()
def test_relative_positions_are_added_to_the_logits(attention: str) -> None:
    """Against a table of N x N logits, written out."""
    model = network(relative_positions=True)
    layer = model.transformer_blocks[1].attn1
    set_attention(model, attention)
    x = torch.randn(2, 64, 48)
    q, k, v = (layer.split(part) for part in layer.project(x))
    logits = q @ k.mT * 24**-0.5
    place = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for axis, name in enumerate("xyz"):
        table = getattr(layer, f"rel_pos_{name}")
        for n in range(64):
            apart = place[n, axis] - place[:, axis] + 3
            logits[:, :, n] += torch.einsum("bhk,nk->bhn", q[:, :, n], table[apart])
    wanted = layer.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert relative(layer(x), wanted) <= TOLERANCE


@torch.inference_mode()
def test_the_literal_windows_mix_clouds_and_need_as_many_as_windows() -> None:
    model = network(**WINDOWED, window_kind="literal")
    given = inputs(8)
    expected = model(**given).sample
    other = given | {
        "hidden_states": torch.cat([given["hidden_states"][:1], inputs(8)["hidden_states"][1:] + 1])
    }
    other["hidden_states"][1:] += torch.randn(7, 3, 60)
    assert relative(model(**other).sample[0], expected[0]) > 1e-3  # the first cloud is the same in both
    with pytest.raises(ValueError, match=r"7 clouds are fewer than the 8 windows.*; give 8 or more"):
        model(**inputs(7))
    assert model(**inputs(9)).sample.shape == (9, 3, 60)


# Shortcuts


@torch.inference_mode()
def test_modulation_computed_before_equals_the_plain_way() -> None:
    model = network()
    given = inputs(3)
    expected = model(**given).sample
    table = model.modulation(given["timestep"].flip(0), given["class_labels"].flip(0))
    found = model(given["hidden_states"], modulation=table.at(torch.tensor([2, 1, 0]))).sample
    assert relative(found, expected) <= TOLERANCE


@torch.inference_mode()
def test_clouds_may_be_taken_twice_over() -> None:
    model = network()
    points, labels = inputs(2)["hidden_states"], torch.tensor([3, 3, 4, 4])
    expected = model(points.repeat(2, 1, 1), torch.full((4,), 503), labels).sample
    assert relative(model(points, 503, labels).sample, expected) <= TOLERANCE
    assert relative(model(points, torch.tensor(503.0), 3).sample, expected[:2]) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, WINDOWED], ids=["global", "windows"])
@torch.inference_mode()
def test_a_batch_equals_its_rows(options: dict[str, Any]) -> None:
    model = network(**options)
    given = inputs(3)
    together = model(**given).sample
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in given.items()}).sample
        assert relative(alone[0], together[row]) <= TOLERANCE


@torch.inference_mode()
def test_the_order_of_points_and_their_place_in_space_do_not_matter() -> None:
    model = network()
    given = inputs()
    order = torch.randperm(60)
    found = model(**(given | {"hidden_states": given["hidden_states"][:, :, order]})).sample
    assert relative(found, model(**given).sample[:, :, order]) <= 1e-4  # a mean of another order


@torch.inference_mode()
def test_points_may_carry_more_than_their_place() -> None:
    model = network(in_channels=6)
    given = inputs(channels=6)
    out = model(**given).sample
    assert out.shape == (2, 6, 60)
    given["hidden_states"][:, 4] += 1
    assert relative(model(**given).sample, out) > 1e-3


@pytest.mark.parametrize("options", [{}, {**WINDOWED, "relative_positions": True}], ids=["plain", "windows"])
def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    model = network(**options)
    model(**inputs()).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_half_precision_stays_near_and_answers_in_float32(tmp_path: Path) -> None:
    model = network(**WINDOWED, relative_positions=True)
    given = inputs()
    expected = model(**given).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**given).sample
        found.square().mean().backward()
    assert found.dtype == torch.float32 and relative(found, expected) < 0.05
    model.save_pretrained(tmp_path)
    half = DiT3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.inference_mode():
        found = half(**given).sample
    assert found.dtype == torch.float32 and relative(found, expected) < 0.05


def test_a_few_steps_of_training_lower_the_loss() -> None:
    model = network().train()
    given, noise = inputs(4), torch.randn(4, 3, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss = (model(**given).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Files and other networks


@torch.inference_mode()
def test_it_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = network(**WINDOWED, relative_positions=True, class_dropout=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiT3DModel"
    loaded = DiT3DModel.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(**inputs()).sample, model(**inputs()).sample)


def picture_dit(**options: Any) -> DiTTransformer2DModel:
    torch.manual_seed(5)
    given = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "num_embeds_ada_norm": 9}
    return DiTTransformer2DModel(**{**given, **options})


def test_blocks_of_a_dit_of_pictures_are_taken_over_and_nothing_else() -> None:
    model, dit = network(**WINDOWED, relative_positions=True), picture_dit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.take_blocks(dit)
    source = dit.state_dict()
    for key, tensor in model.state_dict().items():
        shared = key.startswith("transformer_blocks.") and "rel_pos" not in key
        assert torch.equal(tensor, source[key] if shared else before[key]), key
    assert not torch.equal(
        before["transformer_blocks.1.attn1.to_q.weight"], source["transformer_blocks.1.attn1.to_q.weight"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_layers": 2}, "num_layers 2"), ({"attention_head_dim": 48}, "attention_head_dim 48 .* 24")],
)
def test_blocks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network().take_blocks(picture_dit(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 9}, "9 voxels per side cannot be cut into patches of 2; sample_size must be"),
        ({"attention_head_dim": 20}, "the width 40 .* divisible by 6"),
        ({"window_size": 3, "window_layers": (1,)}, "4 tokens per side cannot be cut into windows of 3"),
        ({"window_layers": (1,)}, "windows of 0"),
        ({"window_size": 2, "window_layers": (1, 3)}, r"window_layers names \[3\], there are 3 layers"),
        ({"window_size": 2, "window_layers": ("0", ",", "2")}, "window_layers names"),
        ({"window_kind": "official"}, "window_kind must be one of"),
        ({**WINDOWED, "window_kind": "literal", "relative_positions": True}, "the official code raises"),
        ({"activation_fn": "gelu-approximate"}, "activation_fn must be 'gelu'"),
        ({"in_channels": 2}, "in_channels must be 3 or more"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
    ],
)
def test_configurations_it_cannot_compute_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT3DModel(**{**SMALL, **options})


@torch.inference_mode()
def test_inputs_that_do_not_fit_are_refused() -> None:
    model, given = network(), inputs()
    for points in (torch.randn(2, 60, 3), torch.randn(3, 60)):
        with pytest.raises(ValueError, match=r"they must be \(clouds, 3, points\)"):
            model(**(given | {"hidden_states": points}))
    with pytest.raises(ValueError, match="give timestep and class_labels, or modulation"):
        model(given["hidden_states"], 5)
    with pytest.raises(ValueError, match="2 timesteps do not fit 3 class labels"):
        model(**(given | {"class_labels": torch.tensor([1, 2, 3])}))
    with pytest.raises(ValueError, match="3 timesteps and class labels do not fit 2 clouds"):
        model(given["hidden_states"], 5, torch.tensor([1, 2, 3]))


def test_a_class_that_is_not_there_is_named() -> None:
    model = network()
    model.check_labels(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"no class 5: this model has 0 to 3, or 4 for no class"):
        model.check_labels(torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"no class -1: this model has 0 to 3$"):
        network(class_dropout=False).check_labels(-1)
