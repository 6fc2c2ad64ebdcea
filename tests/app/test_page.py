"""What the page does with more than one model, a damaged library, and a job that fails."""

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import gradio as gr
import pytest

from app.page import Page
from gen import jobs, library
from gen.catalog import MODELS
from gen.request import Request


@pytest.fixture
def two_models(monkeypatch: pytest.MonkeyPatch) -> Page:
    """A catalog with a second row that takes one input less and hides another."""
    row = MODELS["pixart-sigma"]
    fewer = tuple(
        replace(one, advanced=one.name == "steps") for one in row.inputs if one.name != "negative_prompt"
    )
    monkeypatch.setitem(MODELS, "sketch", replace(row, name="sketch", inputs=fewer))
    return Page()


def test_each_row_gets_a_form_of_its_own_and_one_is_seen(two_models: Page):
    forms = two_models.forms
    assert [form.group.visible for form in forms.values()] == [True, *[False] * len(MODELS)][: len(MODELS)]
    assert [widget.label for widget in forms["sketch"].widgets] == [
        one.label for one in MODELS["sketch"].inputs
    ]
    assert len({widget.elem_id for widget in two_models.widgets}) == len(two_models.widgets)
    updates = two_models.change_model("sketch:toy")
    assert [updates[form.group]["visible"] for form in forms.values()] == [False] * (len(MODELS) - 1) + [True]
    assert "sketch:toy" in {reference for _, reference in two_models.model.choices}


def test_what_a_row_calls_advanced_is_folded_away(two_models: Page):
    def folded(name: str) -> bool:
        row = MODELS[name]
        (steps,) = (
            widget
            for one, widget in zip(row.inputs, two_models.forms[name].widgets, strict=True)
            if one.name == "steps"
        )
        above = steps.parent
        while above is not None and not isinstance(above, gr.Accordion):
            above = above.parent
        return above is not None

    assert folded("sketch") and not folded("pixart-sigma")


@pytest.mark.filterwarnings("ignore:Prompt is empty")  # outside a browser Gradio says it as a warning
def test_generate_reads_the_form_of_the_chosen_model_only(two_models: Page):
    values = [widget.value for widget in two_models.widgets]
    values[two_models.widgets.index(two_models.forms["pixart-sigma"].widgets[0])] = "said in the other form"
    (refused,) = two_models.generate("sketch:toy", *values)
    assert "Prompt is empty" in refused[two_models.message]["value"]


def test_a_damaged_library_is_told_where_the_history_would_be():
    library.home().mkdir(parents=True)
    (library.home() / "library.sqlite3").write_bytes(
        b"not a database, but long enough to be read as one" * 50
    )
    page = Page()
    assert "damaged" in page.look_up("")[page.history]


@pytest.mark.filterwarnings("ignore:No picture")
def test_a_result_that_is_gone_is_told_and_not_shown():
    page = Page()
    updates = page.show(SimpleNamespace(show="nobody"))
    assert set(updates) == {page.message}
    assert "nobody" in updates[page.message]["value"]
    assert set(page.use(SimpleNamespace(use="nobody"))) == {page.message}


def test_a_job_that_fails_ends_with_its_message_and_a_form_that_works_again():
    page = Page()
    inputs = {
        "prompt": "a cube",
        "negative_prompt": "",
        "width": 1024,
        "height": 1024,
        "steps": 1,
        "guidance": 1.0,
    }
    missing = Request(model="pixart-sigma", weights="1024", inputs=MappingProxyType(inputs), seed=0)
    first, *_, last = page.follow(jobs.submit(missing))
    assert first[page.stop]["visible"] and not first[page.go]["interactive"]
    assert "not on this machine" in last[page.message]["value"]
    assert last[page.go]["interactive"] and not last[page.stop]["visible"]
    assert last[page.job] == ""
    assert library.search() == []
