"""The transformer against diffusers' (its two slips mended), and every shortcut against the plain way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.attention import set_attention, usable
from pipelines.models.dit import SIZES, DiTTransformer2DModel, published_state

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    out_channels=8,
    num_layers=3,
    sample_size=8,
    num_embeds_ada_norm=10,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no variance": {"out_channels": None, "attention_bias": False},
    "patch 4": {"patch_size": 4},
    "other channels": {"in_channels": 3, "out_channels": 6, "num_embeds_ada_norm": 1},
}
TOLERANCE = 1e-5  # relative, float32: rounding of different orders of the same sums


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def mended(theirs: Any) -> Any:
    """diffusers' model with the official time features and epsilon."""
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return theirs


def twins(**options: Any):
    """diffusers' model with random weights, its embedders equal in all blocks, and ours with the same."""
    from diffusers import DiTTransformer2DModel as Theirs

    torch.manual_seed(0)
    theirs = mended(Theirs(**{**SMALL, **options}).eval())
    with torch.no_grad():  # biases and offsets large enough to be missed if they were
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    ours = DiTTransformer2DModel(**{**SMALL, **options}).eval()
    ours.load_state_dict(ours.rename(theirs.state_dict()), strict=True)
    return ours, theirs


def inputs(batch: int = 2, rows: int = 8, columns: int = 8, channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, channels, rows, columns),
        "timestep": torch.tensor([7.0, 503.25, 999.0])[:batch],
        "class_labels": torch.tensor([3, 10, 0])[:batch],  # 10 is no class
    }


@pytest.mark.parametrize("attention", usable("cpu"))
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_it_equals_diffusers_with_its_slips_mended(options: dict[str, Any], attention: str) -> None:
    ours, theirs = twins(**options)
    set_attention(ours, attention)
    given = inputs(channels=ours.config.in_channels)
    given["class_labels"] = torch.tensor([0, ours.config.null_label])
    expected = theirs(**given).sample
    assert relative(ours(**given).sample, expected) <= TOLERANCE


@torch.inference_mode()
def test_the_time_features_of_diffusers_would_be_another_model() -> None:
    ours, theirs = twins()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert relative(ours(**inputs()).sample, theirs(**inputs()).sample) > 1e-2


def test_the_epsilon_is_the_official_one_whatever_the_configuration_says() -> None:
    ours = DiTTransformer2DModel(**SMALL, norm_eps=1e-5)
    norms = [module for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6} and len(norms) == 4


@torch.inference_mode()
def test_positions_are_whole_numbers_at_every_size() -> None:
    ours, _ = twins()
    _, larger = twins(sample_size=16)  # the same weights: a size has none
    given = inputs(rows=16, columns=16)
    assert relative(ours(**given).sample, larger(**given).sample) <= TOLERANCE
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    table, square = ours.positions(3, 5, **like), ours.positions(7, 7, **like)
    assert torch.equal(table.reshape(3, 5, 48), square.reshape(7, 7, 48)[:3, :5])
    assert torch.equal(table.reshape(3, 5, 48)[0, :, :24], table.reshape(3, 5, 48)[2, :, :24])  # the column
    assert ours(**inputs(rows=4, columns=12)).sample.shape == (2, 8, 4, 12)
    for rows in range(2, 60, 2):
        ours.positions(rows, 4, **like)
    assert len(ours._positions) <= 16


@torch.inference_mode()
def test_modulation_computed_before_equals_the_plain_way() -> None:
    ours, _ = twins()
    given = inputs(3)
    expected = ours(**given).sample
    table = ours.modulation(given["timestep"].flip(0), given["class_labels"].flip(0))
    found = ours(given["hidden_states"], modulation=table.at(torch.tensor([2, 1, 0]))).sample
    assert relative(found, expected) <= TOLERANCE
    one = ours(given["hidden_states"], modulation=table.at(slice(0, 1))).sample  # the last, for all
    assert relative(one[2], expected[2]) <= TOLERANCE and relative(one[0], expected[0]) > 1e-2


@torch.inference_mode()
def test_single_numbers_serve_all_and_latents_may_be_taken_twice_over() -> None:
    ours, _ = twins()
    latents, label = inputs(2)["hidden_states"], torch.tensor([3, 3, 10, 10])
    expected = ours(latents.repeat(2, 1, 1, 1), torch.full((4,), 503), label).sample
    assert relative(ours(latents, 503, label).sample, expected) <= TOLERANCE
    assert relative(ours(latents, torch.tensor(503.0), 3).sample, expected[:2]) <= TOLERANCE


@torch.inference_mode()
def test_a_batch_equals_its_rows() -> None:
    ours, _ = twins()
    given = inputs(3)
    together = ours(**given).sample
    for row in range(3):
        alone = ours(**{name: value[row : row + 1] for name, value in given.items()}).sample
        assert relative(alone[0], together[row]) <= TOLERANCE


def test_gradients_reach_every_parameter() -> None:
    ours, _ = twins()
    ours(**inputs()).sample.square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


