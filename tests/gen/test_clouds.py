"""Clouds of points through every door: the engine, the command line, the library; on small random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen import artifacts, catalog, cli, clouds, engine, library, outputs, point_files, point_views
from gen.errors import GenError
from gen.request import Request, Settings
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
