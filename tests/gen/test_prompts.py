"""Styles, wildcards, and what becomes of them in requests, recipes and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gen import catalog, engine, library, prompts
from gen.commands import cli
from gen.errors import GenError
from gen.request import TEXT_LIMIT, Request
from weights import store

NEW = ("style", "long_prompt", "prompt_syntax")

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def write():
    """write("colour", "red\\nblue") makes a wildcard; a name with an ending is any file of GEN_HOME."""

    def write(name: str, content: str | bytes) -> Path:
        path = store.home() / (name if "." in name else f"wildcards/{name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def build(prompt: str = "a red cube", **values) -> Request:
    return Request.build("pixart-sigma:toy", {"prompt": prompt} | values)


def drawn(request: Request) -> list[str]:
    return [one.inputs["prompt"] for one in request.each()]


def refused(prompt: str = "a red cube", **values) -> GenError:
    with pytest.raises(GenError) as caught:
        build(prompt, **values)
    assert caught.value.code == "bad_input" and caught.value.hint
    assert len(caught.value.message) < 300
    return caught.value


# --- Wildcards


def test_each_picture_picks_a_line_by_its_seed(write) -> None:
    write("colour", "# colours\nred\n\n  blue  \ngreen\n")
    request = build("a __colour__ cube", seed=1, count=24)
    found = drawn(request)
    assert {*found} == {"a red cube", "a blue cube", "a green cube"}
    assert request.inputs["prompt"] == "a __colour__ cube"
    assert drawn(request) == found
    assert drawn(build("a __colour__ cube", seed=5)) == [found[4]]  # as the single picture of its seed


def test_wildcards_pick_for_themselves(write) -> None:
    write("colour", "\n".join(f"shade{n}" for n in range(1000)))
    (text,) = drawn(build("__colour__ and __colour__", seed=3))
    first, last = text.split(" and ")
    assert first != last
    alone = build("__colour__", seed=3, negative_prompt="__colour__").each()[0]
    assert alone.inputs["prompt"] == first  # what stands behind it does not matter
    assert alone.inputs["negative_prompt"] != first


def test_lines_may_hold_wildcards(write) -> None:
    write("thing", "__colour__ cube")
    write("colour", "red")
    assert drawn(build("a __thing__, __colour__")) == ["a red cube, red"]


def test_resolving_again_changes_nothing(write) -> None:
    write("colour", "red\nblue")
    write("odd", r"\__colour__")
    alone = build(r"a __colour__ \__colour__ __odd__", seed=1, style="photo").each()[0]
    assert r"\__colour__ \__colour__" in alone.inputs["prompt"]
    assert alone.each() == [alone]
    assert Request.from_json(json.loads(json.dumps(alone.to_json()))) == alone
    assert r"__colour__ __colour__" in prompts.read_texts(alone.inputs, "prompt")[0]


def test_what_is_no_wildcard_is_text(write) -> None:
    write("colour", "red")
    for text in ("a __ b", "____", "snake_case", "__ colour__", "a_b__c"):
        assert drawn(build(text)) == [text]
    assert drawn(build("a __colour__", prompt_syntax="off")) == ["a __colour__"]


def test_own_folders_come_first(write, tmp_path, monkeypatch) -> None:
    write("colour", "red")
    write("size", "big")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "colour.txt").write_text("blue")
    monkeypatch.setenv("GEN_WILDCARDS_DIR", str(tmp_path / "more"))
    assert drawn(build("__size__ __colour__")) == ["big blue"]
    monkeypatch.setenv("GEN_WILDCARDS_DIR", str(tmp_path / "none"))
    assert "is no folder" in refused("__colour__").message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "x __a__"}, "a -> a"),
        ({"a": "1\n2\n3\n__b__", "b": "__c__", "c": "4\n__a__ 5"}, "a -> b -> c -> a"),
        ({"a": "__b__", "b": "__c__", "c": "__b__"}, "b -> c -> b"),
        ({"a": "__b__"}, "no wildcard 'b'"),
        ({"a": "# nothing\n\n"}, "holds words"),
        ({"a": b"caf\xe9"}, "not UTF-8"),
        ({"a": b"red\0"}, "U+0000"),
        ({"a": "x" * 20_000}, "more than 16,000 characters"),
        ({"a": "x" * 5000}, "Prompt has 5,007 characters"),
        ({"a": "__b__" * 40, "b": "__c__" * 40, "c": "1"}, "more than 200 lines"),
        ({"a": "(red:3)"}, "not from 0 to 2"),
        ({"a": "(red:1.3"}, "never closed"),
    ],
)
def test_bad_files_are_refused(write, files: dict[str, str | bytes], words: str) -> None:
    for name, content in files.items():
        write(name, content)
    assert words in refused("a __a__ cube").message


def test_a_loop_is_refused_even_where_it_is_not_taken(write) -> None:
    write("a", "\n".join(["red"] * 500 + ["__a__"]))
    assert "a -> a" in refused("__a__", seed=1).message


def test_unknown_names_are_told_with_those_there_are(write) -> None:
    assert "There are none in" in refused("__colour__").hint
    write("colour", "red")
    write("shape", "cube")
    assert "Did you mean colour" in refused("__colours__").hint
    assert "colour, shape" in refused("__zzz__").hint


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "secret.txt", "a/../../secret", "~/x"])
def test_a_name_is_never_a_path(write, name: str) -> None:
    write("a", "red")
    write("secret.txt", "password")
    error = refused(f"__{name}__")
    assert "no wildcard" in error.message and "password" not in error.message


def test_wildcards_bring_syntax(write) -> None:
    write("a", "(red:1.5)")
    write("b", "[cube|ball]")
    request = build("a __a__ __b__").each()[0]
    assert request.inputs["prompt"] == "a (red:1.5) [cube|ball]"
    assert prompts.read_texts(request.inputs, "prompt") == ["a red cube", "a red ball"]


# --- Styles


def test_a_style_stands_around_the_prompts() -> None:
    whole = build("a {cube}", negative_prompt="grey", style="photo")
    (alone,) = whole.each()
    style = prompts.STYLES["photo"]
    assert alone.inputs["prompt"] == style.prompt.replace("{prompt}", "a {cube}")
    assert alone.inputs["negative_prompt"] == f"grey, {style.negative_prompt}"
    assert alone.inputs["style"] == "none"
    assert prompts.asked(whole, alone) == {
        "prompt": "a {cube}",
        "negative_prompt": "grey",
        "style": "photo",
    }
    plain = build("a cube", style="photo").each()[0]
    assert plain.inputs["negative_prompt"] == style.negative_prompt


@pytest.mark.parametrize("name", prompts.STYLES)
def test_every_style_of_ours_is_plain_words(name: str) -> None:
    from pipelines.prompts import Words, read

    style = prompts.STYLES[name]
    assert style.prompt.count("{prompt}") == 1
    for text in (style.prompt, style.negative_prompt):
        assert read(text) == Words(text)
        assert not [*prompts.names(text)]


def test_own_styles_are_offered_and_may_replace_ours(write) -> None:
    write(
        "styles.json",
        json.dumps({"night": {"prompt": "{prompt} at __when__"}, "photo": {"prompt": "my {prompt}"}}),
    )
    write("when", "midnight")
    row = catalog.MODELS["pixart-sigma"]
    choices = next(one.choices for one in row.inputs_for("toy") if one.name == "style")
    assert choices[-1] == "night" and choices[0] == "none"
    assert drawn(build("a cube", style="night")) == ["a cube at midnight"]
    assert drawn(build("a cube", style="photo")) == ["my a cube"]


def test_an_unknown_style_is_refused_with_near_ones() -> None:
    error = refused(style="foto")
    assert "Style cannot be 'foto'" in error.message and "photo" in error.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("[]", "no object of names"),
        ('{"a": "x {prompt}"}', "not an object with texts"),
        ('{"a": {"prompt": "no words"}}', "must hold {prompt} once"),
        ('{"a": {"prompt": "{prompt}", "steps": "3"}}', "'steps', which no style has"),
        ('{"none": {"prompt": "{prompt}"}}', "no name for a style"),
    ],
)
def test_a_damaged_file_of_styles_is_told_to_those_who_need_it(write, content, words: str) -> None:
    path = write("styles.json", content)
    error = refused(style="a")
    assert words in error.message and str(path) in error.message
    assert words in refused(style="photo").message
    assert drawn(build("a red cube")) == ["a red cube"]
    assert "photo" in prompts.style_names()


# --- Requests


def test_plain_requests_are_as_they_were() -> None:
    (alone,) = build("a red cube", seed=1).each()
    assert dict(alone.inputs) == dict(build("a red cube", seed=1).inputs)
    assert alone.inputs["style"] == "none" and alone.inputs["long_prompt"] == "cut"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "a (red:9) cube"}, "Prompt: the weight of (red:9) at character 3 is 9"),
        ({"negative_prompt": "[a|b"}, "Negative prompt: the [ at character 1 is never closed"),
        ({"prompt": "[a|b|c] [a|b|c|d] [a|b|c|d|e]"}, "more than 16"),
        ({"prompt": "[a|b|c|d|e]", "negative_prompt": "[a|b|c|d]"}, "Prompt and Negative prompt: "),
        ({"prompt_syntax": "maybe"}, "Prompt syntax cannot be 'maybe'"),
        ({"long_prompt": "all"}, "Long prompt cannot be 'all'"),
    ],
)
def test_what_cannot_be_read_is_refused_before_weights_load(values, words: str) -> None:
    assert words in refused(**values).message


def test_brackets_are_text_when_syntax_is_off() -> None:
    assert drawn(build("a (red:9) [a|b __x__", prompt_syntax="off")) == ["a (red:9) [a|b __x__"]


def test_prompts_read_in_chunks_may_be_longer() -> None:
    text = "a red cube, " * 1000
    assert "12,000 characters" in refused(text).message or "11,999" in refused(text).message
    assert len(build(text, long_prompt="chunks").inputs["prompt"]) > TEXT_LIMIT
    assert "at most 16,000" in refused(text * 2, long_prompt="chunks").message


def test_the_rows_take_what_the_pipelines_do() -> None:
    from pipelines import prompts as syntax

    for row in catalog.MODELS.values():
        inputs = {one.name: one for one in row.inputs}
        assert ("style" in inputs) == ("prompt" in inputs)
        if "prompt" in inputs:
            assert {*inputs["prompt_syntax"].choices} == {*syntax.SYNTAX}
            assert inputs["long_prompt"].choices == syntax.LONG


def test_reading_prompts_needs_no_torch() -> None:
    code = (
        "import sys; from gen.request import Request; import gen.prompts, pipelines.prompts\n"
        "Request.build('pixart-sigma:toy', {'prompt': 'a (red:1.3) [cube|ball]', 'style': 'photo'})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Pictures


def test_the_recipe_repeats_the_picture_without_the_files(write, installed) -> None:
    write("colour", "red\nblue\ngreen")
    path = write(
        "styles.json", json.dumps({"mine": {"prompt": "{prompt} on a ring", "negative_prompt": "ball"}})
    )
    values = {"steps": 2, "width": 64, "height": 64, "seed": 1, "count": 2, "style": "mine"}
    request = Request.build("pixart-sigma:toy", values | {"prompt": "a __colour__ cube"})
    events = [*engine.run(request)]
    results = events[-1].results
    notes = [event.note for event in events if event.kind == "note"]
    for result, text in zip(results, drawn(request), strict=True):
        recipe = result.recipe
        assert recipe["request"]["inputs"]["prompt"] == text
        assert recipe["asked"] == {"prompt": "a __colour__ cube", "negative_prompt": "", "style": "mine"}
        assert f'Prompt: "{text}"' in notes
        assert library.get(result.id).prompt == text
    path.unlink()
    (store.home() / "wildcards" / "colour.txt").unlink()
    for result in results:
        (again,) = [*engine.run(Request.from_json(result.recipe["request"]))][-1].results
        assert again.path.read_bytes()[-2000:] == result.path.read_bytes()[-2000:]
        assert pixels(again.path) == pixels(result.path)
        assert "asked" not in again.recipe
    assert pixels(results[0].path) != pixels(results[1].path)


def pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_brackets_of_older_recipes_stay_text(draw) -> None:
    """They were made before brackets meant something, and name no syntax."""
    (result,) = draw("a (red:1.8) [cube|ball]", prompt_syntax="off")
    older = dict(result.recipe["request"])
    older["inputs"] = {name: value for name, value in older["inputs"].items() if name not in NEW}
    assert Request.from_json(older, trusted=True) == Request.from_json(result.recipe["request"])
    newer = {**older, "inputs": {**older["inputs"], "prompt_syntax": "on"}}
    assert Request.from_json(newer, trusted=True).inputs["prompt_syntax"] == "on"


def test_plain_recipes_say_nothing_new(draw) -> None:
    (result,) = draw("a red cube")
    assert "asked" not in result.recipe


def test_brackets_change_the_picture_and_off_does_not(draw) -> None:
    plain, weighted, one, off = (
        pixels(draw(text, prompt_syntax=syntax)[0].path)
        for text, syntax in (
            ("a red cube", "on"),
            ("a (red:1.8) cube", "on"),
            ("a (red:1) cube", "on"),
            ("a red cube", "off"),
        )
    )
    assert plain == one == off != weighted


def test_tokens_are_counted_without_brackets_and_chunks_are_told(installed, monkeypatch) -> None:
    def notes(prompt: str, **values) -> list[str]:
        request = Request.build(
            "pixart-sigma:toy", {"prompt": prompt, "steps": 1, "width": 64, "height": 64} | values
        )
        return [event.note for event in engine.run(request) if event.kind == "note"]

    assert notes("a (red:1.25) [cube|ball]") == []  # digits of weights are no unknown words
    long = "a red cube, " * 110
    assert any("Not read" in note for note in notes(long))
    assert any("is read in 2 chunks" in note for note in notes(long, long_prompt="chunks"))
    both = {"long_prompt": "chunks", "null_caption": "prompt", "negative_prompt": long}
    found = notes(long, **both)
    assert any(note.startswith("Prompt") and "2 chunks" in note for note in found)
    assert any(note.startswith("Negative prompt") and "Not read" in note for note in found)


# --- The command


def run(*words: str):
    return CliRunner().invoke(cli, ["prompts", *words], catch_exceptions=False)


def test_the_command_shows_how_a_prompt_is_read(write) -> None:
    write("colour", "red")
    shown = run("a (__colour__:1.3) [cube|ball]", "--steps", "4").stdout
    for words in (
        "Prompt: a (red:1.3) [cube|ball]",
        "steps 1, 3: a red cube",
        "steps 2, 4: a red ball",
        "1.3 x red",
    ):
        assert words in shown
    data = json.loads(run("a (__colour__:1.3) [cube|ball]", "--steps", "4", "--json").stdout)["data"]
    assert [one["text"] for one in data["prompt"]["read"]] == ["a red cube", "a red ball"]
    assert data["prompt"]["read"][0]["weights"] == [{"words": "red", "weight": 1.3}]
    assert data["prompt"]["read"][0]["tokens"] == 4
    long = run("a red cube, " * 110).stdout
    assert "parts; else the rest is cut off" in long


def test_the_command_lists_what_there_is(write) -> None:
    assert "No wildcards" in run().stdout
    write("colour", "red\nblue")
    shown = run().stdout
    assert "watercolour" in shown and "__colour__" in shown
    data = json.loads(run("--json").stdout)["data"]
    assert data["wildcards"] == {"colour": ["red", "blue"]}
    assert data["styles"]["photo"]["prompt"] == prompts.STYLES["photo"].prompt
