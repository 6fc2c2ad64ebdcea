"""`gen convert` from outside: an official file in, a folder that diffusers and we read out."""

import json

import pytest
import torch

from gen import cli
from pipelines.models.pixart import PixArtTransformer2DModel
from tests.golden.pixart import official_shapes

MODEL = {
    "input_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 10,
    "model_max_length": 6,
}


@pytest.fixture
def official(tmp_path):
    """A checkpoint as PixArt's training writes it, and a configuration beside it."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in official_shapes(MODEL).items()}
    torch.save({"state_dict": state, "epoch": 4}, tmp_path / "official.pth")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path / "official.pth"


def convert(official, *more) -> int:
    config = ("--config", str(official.with_name("config.json")))
    return cli.execute(["convert", str(official), "--as", "pixart-sigma", *config, *map(str, more)])


def test_the_folder_is_read_by_diffusers_and_by_us_alike(official, capsys):
    from diffusers import PixArtTransformer2DModel as Theirs

    assert convert(official, "--json") == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["missing"], found["unused"], found["tensors"]) == ([], [], len(official_shapes(MODEL)))
    assert found["converted"] == found["tensors"] - 2
    folder = official.with_suffix("") / "transformer"
    ours, theirs = PixArtTransformer2DModel.from_pretrained(folder), Theirs.from_pretrained(folder)
    assert sum(p.numel() for p in ours.parameters()) == found["parameters"]["transformer"]
    given = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 6, 10),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.inference_mode():
        expected = theirs(**given).sample
        difference = (ours(**given).sample - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def test_the_dtype_can_be_chosen(official):
    assert convert(official, "--dtype", "bfloat16", "-o", official.with_name("half")) == 0
    folder = official.with_name("half") / "transformer"
    assert PixArtTransformer2DModel.from_pretrained(folder).dtype == torch.bfloat16


def test_companions_complete_the_pipeline(official, tiny_toy_folder, tmp_path):
    from pipelines.pixart_sigma import PixArtSigmaPipeline

    sizes = MODEL | {"caption_channels": 32}
    state = {name: torch.randn(shape) for name, shape in official_shapes(sizes).items()}
    torch.save({"state_dict": state}, official)
    assert convert(official, "--with", tiny_toy_folder, "-o", tmp_path / "whole") == 0
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "whole")
    assert pipeline.transformer.config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda state: state.pop("blocks.1.attn.proj.bias"), 2, "1 tensors are missing"),
        (lambda state: state.update(more=torch.ones(1)), 2, "are unknown:\n  more"),
        (lambda state: state["t_block.1.bias"].fill_(float("nan")), 2, "not finite"),
        (
            lambda state: state.update({"t_block.1.bias": torch.ones(7)}),
            2,
            "adaln_single.linear.bias is (7,)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(official, damage, code, words, capsys):
    content = torch.load(official)
    damage(content["state_dict"])
    torch.save(content, official)
    before = sorted(official.parent.iterdir())
    assert convert(official) == code
    assert words in capsys.readouterr().err
    assert sorted(official.parent.iterdir()) == before


def test_a_damaged_file_is_told_from_a_wrong_one(official, capsys):
    official.write_bytes(official.read_bytes()[:1000])
    assert convert(official) == 4
    assert "cut short" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(official, capsys):
    (official.with_suffix("") / "mine").mkdir(parents=True)
    assert convert(official) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert cli.execute(["convert", str(tmp_path / "none.pt"), "--as", "dit"]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_the_published_edge_network_becomes_the_folder_a_control_branch_looks_for(tmp_path, capsys):
    import numpy as np

    from pipelines.models.hed import HED, edges, load_hed

    torch.manual_seed(0)
    state = {name: 0.05 * torch.randn(t.shape) for name, t in HED().state_dict().items()}
    torch.save(state, tmp_path / "ControlNetHED.pth")
    arguments = ["convert", str(tmp_path / "ControlNetHED.pth"), "--as", "hed", "-o", str(tmp_path / "out")]
    assert cli.execute([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["tensors"] == len(state)
    network = load_hed(tmp_path / "out" / "hed")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    picture = np.random.default_rng(0).random((32, 32, 3), np.float32)
    assert edges(picture, "hed", network=network).shape == (32, 32)

    del state["block5.projection.bias"]
    torch.save(state, tmp_path / "cut.pth")
    assert cli.execute(["convert", str(tmp_path / "cut.pth"), "--as", "hed", "-o", str(tmp_path / "no")]) != 0
    assert "block5.projection.bias" in capsys.readouterr().err and not (tmp_path / "no").exists()
