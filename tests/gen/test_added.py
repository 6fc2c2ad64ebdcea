"""`gen add`: weights of one's own drawn with where they lie, in every layout the same pixels, and bad files
refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gen import added, catalog, cli, engine, library, loader
from gen.errors import GenError
from gen.request import Request, Settings
from pipelines.models.pixart import PixArtTransformer2DModel
from weights import added as table
from weights import store
from weights.convert import PIXART, PIXART_BLOCK

NETWORK = "transformer/diffusion_pytorch_model.safetensors"
COMFY = "model.diffusion_model."
HEADS = 1  # of 72 numbers, as published networks have them: shapes tell how many
# What it takes to draw small pictures of one's own file, once a companion is named
SMALL = {"prompt": "a red cube", "steps": 2, "width": 64, "height": 64, "seed": 5}

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(scope="module")
def pipeline_folder(tiny_toy_folder, tmp_path_factory) -> Path:
    """The tiny pipeline with a transformer as a checkpoint of 128 pixels would be: heads of 72, and positions
    by the published rule. Its head is shaken, so that it draws something."""
    folder = tmp_path_factory.mktemp("mine") / "pixart"
    shutil.copytree(tiny_toy_folder, folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        network = PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            num_attention_heads=HEADS,
            attention_head_dim=72,
            cross_attention_dim=72,
            caption_channels=32,
            interpolation_scale=16 / 64,
            use_additional_conditions=False,
        )
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder / "transformer")
    return folder


def official(folder: Path, prefix: str = "", captions: int = 300) -> dict[str, torch.Tensor]:
    """The transformer of a folder under its official names: joined matrices, a table of positions, and a null
    caption."""
    left = load_file(folder / NETWORK)
    width, channels = left["caption_projection.linear_1.weight"].shape
    state = {
        "pos_embed": torch.zeros(1, 64, width),
        "y_embedder.y_embedding": torch.zeros(captions, channels),
    }
    places = [("", "", PIXART)]
    places += [(f"blocks.{n}.", f"transformer_blocks.{n}.", PIXART_BLOCK) for n in range(2)]
    for theirs, ours, rules in places:
        for rule in rules:
            if rule.ours and ours + rule.ours[0] in left:
                state[theirs + rule.official] = torch.cat([left.pop(ours + name) for name in rule.ours])
    assert not left, f"not translated: {sorted(left)}"
    return {prefix + name: tensor for name, tensor in state.items()}


def pixels(reference: str) -> np.ndarray:
    path = [*engine.run(Request.build(reference, SMALL))][-1].results[0].path
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def parameters(row: catalog.Model, tag: str) -> dict[str, torch.Tensor]:
    """Of the transformer as it is loaded."""
    folder = catalog.choose(row, tag)[2]
    return PixArtTransformer2DModel.from_pretrained(folder / "transformer").state_dict()


def kept_bytes() -> int:
    """What lies in GEN_HOME, links not followed."""
    return sum(path.lstat().st_size for path in library.home().rglob("*") if not path.is_dir())


@pytest.fixture
def file(pipeline_folder, tmp_path) -> Path:
    """In the official layout."""
    save_file(official(pipeline_folder), tmp_path / "sigma.safetensors")
    return tmp_path / "sigma.safetensors"


@pytest.fixture
def gen(capfd):
    """gen("add", ...) -> (exit code, stdout, stderr)."""

    def gen(*arguments: object) -> tuple[int, str, str]:
        code = cli.execute([*map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return gen


def refused(path: Path, *arguments, **options) -> GenError:
    """The error of adding it; nothing of it may stay."""
    with pytest.raises(GenError) as caught:
        added.add(path, *arguments, **options)
    assert not table.rows()
    assert not [*(library.home() / "assembled").rglob("*.safetensors")]
    return caught.value


def test_folder_and_files_of_all_layouts_draw_the_same_and_none_is_copied(pipeline_folder, tmp_path, gen):
    files = {
        "official": official(pipeline_folder),
        "comfy": official(pipeline_folder, COMFY) | {"first_stage_model.decoder.weight": torch.ones(3)},
        "plain": load_file(pipeline_folder / NETWORK),
    }
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    assert gen("add", pipeline_folder, "--as", "pixart-sigma:folder")[:2] == (0, "pixart-sigma:folder\n")
    before = kept_bytes()
    told = {}
    for name in files:
        code, out, told[name] = gen(
            *("add", tmp_path / f"{name}.safetensors", "--as", f"pixart-sigma:{name}"),
            *("--with", "pixart-sigma:folder", *(["--size", "128"] if name == "plain" else [])),
        )
        assert (code, out) == (0, f"pixart-sigma:{name}\n"), told[name]
        grown, before = kept_bytes() - before, kept_bytes()
        assert grown < (tmp_path / f"{name}.safetensors").stat().st_size / 4, "links and lists, no tensors"
    assert "the official layout" in told["official"] and "nothing was copied" in told["official"]
    assert "left out: 1 tensors of other networks, such as first_stage_model" in told["comfy"]
    row = catalog.MODELS["pixart-sigma"]
    expected, numbers = pixels("pixart-sigma:folder"), parameters(row, "folder")
    assert expected.std() > 10, "a picture of one colour would prove nothing"
    for name in files:
        loaded = parameters(row, name)
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in numbers.items()), name
        # The same numbers at other addresses: matrix products round by how their data is aligned in memory,
        # and tensors of a mapped file lie where the file has them.
        assert np.abs(pixels(f"pixart-sigma:{name}") - expected).max() <= 1, name
    assert catalog.installed(row) == ["folder", "official", "comfy", "plain", "toy"]
    assert catalog.choose(row, None)[0] == "folder", "one's own come before toys"
    listed = {one["name"]: one for one in json.loads(gen("list", "--json")[1])["data"]["weights"]}
    assert listed["pixart-sigma:comfy"]["native_size"] == 128
    assert listed["pixart-sigma:comfy"]["installed"]


def test_the_picture_remembers_which_weights_drew_it_and_repeats(file, gen):
    arguments = ("--as", "mine", "--with", "pixart-sigma:toy", "--licence", "my own", "--json")
    code, out, err = gen("add", file, *arguments)
    assert code == 0, err
    about = json.loads(out)["data"]
    assert about["name"] == "pixart-sigma:mine", "300 tokens of caption tell the model"
    assert (about["native_size"], about["licence"], about["path"]) == (128, "my own", str(file))
    assert about["parameters"] == sum(
        tensor.numel() for name, tensor in load_file(file).items() if name[:4] not in ("pos_", "y_em")
    ) + sum(t.numel() for n, t in load_file(file).items() if n.startswith("y_embedder.y_proj"))
    code, out, _ = gen("run", "pixart-sigma:mine", "a red cube", "--steps", "1", "--size", "64")
    assert code == 0
    recipe = library.search()[0].recipe
    assert recipe["weights"]["licence"] == "my own"
    assert recipe["request"]["weights"] == "mine"
    assert gen("run", "--repeat", out.strip())[0] == 0


def test_tensors_are_views_of_the_file_and_may_stay_in_it(file):
    found = added.add(file, "mine", companion="pixart-sigma:toy")
    _, _, folder = catalog.choose(catalog.MODELS["pixart-sigma"], "mine")
    assert (folder / NETWORK).resolve() == file
    network = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    qkv = load_file(file)["blocks.1.attn.qkv.weight"]
    ours = network.transformer_blocks[1].attn1
    assert torch.equal(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]), qkv)
    assert ours.to_q.weight.untyped_storage().data_ptr() == ours.to_v.weight.untyped_storage().data_ptr()
    loaded = loader.load(catalog.MODELS["pixart-sigma"], folder, Settings(device="cpu", memory="sequential"))
    assert "transformer" in loaded.offloaded
    for step in loaded.pipeline.denoise("a red cube", num_inference_steps=1, height=64, width=64):
        assert step.latents.isfinite().all()
    assert found.row.checkpoint.native_size == 128


def test_the_same_file_under_two_tags_is_drawn_as_each_of_them_says(file):
    """Positions are scaled by the size: the same tensors, and another picture."""
    added.add(file, "small", companion="pixart-sigma:toy")
    added.add(file, "large", companion="pixart-sigma:toy", size=256)
    assert catalog.MODELS["pixart-sigma"].checkpoint("large").native_size == 256
    small, large = (
        [*engine.run(Request.build(f"pixart-sigma:{tag}", SMALL | {"width": 128, "height": 128}))][
            -1
        ].results[0]
        for tag in ("small", "large")
    )
    with Image.open(small.path) as one, Image.open(large.path) as other:
        assert one.tobytes() != other.tobytes()


def test_a_list_of_names_that_is_not_the_files_is_told(file):
    added.add(file, "mine", companion="pixart-sigma:toy")
    row = catalog.MODELS["pixart-sigma"]
    _, _, folder = catalog.choose(row, "mine")
    names = folder / "transformer" / table.NAMES
    entries = json.loads(names.read_text())
    assert entries["pos_embed"] == [] and len(entries["blocks.0.attn.qkv.weight"]) == 3
    for damaged in (
        {name: ours for name, ours in entries.items() if name != "t_block.1.bias"},
        entries | {"t_block.1.bias": ["adaln_single.linear.bias"] * 5},
    ):
        names.write_text(json.dumps(damaged))
        loader.forget()
        with pytest.raises(GenError, match=r"names\.json") as caught:
            loader.load(row, folder, Settings(device="cpu"))
        assert caught.value.code == "corrupt_weights"


def test_captions_of_120_tokens_are_alphas(pipeline_folder, tmp_path, installed_delta):
    save_file(official(pipeline_folder, captions=120), tmp_path / "alpha.safetensors")
    error = refused(tmp_path / "alpha.safetensors", "pixart-sigma:mine", companion="pixart-sigma:toy")
    assert "a transformer of PixArt-alpha" in error.message
    taken = refused(tmp_path / "alpha.safetensors", companion="pixart-delta:toy")
    assert "pixart-delta:alpha is the name of published" in taken.message, "the file's name is the tag"
    found = added.add(tmp_path / "alpha.safetensors", "mine", companion="pixart-delta:toy")
    facts = found.row.checkpoint
    assert (found.row.reference, facts.pipeline, facts.max_tokens) == (
        "pixart-delta:mine",
        "PixArtAlphaPipeline",
        120,
    )
    assert facts.walk == "lcm", "the companion's"
    assert Request.build("pixart-delta:mine", {"prompt": "a red cube"}).inputs["steps"] == 4


def test_a_folder_of_a_distilled_model_goes_to_pixart_delta(tiny_delta_folder, tiny_dit_folder):
    found = added.add(tiny_delta_folder, "mine")
    assert (found.row.model, found.row.checkpoint.walk) == ("pixart-delta", "lcm")
    found = added.add(tiny_dit_folder, "mine")
    assert (found.row.model, found.row.checkpoint.largest) == ("dit", 128)
    assert Request.build("dit:mine", {"class_label": "red cube"}).weights == "mine"


def test_a_configuration_that_leaves_the_size_open_is_read_from_the_tensors(pipeline_folder, tmp_path):
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "open"))
    config = folder / "transformer" / "config.json"
    entries = json.loads(config.read_text())
    del entries["use_additional_conditions"]
    config.write_text(json.dumps(entries | {"sample_size": 128}))
    before = config.read_bytes()
    added.add(folder, "pixart-sigma:open")
    _, facts, place = catalog.choose(catalog.MODELS["pixart-sigma"], "open")
    mended = json.loads((place / "transformer" / "config.json").read_text())
    assert mended["use_additional_conditions"] is False and facts.native_size == 1024
    assert config.read_bytes() == before


def test_forgetting_leaves_the_files(file):
    found = added.add(file, "mine", companion="pixart-sigma:toy")
    assert (library.home() / "assembled" / found.row.key).is_dir()
    assert added.forget("pixart-sigma", "mine").path == file
    assert file.is_file() and not (library.home() / "assembled" / found.row.key).exists()
    assert "mine" not in catalog.MODELS["pixart-sigma"].weights
    with pytest.raises(GenError, match="No weights were added as pixart-sigma:mine") as caught:
        added.forget("pixart-sigma", "mine")
    assert caught.value.code == "unknown_model"


def test_two_processes_that_add_lose_nothing(file, tmp_path):
    """Each reads the table under the lock that it writes it with."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from weights import added\n"
        "for n in range(20): added.put(added.Added(model='dit', tag=f'{sys.argv[1]}{n}', base='dit-toy',"
        " path=Path('/nowhere'), facts={}, stamps={}))"
    )
    racing = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [one.wait(timeout=100) for one in racing] == [0, 0, 0]
    assert len(table.rows()) == 60
    assert catalog.installed(catalog.MODELS["dit"]) == catalog.installed(catalog.MODELS["dit"])
    assert "a7" in catalog.MODELS["dit"].weights


