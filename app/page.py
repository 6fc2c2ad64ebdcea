"""The page: a form made from the catalog rows, the drawing as it comes, the result, and the history.

Generate only submits. Gradio takes a closed tab for the end of an event, so a picture drawn inside one would
die with its tab. Here an event watches a job of gen.jobs; whoever opens the page finds a running one again.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app import controls, look, views
from gen import image_inputs, jobs, library, pictures
from gen.catalog import MODELS, Model, choose, find, installed
from gen.errors import GenError
from gen.outputs import OUTPUTS
from gen.request import Event, Input, Request

# Prompts to start from, by what a model makes; classes have a list of their own.
EXAMPLES = {
    "image": (
        "a shiny red cube",
        "a white pyramid on a dark ground",
        "a green cone left of a purple torus",
        "a yellow ball on a blue box",
    ),
    "cloud": (),
}
EMPTY = "Say what to draw and press Generate. What you make appears here."
PAGE_OF_HISTORY = 24
SECONDS_BETWEEN_UPDATES = 0.1  # of a drawing: quick models would flood the browser, which then lags behind

# A click on something that carries data-show or data-use becomes a Gradio event that carries the same.
CLICKS = """
element.addEventListener("click", (event) => {
  const target = event.target.closest("[data-show], [data-use]");
  if (!target) return;
  const { show, use } = target.dataset;
  if (show) document.querySelectorAll(".tile").forEach(
    (tile) => tile.setAttribute("aria-current", tile.dataset.show === show));
  trigger("click", { show, use });
});
"""
SCROLL = "() => document.getElementById('{}').scrollIntoView({{ block: 'start', behavior: 'smooth' }})"
SHOW_RESULT, SHOW_FORM = SCROLL.format("result"), SCROLL.format("form")
# On a phone the result is below the form, out of sight.
SHOW_RESULT_BELOW = f"() => innerWidth < 700 && ({SHOW_RESULT})()"

Updates = dict[Any, Any]  # component -> its new value or gr.update


@dataclass(frozen=True)
class Form:
    """The widgets of one catalog row, in the order of its inputs."""

    row: Model
    group: gr.Column
    widgets: tuple[gr.components.Component, ...]
    edges: gr.HTML | None = None  # what steers the drawing, for rows with a control image

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return [one.name for one in self.row.inputs]

    def widget(self, name: str) -> gr.components.Component:
        """The widget of the input with this name."""
        return self.widgets[self.names.index(name)]


class Page:
    """The components of one page, and what happens to them."""

    def __init__(self) -> None:
        with gr.Blocks(
            title="Gen Studio", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True
        ) as self.blocks:
            gr.HTML(views.masthead(), apply_default_css=False, js_on_load=look.READY)
            with gr.Row(elem_classes="studio", equal_height=False):
                with gr.Column(scale=5, min_width=300, elem_classes="card", elem_id="form"):
                    self.lay_out_form()
                with gr.Column(scale=7, min_width=300, elem_classes="card", elem_id="result"):
                    self.drawing = gr.HTML(visible=False, apply_default_css=False)
                    self.shown = gr.HTML(views.empty(EMPTY), apply_default_css=False, js_on_load=CLICKS)
                    self.batch = gr.HTML(visible=False, apply_default_css=False, js_on_load=CLICKS)
            with gr.Column(elem_classes="card", elem_id="history"):
                self.lay_out_history()
            self.job = gr.State("")
            self.connect()
        self.blocks.queue(default_concurrency_limit=None)  # every open tab may watch; only the worker works

    # -------------------------------------------------------------------------------------- what there is

    def lay_out_form(self) -> None:
        first = default_reference()
        self.model = gr.Dropdown(
            choices(), value=first, label="Model", elem_id="model", filterable=False, interactive=True
        )
        self.about = gr.HTML(views.about(*exactly(first)), apply_default_css=False)
        self.forms = {row.name: self.lay_out_inputs(row, first) for row in MODELS.values()}
        with gr.Row(elem_classes="pair"):
            self.go = gr.Button(
                "Generate", variant="primary", size="lg", elem_classes="generate", elem_id="go"
            )
            self.stop = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop")
        self.message = gr.HTML(visible=False, apply_default_css=False, elem_id="message")
        gr.HTML(
            '<p class="hint-line"><kbd>Ctrl</kbd> + <kbd>Enter</kbd> generates</p>', apply_default_css=False
        )

    def lay_out_inputs(self, row: Model, first: str) -> Form:
        """One form: a widget for each input of the row, two to a line unless they are text."""
        chosen, tag = exactly(first)
        inputs = row.inputs_for(tag if chosen is row else best(row))
        made: dict[str, gr.components.Component] = {}
        edges: gr.HTML | None = None

        def lay_out(some: list[Input]) -> None:
            for line in in_lines(some):
                if len(line) == 1:
                    made[line[0].name] = controls.widget(line[0], row.name)
                    if line[0].name == "control_image":
                        nonlocal edges
                        edges = gr.HTML(visible=False, apply_default_css=False)
                    continue
                with gr.Row(elem_classes="pair"):
                    for one in line:
                        made[one.name] = controls.widget(one, row.name)

        with gr.Column(visible=chosen is row, elem_classes="inputs") as group:
            for one in inputs:
                if one.required:
                    made[one.name] = controls.widget(one, row.name)
                    if one.kind != "text":
                        continue
                    with gr.Row(elem_classes="chips"):
                        for example in EXAMPLES[row.makes]:
                            gr.Button(example, size="sm").click(
                                None,
                                None,
                                made[one.name],
                                js=f"() => {json.dumps(example)}",
                                api_visibility="private",
                            )
            lay_out([one for one in inputs if not one.required and not one.advanced])
            if advanced := [one for one in inputs if one.advanced]:
                with gr.Accordion("More", open=False):
                    lay_out(advanced)
        return Form(row, group, tuple(made[one.name] for one in inputs), edges)

    def lay_out_history(self) -> None:
        with gr.Row(elem_classes="beside"):
            gr.HTML('<h2 class="section-title">History</h2>', apply_default_css=False)
            self.search = gr.Textbox(
                label="Search the history",
                placeholder="Search words of the prompt, or a seed",
                show_label=False,
                max_lines=1,
                elem_id="search",
                min_width=160,
            )
        self.history = gr.HTML(apply_default_css=False, js_on_load=CLICKS)
        self.more = gr.Button("Show more", visible=False, elem_id="more")
        self.length = gr.State(PAGE_OF_HISTORY)

    # ------------------------------------------------------------------------------------- what happens

    @property
    def groups(self) -> list[gr.Column]:
        """The forms, of which one is seen."""
        return [form.group for form in self.forms.values()]

    @property
    def widgets(self) -> list[gr.components.Component]:
        """The widgets of all forms, one form after the other."""
        return [widget for form in self.forms.values() for widget in form.widgets]

    def connect(self) -> None:
        """Say which event calls what. Nothing here is for programs: they have app/api.py."""
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        stage = [self.drawing, self.shown, self.batch]
        running = [*stage, self.job, self.go, self.stop, self.message]
        past = [self.history, self.more, self.length]

        self.blocks.load(self.arrive, None, [*running, self.model], **quiet)
        self.go.click(self.generate, [self.model, *self.widgets], running, **quiet)
        # One event for all that changes the history, so that of two answers the later question's stays.
        # `change` and not `input` of the search box, which misses what is pasted.
        gr.on(
            [self.blocks.load, self.job.change, self.search.change],
            self.look_up,
            self.search,
            past,
            trigger_mode="always_last",
            **quiet,
        )
        self.go.click(None, js=SHOW_RESULT_BELOW, api_visibility="private")
        self.stop.click(self.cancel, self.job, [self.stop, self.message], **quiet)
        self.model.input(self.change_model, self.model, [self.about, *self.groups, *self.widgets], **quiet)
        for tiles in (self.history, self.batch):
            tiles.click(self.show, None, [self.shown, self.message], **quiet).then(
                None, js=SHOW_RESULT, api_visibility="private"
            )
        form = [self.model, self.about, self.message, *self.groups, *self.widgets]
        self.shown.click(self.use, None, form, **quiet).then(None, js=SHOW_FORM, api_visibility="private")
        for shape in self.forms.values():
            if shape.edges is not None:
                names = ("control_image", "control_kind", "width", "height")
                shown = [shape.widget(name) for name in names]
                gr.on(
                    [self.model.change, *(one.change for one in shown)],
                    self.preview_edges,
                    [self.model, *shown],
                    shape.edges,
                    trigger_mode="always_last",
                    **quiet,
                )
            if "mask" in shape.names:
                shown = [shape.widget(name) for name in ("image", "mask", "width", "height")]
                shown[0].upload(
                    self.show_picture,
                    [self.model, shown[0]],
                    [*shown[1:], self.message],
                    trigger_mode="always_last",
                    **quiet,
                )
                # Not more than that: a recipe that is put back changes the picture as well, and has its mask
                shown[0].change(self.leave_picture, shown[0], shown[1], **quiet)
        self.more.click(self.look_further, [self.search, self.length], past, **quiet)

    def arrive(self) -> Iterator[Updates]:
        """Somebody opens the page: weights may have come meanwhile, and a job may still be running."""
        yield {self.model: gr.update(choices=choices())}
        for job in reversed(jobs.list()):  # oldest first
            if job.state in ("queued", "running"):
                yield from self.follow(job.id)
                return

    def generate(self, reference: str, *values: Any) -> Iterator[Updates]:
        """Submit what the form says, then follow the job."""
        filled = dict(zip(self.widgets, values, strict=True))
        try:
            row, _ = find(reference)
            form = self.forms[row.name]
            job = jobs.submit(
                Request.build(
                    reference, with_mask({name: filled[form.widget(name)] for name in form.names}, row)
                )
            )
        except GenError as error:
            yield self.refused(error)
            return
        yield from self.follow(job)

    def follow(self, job: str) -> Iterator[Updates]:
        """Show a job as it goes on, until it ends or the tab is closed."""
        state = views.Drawing(noun=noun(job))
        entries: list[library.Entry] = []
        last_step = 0.0
        yield {
            self.job: job,
            self.drawing: gr.update(value=views.drawing(state), visible=True),
            self.shown: gr.update(visible=False),
            self.batch: gr.update(visible=False),
            self.message: gr.update(visible=False),
            self.go: gr.update(interactive=False, value="Drawing…"),
            self.stop: gr.update(interactive=True, value="Stop", visible=True),
        }
        for event in jobs.watch(job):
            state = state.after(event)
            if event.kind == "step":
                if time.monotonic() < last_step + SECONDS_BETWEEN_UPDATES:
                    continue
                last_step = time.monotonic()
            updates: Updates = {self.drawing: views.drawing(state)}
            if event.result is not None:
                entries.append(library.get(event.result.id))
                if state.images > 1:
                    updates[self.batch] = gr.update(value=views.tiles(entries, words=False), visible=True)
            if event.kind in ("done", "failed"):
                updates |= self.ended(event, state, entries)
            yield updates

    def ended(self, event: Event, state: views.Drawing, entries: list[library.Entry]) -> Updates:
        """What changes when a job is over, one way or the other."""
        updates: Updates = {
            self.job: "",
            self.drawing: gr.update(value="", visible=False),
            self.shown: gr.update(
                value=views.result(entries[0]) if entries else views.empty(EMPTY), visible=True
            ),
            self.go: gr.update(interactive=True, value="Generate"),
            self.stop: gr.update(visible=False),
        }
        if event.kind == "failed":
            updates[self.message] = gr.update(value=views.message(event.error), visible=True)
        elif state.notes:
            updates[self.message] = gr.update(value=views.notes(state.notes), visible=True)
        return updates

    def refused(self, error: GenError) -> Updates:
        """Tell what was wrong, beside the form and as a passing note for who has scrolled away from it."""
        gr.Warning(escape(error.message), title="That does not work")
        return {self.message: gr.update(value=views.message(error.to_json()), visible=True)}

    def cancel(self, job: str) -> Updates:
        """Ask the job to stop; `follow` sees it end."""
        if not job:  # it ended while the finger was on its way
            return {self.stop: gr.update(visible=False)}
        try:
            jobs.cancel(job)
        except GenError as error:
            return self.refused(error)
        return {self.stop: gr.update(interactive=False, value="Stopping…")}

    def change_model(self, reference: str) -> Updates:
        """Show the form of another model; other weights of the same model bring other limits."""
        row, tag = exactly(reference)
        updates: Updates = {self.about: views.about(row, tag)}
        updates |= {form.group: gr.update(visible=form.row is row) for form in self.forms.values()}
        for plain, one, widget in zip(
            row.inputs, row.inputs_for(tag), self.forms[row.name].widgets, strict=True
        ):
            if one != plain:  # the rest keeps what was typed
                updates[widget] = controls.change(one)
        return updates

    def show_picture(self, reference: str, image: Any) -> Updates:
        """A picture was chosen to start from: it is painted on, and its size is the one to draw."""
        row, tag = exactly(reference)
        form = self.forms[row.name]
        mask = form.widget("mask")
        inputs = {one.name: one for one in row.inputs_for(tag)}
        try:
            kept = inputs["image"].check(image)
            sides = image_inputs.fitted(kept, inputs)
        except GenError as error:
            return {mask: controls.on_picture(None), **self.refused(error)}
        sized = {form.widget(name): value for name, value in sides.items()}
        return {mask: controls.on_picture(kept), self.message: gr.update(visible=False), **sized}

    def leave_picture(self, image: Any) -> Any:
        """Without a picture there is nothing to paint on."""
        return controls.on_picture(None) if image is None else gr.skip()

    def preview_edges(self, reference: str, image: Any, kind: str, width: int, height: int) -> Any:
        """The edges that a control image would steer the drawing with, found without the model."""
        if image is None:
            return gr.update(value="", visible=False)
        try:
            row, tag = exactly(reference)
            inputs = {one.name: one for one in row.inputs_for(tag)}
            size = [inputs[name].check(value) for name, value in (("width", width), ("height", height))]
            kept, weights = inputs["control_image"].check(image), folder(row, tag)
            if weights is not None:
                inputs["control_kind"].check_parts(kind, weights)
            found = views.edges(pictures.edges(kept, kind, *size, weights))
        except GenError as error:
            found = views.message(error.to_json())
        return gr.update(value=found, visible=True)

    def show(self, click: gr.EventData) -> Updates:
        """Put a result of the history on the stage."""
        try:
            seen = views.result(library.get(click.show))
        except GenError as error:
            return self.refused(error)
        return {self.shown: gr.update(value=seen, visible=True)}

    def use(self, click: gr.EventData) -> Updates:
        """Put the recipe of a result back into the form."""
        try:
            request = Request.from_json(library.get(click.use).request, trusted=True)
            reference = f"{request.model}:{request.weights}"
            row, tag = exactly(reference)
            values = {**request.inputs, "seed": request.seed, "count": request.count}
            updates = self.change_model(reference) | {
                self.model: reference,
                self.message: gr.update(visible=False),
            }
            for one, widget in zip(row.inputs_for(tag), self.forms[row.name].widgets, strict=True):
                updates[widget] = controls.change(one, values[one.name])
            if "mask" in values:
                painter = self.forms[row.name].widget("mask")
                updates[painter] = controls.on_picture(values["image"], values["mask"])
        except GenError as error:
            return self.refused(error)
        return updates

    def look_up(self, words: str, length: int = PAGE_OF_HISTORY) -> Updates:
        """Show the newest results that match."""
        try:
            entries = library.search(words, limit=length + 1)
        except GenError as error:  # a damaged library must not take the page with it
            return {self.history: views.message(error.to_json()), self.more: gr.update(visible=False)}
        if entries:
            tiles = views.tiles(entries[:length])
        else:
            tiles = views.nothing("Nothing matches." if words.strip() else "What you make is kept here.")
        return {
            self.history: tiles,
            self.more: gr.update(visible=len(entries) > length),
            self.length: length,
        }

    def look_further(self, words: str, length: int) -> Updates:
        """Show one more page of the history."""
        return self.look_up(words, length + PAGE_OF_HISTORY)


def build() -> gr.Blocks:
    """Return the page, ready to be mounted into a server."""
    return Page().blocks


def exactly(reference: str) -> tuple[Model, str]:
    """The row and the tag that a reference means; without a tag the best that is here."""
    row, tag = find(reference)
    return row, tag or best(row)


def best(row: Model) -> str:
    """The tag of the best installed weights; when none are, of the last in the row, the easiest to get."""
    return [*installed(row), [*row.weights][-1]][0]


def with_mask(values: dict[str, Any], row: Model) -> dict[str, Any]:
    """What a form holds, what was painted brought to the size of the picture. Raises bad_input."""
    if values.get("mask") is None:
        return values
    if values.get("image") is None:  # paint on a picture that was taken away, and is no longer seen
        return values | {"mask": None}
    labels = {one.name: one.label for one in row.inputs}
    image = pictures.keep(values["image"], labels["image"])
    return values | {"image": image, "mask": pictures.painted_on(values["mask"], image)}


def noun(job: str) -> str:
    """What a job makes, in a word."""
    request = next((one.request for one in jobs.list() if one.id == job), None)
    return OUTPUTS[MODELS[request.model].makes if request else "image"].noun


def folder(row: Model, tag: str) -> Path | None:
    """Where the weights are, if they are here."""
    return choose(row, tag)[2] if tag in installed(row) else None


def default_reference() -> str:
    """The first model that can draw at once, or else the first."""
    row = next((row for row in MODELS.values() if installed(row)), next(iter(MODELS.values())))
    return f"{row.name}:{best(row)}"


def choices() -> list[tuple[str, str]]:
    """What the model picker offers, as (words, reference): what is installed first."""
    here, missing = [], []
    for row in MODELS.values():
        tags = installed(row)
        here += [(f"{row.name}:{tag}", f"{row.name}:{tag}") for tag in tags]
        missing += [
            (f"{row.name}:{tag} (not installed)", f"{row.name}:{tag}")
            for tag in row.weights
            if tag not in tags
        ]
    return here + missing


ALONE = {"text", "seed", "label", "image", "mask", "sides", "points"}  # kinds with a line of their own


def in_lines(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """Lines of the form: what is typed has one to itself, sliders and choices stand two by two."""
    line: list[Input] = []
    for one in inputs:
        if line and (len(line) == 2 or {one.kind, line[0].kind} & ALONE):
            yield line
            line = []
        line.append(one)
    if line:
        yield line
