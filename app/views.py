"""Pieces of the page as HTML: pure functions from results, recipes and events to text. All input is escaped.

Attributes that the page's script turns into events: `data-show` and `data-use` hold the id of a result.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

from gen.catalog import Model, choose, find
from gen.errors import GenError
from gen.library import Entry
from gen.request import Event, value_words

if TYPE_CHECKING:
    from PIL.Image import Image

STAGE_WORDS = {
    "": "Waiting for the job before this one",
    "loading": "Loading the model",
    "encoding": "Reading the prompt",
    "denoising": "Drawing",
    "decoding": "Developing the {noun}",
    "saving": "Saving",
}
LONGER_SIDE = 448  # CSS pixels of a picture on the stage
FRAME = """<svg width="52" height="52" viewBox="0 0 24 24" fill="none" stroke="currentColor"
stroke-width="1.2" aria-hidden="true"><rect x="3" y="3" width="18" height="18" rx="3"/>
<circle cx="9" cy="9" r="1.8"/><path d="m4 18 5-5 3.5 3.5L16 13l4 4"/></svg>"""


def masthead() -> str:
    """The head of the page, with the button for dark mode."""
    return (
        '<header class="masthead"><h1>Gen Studio</h1><p>Pictures and shapes from diffusion transformers, '
        'made on this machine</p><button type="button" id="theme" class="plain-button" aria-pressed="false">'
        "Dark mode</button></header>"
    )


def badge() -> str:
    """The mark of toy weights."""
    return '<span class="badge" title="Made with small weights trained on simple shapes">TOY</span>'


def message(error: Mapping[str, str]) -> str:
    """What went wrong and what now. Takes GenError.to_json(); being stopped on request is no fault."""
    manner, role = ("calm", "status") if error["code"] == "cancelled" else ("bad", "alert")
    words = f"<p><strong>{escape(error['message'])}</strong></p>"
    if error["hint"]:
        words += f"<p>{escape(error['hint'])}</p>"
    return f'<div class="message {manner}" role="{role}">{words}</div>'


def notes(some: Iterable[str]) -> str:
    """What the engine decided or noticed on the way."""
    return (
        f'<div class="message calm" role="status">{"".join(f"<p>{escape(note)}</p>" for note in some)}</div>'
    )


# ------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How far a job has come, as its events tell it."""

    stage: str = ""
    index: int = 0
    count: int = 0
    image: int = 0  # from 0
    images: int = 1
    eta_seconds: float | None = None
    preview: str = ""  # a data: URL
    preview_size: tuple[int, int] = (0, 0)  # width, height in pixels
    notes: tuple[str, ...] = ()
    noun: str = "picture"  # what is being made

    def after(self, event: Event) -> "Drawing":
        """The state after one more event."""
        if event.kind == "stage":
            restart = {"index": 0} if event.stage in ("encoding", "loading") else {}
            return replace(self, stage=event.stage, image=event.image, images=event.images, **restart)
        if event.kind == "step":
            state = replace(
                self,
                stage="denoising",
                index=event.index,
                count=event.count,
                image=event.image,
                images=event.images,
                eta_seconds=event.eta_seconds,
            )
            if event.preview is None:
                return state
            return replace(state, preview=data_url(event.preview), preview_size=event.preview.size)
        if event.kind == "note":
            return replace(self, notes=(*self.notes, event.note))
        return self

    @property
    def part(self) -> float | None:
        """How much of the whole job is done, 0 to 1; None before the first step."""
        if not self.count:
            return None
        return min(1.0, (self.image + self.index / self.count) / self.images)


