"""Adapters by name: several at once, what a request and a recipe hold of them, listing and fusing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gen import adapters, artifacts, catalog, cli, engine, library, loader
from gen.errors import GenError
from gen.request import Request, Settings
from weights import store

QUICK = {"width": 64, "height": 64, "steps": 1}


@pytest.fixture(autouse=True)
def _tiny_weights(tiny_toy_folder: Path, tiny_dit_folder: Path, tmp_path, monkeypatch) -> None:
    """The tiny weights in the place of the embedded ones, last layers loud enough for adapters to show."""
    from safetensors.torch import load_file, save_file

    for name, source in (("pixart-sigma", tiny_toy_folder), ("dit", tiny_dit_folder)):
        folder = tmp_path / "weights" / "toy" / name
        shutil.copytree(source, folder)
        file = next((folder / "transformer").glob("*.safetensors"))
        state = load_file(file)
        import torch

        draw = torch.Generator().manual_seed(7)
        save_file(
            {key: one + 0.1 * torch.randn(one.shape, generator=draw) for key, one in state.items()}, file
        )
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "weights"))


def write(
    path: Path, seed: int, style: str = "kohya", prefix: str = "transformer_blocks_0_attn1_to_"
) -> Path:
    """An adapter of rank 2 for queries and values of one block, of 48 features."""
    import torch
    from safetensors.torch import save_file

    draw, found = torch.Generator().manual_seed(seed), {}
    for part in "qv":
        name = f"lora_unet_{prefix}{part}"
        found[f"{name}.lora_down.weight"] = torch.randn(2, 48, generator=draw)
        found[f"{name}.lora_up.weight"] = torch.randn(48, 2, generator=draw)
        found[f"{name}.alpha"] = torch.tensor(1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path)
    return path


@pytest.fixture
def mine() -> Path:
    """Two adapters of one's own, with names: stars and night."""
    write(adapters.home() / "stars.safetensors", 1)
    write(adapters.home() / "night" / "any.safetensors", 2)
    return adapters.home()


def build(model: str = "pixart-sigma:toy", **values) -> Request:
    return Request.build(model, {"prompt": "a red cube", **QUICK, **values}, seed=3)


def pixels(request: Request) -> bytes:
    from PIL import Image

    events = [*engine.run(request, Settings(device="cpu"))]
    return Image.open(events[-1].results[0].path).tobytes()


def test_several_adapters_with_scales_are_drawn_with_and_their_order_is_kept(mine):
    plain, stars = pixels(build()), pixels(build(lora="stars"))
    both = build(lora=["stars=0.5", "night"])
    assert both.inputs["lora"] == ["stars=0.5", "night=1.0"]
    drawn = pixels(both)
    assert len({plain, stars, pixels(build(lora="night")), drawn}) == 4
    assert pixels(build(lora=["stars=0", "night=0"])) == plain
    assert pixels(build(lora="stars=0.5")) == pixels(build(lora="stars", lora_scale=0.5))
    assert pixels(build(lora=["stars=1", "night=2"], lora_scale=0.5)) == drawn
    assert pixels(build()) == plain


def test_one_adapter_without_a_scale_is_held_as_it_always_was(mine):
    request = build(lora="stars", lora_scale=0.8)
    assert (request.inputs["lora"], request.inputs["lora_scale"]) == ("stars", 0.8)
    assert adapters.wanted(request.inputs) == (adapters.Wanted(name="stars", scale=0.8),)
    path = str(mine / "stars.safetensors")
    assert build(lora=path).inputs["lora"] == path
    assert build(lora=[path]).inputs["lora"] == path
    assert build(lora=[]).inputs["lora"] is None and build(lora=[""]).inputs["lora"] is None
    assert build().inputs["lora"] is None
    again = Request.from_json(json.loads(json.dumps(build(lora=["stars=0.1", "night"]).to_json())))
    assert again == build(lora=["stars=0.1", "night=1.0"])


