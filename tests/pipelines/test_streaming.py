"""Networks whose large layers stay in their file against the same networks in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import components
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
    streamed = T5EncoderModel.from_pretrained(folder, torch_dtype=dtype, stream=True)
    assert (streamed.dtype, streamed.device) == (whole.dtype, whole.device)
    for _ in range(2):
        assert torch.equal(streamed(IDS)[0], whole(IDS)[0])
    assert in_memory(streamed) < in_memory(whole) / 50


@torch.inference_mode()
def test_at_most_one_large_layer_is_in_memory(folder: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, stream=True)
    resident = in_memory(network)
    most = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.register_forward_hook(lambda *_: most.append(in_memory(network)), prepend=True)
    network(IDS)
    assert len(most) == 3 * 7 + 2
    assert max(most) == resident + 512 * 256


def test_a_layer_is_forgotten_even_when_the_call_fails(folder: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, stream=True)
    resident = in_memory(network)
    with pytest.raises(IndexError):
        network(torch.tensor([[400]]))
    assert in_memory(network) == resident


def test_numbers_that_are_not_finite_are_found_when_their_layer_is_read(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / FILE)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] = torch.inf
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / FILE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    network = T5EncoderModel.from_pretrained(tmp_path, stream=True)
    with pytest.raises(ValueError, match=r"block\.1\.layer\.1\.DenseReluDense\.wo\.weight holds numbers"):
        network(IDS)


def test_a_pipeline_may_stream_its_text_encoder(tiny_toy_folder: Path) -> None:
    prompt = "a red cube"
    whole = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    streamed = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, stream_text_encoder=True)
    assert streamed.text_encoder.streamed_on is not None and whole.text_encoder.streamed_on is None
    for one, other in zip(whole.encode([prompt]), streamed.encode([prompt]), strict=True):
        assert torch.equal(one, other)


def test_a_streamed_network_is_neither_moved_nor_saved(folder: Path, tmp_path: Path) -> None:
    network = T5EncoderModel.from_pretrained(folder, stream=True)
    with pytest.raises(ValueError, match="leaves its weights in the file cannot be moved or converted"):
        network.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be saved"):
        network.save_pretrained(tmp_path)


def test_a_part_of_the_library_cannot_be_streamed(tiny_toy_folder: Path) -> None:
    with pytest.raises(ValueError, match="a T5EncoderModel of the library cannot be streamed"):
        components.load(tiny_toy_folder / "text_encoder", "T5EncoderModel", own=False, stream=True)
