"""Clouds of points through every door: the engine, the command line, the library; on small random weights."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen import artifacts, catalog, cli, clouds, engine, jobs, library, outputs, point_files, point_views
from gen.errors import GenError
from gen.request import Request, Settings
from pipelines.point_diffusion import PointDiffusion
from tests.golden.dit3d import official_shapes
from weights import store

pytestmark = pytest.mark.usefixtures("installed_dit3d")
QUICK = {"points": 64, "steps": 2, "files": "points", "seed": 4}


def build(label: str = "chair", **values) -> Request:
    return Request.build("dit-3d:toy", {**QUICK, "class_label": label, **values})


def made(request: Request, settings: Settings | None = None):
    return [*engine.run(request, settings)][-1].results


def points_of(path: Path) -> np.ndarray:
    content = path.read_bytes()
    body = content[content.index(b"end_header\n") + 11 :]
    return np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])["xyz"]


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures from all sides that cost little."""
    monkeypatch.setattr(point_views, "VIEW_SIZE", 40)


@pytest.fixture(autouse=True)
def _quick(quick_pictures):
    pass


def test_the_table_names_the_files_that_can_be_written():
    of = outputs.OUTPUTS["cloud"]
    assert dict(of.endings) == {kind: row.ending for kind, row in point_files.FORMATS.items()}
    (files,) = (one for one in catalog.MODELS["dit-3d"].inputs if one.name == "files")
    assert set(files.choices) == set(of.files)
    for row in outputs.OUTPUTS.values():
        assert set(row.always) | {kind for more in row.files.values() for kind in more} == set(row.endings)
        assert row.picture in row.always and next(iter(row.endings)) in row.always


def test_a_cloud_comes_with_files_that_stand_in_the_library():
    events = [*engine.run(build(count=2))]
    assert "dit-3d:toy (TOY weights" in events[0].note
    for result, seed in zip(events[-1].results, (4, 5), strict=True):
        entry = library.get(result.id)
        assert result.path == entry.path and entry.path.name.endswith(f"-{seed}-chair.glb")
        assert entry.paths == result.files and set(entry.paths) == {"glb", "ply", "obj", "png"}
        assert {path.parent for path in entry.paths.values()} == {entry.path.parent}
        with Image.open(entry.paths["png"]) as picture:
            assert picture.size == (entry.width, entry.height) == (160, 80)
        assert (entry.prompt, entry.toy) == ("chair", True)
        assert json.loads(json.dumps(entry.to_json()))["files"]["ply"].endswith(f"-{seed}-chair.ply")
        for path in entry.paths.values():
            assert artifacts.read_recipe(path) == entry.recipe
        assert entry.recipe["weights"]["toy"] and entry.recipe["request"]["seed"] == seed
        assert points_of(entry.paths["ply"]).shape == (64, 3)
    everything = {path for path in entry.path.parent.iterdir() if path.is_file()}
    assert everything == {path for result in events[-1].results for path in result.files.values()}


def test_the_same_seed_means_the_same_points_alone_or_among_others():
    alone, several = made(build(seed=6)), made(build(seed=5, count=2))
    ours, theirs = (points_of(one.files["ply"]) for one in (alone[0], several[1]))
    assert np.array_equal(ours, theirs)
    assert not np.allclose(ours, points_of(several[0].files["ply"]))


def test_points_are_coloured_by_part_where_the_judge_is_else_it_is_said(monkeypatch):
    here = store.find(clouds.JUDGE)
    if here is not None:
        assert made(build())[0].recipe["coloured_by"] == "part"
    find = store.find
    monkeypatch.setattr(store, "find", lambda key: None if key == clouds.JUDGE else find(key))
    events = [*engine.run(build())]
    assert events[-1].results[0].recipe["coloured_by"] == "height"
    assert any("Coloured by height" in event.note for event in events if event.kind == "note")


