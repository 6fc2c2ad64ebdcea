import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from gen import catalog
from gen.errors import GenError
from gen.request import SEED_LIMIT, TEXT_LIMIT, Event, Input, Request, Settings

pytestmark = pytest.mark.usefixtures("installed")


def build(**values) -> Request:
    return Request.build("pixart-sigma:toy", {"prompt": "a red cube"} | values)


def test_a_request_is_complete_after_building():
    request = build()
    assert (request.model, request.weights, request.count) == ("pixart-sigma", "toy", 1)
    assert dict(request.inputs) == {
        "prompt": "a red cube",
        "negative_prompt": "",
        "width": 128,
        "height": 128,
        "steps": 20,
        "guidance": 4.5,
        "scheduler": "default",
        "null_caption": "own",
        "style": "none",
        "long_prompt": "cut",
        "prompt_syntax": "on",
        **dict.fromkeys(("image", "mask", "mask_padding", "outpaint", "hires", "hires_steps", "hires_tile")),
        "strength": 0.6,
        "mask_blur": 4,
        "hires_strength": 0.3,
        "hires_upscale": "pixels",
        "lora": None,
        "lora_scale": 1.0,
    }
    assert 0 <= request.seed < 2**32


def test_a_request_cannot_be_changed():
    request = build()
    with pytest.raises(FrozenInstanceError):
        request.seed = 1
    with pytest.raises(TypeError):
        request.inputs["steps"] = 1


def test_seeds_are_drawn_anew_and_count_up_and_wrap():
    assert build().seed != build().seed
    assert build(seed=5, count=3).seeds == [5, 6, 7]
    assert build(seed=SEED_LIMIT - 1, count=2).seeds == [SEED_LIMIT - 1, 0]


def test_arguments_come_before_values():
    assert Request.build("pixart-sigma", {"prompt": "x", "seed": 1, "count": 2}, seed=0, count=3).seeds == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("name", "value", "normal"),
    [
        ("steps", "7", 7),
        ("steps", 7.0, 7),
        ("guidance", "3", 3.0),
        ("guidance", 3, 3.0),
        ("width", "64", 64),
        ("seed", str(SEED_LIMIT - 1), SEED_LIMIT - 1),
        ("seed", 12.0, 12),
        ("prompt", "  a red cube\n", "a red cube"),
        ("negative_prompt", "", ""),
        ("steps", None, 20),
        ("steps", "", 20),
        ("prompt", "ein würfel 🧊 👩‍👧 مكعب أحمر", "ein würfel 🧊 👩‍👧 مكعب أحمر"),
    ],
)
def test_values_come_in_many_forms_and_leave_in_one(name, value, normal):
    request = build(**{name: value})
    found = request.seed if name == "seed" else request.inputs[name]
    assert (found, type(found)) == (normal, type(normal))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prompt", "", "empty"),
        ("prompt", " \n\t ", "empty"),
        ("prompt", None, "missing"),
        ("prompt", 3, "must be text"),
        ("prompt", "x" * 10_000, "10,000 characters"),
        ("prompt", "a\0b", "U+0000"),
        ("prompt", "a\udcffb", "U+DCFF"),
        ("negative_prompt", "x" * (TEXT_LIMIT + 1), "characters"),
        ("width", 0, "too small"),
        ("width", -16, "too small"),
        ("width", 100, "not a multiple of 16"),
        ("height", 10**9, "too large"),
        ("height", 10**400, "too large"),
        ("height", "tall", "whole number"),
        ("width", "64.5", "whole number"),
        ("steps", 0, "too small"),
        ("steps", 10**6, "too large"),
        ("steps", 2.5, "whole number"),
        ("steps", True, "whole number"),
        ("steps", [1], "whole number"),
        ("steps", float("inf"), "whole number"),
        ("guidance", float("nan"), "finite"),
        ("guidance", "nan", "finite"),
        ("guidance", "-inf", "finite"),
        ("guidance", 0.5, "too small"),
        ("guidance", 1e9, "too large"),
        ("guidance", "much", "must be a number"),
        ("guidance", True, "must be a number"),
        ("seed", -1, "out of range"),
        ("seed", SEED_LIMIT, "out of range"),
        ("seed", "lucky", "whole number"),
        ("seed", 1.5, "whole number"),
        ("seed", "9" * 5000, "whole number"),
        ("count", 0, "too small"),
        ("count", 1000, "too large"),
    ],
)
def test_bad_values_are_refused_with_what_why_and_what_now(name, value, words):
    with pytest.raises(GenError) as caught:
        build(**{name: value})
    error = caught.value
    assert error.code == "bad_input"
    assert words in error.message
    assert error.hint
    assert len(error.message) < 250  # whatever was sent is not poured out again


