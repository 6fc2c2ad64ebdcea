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

from pipelines.lora import LoRA, load_lora, merge, unmerge
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
        ({A: HALVES[A]}, {}, "lora_A or lora_B is missing for proj_out"),
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
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_lora(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_lora(folder)