def drawing(state: Drawing) -> str:
    """The stage while a picture is being drawn."""
    words = STAGE_WORDS[state.stage].format(noun=state.noun)
    if state.images > 1:
        words += f", {state.noun} {state.image + 1} of {state.images}"
    numbers = f"step {state.index}/{state.count}" if state.count else ""
    if state.eta_seconds is not None:
        numbers += f" · {duration(state.eta_seconds)} left"
    picture = ""
    if state.preview:
        image = f'<img src="{state.preview}" alt="Preview of the unfinished {state.noun}">'
        picture = f'<div class="frame" style="{shown_at(*state.preview_size)}">{image}</div>'
    if state.part is None:
        track, value = '<div class="fill unknown"></div>', ""
    else:
        percent = round(100 * state.part)
        track, value = f'<div class="fill" style="width:{percent}%"></div>', f'aria-valuenow="{percent}"'
    notes = "".join(f'<p class="hint-line">{escape(note)}</p>' for note in state.notes)
    return (
        f'<div class="stage" aria-busy="true">{picture}<div class="progress">'
        f'<p class="words"><span>{words}</span><span>{numbers}</span></p>'
        f'<div class="track" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'{value} aria-valuetext="{words} {numbers}">{track}</div>{notes}</div></div>'
    )


def edges(picture: "Image") -> str:
    """The edges that steer a drawing, as they are found."""
    return (
        f'<figure class="edges"><img src="{data_url(picture)}" alt="Edges found in the control image">'
        "<figcaption>What the drawing will follow</figcaption></figure>"
    )


