"""Clouds of points as files that other programs open, with the recipe inside.

As points: PLY, OBJ, and GLB, whose points also have little balls around them, for viewers that draw points
as dots or not at all. As a closed mesh: GLB again. To look at: a PNG with views from all around, and an MP4
of one turn. Axes are those of the clouds, y up, as glTF has them.

A cloud is (P, 3) numbers, its colours (P, 3) uint8 in sRGB; without colours it gets some by height.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen import artifacts, point_views
from gen.artifacts import RECIPE
from gen.errors import GenError

FEWEST = 16  # points: less have no surface
LINE = 500  # characters of a recipe on one line of a header: readers have line buffers
MOST_HEADER = 2**22  # bytes of a file that are searched for a recipe
FRAME_RATE = 20  # of a turntable's film: three seconds for a turn
CODECS = ("libx264", "mpeg4")  # the first that is there
HEADER_WORDS = re.compile("end_header|texturefile", re.IGNORECASE)
Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Cloud:
    """Checked by `cloud`."""

    points: np.ndarray  # (P, 3) float32
    colours: np.ndarray  # (P, 3) uint8


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table."""

    ending: str  # of the file's name
    summary: str
    write: Callable[[Path, Cloud, Recipe | None], Iterable[object] | None]  # pieces, of what takes long


def cloud(points: Any, colours: Any = None) -> Cloud:
    """Points with colours, ready to be written. Raises bad_input for what is none."""
    hint = f"A cloud is {FEWEST} points or more, in rows of x, y and z; remove points that are no numbers."
    array = np.asarray(points)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "fiu":
        raise GenError(f"A cloud must be (points, 3) numbers, not {array.shape}.", hint, "bad_input")
    if len(array) < FEWEST:
        raise GenError(f"{len(array)} points are too few for a cloud.", hint, "bad_input")
    broken = int((~np.isfinite(array).all(1)).sum())
    if broken:
        raise GenError(
            f"{broken} of {len(array)} points are not finite (NaN or infinity).", hint, "bad_input"
        )
    array = np.ascontiguousarray(array, np.float32)
    if (array == array[0]).all():
        raise GenError("All points lie in one place.", "Give points that have some extent.", "bad_input")
    if colours is None:
        return Cloud(array, point_views.height_colours(array))
    given = np.asarray(colours)
    if given.shape != array.shape or given.dtype != np.uint8:
        raise GenError(
            f"Colours must be {array.shape} of uint8, not {given.shape} of {given.dtype}.",
            "Give red, green and blue in 0..255 for every point.",
            "bad_input",
        )
    return Cloud(array, np.ascontiguousarray(given))


def save(
    path: Path, points: Any, colours: Any = None, *, recipe: Recipe | None = None, kind: str | None = None
) -> Path:
    """Write a cloud to `path`, all of it or nothing; `kind` is a key of FORMATS, or else the name's ending.

    Raises bad_input, output_not_writable (a file of that name is never overwritten), disk_full,
    not_installed, failed.
    """
    path = Path(path)
    row = FORMATS[kind] if kind else _by_name(path)
    given = cloud(points, colours)
    if path.exists():
        raise GenError(
            f"{path} exists already, and files are never overwritten.",
            "Choose another name, or move the old one away.",
            "output_not_writable",
        )
    with artifacts.part_in(path.parent) as part:
        for _ in row.write(part, given, recipe) or ():
            pass
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    return path


def _by_name(path: Path) -> Format:
    """The last row whose ending the name has: the endings of later ones are longer."""
    named = [row for row in FORMATS.values() if path.name.lower().endswith(row.ending)]
    if not named:
        endings = ", ".join(row.ending for row in FORMATS.values())
        raise GenError(f"{path.name} names no format for clouds.", f"End it in {endings}.", "bad_input")
    return named[-1]


# ------------------------------------------------------------------------------------------------ as points


