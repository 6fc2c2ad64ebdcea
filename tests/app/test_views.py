"""Results, progress and recipes as HTML: complete, and never anybody's code."""

import time
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from app import look, page, views
from gen.catalog import MODELS
from gen.errors import REGISTRY
from gen.library import Entry
from gen.outputs import OUTPUTS
from gen.request import STAGES, Event

NASTY = """<script>alert("x")</script> & 'more'"""


def entry(**fields: object) -> Entry:
    request = {
        "model": "pixart-sigma",
        "weights": "toy",
        "inputs": {"prompt": "a red cube", "negative_prompt": "", "width": 128, "height": 64, "steps": 20},
        "seed": 2**63 - 1,
        "count": 1,
    }
    plain = {
        "id": "abc123",
        "created": time.time(),
        "model": "pixart-sigma",
        "weights": "toy",
        "fingerprint": "f00d",
        "seed": 2**63 - 1,
        "prompt": "a red cube",
        "path": Path("a-red-cube.png"),
        "width": 128,
        "height": 64,
        "seconds": 1.25,
        "peak_bytes": 0,
        "toy": True,
        "recipe": {"request": request, "weights": {"fingerprint": "f00d"}},
    }
    return Entry(**{**plain, **fields})


def after(*events: Event) -> views.Drawing:
    state = views.Drawing()
    for event in events:
        state = state.after(event)
    return state


def test_every_kind_of_result_has_a_view_and_examples():
    made = {row.makes for row in MODELS.values()}
    assert made == set(views.RESULT_VIEWS)
    assert made == set(page.EXAMPLES)


def test_every_stage_has_words():
    assert set(views.STAGE_WORDS) == {"", *STAGES}


@pytest.mark.parametrize("show", [views.result, views.recipe, lambda one: views.tiles([one])])
def test_nothing_in_an_entry_is_taken_for_markup(show):
    recipe = entry().recipe
    recipe["request"]["inputs"]["prompt"] = NASTY
    html = show(entry(prompt=NASTY, fingerprint=NASTY, path=Path(NASTY.replace("/", "")), recipe=recipe))
    assert "<script" not in html
    assert escape(NASTY) in html


def cloud(*kinds: str, **fields: object) -> Entry:
    request = entry().request | {"model": "dit-3d", "inputs": {"class_label": "chair", "points": 64}}
    files = {kind: f"a-chair.{kind}" for kind in kinds}
    recipe = {"request": request, "weights": {"fingerprint": "f00d"}}
    known = {
        "model": "dit-3d",
        "path": Path("a-chair.glb"),
        "prompt": "chair",
        "files": files,
        "recipe": recipe,
    }
    return entry(**{**known, **fields})


def test_a_cloud_has_a_viewer_a_picture_for_lack_of_one_and_a_button_for_each_file():
    html = views.result(cloud("glb", "mesh", "ply", "obj", "png", "mp4"))
    assert '<cloud-viewer src="/files/abc123/ply"' in html
    assert (
        '<img src="/files/abc123/png"' in html.partition("<cloud-viewer")[2].partition("</cloud-viewer>")[0]
    )
    assert '<video class="film" src="/files/abc123/mp4"' in html
    for kind in ("glb", "mesh", "ply", "obj", "png", "mp4"):
        assert f'href="/files/abc123/{kind}" download="a-chair.{kind}"' in html
    assert "badge" in html and 'data-use="abc123"' in html
    plain = views.result(cloud("glb", "ply", "obj", "png"))
    assert "<video" not in plain and "/mesh" not in plain
    assert "/files/abc123/png" in views.tile(cloud("glb", "png", width=640, height=320), words=True)


def test_nothing_in_a_cloud_is_taken_for_markup():
    html = views.result(cloud("glb", "ply", prompt=NASTY)) + views.tile(
        cloud("glb", "png", prompt=NASTY), words=True
    )
    assert "<script" not in html


def test_every_kind_of_file_is_told_in_words():
    assert set(views.FILE_WORDS) == set(OUTPUTS["cloud"].endings)


def test_a_view_of_a_sheet_is_cut_out_as_the_style_sheet_thinks():
    from gen import point_views

    assert (point_views.COLUMNS, point_views.VIEWS) == (4, 8)
    assert "width: 400%; max-width: none; aspect-ratio: 2" in look.CSS


def test_a_message_names_the_error_and_the_way_out_and_escapes_both():
    html = views.message({"code": "bad_input", "message": NASTY, "hint": "Try <b>this</b>."})
    assert "<script" not in html and "Try &lt;b&gt;" in html
    assert 'role="alert"' in html
    assert 'role="status"' in views.message({"code": "cancelled", "message": "Stopped.", "hint": ""})
    assert "cancelled" in REGISTRY


def test_the_recipe_says_everything_that_is_needed_to_do_it_again():
    html = views.recipe(entry())
    for words in ("pixart-sigma:toy", "a red cube", "128", str(2**63 - 1), "f00d", "1.2 s", "TOY"):
        assert words in html
    assert "Negative prompt" not in html.split("<pre")[0], "what was left empty is left out"


def test_the_toy_mark_is_on_toy_results_only():
    assert "badge" in views.result(entry()) and "badge" in views.tiles([entry()])
    assert "badge" not in views.result(entry(toy=False)) and "badge" not in views.tiles([entry(toy=False)])


def test_progress_counts_pictures_and_steps():
    loading = after(Event(kind="stage", stage="loading", images=2))
    assert loading.part is None
    assert "aria-valuenow" not in views.drawing(loading), "nobody knows yet how long it takes"

    half = after(
        Event(
            kind="step",
            index=5,
            count=10,
            image=1,
            images=2,
            eta_seconds=65,
            preview=Image.new("RGB", (16, 8)),
        ),
    )
    assert half.part == 0.75
    html = views.drawing(half)
    assert "picture 2 of 2" in html and "step 5/10" in html and "1 min 5 s left" in html
    assert 'aria-valuenow="75"' in html
    assert f"width:min(100%,{views.LONGER_SIDE}px)" in html, "a preview is as large as its picture will be"

    saving = half.after(Event(kind="stage", stage="saving", image=1, images=2))
    assert saving.preview == half.preview
    noted = saving.after(Event(kind="note", note=NASTY))
    assert escape(NASTY) in views.drawing(noted) and "<script" not in views.drawing(noted)


def test_the_next_picture_starts_from_its_own_first_step():
    state = after(
        Event(kind="step", index=10, count=10, image=0, images=2),
        Event(kind="stage", stage="encoding", image=1, images=2),
    )
    assert (state.index, state.part) == (0, 0.5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (3.6, "4 s"), (59.7, "1 min 0 s"), (125, "2 min 5 s"), (4200, "1 h 10 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str):
    assert views.duration(seconds) == words
