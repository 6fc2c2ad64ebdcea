"""The door for points: every usual file comes in as the same numbers, everything else is refused in words."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct

import numpy as np
import pytest

from gen import library, pictures, point_files, point_inputs
from gen.errors import GenError

POINTS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def ply(
    kind: str = "float", order: str = "binary_little_endian", before: str = "", body: bytes = b""
) -> bytes:
    """A PLY whose vertices carry a normal and a colour between other numbers."""
    header = f"ply\nformat {order} 1.0\ncomment by hand\n{before}element vertex 40\n"
    header += f"property uchar red\nproperty {kind} x\nproperty {kind} y\nproperty float nx\n"
    header += f"property {kind} z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    if order == "ascii":
        lines = [f"7 {x!r} {y!r} 0.5 {z!r}" for x, y, z in POINTS.tolist()]
        return (header + "\n".join(lines) + "\n3 0 1 2\n").encode()
    sign, code = (
        {"binary_little_endian": "<", "binary_big_endian": ">"}[order],
        {"float": "f4", "double": "f8"},
    )
    names = ["red", "x", "y", "nx", "z"]
    kinds = ["u1", *[sign + code[kind]] * 2, sign + "f4", sign + code[kind]]
    rows = np.zeros(40, np.dtype([*zip(names, kinds, strict=True)]))
    for axis, column in zip("xyz", POINTS.T, strict=True):
        rows[axis] = column
    return header.encode() + body + rows.tobytes() + b"\3" + struct.pack("<iii", 0, 1, 2)


def glb(document: dict, binary: bytes) -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks


def scene(**changes: object) -> dict:
    """A document with the points of POINTS as the corners of one mesh."""
    return {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 40, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": POINTS.nbytes}],
        "buffers": [{"byteLength": POINTS.nbytes}],
    } | changes


TEXT = "\n".join(f"{x!r} {y!r} {z!r}" for x, y, z in POINTS.tolist())
ROWS = TEXT.splitlines()
GOOD = {
    "npy": npy(POINTS),
    "npy of doubles, by columns": npy(np.asfortranarray(POINTS.astype(np.float64))),
    "ply": ply(),
    "ply of doubles": ply("double"),
    "ply, big end first": ply("double", "binary_big_endian"),
    "ply as text": ply(order="ascii"),
    "ply behind another element": ply(
        before="element camera 2\nproperty float a\nproperty uchar b\n", body=b"\0" * 10
    ),
    "glb": glb(scene(), POINTS.tobytes()),
    "xyz": TEXT.encode(),
    "xyz with colours and a comment": (
        "# made by hand\n" + "\n".join(f"{row} 255 0 0" for row in ROWS)
    ).encode(),
    "csv with a heading": ("x,y,z\r\n" + TEXT.replace(" ", ",").replace("\n", "\r\n")).encode(),
    "pts": f"40\n{TEXT}\n".encode(),
    "obj": ("mtllib /etc/passwd\no thing\n" + "\n".join(f"v {row}" for row in ROWS) + "\nf 1 2 3\n").encode(),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_the_same_points_from_everywhere_are_the_same_points(content: bytes):
    reference = point_inputs.keep(content)
    assert reference == {"sha256": hashlib.sha256(npy(POINTS)).hexdigest(), "name": "points.npy"}
    found = point_inputs.read(reference)
    assert found.dtype == np.float32 and np.array_equal(found, POINTS)


@pytest.mark.parametrize("kind", ["ply", "obj", "glb", "mesh"])
def test_files_of_the_studio_come_back_in(kind: str, tmp_path):
    ball = np.random.default_rng(1).normal(size=(600, 3))
    ball = (ball / np.linalg.norm(ball, axis=1, keepdims=True)).astype(np.float32)
    path = point_files.save(tmp_path / f"ball{point_files.FORMATS[kind].ending}", ball, recipe={"a": 1})
    found = point_inputs.read_points(path)
    if kind == "mesh":
        assert np.linalg.norm(found, axis=1).mean() == pytest.approx(1, abs=0.1)
    else:
        assert np.array_equal(found, ball), "of a GLB the points, and not the balls around them"


def test_whatever_is_handed_in_is_kept_once_under_its_sha256(tmp_path):
    path = tmp_path / "half a chair.ply"
    path.write_bytes(ply())
    text = base64.b64encode(ply()).decode()
    sources = [path, str(path), ply(), POINTS, f"data:;base64,{text}", {"data": text, "name": "a/b/c.ply"}]
    found = [point_inputs.keep(source) for source in sources]
    assert [one["name"] for one in found] == [
        *["half a chair.ply"] * 2,
        *["points.npy"] * 3,
        "c.ply",
    ]
    (kept,) = (library.home() / "inputs").iterdir()
    assert kept.name == f"{found[0]['sha256']}.npy"
    assert point_inputs.keep(found[0]) == found[0]
    kept.write_bytes(npy(POINTS + 1))
    with pytest.raises(GenError, match="is no longer the points half a chair"):
        point_inputs.read(found[0])
    kept.unlink()
    with pytest.raises(GenError, match=r"points half a chair\.ply .* no longer in"):
        point_inputs.keep(found[0])


def test_nodes_of_a_glb_place_their_meshes():
    turned = {"translation": [1, 2, 3], "rotation": [0, 0, 2**-0.5, 2**-0.5], "scale": [2, 2, 2]}
    document = scene(nodes=[{"children": [1]} | turned, {"mesh": 0}])
    found = point_inputs.read(point_inputs.keep(glb(document, POINTS.tobytes())))
    x, y, z = POINTS.T
    assert found == pytest.approx(np.stack([1 - 2 * y, 2 + 2 * x, 3 + 2 * z], axis=1), abs=1e-5)
    matrix = [0, 2, 0, 0, -2, 0, 0, 0, 0, 0, 2, 0, 1, 2, 3, 1]
    again = point_inputs.read(
        point_inputs.keep(glb(scene(nodes=[{"mesh": 0, "matrix": matrix}]), POINTS.tobytes()))
    )
    assert again == pytest.approx(found, abs=1e-5)


def broken(row: int, value: float) -> np.ndarray:
    array = POINTS.copy()
    array[row, 1] = value
    return array


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000, 3), }".ljust(117)
    + b"\n"
)
REFUSED = {
    "empty": (b"", "is empty"),
    "nan": (npy(broken(3, np.nan)), "1 of 40 points are not finite"),
    "infinity in a ply": (ply().replace(POINTS[0, :1].tobytes(), np.float32(np.inf).tobytes()), "not finite"),
    "nan in text": ((TEXT + "\nnan 0 0").encode(), "1 of 41 points are not finite"),
    "too few": (npy(POINTS[:15]), "15 points are too few"),
    "one place": (npy(np.ones((40, 3))), "All points lie in one place"),
    "far away": (npy(broken(3, 1e30)), "are no places"),
    "beyond single precision": (npy(broken(3, 1).astype(float) * 1e300), "are no places"),
    "wrong shape": (npy(POINTS.T), r"\(points, 3\) numbers, not \(3, 40\)"),
    "flat": (npy(POINTS.reshape(-1)), r"not \(120,\)"),
    "six columns": (npy(np.hstack([POINTS, POINTS])), r"not \(40, 6\)"),
    "no points": (npy(np.zeros((0, 3))), "0 points are too few"),
    "a pickle": (npy(np.array([{"a": 1}], dtype=object)), "holds object, not numbers"),
    "text in numpy": (npy(np.array([["a"] * 3] * 20)), "not numbers"),
    "numpy that lies": (HUGE, "damaged or cut short"),
    "numpy cut short": (npy(POINTS)[:300], "damaged or cut short"),
    "half a ply": (ply()[:400], "damaged or cut short"),
    "half a ply of text": (ply(order="ascii")[:700], "damaged or cut short"),
    "a ply without an end": (b"ply\nformat ascii 1.0\n" * 3, "no end of its header"),
    "a ply without points": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "no vertices"),
    "a ply of words": (b"ply\nformat morse 1.0\nelement vertex 0\nend_header\n", "its format"),
    "a ply of nothing": (
        b"ply\nformat ascii 1.0\nelement vertex 20\nproperty float x\nend_header\n" + b"1\n" * 20,
        "damaged",
    ),
    "half a glb": (glb(scene(), POINTS.tobytes())[:700], "damaged or cut short"),
    "a glb beyond its end": (glb(scene(), POINTS.tobytes()[:400]), "damaged or cut short"),
    "a glb with itself inside": (
        glb(scene(nodes=[{"mesh": 0, "children": [0]}]), POINTS.tobytes()),
        "hold each other",
    ),
    "a glb with another file": (
        glb(scene(buffers=[{"byteLength": 480, "uri": "file:///etc/passwd"}]), b""),
        "in another file",
    ),
    "a squeezed glb": (
        glb(scene(extensionsRequired=["KHR_draco_mesh_compression"]), POINTS.tobytes()),
        "KHR_draco_mesh_compression",
    ),
    "an empty glb": (glb({"asset": {}}, b""), "no points and no meshes"),
    "a glb of numbers": (glb([1], b""), "damaged"),
    "words": (b"hello, I am no cloud\n" * 20, "no file of points that is known here"),
    "two numbers a line": (b"1 2\n" * 20, "no file of points"),
    "a line cut short": ((TEXT + "\n1 2").encode(), "damaged"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 20, "no file of points"),
    "a list": ([[1, 2, 3]], "1 points are too few"),
    "an object": (object(), r"must be \(points, 3\) numbers"),
    "no file": ("/nowhere/at/all.ply", "there is no file"),
    "a folder": ("/tmp", "is no file"),
    "a device": ("/dev/zero", "is no file"),
    "no base64": ({"data": "/etc/passwd!"}, "not base64"),
    "no data": ({"data": 3}, "must be base64 text"),
    "a short reference": ({"sha256": "abc"}, "nor the reference of one"),
    "a path as reference": ({"sha256": "../../../etc/passwd"}, "nor the reference of one"),
    "a reference to nothing": ({"sha256": "0" * 64}, "no longer in"),
}


@pytest.mark.parametrize(("source", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_cloud_is_refused_in_words(source, words):
    with pytest.raises(GenError, match=words) as caught:
        point_inputs.keep(source, "Known points")
    assert caught.value.code == "bad_input"
    assert caught.value.hint and caught.value.message.endswith(".")
    assert (
        "Known points" in caught.value.message or "sha256" in str(source) or "points" in caught.value.message
    )
    assert not (library.home() / "inputs").exists(), "nothing of it is kept"


def test_too_much_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(point_inputs, "MOST_POINTS", 39)
    for content in (npy(POINTS), TEXT.encode(), ply(), glb(scene(), POINTS.tobytes())):
        with pytest.raises(GenError, match="40 points are too many; at most 39"):
            point_inputs.keep(content)
    monkeypatch.setattr(point_inputs, "MOST_POINTS", 3)
    with pytest.raises(GenError, match="more than 30 corners"):
        point_inputs.keep(glb(scene(), POINTS.tobytes()))
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(GenError, match="larger than"):
        point_inputs.keep(npy(POINTS))


@pytest.mark.parametrize("name", ["ply", "glb", "npy", "ply as text", "obj"])
def test_damage_anywhere_is_told_and_never_a_crash(name):
    random = np.random.default_rng(4)
    for _ in range(300):
        content = bytearray(GOOD[name])
        for at in random.integers(0, min(len(content), 900), 3):
            content[at] = random.integers(256)
        try:
            found = point_inputs.keep(bytes(content))
        except GenError as error:
            assert error.code == "bad_input"
        else:
            assert np.isfinite(point_inputs.read(found)).all()