def _write_ply(path: Path, given: Cloud, recipe: Recipe | None) -> None:
    rows = np.empty(len(given.points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"], rows["rgb"] = given.points, given.colours
    header = ["ply", "format binary_little_endian 1.0", *_comments("comment", recipe)]
    header += [f"element vertex {len(rows)}", *(f"property float {axis}" for axis in "xyz")]
    header += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header"]
    path.write_bytes("\n".join(header).encode("ascii") + b"\n" + rows.tobytes())


def _write_obj(path: Path, given: Cloud, recipe: Recipe | None) -> None:
    """Colours behind the coordinates, as most programs read them; and every point as an element, for those
    that show no vertices without one."""
    lines = [*_comments("#", recipe), "o points"]
    for (x, y, z), (red, green, blue) in zip(
        given.points.tolist(), (given.colours / 255).tolist(), strict=True
    ):
        lines.append(f"v {x:.9g} {y:.9g} {z:.9g} {red:.4f} {green:.4f} {blue:.4f}")
    lines += [f"p {number}" for number in range(1, len(given.points) + 1)]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def _comments(mark: str, recipe: Recipe | None) -> Iterator[str]:
    """The recipe as lines of comments, to be joined again. Words that mean something in a header, wherever
    they stand, are spelled so that they do to readers of JSON alone."""
    if recipe is None:
        return
    text = json.dumps(recipe, separators=(",", ":"))  # ASCII, and no line breaks
    text = HEADER_WORDS.sub(lambda found: f"{found[0][:-1]}\\u{ord(found[0][-1]):04x}", text)
    for start in range(0, len(text), LINE):
        yield f"{mark} {RECIPE} {text[start : start + LINE]}"


def _write_glb_points(path: Path, given: Cloud, recipe: Recipe | None) -> None:
    light = point_views.linear(given.colours).astype(np.float32)
    points = {"POSITION": given.points, "COLOR_0": light}
    corners, faces = _beads(given.points)
    beads = {
        "POSITION": corners.reshape(-1, 3),
        "NORMAL": np.tile(OCTAHEDRON, (len(points["POSITION"]), 1)).astype(np.float32),
        "COLOR_0": np.repeat(light, len(OCTAHEDRON), axis=0),
    }
    parts = (
        Primitive("points", POINTS, points, None, material=0),
        Primitive("balls", TRIANGLES, beads, faces, material=1),
    )
    _write_glb(path, parts, recipe)


OCTAHEDRON = np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)])
SIDES = np.array([(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)])


