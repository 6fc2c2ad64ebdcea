"""The transformer against diffusers', and every shortcut against the plain way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.attention import set_attention, usable
from pipelines.models.pixart import PixArtTransformer2DModel

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    num_layers=3,
    cross_attention_dim=48,
    caption_channels=20,
    sample_size=16,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro": {"use_additional_conditions": True},
    "micro by size": {"sample_size": 128, "interpolation_scale": 2},
    "half scale": {"interpolation_scale": 0.5, "out_channels": 4},
    "affine": {"norm_elementwise_affine": True, "attention_bias": False, "out_channels": None},
    "patch 4": {"patch_size": 4},
    "unprojected": {"caption_channels": None, "cross_attention_dim": 20},
}
TOLERANCE = 1e-5  # relative, float32: rounding of different orders of the same sums


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def twins(**options: Any):
    """diffusers' model with random weights, and ours with the same."""
    from diffusers import PixArtTransformer2DModel as Theirs

    torch.manual_seed(0)
    theirs = Theirs(**{**SMALL, **options}).eval()
    with torch.no_grad():  # biases and offsets large enough to be missed if they were
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = PixArtTransformer2DModel(**{**SMALL, **options}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(batch: int = 2, rows: int = 16, columns: int = 16, length: int = 7) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, rows, columns),
        "encoder_hidden_states": torch.randn(batch, length, 20),
        "timestep": torch.randint(0, 1000, (batch,)),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[128.0, 128.0], [96.0, 160.0], [1.0, 2.0]])[:batch],
            "aspect_ratio": torch.tensor([[1.0], [0.6], [0.5]])[:batch],
        },
    }


def ragged(batch: int = 2, length: int = 7) -> Tensor:
    """A mask of different lengths, one of them a single token."""
    lengths = torch.tensor([4, 1, length])[:batch]
    return (torch.arange(length) < lengths[:, None]).long()


@pytest.mark.parametrize("attention", usable("cpu"))
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_it_equals_diffusers(options: dict[str, Any], masked: bool, attention: str) -> None:
    ours, theirs = twins(**options)
    set_attention(ours, attention)
    given = inputs(batch=3) | ({"encoder_attention_mask": ragged(3)} if masked else {})
    expected = theirs(**given).sample
    assert relative(ours(**given).sample, expected) <= TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(8, 32), (20, 12), (2, 2)])
@torch.inference_mode()
def test_it_equals_diffusers_off_the_square(rows: int, columns: int) -> None:
    ours, theirs = twins(use_additional_conditions=True)
    given = inputs(rows=rows, columns=columns) | {"encoder_attention_mask": ragged()}
    found = ours(**given).sample
    assert found.shape == (2, 8, rows, columns)
    assert relative(found, theirs(**given).sample) <= TOLERANCE


@torch.inference_mode()
def test_a_boolean_mask_means_the_same_as_numbers() -> None:
    ours, _ = twins()
    given = inputs()
    numbers = ours(**given, encoder_attention_mask=ragged()).sample
    assert torch.equal(ours(**given, encoder_attention_mask=ragged().bool()).sample, numbers)
    assert relative(numbers, ours(**given).sample) > 1e-3  # the mask is not idle


@pytest.mark.parametrize("attention", usable("cpu"))
@torch.inference_mode()
def test_text_and_modulation_computed_before_equal_the_plain_way(attention: str) -> None:
    ours, _ = twins(use_additional_conditions=True)
    set_attention(ours, attention)
    given, mask = inputs(batch=3), ragged(3)
    expected = ours(**given, encoder_attention_mask=mask).sample
    text = ours.text_states(given["encoder_hidden_states"], mask)
    modulation = ours.modulation(given["timestep"], given["added_cond_kwargs"])
    found = ours(given["hidden_states"], text=text, modulation=modulation).sample
    assert relative(found, expected) <= TOLERANCE


