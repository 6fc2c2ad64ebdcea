"""A model that is asked for a class instead of a prompt, through every door."""

import json

import pytest
from PIL import Image

from gen import artifacts, catalog, cli, engine, library
from gen.errors import GenError
from gen.request import Request, class_name

pytestmark = pytest.mark.usefixtures("installed_dit")


def label(value):
    (one,) = (one for one in catalog.MODELS["dit"].inputs_for("toy") if one.kind == "label")
    return one.check(value)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("red cube", "red cube"),
        (" Crimson BOX ", "red cube"),
        ("1", "blue ball"),
        (1, "blue ball"),
        (0.0, "red cube"),
        ("heron", "3"),  # its first name is another class's as well
        (2, "2"),
        ("crane, heron", "3"),
    ],
)
def test_a_class_is_named_or_numbered_and_written_down_in_one_way(value, written):
    assert label(value) == written
    assert label(label(value)) == written


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        ("red cub", "There is no class 'red cub'", "Did you mean red cube?"),
        ("zzzzzz", "There is no class 'zzzzzz'", "lists the 4 classes"),
        ("crane", "names several classes: 2 (crane), 3 (crane, heron)", "Give the number"),
        (4, "4 is too large; the largest is 3", "0 to 3"),
        ("-1", "There is no class '-1'", "lists"),
        (True, "must be a whole number", ""),
        (1.5, "must be a whole number", ""),
        ("", "Class is missing", ""),
        (None, "Class is missing", ""),
    ],
)
def test_what_is_no_class_is_refused_with_a_way_out(value, message, hint):
    with pytest.raises(GenError) as caught:
        label(value)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.code == "bad_input"


def test_nameless_classes_go_by_number():
    assert [class_name(("", "a, b", "A"), n) for n in range(3)] == ["0", "1", "2"]


def test_a_picture_of_a_class_is_drawn_and_remembers_it(tmp_path):
    request = Request.build("dit:toy", {"class_label": "crimson box", "steps": 2, "seed": 4})
    assert request.subject == "red cube"
    (result,) = [*engine.run(request)][-1].results
    with Image.open(result.path) as image:
        assert image.size == (128, 128)
    assert "red-cube" in result.path.name
    assert library.get(result.id).prompt == "red cube"
    assert artifacts.read_recipe(result.path)["request"]["inputs"]["class_label"] == "red cube"
    assert library.search("red cube", "dit", 5)[0].id == result.id


@pytest.mark.parametrize(
    "arguments",
    [("red", "cube"), ("--class-label", "red cube"), ("0",), ("--class-label", "0")],
)
def test_the_command_line_takes_it_in_words_or_by_its_flag(arguments, capsys):
    assert cli.execute(["run", "dit:toy", *arguments, "--steps", "2", "--seed", "1", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["data"]["results"]
    assert result["recipe"]["request"]["inputs"]["class_label"] == "red cube"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dit:toy",), "There is no class label"),
        (("dit:toy", "red cube", "--class-label", "1"), "said twice"),
        (("dit:toy", "--prompt", "red cube"), "dit takes no option 'prompt'"),
        (("dit:toy", "red cube", "--size", "64"), "dit takes no option"),
        (("pixart-sigma:toy", "a cube", "--class-label", "1"), "takes no option 'class_label'"),
    ],
)
def test_options_of_the_other_kind_are_refused_by_name(arguments, words, capsys):
    assert cli.execute(["run", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("place", "model"), [("dit", "dit:toy"), ("pixart-sigma", "pixart-sigma:toy")])
def test_another_family_in_the_place_of_weights_is_told_before_anything_else(
    place, model, installed_dit, tiny_dit_folder, tiny_toy_folder, capsys
):
    (installed_dit / "toy" / place).unlink()
    (installed_dit / "toy" / place).symlink_to({"dit": tiny_toy_folder}.get(place, tiny_dit_folder))
    assert cli.execute(["run", model, "red cube"]) == 4
    said = capsys.readouterr().err
    assert "holds a" in said and "Another checkpoint lies in this folder" in said
    assert cli.execute(["list"]) == 0


def test_classes_that_cannot_be_read_are_told(installed_dit, tiny_dit_folder, capsys):
    import shutil

    (installed_dit / "toy" / "dit").unlink()
    folder = shutil.copytree(tiny_dit_folder, installed_dit / "toy" / "dit")
    (folder / "transformer" / "config.json").write_text("{}")
    assert cli.execute(["run", "dit:toy", "red cube"]) == 2
    assert "do not say which classes they know" in capsys.readouterr().err


def test_show_and_list_tell_of_its_classes(capsys):
    assert cli.execute(["show", "dit:toy"]) == 0
    assert "4 classes" in capsys.readouterr().out
    assert cli.execute(["show", "dit:toy", "--json"]) == 0
    inputs = json.loads(capsys.readouterr().out)["data"]["inputs"]
    assert inputs[0]["choices"][0] == "red cube, crimson box"


def test_a_repeated_picture_has_the_same_pixels(capsys):
    assert cli.execute(["run", "dit:toy", "blue ball", "--steps", "2", "--seed", "9"]) == 0
    first = capsys.readouterr().out.strip()
    assert cli.execute(["run", "--repeat", first]) == 0
    again = capsys.readouterr().out.strip()
    assert first != again
    with Image.open(first) as one, Image.open(again) as other:
        assert one.tobytes() == other.tobytes()