def data_url(picture: "Image") -> str:
    """A small picture as a URL that needs no request."""
    with io.BytesIO() as buffer:
        picture.convert("RGB").save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def duration(seconds: float) -> str:
    """`4 s`, `2 min 5 s`, `1 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shown_at(width: int, height: int) -> str:
    """The style of a frame: previews and pictures are all seen at one size, or as wide as fits."""
    return f"width:min(100%,{round(width * LONGER_SIDE / max(width, height))}px)"


# ------------------------------------------------------------------------------------------------- results


def empty(words: str) -> str:
    """The stage when there is nothing on it."""
    return f'<div class="stage"><div class="empty">{FRAME}{escape(words)}</div></div>'


def picture(entry: Entry) -> str:
    """One image on the stage, with what can be done with it, and its recipe."""
    url = f"/files/{escape(entry.id)}"
    words = escape(entry.prompt)
    caption = f"{badge()} {words}" if entry.toy else words
    size = shown_at(entry.width, entry.height)
    return (
        f'<div class="stage"><figure><a class="frame" style="{size}" href="{url}" target="_blank" '
        f'title="Open at full size"><img class="result" src="{url}" alt="{words}" width="{entry.width}" '
        f'height="{entry.height}"></a><figcaption>{caption}</figcaption></figure><div class="actions">'
        f'<a class="plain-button primary" href="{url}" download="{escape(entry.path.name)}">Download</a>'
        f'<button type="button" class="plain-button" data-use="{escape(entry.id)}">Use this recipe</button>'
        f"</div></div>{recipe(entry)}"
    )


def cloud(entry: Entry) -> str:
    """A cloud of points that can be turned, its files, and its recipe; without scripts its picture."""
    address, words = f"/files/{escape(entry.id)}", escape(entry.prompt)
    caption = f"{badge()} {words}" if entry.toy else words
    sheet = f'<img src="{address}/png" alt="{words}, from all sides" width="{entry.width}" '
    sheet += f'height="{entry.height}">'
    seen = sheet
    if "ply" in entry.paths:
        seen = (
            f'<cloud-viewer src="{address}/ply" label="{words}: a cloud of points. Drag, or use the arrow '
            f'keys, to turn it; plus and minus to come closer">{sheet}</cloud-viewer>'
        )
    film = ""
    if "mp4" in entry.paths:
        film = (
            f'<video class="film" src="{address}/mp4" controls loop muted playsinline preload="metadata" '
            f'aria-label="Film of {words} on a turntable"></video>'
        )
    links = "".join(
        f'<a class="plain-button{"" if number else " primary"}" href="{address}/{escape(kind)}" '
        f'download="{escape(path.name)}" title="{escape(FILE_WORDS.get(kind, kind))}">'
        f"{'Download ' if not number else ''}{escape(kind.upper() if kind != 'mesh' else 'Mesh')}</a>"
        for number, (kind, path) in enumerate(entry.paths.items())
    )
    return (
        f'<div class="stage"><figure>{seen}{film}<figcaption>{caption}</figcaption></figure>'
        f'<div class="actions">{links}<button type="button" class="plain-button" '
        f'data-use="{escape(entry.id)}">Use this recipe</button></div></div>{recipe(entry)}'
    )


FILE_WORDS = {
    "glb": "Points, for viewers of three dimensions",
    "mesh": "A closed surface as GLB, for printing and modelling",
    "ply": "Points with colours, for programs that measure and edit clouds",
    "obj": "Points with colours, as text",
    "png": "A picture from all sides",
    "mp4": "A film of one turn",
}
# What is shown for a result of each kind a model can make (Model.makes).
RESULT_VIEWS: dict[str, Callable[[Entry], str]] = {"image": picture, "cloud": cloud}


def result(entry: Entry) -> str:
    """One result, looked at in the way of its kind. Raises unknown_model when its row is gone."""
    row, _ = find(entry.model)
    return RESULT_VIEWS[row.makes](entry)


def recipe(entry: Entry) -> str:
    """Everything that made a result: as a table to read, and as it stands in the file."""
    inputs = entry.request["inputs"]
    row, _ = find(entry.model)
    labels = {one.name: one.label for one in row.inputs}
    idle = {one.name for one in row.inputs if one.only_with and inputs.get(one.only_with) is None}
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created))
    facts = {
        "Model": f"{escape(entry.model)}:{escape(entry.weights)}" + (f" {badge()}" if entry.toy else ""),
        **{
            labels.get(name, name): escape(str(value_words(value)))
            for name, value in inputs.items()
            if value not in ("", None) and name not in idle
        },
        "Seed": str(entry.seed),
        "Weights": f"<code>{escape(entry.fingerprint)}</code>",
        "Made": f"{made}, in {entry.seconds:.1f} s",
        "File": escape(entry.path.name),
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>' for name, value in facts.items()
    )
    raw = escape(json.dumps(entry.recipe, indent=2, ensure_ascii=False))
    return (
        '<section class="recipe" aria-label="Recipe"><details open><summary>Recipe</summary>'
        f"<table>{rows}</table></details><details><summary>Recipe as JSON</summary>"
        f'<pre tabindex="0">{raw}</pre></details></section>'
    )


def tiles(entries: Iterable[Entry], *, words: bool = True) -> str:
    """Small pictures to choose from, with or without the words of their prompts."""
    return '<ul class="tiles">' + "".join(tile(entry, words) for entry in entries) + "</ul>"


def nothing(words: str) -> str:
    """Said where there are no tiles."""
    return f'<p class="hint-line">{escape(words)}</p>'


def tile(entry: Entry, words: bool) -> str:
    """One small picture, a button that puts it on the stage."""
    prompt = escape(entry.prompt)
    below = f'<span class="words" aria-hidden="true">{prompt}</span>' if words else ""
    image = f'<img src="{thumbnail(entry)}" alt="" loading="lazy" decoding="async" width="{entry.width}" '
    image += f'height="{entry.height}">'
    if entry.width == 2 * entry.height and len(entry.paths) > 1:  # views from all sides: the first of them
        image = f'<span class="first-view">{image}</span>'
    return (
        f'<li><button type="button" class="tile" data-show="{escape(entry.id)}" title="{prompt}" '
        f'aria-label="Show: {prompt}, seed {entry.seed}" aria-current="false">'
        f"{image}{badge() if entry.toy else ''}{below}</button></li>"
    )


def thumbnail(entry: Entry) -> str:
    """The address of the picture that stands for a result."""
    return f"/files/{escape(entry.id)}" + ("/png" if len(entry.paths) > 1 else "")


def about(row: Model, tag: str) -> str:
    """A line or two on the chosen model and its weights, and how to get them when they are not here."""
    facts = row.checkpoint(tag)
    mark = f"{badge()} " if facts.is_toy else ""
    words = f'<p class="about">{mark}{escape(facts.summary)}. Licence: {escape(facts.licence)}.</p>'
    try:
        choose(row, tag)
    except GenError as error:
        return words + message(error.to_json())
    return words
