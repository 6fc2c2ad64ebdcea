"""Adapters merged into the weights, against low-rank branches beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pipelines import lean
from pipelines.dit import DiTPipeline
from pipelines.int8 import quantize_linears
from pipelines.lora import LoRA, Pair, load_lora, merge, merge_all, save_lora, unmerge
from pipelines.lora_keys import seems_for
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.pixart import PixArtTransformer2DModel

RANK = 3
# Those of the published adapter; `proj` is the patch convolution and the feed-forward's first layer.
TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 proj linear linear_1 linear_2"""


def model() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=20,
        use_additional_conditions=True,
    ).eval()


def adapted(network: nn.Module) -> dict[str, nn.Module]:
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {n: m for n, m in layers.items() if any(f".{n}".endswith(f".{t}") for t in TARGETS.split())}


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Both halves random: published ones start with B at zero, trained ones do not."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, layer in adapted(network).items():
        weight = layer.weight
        window = weight.shape[2:]
        down = torch.randn(RANK, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], RANK, *[1] * len(window), generator=generator)
        found[f"base_model.model.{name}.lora_A.weight"] = 0.1 * down
        found[f"base_model.model.{name}.lora_B.weight"] = 0.1 * up
    return found


def write(folder: Path, contents: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(contents, folder / "adapter_model.safetensors")
    entries: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": TARGETS.split(),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(entries | config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "lora", tensors(model()))


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 20, generator=generator),
        "timestep": torch.tensor([10, 700]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[128.0, 128.0], [96.0, 160.0]]),
            "aspect_ratio": torch.tensor([[1.0], [0.6]]),
        },
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
    }


