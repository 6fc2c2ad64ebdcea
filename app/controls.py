"""The table that turns an Input of a catalog row into a widget of the page: one row per kind."""

import os
from abc import ABCMeta
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from gen import adapters, library, pictures, point_inputs
from gen.request import Input, class_name


class Control(NamedTuple):
    """How one kind of input looks on the page.

    `widget` is a Gradio component class, and `arguments(input, value)` what it is made with beside its name.
    The same arguments change an existing widget when other weights bring other limits.
    """

    widget: type[gr.components.Component]
    arguments: Callable[[Input, Any], dict[str, Any]]


def _text(of: Input, value: Any) -> dict[str, Any]:
    lines = 3 if of.required else 1
    return {"value": value or "", "lines": lines, "max_lines": 10, "placeholder": sentence(of.help)}


def _slider(of: Input, value: Any) -> dict[str, Any]:
    return {"value": value, "minimum": of.minimum, "maximum": of.maximum, "step": of.step, "buttons": []}


def _explained_slider(of: Input, value: Any) -> dict[str, Any]:
    return _slider(of, value) | {"info": sentence(of.help)}


def _choice(of: Input, value: Any) -> dict[str, Any]:
    return {"value": value, "choices": [*(of.choices or ())], "info": sentence(of.help)}


def _label(of: Input, value: Any) -> dict[str, Any]:
    names = of.choices or ()
    offered = [(names[number] or str(number), class_name(names, number)) for number in range(len(names))]
    return {"value": value, "choices": offered, "filterable": True, "info": sentence(of.help)}


def _seed(of: Input, value: Any) -> dict[str, Any]:
    # Text, because seeds go up to 2**63 and a number in the browser is exact only up to 2**53.
    typed = {"value": "" if value is None else str(value), "max_lines": 1}
    if of.name == "seed":
        return typed | {"placeholder": "random each time"}
    return typed | {"placeholder": "none", "info": sentence(of.help)}


def _number(of: Input, value: Any) -> dict[str, Any]:
    words = {"info": sentence(of.help), "placeholder": of.default_words() or "left out"}
    return {"value": value, "minimum": of.minimum, "maximum": of.maximum, "step": of.step, **words}


def uploaded(self: gr.Image, payload: Any) -> Path | str | None:
    """The file as it came, which Gradio has made sure to lie in its folder of uploads, or a data URL."""
    if payload is None:
        return None
    return Path(payload.path) if payload.path else str(payload.url)


# gr.Image, but `gen.pictures` is the one that looks into the file. Made by hand because Gradio's metaclass
# writes a stub file beside the source of every class statement.
Upload = ABCMeta.__new__(
    type(gr.Image),
    "Upload",
    (gr.Image,),
    {"preprocess": uploaded, "is_template": True, "__module__": __name__, "__doc__": "A picture, unopened."},
)


def _image(of: Input, value: Any) -> dict[str, Any]:
    shown = pictures.read(value) if isinstance(value, dict) else None
    return {
        "value": shown,
        "format": "png",
        "sources": ["upload", "clipboard"],
        "height": 180,
        "placeholder": f"{sentence(of.help)}. Drop one here, or click",
        "buttons": [],
    }


def painted(self: gr.ImageEditor, payload: Any) -> bytes | None:
    """The layer on which was painted, as a PNG whose paint is the mask; None while it is clear."""
    if payload is None:
        return None
    if payload.id is None:  # files as they came, which Gradio has made sure to lie in its folder of uploads
        layers = [Path(layer.path).read_bytes() for layer in payload.layers]
    else:  # or what the browser sent after the last stroke
        sent = self.blob_storage.pop(payload.id, None)
        layers = [layer for layer in (sent.layers if sent else []) if layer]
    return next((layer for layer in layers if pictures.is_painted(layer)), None)


# gr.ImageEditor, but `gen.pictures` is the one that looks into what was painted. Made as Upload is.
Painter = ABCMeta.__new__(
    type(gr.ImageEditor),
    "Painter",
    (gr.ImageEditor,),
    {"preprocess": painted, "is_template": True, "__module__": __name__, "__doc__": "Painting a mask."},
)


def _mask(of: Input, value: Any) -> dict[str, Any]:
    """There is nothing to paint on until a picture is chosen: `on_picture` shows it."""
    return {
        "value": None,
        "visible": False,
        "format": "png",
        "sources": (),
        "transforms": (),
        "layers": gr.LayerOptions(allow_additional_layers=False),
        "brush": gr.Brush(default_size=BRUSH, colors=["#ffffff"], color_mode="fixed"),
        "height": 420,
        "buttons": [],
    }


