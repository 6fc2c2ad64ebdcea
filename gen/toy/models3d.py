"""A toy world of things in three dimensions: six families of shapes, functions of seven or more numbers.

A shape is a list of named parts, closed meshes of trimesh; y is up, and a shape that has a front looks along
+z (a vehicle's nose along +x). Points are drawn uniformly by area from the surface of all parts together,
then the shape is centred and scaled so that the diagonal of its box is 1, as in ShapeNet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trimesh import Trimesh

Numbers = Mapping[str, float]
Parts = list[tuple[str, "Trimesh"]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the table."""

    name: str
    ranges: Mapping[str, tuple[float, float]]  # of each number, drawn uniformly
    build: Callable[[Numbers], Parts]
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    family: str
    numbers: Numbers


# ------------------------------------------------------------------------------------------------ primitives


def _box(width: float, height: float, depth: float, x: float = 0, y: float = 0, z: float = 0) -> Trimesh:
    """With its centre at x, y, z."""
    import trimesh

    made = trimesh.creation.box((width, height, depth))
    made.apply_translation((x, y, z))
    return made


def _frustum(bottom: np.ndarray, top: np.ndarray) -> Trimesh:
    """The solid between two convex polygons (n, 3) with as many corners, in the same order."""
    import trimesh

    n = len(bottom)
    at = np.arange(n)
    after = (at + 1) % n
    sides = np.concatenate(
        [np.stack([at, after, at + n], axis=1), np.stack([after, after + n, at + n], axis=1)]
    )
    fan = np.stack([np.zeros(n - 2, int), at[1:-1], at[2:]], axis=1)
    faces = np.concatenate([sides, fan[:, ::-1], fan + n])
    corners = np.concatenate([bottom, top])
    inwards = np.linalg.det((corners - corners.mean(0))[faces]).sum() < 0  # the sign of its volume
    return trimesh.Trimesh(corners, faces[:, ::-1] if inwards else faces, process=False)


def _quad(width: float, depth: float, y: float, x: float = 0, z: float = 0) -> np.ndarray:
    """Corners (4, 3) of a rectangle that lies flat."""
    a, b = width / 2, depth / 2
    return np.array([[x - a, y, z - b], [x - a, y, z + b], [x + a, y, z + b], [x + a, y, z - b]])


def _rod(start: tuple, end: tuple, radius: float, end_radius: float | None = None) -> Trimesh:
    """A round bar from one point to another."""
    start, end = np.array(start, float), np.array(end, float)
    along = (end - start) / np.linalg.norm(end - start)
    across = np.cross(along, [1.0, 0, 0] if abs(along[0]) < 0.9 else [0, 1.0, 0])
    across /= np.linalg.norm(across)
    other = np.cross(along, across)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)[:, None]
    ring = np.cos(turn) * across + np.sin(turn) * other
    return _frustum(start + radius * ring, end + (radius if end_radius is None else end_radius) * ring)


def _turned(profile: list[tuple[float, float]]) -> Trimesh:
    """Turned around the y axis: (radius, height) from the axis below to the axis above."""
    import trimesh

    made = trimesh.creation.revolve(np.array(profile), sections=32)
    made.vertices = made.vertices[:, [1, 2, 0]]  # z up -> y up, a rotation
    return made


def _joined(*meshes: Trimesh) -> Trimesh:
    import trimesh

    return trimesh.util.concatenate(meshes)


# -------------------------------------------------------------------------------------------------- families


def _chair(n: Numbers) -> Parts:
    w, d, h, t = n["width"], n["depth"], n["height"], n["thickness"]
    splay, r = n["splay"], n["leg"]
    legs = [
        _rod(
            (sx * (w / 2 - r), h, sz * (d / 2 - r)),
            (sx * (w / 2 - r + splay), 0, sz * (d / 2 - r + splay)),
            r,
        )
        for sx in (-1, 1)
        for sz in (-1, 1)
    ]
    lean = n["lean"] * n["back"]
    back = _frustum(
        _quad(w, t, h + t, z=-d / 2 + t / 2),
        _quad(w * n["narrow"], t, h + t + n["back"], z=-d / 2 + t / 2 - lean),
    )
    return [("seat", _box(w, t, d, y=h + t / 2)), ("back", back), ("legs", _joined(*legs))]


