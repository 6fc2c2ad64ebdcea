"""Reading folders of weights: everything that can be wrong with one has a sentence that names the file."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.attention import ATTENTION, chosen
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.pixart import PixArtTransformer2DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_toy_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_toy_folder / "transformer", tmp_path / "transformer")
    return tmp_path / "transformer"


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def lead_outside(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"proj_out.bias": "../../secret.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_config(num_layers="gone"), r"config\.json lacks 'num_layers'"),
        (change_config(window_size=4), r"unknown key 'window_size' with value 4"),
        (change_config(double_self_attention=True), r"unknown key 'double_self_attention' with value True"),
        (change_config(activation_fn="geglu"), r"config\.json: activation_fn must be"),
        (change_config(num_layers=3), r"the file has no \d+ tensors, such as transformer_blocks\.2\."),
        (change_config(num_layers=1), r"has unexpected \d+ tensors, such as transformer_blocks\.1\."),
        (
            change_config(patch_size=4),
            r"pos_embed\.proj\.weight is \(48, 4, 2, 2\), config\.json means \(48, 4, 4, 4\)",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"must hold a JSON object"),
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            rf"{WEIGHTS} is missing \(weights are read from safetensors",
        ),
        (truncate, rf"{WEIGHTS} is damaged"),
        (lead_outside, r"names a file outside its folder"),
        (
            change_tensors(lambda state: state["proj_out.bias"].fill_(torch.nan)),
            r"proj_out\.bias holds numbers",
        ),
        (change_tensors(lambda state: state.pop("proj_out.bias")), r"no 1 tensors, such as proj_out\.bias"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        PixArtTransformer2DModel.from_pretrained(folder)


def test_weights_are_as_readable_as_their_configuration(folder: Path) -> None:
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("config.json", WEIGHTS)}
    assert len(modes) == 1


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    PixArtTransformer2DModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_is_written_once_and_a_layout_that_is_not_known_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    written = []
    save = safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch,
        "save_file",
        lambda *given, **more: (written.append(given[1]), save(*given, **more)),
    )
    small = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 2}
    model = DiTTransformer2DModel(**small)
    for published in (True, False):
        model.save_pretrained(tmp_path / str(published), published=published)
    assert [path.parent.name for path in written] == ["True", "False"]
    with pytest.raises(TypeError, match="publsihed"):
        model.save_pretrained(tmp_path / "typo", publsihed=False)
    assert not (tmp_path / "typo").exists()


def test_diffusers_names_of_attention_choose_it(folder: Path) -> None:
    network = PixArtTransformer2DModel.from_pretrained(folder)
    for theirs, ours in {"native": "sdpa", "_native_math": "math", "math": "math"}.items():
        network.set_attention_backend(theirs)
        assert chosen(network) == {"all": ours}
    assert network.transformer_blocks[0].attn2.attend is ATTENTION["math"].attend
    network.reset_attention_backend()
    assert chosen(network) == {}  # auto: nothing computed yet
    with pytest.raises(ValueError, match="no attention called 'nativ'"):
        network.set_attention_backend("nativ")
    with pytest.raises(ValueError, match="cannot run here"):
        network.set_attention_backend("flash")


def test_what_repeats_is_named_and_refused_where_it_cannot_be_compiled(folder: Path) -> None:
    network = PixArtTransformer2DModel.from_pretrained(folder)
    names = {type(module).__name__ for module in network.modules()}
    assert set(network._repeated_blocks) <= names
    with pytest.raises(ValueError, match="in training"):
        network.train().compile_repeated_blocks()