def test_a_size_between_two_is_told_both_neighbours():
    with pytest.raises(GenError) as caught:
        build(width=100)
    assert caught.value.hint == "Try 96 or 112."


def test_a_choice_suggests_the_nearest():
    choice = Input(
        name="c", kind="choice", label="Sampler", help="h", argument="c", choices=("euler", "heun")
    )
    assert choice.check("heun") == "heun"
    with pytest.raises(GenError) as caught:
        choice.check("eulr")
    assert caught.value.hint == "Did you mean euler, heun?"


def test_a_required_number_cannot_be_left_out():
    with pytest.raises(GenError, match="missing"):
        replace(catalog.STEPS, required=True).check(None)


def test_json_there_and_back_is_the_same_request():
    request = build(seed=3, count=2, guidance=2, width=64)
    sent = json.loads(json.dumps(request.to_json()))
    assert Request.from_json(sent) == request


@pytest.mark.parametrize(
    "sent",
    [
        None,
        [],
        "pixart-sigma",
        {},
        {"model": 3},
        {"model": "pixart-sigma", "inputs": []},
        {"model": "pixart-sigma", "inputs": {"prompt": "x"}, "sede": 1},
        {"model": "pixart-sigma", "inputs": {"prompt": "x"}, "weights": 5},
        {"model": "pixart-sigma", "inputs": {"prompt": "x"}, "seed": "one"},
        {"model": "pixart-sigma", "inputs": {"prompt": ["x"]}},
        {"model": "pixart-sigma", "inputs": {"prompt": "x", 5: 1}},
        {"model": "pixart-sigma:toy", "weights": "toy", "inputs": {"prompt": "x"}},
    ],
)
def test_json_from_strangers_is_refused_and_never_trips(sent):
    with pytest.raises(GenError) as caught:
        Request.from_json(sent)
    assert caught.value.exit_code == 2


def test_the_schema_of_an_input_is_plain_json():
    row = catalog.MODELS["pixart-sigma"]
    schema = {one.name: one.to_json() for one in row.inputs_for("toy")}
    assert json.loads(json.dumps(schema))["width"] == {
        "name": "width",
        "kind": "size",
        "label": "Width",
        "help": "pixels, default the weights' own size",
        "default": 128,
        "minimum": 64,
        "maximum": 256,
        "step": 16,
        "required": False,
        "advanced": False,
    }
    assert "argument" not in schema["steps"]


def test_an_event_tells_only_what_matters_to_its_kind():
    step = Event(kind="step", index=3, count=20, eta_seconds=1.23456)
    assert step.to_json() == {
        "event": "step",
        "index": 3,
        "count": 20,
        "image": 0,
        "images": 1,
        "eta_seconds": 1.23,
    }
    assert Event(kind="note", note="hear").to_json() == {"event": "note", "note": "hear"}
    assert {field.name for field in fields(Event)} >= {
        "kind",
        "stage",
        "preview",
        "result",
        "results",
        "error",
    }


@pytest.mark.parametrize(
    "together",
    [
        {"compile": True, "exact": "plain"},
        {"quantize": "int8", "exact": "plain"},
        {"quantize": "int8", "compile": True},
        {"saver": "nap=3"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(together: dict) -> None:
    with pytest.raises(GenError) as refused:
        Settings(**together)
    assert refused.value.code == "bad_input"
