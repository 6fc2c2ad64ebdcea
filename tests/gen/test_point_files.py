"""Clouds as files: every format is read back with somebody else's reader, meshes are closed, films turn."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial import cKDTree

from gen import point_files, point_views
from gen.errors import GenError
from gen.point_mesh import LEAST, _evened, reconstruct
from gen.point_views import spacing
from gen.toy import models3d

# Everything that could be misread on the way: line ends, escapes, words of headers, lengths.
RECIPE = {
    "request": {
        "model": "dit-3d",
        "inputs": {"class_label": "ein Stuhl — 🪑\nend_header TextureFile x texturefile \\ " + "a b" * 500},
        "seed": 7,
    },
    "numbers": [1, -2.5, None, True],
}


def toy(family: str, count: int = 2048, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    shape = next(one for one in models3d.shapes(seed) if one.family == family)
    points, parts = models3d.cloud(shape, count, 1)
    return points, point_views.part_colours(parts)


@pytest.fixture(scope="module")
def chair() -> tuple[np.ndarray, np.ndarray]:
    return toy("chair", 500)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures and short films."""
    monkeypatch.setattr(point_views, "SIZE", 64)
    monkeypatch.setattr(point_views, "VIEW_SIZE", 48)
    monkeypatch.setattr(point_views, "FRAMES", 6)


# Round trips