@torch.inference_mode()
def test_one_row_of_a_table_of_steps_serves_the_whole_batch() -> None:
    ours, _ = twins()
    given = inputs()
    table = ours.modulation(torch.tensor([900, 500, 100]))
    expected = ours(**(given | {"timestep": torch.tensor([500, 500])})).sample
    text = ours.text_states(given["encoder_hidden_states"])
    found = ours(given["hidden_states"], text=text, modulation=table.at(1)).sample
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_latents_taken_twice_over_equal_latents_given_twice(batch: int) -> None:
    ours, _ = twins(use_additional_conditions=True)
    given = inputs(batch)
    captions = torch.randn(2 * batch, 7, 20)
    mask = torch.tensor([[1] + [0] * 6] * batch + [[1] * 7, [1] * 5 + [0] * 2][:batch])
    added = {name: value.repeat(2, 1) for name, value in given["added_cond_kwargs"].items()}
    expected = ours(
        given["hidden_states"].repeat(2, 1, 1, 1),
        captions,
        given["timestep"].repeat(2),
        added,
        encoder_attention_mask=mask,
    ).sample
    text = ours.text_states(captions, mask)
    modulation = ours.modulation(given["timestep"], given["added_cond_kwargs"])
    found = ours(given["hidden_states"], text=text, modulation=modulation).sample
    assert relative(found, expected) <= TOLERANCE


@torch.inference_mode()
def test_single_tokens_become_constants_and_padding_is_cut_off() -> None:
    ours, _ = twins()
    captions = torch.randn(4, 9, 20)
    mask = torch.tensor([[1] + [0] * 8] * 2 + [[1] * 5 + [0] * 4] * 2)
    empty, words = ours.text_states(captions, mask).runs
    assert empty.constants[0].shape == (2, 1, 48) and not empty.keys
    assert words.keys[0].shape == (2, 2, 5, 24) and words.mask_B11L is None


@torch.inference_mode()
def test_a_mask_may_have_holes() -> None:
    ours, theirs = twins()
    given = inputs() | {
        "encoder_attention_mask": torch.tensor([[0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]])
    }
    expected = theirs(**given).sample
    assert relative(ours(**given).sample, expected) <= TOLERANCE
    text = ours.text_states(given["encoder_hidden_states"], given["encoder_attention_mask"])
    assert (
        relative(ours(given["hidden_states"], timestep=given["timestep"], text=text).sample, expected)
        <= TOLERANCE
    )


@torch.inference_mode()
def test_a_batch_equals_its_rows() -> None:
    ours, _ = twins()
    given = inputs(3) | {"encoder_attention_mask": ragged(3)}
    together = ours(**given).sample
    for row in range(3):
        alone = ours(
            given["hidden_states"][row : row + 1],
            given["encoder_hidden_states"][row : row + 1],
            given["timestep"][row : row + 1],
            encoder_attention_mask=given["encoder_attention_mask"][row : row + 1],
        ).sample
        assert relative(alone[0], together[row]) <= TOLERANCE


def test_gradients_reach_every_parameter_and_equal_diffusers() -> None:
    ours, theirs = twins(use_additional_conditions=True)
    given = inputs() | {"encoder_attention_mask": ragged()}
    for model in (ours, theirs):
        model(**given).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].grad.abs().max().clamp(min=1e-6)
        assert (parameter.grad - expected[name].grad).abs().max() / scale <= 2e-4, name


@torch.inference_mode()
def test_positions_are_computed_once_per_size() -> None:
    ours, _ = twins()
    like = (torch.float32, torch.device("cpu"))
    ours(**inputs())
    assert len(ours._positions) == 1
    assert ours.positions(5, 4, *like) is ours.positions(5, 4, *like)
    for rows in range(2, 60, 2):
        ours.positions(rows, 4, *like)
    assert len(ours._positions) <= 16


