"""Official names to ours: whole checkpoints pass, and anything else is refused by name."""

import argparse
import pickle
import struct

import pytest
import torch

from pipelines.models.dit3d import DiT3DModel
from tests.golden.dit3d import official_shapes as cloud_shapes
from tests.golden.pixart import official_shapes
from weights import convert
from weights.convert import ConversionError
from weights.store import CorruptWeights

MODEL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 72,
    "depth": 3,
    "num_heads": 1,
    "caption_channels": 10,
    "model_max_length": 6,
}


def checkpoint(**more) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in official_shapes(MODEL | more).items()}


def dit_checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"pos_embed": (1, 16, 72), "y_embedder.embedding_table.weight": (11, 72)}
    for name, size in {
        "x_embedder.proj": (72, 4, 2, 2),
        "t_embedder.mlp.0": (72, 256),
        "t_embedder.mlp.2": (72, 72),
        "blocks.0.attn.qkv": (216, 72),
        "blocks.0.attn.proj": (72, 72),
        "blocks.0.mlp.fc1": (288, 72),
        "blocks.0.mlp.fc2": (72, 288),
        "blocks.0.adaLN_modulation.1": (432, 72),
        "final_layer.adaLN_modulation.1": (144, 72),
        "final_layer.linear": (32, 72),
    }.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_the_configuration_is_read_from_shapes():
    (part,) = convert.convert(checkpoint(), "pixart-sigma").parts
    assert part.config == {
        "num_attention_heads": 1,
        "attention_head_dim": 72,
        "cross_attention_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 10,
        "interpolation_scale": 8 / 64,
        "use_additional_conditions": False,
    }


def test_rows_of_a_joint_matrix_go_to_queries_keys_and_values():
    state = checkpoint()
    (part,) = convert.convert(state, "pixart-sigma").parts
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        rows = state["blocks.1.attn.qkv.weight"][72 * index : 72 * (index + 1)]
        assert torch.equal(part.state[f"transformer_blocks.1.attn1.{name}.weight"], rows)
    halves = [part.state[f"transformer_blocks.1.attn2.{name}.bias"] for name in ("to_k", "to_v")]
    assert torch.equal(torch.cat(halves), state["blocks.1.cross_attn.kv_linear.bias"])


def test_the_stored_positions_and_null_caption_are_dropped_and_told():
    converted = convert.convert(checkpoint(), "pixart-sigma")
    assert set(converted.dropped) == {"pos_embed", "y_embedder.y_embedding"}
    assert converted.facts == {"caption_length": 6}
    assert converted.tensors == len(checkpoint())


@pytest.mark.parametrize(
    ("size", "family", "scale"),
    [
        (32, "pixart-sigma", 0.5),
        (128, "pixart-sigma", 2.0),
        (32, "pixart-alpha", 1.0),
        (64, "pixart-alpha", 1.0),
        (128, "pixart-alpha", 2.0),
    ],
)
def test_the_position_scale_follows_the_published_rule(size, family, scale):
    (part,) = convert.convert(checkpoint(input_size=size), family).parts
    assert part.config["interpolation_scale"] == scale


def test_key_compression_is_seen_in_the_tensors():
    state = checkpoint()
    for name, shape in (("sr.weight", (72, 1, 2, 2)), ("sr.bias", (72,)), ("norm.weight", (72,))):
        state[f"blocks.2.attn.{name}"] = torch.ones(shape)
    with pytest.raises(ConversionError, match=r"1 tensors are missing:\n  blocks\.2\.attn\.norm\.bias$"):
        convert.convert(state, "pixart-sigma")
    state["blocks.2.attn.norm.bias"] = torch.ones(72)
    (part,) = convert.convert(state, "pixart-sigma").parts
    assert part.config["kv_compress_layers"] == (2,)
    assert part.config["kv_compress_factor"] == 2
    assert part.config["kv_compress_sampling"] == "conv"


def test_key_compression_without_tensors_is_said_in_the_configuration():
    wanted = {"sampling": "uniform", "scale_factor": 2, "kv_compress_layer": [1]}
    (part,) = convert.convert(checkpoint(), "pixart-sigma", {"kv_compress_config": wanted}).parts
    assert part.config["kv_compress_layers"] == (1,)
    off = {"kv_compress_config": wanted, "kv_compress": False}
    (part,) = convert.convert(checkpoint(), "pixart-sigma", off).parts
    assert "kv_compress_layers" not in part.config


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "model.module."])
@pytest.mark.parametrize("wrapper", ["ema", "state_dict", "model_state", None])
def test_wrappers_and_prefixes_are_taken_off(prefix, wrapper):
    state = {prefix + name: tensor for name, tensor in dit_checkpoint().items()}
    (part,) = convert.convert({wrapper: state, "epoch": 3} if wrapper else state, "dit").parts
    assert part.config["num_embeds_ada_norm"] == 10
    assert part.config["class_dropout"]


