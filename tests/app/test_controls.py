"""Every kind of input has a widget, and the widget takes and gives back what the input allows."""

from dataclasses import replace

import gradio as gr
import pytest

from app import controls, page
from gen.catalog import MODELS
from gen.request import CHECKS, Input

INPUTS = [
    pytest.param(one, id=f"{row.name}:{tag}-{one.name}")
    for row in MODELS.values()
    for tag in row.weights
    for one in row.inputs_for(tag)
]


def test_the_table_holds_exactly_the_kinds_that_requests_know():
    assert set(controls.CONTROLS) == set(CHECKS)


@pytest.mark.parametrize("one", INPUTS)
def test_an_input_becomes_a_widget_with_its_name_default_and_limits(one: Input):
    with gr.Blocks():
        widget = controls.widget(one, "some-model")
    assert widget.label == one.label
    assert widget.elem_id == f"some-model-{one.name}"
    if isinstance(widget, gr.Slider):
        assert (widget.minimum, widget.maximum, widget.step) == (one.minimum, one.maximum, one.step)
        assert None not in (one.minimum, one.maximum, one.step), "a slider needs ends"
    if not one.required:
        # Untouched, the form sends what leaving it out would mean.
        assert one.check(widget.preprocess(widget.value)) == one.check(None)


def test_a_seed_keeps_all_its_digits_on_the_way_to_the_browser_and_back():
    (seed,) = (one for one in MODELS["pixart-sigma"].inputs if one.kind == "seed")
    largest = 2**63 - 1
    change = controls.change(seed, largest)
    assert change["value"] == str(largest)
    assert seed.check(change["value"]) == largest
    assert seed.check(controls.change(seed)["value"]) is None, "empty means: draw one"


def test_a_choice_becomes_a_list_to_choose_from():
    one = Input(
        name="view",
        kind="choice",
        label="View",
        help="from where",
        argument="v",
        default="top",
        choices=("top", "side"),
    )
    with gr.Blocks():
        widget = controls.widget(one, "m")
    assert isinstance(widget, gr.Dropdown)
    assert [value for _, value in widget.choices] == ["top", "side"]
    assert widget.value == "top"
    assert widget.info == "From where"


def test_changing_the_weights_moves_the_limits_and_takes_the_new_default():
    row = MODELS["pixart-sigma"]
    (width,) = (one for one in row.inputs_for("1024") if one.name == "width")
    change = controls.change(width)
    assert (change["minimum"], change["maximum"], change["value"]) == (512, 2048, 1024)
    assert controls.change(width, 768)["value"] == 768


def test_lines_of_the_form_pair_sliders_and_leave_writing_its_width():
    lines = [[one.name for one in line] for line in page.in_lines(MODELS["pixart-sigma"].inputs)]
    assert lines == [
        ["prompt"],
        ["negative_prompt"],
        ["style", "width"],
        ["height", "steps"],
        ["guidance"],
        ["image"],
        ["strength"],
        ["mask"],
        ["seed"],
        ["count", "scheduler"],
        ["null_caption", "long_prompt"],
        ["prompt_syntax", "lora"],
        ["lora_scale", "mask_blur"],
        ["mask_padding"],
        ["outpaint"],
        ["hires", "hires_strength"],
        ["hires_steps", "hires_tile"],
        ["hires_upscale"],
    ]
    lines = [[one.name for one in line] for line in page.in_lines(MODELS["dit"].inputs)]
    assert lines == [
        ["class_label"],
        ["steps", "guidance"],
        ["seed"],
        ["count", "scheduler"],
        ["guidance_channels", "lora"],
        ["lora_scale"],
    ]


def test_classes_are_a_list_that_typing_searches():
    (one,) = (one for one in MODELS["dit"].inputs if one.kind == "label")
    one = replace(one, choices=("red cube, crimson box", "", "crane", "crane, heron"))
    with gr.Blocks():
        widget = controls.widget(one, "m")
    assert isinstance(widget, gr.Dropdown)
    assert widget.filterable
    shown = [("red cube, crimson box", "red cube"), ("1", "1"), ("crane", "2"), ("crane, heron", "3")]
    assert widget.choices == shown
    assert [one.check(value) for _, value in shown] == [value for _, value in shown]


def test_kept_points_come_back_into_the_form_under_their_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (one,) = (one for one in MODELS["dit-3d"].inputs if one.kind == "points")
    path = tmp_path / "half a chair.xyz"
    path.write_text("\n".join(f"{n} {n % 5} {n % 3}" for n in range(30)))
    reference = one.check(path)
    shown = controls.change(one, reference)["value"]
    assert shown.endswith("/half a chair.xyz")
    assert one.check(shown) == reference, "sent once more it is the same"
    assert controls.change(one)["value"] is None


def test_only_the_first_seed_says_that_it_is_random():
    first, second = (one for one in MODELS["dit-3d"].inputs if one.kind == "seed")
    assert controls.change(first)["placeholder"] == "random each time"
    assert controls.change(second)["placeholder"] == "none"
    assert "on the way" in controls.change(second)["info"]


def test_adapters_are_chosen_from_a_list_or_typed_with_a_scale_and_are_no_paths(tmp_path):
    from gen import adapters

    (one,) = (one for one in MODELS["pixart-sigma"].inputs if one.kind == "lora")
    one = replace(one, choices=("stars", "night"))
    with gr.Blocks():
        widget = controls.widget(one, "m")
    assert isinstance(widget, gr.Dropdown) and widget.multiselect and widget.allow_custom_value
    assert widget.preprocess([]) is None and widget.preprocess(None) is None
    assert widget.preprocess(["stars=0.5", "night"]) == ["stars=0.5", "night"]
    for sent in (["/etc/passwd"], ["stars", "../loras/x=1"], ["sta"]):
        with pytest.raises(gr.Error, match="There is no LoRA"):
            widget.preprocess(sent)
    assert controls.change(one, "stars")["value"] == ["stars"]
    shown = controls.change(one, ["/home/me/x=0.5", "night=1.0"])
    assert shown["value"] == ["/home/me/x=0.5", "night=1.0"]
    assert ("/home/me/x=0.5", "/home/me/x=0.5") in shown["choices"], "one's own recipe may name it"
    adapters.home().mkdir(parents=True)
    (adapters.home() / "later.safetensors").write_bytes(b"")
    assert widget.preprocess(["later"]) == ["later"]
