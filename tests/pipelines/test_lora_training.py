"""Adapters that learn: what they change, what they leave, and that what they learnt is what is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.lora import load_lora, merge, save_lora
from pipelines.lora_training import LAYERS, LowRank, inactive, insert, remove, save_memory
from pipelines.models.pixart import PixArtTransformer2DModel


def model(dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return (
        PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=20,
            use_additional_conditions=False,
        )
        .to(dtype)
        .eval()
    )


def answer(network: PixArtTransformer2DModel) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 12, generator=draw).to(network.dtype)
    captions = torch.randn(3, 5, 20, generator=draw).to(network.dtype)
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [1] + [0] * 4])
    return network(latents, captions, torch.tensor([3, 500, 999]), encoder_attention_mask=mask).sample


def learn(network: PixArtTransformer2DModel, adapters: dict[str, LowRank], steps: int = 3) -> list[float]:
    halves = [half for one in adapters.values() for half in (one.down, one.up)]
    optimizer = torch.optim.SGD(halves, lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (answer(network).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_and_what_it_learnt_can_be_taken_out(dtype: torch.dtype) -> None:
    network = model(dtype)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = answer(network)
    adapters = insert(network, "attn+ff", rank=3, alpha=6)
    assert torch.equal(answer(network), before)
    losses = learn(network, adapters)
    assert losses[-1] < losses[0]
    assert not torch.equal(answer(network), before)
    with inactive(adapters):
        assert torch.equal(answer(network), before)
    assert not torch.equal(answer(network), before)
    assert all(one.down.dtype == one.up.dtype == torch.float32 for one in adapters.values())
    assert {name for name, one in network.named_parameters() if one.grad is not None} == {
        f"{name}.{half}" for name in adapters for half in ("down", "up")
    }
    remove(network)
    assert torch.equal(answer(network), before)
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("layers", LAYERS)
def test_what_was_learnt_is_what_is_merged(tmp_path: Path, layers: str) -> None:
    network, plain = model(), model()
    before = answer(plain)
    adapters = insert(network, layers, rank=2, alpha=3)
    learn(network, adapters)
    learnt = answer(network)
    pairs = {name: one.halves() for name, one in adapters.items()}
    save_lora(tmp_path, pairs, 2, 3, LAYERS[layers] or tuple(pairs))
    merged = merge(plain, load_lora(tmp_path))
    assert set(merged.layers) == set(adapters) and not merged.untouched
    change = (learnt - before).abs().max()
    assert change > 1e-3
    assert (answer(plain) - learnt).abs().max() < 1e-3 * change  # other orders of the same sums


def test_the_choice_of_layers_is_the_one_that_was_named() -> None:
    block = {
        f"transformer_blocks.{index}.{part}.{end}"
        for index in range(2)
        for part in ("attn1", "attn2")
        for end in ("to_q", "to_k", "to_v", "to_out.0")
    }
    forward = {f"transformer_blocks.{index}.ff.net.{end}" for index in range(2) for end in ("0.proj", "2")}
    assert insert(model(), "attn", 2, 2).keys() == block
    assert insert(model(), "attn+ff", 2, 2).keys() == block | forward
    network = model()
    every = {name for name, one in network.named_modules() if isinstance(one, torch.nn.Linear)}
    assert insert(network, "all", 2, 2).keys() == every
    assert {"proj_out", "adaln_single.linear", "caption_projection.linear_1"} < every


def test_less_memory_gives_the_same_numbers_and_gradients() -> None:
    network = model()
    adapters = insert(network, "attn+ff", rank=2, alpha=2)
    learn(network, adapters, steps=1)  # else B is zero, and A has no gradient

    def gradients() -> list[Tensor]:
        network.zero_grad()
        answer(network).square().mean().backward()
        return [half.grad.clone() for one in adapters.values() for half in (one.down, one.up)]

    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    def counted() -> tuple[list[Tensor], int]:
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found = answer(network)
        return found, kept[-1]

    expected, plain = gradients(), counted()
    undo = save_memory(network)
    found, lean = gradients(), counted()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert any(one.abs().max() > 0 for one in found)
    assert torch.equal(lean[0], plain[0])
    assert lean[1] < 0.5 * plain[1]
    undo()
    assert counted()[1] == plain[1]


def test_what_cannot_be_adapted_is_refused() -> None:
    for layers, rank, alpha, words in (
        ("ff", 2, 2, "layers must be one of attn, attn\\+ff, all"),
        ("attn", 0, 2, "rank must be a positive integer, not 0"),
        ("attn", True, 2, "rank must be"),
        ("attn", 2, float("nan"), "alpha must be a positive number"),
        ("attn", 2, 0, "alpha must be a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            insert(model(), layers, rank, alpha)
    with pytest.raises(ValueError, match="a Linear has no layers to_q"):
        insert(torch.nn.Linear(2, 2), "attn", 1, 1)
    network = model()
    insert(network, "attn", 2, 2)
    with pytest.raises(ValueError, match="remove them first"):
        insert(network, "attn", 2, 2)
    network = model()
    network.transformer_blocks[0].attn1.fuse()
    with pytest.raises(ValueError, match="made ready for drawing"):
        insert(network, "attn", 2, 2)