def test_state_dict_and_sizes_are_those_published() -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=False, interpolation_scale=2
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 610_856_096
    # 437 in the original file: less two buffers, and 28 times two tensors more for each unfused projection
    assert len(model.state_dict()) == 437 - 2 + 28 * 2 * 3


def test_diffusers_loads_what_we_save(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel as Theirs

    ours, theirs = twins(interpolation_scale=0.5)
    ours.save_pretrained(tmp_path)
    loaded = Theirs.from_pretrained(tmp_path).eval()
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == {
        key: value for key, value in theirs.config.items() if not key.startswith("_")
    }
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


@torch.inference_mode()
def test_we_load_what_diffusers_saves(tmp_path: Path) -> None:
    ours, theirs = twins()
    theirs.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config == ours.config and not loaded.training
    given = inputs()
    assert torch.equal(loaded(**given).sample, ours(**given).sample)


@torch.inference_mode()
def test_we_load_shards(tmp_path: Path) -> None:
    ours, theirs = twins()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    given = inputs()
    assert torch.equal(
        PixArtTransformer2DModel.from_pretrained(tmp_path)(**given).sample, ours(**given).sample
    )


def test_we_load_checkpoints_of_the_older_class(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "_class_name": "Transformer2DModel",
        "double_self_attention": False,
        "only_cross_attention": False,
        "num_vector_embeds": None,
        "use_linear_projection": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PixArtTransformer2DModel.from_pretrained(tmp_path).config == ours.config


def test_dtype_and_copies_follow_the_wish(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    half = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16 and half.device.type == "cpu"
    with torch.inference_mode():
        given = inputs()
        for name in ("hidden_states", "encoder_hidden_states"):
            given[name] = given[name].bfloat16()
        found = half(**given).sample
        assert found.dtype == torch.bfloat16
        assert relative(found.float(), ours(**inputs()).sample) < 0.05
    assert copy.deepcopy(ours).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        ({"norm_type": "ada_norm"}, "norm_type must be"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"attention_head_dim": 3}, "divisible by 4"),
        ({"cross_attention_dim": 64}, "cross_attention_dim is 64"),
    ],
)
def test_configurations_it_cannot_compute_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixArtTransformer2DModel(**{**SMALL, **options})


@torch.inference_mode()
def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = twins(use_additional_conditions=True)
    given = inputs()
    conditions = given["added_cond_kwargs"]
    with pytest.raises(ValueError, match="patches of 2"):
        ours(**(given | {"hidden_states": torch.randn(2, 4, 5, 4)}))
    with pytest.raises(ValueError, match="added_cond_kwargs"):
        ours(**(given | {"added_cond_kwargs": None}))
    with pytest.raises(ValueError, match="no real token"):
        ours.text_states(given["encoder_hidden_states"], torch.zeros(2, 7))
    with pytest.raises(ValueError, match="mask is"):
        ours.text_states(given["encoder_hidden_states"], torch.ones(2, 6))
    with pytest.raises(ValueError, match="3 captions do not fit 2 latents"):
        three = ours.text_states(torch.randn(3, 2, 20))
        ours(given["hidden_states"], modulation=ours.modulation(given["timestep"], conditions), text=three)


# ------------------------------------------------- fewer keys and values, normalised queries and keys


def thinned(sampling: str, factor: int = 2, layers: tuple[int, ...] = (1, 2), **more: Any):
    options = {
        "kv_compress_sampling": sampling,
        "kv_compress_factor": factor,
        "kv_compress_layers": layers,
    }
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**SMALL, **options, **more}).eval()


@pytest.mark.parametrize("sampling", ["conv", "uniform", "ave", "uniform_every"])
def test_only_the_layers_named_have_fewer_keys(sampling: str) -> None:
    model, seen = thinned(sampling), []
    for block in model.transformer_blocks:
        block.attn1.attend = lambda q, k, v, mask=None: seen.append((q.shape[2], k.shape[2], v.shape[2])) or q
    model(**inputs())
    fewer = 32 if sampling == "uniform_every" else 16
    assert seen == [(64, 64, 64), (64, fewer, fewer), (64, fewer, fewer)]