def read_back(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Points and colours of a file, as trimesh reads it."""
    loaded = trimesh.load(path)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.geometry["points"]
    return np.asarray(loaded.vertices), np.asarray(loaded.colors)[:, :3]


@pytest.mark.parametrize("kind", ["ply", "obj", "glb"])
def test_points_and_colours_come_back(kind: str, chair: Any, tmp_path: Path) -> None:
    points, colours = chair
    path = point_files.save(
        tmp_path / ("chair" + point_files.FORMATS[kind].ending), points, colours, recipe=RECIPE
    )
    found, shown = read_back(path)
    np.testing.assert_array_equal(found.astype(np.float32), points)
    # Of a GLB in linear light, as glTF wants it; trimesh rounds it to bytes
    expected = np.round(255 * point_views.linear(colours)) if kind == "glb" else colours
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_a_glb_of_points_has_balls_around_them(chair: Any, tmp_path: Path) -> None:
    """For viewers that draw points as dots, or leave them out."""
    points, _ = chair
    scene = trimesh.load(point_files.save(tmp_path / "chair.glb", *chair))
    balls = scene.geometry["balls"]
    assert balls.body_count == len(points) and balls.is_watertight and balls.is_winding_consistent
    assert balls.volume > 0 and isinstance(scene.geometry["points"], trimesh.PointCloud)
    centres = balls.vertices.reshape(len(points), 6, 3).mean(1)
    np.testing.assert_allclose(centres, points, atol=1e-6)


@pytest.mark.parametrize("kind", ["glb", "mesh"])
def test_a_glb_keeps_to_the_standard(kind: str, chair: Any, tmp_path: Path) -> None:
    path = tmp_path / ("chair" + point_files.FORMATS[kind].ending)
    point_files.save(path, *chair, recipe=RECIPE)
    content = path.read_bytes()
    assert content[:4] == b"glTF" and int.from_bytes(content[8:12], "little") == len(content)
    length = int.from_bytes(content[12:16], "little")
    document = json.loads(content[20 : 20 + length])
    binary = content[28 + length :]
    assert document["asset"]["version"] == "2.0" and document["asset"]["extras"]["gen_recipe"] == RECIPE
    assert length % 4 == 0 and document["buffers"] == [{"byteLength": len(binary)}]
    widths = {"VEC3": 3, "SCALAR": 1}
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        assert view["byteLength"] == 4 * widths[accessor["type"]] * accessor["count"]
        assert view["byteOffset"] + view["byteLength"] <= len(binary)
    for primitive in (one for mesh in document["meshes"] for one in mesh["primitives"]):
        position = document["accessors"][primitive["attributes"]["POSITION"]]
        assert len(position["min"]) == len(position["max"]) == 3
        colours = document["accessors"][primitive["attributes"]["COLOR_0"]]
        assert colours["count"] == position["count"]
        if "NORMAL" in primitive["attributes"]:
            view = document["bufferViews"][primitive["attributes"]["NORMAL"]]
            normals = np.frombuffer(binary, "<f4", view["byteLength"] // 4, view["byteOffset"]).reshape(-1, 3)
            np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        if "indices" in primitive:
            view = document["bufferViews"][primitive["indices"]]
            indices = np.frombuffer(binary, "<u4", view["byteLength"] // 4, view["byteOffset"])
            assert indices.max() < position["count"]


@pytest.mark.parametrize("kind", point_files.FORMATS)
def test_the_recipe_survives_in_every_format(kind: str, chair: Any, tmp_path: Path, quick: None) -> None:
    ending = point_files.FORMATS[kind].ending
    carrying = point_files.save(tmp_path / f"with{ending}", *chair, recipe=RECIPE)
    assert point_files.read_recipe(carrying) == RECIPE
    without = point_files.save(tmp_path / f"without{ending}", *chair)
    with pytest.raises(GenError, match="carries no recipe"):
        point_files.read_recipe(without)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        [carrying.name, without.name]
    )


@pytest.mark.parametrize("ending", [".ply", ".obj"])
def test_no_line_of_a_header_is_too_long_for_simple_readers(ending: str, chair: Any, tmp_path: Path) -> None:
    path = point_files.save(tmp_path / f"chair{ending}", *chair, recipe=RECIPE)
    lines = path.read_bytes().partition(b"end_header\n")[0].splitlines()
    assert max(map(len, lines)) < 600
    assert not any(b"texturefile" in line.lower() for line in lines)


def test_recipes_of_any_text_are_cut_and_joined(chair: Any, tmp_path: Path) -> None:
    for number, text in enumerate(
        ("\\" * 3000, "é\\u" * 900, " " * 2000, "\texturefile" * 99, "îend_header" * 99)
    ):
        path = point_files.save(tmp_path / f"{number}.ply", *chair, recipe={"text": text})
        assert point_files.read_recipe(path) == {"text": text}
        assert len(trimesh.load(path).vertices) == len(chair[0])


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.ply", b"ply\ncomment gen_recipe {\nend_header\n"),
        ("a.glb", b"glTF"),
        ("b.glb", b"x" * 100),
        ("a.png", b"no picture"),
        ("a.mp4", b"no film"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GenError, match="cannot be read") as raised:
            point_files.read_recipe(tmp_path / name)
        assert raised.value.code == "bad_input"
    (tmp_path / "list.obj").write_text("# gen_recipe [1]\n")
    for name, message in (
        ("list.obj", "carries no recipe"),
        ("gone.ply", "There is no file"),
        ("cloud.stl", "is none of .ply"),
    ):
        with pytest.raises(GenError, match=message):
            point_files.read_recipe(tmp_path / name)


# Meshes


@pytest.mark.parametrize("family", models3d.NAMES)
def test_a_cloud_of_each_family_becomes_a_closed_mesh(family: str, tmp_path: Path) -> None:
    points, colours = toy(family)
    path = point_files.save(tmp_path / f"{family}.mesh.glb", points, colours, recipe=RECIPE)
    mesh = trimesh.load(path).geometry["surface"]
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert mesh.body_count == 1
    # It runs along the points: nowhere far from them, and as far as they reach.
    apart = point_views.spacing(points)
    distances, _ = cKDTree(points).query(mesh.vertices)
    assert distances.mean() < 1.3 * apart and np.quantile(distances, 0.99) < 3 * apart
    assert np.abs(mesh.bounds - [points.min(0), points.max(0)]).max() < apart
    # Solid where the family is, and open where it is: a mug holds something, a table is mostly air.
    filled = mesh.volume / mesh.convex_hull.volume
    low, high = {"car": (0.7, 1.0), "lamp": (0.3, 0.95)}.get(family, (0.02, 0.6))
    assert low < filled < high


def test_the_mesh_has_the_colours_of_the_nearest_points() -> None:
    points, colours = toy("table", 1000)
    mesh = reconstruct(points, colours)
    near = np.linalg.norm(mesh.vertices[:, None] - points[None, ::4], axis=2).argmin(1)
    assert (mesh.colours == colours[::4][near]).all(1).mean() > 0.95
    assert mesh.faces.max() < len(mesh.vertices) == len(mesh.normals)


def test_pieces_that_stand_apart_are_kept_and_crumbs_are_not() -> None:
    rng = np.random.default_rng(0)
    ball = rng.standard_normal((900, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    points = np.concatenate([ball, 0.5 * ball[:300] + [3, 0, 0], [[0, 3, 0]]])
    mesh = reconstruct(points, np.zeros((len(points), 3), np.uint8))
    bodies = trimesh.Trimesh(mesh.vertices, mesh.faces).split()
    assert len(bodies) == 2 and all(body.is_watertight for body in bodies)
    volumes = sorted(body.volume for body in bodies)
    radius = 1 + LEAST * spacing(points)  # by half the least thickness of a sheet too large
    assert volumes[1] == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05), "a hollow ball becomes solid"
    assert radius < 1.07
    assert mesh.vertices[:, 1].max() < 1.5


@pytest.mark.parametrize(("number", "most"), [(10, 1), (22, 1), (28, 3)])  # without evening: 2, 3 and 9
def test_a_mug_keeps_the_hole_of_its_handle_and_gets_hardly_others(number: int, most: int) -> None:
    shape = next(itertools.islice(models3d.shapes(3), number, None))
    assert shape.family == "mug"
    points, _ = models3d.cloud(shape, 2048, number)
    mesh = reconstruct(points, np.zeros((len(points), 3), np.uint8))
    holes = 1 - trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).euler_number // 2
    assert 1 <= holes <= most


def test_sheets_are_evened_out_and_what_stands_apart_is_not_joined() -> None:
    rng = np.random.default_rng(0)
    sheet = rng.random((1500, 3)) * [1, 1, 0]
    apart = spacing(sheet)
    gap = np.linalg.norm(sheet - [0.5, 0.5, 0], axis=1) < 2 * apart  # as wide as chance leaves them
    other = sheet + np.array([0, 0, 6 * apart])
    points = np.concatenate([sheet[~gap], other])
    more = _evened(points, apart)
    assert np.array_equal(more[: len(points)], points)
    added = more[len(points) :]
    levels = added[:, 2] / (6 * apart)
    assert (np.minimum(np.abs(levels), np.abs(levels - 1)) < 0.05).all(), "nothing between two sheets"
    middle = cKDTree(added).query([[0.5, 0.5, 0]])[0][0]
    assert middle < 1.5 * apart < cKDTree(points).query([[0.5, 0.5, 0]])[0][0]
    assert cKDTree(added).query(points)[0].min() > 0.8 * apart, "only where there was nothing"


def test_clouds_of_few_or_flat_points_become_meshes_too() -> None:
    rng = np.random.default_rng(0)
    for points in (rng.random((16, 3)), rng.random((500, 3)) * [1, 0, 1]):
        mesh = reconstruct(points, np.zeros((len(points), 3), np.uint8))
        assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_a_cloud_without_a_surface_is_refused_with_a_sentence(tmp_path: Path) -> None:
    points = np.concatenate([0.01 * np.random.default_rng(0).random((500, 3)), [[100, 0, 0]]])
    with pytest.raises(GenError, match="do not add up to a closed surface") as raised:
        point_files.save(tmp_path / "far.mesh.glb", points)
    assert raised.value.code == "failed" and not list(tmp_path.glob("*far*"))


def test_scale_and_place_of_a_cloud_do_not_matter() -> None:
    points, colours = toy("chair", 1000)
    one, other = (
        reconstruct(moved, colours) for moved in (points, (1000 * points.astype(float) + [5000, -300, 20]))
    )
    volumes = [
        trimesh.Trimesh(mesh.vertices.astype(float), mesh.faces, process=False).volume
        for mesh in (one, other)
    ]
    assert volumes[1] == pytest.approx(volumes[0] * 1e9, rel=0.03)


# Pictures and films


def test_a_film_turns_and_is_what_players_show(chair: Any, tmp_path: Path, quick: None) -> None:
    path = point_files.save(tmp_path / "chair.mp4", *chair, recipe=RECIPE)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(stream)]
    assert len(frames) == point_views.FRAMES and frames[0].shape == (64, 64, 3)
    for one, other in itertools.combinations(frames, 2):
        assert np.abs(one - other).mean() > 1
    drawn = np.stack(list(point_views.turntable(*chair, frames=6, size=64)))
    assert np.abs(np.stack(frames) - drawn).mean() < 6, "the film shows what was drawn"


def test_without_h264_films_fall_back(
    chair: Any, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(point_files, "CODECS", ("not-there", "mpeg4"))
    path = point_files.save(tmp_path / "chair.mp4", *chair, recipe=RECIPE)
    with av.open(str(path)) as film:
        assert film.streams.video[0].codec_context.name == "mpeg4"
        assert len(list(film.decode(video=0))) == point_views.FRAMES
    assert point_files.read_recipe(path) == RECIPE


def test_without_the_package_a_sentence_says_how_to_get_it(
    chair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(GenError, match="need the package av") as raised:
        point_files.save(tmp_path / "chair.mp4", *chair)
    assert (raised.value.code, raised.value.hint) == ("not_installed", "Run: pip install av")
    assert not (tmp_path / "chair.mp4").exists()


def test_a_sheet_shows_the_cloud_from_all_around(chair: Any, tmp_path: Path, quick: None) -> None:
    sheet = point_views.sheet(*chair, views=4, columns=2, size=96)
    assert sheet.size == (192, 192)
    views = [np.asarray(sheet.crop((x, y, x + 96, y + 96))).astype(int) for y in (0, 96) for x in (0, 96)]
    for one, other in itertools.combinations(views, 2):
        assert np.abs(one - other).mean() > 2
    path = point_files.save(tmp_path / "chair.png", *chair, recipe=RECIPE)
    with Image.open(path) as picture:
        assert picture.size == (4 * 48, 2 * 48) and picture.mode == "RGB"


def test_parts_are_seen_in_their_colours_and_the_cloud_stays_in_the_picture() -> None:
    for family in models3d.NAMES:
        points, colours = toy(family, 1500)
        picture = point_views.draw(point_views.arrange(points, colours), size=160).astype(int)
        saturation = picture.max(2) - picture.min(2)
        seen = saturation > 40  # the room is nearly grey
        assert 0.02 < seen.mean() < 0.6
        assert not (seen[0].any() or seen[-1].any() or seen[:, 0].any() or seen[:, -1].any())
        hues = {tuple(colour) for colour in colours}
        drawn = picture[seen] / picture[seen].sum(1, keepdims=True)
        for colour in hues:
            wanted = np.array(colour) / sum(map(int, colour))
            assert (np.abs(drawn - wanted).max(1) < 0.09).mean() > 0.02, (family, colour)


def test_neighbouring_parts_have_colours_that_are_told_apart() -> None:
    for family in models3d.FAMILIES.values():
        colours = point_views.part_colours(np.array([models3d.PARTS.index(part) for part in family.parts]))
        for one, other in itertools.combinations(colours.astype(int), 2):
            assert np.abs(one - other).sum() > 100, family.name


def test_a_turn_ends_where_it_began(chair: Any) -> None:
    scene = point_views.arrange(*chair)
    first, again = (point_views.draw(scene, turn, 48).astype(int) for turn in (0.3, 0.3 + 2 * np.pi))
    assert np.abs(first - again).mean() < 0.1


def test_it_is_seen_from_the_side_that_turns_towards_the_camera() -> None:
    """Of two balls the one in front hides the other, and the right one is on the right."""
    rng = np.random.default_rng(0)
    blob = 0.2 * rng.standard_normal((300, 3)).clip(-1, 1)
    points = np.concatenate([blob + np.array([0, 0, 1]), blob - np.array([0, 0, 1])])
    colours = np.repeat(np.array([(220, 40, 40), (40, 40, 220)], np.uint8), 300, axis=0)
    picture = point_views.draw(point_views.arrange(points, colours), 0.0, 96).astype(int)
    red, blue = (picture[..., one] - picture[..., other] > 60 for one, other in ((0, 2), (2, 0)))
    assert red.sum() > 1.5 * blue.sum(), "z points at the camera, and what is nearer is larger"
    points = points[:, [2, 1, 0]]
    picture = point_views.draw(point_views.arrange(points, colours), 0.0, 96).astype(int)
    columns = np.nonzero(picture[..., 0] - picture[..., 2] > 60)[1]
    assert columns.mean() > 48, "x points to the right"


# Refusals


@pytest.mark.parametrize(
    ("points", "colours", "message"),
    [
        (np.zeros((2048, 2)), None, "must be \\(points, 3\\) numbers"),
        (np.zeros((1, 2048, 3)), None, "must be \\(points, 3\\) numbers"),
        ("a chair", None, "must be \\(points, 3\\) numbers"),
        (np.eye(3), None, "3 points are too few"),
        (np.ones((100, 3)), None, "All points lie in one place"),
        (np.where(np.arange(300).reshape(100, 3) == 7, np.nan, 0.5), None, "1 of 100 points are not finite"),
        (np.random.default_rng(0).random((50, 3)), np.zeros((50, 3)), "Colours must be \\(50, 3\\) of uint8"),
        (np.random.default_rng(0).random((50, 3)), np.zeros((49, 3), np.uint8), "Colours must be"),
    ],
)
def test_bad_clouds_are_refused_before_any_work(
    points: Any, colours: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GenError, match=message) as raised:
        point_files.save(tmp_path / "cloud.ply", points, colours)
    assert raised.value.code == "bad_input" and raised.value.hint
    assert not list(tmp_path.glob("cloud*"))


def test_names_that_say_no_format_are_refused(chair: Any, tmp_path: Path) -> None:
    with pytest.raises(GenError, match="names no format") as raised:
        point_files.save(tmp_path / "chair.stl", *chair)
    assert ".mesh.glb" in raised.value.hint
    assert point_files.save(tmp_path / "chair.xyz", *chair, kind="ply").read_bytes()[:4] == b"ply\n"


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    chair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = point_files.save(tmp_path / "chair.ply", *chair)
    before = path.read_bytes()
    with pytest.raises(GenError, match="exists already") as raised:
        point_files.save(path, *chair)
    assert raised.value.code == "output_not_writable" and path.read_bytes() == before

    def full(part: Path, *_: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    row = point_files.FORMATS["obj"]
    monkeypatch.setattr(
        point_files, "FORMATS", {"obj": point_files.Format(ending=row.ending, summary="", write=full)}
    )
    with pytest.raises(GenError, match="No space left") as raised:
        point_files.save(tmp_path / "chair.obj", *chair)
    assert raised.value.code == "disk_full"
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["chair.ply"]


def test_importing_it_imports_none_of_the_heavy_packages() -> None:
    script = (
        "import sys, gen.point_files, gen.point_mesh\n"
        "print({'av', 'trimesh', 'scipy', 'skimage', 'torch', 'PIL'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
