import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from gen import artifacts, engine, library, loader
from gen.errors import GenError
from gen.request import STAGES, Request, Settings

NETWORK = "transformer/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("installed")


def build(**values) -> Request:
    known = {"prompt": "a red cube", "steps": 3, "width": 64, "height": 96, "seed": 5}
    return Request.build("pixart-sigma:toy", known | values)


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def everything_in(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and "library.sqlite3" not in path.name}


def test_events_come_in_order_and_tell_what_was_made():
    events = [*engine.run(build(count=2))]
    kinds = [event.stage or event.kind for event in events]
    picture = ["encoding", "denoising", "step", "step", "step", "decoding", "saving", "result"]
    assert kinds == ["loading", *picture, *picture, "done"]
    assert [stage for stage in kinds if stage in STAGES][:5] == list(STAGES)
    steps = [event for event in events if event.kind == "step"]
    assert [(event.image, event.index, event.count) for event in steps] == [
        (image, index, 3) for image in (0, 1) for index in (1, 2, 3)
    ]
    assert all(event.images == 2 for event in events)
    assert "TOY" in events[0].note
    done = events[-1].results
    assert [result.seed for result in done] == [5, 6]
    assert [event.result for event in events if event.kind == "result"] == list(done)
    for result in done:
        assert (result.width, result.height) == (64, 96)
        with Image.open(result.path) as image:
            assert image.size == (64, 96)
        assert json.dumps(result.to_json())


def test_time_left_is_told_from_finished_steps_only():
    steps = [event for event in engine.run(build()) if event.kind == "step"]
    assert steps[0].eta_seconds is None
    assert steps[1].eta_seconds is not None
    assert steps[2].eta_seconds == 0


def test_previews_are_pictures_and_can_be_left_out():
    with_previews = [event.preview for event in engine.run(build()) if event.kind == "step"]
    assert all(isinstance(preview, Image.Image) for preview in with_previews)
    without = [
        event.preview for event in engine.run(build(), Settings(preview=False)) if event.kind == "step"
    ]
    assert without == [None, None, None]


def test_the_same_request_gives_the_same_pixels_and_another_seed_others(draw):
    first, again, other = draw(seed=5)[0], draw(seed=5)[0], draw(seed=6)[0]
    assert first.path != again.path
    assert pixels(first.path) == pixels(again.path)
    assert pixels(first.path) != pixels(other.path)


def test_previews_do_not_change_the_picture(draw):
    assert pixels(draw()[0].path) == pixels(draw(settings=Settings(preview=False))[0].path)


def test_a_picture_of_several_equals_the_single_picture_of_its_seed(draw):
    several = draw(seed=5, count=3)
    alone = draw(seed=7)[0]
    assert pixels(several[2].path) == pixels(alone.path)


def test_runs_side_by_side_do_not_mix(draw):
    expected = [pixels(draw(seed=seed)[0].path) for seed in (1, 2)]
    runs = [engine.run(build(steps=2, height=64, seed=seed)) for seed in (1, 2)]
    found = [None, None]
    for pair in zip(*runs, strict=True):  # both take their steps in turns, on the same loaded pipeline
        for number, event in enumerate(pair):
            if event.kind == "result":
                found[number] = pixels(event.result.path)
    assert found == expected


def test_the_recipe_in_the_file_makes_the_picture_again(draw):
    made = draw(seed=5, count=2, guidance=3, negative_prompt="a ball")[1]
    recipe = artifacts.read_recipe(made.path)
    request = Request.from_json(recipe["request"])
    assert (request.seed, request.count) == (6, 1)
    again = [*engine.run(request)][-1].results[0]
    assert pixels(again.path) == pixels(made.path)


def test_the_recipe_says_what_made_the_picture(draw, tiny_toy_folder):
    from weights import store

    recipe = draw()[0].recipe
    assert recipe["weights"] == {
        "key": "pixart-sigma-toy",
        "fingerprint": store.fingerprint(tiny_toy_folder),
        "licence": "Apache-2.0",
        "toy": True,
    }
    assert set(recipe["versions"]) == {"gen", "python", "torch", "diffusers", "transformers"}
    assert set(recipe["seconds"]) == {"loading", "encoding", "denoising", "decoding"}
    assert recipe["settings"]["dtype"] in ("float32", "bfloat16")
    assert recipe["machine"]["threads"] >= 1
    planned = recipe["memory"]["planned"]
    assert sum(planned["weights_bytes"].values()) == 4 * store.parameters(tiny_toy_folder)
    assert recipe["memory"]["peak_bytes"] > planned["peak_bytes"] - planned["error_bytes"]


def test_the_row_in_the_library_has_the_same_facts(draw):
    result = draw("a green cone")[0]
    row = library.get(result.id)
    assert (row.path, row.seed, row.prompt, row.toy) == (result.path, 1, "a green cone", True)
    assert row.recipe == result.recipe
    assert row.peak_bytes > 2**20
    assert row.seconds == pytest.approx(sum(row.recipe["seconds"].values()), abs=0.01)