def test_looks_on_the_way_are_pictures_and_rare():
    steps = [event for event in engine.run(build(steps=60)) if event.kind == "step"]
    seen = [event.index for event in steps if event.preview is not None]
    assert len(steps) == 60 and clouds.LOOKS <= len(seen) <= clouds.LOOKS + 2 and seen[-1] == 60
    preview = steps[-1].preview
    assert preview.size == (clouds.SIDE, clouds.SIDE)
    colours = np.asarray(preview).reshape(-1, 3)
    assert 0.005 < (colours != clouds.SKY).any(1).mean() < 0.9
    without = [event for event in engine.run(build(), Settings(preview=False)) if event.kind == "step"]
    assert [event.preview for event in without] == [None, None]


def test_a_glance_shows_what_is_up_and_survives_strays():
    points = np.random.default_rng(0).uniform(-1, 1, (500, 3)) * (0.1, 1, 0.1)
    points[0] = (1e6, np.nan, -1e6)
    dots = (np.asarray(clouds.glance(points)) != clouds.SKY).any(2)
    rows, columns = np.nonzero(dots)
    assert np.ptp(rows) > 2 * np.ptp(columns)


def test_stopping_early_leaves_no_file_and_no_row():
    events = engine.run(build())
    next(event for event in events if event.kind == "step")
    events.close()
    assert library.search() == []
    assert [path for path in library.outputs().rglob("*") if path.is_file()] == []


def test_a_file_that_fails_takes_the_others_along(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    row = point_files.FORMATS["obj"]
    formats = {**point_files.FORMATS, "obj": point_files.Format(ending=".obj", summary="", write=full)}
    monkeypatch.setattr(point_files, "FORMATS", formats)
    with pytest.raises(GenError) as caught:
        made(build())
    assert caught.value.code == "disk_full" and row.write is not full
    assert library.search() == []
    assert [path for path in library.outputs().rglob("*") if path.is_file()] == []


def test_a_mesh_that_cannot_be_made_is_left_out_and_said(monkeypatch):
    def open_surface(*_):
        raise GenError("These points do not add up to a closed surface.", "Draw more.", "failed")

    row = point_files.Format(ending=".mesh.glb", summary="", write=open_surface)
    monkeypatch.setattr(point_files, "FORMATS", {**point_files.FORMATS, "mesh": row})
    events = [*engine.run(build(files="mesh"))]
    assert "mesh" not in events[-1].results[0].files
    assert any("No .mesh.glb file" in event.note for event in events)


def test_a_taken_name_beside_gets_all_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "_file_name", lambda fields: "chair")
    (tmp_path / "chair.obj").write_text("mine")
    (result,) = made(build(), Settings(output=tmp_path))
    assert {path.name for path in result.files.values()} == {
        f"chair-2.{k}" for k in ("glb", "ply", "obj", "png")
    }
    assert (tmp_path / "chair.obj").read_text() == "mine"


def test_deleting_a_result_takes_all_its_files():
    (result,) = made(build())
    library.delete(result.id)
    assert not any(path.exists() for path in result.files.values())


# The command line


def run(*arguments: object) -> int:
    return cli.execute(["run", "dit-3d", *map(str, arguments)])


SMALL = ("--points", 64, "--steps", 2, "--files", "points", "--seed", 4)


def test_a_run_prints_the_glb_and_tells_of_the_rest(capsys):
    assert run("chair", *SMALL) == 0
    told = capsys.readouterr()
    path = Path(told.out.strip())
    assert path.suffix == ".glb" and path.is_file()
    assert f"beside {path.name}: " in told.err and f"{path.stem}.ply" in told.err
    assert "TOY weights" in told.err


