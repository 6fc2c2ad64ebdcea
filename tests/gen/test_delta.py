"""A model that takes a picture, defaults that follow the walk, and low-rank changes, through every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from gen import artifacts, catalog, cli, engine, library, loader, pictures
from gen.errors import GenError
from gen.request import Request

pytestmark = pytest.mark.usefixtures("installed_delta")


@pytest.fixture
def photo(tmp_path) -> Path:
    """A disc, under a name with a space."""
    image = Image.new("RGB", (200, 120), (20, 30, 40))
    ImageDraw.Draw(image).ellipse((60, 20, 140, 100), fill=(230, 40, 40))
    path = tmp_path / "my photo.png"
    image.save(path)
    return path


def build(**values) -> Request:
    return Request.build("pixart-delta:toy", {"prompt": "a red cube", "seed": 3, "width": 64} | values)


def pixels(request: Request) -> bytes:
    (result,) = [*engine.run(request)][-1].results
    with Image.open(result.path) as image:
        return image.convert("RGB").tobytes()


def notes(request: Request) -> list[str]:
    return [event.note for event in engine.run(request) if event.kind == "note"]


# ------------------------------------------------------------------------------------- defaults by the walk


@pytest.mark.parametrize(
    ("values", "steps", "guidance"),
    [
        ({}, 4, 1.0),
        ({"scheduler": "lcm-diffusers"}, 4, 1.0),
        ({"scheduler": "dpm++"}, 20, 4.5),
        ({"scheduler": "one-step"}, 1, 1.0),
        ({"scheduler": "dpm++", "steps": 3}, 3, 4.5),
        ({"steps": 2, "guidance": 2}, 2, 2.0),
    ],
    ids=str,
)
def test_steps_and_guidance_follow_the_walk_unless_said(values, steps, guidance):
    inputs = build(**values).inputs
    assert (inputs["steps"], inputs["guidance"]) == (steps, guidance)


def test_the_catalog_has_the_numbers_of_the_pipeline():
    from pipelines import pixart_delta

    rows = pixart_delta.DISTILLED
    assert {"": pixart_delta.STEPS} | {
        name: row.steps for name, row in rows.items()
    } == catalog.DISTILLED_STEPS
    assert {"": pixart_delta.GUIDANCE} | dict.fromkeys(rows, 1.0) == catalog.DISTILLED_GUIDANCE
    inputs = {one.name: one for one in catalog.MODELS["pixart-delta"].inputs}
    assert set(inputs["control_kind"].choices) == set(pixart_delta.CONTROL_KINDS)
    assert set(inputs["micro_ratio"].choices) == set(pixart_delta.MICRO_RATIOS)
    pipeline = loader.load(
        catalog.MODELS["pixart-delta"],
        catalog.choose(catalog.MODELS["pixart-delta"], "toy")[2],
        loader.Settings(),
    )
    assert inputs["scheduler"].choices == pipeline.pipeline.scheduler_names()


def test_show_tells_the_default_of_the_chosen_weights(capsys):
    assert cli.execute(["show", "pixart-delta:toy"]) == 0
    (steps,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("--steps"))
    assert steps.split()[1] == "4"


# ------------------------------------------------------------------------------------------- control image


def test_a_control_image_steers_the_picture_and_its_recipe_makes_it_again(photo, capsys):
    run = ["run", "pixart-delta:toy", "a red cube", "--seed", "3", "--size", "64"]
    assert cli.execute(run) == 0
    plain = capsys.readouterr().out.strip()
    assert cli.execute([*run, "--control-image", str(photo)]) == 0
    steered = capsys.readouterr().out.strip()
    recipe = artifacts.read_recipe(Path(steered))
    reference = recipe["request"]["inputs"]["control_image"]
    assert reference["name"] == "my photo.png"
    assert pictures.place(reference["sha256"]).is_file()

    photo.unlink()  # what was handed in is kept
    assert cli.execute(["run", "--repeat", steered]) == 0
    again = capsys.readouterr().out.strip()
    with Image.open(plain) as one, Image.open(steered) as two, Image.open(again) as three:
        assert one.tobytes() != two.tobytes()
        assert two.tobytes() == three.tobytes()

    pictures.place(reference["sha256"]).unlink()
    assert cli.execute(["run", "--repeat", steered]) == 2
    assert "my photo.png (SHA-256" in (said := capsys.readouterr().err) and "is no longer in" in said


def test_a_picture_that_went_away_meanwhile_is_told_before_weights_are_loaded(photo):
    request = build(control_image=photo)
    pictures.place(request.inputs["control_image"]["sha256"]).unlink()
    with pytest.raises(GenError, match="is no longer in"):
        next(engine.run(request))


def test_a_request_with_a_picture_is_plain_json_that_survives(photo):
    request = build(control_image=photo)
    sent = json.loads(json.dumps(request.to_json()))
    assert Request.from_json(sent) == request
    assert Request.from_json(sent, trusted=True) == request


def test_a_stranger_sends_the_picture_and_never_a_path(photo):
    import base64

    content = base64.b64encode(photo.read_bytes()).decode()
    request = build(control_image=photo)
    sent = request.to_json()
    for value in (content, f"data:image/png;base64,{content}", {"data": content, "name": photo.name}):
        found = Request.from_json(sent | {"inputs": {**sent["inputs"], "control_image": value}})
        assert found.inputs["control_image"]["sha256"] == request.inputs["control_image"]["sha256"]
    for path in (str(photo), "/etc/passwd", "../x.png"):
        with pytest.raises(GenError, match="not base64") as caught:
            Request.from_json(sent | {"inputs": {**sent["inputs"], "control_image": path}})
        assert "paths are not accepted" in caught.value.hint


def test_nothing_at_all_means_no_control_image(photo):
    assert build(control_image="").inputs["control_image"] is None
    assert build().inputs["control_image"] is None
    assert pixels(build(control_image=photo, control_scale=0)) == pixels(build())


def test_weights_without_a_control_branch_say_so_before_anything_is_loaded(
    photo, installed_delta, tiny_delta_folder, tmp_path
):
    (installed_delta / "toy" / "pixart-delta").unlink()
    shutil.copytree(tiny_delta_folder, installed_delta / "toy" / "pixart-delta")
    shutil.rmtree(installed_delta / "toy" / "pixart-delta" / "controlnet")
    with pytest.raises(GenError, match="needs the part controlnet/ of the weights") as caught:
        build(control_image=photo)
    assert caught.value.code == "bad_input"
    assert not (library.home() / "inputs").exists()
    build(control_scale=0.5)


def test_hed_without_its_weights_is_refused_only_where_it_would_be_used(photo):
    with pytest.raises(GenError, match="Control kind 'hed' needs the part hed/"):
        build(control_image=photo, control_kind="hed")
    assert notes(build(control_kind="hed")) == ["Control kind changes nothing without Control image."]


def test_what_was_done_to_the_picture_is_said(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert notes(build(control_image=tmp_path / "clear.png")) == [
        "Control image: transparent parts laid on white."
    ]


def test_a_model_that_takes_no_picture_refuses_it_by_name(photo, capsys):
    assert cli.execute(["run", "pixart-sigma:toy", "x", "--control-image", str(photo)]) == 2
    assert "pixart-sigma takes no option 'control_image'" in (said := capsys.readouterr().err)
    assert "Models that take it: pixart-delta" in said


@pytest.mark.parametrize("name", ["/nowhere.png", "/dev/zero", "/etc/hostname"])
def test_a_file_that_is_no_picture_ends_the_command_at_once(name, capsys):
    assert cli.execute(["run", "pixart-delta:toy", "x", "--control-image", name]) == 2
    assert "Control image" in capsys.readouterr().err


def test_a_plan_names_the_picture(photo, capsys):
    run = ["run", "pixart-delta:toy", "x", "--control-image", str(photo), "--dry-run"]
    assert cli.execute(run) == 0
    assert "my photo.png (SHA-256" in capsys.readouterr().out


def test_what_the_pipeline_refuses_is_said_in_the_words_of_the_options(photo):
    request = build(control_image=photo, control_start=0.8, control_end=0.2)
    with pytest.raises(GenError, match="control_start must be below control_end"):
        [*engine.run(request)]


# ---------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def lora(tiny_delta_folder, tmp_path) -> Path:
    """A folder of PEFT's form that changes one layer of the tiny transformer."""
    import torch
    from safetensors.torch import save_file

    from pipelines.models.pixart import PixArtTransformer2DModel

    layer = "transformer_blocks.0.attn1.to_q"
    width = PixArtTransformer2DModel.read_config(tiny_delta_folder / "transformer").width
    prefix = f"base_model.model.{layer}"
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(2, width),
        f"{prefix}.lora_B.weight": torch.randn(width, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_lora_changes_the_picture_and_leaves_the_plain_weights_alone(lora):
    plain = pixels(build())
    assert pixels(build(lora=lora)) != plain
    assert pixels(build(lora=lora / "adapter_model.safetensors")) == pixels(build(lora=str(lora)))
    assert pixels(build(lora=lora, lora_scale=0)) == plain
    assert pixels(build(lora=lora, lora_scale=0.5)) not in (plain, pixels(build(lora=lora)))
    assert pixels(build()) == plain


def test_the_recipe_names_the_lora_and_a_changed_one_is_told(lora, capsys):
    run = ["run", "pixart-delta:toy", "x", "--lora", str(lora), "--seed", "1", "--size", "64"]
    assert cli.execute(run) == 0
    made = capsys.readouterr().out.strip()
    recipe = artifacts.read_recipe(Path(made))
    assert recipe["request"]["inputs"]["lora"] == str(lora)
    assert len(recipe["weights"]["lora_fingerprint"]) == 12
    assert cli.execute(["run", "--repeat", made]) == 0
    assert "warning" not in capsys.readouterr().err
    file = lora / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.execute(["run", "--repeat", made]) == 0
    assert "the LoRA is not that of then" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is neither a folder nor a safetensors file"),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            "adapter_config.json: this file is missing",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle" * 9),
            "cut short",
        ),
    ],
    ids=["gone", "no configuration", "a pickle"],
)
def test_a_lora_that_cannot_be_used_is_refused_before_weights_are_loaded(lora, damage, words):
    damage(lora)
    with pytest.raises(GenError, match="LoRA cannot be used") as caught:
        build(lora=lora)
    assert words in caught.value.message
    assert "pixart-delta-xl-1024-lora" in caught.value.hint


def test_a_lora_for_another_network_is_refused_by_name(lora):
    from safetensors.torch import load_file, save_file

    file = lora / "adapter_model.safetensors"
    save_file({key.replace("blocks.0", "blocks.77"): one for key, one in load_file(file).items()}, file)
    with pytest.raises(GenError, match="cannot be merged into these weights") as caught:
        [*engine.run(build(lora=lora))]
    assert caught.value.code == "bad_input"
    assert "blocks.77" in caught.value.message


def test_a_published_lora_that_is_not_here_tells_how_to_get_it():
    with pytest.raises(GenError) as caught:
        build(lora="pixart-delta-xl-1024-lora")
    assert caught.value.code == "not_installed"
    assert "gen pull pixart-delta-xl-1024-lora" in caught.value.hint


def test_a_stranger_names_no_lora_by_its_path(lora):
    sent = build(lora=lora).to_json()
    with pytest.raises(GenError, match="LoRA cannot be"):
        Request.from_json(sent)
    assert Request.from_json(sent, trusted=True).inputs["lora"] == str(lora)
