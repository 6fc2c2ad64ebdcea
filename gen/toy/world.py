"""The toy world: a procedural world of shaded solids with exact labels. It trains, judges and tests the
toy weights.

A `Scene` is three-dimensional and knows no camera: `Thing`s (shape, colour, size, material, position,
heading) stand on a ground plane with one soft light. `gen.toy.render` looks at scenes through any
`Camera`, `gen.toy.words` says them in words. Everything is a pure function of its seed.

World axes: x to the right, y away from the default camera, z up; one unit is 36 pixels at the origin of
the 128 px default view.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from gen.toy.solids import SOLIDS

# ------------------------------------------------------------------------------------------ the vocabulary

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "pyramid", "capsule", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white", "black")
SIZES = ("small", "medium", "large")
MATERIALS = ("matte", "shiny")
BACKGROUNDS = ("grey", "beige", "blue", "green", "lavender", "dark")
# How the things of a scene stand to each other: the first is R of the second; `row` is left to right.
RELATIONS = ("alone", "left of", "right of", "in front of", "behind", "on top of", "row")

RADIUS = {"small": 0.48, "medium": 0.61, "large": 0.76}  # world units
# sRGB of a matte surface in full light
PAINT = {
    "red": (0.86, 0.11, 0.11),
    "orange": (0.98, 0.47, 0.05),
    "yellow": (0.99, 0.84, 0.10),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.10, 0.80, 0.84),
    "blue": (0.11, 0.26, 0.87),
    "purple": (0.47, 0.15, 0.71),
    "pink": (0.99, 0.48, 0.70),
    "brown": (0.42, 0.23, 0.11),
    "white": (0.96, 0.96, 0.95),
    "black": (0.07, 0.07, 0.08),
}
# ground colour and the colour it fades to with distance
GROUND = {
    "grey": ((0.67, 0.68, 0.70), (0.83, 0.84, 0.86)),
    "beige": ((0.80, 0.70, 0.55), (0.93, 0.87, 0.76)),
    "blue": ((0.48, 0.64, 0.82), (0.74, 0.86, 0.97)),
    "green": ((0.52, 0.71, 0.54), (0.77, 0.90, 0.77)),
    "lavender": ((0.66, 0.58, 0.80), (0.85, 0.80, 0.95)),
    "dark": ((0.21, 0.23, 0.28), (0.10, 0.11, 0.15)),
}
# Never shown while the generator (text encoder, autoencoder, transformer) is trained, only when it is tested.
HELD_OUT = frozenset(
    {
        ("red", "torus"),
        ("orange", "cone"),
        ("yellow", "capsule"),
        ("green", "sphere"),
        ("cyan", "pyramid"),
        ("blue", "diamond"),
        ("purple", "cube"),
        ("pink", "cylinder"),
        ("white", "cone"),
        ("brown", "torus"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One solid. `position` is the point below its centre, on the ground or on what it stands on."""

    shape: str
    colour: str
    size: str
    material: str
    position: tuple[float, float, float]
    heading: float = 0.0  # radians about z

    @property
    def radius(self) -> float:
        """World units; every shape fits in about this radius."""
        return RADIUS[self.size]

    @property
    def height(self) -> float:
        """World units from the point it stands on to its top."""
        return self.radius * SOLIDS[self.shape].height

    @property
    def centre(self) -> tuple[float, float, float]:
        x, y, z = self.position
        return x, y, z + self.height * SOLIDS[self.shape].centre


@dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]  # in the order in which a caption names them
    relation: str  # of the first to the second; "alone" for one thing, "row" for three
    background: str
    light: float = 0.0  # radians about z, from the default direction


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera on a sphere around `target`. Angles in degrees; azimuth 0 looks along +y."""

    azimuth: float = 0.0
    elevation: float = 31.0
    distance: float = 7.0
    field_of_view: float = 28.5
    target: tuple[float, float, float] = (0.0, 0.0, 0.42)

    def frame(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eye (3,) and rows right, up, forward (3, 3), world coordinates."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        forward = torch.tensor([math.sin(a) * math.cos(e), math.cos(a) * math.cos(e), -math.sin(e)])
        right = torch.tensor([math.cos(a), -math.sin(a), 0.0])
        up = torch.linalg.cross(right, forward)
        return torch.tensor(self.target) - self.distance * forward, torch.stack([right, up, forward])

    def project(self, points: torch.Tensor, size: int) -> torch.Tensor:
        """(..., 3) world points -> (..., 3): column and row in pixels, and depth in world units."""
        eye, axes = self.frame()
        local = (points - eye.to(points)) @ axes.to(points).T
        focal = size / 2 / math.tan(math.radians(self.field_of_view) / 2)
        column = size / 2 + focal * local[..., 0] / local[..., 2]
        row = size / 2 - focal * local[..., 1] / local[..., 2]
        return torch.stack([column, row, local[..., 2]], dim=-1)


# ---------------------------------------------------------------------------------------------- random scenes


def _gap(a: Thing, b: Thing) -> float:
    return _width(a) + _width(b)


def _width(thing: Thing) -> float:
    return thing.radius * 0.98


def _place(things: list[Thing], relation: str, rng: random.Random) -> tuple[Thing, ...]:
    """Positions that make the relation true and leave every thing well in view."""

    def at(thing: Thing, x: float, y: float, z: float = 0.0) -> Thing:
        return replace(thing, position=(round(x, 4), round(y, 4), round(z, 4)))

    if relation == "alone":
        return (at(things[0], rng.uniform(-0.45, 0.45), rng.uniform(-0.35, 0.35)),)
    if relation == "row":
        # zigzag in depth, so that three fit side by side
        a, b, c = things
        near = rng.choice((-1, 1)) * rng.uniform(0.18, 0.32)
        x_a, x_c = -_gap(a, b) * rng.uniform(0.93, 0.99), _gap(b, c) * rng.uniform(0.93, 0.99)
        shift = -(x_a - _width(a) + x_c + _width(c)) / 2  # centre the group
        return (at(a, x_a + shift, near), at(b, shift, -near), at(c, x_c + shift, near))
    first, second = things
    if relation in ("left of", "right of"):
        left, right = (first, second) if relation == "left of" else (second, first)
        span = _gap(left, right) + rng.uniform(0.08, 0.35)
        shift = rng.uniform(-0.15, 0.15) + (_width(left) - _width(right)) / 2
        spots = {
            id(left): (-span / 2 + shift, rng.uniform(-0.3, 0.3)),
            id(right): (span / 2 + shift, rng.uniform(-0.3, 0.3)),
        }
        return at(first, *spots[id(first)]), at(second, *spots[id(second)])
    if relation in ("in front of", "behind"):
        front, back = (first, second) if relation == "in front of" else (second, first)
        deep = _gap(front, back) + rng.uniform(0.25, 0.45)
        aside = rng.choice((-1, 1)) * rng.uniform(0.25, 0.42) * _gap(front, back)
        spots = {
            id(front): (-aside / 2, -deep * 0.48),
            id(back): (aside / 2, deep * 0.52),
        }
        return at(first, *spots[id(first)]), at(second, *spots[id(second)])
    if relation == "on top of":
        x, y = rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3)
        below = at(second, x, y)
        return at(first, x, y, below.height * 0.985), below
    raise ValueError(f"no relation {relation!r}; there are {', '.join(RELATIONS)}")


def sample_thing(
    rng: random.Random, *, pairs: Iterable[tuple[str, str]] | None = None, sizes: Sequence[str] = SIZES
) -> Thing:
    """A random thing at the origin; `pairs` of (colour, shape) to draw from, else all."""
    colour, shape = (
        rng.choice(tuple(pairs)) if pairs is not None else (rng.choice(COLOURS), rng.choice(SHAPES))
    )
    solid = SOLIDS[shape]
    heading = rng.uniform(-solid.turn, solid.turn)
    if abs(heading) < solid.away:
        heading = math.copysign(solid.away + abs(heading), heading)
    return Thing(
        shape=shape,
        colour=colour,
        size=rng.choice(sizes),
        material=rng.choice(MATERIALS),
        position=(0.0, 0.0, 0.0),
        heading=round(heading, 4),
    )


@lru_cache
def colour_shape_pairs(which: str) -> tuple[tuple[str, str], ...]:
    """(colour, shape) pairs: "seen" ones train the generator, "held_out" ones only test it, "all" are
    both."""
    wanted = {"seen": (False,), "held_out": (True,), "all": (False, True)}[which]
    return tuple((c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) in wanted)


def sample_scene(
    rng: random.Random,
    *,
    relation: str | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    weights: Sequence[float] = (0.36, 0.11, 0.11, 0.09, 0.09, 0.12, 0.12),
) -> Scene:
    """A random scene. `relation` fixes how many things there are and how they stand; `weights` are per
    relation."""
    if relation is None:
        relation = rng.choices(RELATIONS, weights)[0]
    count = {"alone": 1, "row": 3}.get(relation, 2)
    things: list[Thing] = []
    for _ in range(count):
        things.append(sample_thing(rng, pairs=pairs, sizes=SIZES[:2] if relation == "on top of" else SIZES))
    if relation == "row":  # three fit side by side when two of them are small
        bigger = rng.randrange(3)
        things = [t if i == bigger else replace(t, size="small") for i, t in enumerate(things)]
    return Scene(
        things=_place(things, relation, rng),
        relation=relation,
        background=rng.choice(BACKGROUNDS),
        light=round(rng.uniform(-0.35, 0.35), 4),
    )


def scenes(seed: int, *, start: int = 0, which: str = "seen") -> Iterator[Scene]:
    """An endless stream of scenes, each a function of (seed, its index) and of the pairs to draw from
    alone."""
    pairs = colour_shape_pairs(which)
    index = start
    while True:
        yield sample_scene(random.Random(f"{seed}:{index}"), pairs=pairs)
        index += 1