@pytest.mark.parametrize("kind", ["glb", "ply", "obj", "png"])
def test_any_of_the_files_makes_the_cloud_again(kind, capsys):
    assert run("chair", *SMALL, "--json") == 0
    (first,) = json.loads(capsys.readouterr().out)["data"]["results"]
    assert cli.execute(["run", "--repeat", first["files"][kind], "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["data"]["results"]
    assert again["path"] != first["path"]
    assert (
        Path(again["files"]["ply"]).read_bytes().partition(b"end_header")[2]
        == (Path(first["files"]["ply"]).read_bytes().partition(b"end_header")[2])
    )


@pytest.mark.parametrize("way", [("plane",), ("0",), ("--class-label", "Airplane")])
def test_a_class_goes_by_its_names_and_number(way, capsys):
    assert run(*way, *SMALL, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["data"]["results"]
    assert result["recipe"]["request"]["inputs"]["class_label"] == "airplane"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), 'gen run dit-3d "chair"'),
        (("chiar",), "Did you mean chair?"),
        (("chair", "--points", 15), "Points 15 is too small; the smallest is 16"),
        (("chair", "--points", 16385), "Points 16385 is too large; the largest is 16384"),
        (("chair", "--points", "many"), "Points must be a whole number"),
        (("chair", "--width", 64), "dit-3d takes no option 'width'"),
        (("chair", "--size", 64), "dit-3d takes no option 'size'"),
        (("chair", "--files", "stl"), "Files cannot be 'stl'"),
        (("chair", "-o", "chair.ply"), "clouds are saved as GLB, with PLY and OBJ and PNG beside it"),
        (("chair", "--scheduler", "ddpm", "--steps", 1), "steps must be"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(arguments, words, capsys):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
    assert library.search() == []


def test_a_picture_model_takes_no_points(capsys):
    assert cli.execute(["run", "pixart-sigma:toy", "a cube", "--points", "64"]) == 2
    assert "Models that take it: dit-3d." in capsys.readouterr().err


def test_a_name_of_ones_own_is_taken_by_all_files(tmp_path, capsys):
    assert run("chair", *SMALL, "-o", tmp_path / "mine.glb") == 0
    assert sorted(path.name for path in tmp_path.glob("mine*")) == [
        f"mine.{k}" for k in ("glb", "obj", "ply", "png")
    ]
    (tmp_path / "mine.glb").unlink()
    assert run("chair", *SMALL, "-o", tmp_path / "mine.glb") == 1, "another's picture is not overwritten"
    assert not (tmp_path / "mine.glb").exists() and len(library.search()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".gen")] == []


def test_a_name_that_is_taken_beside_is_refused_before_any_work(tmp_path):
    (tmp_path / "mine.ply").write_text("another's")
    events = engine.run(build(), Settings(output=tmp_path / "mine.glb"))
    with pytest.raises(GenError, match=r"mine\.ply exists already"):
        next(events)
    assert [path.name for path in tmp_path.glob("mine*")] == ["mine.ply"]


def test_history_list_show_and_plans_know_clouds(capsys):
    assert run("chair", *SMALL) == 0
    capsys.readouterr()
    assert cli.execute(["history"]) == 0
    assert "64 points" in capsys.readouterr().out
    assert run("chair", *SMALL, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "points           64" in plan and "about" in plan
    assert run("chair", "--dry-run") == 0
    assert "not known" in capsys.readouterr().out, "another number of points takes another time"
    assert cli.execute(["list"]) == 0
    assert "dit-3d:toy" in capsys.readouterr().out
    assert cli.execute(["show", "dit-3d:toy"]) == 0
    assert "3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", [*(catalog.SCHEDULER.choices or ())])
def test_every_scheduler_ends_in_a_cloud(scheduler, capsys):
    assert run("chair", "--scheduler", scheduler, *SMALL[:-2], "--steps", 4) == 0
    assert capsys.readouterr().out.strip().endswith("-chair.glb")


# Known points, and the way between two seeds


@pytest.fixture
def half(tmp_path) -> Path:
    """A file with the points of some shape in the space of the weights."""
    points = np.random.default_rng(2).uniform(-0.4, 0.4, (80, 3)).astype(np.float32)
    return point_files.save(tmp_path / "half.ply", points)


def test_known_points_stay_to_the_last_bit(half):
    events = [*engine.run(build(points=200, known_points=half))]
    (result,) = events[-1].results
    found = points_of(result.files["ply"])
    assert found.shape == (200, 3) and np.array_equal(found[:80], points_of(half))
    free = points_of(made(build(points=200))[0].files["ply"])
    assert not np.allclose(found[80:], free[80:], atol=1e-3), "the rest is drawn in view of them"
    assert result.recipe["known"] == {"points": 80, "times": 1.0, "shift": [0.0, 0.0, 0.0]}
    (note,) = (event.note for event in events if "Known points" in event.note)
    assert "80 of 80 in half.ply are kept (all), as they are" in note


def test_a_file_in_other_units_is_fitted_and_comes_back_in_its_own(half, tmp_path):
    metres = points_of(half)
    millimetres = metres * np.float32(1000) + np.float32((5000, -200, 40))
    far = point_files.save(tmp_path / "far.ply", millimetres)
    events = [*engine.run(build(points=200, known_points=far))]
    found = points_of(events[-1].results[0].files["ply"])
    assert np.array_equal(found[:80], millimetres)
    low, high = millimetres.min(0), millimetres.max(0)
    inside = ((found[80:] > low - (high - low)) & (found[80:] < high + (high - low))).all(1)
    assert inside.mean() > 0.9, "what is drawn lies around what was known"
    known = events[-1].results[0].recipe["known"]
    assert known["times"] == pytest.approx((high - low).max() / (clouds.LONG * 0.17), rel=1e-4)
    assert any("in the units of the file" in event.note for event in events if event.kind == "note")
    with pytest.raises(GenError, match="known_points lie up to"):
        made(build(points=200, known_points=far, known_fit="as-is"))
    boxed = made(build(points=200, known_points=half, known_fit="box"))[0]
    assert boxed.recipe["known"]["times"] == pytest.approx(0.8 / (clouds.LONG * 0.17), rel=0.05)
    assert np.array_equal(points_of(boxed.files["ply"])[:80], metres)


@pytest.mark.parametrize("part", clouds.PARTS)
def test_a_part_of_a_file_is_what_lies_on_its_side(half, part):
    axis, side = clouds.PARTS[part]
    points = points_of(half)
    middle = (points[:, axis].min() + points[:, axis].max()) / 2
    expected = points[(points[:, axis] - middle) * side > 0]
    assert 20 < len(expected) < 60
    (result,) = made(build(points=80, known_points=half, known_part=part))
    found = points_of(result.files["ply"])
    assert np.array_equal(found[: len(expected)], expected)
    assert result.recipe["known"]["points"] == len(expected)


def test_what_does_not_go_together_is_refused_before_weights_are_loaded(half, monkeypatch):
    monkeypatch.setattr(engine.loader, "load", None)
    random = {"second_seed": 9, "scheduler": "ddpm"}
    for values, words in (
        ({"known_points": half, "points": 80}, "80 points are known, and the whole cloud is to have 80"),
        ({"known_points": half, "known_part": "upper"}, "Known part cannot be 'upper'"),
        ({"known_points": "nowhere.ply"}, "there is no file nowhere.ply"),
        (random, "the way is lost in the noise that the scheduler 'ddpm' adds"),
        ({"second_seed": 4}, "Both seeds are the same"),
        ({"second_seed": 9, "blend": 0.3, "count": 2}, "one place between the two seeds, and 2"),
        ({"second_seed": 9, "blend": 1.5}, "Blend 1.5 is too large"),
        ({"second_seed": -1}, "Seed -1 is out of range"),
    ):
        with pytest.raises(GenError, match=words) as caught:
            build(**values)
        assert caught.value.code == "bad_input" and caught.value.hint


def test_a_scheduler_of_the_weights_that_adds_noise_is_refused_between_seeds(
    installed_dit3d, tiny_dit3d_folder, monkeypatch, tmp_path
):
    folder = tmp_path / "noisy" / "toy" / "dit-3d"
    shutil.copytree(tiny_dit3d_folder, folder)
    PointDiffusion().save_pretrained(folder / "scheduler")
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "noisy"))
    with pytest.raises(GenError, match="scheduler 'default' adds"):
        build(second_seed=9)
    assert build(second_seed=9, scheduler="dpm++").inputs["second_seed"] == 9
    from pipelines import dit3d

    assert set(clouds.NOISY_CLASSES) == set(dit3d.RANDOM)
    noisy = {name for name in catalog.SCHEDULER.choices if name != "default" and _noisy(name)}
    assert set(clouds.NOISY) == noisy


