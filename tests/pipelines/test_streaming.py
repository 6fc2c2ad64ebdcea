"""Networks whose large layers stay in their file against the same networks in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import components, lean
from pipelines.compiled import compile_blocks
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.t5 import T5EncoderModel
from pipelines.pixart_sigma import PixArtSigmaPipeline

IDS = torch.tensor([[5, 9, 3, 1]])
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that most of its layers are large."""
    torch.manual_seed(0)
    network = T5EncoderModel(vocab_size=400, d_model=256, d_kv=32, d_ff=512, num_layers=3, num_heads=8)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    path = tmp_path_factory.mktemp("t5")
    network.save_pretrained(path)
    return path


def in_memory(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.device.type != "meta")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_streamed_network_computes_the_same_to_the_bit(folder: Path, dtype: torch.dtype | None) -> None:
    whole = T5EncoderModel.from_pretrained(folder, torch_dtype=dtype)
    streamed = T5EncoderModel.from_pretrained(folder, torch_dtype=dtype, offload="file")
    assert (streamed.dtype, streamed.device) == (whole.dtype, whole.device)
    for _ in range(2):
        assert torch.equal(streamed(IDS)[0], whole(IDS)[0])
    assert in_memory(streamed) < in_memory(whole) / 50


@torch.inference_mode()
def test_at_most_one_large_layer_is_in_memory(folder: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, offload="file")
    resident = in_memory(network)
    most = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.register_forward_hook(lambda *_: most.append(in_memory(network)), prepend=True)
    network(IDS)
    assert len(most) == 3 * 7 + 2
    assert max(most) == resident + 512 * 256


def test_a_layer_is_forgotten_even_when_the_call_fails(folder: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, offload="file")
    resident = in_memory(network)
    with pytest.raises(IndexError):
        network(torch.tensor([[400]]))
    assert in_memory(network) == resident


def test_numbers_that_are_not_finite_are_found_when_their_layer_is_read(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / FILE)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] = torch.inf
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / FILE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    network = T5EncoderModel.from_pretrained(tmp_path, offload="file")
    with pytest.raises(ValueError, match=r"block\.1\.layer\.1\.DenseReluDense\.wo\.weight holds numbers"):
        network(IDS)


def test_a_pipeline_may_stream_its_text_encoder(tiny_toy_folder: Path) -> None:
    prompt = "a red cube"
    whole = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    streamed = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, offload={"text_encoder": "file"})
    assert streamed.text_encoder.streamed_on is not None and whole.text_encoder.streamed_on is None
    for one, other in zip(whole.encode([prompt]), streamed.encode([prompt]), strict=True):
        assert torch.equal(one, other)


def test_a_streamed_network_is_neither_moved_nor_saved(folder: Path, tmp_path: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, offload="file")
    with pytest.raises(ValueError, match="leaves its weights elsewhere cannot be moved or converted"):
        network.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be saved"):
        network.save_pretrained(tmp_path)


def test_a_part_of_the_library_cannot_be_offloaded(tiny_toy_folder: Path) -> None:
    with pytest.raises(ValueError, match="a T5EncoderModel of the library cannot be offloaded"):
        components.load(tiny_toy_folder / "text_encoder", "T5EncoderModel", own=False, offload="file")


# Whole blocks that take turns


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = DiTTransformer2DModel(
        sample_size=8,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_embeds_ada_norm=10,
    )
    for p in network.parameters():
        p.data.normal_(std=0.05)
    path = tmp_path_factory.mktemp("dit")
    network.save_pretrained(path)
    return path


def drawn(network: DiTTransformer2DModel) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(network.dtype)
    return network(latents, timestep=torch.tensor([7, 900]), class_labels=torch.tensor([1, 10])).sample


@pytest.mark.parametrize("where", ["file", "host"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_an_offloaded_transformer_computes_the_same_to_the_bit(
    blocks: Path, where: str, dtype: torch.dtype | None
) -> None:
    whole = DiTTransformer2DModel.from_pretrained(blocks, torch_dtype=dtype)
    offloaded = DiTTransformer2DModel.from_pretrained(blocks, torch_dtype=dtype, offload=where)
    for _ in range(2):
        assert torch.equal(drawn(offloaded), drawn(whole))


@torch.inference_mode()
def test_at_most_two_blocks_are_there_and_the_next_is_brought_ahead(blocks: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(blocks, offload="host")
    there = []
    for block in network.transformer_blocks:
        block.register_forward_hook(
            lambda *_: there.append([not one.attn1.to_q.weight.is_meta for one in network.transformer_blocks])
        )
    drawn(network)
    assert there[:3] == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
    ]
    assert there[3][3] and sum(there[3]) == 1  # what follows the last block is not one
    drawn(network)
    assert len(there) == 8 and max(sum(one) for one in there) == 2


@torch.inference_mode()
def test_what_stays_elsewhere_is_made_lean_as_far_as_it_can_be(blocks: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(blocks, offload="host")
    before = drawn(network)
    assert lean.prepare(network) == ["norms"]
    torch.testing.assert_close(drawn(network), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="stay elsewhere until they are called cannot be quantised"):
        lean.prepare(network, int8=True)
    with pytest.raises(ValueError, match="leaves its weights elsewhere, and cannot be compiled"):
        compile_blocks(network)


def test_numbers_that_are_not_finite_are_found_at_once_where_they_are_kept(
    blocks: Path, tmp_path: Path
) -> None:
    file = "diffusion_pytorch_model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(blocks / file).items()}
    state["transformer_blocks.3.ff.net.2.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / file)
    (tmp_path / "config.json").write_text((blocks / "config.json").read_text())
    with pytest.raises(ValueError, match=r"transformer_blocks\.3\.ff\.net\.2\.weight holds numbers"):
        DiTTransformer2DModel.from_pretrained(tmp_path, offload="host")
