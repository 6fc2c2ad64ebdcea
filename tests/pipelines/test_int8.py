"""Layers in int8: against their dequantised twins, and whole networks against their own float32."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines import int8
from pipelines.int8 import Int8Linear, choose_product, quantize_linears, quantize_rows
from pipelines.lora import LoRA, Pair, merge
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.dit3d import DiT3DModel
from pipelines.models.layers import Gelu
from pipelines.models.network import Network
from pipelines.models.pixart import PixArtTransformer2DModel

CPU = torch.device("cpu")
KINDS = [torch.float32, torch.bfloat16]


def loud(network: nn.Module) -> nn.Module:
    """With numbers in every layer: fresh networks end in zeros and would hide any error."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 1))
            if parameter.ndim > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
    return network.eval()


def pixart() -> tuple[Network, Callable[[Any], Tensor]]:
    network = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=20,
        use_additional_conditions=False,
    )
    torch.manual_seed(2)
    latents, captions, steps = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20), torch.tensor([300, 700])
    return network, lambda one: one(latents.to(one.dtype), captions.to(one.dtype), steps).sample.float()


def dit() -> tuple[Network, Callable[[Any], Tensor]]:
    network = DiTTransformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=24, num_embeds_ada_norm=4
    )
    torch.manual_seed(2)
    latents, steps, labels = torch.randn(2, 4, 8, 8), torch.tensor([300, 700]), torch.tensor([1, 4])
    return network, lambda one: one(latents.to(one.dtype), steps, labels).sample.float()


def dit3d() -> tuple[Network, Callable[[Any], Tensor]]:
    network = DiT3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, sample_size=8, patch_size=2
    )
    torch.manual_seed(2)
    clouds, steps, labels = torch.randn(2, 3, 50), torch.tensor([300, 700]), torch.tensor([0, 1])
    return network, lambda one: one(clouds, steps, labels).sample.float()


# Layers of a block that are replaced; those of adaLN, of text keys and outside the blocks are not
NETWORKS = {"pixart": (pixart, 8), "dit": (dit, 6), "dit3d": (dit3d, 6)}


@pytest.mark.parametrize("kind", [*KINDS, torch.float16])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_codes_times_scales_differ_from_the_numbers_by_half_a_scale_at_most(
    kind: torch.dtype, spread: float
) -> None:
    torch.manual_seed(0)
    x_ND = (torch.randn(70, 300) * torch.logspace(-1, 1, 70)[:, None] * spread).to(kind)
    codes_ND, scales_N1 = quantize_rows(x_ND)
    assert codes_ND.dtype == torch.int8 and scales_N1.shape == (70, 1)
    assert codes_ND.min() >= -127
    assert (codes_ND.abs().amax(1) == 127).all()  # every row uses the whole range
    apart = (codes_ND.double() * scales_N1.double() - x_ND.double()).abs()
    assert (apart <= 0.5001 * scales_N1.double()).all()