def test_averaged_weights_are_preferred():
    plain, averaged = dit_checkpoint(), dit_checkpoint()
    (part,) = convert.convert({"model": plain, "ema": averaged}, "dit").parts
    assert torch.equal(part.state["proj_out_2.bias"], averaged["final_layer.linear.bias"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), r"1 tensors are missing:\n  blocks\.1\.mlp\.fc1\.bias$"),
        (lambda s: s.update(extra=torch.ones(2)), r"1 of its 63 are unknown:\n  extra$"),
        (
            lambda s: s.update({"blocks.7.scale_shift_table": torch.ones(6, 72)}),
            r"74 tensors are missing:\n  blocks\.3\.",
        ),
        (lambda s: s.pop("pos_embed"), r"say input_size"),
        (lambda s: s.pop("x_embedder.proj.weight"), r"no pixart-sigma checkpoint"),
        (lambda s: s.update({"blocks.0.attn.qkv.bias": torch.ones(7)}), r"is \(7,\): not 3 parts"),
        (lambda s: s.clear(), r"no tensors"),
        (lambda s: s.update(args="x"), r"'args' in the checkpoint is no tensor"),
    ],
)
def test_what_is_not_a_whole_checkpoint_is_refused(damage, message):
    state = checkpoint()
    damage(state)
    with pytest.raises(ConversionError, match=message):
        convert.convert(state, "pixart-sigma")


def test_another_family_is_refused():
    with pytest.raises(ConversionError, match="this is no dit checkpoint"):
        convert.convert(checkpoint(), "dit")
    with pytest.raises(ConversionError, match="no pixart-sigma checkpoint"):
        convert.convert(dit_checkpoint(), "pixart-sigma")
    with pytest.raises(ConversionError, match="there are dit, dit-3d, pixart-alpha"):
        convert.convert(checkpoint(), "flux")


def test_a_width_that_does_not_tell_the_heads_asks_for_them():
    state = {name: torch.randn(shape) for name, shape in official_shapes(MODEL | {"hidden_size": 50}).items()}
    with pytest.raises(ConversionError, match="say num_heads"):
        convert.convert(state, "pixart-sigma")
    (part,) = convert.convert(state, "pixart-sigma", {"num_heads": 5}).parts
    assert part.config["attention_head_dim"] == 10


def test_a_file_of_tensors_is_read_with_the_options_of_its_training(tmp_path):
    content = {"ema": dit_checkpoint(), "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "dit.pt")
    assert convert.read_checkpoint(tmp_path / "dit.pt")["ema"].keys() == content["ema"].keys()


class _Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def _header(size: int, header: bytes) -> bytes:
    return struct.pack("<Q", size) + header


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.pt", pickle.dumps(_Code())),
        ("renamed.safetensors", pickle.dumps({"a": [1.0]})),
        ("empty.pt", b""),
        ("huge.safetensors", _header(1 << 60, b"{}")),
        (
            "claims.safetensors",
            _header(70, b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}'),
        ),
        ("number.pt", None),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, name, content, capsys):
    path = tmp_path / name
    if content is None:
        torch.save(3, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CorruptWeights, match=name.replace(".", r"\.")):
        convert.read_checkpoint(path)
    assert "must never run" not in capsys.readouterr().out


def test_a_file_cut_short_is_refused(tmp_path):
    torch.save(dit_checkpoint(), tmp_path / "dit.pt")
    whole = (tmp_path / "dit.pt").read_bytes()
    (tmp_path / "dit.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptWeights, match="cut short"):
        convert.read_checkpoint(tmp_path / "dit.pt")


def test_numbers_that_are_not_finite_are_named():
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}
    assert [*convert.not_finite(state)] == ["bad"]


# DiT-3D

CLOUDS = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 144,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 1,
    "learn_sigma": False,
}


def cloud_checkpoint(**more) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in cloud_shapes(CLOUDS | more).items()}


def cloud_part(state, **given) -> convert.Part:
    (part,) = convert.convert(state, "dit-3d", given).parts
    return part


def test_a_dit_of_clouds_is_told_by_its_shapes_alone():
    part = cloud_part(cloud_checkpoint())
    assert part.class_name == "DiT3DModel"
    assert part.config == {
        "num_attention_heads": 2,
        "attention_head_dim": 72,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1,
        "class_dropout": True,
    }
    network = DiT3DModel.empty(DiT3DModel.config_class(**part.config))
    network.load_state_dict(part.state, strict=True, assign=True)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1152, 16)])