def _table(n: Numbers) -> Parts:
    w, d, h, t, r = n["width"], n["depth"], n["height"], n["thickness"], n["leg"]
    x, z = (w / 2 - r) * (1 - n["inset"]), (d / 2 - r) * (1 - n["inset"])
    legs = [
        _rod((sx * x, h, sz * z), (sx * x, 0, sz * z), r, r * n["taper"]) for sx in (-1, 1) for sz in (-1, 1)
    ]
    return [("top", _box(w, t, d, y=h + t / 2)), ("legs", _joined(*legs))]


def _lamp(n: Numbers) -> Parts:
    base, foot, pole = n["base"], n["foot"], n["pole"]
    low, high, tall = n["shade"], n["shade"] * n["taper"], n["shade height"]
    top = foot + pole
    return [
        ("base", _turned([(0, 0), (base, 0), (0.8 * base, foot), (0, foot)])),
        ("pole", _rod((0, foot, 0), (0, top, 0), n["rod"])),
        (
            "shade",
            _turned(
                [
                    (0, top - 0.3 * tall),
                    (low, top - 0.3 * tall),
                    (high, top + 0.7 * tall),
                    (0, top + 0.7 * tall),
                ]
            ),
        ),
    ]


def _airplane(n: Numbers) -> Parts:
    length, r = n["length"], n["radius"]

    def fin(
        root_x: float, chord: float, reach: float, sweep: float, taper: float, up: bool, side: int
    ) -> Trimesh:
        thin = 0.02

        def slab(x: float, chord: float, out: float) -> np.ndarray:
            corners = [(x, -thin), (x - chord, -thin), (x - chord, thin), (x, thin)]
            if up:
                return np.array([(a, out, b) for a, b in corners])
            return np.array([(a, b, side * out) for a, b in corners])

        return _frustum(slab(root_x, chord, 0.5 * r), slab(root_x - sweep, chord * taper, reach))

    hull = [(0, -length / 2), (0.35 * r, -length / 2), (r, -0.15 * length), (r, 0.3 * length)]
    hull += [(0.75 * r, 0.42 * length), (0.35 * r, 0.48 * length), (0, length / 2)]
    fuselage = _turned(hull)
    fuselage.vertices = fuselage.vertices[:, [1, 2, 0]]  # nose along +x
    root = n["place"] * length + n["chord"] / 2
    wings = [fin(root, n["chord"], n["span"], n["sweep"], n["taper"], False, s) for s in (-1, 1)]
    aft, size = -0.38 * length, n["tail"]
    tail = [fin(aft, 0.5 * size, n["tail span"], 0.3 * size, 0.6, False, s) for s in (-1, 1)]
    tail.append(fin(aft, 0.6 * size, size + r, 0.4 * size, 0.5, True, 1))
    return [("fuselage", fuselage), ("wings", _joined(*wings)), ("tail", _joined(*tail))]


def _car(n: Numbers) -> Parts:
    length, w, h, r = n["length"], n["width"], n["body"], n["wheel"]
    low = 0.8 * r
    cabin = length * n["cabin"]
    middle = n["place"] * length
    roof = _frustum(
        _quad(cabin, 0.92 * w, low + h, x=middle),
        _quad(cabin * n["taper"], 0.78 * w, low + h + n["cabin height"], x=middle),
    )
    wheels = [
        _rod(
            (sx * n["wheelbase"] * length / 2, r, sz * 0.36 * w),
            (sx * n["wheelbase"] * length / 2, r, sz * 0.52 * w),
            r,
        )
        for sx in (-1, 1)
        for sz in (-1, 1)
    ]
    return [("body", _box(length, h, w, y=low + h / 2)), ("cabin", roof), ("wheels", _joined(*wheels))]


def _mug(n: Numbers) -> Parts:
    r, h, wall = n["radius"], n["height"], n["wall"]
    top = r * n["flare"]
    cup = _turned(
        [(0, 0), (r, 0), (top, h), (top - wall, h), (r - wall, wall), (0, wall)],
    )
    size, out, thick = n["handle"] * h / 2, n["reach"], n["grip"]
    turn = np.linspace(-np.pi / 2, np.pi / 2, 9)
    middle = h * n["place"]
    start = (r + top) / 2 - wall / 2
    spine = [(start + out * np.cos(a), middle + size * np.sin(a), 0.0) for a in turn]
    handle = [_rod(a, b, thick) for a, b in itertools.pairwise(spine)]
    return [("cup", cup), ("handle", _joined(*handle))]


def _families(*rows: Family) -> dict[str, Family]:
    return {row.name: row for row in rows}


