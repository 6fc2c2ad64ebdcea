"""Networks made ready for drawing against the same networks as they were loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines import lean, lora
from pipelines.dit import DiTPipeline
from pipelines.dit3d import DiT3DPipeline
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.dit3d import DiT3DModel
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import PixArtControlNet
from pipelines.packed import PackedLinear, missing
from pipelines.pixart_sigma import PixArtSigmaPipeline

SIZE = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 24}


def filled(network: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    return network.eval().requires_grad_(False)


def pixart(**more: Any) -> nn.Module:
    config = {"sample_size": 8, "caption_channels": 16, "cross_attention_dim": 96}
    return filled(PixArtTransformer2DModel(**SIZE, **config, **more))


def run_pixart(network: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(2)
    captions, mask = torch.randn(2, 5, 16).to(dtype), torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    modulation = network.modulation(torch.tensor([500.0]), {})
    text = network.text_states(captions, mask)
    return network(torch.randn(1, 4, 8, 8).to(dtype), text=text, modulation=modulation).sample


def run_dit(network: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(2)
    x = torch.randn(2, 4, 8, 8).to(dtype)
    return network(x, torch.tensor([500.0]), torch.tensor([1, 3])).sample


def run_dit3d(network: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(2)
    return network(torch.randn(2, 3, 50), torch.tensor([500.0]), torch.tensor([1, 0])).sample


NETWORKS = {
    "pixart": (pixart, run_pixart),
    "pixart, normalised queries": (lambda: pixart(qk_norm=True), run_pixart),
    "pixart, fewer keys": (
        lambda: pixart(kv_compress_sampling="conv", kv_compress_factor=2, kv_compress_layers=(1,)),
        run_pixart,
    ),
    "pixart, no bias": (lambda: pixart(attention_bias=False), run_pixart),
    "dit": (lambda: filled(DiTTransformer2DModel(**SIZE, sample_size=8, num_embeds_ada_norm=4)), run_dit),
    "dit-3d": (
        lambda: filled(DiT3DModel(**SIZE, sample_size=8, patch_size=2, num_embeds_ada_norm=4)),
        run_dit3d,
    ),
    "dit-3d, windows and relative positions": (
        lambda: filled(
            DiT3DModel(
                **SIZE,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=4,
                window_size=2,
                window_layers=(1,),
                relative_positions=True,
            )
        ),
        run_dit3d,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_a_network_made_ready_says_the_same_up_to_rounding(name: str) -> None:
    make, run = NETWORKS[name]
    network = make()
    expected = run(network, torch.float32)
    done = lean.prepare(network)
    assert done == ["3 projections joined", f"{packed(network)} layers packed"] and packed(network) >= 12
    found = run(network, torch.float32)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert lean.prepare(network) == []  # once is enough
    lean.restore(network)
    assert packed(network) == 0
    assert torch.equal(run(network, torch.float32), expected)


def packed(network: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in network.modules())


@pytest.mark.skipif(missing(torch.bfloat16) is not None, reason=str(missing(torch.bfloat16)))
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_network(name: str) -> None:
    make, run = NETWORKS[name]
    exact = run(make().to(torch.bfloat16).float(), torch.float32)
    network = make().to(torch.bfloat16)
    before = (run(network, torch.bfloat16).float() - exact).square().mean().sqrt()
    lean.prepare(network)
    after = (run(network, torch.bfloat16).float() - exact).square().mean().sqrt()
    assert after <= 1.05 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_its_state_is_that_of_the_plain_network(name: str) -> None:
    network = NETWORKS[name][0]()
    before = copy.deepcopy(network.state_dict())
    lean.prepare(network)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_saving_a_network_made_ready_writes_the_same_files(tmp_path: Path) -> None:
    network = pixart()
    network.save_pretrained(tmp_path / "before")
    lean.prepare(network)
    network.save_pretrained(tmp_path / "after")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_a_control_branch_is_made_ready_too() -> None:
    control = filled(PixArtControlNet.from_transformer(pixart(), 2))
    assert lean.prepare(control)[0] == "2 projections joined"


def test_an_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    network = pixart()
    lean.prepare(network)
    pair = lora.Pair(down=torch.zeros(2, 96), up=torch.zeros(96, 2), scale=1.0)
    adapter = lora.LoRA(pairs={"transformer_blocks.0.attn1.to_q": pair}, targets=(), source="file")
    with pytest.raises(ValueError, match=r"was made ready for drawing; .*restore"):
        lora.merge(network, adapter)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no transformer blocks"):
        lean.prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="exact must be one of lean, plain, not 'fast'"):
        lean.prepare_all("fast", nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ pipelines


def compare(make: Any, **arguments: Any) -> None:
    """All three ways of drawing, and whether they are truly different ways."""
    pictures = {}
    for exact in (None, *lean.EXACT):
        pipeline = make()
        if exact is not None:
            pipeline.prepare(exact)
        assert (packed(pipeline.transformer) > 0) == (exact == "lean")
        texts: list[Any] = []
        pipeline.transformer.register_forward_pre_hook(
            lambda _, __, given, kept=texts: kept.append("modulation" in given), with_kwargs=True
        )
        generator = torch.Generator().manual_seed(3)
        made = pipeline(num_inference_steps=3, generator=generator, output_type="pt", **arguments)
        pictures[exact] = made[0] if isinstance(made, tuple) else getattr(made, "images", None)
        if pictures[exact] is None:
            pictures[exact] = made.clouds
        assert texts == [exact != "plain"] * 3  # tables are handed in, or not
    for exact in lean.EXACT:
        torch.testing.assert_close(pictures[exact], pictures[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_sigma_draws_the_same_picture_in_all_ways(tiny_toy_folder: Path, guidance: float) -> None:
    def make() -> PixArtSigmaPipeline:
        return PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, torch_dtype=torch.float32)

    compare(make, prompt=["a red cube", "a blue ball behind it"], guidance_scale=guidance)


def test_dit_draws_the_same_picture_in_all_ways(tiny_dit_folder: Path) -> None:
    def make() -> DiTPipeline:
        return DiTPipeline.from_pretrained(tiny_dit_folder, torch_dtype=torch.float32)

    compare(make, class_labels=[1, 0], guidance_scale=4.0)


def test_dit3d_draws_the_same_cloud_in_all_ways(tiny_dit3d_folder: Path) -> None:
    def make() -> DiT3DPipeline:
        return DiT3DPipeline.from_pretrained(tiny_dit3d_folder, torch_dtype=torch.float32)

    compare(make, class_labels=[1], num_points=64, guidance_scale=2.0)