# What cannot be added


def test_paths_that_are_no_weights_are_refused(tmp_path, pipeline_folder):
    assert "There is no file or folder" in refused(tmp_path / "none.safetensors").message
    for name in ("model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        error = refused(tmp_path / name)
        assert (error.code, "gen convert" in error.hint) == ("bad_input", True)
    (tmp_path / "notes.txt").write_text("no")
    assert "no .safetensors file" in refused(tmp_path / "notes.txt").message
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused(tmp_path / "empty").message
    error = refused(pipeline_folder / "transformer")
    assert "model_index.json" in error.message and "gen add" in error.hint
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FluxPipeline, which no model here draws with" in refused(tmp_path / "empty").message


def test_a_file_cut_short_is_corrupt(file):
    file.write_bytes(file.read_bytes()[:-100])
    error = refused(file, companion="pixart-sigma:toy")
    assert error.code == "corrupt_weights" and "promises" in error.message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda state: state.pop("blocks.1.attn.proj.bias"),
            "are missing:\n  blocks.1.attn.proj.bias",
        ),
        (lambda state: state.update(more=torch.ones(1)), "are unknown:\n  more"),
        (lambda state: state.update({"t_block.1.bias": torch.ones(7)}), "adaln_single.linear.bias is (7,)"),
        (lambda state: state.update({"blocks.0.attn.qkv.bias": torch.ones(7)}), "not 3 parts"),
        (lambda state: state.update({"lora_unet_x.lora_up.weight": torch.ones(1)}), "is a LoRA"),
        (lambda state: state.update({"controlnet.0.x": torch.ones(1)}), "a control branch"),
        (lambda state: (state.clear(), state.update(a=torch.ones(1))), "no PixArt transformers among its 1"),
        (lambda state: state.pop("pos_embed"), "stores no position table"),
        (
            lambda state: state.update({"t_block.1.bias": torch.ones(432).to(torch.float8_e4m3fn)}),
            "numbers as F8_E4M3",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(pipeline_folder, tmp_path, damage, words):
    state = official(pipeline_folder)
    damage(state)
    save_file(state, tmp_path / "bad.safetensors")
    error = refused(tmp_path / "bad.safetensors", "pixart-sigma:bad", companion="pixart-sigma:toy")
    assert error.code == "bad_input"
    assert words in error.message


def test_a_family_that_does_not_show_is_asked_for(pipeline_folder):
    error = refused(pipeline_folder / NETWORK, companion="pixart-sigma:toy")
    assert "does not show in the file" in error.message and "--as pixart-sigma:TAG" in error.hint


@pytest.mark.parametrize("tag", ["../up", "a b", "", "ä", "x" * 41, "-dash", "a/b"])
def test_odd_tags_are_refused(file, tag):
    assert "is no tag" in refused(file, f"pixart-sigma:{tag}", companion="pixart-sigma:toy").message


def test_names_that_are_taken_are_refused(file):
    assert "published or embedded" in refused(file, "pixart-sigma:512", companion="pixart-sigma:toy").message
    assert refused(file, "pixart-sgma:x").code == "unknown_model"
    added.add(file, "mine", companion="pixart-sigma:toy")
    with pytest.raises(GenError, match="pixart-sigma:mine is there already"):
        added.add(file, "mine", companion="pixart-sigma:toy")


def test_other_parts_must_be_here_and_fit(file, tiny_dit_folder, tmp_path):
    error = refused(file)
    assert error.code == "not_installed" and "gen pull pixart-sigma:256" in error.hint
    assert refused(file, companion="pixart-sigma:512").hint == "Get it first: gen pull pixart-sigma:512"
    assert refused(file, companion=str(tmp_path / "none")).code == "bad_input"
    assert "has no tokenizer and no text_encoder" in refused(file, companion=str(tiny_dit_folder)).message
    toy = catalog.choose(catalog.MODELS["pixart-sigma"], "toy")[2]
    other = Path(shutil.copytree(toy, tmp_path / "other"))
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_model": 4096}))
    assert "reads 32 wide captions" in refused(file, companion=str(other)).message


# What has changed since


def test_a_file_that_moved_or_changed_is_told_when_it_is_used(file, gen):
    added.add(file, "mine", companion="pixart-sigma:toy")
    content = file.read_bytes()
    draw = ("run", "pixart-sigma:mine", "a red cube", "--steps", "1", "--size", "64")
    file.write_bytes(content[:-1] + b"\1" + b"more")
    code, _, err = gen(*draw)
    assert code == 4 and "has changed since it was added as pixart-sigma:mine" in err and "gen rm" in err
    file.rename(file.with_name("elsewhere.safetensors"))
    code, _, err = gen(*draw)
    assert code == 3 and "is no longer there" in err
    assert "mine" not in catalog.installed(catalog.MODELS["pixart-sigma"])
    assert gen("run", "pixart-sigma", *draw[2:])[0] == 0, "others are drawn with"


def test_a_folder_that_changed_is_told(pipeline_folder, tmp_path, gen):
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))
    added.add(folder, "mine")
    (folder / "transformer" / "config.json").write_text("{}")
    code, _, err = gen("run", "pixart-sigma:mine", "a red cube")
    assert code == 4 and "transformer/config.json has changed" in err
    shutil.rmtree(folder)
    assert gen("run", "pixart-sigma:mine", "a red cube")[0] == 3


def test_companions_that_have_gone_are_told(pipeline_folder, tiny_toy_folder, file, tmp_path, gen):
    other = Path(shutil.copytree(tiny_toy_folder, tmp_path / "other"))
    added.add(file, "mine", companion=str(other))
    shutil.rmtree(other / "vae")
    code, _, err = gen("run", "pixart-sigma:mine", "a red cube")
    assert code == 3 and "its vae of" in err


def test_a_damaged_table_is_told(file, gen):
    added.add(file, "mine", companion="pixart-sigma:toy")
    (library.home() / "added.json").write_text("{")
    code, _, err = gen("list")
    assert code == 4 and "added.json: not valid JSON" in err and "Move it away" in err


def test_looking_needs_no_torch_and_creates_nothing(tmp_path):
    assert store.find("pixart-sigma-xl-1024") is None
    assert "toy" in catalog.MODELS["pixart-sigma"].weights
    assert not library.home().exists()