def test_the_convolution_starts_as_the_mean_of_its_window() -> None:
    layer = thinned("conv").transformer_blocks[1].attn1
    x_BND = torch.randn(2, 64, 48)
    means = torch.nn.functional.avg_pool2d(x_BND.transpose(1, 2).unflatten(2, (8, 8)), 2)
    expected = torch.nn.functional.layer_norm(means.flatten(2).transpose(1, 2), (48,))
    assert relative(layer._compress(x_BND, (8, 8)), expected) < TOLERANCE


def test_ave_keeps_the_same_tokens_as_uniform() -> None:
    ave, uniform = thinned("ave"), thinned("uniform")
    assert torch.equal(ave(**inputs()).sample, uniform(**inputs()).sample)


@pytest.mark.parametrize("sampling", ["uniform", "uniform_every"])
def test_grids_that_cannot_be_thinned_evenly_are_refused(sampling: str) -> None:
    with pytest.raises(ValueError, match="cannot be thinned by 2"):
        thinned(sampling)(**inputs(rows=10, columns=18))


@pytest.mark.parametrize("sampling", ["conv", "ave"])
def test_an_odd_row_is_left_out_of_the_others(sampling: str) -> None:
    assert thinned(sampling)(**inputs(rows=10, columns=18)).sample.shape == (2, 8, 10, 18)


@pytest.mark.parametrize("attention", usable("cpu"))
def test_precomputed_parts_equal_the_plain_way_when_thinned(attention: str) -> None:
    model, given = thinned("conv", qk_norm=True), inputs()
    set_attention(model, attention)
    text = model.text_states(given["encoder_hidden_states"])
    modulation = model.modulation(given["timestep"])
    found = model(given["hidden_states"], text=text, modulation=modulation).sample
    assert relative(found, model(**given).sample) < TOLERANCE


def test_options_beyond_diffusers_survive_a_file_and_are_silent_when_off(tmp_path: Path) -> None:
    model = thinned("conv", qk_norm=True)
    model.save_pretrained(tmp_path / "on")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "on")
    assert again.config == model.config
    assert torch.equal(again(**inputs()).sample, model(**inputs()).sample)
    PixArtTransformer2DModel(**SMALL).save_pretrained(tmp_path / "off")
    entries = json.loads((tmp_path / "off" / "config.json").read_text())
    assert not entries.keys() & set(PixArtTransformer2DModel.beyond)


def test_a_hook_between_blocks_can_change_the_tokens() -> None:
    model, calls = PixArtTransformer2DModel(**SMALL).eval(), []

    def between(index: int, x_BND: Tensor, modulation: Any) -> Tensor:
        calls.append((index, tuple(x_BND.shape), len(modulation.blocks_ES6D)))
        return x_BND + index

    plain, changed = model(**inputs()).sample, model(**inputs(), between=between).sample
    assert calls == [(1, (2, 64, 48), 3), (2, (2, 64, 48), 3)]
    assert not torch.allclose(plain, changed)
    assert torch.equal(plain, model(**inputs(), between=lambda index, x_BND, modulation: x_BND).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_compress_sampling": "mean"}, "must be one of conv, uniform, ave, uniform_every, not 'mean'"),
        ({"kv_compress_sampling": None}, "not None"),
        ({"kv_compress_factor": 1}, "kv_compress_factor must be 2 or more"),
        ({"kv_compress_layers": (1, 3)}, r"names \[3\], there are 3 layers"),
    ],
)
def test_compression_that_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    sane = {"kv_compress_sampling": "conv", "kv_compress_factor": 2, "kv_compress_layers": (1,)}
    with pytest.raises(ValueError, match=message):
        PixArtTransformer2DModel(**{**SMALL, **sane, **options})