COUNTS = {  # of the official code, at 256 pixels and 1000 classes
    "XL/2": 675_129_632,
    "XL/4": 675_074_432,
    "XL/8": 675_683_072,
    "L/2": 458_102_816,
    "L/4": 458_053_760,
    "L/8": 458_594_816,
    "B/2": 130_512_416,
    "B/4": 130_475_648,
    "B/8": 130_881_536,
    "S/2": 32_963_360,
    "S/4": 32_945_024,
    "S/8": 33_148_160,
}


@pytest.mark.parametrize("name", list(COUNTS))
def test_every_size_has_as_many_parameters_as_the_official_one(name: str) -> None:
    with torch.device("meta"):
        model = DiTTransformer2DModel(**SIZES[name])
    positions = (model.config.sample_size // model.config.patch_size) ** 2 * model.config.width
    assert sum(parameter.numel() for parameter in model.parameters()) + positions == COUNTS[name]


def test_there_are_no_other_sizes() -> None:
    assert SIZES.keys() == COUNTS.keys()


@torch.inference_mode()
def test_we_load_what_diffusers_saves(tmp_path: Path) -> None:
    ours, theirs = twins()
    theirs.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / DiTTransformer2DModel.weights_name)) > len(ours.state_dict())
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config == ours.config and not loaded.training
    assert torch.equal(loaded(**inputs()).sample, ours(**inputs()).sample)


@torch.inference_mode()
def test_diffusers_loads_what_we_save(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel as Theirs

    ours, theirs = twins()
    assert published_state(ours).keys() == theirs.state_dict().keys()
    ours.save_pretrained(tmp_path)
    loaded = mended(Theirs.from_pretrained(tmp_path).eval())
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == {
        key: value for key, value in theirs.config.items() if not key.startswith("_")
    }
    assert torch.equal(loaded(**inputs()).sample, theirs(**inputs()).sample)


def test_the_small_layout_comes_back_and_is_smaller(tmp_path: Path) -> None:
    ours, _ = twins()
    sizes = []
    for published in (True, False):
        ours.save_pretrained(tmp_path / str(published), published=published)
        file = tmp_path / str(published) / ours.weights_name
        sizes.append(file.stat().st_size)
        assert file.stat().st_mode == (tmp_path / str(published) / "config.json").stat().st_mode
        again = DiTTransformer2DModel.from_pretrained(tmp_path / str(published)).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in ours.state_dict().items())
    embedders = sum(
        parameter.numel()
        for part in (ours.timestep_embedder, ours.class_embedder)
        for parameter in part.parameters()
    )
    assert sizes[0] - sizes[1] > 2 * 4 * embedders  # two of three float32 copies


def test_embedders_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    path = tmp_path / ours.weights_name
    state = load_file(path)
    state["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"][4, 7] += 1e-3
    save_file(state, path)
    with pytest.raises(ValueError, match=r"blocks\.2\.norm1\.emb\.class_embedder.* one embedder"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_we_load_checkpoints_of_the_older_class(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "class_dropout" not in config  # diffusers does not know it
    config |= {
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "double_self_attention": False,
        "only_cross_attention": False,
        "num_vector_embeds": None,
        "use_linear_projection": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DiTTransformer2DModel.from_pretrained(tmp_path).config == ours.config
    (tmp_path / "config.json").write_text(json.dumps(config | {"only_cross_attention": True}))
    with pytest.raises(ValueError, match="only_cross_attention"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_model_may_know_no_picture_without_a_class(tmp_path: Path) -> None:
    model = DiTTransformer2DModel(**SMALL, class_dropout=False)
    assert model.config.null_label is None
    assert model.class_embedder.embedding_table.weight.shape == (10, 48)
    model.save_pretrained(tmp_path)
    assert DiTTransformer2DModel.from_pretrained(tmp_path).config == model.config


def test_dtype_follows_the_wish(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    half = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cpu")
    with torch.inference_mode():
        given = inputs()
        found = half(**(given | {"hidden_states": given["hidden_states"].bfloat16()})).sample
        assert found.dtype == torch.bfloat16
        assert relative(found.float(), ours(**given).sample) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        ({"norm_type": "ada_norm_single"}, "norm_type must be"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm must be a positive integer"),
        ({"attention_head_dim": 3}, "divisible by 4"),
    ],
)
def test_configurations_it_cannot_compute_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTTransformer2DModel(**{**SMALL, **options})


@torch.inference_mode()
def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = twins()
    given = inputs()
    with pytest.raises(ValueError, match="patches of 2"):
        ours(**(given | {"hidden_states": torch.randn(2, 4, 5, 4)}))
    with pytest.raises(ValueError, match="give timestep and class_labels, or modulation"):
        ours(given["hidden_states"], 5)
    with pytest.raises(ValueError, match="2 timesteps do not fit 3 class labels"):
        ours(**(given | {"class_labels": torch.tensor([1, 2, 3])}))
    with pytest.raises(ValueError, match="3 timesteps and class labels do not fit 2 latents"):
        ours(given["hidden_states"], 5, torch.tensor([1, 2, 3]))