@pytest.mark.parametrize("kind", [*KINDS, torch.float16, torch.float64])
def test_peaks_are_the_largest_absolute_values(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(40, 33).to(kind)
    assert torch.equal(int8.row_peaks(x_ND), x_ND.abs().amax(1, keepdim=True))


def test_quantising_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(50, 40)
    whole = quantize_rows(x_ND)
    monkeypatch.setattr(int8, "PATCH", 7 * 40)  # seven rows at a time, and one alone
    for one, other in zip(quantize_rows(x_ND), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("product", [name for name in int8.PRODUCTS if name != "cuda"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 96, 160), (7, 33, 17), (1, 48, 20)])
def test_a_layer_equals_its_dequantised_twin(
    product: str, kind: torch.dtype, bias: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = int8.PRODUCTS[product].missing(CPU, 1, 1)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(int8, "PRODUCTS", {product: int8.PRODUCTS[product]})
    torch.manual_seed(0)
    rows, features, outputs = shape
    linear = nn.Linear(features, outputs, bias=bias).to(kind)
    layer, x_ND = Int8Linear(linear), torch.randn(rows, features).to(kind)
    assert layer.product == product
    codes_ND, scales_N1 = quantize_rows(x_ND)
    twin = functional.linear(
        codes_ND.float() * scales_N1.float(),
        layer.weight_OD(),
        linear.bias if not bias else linear.bias.float(),
    )
    y_NO = layer(x_ND)
    assert y_NO.dtype == kind and y_NO.shape == twin.shape
    # bfloat16 is rounded twice, after the product and after scale and bias
    bound = 1e-6 if kind == torch.float32 else 2**-7
    assert (y_NO.float() - twin).abs().max() <= bound * twin.abs().max()


def test_weights_keep_to_half_a_scale_per_output_channel() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 30)
    linear.weight.data *= torch.logspace(-3, 3, 30)[:, None]  # a common scale would lose most rows
    apart = (Int8Linear(linear).weight_OD() - linear.weight).abs().amax(1)
    assert (apart <= 0.5001 * linear.weight.abs().amax(1) / 127).all()


def test_tokens_do_not_change_each_other() -> None:
    torch.manual_seed(0)
    layer, x_ND = Int8Linear(nn.Linear(64, 48)), torch.randn(9, 64)
    x_ND[4] *= 1000  # one scale for all would make the others zero
    alone = torch.cat([layer(row) for row in x_ND.split(1)])
    assert torch.equal(layer(x_ND), alone)


def test_any_leading_dimensions_and_strides() -> None:
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(24, 20)), torch.randn(3, 5, 24)
    assert torch.equal(layer(x), layer(x.flatten(0, 1)).unflatten(0, (3, 5)))
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert torch.equal(layer(x[0, 0]), layer(x)[0, 0])
    assert layer(x[:0]).shape == (0, 5, 20)


def test_zeros_give_the_bias_and_what_is_not_a_number_stays_visible() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 12)
    linear.weight.data[3] = 0
    layer, x_ND = Int8Linear(linear), torch.randn(4, 16)
    x_ND[0], x_ND[1, 2], x_ND[2, 5] = 0, torch.nan, torch.inf
    y_NO = layer(x_ND)
    assert torch.equal(y_NO[0], linear.bias)
    assert torch.equal(y_NO[3, 3], linear.bias[3])
    assert y_NO[1].isnan().all() and not y_NO[2].isfinite().any()
    assert y_NO[3].isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_in_int8_stays_close_to_its_own_float32(name: str, kind: torch.dtype) -> None:
    build, per_block = NETWORKS[name]
    network, draw = build()
    plain = draw(loud(network))
    network.to(kind)
    done = quantize_linears(network, smallest=1)
    assert len(done.layers) == 2 * per_block
    assert all(isinstance(network.get_submodule(path), Int8Linear) for path in done.layers)
    assert done.bytes_after < done.bytes_before * (0.4 if kind == torch.float32 else 0.7)
    error = ((draw(network) - plain).norm() / plain.norm()).item()
    assert 1e-4 < error < 0.05  # not the same network, and not another one


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_quicker_form_of_gelu_adds_nothing_to_the_error(name: str) -> None:
    build, _ = NETWORKS[name]
    network, draw = build()
    plain = draw(loud(network))
    before = {path: one.approximate for path, one in network.named_modules() if isinstance(one, Gelu)}
    network.to(torch.bfloat16)
    quantize_linears(network, smallest=1)
    exact = draw(network)
    for path, form in before.items():
        network.get_submodule(path).approximate = form
    errors = [((one - plain).norm() / plain.norm()).item() for one in (exact, draw(network))]
    assert errors[0] < 1.03 * errors[1]


@torch.no_grad()
def test_small_and_sensitive_layers_stay_as_they_were_and_are_named() -> None:
    network, _ = pixart()
    done = quantize_linears(network, smallest=1)
    assert {path.partition(".")[0] for path in done.layers} == {"transformer_blocks"}
    for path in ("proj_out", "adaln_single.linear", "caption_projection.linear_1"):
        assert "outside the blocks" in done.kept[path]
    assert "once per picture" in done.kept["transformer_blocks.1.attn2.to_k"]
    other, _ = dit()
    assert "adaLN" in quantize_linears(other, smallest=1).kept["transformer_blocks.0.norm1.linear"]
    small, _ = dit()
    assert quantize_linears(small, smallest=40).layers  # they are 48 wide
    with pytest.raises(ValueError, match=r"no layers that could be int8: .*fewer than 384 features"):
        quantize_linears(dit()[0])


