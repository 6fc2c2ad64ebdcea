"""The table that turns an Input of a catalog row into a widget of the page: one row per kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from gen.request import Input


class Control(NamedTuple):
    """How one kind of input looks on the page.

    `widget` is a Gradio component class, and `arguments(input, default)` what it is made with, apart from what
    all have in common. The same arguments change an existing widget when other weights bring other limits.
    """

    widget: type[gr.components.Component]
    arguments: Callable[[Input, Any], dict[str, Any]]


def _text(of: Input, value: Any) -> dict[str, Any]:
    lines = 3 if of.required else 1
    return {"value": value or "", "lines": lines, "max_lines": 10, "placeholder": of.help.capitalize()}


def _slider(of: Input, value: Any) -> dict[str, Any]:
    return {"value": value, "minimum": of.minimum, "maximum": of.maximum, "step": of.step}


def _choice(of: Input, value: Any) -> dict[str, Any]:
    return {"value": value, "choices": [*(of.choices or ())]}


def _seed(of: Input, value: Any) -> dict[str, Any]:
    # Text, because seeds go up to 2**63 and a number in the browser is exact only up to 2**53.
    return {"value": "" if value is None else str(value), "max_lines": 1, "placeholder": "random"}


CONTROLS: dict[str, Control] = {
    "text": Control(gr.Textbox, _text),
    "integer": Control(gr.Slider, _slider),
    "number": Control(gr.Slider, _slider),
    "size": Control(gr.Slider, _slider),
    "choice": Control(gr.Dropdown, _choice),
    "seed": Control(gr.Textbox, _seed),
}


def widget(of: Input, model: str) -> gr.components.Component:
    """Make the widget of one of a model's inputs, with its label as the name that screen readers say."""
    control = CONTROLS[of.kind]
    common: dict[str, Any] = {"label": of.label, "elem_id": f"{model}-{of.name}"}
    if of.kind != "text":  # a text box says it as its placeholder
        common["info"] = of.help[:1].upper() + of.help[1:]
    return control.widget(**common, **control.arguments(of, of.default))


def change(of: Input, value: Any = None) -> dict[str, Any]:
    """Return the Gradio update that gives an existing widget this input's limits and `value` (None: its default)."""
    return gr.update(**CONTROLS[of.kind].arguments(of, of.default if value is None else value))