def _noisy(name: str) -> bool:
    from pipelines import dit3d, schedulers

    return type(schedulers.make(name, PointDiffusion())).__name__ in dit3d.RANDOM


def test_the_way_between_two_seeds_begins_at_one_and_ends_at_the_other():
    way = made(build(seed=4, second_seed=9, count=3))
    assert [one.seed for one in way] == [4, 4, 4]
    found = [points_of(one.files["ply"]) for one in way]
    ends = [points_of(made(build(seed=seed))[0].files["ply"]) for seed in (4, 9)]
    assert np.array_equal(found[0], ends[0]) and np.allclose(found[2], ends[1], atol=1e-5)
    lengths = [np.linalg.norm(found[1] - found[n]) / np.linalg.norm(found[0] - found[2]) for n in (0, 2)]
    assert max(lengths) < 1, "the middle is nearer to both than they are to each other"
    assert [one.recipe["request"]["inputs"]["blend"] for one in way] == [0.0, 0.5, 1.0]
    alone = [
        points_of(made(build(seed=4, second_seed=9, **more))[0].files["ply"]) for more in ({}, {"blend": 0.5})
    ]
    assert np.array_equal(alone[0], found[1]) and np.array_equal(alone[1], found[1]), "one alone is halfway"


def test_completion_and_interpolation_go_by_the_command_line_and_again_from_a_file(half, tmp_path, capsys):
    arguments = ("--known-points", half, "--known-part", "left", "--second-seed", 9, "--count", 3, "--json")
    assert run("chair", *SMALL, *arguments) == 0
    results = json.loads(capsys.readouterr().out)["data"]["results"]
    assert len(results) == 3
    inputs = results[1]["recipe"]["request"]["inputs"]
    assert inputs["known_points"]["name"] == "half.ply" and inputs["blend"] == 0.5
    half.unlink()
    assert cli.execute(["run", "--repeat", results[1]["files"]["glb"], "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["data"]["results"]
    ours, theirs = (points_of(Path(one["files"]["ply"])) for one in (again, results[1]))
    assert np.array_equal(ours, theirs)
    assert run("chair", *SMALL, "--known-part", "left") == 0
    assert "Known part changes nothing without Known points" in capsys.readouterr().err


def test_strangers_send_points_and_no_paths(half):
    sent = {"model": "dit-3d:toy", "inputs": {"class_label": "mug", "known_points": str(half)}}
    with pytest.raises(GenError, match="not base64"):
        Request.from_json(sent)
    sent["inputs"]["known_points"] = base64.b64encode(half.read_bytes()).decode()
    request = Request.from_json(sent)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


# Stopping while files are written


@pytest.mark.parametrize("files", ["points", "mesh", "film"])
def test_stopping_while_files_are_written_leaves_nothing(files, monkeypatch):
    monkeypatch.setattr(engine, "SAVING_EVERY", 0.0)
    monkeypatch.setattr(point_views, "SIZE", 64)
    whole = [event for event in engine.run(build(files=files)) if event.stage == "saving"]
    more = {"points": 0, "mesh": 1, "film": point_views.FRAMES + 1}[files]
    assert len(whole) == 1 + 4 + more, "one at the start, one before each file and one after each frame"
    before = len(library.search())
    there = {path for path in library.outputs().rglob("*") if path.is_file()}
    for stopped_at in (1, 3, len(whole) // 2, len(whole)):
        events = engine.run(build(files=files))
        seen = 0
        for event in events:
            seen += event.stage == "saving"
            if seen == stopped_at:
                break
        events.close()
        assert len(library.search()) == before
        assert {path for path in library.outputs().rglob("*") if path.is_file()} == there


def test_a_job_is_stopped_in_the_middle_of_a_film(monkeypatch):
    monkeypatch.setattr(engine, "SAVING_EVERY", 0.0)
    monkeypatch.setattr(point_views, "SIZE", 64)
    job = jobs.submit(build(files="film"))
    saving = 0
    for event in jobs.watch(job):
        saving += event.stage == "saving"
        if saving == 8:  # the film has begun
            jobs.cancel(job)
    assert jobs.state(job) == "cancelled" and event.error["code"] == "cancelled"
    assert saving < point_views.FRAMES
    assert library.search() == []
    patience = time.monotonic() + 30  # what was begun is cleared away just after the watchers are told
    while left := [path for path in library.outputs().rglob("*") if path.is_file()]:
        assert time.monotonic() < patience, left
        time.sleep(0.05)


# Weights of one's own


def test_weights_that_were_trained_are_drawn_with(installed_dit3d, tiny_dit3d_folder, capsys):
    """The folder has the classes of its own training; the toy's are others."""
    from pipelines.dit3d import DiT3DPipeline

    pipeline = DiT3DPipeline.from_pretrained(tiny_dit3d_folder)
    pipeline.scheduler = PointDiffusion()
    pipeline.name_classes({0: "guitar", 1: "sofa", 2: "rifle"})
    with torch.no_grad():  # other weights, and not the toy's under other names
        next(iter(pipeline.transformer.parameters())).add_(0.01)
    pipeline.save_pretrained(installed_dit3d / "dit-3d")
    assert catalog.choose(catalog.MODELS["dit-3d"], None)[0] == "own"
    assert run("sofa", *SMALL, "--json") == 0
    told = capsys.readouterr()
    (result,) = json.loads(told.out)["data"]["results"]
    assert result["recipe"]["request"]["weights"] == "own" and not result["recipe"]["weights"]["toy"]
    assert result["recipe"]["coloured_by"] == "height" and "TOY" not in told.err
    assert run("chair", *SMALL) == 2
    assert "There is no class 'chair'" in capsys.readouterr().err
    assert run("chair", *SMALL, "--weights", "toy") == 0
    assert cli.execute(["show", "dit-3d:own", "--json"]) == 0
    inputs = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["inputs"]
    given = {one["name"]: one for one in inputs}
    assert given["class_label"]["choices"] == ["guitar", "sofa", "rifle"]
    assert given["points"]["default"] == 2048


def test_weights_of_ones_own_that_are_missing_are_got_in_two_ways(capsys, monkeypatch):
    assert run("chair", "--weights", "own") == 3
    said = capsys.readouterr().err
    assert "gen convert FILE --as dit-3d --output $GEN_WEIGHTS_DIR/dit-3d" in said
    assert "gen train dit-3d --data FOLDER --output $GEN_WEIGHTS_DIR/dit-3d" in said
    monkeypatch.delenv("GEN_WEIGHTS_DIR")
    assert run("chair", "--weights", "own") == 3
    assert "set GEN_WEIGHTS_DIR to a folder of yours" in capsys.readouterr().err


OFFICIAL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 2,
    "learn_sigma": False,
}


@pytest.mark.parametrize("said", [{"category": ["chair", "car"], "mean": [0.0, 0.1, 0.0], "std": 0.2}, {}])
def test_an_official_checkpoint_ends_in_weights_that_are_drawn_with(said, installed_dit3d, tmp_path, capsys):
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(shape) for name, shape in official_shapes(OFFICIAL).items()}
    state = {f"model.module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "model_state": state}, tmp_path / "official.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, **said}))
    own = installed_dit3d / "dit-3d"
    command = ["convert", str(tmp_path / "official.pth"), "--as", "dit-3d", "--config"]
    command += [str(tmp_path / "config.json"), "-o", str(own)]
    assert cli.execute(command) == 0
    told = capsys.readouterr().err
    assert ("classes go by number" in told) == ("a spread of 1" in told) == (not said)
    assert run("car" if said else "1", *SMALL, "--weights", "own") == 0
    path = Path(capsys.readouterr().out.strip())
    points = points_of(path.with_suffix(".ply"))
    assert np.isfinite(points).all() and points.shape == (64, 3)
    index = json.loads((own / "model_index.json").read_text())
    assert (index["mean"], index["std"]) == (said.get("mean", [0.0] * 3), said.get("std", 1.0))
    assert index["scheduler"][1] == "PointDiffusion"


@pytest.mark.parametrize(
    "said", [{"category": ["a", "b", "c"]}, {"category": 3}, {"std": 0}, {"mean": "here"}]
)
def test_a_configuration_that_cannot_be_converts_nothing(said, tmp_path, capsys):
    state = {name: torch.zeros(shape) for name, shape in official_shapes(OFFICIAL).items()}
    torch.save(state, tmp_path / "official.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, **said}))
    command = ["convert", str(tmp_path / "official.pth"), "--as", "dit-3d", "--config"]
    assert cli.execute([*command, str(tmp_path / "config.json")]) == 2
    assert "was not converted" in capsys.readouterr().err
    assert not (tmp_path / "official").exists()