def test_a_model_without_linears_or_in_int8_already_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no layers that could be int8: it has no linear layers"):
        quantize_linears(nn.Conv2d(1, 1, 1))
    network, _ = dit()
    quantize_linears(network, smallest=1)
    with pytest.raises(ValueError, match="int8 already"):
        quantize_linears(network, smallest=1)


def test_saving_and_loading_are_refused_and_leave_no_files(tmp_path: Path) -> None:
    for build, _ in NETWORKS.values():
        network, _ = build()
        state = {key: value.clone() for key, value in network.state_dict().items()}
        quantize_linears(network, smallest=1)
        folder = tmp_path / type(network).__name__
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\..* is quantised to int8.*save before"):
            network.save_pretrained(folder)
        assert not folder.exists()
        with pytest.raises(ValueError, match="load into a network that is not"):
            network.load_state_dict(state)


def test_merging_an_adapter_afterwards_is_refused_and_before_it_counts() -> None:
    network, draw = pixart()
    loud(network)
    path = "transformer_blocks.0.attn1.to_q"
    pair = Pair(down=torch.randn(3, 48), up=torch.randn(48, 3), scale=0.5)
    lora = LoRA(pairs={path: pair}, targets=("to_q",), source="x")
    with torch.no_grad():
        quantised = copy.deepcopy(network)
        quantize_linears(quantised, smallest=1)
        before = draw(quantised)
        with pytest.raises(ValueError, match="x: the model"):
            merge(quantised, lora)
        assert torch.equal(draw(quantised), before)
        merge(network, lora)
        merged = draw(network)
        quantize_linears(network, smallest=1)
        assert (draw(network) - merged).norm() < 0.05 * merged.norm() < (before - merged).norm()


@torch.no_grad()
def test_copies_moves_and_other_types_keep_the_codes() -> None:
    network, draw = pixart()
    quantize_linears(loud(network), smallest=1)
    drawn = draw(network)
    again = copy.deepcopy(network)
    layer = again.transformer_blocks[0].ff.net[2]
    weight_OD = layer.weight_OD()
    assert torch.equal(draw(again), drawn)
    again.to("cpu").to(torch.bfloat16)
    assert layer.scales_O.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight_OD(), weight_OD)
    error = (draw(again) - drawn).norm() / drawn.norm()
    assert 1e-5 < error < 0.05
    assert torch.equal(draw(network), drawn)  # the first did not change with its copy
    again.to("meta")  # another device: nothing of the codes stays behind on this one
    assert layer.codes.is_meta and layer._packed is None


def test_codes_are_held_once() -> None:
    layer = Int8Linear(nn.Linear(32, 16))
    assert layer.codes is None or layer._packed is layer.codes
    assert layer._packed is not None


def test_gradients_are_refused() -> None:
    layer, x = Int8Linear(nn.Linear(8, 8)), torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="pass no gradients"):
        layer(x)
    with torch.no_grad():
        assert layer(x).isfinite().all()


def test_a_processor_without_the_instructions_computes_the_same_slowly_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, draw = dit()
    fast = copy.deepcopy(loud(network))
    with torch.no_grad():
        quantize_linears(fast, smallest=1)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        with caplog.at_level(logging.WARNING, logger="pipelines.int8"):
            done = quantize_linears(network, smallest=1)
        assert done.product == "plain"
        assert [record.message for record in caplog.records] == [
            "int8 layers on cpu: float32 products of the int8 codes, slower than unquantised layers "
            "(this processor has no int8 instructions (avx512_vnni); cpu is no CUDA device)"
        ]
        torch.testing.assert_close(draw(network), draw(fast), rtol=1e-4, atol=1e-4)


def test_cuda_takes_only_sides_that_are_multiples_of_eight() -> None:
    """The choice alone: the product itself needs a GPU, and is in the test below."""
    device = torch.device("cuda")
    assert choose_product(device, 1152, 4608)[0] == "cuda"
    name, why = choose_product(device, 1152, 20)
    assert name == "plain" and "not 20 x 1152" in why


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 17, 100])
def test_a_layer_on_the_gpu_equals_the_one_on_the_cpu(rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    layer, x_ND = Int8Linear(nn.Linear(64, 48)), torch.randn(rows, 64)
    expected = layer(x_ND)
    layer.to("cuda")
    assert layer.product == "cuda"
    torch.testing.assert_close(layer(x_ND.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
