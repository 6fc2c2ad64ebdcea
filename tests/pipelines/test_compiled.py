"""Compiled blocks give what they gave before; what cannot be compiled or replayed is refused in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines import compiled
from pipelines.compiled import Buffers, Replayed, compile_blocks, form_of, missing, tensors_in, with_tensors
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.dit3d import DiT3DModel
from pipelines.models.pixart import PixArtTransformer2DModel


@pytest.fixture(autouse=True)
def _no_cache_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def tiny(kind: type, **options: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 12}
    return kind(**sizes | options).eval()


def pixart() -> PixArtTransformer2DModel:
    return tiny(
        PixArtTransformer2DModel, cross_attention_dim=12, caption_channels=8, use_additional_conditions=False
    )


@pytest.mark.parametrize("build", [pixart, lambda: tiny(DiTTransformer2DModel), lambda: tiny(DiT3DModel)])
def test_every_network_of_ours_has_regions(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reason = missing()
    if reason:
        pytest.skip(reason)
    network = build()
    assert compile_blocks(network, tmp_path / "cache") == 3
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(ValueError, match="compiled already"):
        compile_blocks(network, tmp_path / "cache")
    for key in network.transformer_blocks[0]._regions:
        assert callable(getattr(type(network.transformer_blocks[0]), key))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_equal_plain_ones_share_their_code_and_fill_the_cache(tmp_path: Path) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    network, latents, labels = tiny(DiTTransformer2DModel), torch.randn(1, 4, 4, 4), torch.tensor([3])
    with torch.inference_mode():
        plain = network(latents, 500, labels).sample
        compile_blocks(network, tmp_path)
        torch._dynamo.utils.counters.clear()
        found = network(latents, 500, labels).sample
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of three blocks
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_compiled_blocks_refuse_gradients_before_compiling_anything(tmp_path: Path) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    network = tiny(DiTTransformer2DModel)
    compile_blocks(network, tmp_path)
    with pytest.raises(RuntimeError, match="give no gradients"):
        network(torch.randn(1, 4, 4, 4), 500, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"is in training.*eval\(\) first"):
        compile_blocks(tiny(DiTTransformer2DModel).train(), tmp_path)


def test_without_a_compiler_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    network = pixart()
    with pytest.raises(ValueError, match=r"no C\+\+ compiler \(no-such-compiler\); install one"):
        compile_blocks(network, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert not any("_regions" in vars(module) for module in network.modules())
    assert missing("mps") == "compiling for mps is not supported; it is for cpu and cuda"


def test_a_model_without_known_blocks_and_a_second_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no blocks that are known to repeat"):
        compile_blocks(nn.Linear(1, 1), tmp_path)
    reason = missing()
    if reason:
        pytest.skip(reason)
    compile_blocks(pixart(), tmp_path / "one")
    network = pixart()
    with pytest.raises(ValueError, match=r"already, not in .*two"):
        compile_blocks(network, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "one")


def test_packed_layers_are_refused(tmp_path: Path) -> None:
    from pipelines.int8 import choose_product, quantize_linears

    reason = missing()
    if choose_product(torch.device("cpu"), 8, 8)[0] != "onednn" or reason:
        pytest.skip(reason or "int8 layers are not packed on this processor")
    network = pixart()
    quantize_linears(network, smallest=1)
    with pytest.raises(ValueError, match="24 layers with weights packed for oneDNN"):
        compile_blocks(network, tmp_path)


def _inputs(tokens: int = 5) -> tuple[tuple[object, ...], dict[str, object]]:
    """As the pipelines give them: tensors, and data classes of tuples of tensors."""
    network = pixart()
    with torch.no_grad():
        text = network.text_states(torch.randn(2, tokens, 8))
        modulation = network.modulation(torch.tensor([500]))
    return (torch.randn(1, 4, 4, 4),), {"text": text, "modulation": modulation}


def test_buffers_take_the_numbers_of_others_and_stay_where_they_are() -> None:
    first, second = _inputs(), _inputs()
    second = with_tensors(second, lambda tensor: tensor + 1)
    buffers = Buffers(first)
    places = [tensor.data_ptr() for tensor in tensors_in(buffers.value)]
    assert len(places) == 1 + 2 * 3 + 2  # latents, keys and values of three blocks, two tables
    assert not set(places) & {tensor.data_ptr() for tensor in tensors_in(first)}
    buffers.fill(second)
    assert [tensor.data_ptr() for tensor in tensors_in(buffers.value)] == places
    for own, other in zip(tensors_in(buffers.value), tensors_in(second), strict=True):
        assert torch.equal(own, other)
    network = pixart()
    (latents,), options = buffers.value
    with torch.no_grad():
        assert torch.equal(network(latents, **options).sample, network(*second[0], **second[1]).sample)


def test_inputs_have_one_form_unless_sizes_types_or_constants_differ() -> None:
    assert form_of(_inputs()) == form_of(with_tensors(_inputs(), lambda tensor: tensor * 2))
    forms = [
        form_of(_inputs()),
        form_of(_inputs(tokens=6)),
        form_of(with_tensors(_inputs(), lambda tensor: tensor.double())),
        form_of((_inputs(), {"return_dict": False})),
    ]
    assert len(set(forms)) == 4


def test_results_are_rebuilt_in_their_own_classes() -> None:
    network = pixart()
    (latents,), options = _inputs()
    with torch.no_grad():
        result = network(latents, **options)
    copied = with_tensors(result, torch.Tensor.clone)
    assert type(copied) is type(result) and torch.equal(copied.sample, result.sample)
    assert copied.sample.data_ptr() != result.sample.data_ptr()


def test_replaying_is_refused_without_a_cuda_device() -> None:
    with pytest.raises(ValueError, match=r"this network is on cpu\. Call it as it is"):
        Replayed(pixart())


@pytest.mark.gpu
def test_replayed_forwards_equal_plain_ones(caplog: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    network = pixart().cuda()
    replayed = Replayed(network, most=1)
    with torch.inference_mode():
        for tokens in (5, 5, 6):
            (latents,), options = with_tensors(_inputs(tokens), torch.Tensor.cuda)
            torch.testing.assert_close(
                replayed(latents, **options).sample, network(latents, **options).sample
            )
    assert "1 forwards not replayed" in caplog.text
    assert compiled.missing("cuda") is None