def test_heads_of_published_widths_are_known(width, heads):
    state = cloud_checkpoint(hidden_size=width, depth=1)
    assert cloud_part(state).config["num_attention_heads"] == heads


@pytest.mark.parametrize(
    "prefix", ["model.module.", "module.model.", "model.", "module.", "module.module.", ""]
)
@pytest.mark.parametrize("wrapper", ["model_state", "ema", None])
def test_the_published_file_of_clouds_is_read(prefix, wrapper, tmp_path):
    state = {prefix + name: tensor for name, tensor in cloud_checkpoint().items()}
    file = {"epoch": 9999, wrapper: state, "optimizer_state": {"state": {}, "param_groups": []}}
    torch.save(file if wrapper else state, tmp_path / "chair.pth")
    part = cloud_part(convert.read_checkpoint(tmp_path / "chair.pth"))
    assert torch.equal(part.state["proj_out_2.bias"], state[prefix + "final_layer.linear.bias"])


def test_which_of_two_states_is_taken_can_be_said():
    plain, averaged = cloud_checkpoint(), cloud_checkpoint()
    file = {"model_state": {f"model.module.{k}": v for k, v in plain.items()}, "epoch": 1}
    file["ema"] = {f"model.{k}": v for k, v in averaged.items()}
    for given, wanted in (({}, averaged), ({"use_ema": True}, averaged), ({"use_ema": False}, plain)):
        found = cloud_part(file, **given).state["proj_out_2.bias"]
        assert torch.equal(found, wanted["final_layer.linear.bias"])


def test_published_windows_are_global_attention():
    state = cloud_checkpoint()
    assert "window_layers" not in cloud_part(state, window_size=2).config
    converted = convert.convert(state, "dit-3d", {"window_size": 2, "window_block_indexes": "0,1"})
    assert "window_layers" not in converted.parts[0].config
    assert "characters" in converted.facts["windows"]


def test_windows_can_be_said_in_true_numbers():
    given = {"window_size": 2, "window_block_indexes": [0]}
    assert cloud_part(cloud_checkpoint(), **given).config["window_layers"] == (0,)
    literal = cloud_part(cloud_checkpoint(), **given, window_kind="literal").config
    assert literal["window_kind"] == "literal" and literal["window_size"] == 2
    with pytest.raises(ConversionError, match="window_size is not: say both"):
        cloud_part(cloud_checkpoint(), window_block_indexes=[0])


def test_relative_positions_tell_the_windows():
    state = cloud_checkpoint(use_rel_pos=True, window_size=2, window_block_indexes=[1])
    config = cloud_part(state).config
    assert config["relative_positions"] and config["window_layers"] == (1,) and config["window_size"] == 2
    network = DiT3DModel.empty(DiT3DModel.config_class(**config))
    network.load_state_dict(cloud_part(state).state, strict=True, assign=True)
    everywhere = cloud_part(cloud_checkpoint(use_rel_pos=True)).config
    assert everywhere["relative_positions"] and "window_layers" not in everywhere


@pytest.mark.parametrize(
    ("damage", "given", "message"),
    [
        (
            lambda s: s.pop("blocks.1.mlp.fc1.bias"),
            {},
            r"1 tensors are missing:\n  blocks\.1\.mlp\.fc1\.bias$",
        ),
        (lambda s: s.update(extra=torch.ones(2)), {}, r"are unknown:\n  extra$"),
        (lambda s: s.pop("pos_embed"), {}, r"say input_size .* \(voxels per side\)"),
        (
            lambda s: s.update({"blocks.0.attn.rel_pos_x": torch.ones(7, 72)}),
            {},
            r"5 tensors are missing:\n  blocks\.0\.attn\.rel_pos_y",
        ),
        (lambda s: None, {"use_rel_pos": True}, "rel_pos tensors are not there"),
    ],
)
def test_what_is_not_a_whole_checkpoint_of_clouds_is_refused(damage, given, message):
    state = cloud_checkpoint()
    damage(state)
    with pytest.raises(ConversionError, match=message):
        cloud_part(state, **given)


def test_pictures_are_no_clouds_and_clouds_no_pictures():
    with pytest.raises(ConversionError, match=r"no dit-3d checkpoint.* along 2 axes and not 3"):
        cloud_part(dit_checkpoint())
    with pytest.raises(ConversionError, match=r"no dit checkpoint.* along 3 axes and not 2"):
        convert.convert(cloud_checkpoint(), "dit")