def _beads(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners (P, 6, 3) of an octahedron around each point, and triangles (8 P, 3)."""
    radius = 0.6 * point_views.spacing(points)
    corners = points[:, None] + (radius * OCTAHEDRON).astype(np.float32)
    faces = len(OCTAHEDRON) * np.arange(len(points))[:, None, None] + SIDES
    return corners, faces.reshape(-1, 3)


# -------------------------------------------------------------------------------------------------- as a mesh


def _write_glb_mesh(path: Path, given: Cloud, recipe: Recipe | None) -> None:
    from gen.point_mesh import reconstruct

    mesh = reconstruct(given.points, given.colours)
    attributes = {
        "POSITION": mesh.vertices,
        "NORMAL": mesh.normals,
        "COLOR_0": point_views.linear(mesh.colours).astype(np.float32),
    }
    _write_glb(path, (Primitive("surface", TRIANGLES, attributes, mesh.faces, material=1),), recipe)


# glTF 2.0, ISO/IEC 12113: names of its numbers
POINTS, TRIANGLES = 0, 4
FLOAT, UNSIGNED_INT = 5126, 5125
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
GLB, JSON_CHUNK, BINARY_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942
MATERIALS = [
    {
        "name": "as coloured",
        "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1},
        "extensions": {"KHR_materials_unlit": {}},
    },
    {"name": "clay", "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 0.7}},
]


@dataclass(frozen=True)
class Primitive:
    name: str
    mode: int
    attributes: Mapping[str, np.ndarray]  # (V, 3) float32 each
    indices: np.ndarray | None
    material: int


def _write_glb(path: Path, primitives: tuple[Primitive, ...], recipe: Recipe | None) -> None:
    binary = bytearray()
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []

    def add(array: np.ndarray, target: int, **facts: Any) -> int:
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": array.nbytes, "target": target}
        views.append(view)
        binary.extend(array.tobytes())  # a multiple of four, which is all the alignment they need
        accessors.append({"bufferView": len(views) - 1, "count": array.shape[0], **facts})
        return len(accessors) - 1

    meshes = []
    for one in primitives:
        attributes = {}
        for name, array in one.attributes.items():
            facts: dict[str, Any] = {"componentType": FLOAT, "type": "VEC3"}
            if name == "POSITION":
                facts |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
            attributes[name] = add(array.astype("<f4"), ARRAY_BUFFER, **facts)
        entry: dict[str, Any] = {"attributes": attributes, "mode": one.mode, "material": one.material}
        if one.indices is not None:
            flat = one.indices.astype("<u4").reshape(-1)
            entry["indices"] = add(flat, ELEMENT_ARRAY_BUFFER, componentType=UNSIGNED_INT, type="SCALAR")
        meshes.append({"name": one.name, "primitives": [entry]})
    extras = {} if recipe is None else {"extras": {RECIPE: recipe}}
    document = {
        "asset": {"version": "2.0", "generator": "gen-studio", **extras},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": list(range(len(meshes)))}],
        "nodes": [{"name": mesh["name"], "mesh": index} for index, mesh in enumerate(meshes)],
        "meshes": meshes,
        "materials": MATERIALS,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 4)
    with path.open("wb") as file:
        file.write(struct.pack("<III", GLB, 2, 12 + 8 + len(text) + 8 + len(binary)))
        file.write(struct.pack("<II", len(text), JSON_CHUNK) + text)
        file.write(struct.pack("<II", len(binary), BINARY_CHUNK))
        file.write(binary)


# ------------------------------------------------------------------------------------------------- to look at


def _write_png(path: Path, given: Cloud, recipe: Recipe | None) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    with path.open("wb") as file:
        sheet = point_views.sheet(given.points, given.colours, size=point_views.VIEW_SIZE)
        sheet.save(file, format="PNG", pnginfo=info)


def _write_mp4(path: Path, given: Cloud, recipe: Recipe | None) -> Iterator[int]:
    """Yields the number of each frame."""
    av = _av()
    size = point_views.SIZE
    codec = next(name for name in CODECS if name in av.codecs_available)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if recipe is not None:
            container.metadata["comment"] = json.dumps(recipe)
        stream = container.add_stream(codec, rate=FRAME_RATE)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"  # what every player shows
        stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        frames = point_views.turntable(given.points, given.colours, point_views.FRAMES, size)
        for number, frame in enumerate(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            yield number
        container.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise GenError(
            "Films need the package av, which is not installed.", "Run: pip install av", "not_installed"
        ) from error
    return av


# In the order in which a page would offer them. An ending that ends in another's stands below it.
FORMATS: Mapping[str, Format] = {
    "glb": Format(
        ending=".glb",
        summary="points, for 3-D viewers; with little balls around them",
        write=_write_glb_points,
    ),
    "mesh": Format(
        ending=".mesh.glb", summary="a closed surface, for printing and modelling", write=_write_glb_mesh
    ),
    "ply": Format(ending=".ply", summary="points with colours, for point-cloud programs", write=_write_ply),
    "obj": Format(ending=".obj", summary="points with colours, as text", write=_write_obj),
    "png": Format(ending=".png", summary="a picture of the cloud from all around", write=_write_png),
    "mp4": Format(ending=".mp4", summary="a film of the cloud on a turntable", write=_write_mp4),
}


# --------------------------------------------------------------------------------------------- recipes, again


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe inside a file that `save` wrote. Raises bad_input for anything else."""
    path = Path(path)
    hint = "Give a file that gen-studio saved; other programs often strip what they do not know."
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise GenError(f"{path.name} is none of {', '.join(READERS)}.", hint, "bad_input")
    try:
        recipe = read(path)
    except FileNotFoundError:
        raise GenError(f"There is no file {path}.", "Check the name.", "bad_input") from None
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, struct.error) as error:
        raise GenError(f"{path} cannot be read ({type(error).__name__}).", hint, "bad_input") from error
    if not isinstance(recipe, dict):
        raise GenError(f"{path} carries no recipe of gen-studio.", hint, "bad_input")
    return recipe


def _recipe_of_lines(path: Path) -> Any:
    """Of the comments that a header or a text begins with."""
    with path.open("rb") as file:
        text = file.read(MOST_HEADER).partition(b"end_header")[0].decode("ascii", "replace")
    marks = tuple(f"{mark} {RECIPE} " for mark in ("comment", "#"))
    parts = [line.split(" ", 2)[2] for line in text.splitlines() if line.startswith(marks)]
    return json.loads("".join(parts)) if parts else None


def _recipe_of_glb(path: Path) -> Any:
    with path.open("rb") as file:
        magic, _, _, length, kind = struct.unpack("<IIIII", file.read(20))
        if magic != GLB or kind != JSON_CHUNK or length > MOST_HEADER:
            raise ValueError("no GLB")
        return json.loads(file.read(length))["asset"].get("extras", {}).get(RECIPE)


def _recipe_of_png(path: Path) -> Any:
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        text = image.info.get(RECIPE)  # it stands before the pixels: nothing is decoded here
    return json.loads(text) if text else None


def _recipe_of_mp4(path: Path) -> Any:
    with path.open("rb"), _av().open(str(path), format="mp4") as container:
        text = container.metadata.get("comment")
    return json.loads(text) if text else None


READERS: Mapping[str, Callable[[Path], Any]] = {
    ".ply": _recipe_of_lines,
    ".obj": _recipe_of_lines,
    ".glb": _recipe_of_glb,
    ".png": _recipe_of_png,
    ".mp4": _recipe_of_mp4,
}