def on_picture(image: dict[str, str] | None, mask: dict[str, str] | None = None) -> dict[str, Any]:
    """The Gradio update that shows a kept picture to paint on, and on it a kept mask; None: neither."""
    if image is None:  # a new value would be drawn by a canvas that is about to go
        return gr.update(visible=False)
    picture = pictures.read(image)
    scale = PAINTED_AT / max(picture.size)
    picture = picture.resize((round(picture.width * scale) or 1, round(picture.height * scale) or 1))
    layers = []
    if mask is not None:
        paint = pictures.read(mask).resize(picture.size)
        layer = paint.convert("RGBA")
        layer.putalpha(paint)
        layers = [layer]
    shown = {"background": picture, "layers": layers, "composite": picture}
    # Layers are put into the middle of the canvas as it was: it must be as large as they are
    return gr.update(value=shown, canvas_size=picture.size, visible=True)


PAINTED_AT = 768  # pixels of the longer side; what is painted is brought to the picture's own size
BRUSH = 32  # pixels of those


def _sides(of: Input, value: Any) -> dict[str, Any]:
    words = {"placeholder": "none", "info": sentence(of.help)}
    return {"value": value or "", "max_lines": 1, **words}


def _points(of: Input, value: Any) -> dict[str, Any]:
    shown = str(_named_copy(value)) if isinstance(value, dict) else None
    return {"value": shown, "height": 120, "type": "filepath"}


def _named_copy(reference: dict[str, str]) -> Path:
    """The kept file under its own name, in the folder that Gradio shows files from."""
    cache = Path(os.environ.get("GRADIO_TEMP_DIR") or library.home() / "cache" / "gradio")
    place = cache / reference["sha256"] / (reference["name"].lstrip(".") or "points")  # ".." is no name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(pictures.kept(reference, point_inputs.ENDING, "points"))
    return place


def listed(self: gr.Dropdown, payload: Any) -> list[str] | None:
    """Names of adapters, each alone or as NAME=SCALE. Whoever sees the page may name those that are offered,
    and no path."""
    offered = {*adapters.names(), *(str(value) for _, value in self.choices)}  # some may have come meanwhile
    for one in payload or ():
        if str(one) not in offered and str(one).rpartition("=")[0].strip() not in offered:
            raise gr.Error(
                f"There is no LoRA {str(one)[:60]!r} here. Choose from the list, or write NAME=SCALE.",
                title="That does not work",
            )
    return payload or None


# gr.Dropdown, into which a scale can be typed. Made as Upload is.
Adapters = ABCMeta.__new__(
    type(gr.Dropdown),
    "Adapters",
    (gr.Dropdown,),
    {"preprocess": listed, "is_template": True, "__module__": __name__, "__doc__": "Adapters by name."},
)


def _lora(of: Input, value: Any) -> dict[str, Any]:
    chosen = [value] if isinstance(value, str) else [*(value or ())]
    names = [*(of.choices or ())]
    names += [one for one in chosen if one not in names]  # as in a recipe
    return {
        "value": chosen,
        "choices": [(name, name) for name in names],
        "multiselect": True,
        "allow_custom_value": True,
        "info": sentence(of.help),
    }


CONTROLS: dict[str, Control] = {
    "text": Control(gr.Textbox, _text),
    "integer": Control(gr.Slider, _explained_slider),
    "number": Control(gr.Slider, _explained_slider),
    "size": Control(gr.Slider, _slider),  # its ends say what there is to say
    "choice": Control(gr.Dropdown, _choice),
    "label": Control(gr.Dropdown, _label),  # typing searches it
    "seed": Control(gr.Textbox, _seed),
    "image": Control(Upload, _image),
    "mask": Control(Painter, _mask),
    "sides": Control(gr.Textbox, _sides),
    "points": Control(gr.File, _points),
    "lora": Control(Adapters, _lora),
}
EMPTY = Control(gr.Number, _number)  # of numbers that may be left out: a slider always has a value


def control(of: Input) -> Control:
    """How this input looks."""
    return EMPTY if of.kind in ("integer", "number") and of.default is None else CONTROLS[of.kind]


def sentence(words: str) -> str:
    """Begin with a capital, and leave the others as they are."""
    return words[:1].upper() + words[1:]


def widget(of: Input, model: str) -> gr.components.Component:
    """Make the widget of one of a model's inputs, with its label as the name that screen readers say."""
    looks = control(of)
    named: dict[str, Any] = {"label": of.label, "elem_id": f"{model}-{of.name}"}
    if of.kind == "points":  # Gradio's widget has no place for words
        made = looks.widget(**named, **looks.arguments(of, of.default))
        gr.HTML(f'<p class="hint-line">{escape(sentence(of.help))}.</p>', apply_default_css=False)
        return made
    if of.name != "seed":
        return looks.widget(**named, **looks.arguments(of, of.default))
    with gr.Row(elem_classes="with-button"):
        made = looks.widget(**named, **looks.arguments(of, of.default))
        gr.Button("Random", scale=0, min_width=96).click(
            None, None, made, js="() => ''", api_visibility="private"
        )
    return made


def change(of: Input, value: Any = None) -> dict[str, Any]:
    """The Gradio update that gives an existing widget this input's limits and `value` (None: its default)."""
    return gr.update(**control(of).arguments(of, of.default if value is None else value))