@contextmanager
def branches(network: nn.Module, contents: dict[str, Tensor], strength: float) -> Iterator[None]:
    """As the paper draws it: A and B beside every layer."""

    def branch(name: str) -> Any:
        down, up = (contents[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")

        def add(layer: nn.Module, given: tuple[Tensor], answer: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                small = functional.conv2d(given[0], down, stride=layer.stride)
                return answer + strength * functional.conv2d(small, up)
            return answer + strength * (given[0] @ down.T @ up.T)

        return add

    handles = [layer.register_forward_hook(branch(name)) for name, layer in adapted(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
@torch.inference_mode()
def test_merged_equals_low_rank_branches(folder: Path, scale: float) -> None:
    network = model()
    plain = network(**inputs()).sample
    with branches(network, tensors(network), 2 * scale):  # alpha / r is 2
        expected = network(**inputs()).sample
    merge(network, load_lora(folder), scale)
    found = network(**inputs()).sample
    print("lora", scale, relative(found, expected))
    assert relative(found, expected) <= 2e-5  # float32: other orders of the same sums
    assert relative(plain, expected) > 1e-2


def test_every_layer_that_the_published_adapter_names_is_reached(folder: Path) -> None:
    network = model()
    merged = merge(network, load_lora(folder))
    assert merged.untouched == ()
    assert set(merged.layers) == set(adapted(network))
    for name in (
        "pos_embed.proj",
        "adaln_single.linear",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.resolution_embedder.linear_2",
        "caption_projection.linear_1",
        "transformer_blocks.1.attn2.to_out.0",
        "transformer_blocks.0.ff.net.0.proj",
        "proj_out",
    ):
        assert name in merged.layers
    every = {n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert every == set(merged.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(folder: Path, dtype: torch.dtype) -> None:
    network = model().to(dtype)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    identities = {name: id(parameter) for name, parameter in network.named_parameters()}
    first, second = merge(network, load_lora(folder)), merge(network, load_lora(folder), 0.5)
    after = network.state_dict()
    weights = {f"{name}.weight" for name in first.layers}
    assert {key for key in before if not torch.equal(before[key], after[key])} == weights
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    with pytest.raises(ValueError, match="another adapter was merged after this one"):
        unmerge(network, first)
    unmerge(network, second)
    unmerge(network, first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert identities == {name: id(parameter) for name, parameter in network.named_parameters()}
    with pytest.raises(ValueError, match="not merged into this model"):
        unmerge(network, first)


def test_originals_that_were_not_kept_cannot_be_put_back(folder: Path) -> None:
    network, kept = model(), model()
    merged = merge(network, load_lora(folder), keep_originals=False)
    merge(kept, load_lora(folder))
    for name, tensor in kept.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert not merged.originals
    with pytest.raises(ValueError, match="without keeping the originals; load the weights again"):
        unmerge(network, merged)


def test_a_merged_model_can_be_saved_and_moved(folder: Path, tmp_path: Path) -> None:
    network = model()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    merged = merge(network, load_lora(folder))
    network.save_pretrained(tmp_path / "merged")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in network.state_dict().items())
    network.to(torch.bfloat16)
    unmerge(network, merged)
    assert all(
        torch.equal(tensor, before[key].to(torch.bfloat16)) for key, tensor in network.state_dict().items()
    )


def test_layers_may_have_ranks_and_strengths_of_their_own(tmp_path: Path) -> None:
    contents = {
        "base_model.model.proj_out.lora_A.weight": torch.randn(5, 48),
        "base_model.model.proj_out.lora_B.weight": torch.randn(32, 5),
        "base_model.model.adaln_single.linear.lora_A.weight": torch.randn(RANK, 48),
        "base_model.model.adaln_single.linear.lora_B.weight": torch.randn(288, RANK),
    }
    lora = load_lora(
        write(tmp_path / "a", contents, rank_pattern={"proj_out": 5}, alpha_pattern={"proj_out": 10})
    )
    assert lora.pairs["proj_out"].scale == lora.pairs["adaln_single.linear"].scale == 2
    rooted = load_lora(write(tmp_path / "b", contents, rank_pattern={"proj_out": 5}, use_rslora=True))
    assert rooted.pairs["proj_out"].scale == pytest.approx(6 / 5**0.5)
    merged = merge(model(), lora)
    assert merged.layers == ("adaln_single.linear", "proj_out")
    assert "pos_embed.proj" in merged.untouched and "proj_out" not in merged.untouched
    pattern = load_lora(
        write(tmp_path / "c", contents, rank_pattern={"proj_out": 5}, target_modules=".*linear")
    )
    assert merge(model(), pattern).untouched == ()


def test_tensors_without_a_layer_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    network, contents = model(), tensors(model())
    contents["base_model.model.transformer_blocks.7.attn1.to_q.lora_A.weight"] = torch.zeros(RANK, 48)
    contents["base_model.model.transformer_blocks.7.attn1.to_q.lora_B.weight"] = torch.zeros(48, RANK)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    lora = load_lora(write(tmp_path, contents))
    message = r"no layers for .*transformer_blocks\.7\.attn1\.to_q\.lora_A\.weight, .*lora_B\.weight"
    with pytest.raises(ValueError, match=message):
        merge(network, lora)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    contents = {
        "base_model.model.proj_out.lora_A.weight": torch.zeros(RANK, 64),
        "base_model.model.proj_out.lora_B.weight": torch.zeros(32, RANK),
    }
    with pytest.raises(
        ValueError, match=r"proj_out is for weights of \(32, 64\), the model's are \(32, 48\)"
    ):
        merge(model(), load_lora(write(tmp_path, contents)))
    with pytest.raises(ValueError, match="scale must be a number"):
        merge(model(), LoRA(pairs={}, targets=(), source=""), float("nan"))


A, B = "base_model.model.proj_out.lora_A.weight", "base_model.model.proj_out.lora_B.weight"
HALVES = {A: torch.zeros(RANK, 48), B: torch.zeros(32, RANK)}


@pytest.mark.parametrize(
    ("contents", "config", "message"),
    [
        ({A: HALVES[A]}, {}, r"lora_A or lora_B \(.*\) is missing for proj_out"),
        (HALVES | {"proj_out.weight": torch.zeros(1)}, {}, "no part of a LoRA: proj_out.weight"),
        (HALVES | {A: torch.full((RANK, 48), torch.nan)}, {}, "not finite"),
        (HALVES | {A: torch.zeros(2, 48)}, {}, "has rank 2 and 3, r means 3"),
        (HALVES | {A: torch.zeros(RANK, 48, 1)}, {}, r"lora_A \(3, 48, 1\)"),
        ({}, {}, "holds no tensors"),
        (HALVES, {"r": 0}, "r must be a positive integer"),
        (HALVES, {"lora_alpha": None}, "lora_alpha must be a number"),
        (HALVES, {"use_dora": True}, "use_dora True is not supported"),
        (HALVES, {"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        (HALVES, {"bias": "all"}, "bias 'all' is not supported"),
        (HALVES, {"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ],
)
def test_files_that_are_something_else_are_refused(
    tmp_path: Path, contents: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_lora(write(tmp_path, contents, **config))


def test_missing_and_unsafe_files_are_refused(tmp_path: Path, folder: Path) -> None:
    assert load_lora(folder / "adapter_model.safetensors").pairs.keys() == load_lora(folder).pairs.keys()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_lora(tmp_path / "adapter_model.bin")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_lora(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_lora(folder)
    for name in ("a", "b"):
        save_file(HALVES, folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files \(a\.safetensors, b\.safetensors\); name one"):
        load_lora(folder)


# ------------------------------------------------------------------------------------------ forms of files


def in_style(contents: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """The tensors that `tensors` gives, under the names of others."""
    found = {}
    for key, tensor in contents.items():
        layer, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        down = half == "A.weight"
        if style == "kohya":
            flat = f"lora_unet_{layer.replace('.', '_')}"
            found[f"{flat}.lora_{'down' if down else 'up'}.weight"] = tensor
            found[f"{flat}.alpha"] = torch.tensor(2.0 * RANK)
        elif style == "diffusers of old":
            found[f"unet.{layer}.lora.{'down' if down else 'up'}.weight"] = tensor
            found[f"unet.{layer}.alpha"] = torch.tensor(2.0 * RANK)
        else:
            found[f"transformer.{layer}.lora_{half}"] = tensor
    return found


@pytest.mark.parametrize("style", ["kohya", "diffusers of old", "diffusers"])
def test_every_style_of_keys_gives_the_same_weights(folder: Path, tmp_path: Path, style: str) -> None:
    """The strength, alpha / r = 2, stands in the file: as .alpha, or in diffusers' header."""
    header = {"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK}
    metadata = {"lora_adapter_metadata": json.dumps(header)} if style == "diffusers" else None
    save_file(in_style(tensors(model()), style), tmp_path / "x.safetensors", metadata)
    expected, network = model(), model()
    merge(expected, load_lora(folder))
    merged = merge(network, load_lora(tmp_path / "x.safetensors"))
    assert set(merged.layers) == set(adapted(network))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_without_alpha_the_strength_is_one_and_ranks_may_differ(tmp_path: Path) -> None:
    network, draw = model(), torch.Generator().manual_seed(3)
    ranks = {"proj_out": 2, "transformer_blocks.1.attn2.to_out.0": 5, "pos_embed.proj": 1}
    contents = {}
    for name, rank in ranks.items():
        weight = network.get_submodule(name).weight
        contents[f"{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=draw)
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
        contents[f"{name}.lora_B.weight"] = up
    save_file(contents, tmp_path / "x.safetensors")
    before = {name: network.get_submodule(name).weight.clone() for name in ranks}
    merge(network, load_lora(tmp_path), 0.5)
    for name in ranks:
        down, up = (contents[f"{name}.lora_{half}.weight"].flatten(1) for half in "AB")
        wanted = before[name] + 0.5 * (up @ down).view_as(before[name])
        torch.testing.assert_close(network.get_submodule(name).weight.data, wanted)


@pytest.mark.parametrize("flat", [False, True], ids=["dotted", "kohya"])
def test_layers_may_have_the_authors_names_with_q_k_and_v_in_one(tmp_path: Path, flat: bool) -> None:
    network, draw = model(), torch.Generator().manual_seed(4)
    official = {
        "blocks.1.attn.qkv": ["transformer_blocks.1.attn1.to_q", "...to_k", "...to_v"],
        "blocks.0.cross_attn.kv_linear": ["transformer_blocks.0.attn2.to_k", "...to_v"],
        "blocks.0.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
        "t_block.1": ["adaln_single.linear"],
        "final_layer.linear": ["proj_out"],
        "csize_embedder.mlp.0": ["adaln_single.emb.resolution_embedder.linear_1"],
    }
    contents, expected = {}, {}
    for name, (first, *others) in official.items():
        ours = [first, *(f"{first.rpartition('.')[0]}.{one.removeprefix('...')}" for one in others)]
        weights = [network.get_submodule(one).weight for one in ours]
        down = torch.randn(RANK, weights[0].shape[1], generator=draw)
        up = torch.randn(sum(len(weight) for weight in weights), RANK, generator=draw)
        key = f"lora_unet_{name.replace('.', '_')}" if flat else f"diffusion_model.{name}"
        halves = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        contents |= {f"{key}.{half}.weight": one for half, one in zip(halves, (down, up), strict=True)}
        changes = (up @ down).split([len(weight) for weight in weights])
        expected |= {one: w.data + c for one, w, c in zip(ours, weights, changes, strict=True)}
    save_file(contents, tmp_path / "x.safetensors")
    merged = merge(network, load_lora(tmp_path))
    assert set(merged.layers) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(network.get_submodule(name).weight.data, weight, msg=name)


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(5)
    pairs = {
        "transformer_blocks.0.attn1.to_q": (
            torch.randn(4, 48, generator=draw),
            torch.randn(48, 4, generator=draw),
        ),
        "proj_out": (
            torch.randn(2, 48, generator=draw).half(),
            torch.randn(32, 2, generator=draw).half(),
        ),
    }
    folder = save_lora(tmp_path / "new", pairs, 4, 6.0, ["to_q", "proj_out"], {"base_model": "x"})
    found = load_lora(folder)
    assert found.base == "x" and found.targets == ("to_q", "proj_out")
    for name, (down, up) in pairs.items():
        assert torch.equal(found.pairs[name].down, down) and torch.equal(found.pairs[name].up, up)
        assert found.pairs[name].scale == 1.5
    with pytest.raises(ValueError, match="not finite"):
        save_lora(
            tmp_path / "bad", {"proj_out": (torch.full((4, 48), torch.nan), torch.ones(32, 4))}, 4, 4, []
        )
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("proj_out.dora_scale", "DoRA"),
        ("lora_unet_proj_out.hada_w1_a", "LoHa"),
        ("lora_unet_proj_out.lokr_w1", "LoKr"),
        ("lora_unet_proj_out.lora_mid.weight", "Tucker"),
        ("lora_unet_proj_out.diff", "whole differences"),
        ("proj_out.oft_R.weight", "OFT"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, key: str, kind: str) -> None:
    save_file(HALVES | {key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"holds .*{kind}.*not computed here.*{key}"):
        load_lora(tmp_path)


def test_parts_for_text_encoders_are_left_out_and_told(tmp_path: Path) -> None:
    contents = in_style(tensors(model()), "kohya")
    text = {
        f"lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_{one}.weight": torch.zeros(2, 2)
        for one in ("down", "up")
    }
    save_file(contents | text, tmp_path / "x.safetensors")
    assert load_lora(tmp_path).left_out == tuple(sorted(text))
    save_file(text, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is for a text encoder"):
        load_lora(tmp_path)


LINEAR = ((4, 1152), (1152, 4))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            {"down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": ((8, 768), (640, 8))},
            "Diffusion 1.5",
        ),
        ({"input_blocks_4_1_transformer_blocks_0_attn2_to_k": ((8, 2048), (640, 8))}, "SDXL"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ((8, 1280), (1280, 8))}, "a U-Net"),
        ({"double_blocks_0_img_attn_qkv": ((16, 3072), (9216, 16))}, "Flux"),
        ({"single_transformer_blocks.3.attn.to_q": ((16, 3072), (3072, 16))}, "Flux"),
        ({"transformer_blocks.3.attn.to_q": ((16, 1536), (1536, 16))}, "Stable Diffusion 3"),
        ({"blocks.3.self_attn.q": ((16, 1536), (1536, 16))}, "Wan"),
        (
            {
                "transformer_blocks.27.attn1.to_q": LINEAR,
                "adaln_single.emb.resolution_embedder.linear_1": ((4, 256), (384, 4)),
            },
            "PixArt-alpha of width 1152 with 28 blocks or more",
        ),
        ({"blocks_3_cross_attn_q_linear": LINEAR}, "PixArt-alpha or PixArt-Sigma of width 1152"),
        ({"transformer_blocks.3.attn2.to_q": LINEAR}, "PixArt-alpha or PixArt-Sigma of width 1152"),
        ({"blocks.3.adaLN_modulation.1": ((4, 1152), (6912, 4))}, "DiT with 4 blocks or more"),
        ({"transformer_blocks.3.attn1.to_q": LINEAR}, "PixArt or DiT of width 1152"),
        ({"something.else": LINEAR}, ""),
    ],
)
def test_what_a_file_seems_to_be_for(pairs: dict[str, Any], words: str) -> None:
    found = seems_for(pairs)
    assert found.endswith(words) if words.startswith("Diff") else found.startswith(words)
    assert bool(found) == bool(words)


def test_the_name_of_its_base_tells_sigma_from_alpha() -> None:
    pairs = {"transformer_blocks.3.attn2.to_q": LINEAR}
    assert seems_for(pairs, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS").startswith("PixArt-Sigma of width")
    assert seems_for(pairs, "PixArt-alpha/PixArt-XL-2-1024-MS").startswith("PixArt-alpha of width")


def test_keys_that_do_not_fit_are_counted_and_the_model_is_guessed(tmp_path: Path) -> None:
    contents = {}
    for block in range(10):
        name = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_attn2_to_k"
        contents |= {f"{name}.lora_down.weight": torch.zeros(2, 768)}
        contents |= {f"{name}.lora_up.weight": torch.zeros(320, 2)}
    save_file(contents, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"no layers for .* and 12 more\. It seems to be for Stable Diff.* 1\.5"
    ):
        merge(model(), load_lora(tmp_path))


# ---------------------------------------------------------------------------------------- several at once


def another(folder: Path) -> Path:
    """An adapter of other numbers and another rank, for some of the layers."""
    draw, contents, network = torch.Generator().manual_seed(9), {}, model()
    for name, layer in adapted(network).items():
        if "attn1" in name:
            contents[f"{name}.lora_A.weight"] = 0.1 * torch.randn(5, layer.weight.shape[1], generator=draw)
            contents[f"{name}.lora_B.weight"] = 0.1 * torch.randn(len(layer.weight), 5, generator=draw)
    folder.mkdir()
    save_file(contents, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapters_are_the_sum_rounded_once(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = load_lora(folder), load_lora(another(tmp_path / "b"))
    network = model().to(dtype)
    before = {name: layer.weight.clone() for name, layer in adapted(network).items()}
    merged = merge_all(network, [(first, 0.5), (second, -0.25)])
    for name, weight in before.items():
        total = weight.float() + 0.5 * first.pairs[name].change(weight.device)
        if name in second.pairs:
            total = total + -0.25 * second.pairs[name].change(weight.device)
        assert torch.equal(network.get_submodule(name).weight.data, total.to(dtype)), name
    unmerge(network, merged)
    assert all(torch.equal(adapted(network)[name].weight, weight) for name, weight in before.items())


# ------------------------------------------------------------------------------------------- of a pipeline


def pipeline(vae: Any) -> DiTPipeline:
    """A small network whose numbers are all random, so that adapters show."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_embeds_ada_norm=4,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return DiTPipeline(vae, network.eval(), None, {})


def an_adapter(folder: Path, seed: int, layers: list[str], network: nn.Module) -> Path:
    draw, pairs = torch.Generator().manual_seed(seed), {}
    for name in layers:
        rows, columns = network.get_submodule(name).weight.shape
        pairs[name] = (torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw))
    return save_lora(folder, pairs, 2, 0.2, layers)


LAYERS = [f"transformer_blocks.{block}.attn1.to_{part}" for block in (0, 1) for part in "qv"]
LAYERS += ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.1.norm1.linear"]


@pytest.fixture
def pipe(tiny_toy_folder: Path) -> DiTPipeline:
    from pipelines.models.autoencoder import AutoencoderKL

    return pipeline(AutoencoderKL.from_pretrained(tiny_toy_folder / "vae"))


@torch.inference_mode()
def answer(pipe: DiTPipeline) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    noise = torch.randn(1, 4, 8, 8, generator=draw).to(pipe.transformer.dtype)
    return pipe.transformer(noise, torch.tensor([500]), torch.tensor([1])).sample.float()


def state(pipe: DiTPipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "lean"])
def test_adapters_come_and_go_on_the_lean_path_too(
    pipe: DiTPipeline, tmp_path: Path, ready: bool, dtype: torch.dtype
) -> None:
    """What is drawn is what a network with the sum as its weights draws; unloading brings back every bit."""
    pipe.transformer.to(dtype)
    before = state(pipe)
    first = an_adapter(tmp_path / "a", 1, LAYERS, pipe.transformer)
    second = an_adapter(tmp_path / "b", 2, LAYERS[2:], pipe.transformer)
    if ready:
        pipe.prepare("lean")
    plain = answer(pipe)
    pipe.load_lora_weights(first, adapter_name="one")
    pipe.load_lora_weights(second, "two")
    assert pipe.get_active_adapters() == ["one", "two"]
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    both = answer(pipe)
    assert lean_now(pipe) == ready
    twin = pipeline(pipe.vae)
    twin.transformer.to(dtype)
    merge_all(twin.transformer, [(load_lora(first), 0.5), (load_lora(second), 0.25)])
    for name, tensor in twin.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor), name
    if ready:
        twin.prepare("lean")
    assert torch.equal(both, answer(twin))
    assert (both - plain).abs().max() > 1e-2
    pipe.set_adapters("two")
    assert pipe.get_active_adapters() == ["two"]
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    assert not torch.equal(both, answer(pipe))
    pipe.set_adapters([])
    assert torch.equal(answer(pipe), plain)
    pipe.set_adapters(["one", "two"], 0.5)
    pipe.delete_adapters("one")
    assert pipe.get_active_adapters() == ["two"]
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {} and lean_now(pipe) == ready
    assert torch.equal(answer(pipe), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(pipe).items())


def lean_now(pipe: DiTPipeline) -> bool:
    return pipe.transformer.transformer_blocks[0].attn1.to_qkv is not None


def test_fused_adapters_stay_until_they_are_unfused(pipe: DiTPipeline, tmp_path: Path) -> None:
    one, two = (an_adapter(tmp_path / name, n, LAYERS, pipe.transformer) for n, name in enumerate("ab"))
    pipe.prepare("lean")
    plain = answer(pipe)
    pipe.load_lora_weights(one, "one")
    pipe.set_adapters("one", 0.5)
    half = answer(pipe)
    pipe.fuse_lora()
    assert pipe.get_active_adapters() == [] and torch.equal(answer(pipe), half)
    with pytest.raises(ValueError, match="one is fused already; call unfuse_lora first"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="'one' is fused into the weights"):
        pipe.delete_adapters("one")
    pipe.load_lora_weights(two)
    assert pipe.get_active_adapters() == ["default_0"] and not torch.equal(answer(pipe), half)
    pipe.set_adapters([])
    assert torch.equal(answer(pipe), half)
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["one"] and torch.equal(answer(pipe), half)
    with pytest.raises(ValueError, match="no adapter is fused"):
        pipe.unfuse_lora()
    pipe.set_adapters([])
    assert torch.equal(answer(pipe), plain)
    pipe.fuse_lora(0.5, ["one"])
    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe), half)


def test_an_adapter_that_does_not_fit_leaves_all_as_it_was(pipe: DiTPipeline, tmp_path: Path) -> None:
    adapter = an_adapter(tmp_path / "a", 1, LAYERS, pipe.transformer)
    pipe.prepare("lean")
    pipe.load_lora_weights(adapter, "one")
    before, drawn = state(pipe), answer(pipe)
    wrong = save_lora(tmp_path / "c", {"proj_out_2": (torch.ones(2, 7), torch.ones(16, 2))}, 2, 2, [])
    with pytest.raises(
        ValueError, match=r"proj_out_2 is for weights of \(16, 7\), the model's are \(16, 48\)"
    ):
        pipe.load_lora_weights(wrong, "two")
    for names, weights, words in (
        (["one", "two"], None, "no adapter 'two'; loaded: one"),
        (["one", "one"], None, "named twice"),
        (["one"], [1.0, 2.0], "1 adapters and 2 weights"),
        (["one"], float("nan"), "scale must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.set_adapters(names, weights)
    with pytest.raises(ValueError, match="'one' already"):
        pipe.load_lora_weights(tmp_path / "a", "one")
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    assert torch.equal(answer(pipe), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(pipe).items())


def test_int8_and_weights_that_lie_elsewhere_say_that_they_cannot(pipe: DiTPipeline, tmp_path: Path) -> None:
    adapter = an_adapter(tmp_path / "a", 1, LAYERS, pipe.transformer)
    pipe.transformer.streamed_on = torch.device("cpu")
    with pytest.raises(ValueError, match="leaves its weights elsewhere"):
        pipe.load_lora_weights(adapter)
    pipe.transformer.streamed_on = None
    quantize_linears(pipe.transformer, smallest=8)
    with pytest.raises(ValueError, match=r"in int8.*call load_lora_weights, then prepare\(int8=True\)"):
        pipe.load_lora_weights(adapter)
    assert pipe.get_list_adapters() == {}


def test_taking_out_of_a_prepared_network_says_what_to_do(folder: Path) -> None:
    network = model()
    merged = merge(network, load_lora(folder))
    lean.prepare(network)
    with pytest.raises(ValueError, match=r"call pipelines\.lean\.restore"):
        unmerge(network, merged)
    lean.restore(network)
    unmerge(network, merged)
    pair = Pair(down=torch.zeros(1, 48), up=torch.zeros(32, 1), scale=1.0)
    assert merge(network, LoRA(pairs={"proj_out": pair}, targets=(), source="x")).layers == ("proj_out",)