FAMILIES = _families(
    Family(
        name="airplane",
        ranges={
            "length": (1.6, 2.4),
            "radius": (0.1, 0.2),
            "span": (0.8, 1.3),
            "chord": (0.28, 0.5),
            "sweep": (0.0, 0.6),
            "taper": (0.3, 0.9),
            "place": (-0.05, 0.15),
            "tail": (0.25, 0.5),
            "tail span": (0.3, 0.5),
        },
        build=_airplane,
        parts=("fuselage", "wings", "tail"),
    ),
    Family(
        name="car",
        ranges={
            "length": (1.8, 2.6),
            "width": (0.8, 1.1),
            "body": (0.28, 0.45),
            "cabin": (0.4, 0.65),
            "cabin height": (0.25, 0.45),
            "taper": (0.55, 0.9),
            "place": (-0.12, 0.05),
            "wheel": (0.16, 0.26),
            "wheelbase": (0.52, 0.68),
        },
        build=_car,
        parts=("body", "cabin", "wheels"),
    ),
    Family(
        name="chair",
        ranges={
            "width": (0.8, 1.2),
            "depth": (0.8, 1.2),
            "height": (0.7, 1.1),
            "thickness": (0.06, 0.16),
            "back": (0.6, 1.3),
            "lean": (0.0, 0.3),
            "narrow": (0.6, 1.0),
            "leg": (0.04, 0.09),
            "splay": (0.0, 0.2),
        },
        build=_chair,
        parts=("seat", "back", "legs"),
    ),
    Family(
        name="lamp",
        ranges={
            "base": (0.25, 0.5),
            "foot": (0.04, 0.15),
            "pole": (0.7, 1.6),
            "rod": (0.025, 0.06),
            "shade": (0.3, 0.6),
            "taper": (0.3, 0.9),
            "shade height": (0.3, 0.7),
        },
        build=_lamp,
        parts=("base", "pole", "shade"),
    ),
    Family(
        name="mug",
        ranges={
            "radius": (0.35, 0.6),
            "height": (0.6, 1.2),
            "flare": (0.8, 1.2),
            "wall": (0.04, 0.1),
            "handle": (0.45, 0.8),
            "reach": (0.18, 0.4),
            "grip": (0.03, 0.07),
            "place": (0.42, 0.58),
        },
        build=_mug,
        parts=("cup", "handle"),
    ),
    Family(
        name="table",
        ranges={
            "width": (1.2, 2.4),
            "depth": (0.8, 1.6),
            "height": (0.7, 1.4),
            "thickness": (0.05, 0.16),
            "leg": (0.04, 0.12),
            "taper": (0.4, 1.0),
            "inset": (0.0, 0.3),
        },
        build=_table,
        parts=("top", "legs"),
    ),
)
NAMES = tuple(FAMILIES)  # in the order of their class ids
PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))


def shapes(seed: int | str, *, start: int = 0) -> Iterator[Shape]:
    """An endless stream of shapes, families in turn, each a function of (seed, its index)."""
    index = start
    while True:
        rng = random.Random(f"shapes:{seed}:{index}")
        family = FAMILIES[NAMES[index % len(NAMES)]]
        yield Shape(
            family=family.name, numbers={k: rng.uniform(*limits) for k, limits in family.ranges.items()}
        )
        index += 1


def build(shape: Shape) -> Parts:
    """Its parts as meshes, in its own units."""
    return FAMILIES[shape.family].build(shape.numbers)


def cloud(shape: Shape, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 3) float32 and for each the index in `PARTS` of what it lies on, uint8."""
    rng = np.random.default_rng(seed)
    parts = build(shape)
    triangles = np.concatenate([np.asarray(mesh.triangles) for _, mesh in parts])
    owners = np.concatenate([np.full(len(mesh.faces), PARTS.index(name), np.uint8) for name, mesh in parts])
    areas = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
    )
    picks = rng.choice(len(areas), count, p=areas / areas.sum())
    a, b = rng.random((2, count, 1))
    flip = a + b > 1
    a, b = np.where(flip, 1 - a, a), np.where(flip, 1 - b, b)
    corner, second, third = (triangles[picks, k] for k in range(3))
    points = corner + a * (second - corner) + b * (third - corner)
    low, high = triangles.reshape(-1, 3).min(0), triangles.reshape(-1, 3).max(0)
    points = (points - (low + high) / 2) / np.linalg.norm(high - low)
    return points.astype(np.float32), owners[picks]