@pytest.mark.parametrize("stage", ["loading", "denoising", "step", "decoding", "saving"])
def test_stopping_early_leaves_no_row_and_no_file(stage):
    run = engine.run(build())
    for event in run:
        if stage in (event.stage, event.kind):
            break
    run.close()
    assert library.search() == []
    assert everything_in(library.home()) == set()


def test_stopping_after_a_picture_keeps_that_picture():
    run = engine.run(build(count=2))
    for event in run:
        if event.kind == "result":
            break
    run.close()
    assert [row.path for row in library.search()] == [event.result.path]
    assert everything_in(library.home()) == {event.result.path.name}


def test_pictures_go_where_they_are_told(draw, tmp_path):
    assert draw(settings=Settings(output=tmp_path / "here"))[0].path.parent == tmp_path / "here"
    assert draw(settings=Settings(output=tmp_path / "this.png"))[0].path == tmp_path / "this.png"


def test_a_place_that_cannot_be_written_to_is_refused_before_loading(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GenError) as caught:
        next(engine.run(build(), Settings(output=tmp_path / "file" / "below")))
    assert caught.value.code == "output_not_writable"


def test_a_home_that_cannot_be_written_to_is_refused_before_loading(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GEN_HOME", str(tmp_path / "file"))
    with pytest.raises(GenError) as caught:
        next(engine.run(build(), Settings(output=tmp_path / "out")))
    assert caught.value.code == "output_not_writable"


def test_weights_that_went_away_since_the_request_was_built(monkeypatch, tmp_path):
    request = build()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("weights.store.__file__", str(tmp_path / "empty" / "store.py"))
    with pytest.raises(GenError) as caught:
        next(engine.run(request))
    assert caught.value.code == "not_installed"


@pytest.fixture
def damaged(tiny_toy_folder, tmp_path, monkeypatch):
    """A copy of the weights that the engine finds and a test may change."""
    folder = tmp_path / "damaged" / "toy" / "pixart-sigma"
    shutil.copytree(tiny_toy_folder, folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "damaged"))
    yield folder
    loader.forget()


def test_damaged_weights_are_said_to_be_damaged_and_leave_nothing(damaged):
    (damaged / NETWORK).write_bytes((damaged / NETWORK).read_bytes()[:1000])
    with pytest.raises(GenError, match="diffusion_pytorch_model") as caught:
        [*engine.run(build())]
    assert caught.value.code == "corrupt_weights"
    assert everything_in(library.home()) == set()


def test_numbers_that_overflow_are_named_with_their_step(damaged):
    tensors = load_file(damaged / NETWORK)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].clamp(-1, 1) * 3e38  # finite, but not their sums
    save_file(tensors, damaged / NETWORK, metadata={"format": "pt"})
    with pytest.raises(GenError, match="Step 1 of 3 produced values that are not numbers") as caught:
        [*engine.run(build())]
    assert caught.value.code == "failed"
    assert library.search() == []


def test_running_out_of_memory_is_said_so():
    import torch

    [*engine.run(build(steps=1))]
    assert loader._kept
    with pytest.raises(GenError, match="64x96 did not fit") as caught, engine._explained(build()):
        torch.empty(2**55)
    assert caught.value.code == "out_of_memory"
    assert not loader._kept  # room is made for the next try


def test_other_runtime_errors_stay_bugs():
    with pytest.raises(RuntimeError, match="something else"), engine._explained(build()):
        raise RuntimeError("something else")


def test_the_end_of_a_long_prompt_that_is_not_read_is_quoted():
    words = [f"word{number}" for number in range(400)]
    notes = [
        event.note for event in engine.run(build(prompt=" ".join(words), steps=1)) if event.kind == "note"
    ]
    notes = [note for note in notes if "of which the model reads 300" in note]
    assert len(notes) == 1
    rest = notes[0].split('"')[1].removesuffix("...").split()
    assert rest[0] in words
    assert rest[0] != words[0]


def test_words_that_small_weights_never_met_are_named():
    prompt = "a red walrus on a Cube, walrus"
    notes = [event.note for event in engine.run(build(prompt=prompt, steps=1)) if event.kind == "note"]
    assert len(notes) == 1
    assert 'never met "walrus".' in notes[0]


def test_a_prompt_that_is_read_in_full_needs_no_note():
    assert not [event for event in engine.run(build(steps=1)) if event.kind == "note"]


def test_the_python_front_door():
    import gen

    request = gen.Request.build(
        "pixart-sigma:toy", {"prompt": "a red cube", "steps": 1, "width": 64, "height": 64}
    )
    assert [*gen.run(request, gen.Settings(preview=False))][-1].kind == "done"
    assert "pixart-sigma" in [row.name for row in gen.models()]
    with pytest.raises(AttributeError):
        gen.no_such_name  # noqa: B018