def test_a_name_may_have_an_equals_sign_in_it(mine):
    write(adapters.home() / "a=2.safetensors", 1)
    assert build(lora="a=2").inputs["lora"] == "a=2"
    assert build(lora="a=2=0.5").inputs["lora"] == ["a=2=0.5"]
    wanted = adapters.wanted(build(lora=["a=2", "stars"]).inputs)
    assert [(one.name, one.scale) for one in wanted] == [("a=2", 1.0), ("stars", 1.0)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["stars", "stars=0.5"], "named twice"),
        ("stars=9", "out of range"),
        ("stars=nan", "out of range"),
        ("stars=much", "is no number"),
        ("=0.5", "names nothing"),
        ("strs", "neither a folder nor a safetensors file"),
        (7, "must be a name or a path"),
        ([7], "must be a name or a path"),
        ({"name": "stars"}, "must be a name or a path"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(mine, value, words):
    with pytest.raises(GenError, match=words) as caught:
        build(lora=value)
    assert caught.value.code == "bad_input"


def test_more_than_a_few_at_once_are_refused(mine):
    names = [write(adapters.home() / f"n{n}.safetensors", n).stem for n in range(9)]
    with pytest.raises(GenError, match="9 LoRAs are too many"):
        build(lora=names)
    assert len(build(lora=names[:8]).inputs["lora"]) == 8


def test_strangers_name_what_is_listed_and_no_path(mine):
    sent = build(lora=["stars=0.5", "night"]).to_json()
    assert Request.from_json(sent).inputs["lora"] == ["stars=0.5", "night=1.0"]
    for value in (
        str(mine / "stars.safetensors"),
        [str(mine / "stars.safetensors")],
        ["stars", "../loras/stars.safetensors=1"],
        "../loras/stars",
        ["stars", 7],
    ):
        sent["inputs"]["lora"] = value
        with pytest.raises(GenError, match=r"LoRA cannot be") as caught:
            Request.from_json(sent)
        assert caught.value.code == "bad_input"
    names = {one.name: one for one in catalog.MODELS["pixart-sigma"].inputs_for("toy")}
    assert names["lora"].choices == ("night", "stars")


def test_the_command_line_takes_several_and_the_recipe_tells_each(mine, capsys):
    run = ["run", "pixart-sigma:toy", "x", "--size", "64", "--steps", "1", "--seed", "1"]
    assert cli.execute([*run, "--lora", "stars=0.5", "--lora", "night"]) == 0
    made = capsys.readouterr().out.strip()
    recipe = artifacts.read_recipe(Path(made))
    assert recipe["request"]["inputs"]["lora"] == ["stars=0.5", "night=1.0"]
    told = recipe["weights"]["loras"]
    assert [(one["name"], one["scale"]) for one in told] == [("stars", 0.5), ("night", 1.0)]
    assert len({one["fingerprint"] for one in told}) == 2
    assert cli.execute(["run", "--repeat", made]) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.err
    assert same(made, captured.out.strip())
    write(mine / "night" / "any.safetensors", 5)
    assert cli.execute(["run", "--repeat", made]) == 0
    assert "the LoRA night is not that of then" in capsys.readouterr().err
    assert cli.execute(["run", "--repeat", made, "--lora", ""]) == 0
    assert artifacts.read_recipe(Path(capsys.readouterr().out.strip()))["request"]["inputs"]["lora"] is None


def same(one: str, other: str) -> bool:
    from PIL import Image

    return Image.open(one).tobytes() == Image.open(other).tobytes()


def test_recipes_of_older_releases_are_compared_by_what_they_hold(mine, tmp_path):
    file = write(tmp_path / "old" / "adapter_model.safetensors", 1)
    old = {"lora_fingerprint": store.fingerprint(file.parent)}
    inputs = build(lora=str(file.parent), lora_scale=0.8).inputs
    assert adapters.changed(old, inputs) == []
    assert adapters.changed({}, inputs) == []
    assert adapters.changed(old, build(lora="stars").inputs)[0].startswith("the LoRA is not that of then")
    assert "now none" in adapters.changed(old, build().inputs)[0]


def test_preferences_may_name_one_or_several(mine, monkeypatch, tmp_path, capsys):
    run = ["run", "pixart-sigma:toy", "x", "--size", "64", "--dry-run", "--json"]

    def planned() -> object:
        assert cli.execute(run) == 0
        plan = json.loads(capsys.readouterr().out)["data"]["plans"][0]
        return plan["request"]["inputs"]["lora"]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen.toml").write_text('[run]\nlora = "stars"\n')
    assert planned() == "stars"
    (tmp_path / "gen.toml").write_text('[run]\nlora = ["stars", "night=0.5"]\n')
    assert planned() == ["stars=1.0", "night=0.5"]
    monkeypatch.setenv("GEN_LORA", "night")
    assert planned() == "night"
    monkeypatch.setenv("GEN_LORA", "night:stars=0.5")
    assert planned() == ["night=1.0", "stars=0.5"]


def test_an_adapter_for_another_model_is_refused_before_weights_are_loaded(mine, tmp_path):
    file = write(
        tmp_path / "sd.safetensors", 1, prefix="down_blocks_0_attentions_0_transformer_blocks_0_attn2_"
    )
    with pytest.raises(
        GenError, match=r"cannot be merged into these weights.*no layers for.*It seems to be for"
    ):
        build(lora=str(file))
    with pytest.raises(GenError, match="holds DoRA"):
        from safetensors.torch import load_file, save_file

        save_file(load_file(file) | {"x.dora_scale": load_file(file).popitem()[1]}, file)
        build(lora=str(file))


def test_a_request_with_adapters_is_checked_without_torch(mine, tmp_path):
    code = (
        "import sys; from gen.request import Request; "
        "values = {'prompt': 'x', 'lora': ['stars=0.5', 'night']};"
        "print(Request.build('pixart-sigma:toy', values).inputs['lora']);"
        "from gen import adapters; print(adapters.describe('stars')['fits']);"
        "assert not {'torch', 'huggingface_hub', 'PIL'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    # DiT's blocks have the same names and widths here, so it fits them too.
    assert ran.stdout.splitlines() == ["['stars=0.5', 'night=1.0']", "['pixart-sigma:toy', 'dit:toy']"]


def test_classes_are_drawn_with_adapters_too(mine):
    def drawn(**values) -> bytes:
        given = {"class_label": "blue ball", "steps": 1, **values}
        return pixels(Request.build("dit:toy", given, seed=3))

    plain = drawn()
    assert drawn(lora="stars") != plain and drawn(lora="stars=0") == plain


def test_the_list_tells_what_fits(mine, capsys):
    write(mine / "sd.safetensors", 1, prefix="down_blocks_0_attentions_0_transformer_blocks_0_attn2_")
    (mine / "broken.safetensors").write_bytes(b"\x80\x04pickle" * 9)
    assert cli.execute(["lora", "list", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["data"]["loras"]}
    assert list(found) == ["pixart-delta-xl-1024-lora", "broken", "night", "sd", "stars"]
    assert found["stars"]["fits"] == ["pixart-sigma:toy", "dit:toy"]
    assert (found["stars"]["ranks"], found["stars"]["layers"], found["stars"]["style"]) == ([2], 2, "kohya")
    assert found["sd"]["fits"] == [] and "U-Net" in found["sd"]["seems_for"]
    assert "a pickle" in found["broken"]["problem"]
    assert not found["pixart-delta-xl-1024-lora"]["installed"]
    assert cli.execute(["lora", "list"]) == 0
    table = capsys.readouterr().out
    assert "nothing installed; it seems to be for a U-Net" in table and "gen pull pixart-delta" in table
    assert cli.execute(["lora", "list", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["broken", "night", "sd", "stars"]
    assert cli.execute(["lora", "show", str(mine / "night")]) == 0
    assert "pixart-sigma:toy, dit:toy" in capsys.readouterr().out
    assert cli.execute(["lora", "show", "broken"]) == 2
    assert "a pickle" in capsys.readouterr().err


def test_fused_weights_draw_the_same_without_the_adapter(mine, tmp_path, monkeypatch, capsys):
    drawn = pixels(build(lora=["stars=0.5", "night"]))
    fused = tmp_path / "fused" / "toy" / "pixart-sigma"
    fuse = ["lora", "fuse", "pixart-sigma:toy", "--lora", "stars=0.5", "--lora", "night", "-o", str(fused)]
    fused.parent.mkdir(parents=True)
    assert cli.execute(fuse) == 0
    assert capsys.readouterr().out.strip() == str(fused)
    store.verify(fused)
    assert cli.execute(fuse) == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "fused"))
    assert pixels(build()) == drawn
    assert not [path for path in fused.parent.iterdir() if path.name.startswith(".")]


def test_text_parts_and_another_base_are_told(mine, tmp_path):
    from safetensors.torch import load_file, save_file

    file = mine / "stars.safetensors"
    text = {f"lora_te_encoder_x.lora_{one}.weight": load_file(file).popitem()[1] for one in ("down", "up")}
    save_file(load_file(file) | text, file, {"base_model": "PixArt-alpha/PixArt-XL-2-1024-MS"})
    notes = [event.note for event in engine.run(build(lora="stars")) if event.kind == "note"]
    assert any("2 tensors for a text encoder are left out" in note for note in notes)
    facts = catalog.MODELS["pixart-sigma"].checkpoint("1024")
    told = [*adapters.remarks({"lora": "stars"}, facts)]
    assert "made for PixArt-alpha" in told[1] and "these weights are PixArt-Sigma" in told[1]


def test_the_recipe_tells_the_name_that_was_asked_for_of_the_same_bytes(mine, tmp_path):
    """The second is drawn with the pipeline that the first has loaded."""
    other = shutil.copy(mine / "stars.safetensors", tmp_path / "same.safetensors")
    for name in ("stars", str(other)):
        pixels(build(lora=name))
        entry = library.search("", None, 1)[0]
        assert [one["name"] for one in entry.recipe["weights"]["loras"]] == [name]


def test_with_other_adapters_only_the_transformer_is_loaded_anew(mine):
    drawn = pixels(build(lora="stars"))
    loader.forget()
    row = catalog.MODELS["pixart-sigma"]
    _, _, folder = catalog.choose(row, "toy")

    def loaded(*names: str, exact: str = "lean"):
        wanted = [adapters.Wanted(name=name, scale=1.0) for name in names]
        return loader.load(row, folder, Settings(device="cpu", exact=exact), wanted).pipeline

    plain, stars, both = loaded(), loaded("stars"), loaded("stars", "night")
    assert plain.vae is stars.vae is both.vae and plain.text_encoder is both.text_encoder
    assert len({id(one.transformer) for one in (plain, stars, both)}) == 3
    assert loaded() is plain and loaded("stars") is stars
    assert loaded("stars", exact="plain").vae is not plain.vae
    assert pixels(build(lora="stars")) == drawn


def test_the_library_shows_several_adapters(mine):
    pixels(build(lora=["stars=0.5", "night"]))
    entry = library.search("", None, 1)[0]
    assert entry.request["inputs"]["lora"] == ["stars=0.5", "night=1.0"]
