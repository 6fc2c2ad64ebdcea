"""Points that go in: read with care from the files that other programs write, and kept under their SHA-256.

As with pictures: whatever somebody hands in becomes a file, here GEN_HOME/inputs/<sha256>.npy, and a request
holds only the reference {"sha256", "name"}. What a file holds is told by its content, never by its name, and
a file that points to others (materials, buffers, textures) is never followed.

Shapes: P points. Coordinates stay as they are, in float32; what they mean to a model is in gen.clouds.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gen import pictures, point_files
from gen.errors import GenError

ENDING = ".npy"  # of kept files
MOST_POINTS = 1_000_000  # of a file
LARGEST = 1e15  # of a coordinate
DEEPEST = 64  # nodes of a GLB below each other
HINT = (
    "Give points as PLY, GLB, OBJ, NPY of shape (points, 3), or as text with x y z on every line; at most "
    f"{MOST_POINTS:,} points and {pictures.MOST_BYTES // 2**20} MiB."
)


def keep(source: Any, label: str = "The file") -> dict[str, str]:
    """Keep points and return their reference. A reference is checked and returned as it is.

    `source`: a path, bytes, a data URL, {"data": base64 or data URL, "name": ...}, or an array (P, 3). Raises
    bad_input, disk_full, output_not_writable.
    """
    if isinstance(source, Mapping) and "data" not in source:
        return pictures.reference(source, label, ENDING, "points")
    source, name = pictures.received(source, label, HINT)
    points = _parsed(source, label) if isinstance(source, bytes) else source
    buffer = io.BytesIO()
    np.save(buffer, _checked(points, label))
    return {"sha256": pictures.store(buffer.getvalue(), ENDING), "name": name or f"points{ENDING}"}


def read(reference: Mapping[str, str]) -> np.ndarray:
    """The points (P, 3) float32 of a reference. Raises bad_input when they are gone or have been changed."""
    return _checked(_parsed(pictures.kept(reference, ENDING, "points"), reference["name"]), reference["name"])


def read_points(path: Any, label: str = "The file") -> np.ndarray:
    """The points (P, 3) float32 of a file, of which nothing is kept. Raises bad_input."""
    content, _ = pictures.received(path, label, HINT)
    return _checked(_parsed(content, label), label)


def _checked(points: Any, label: str) -> np.ndarray:
    """(P, 3) float32. Raises bad_input for what is no cloud, naming what is wrong."""
    array = np.asarray(points)
    try:
        if array.ndim == 2 and len(array) > MOST_POINTS:
            message = f"{len(array):,} points are too many; at most {MOST_POINTS:,} are read."
            raise GenError(message, "Thin them out.", "bad_input")
        if array.dtype.kind in "fiu" and array.size and np.isfinite(array).all():
            largest = float(np.abs(array.astype(np.float64)).max())
            if largest > LARGEST:
                message = f"Coordinates up to {largest:.0e} are no places."
                raise GenError(message, f"The largest that is read is {LARGEST:.0e}.", "bad_input")
        return np.array(point_files.cloud(array).points)  # its own: of a file it is read-only
    except GenError as error:
        raise GenError(f"{label}: {error.message}", error.hint, "bad_input") from None


def _parsed(content: bytes, label: str) -> np.ndarray:
    """The points of a file, by what it begins with."""
    if not content:
        raise GenError(f"{label} is empty: the file has no bytes.", HINT, "bad_input")
    if len(content) > pictures.MOST_BYTES:
        raise pictures.too_large(label)
    read = next((reader for mark, reader in READERS.items() if content.startswith(mark)), _from_text)
    try:
        return read(content)
    except _Unreadable as error:
        raise GenError(f"{label}: {error}.", HINT, "bad_input") from None
    except DAMAGED as error:
        said = f"{type(error).__name__}: {error}"[:120]
        raise GenError(f"{label} is damaged or cut short ({said}).", HINT, "bad_input") from None


# What readers stumble over in files that are not as they should be
DAMAGED: tuple[type[Exception], ...] = (
    *(
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ),
    *(SyntaxError, tokenize.TokenError),  # numpy's, of headers
)


class _Unreadable(Exception):
    """What a file has that is not read here, or lacks, for people."""


# ------------------------------------------------------------------------------------------------------- PLY

PLY_TYPES = {
    name: code
    for code, names in {
        "i1": "char int8", "u1": "uchar uint8", "i2": "short int16", "u2": "ushort uint16",
        "i4": "int int32", "u4": "uint uint32", "f4": "float float32", "f8": "double float64",
    }.items()
    for name in names.split()
}  # fmt: skip
PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
MOST_HEADER = 2**22  # bytes


def _from_ply(content: bytes) -> np.ndarray:
    """The vertices. Elements before them are skipped, those after them not looked at."""
    end = content.find(b"end_header", 0, MOST_HEADER)
    if end < 0:
        raise _Unreadable("this PLY has no end of its header")
    body = content.find(b"\n", end) + 1
    order, elements = _ply_header(content[:end].decode("latin-1"))
    lines = content[body:].splitlines() if not order else []
    for name, count, properties in elements:
        wanted = name == "vertex"
        if not order:
            if wanted:
                return _ply_lines(lines[:count], count, [one for one, _ in properties])
            lines = lines[count:]
            continue
        if any(not code for _, code in properties):
            raise _Unreadable(f"this PLY has lists in or before its vertices, in '{name[:40]}'")
        row = np.dtype([(one, order + code) for one, code in properties])
        if wanted:
            rows = np.frombuffer(content, row, count, body)
            return np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
        body += count * row.itemsize
    raise _Unreadable("this PLY has no vertices")


def _ply_header(text: str) -> tuple[str, list[tuple[str, int, list[tuple[str, str]]]]]:
    """Byte order, and elements as (name, count, properties); of a list the type is empty."""
    order, elements = None, list[tuple[str, int, list[tuple[str, str]]]]()
    for line in text.splitlines():
        match line.split():
            case ["format", name, *_]:
                order = PLY_ORDERS.get(name)
            case ["element", name, count]:
                elements.append((name, int(count), []))
            case ["property", "list", _, _, name]:
                elements[-1][2].append((name, ""))
            case ["property", kind, name]:
                elements[-1][2].append((name, PLY_TYPES[kind]))
    if order is None:
        raise _Unreadable("this PLY does not say its format")
    if any(count < 0 for _, count, _ in elements):
        raise ValueError("a negative count")
    return order, elements


def _ply_lines(lines: list[bytes], count: int, names: list[str]) -> np.ndarray:
    if len(lines) < count:
        raise ValueError(f"{count} vertices promised, {len(lines)} lines there")
    columns = [names.index(axis) for axis in "xyz"]
    return _numbers(lines, columns)


# ------------------------------------------------------------------------------------------------------- GLB


def _from_glb(content: bytes) -> np.ndarray:
    """The points of its scene, or where there are none the corners of its meshes."""
    document, binary = _glb_chunks(content)
    if document.get("extensionsRequired"):
        needs = ", ".join(map(str, document["extensionsRequired"]))[:80]
        raise _Unreadable(f"this GLB needs {needs}, which is not read here")
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}  # by whether they are points
    for mesh, placed in _glb_meshes(document):
        for primitive in document["meshes"][mesh]["primitives"]:
            corners = _glb_positions(document, binary, primitive["attributes"]["POSITION"])
            corners = corners @ placed[:3, :3].T + placed[:3, 3]
            found[primitive.get("mode", point_files.TRIANGLES) == point_files.POINTS].append(corners)
            if sum(map(len, itertools.chain(*found.values()))) > 10 * MOST_POINTS:  # one part, shown often
                raise _Unreadable(f"this GLB shows more than {10 * MOST_POINTS:,} corners")
    parts = found[True] or found[False]
    if not parts:
        raise _Unreadable("this GLB shows no points and no meshes")
    return np.concatenate(parts)


def _glb_chunks(content: bytes) -> tuple[dict[str, Any], bytes]:
    document, binary, at = None, b"", 12
    while at + 8 <= len(content):
        length, kind = struct.unpack_from("<II", content, at)
        chunk = content[at + 8 : at + 8 + length]
        if len(chunk) < length:
            raise ValueError("a chunk ends too early")
        if kind == point_files.JSON_CHUNK:
            document = json.loads(chunk)
        elif kind == point_files.BINARY_CHUNK:
            binary = chunk
        at += 8 + length
    if not isinstance(document, dict):
        raise ValueError("no JSON chunk")
    return document, binary


def _glb_meshes(document: Mapping[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Meshes of the scene, each with the matrix (4, 4) that places it."""
    nodes = document.get("nodes", [])
    scene = document.get("scenes", [{"nodes": range(len(nodes))}])[document.get("scene", 0)]
    open_nodes = [(number, np.eye(4), 0) for number in scene.get("nodes", [])]
    seen = set[int]()
    while open_nodes:
        number, above, depth = open_nodes.pop()
        if number in seen or depth > DEEPEST:
            raise ValueError("nodes that hold each other")
        seen.add(number)
        placed = above @ _glb_matrix(nodes[number])
        if "mesh" in nodes[number]:
            yield nodes[number]["mesh"], placed
        open_nodes += [(child, placed, depth + 1) for child in nodes[number].get("children", [])]


def _glb_matrix(node: Mapping[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T  # columns first
    x, y, z, w = (float(one) for one in node.get("rotation", (0, 0, 0, 1)))
    turn = np.array(
        [
            (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = turn * np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = np.array(node.get("translation", (0, 0, 0)), np.float64)
    return matrix


def _glb_positions(document: Mapping[str, Any], binary: bytes, number: int) -> np.ndarray:
    """(V, 3) of an accessor. Raises for what reaches beyond the file."""
    accessor = document["accessors"][number]
    if (accessor["componentType"], accessor["type"]) != (point_files.FLOAT, "VEC3") or "sparse" in accessor:
        raise _Unreadable("this GLB holds its coordinates in a form that is not read here")
    view = document["bufferViews"][accessor["bufferView"]]
    if "uri" in document["buffers"][view["buffer"]] or view["buffer"]:
        raise _Unreadable("this GLB keeps its coordinates in another file")
    start = int(view.get("byteOffset", 0)) + int(accessor.get("byteOffset", 0))
    stride, count = int(view.get("byteStride", 12)), int(accessor["count"])
    if start < 0 or stride < 12 or not 0 < count <= len(binary):
        raise ValueError("numbers that cannot be")
    return np.ndarray((count, 3), "<f4", binary, start, (stride, 4)).astype(np.float64)


# ----------------------------------------------------------------------------------------------- numpy, text


def _from_npy(content: bytes) -> np.ndarray:
    """Without taking the header's word for how much memory to ask for."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise _Unreadable(f"NPY files of version {version[0]}.{version[1]} are not read here")
    shape, by_columns, dtype = header[version](file)
    if dtype.hasobject or dtype.kind not in "fiu":
        raise _Unreadable(f"this NPY holds {dtype}, not numbers")
    flat = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return flat.reshape(shape, order="F" if by_columns else "C")


def _from_text(content: bytes) -> np.ndarray:
    """OBJ, of which the vertices are read, or a point on each line: numbers between blanks, commas or
    semicolons, of which the first three are read. A first line of words, or of one number, is a heading."""
    if b"\0" in content[:4096]:
        raise _Unreadable("this is no file of points that is known here")
    lines = [line for line in content.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
    vertices = [line[2:] for line in lines if line.startswith((b"v ", b"v\t"))]
    if vertices:
        return _numbers(vertices, [0, 1, 2])
    lines = [line.replace(b",", b" ").replace(b";", b" ") for line in lines]
    if lines and not _is_row(lines[0]):
        lines = lines[1:]
    if not lines or not _is_row(lines[0]):
        raise _Unreadable("this is no file of points that is known here")
    return _numbers(lines, [0, 1, 2])


def _is_row(line: bytes) -> bool:
    words = line.split()
    try:
        return len([float(word) for word in words[:3]]) == 3
    except ValueError:
        return False


def _numbers(lines: list[bytes], columns: list[int]) -> np.ndarray:
    if len(lines) > MOST_POINTS:  # told before they are read, which takes its time
        raise _Unreadable(f"{len(lines):,} points are too many; at most {MOST_POINTS:,} are read")
    rows = [[*map(line.split().__getitem__, columns)] for line in lines]
    return np.array(rows, np.float64).reshape(-1, 3)


READERS: Mapping[bytes, Callable[[bytes], np.ndarray]] = {  # by the first bytes; all else is text
    b"ply": _from_ply,
    b"glTF": _from_glb,
    b"\x93NUMPY": _from_npy,
}
