"""Toy world: a procedural world of shaded solids with exact labels. It trains, judges and tests the toy
weights.

A `Scene` is three-dimensional and knows no camera: `Thing`s (shape, colour, size, material, position,
heading) stand on a ground plane with one soft light. `render` looks at scenes through any `Camera`;
`sample_scene` draws a random one, and `describe` says it in words. Everything is a pure function of its
seed.

World axes: x to the right, y away from the default camera, z up; one unit is 36 pixels at the origin of
the 128 px default view. Rendering is sphere tracing of signed distances, vectorised over all things of
one shape, with coverage anti-aliasing from the closest approach of each ray, and shadows softened by the
ray's clearance (the technique of Inigo Quilez, "soft shadows in raymarched SDFs").
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

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


# ------------------------------------------------------------------------------------------------- the solids
# Signed distances in a frame scaled to radius 1, centred on the solid; lower bounds are enough.


def _smooth_max(a: torch.Tensor, b: torch.Tensor, k: float = 0.06) -> torch.Tensor:
    return torch.maximum(a, b) + (k - (a - b).abs()).clamp_min(0).square() / (4 * k)


def _sphere(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x * x + y * y + z * z).sqrt() - 0.92


def _cube(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x, y, z = x.abs() - 0.69, y.abs() - 0.69, z.abs() - 0.69
    outside = (x.clamp_min(0).square() + y.clamp_min(0).square() + z.clamp_min(0).square()).sqrt()
    return outside + torch.maximum(torch.maximum(x, y), z).clamp_max(0) - 0.07


def _cylinder(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    side, cap = (x * x + y * y).sqrt() - 0.63, z.abs() - 0.78
    outside = (side.clamp_min(0).square() + cap.clamp_min(0).square()).sqrt()
    return outside + torch.maximum(side, cap).clamp_max(0) - 0.07


def _cone(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    # apex at z = 1.02, base radius 0.84 at z = -0.95
    slope = math.hypot(0.84, 1.97)
    side = ((x * x + y * y).sqrt() * 1.97 + (z - 1.02) * 0.84) / slope
    return _smooth_max(side, -0.95 - z)


def _torus(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    ring = (x * x + z * z).sqrt() - 0.68  # upright: the hole looks along y
    return (ring * ring + y * y).sqrt() - 0.29


def _pyramid(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    # apex at z = 0.72, square base of half-width 0.9 at z = -0.66
    slope = math.hypot(0.9, 1.38)
    side = (torch.maximum(x.abs(), y.abs()) * 1.38 + (z - 0.72) * 0.9) / slope
    return _smooth_max(side, -0.66 - z, 0.04)


def _capsule(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x = (x.abs() - 0.56).clamp_min(0)
    return (x * x + y * y + z * z).sqrt() - 0.50


def _diamond(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x.abs() * 1.2 + y.abs() * 1.2 + z.abs() - 1.0) / math.sqrt(2 * 1.2**2 + 1) - 0.012


@dataclass(frozen=True)
class Solid:
    distance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    height: float  # bottom to top, in radii
    centre: float  # of the height, where the local origin lies
    bound: float  # radius of a sphere around the local origin that holds the solid
    turn: float  # headings are drawn in +-turn radians
    away: float = 0.0  # headings nearer to 0 than this are moved away, so that corners show


SOLIDS = {
    "sphere": Solid(_sphere, 1.84, 0.5, 0.95, 0.0),
    "cube": Solid(_cube, 1.52, 0.5, 1.28, 0.75, 0.2),
    "cylinder": Solid(_cylinder, 1.70, 0.5, 1.10, 0.0),
    "cone": Solid(_cone, 1.93, 0.49, 1.28, 0.0),
    "torus": Solid(_torus, 1.94, 0.5, 0.99, 0.55),
    "pyramid": Solid(_pyramid, 1.36, 0.485, 1.44, 0.75, 0.2),
    "capsule": Solid(_capsule, 1.00, 0.5, 1.07, 0.5),
    "diamond": Solid(_diamond, 2.03, 0.5, 1.03, 0.7, 0.2),
}
_BY_BOUND = {s: SOLIDS[s].bound for s in SHAPES}


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


# -------------------------------------------------------------------------------------------------- in words

SHAPE_WORDS = {
    "sphere": ("sphere", "ball", "sphere", "ball", "orb", "globe"),
    "cube": ("cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "can", "drum"),
    "cone": ("cone",),
    "torus": ("torus", "ring", "donut", "torus", "doughnut"),
    "pyramid": ("pyramid",),
    "capsule": ("capsule", "capsule", "pill"),
    "diamond": ("diamond", "diamond", "octahedron", "gem"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "green": ("green", "green", "green", "emerald"),
    "cyan": ("cyan", "cyan", "turquoise", "teal"),
    "blue": ("blue", "blue", "blue", "navy"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose"),
    "brown": ("brown", "brown", "chocolate"),
    "white": ("white", "white", "ivory"),
    "black": ("black", "black", "ebony"),
}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "large", "big", "huge"),
}
MATERIAL_WORDS = {
    "matte": ("matte", "matte", "dull", "rubber", "matt"),
    "shiny": ("shiny", "metallic", "glossy", "metal", "polished"),
}
BACKGROUND_WORDS = {
    "grey": ("grey", "gray", "light grey"),
    "beige": ("beige", "sand-coloured", "cream"),
    "blue": ("blue", "sky blue", "pale blue"),
    "green": ("green", "pale green", "mint green"),
    "lavender": ("lavender", "lilac", "purple"),
    "dark": ("dark", "black", "night"),
}
RELATION_WORDS = {
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left of {b}",
        "{a} and {b}",
        "{a} next to {b}",
        "{a} on the left and {b} on the right",
        "on the left {a}, on the right {b}",
        "{a} on the left side of {b}",
        "left of {b} is {a}",
        "to the left of {b} there is {a}",
        "{a} beside {b}",
    ),
    "right of": (
        "{a} to the right of {b}",
        "{a} right of {b}",
        "{a} on the right of {b}",
        "{a} on the right and {b} on the left",
        "on the right {a}, on the left {b}",
        "{a} on the right side of {b}",
        "right of {b} is {a}",
        "to the right of {b} there is {a}",
    ),
    "in front of": (
        "{a} in front of {b}",
        "{a} before {b}",
        "in front of {b} there is {a}",
        "{a} standing in front of {b}",
        "in front of {b} is {a}",
        "{a} in the foreground and {b} in the background",
    ),
    "behind": (
        "{a} behind {b}",
        "{a} standing behind {b}",
        "behind {b} there is {a}",
        "behind {b} is {a}",
        "{a} at the back of {b}",
        "{a} in back of {b}",
    ),
    "on top of": (
        "{a} on top of {b}",
        "{a} on {b}",
        "{a} above {b}",
        "{a} standing on {b}",
        "on top of {b} there is {a}",
        "{b} under {a}",
        "{b} below {a}",
        "{a} stacked on {b}",
        "{b} with {a} on top",
    ),
    "row": (
        "{a}, {b} and {c}",
        "{a}, {b}, and {c}",
        "from left to right {a}, {b} and {c}",
        "a row of {a}, {b} and {c}",
        "{a}, {b}, {c}",
        "{a} next to {b} next to {c}",
        "{a}, then {b}, then {c}",
        "{b} between {a} and {c}",
        "{a} left of {b} and {c} right of {b2}",
    ),
}
OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "a photo of ",
    "an image of ",
    "a render of ",
    "there is ",
    "a 3d render of ",
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence and what it says: None where it leaves an attribute open. Things are in the scene's
    order."""

    text: str
    relation: str
    things: tuple[dict[str, str | None], ...] = field(default=())
    background: str | None = None


def _phrase(
    thing: Thing, rng: random.Random, detail: float, article: bool
) -> tuple[str, dict[str, str | None]]:
    size = rng.choice(SIZE_WORDS[thing.size]) if rng.random() < detail else None
    material = rng.choice(MATERIAL_WORDS[thing.material]) if rng.random() < detail else None
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    extras = [w for w in (size, material) if w]
    if len(extras) == 2 and rng.random() < 0.25:
        extras.reverse()
    form = rng.random()
    if form < 0.88:
        words = [*extras, colour, shape]
    elif form < 0.94:  # "a cube that is red"
        words = [*extras, shape, "that is", colour]
    else:  # "a red small cube"
        words = [colour, *extras, shape]
    text = " ".join(words)
    if article:
        start = rng.random()
        text = (
            f"the {text}"
            if start < 0.08
            else f"one {text}"
            if start < 0.12
            else f"a{'n' if text[0] in 'aeiou' else ''} {text}"
        )
    said = {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size if size else None,
        "material": thing.material if material else None,
    }
    return text, said


def describe(scene: Scene, rng: random.Random) -> Caption:
    """The scene in words: synonyms, articles, word order and how much is said vary with `rng`."""
    detail = rng.choice((0.0, 0.0, 0.3, 0.6, 1.0))
    article = rng.random() < 0.92
    phrases, said = zip(*(_phrase(t, rng, detail, article) for t in scene.things), strict=True)
    if scene.relation == "alone":
        text = phrases[0]
    else:
        names = dict(zip("abc", phrases, strict=False))
        text = rng.choice(RELATION_WORDS[scene.relation]).format(
            **names, b2="it" if rng.random() < 0.5 else names["b"]
        )
    opening = rng.choice(OPENINGS)
    if not (opening == "there is " and ("there is" in text or " is " in text)):
        text = opening + text
    background = None
    if rng.random() < 0.3:
        word = rng.choice(BACKGROUND_WORDS[scene.background])
        article_b = "an" if word[0] in "aeiou" else "a"
        background = scene.background
        text += rng.choice(
            (
                f" on {article_b} {word} background",
                f" on {article_b} {word} ground",
                f", {word} background",
                f" against {article_b} {word} background",
                f" on {article_b} {word} floor",
            )
        )
    return Caption(text=text, relation=scene.relation, things=said, background=background)


# ------------------------------------------------------------------------------------------------- rendering


def _linear(rgb: torch.Tensor) -> torch.Tensor:
    return rgb.clamp_min(0) ** 2.2


def _table(rows: dict, device: torch.device | str) -> torch.Tensor:
    return _linear(torch.tensor([rows[k] for k in rows], dtype=torch.float32, device=device))


@dataclass
class _Flat:
    """Scenes as tensors, one row a thing: T things of B scenes, ordered by scene."""

    scene: torch.Tensor  # (T,) which scene
    shape: list[str]
    colour: torch.Tensor  # (T,)
    shiny: torch.Tensor  # (T,)
    centre: torch.Tensor  # (T, 3)
    radius: torch.Tensor  # (T,)
    cos: torch.Tensor
    sin: torch.Tensor
    background: torch.Tensor  # (B,)
    light: torch.Tensor  # (B, 3) unit vector towards the light


def _flatten(batch: Sequence[Scene], device: torch.device | str) -> _Flat:
    things = [(i, t) for i, s in enumerate(batch) for t in s.things]

    def tensor(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    heading = tensor([t.heading for _, t in things])
    azimuth = tensor([s.light for s in batch]) - 0.75  # the light stands to the left and in front
    up = math.sin(math.radians(52))
    flat = math.cos(math.radians(52))
    return _Flat(
        scene=tensor([i for i, _ in things], torch.long),
        shape=[t.shape for _, t in things],
        colour=tensor([COLOURS.index(t.colour) for _, t in things], torch.long),
        shiny=tensor([float(t.material == "shiny") for _, t in things]),
        centre=tensor([t.centre for _, t in things]).reshape(-1, 3),
        radius=tensor([t.radius for _, t in things]),
        cos=heading.cos(),
        sin=heading.sin(),
        background=tensor([BACKGROUNDS.index(s.background) for s in batch], torch.long),
        light=torch.stack(
            [azimuth.sin() * flat, -azimuth.cos() * flat, torch.full_like(azimuth, up)], dim=-1
        ),
    )


class _Local:
    """World points and directions (n, P, 3) in the unit frames of n things (rotated by -heading, scaled
    by 1/radius)."""

    def __init__(self, flat: _Flat, index: torch.Tensor) -> None:
        self.centre = flat.centre[index][:, None]
        self.radius = flat.radius[index][:, None]
        self.cos, self.sin = flat.cos[index][:, None], flat.sin[index][:, None]

    def direction(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, z = d.unbind(-1)
        return x * self.cos + y * self.sin, y * self.cos - x * self.sin, z

    def point(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.direction((p - self.centre) / self.radius[..., None])

    def world(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.stack([x * self.cos - y * self.sin, x * self.sin + y * self.cos, z], dim=-1)


def _shadow(
    solid: Solid, local: _Local, points: torch.Tensor, light: torch.Tensor, steps: int
) -> torch.Tensor:
    """How much of the light and of the sky reaches `points` (n, P, 3) past one thing each: (n, P, 2) in
    0..1."""
    px, py, pz = local.point(points)
    lx, ly, lz = local.direction(light)
    near = -(px * lx + py * ly + pz * lz)  # where the ray is closest to the centre
    t = (near - solid.bound).clamp_min(0.02)
    ambient = (0.42 + 0.58 * (solid.distance(px, py, pz) / 0.75)).clamp(0.42, 1)
    clearance = torch.ones_like(t)
    for _ in range(steps):
        d = solid.distance(px + t * lx, py + t * ly, pz + t * lz)
        clearance = torch.minimum(clearance, d / (0.16 * t + 0.03))
        t = t + d.clamp(0.06, 0.6)
    clearance = torch.where(near + solid.bound > 0.02, clearance, torch.ones_like(t)).clamp(-1, 1) * 0.5 + 0.5
    return torch.stack([clearance * clearance * (3 - 2 * clearance), ambient], dim=-1)


def _groups(flat: _Flat, width: torch.Tensor | None = None) -> Iterator[tuple[Solid, torch.Tensor]]:
    """Things of one shape together, and of one window width if given."""
    keys: dict[tuple[str, int], list[int]] = {}
    widths = width.tolist() if width is not None else [0] * len(flat.shape)
    for i, (shape, w) in enumerate(zip(flat.shape, widths, strict=True)):
        keys.setdefault((shape, int(w)), []).append(i)
    for (shape, _), index in keys.items():
        yield SOLIDS[shape], torch.tensor(index, device=flat.centre.device)


def _pairs(flat: _Flat) -> list[tuple[int, int]]:
    """(receiver, caster) for every two things of one scene."""
    by_scene: dict[int, list[int]] = {}
    for i, s in enumerate(flat.scene.tolist()):
        by_scene.setdefault(s, []).append(i)
    return [(a, b) for group in by_scene.values() for a in group for b in group if a != b]


def _environment(d: torch.Tensor, sky: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """What a mirror sees: ground below, a bright horizon, and a soft box overhead. d (..., 3) -> (..., 3)."""
    z = d[..., 2:]
    box = torch.sigmoid((z - 0.62) * 14) * torch.sigmoid((0.97 - z) * 30)
    above = sky * (0.55 + 0.45 * z.clamp(0, 1)) + 1.1 * box
    return torch.lerp(ground * 0.55, above, torch.sigmoid(z * 9))


@torch.inference_mode()
def render(
    batch: Sequence[Scene],
    *,
    camera: Camera | None = None,
    size: int = 128,
    device: torch.device | str = "cpu",
    return_owner: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, size, size) float32 in 0..1. With `return_owner` also (B, size, size) int64: the
    number of the thing seen in each pixel, counted within its scene, or -1 for the ground."""
    camera = camera or Camera()
    flat = _flatten(batch, device)
    eye, axes = (t.to(device) for t in camera.frame())
    focal = size / 2 / math.tan(math.radians(camera.field_of_view) / 2)
    B, T = len(batch), len(flat.shape)
    grounds = _table({k: v[0] for k, v in GROUND.items()}, device)[flat.background]
    skies = _table({k: v[1] for k, v in GROUND.items()}, device)[flat.background]

    # --- the ground: its colour fades with distance, its shadows are computed at half size (they are soft)
    def rays(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        d = (
            torch.stack(
                [(column - size / 2) / focal, (size / 2 - row) / focal, torch.ones_like(column)], dim=-1
            )
            @ axes
        )
        return d / d.norm(dim=-1, keepdim=True)

    axis = torch.arange(size, device=device) + 0.5
    d_full = rays(axis[None, :].expand(size, size), axis[:, None].expand(size, size))
    reach = eye[2] / (-d_full[..., 2]).clamp_min(1e-3)
    far = torch.sigmoid((reach - camera.distance * 1.5) / (camera.distance * 0.14))
    far = torch.where(d_full[..., 2] < -1e-3, far, torch.ones_like(far))
    half = size // 2
    axis = (torch.arange(half, device=device) + 0.5) * 2
    d_half = rays(axis[None, :].expand(half, half), axis[:, None].expand(half, half)).reshape(-1, 3)
    floor = eye + d_half * (eye[2] / (-d_half[:, 2]).clamp_min(0.05))[:, None]
    lit = torch.ones(B, half * half, 2, device=device)
    for solid, index in _groups(flat):
        owner = flat.scene[index]
        part = _shadow(solid, _Local(flat, index), floor[None], flat.light[owner][:, None], 12)
        # several things of a scene can have one shape, so multiply one by one
        for k in range(len(index)):
            lit[owner[k]] *= part[k]
    lit = torch.nn.functional.interpolate(
        lit.view(B, half, half, 2).permute(0, 3, 1, 2),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
    )
    sun = (0.42 + 0.58 * lit[:, 0]) * lit[:, 1].sqrt()
    pool = 1.06 - 0.16 * ((floor[:, 0] ** 2 + floor[:, 1] ** 2) / 9).clamp(0, 1).view(half, half)
    pool = torch.nn.functional.interpolate(
        pool[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0]
    image = grounds[:, None, None] * (sun * pool)[..., None]
    image = torch.lerp(image, skies[:, None, None].expand_as(image), far[None, ..., None])

    # --- the things: each traced in a window around itself
    owner_map = torch.full((B, size, size), -1, dtype=torch.long, device=device)
    if T:
        bounds = torch.tensor([_BY_BOUND[s] for s in flat.shape], device=device) * flat.radius
        spot = camera.project(flat.centre, size)
        apparent = focal * bounds / (spot[:, 2].square() - bounds.square()).clamp_min(0.05).sqrt()
        width = (2 * (apparent + 2.5) / 16).ceil() * 16
        paints = _table(PAINT, device)
        layers = []
        colours: list[torch.Tensor] = [torch.empty(0)] * T
        others: dict[int, list[int]] = {}
        for a, b in _pairs(flat):
            others.setdefault(a, []).append(b)
        for solid, index in _groups(flat, width):
            n, w = len(index), int(width[index[0]])
            local = _Local(flat, index)
            corner = (spot[index, :2] - w / 2).round()
            grid = torch.arange(w, device=device) + 0.5
            column = (corner[:, 0, None] + grid)[:, None, :].expand(n, w, w).reshape(n, -1)
            row = (corner[:, 1, None] + grid)[:, :, None].expand(n, w, w).reshape(n, -1)
            d = rays(column, row)
            dx, dy, dz = local.direction(d)
            ox, oy, oz = local.point(eye[None, None])
            along = -(ox * dx + oy * dy + oz * dz)
            t = (along - solid.bound).clamp_min(0)
            pixel = 1 / focal  # width of a pixel at distance 1
            best, best_t = torch.full_like(t, 9.0), t
            for _ in range(22):
                gap = solid.distance(ox + t * dx, oy + t * dy, oz + t * dz)
                closer = gap / t < best
                best, best_t = torch.where(closer, gap / t, best), torch.where(closer, t, best_t)
                t = t + gap
            cover = (1 - best / pixel).clamp(0, 1)
            t = torch.where(cover >= 1, t, best_t)
            x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
            # normal by four evaluations at the corners of a tetrahedron
            e = 0.012
            f1 = solid.distance(x + e, y - e, z - e)
            f2 = solid.distance(x - e, y - e, z + e)
            f3 = solid.distance(x - e, y + e, z - e)
            f4 = solid.distance(x + e, y + e, z + e)
            normal = local.world(f1 - f2 - f3 + f4, -f1 - f2 + f3 + f4, -f1 + f2 - f3 + f4)
            normal = torch.nn.functional.normalize(normal, dim=-1)
            points = eye + d * (t * local.radius)[..., None]

            # light and sky that reach it past the other things of the scene
            reach_light = torch.ones(n, w * w, 2, device=device)
            casting = [(k, b) for k, i in enumerate(index.tolist()) for b in others.get(i, ())]
            by_shape: dict[str, list[tuple[int, int]]] = {}
            for k, b in casting:
                by_shape.setdefault(flat.shape[b], []).append((k, b))
            for shape, pairs in by_shape.items():
                rows = torch.tensor([k for k, _ in pairs], device=device)
                casters = torch.tensor([b for _, b in pairs], device=device)
                towards = flat.light[flat.scene[casters]][:, None]
                part = _shadow(
                    SOLIDS[shape], _Local(flat, casters), points[rows] + 0.02 * normal[rows], towards, 9
                )
                for m, k in enumerate(rows.tolist()):
                    reach_light[k] *= part[m]

            owner = flat.scene[index]
            light = flat.light[owner][:, None]
            sky, ground = skies[owner][:, None], grounds[owner][:, None]
            paint = paints[flat.colour[index]][:, None]
            shiny = flat.shiny[index][:, None, None]
            n_l = (normal * light).sum(-1, keepdim=True)
            direct = n_l.clamp_min(0) * reach_light[..., :1]
            hemisphere = torch.lerp(ground * 0.5, 0.35 * sky + 0.35, normal[..., 2:] * 0.5 + 0.5)
            # the ground darkens the foot of things that stand on it
            foot = (points[..., 2:] / 0.45).clamp(0, 1) * 0.35 + 0.65
            ambient = hemisphere * foot * reach_light[..., 1:]
            mirror = d - 2 * (d * normal).sum(-1, keepdim=True) * normal
            fresnel = (1 + (d * normal).sum(-1, keepdim=True)).clamp(0, 1) ** 4
            glint = (mirror * light).sum(-1, keepdim=True).clamp_min(0)
            matte = paint * (0.62 * ambient + 0.82 * direct) + 0.05 * glint**12 * reach_light[..., :1]
            seen = _environment(mirror, sky, ground) * foot
            metal = (
                paint * (0.30 * ambient + 0.50 * direct)
                + (0.62 * paint + 0.05) * seen
                + fresnel * 0.30 * seen
                + 1.5 * glint**60 * reach_light[..., :1]
            )
            colour = torch.lerp(matte, metal, shiny)
            depth = torch.where(cover > 0, t * local.radius, torch.full_like(t, 1e9))
            for k, i in enumerate(index.tolist()):
                colours[i] = colour[k].view(w, w, 3)
                layers.append((float((depth[k]).min()), i, k, cover[k].view(w, w), corner[k], w))
        # paint from far to near; a thing on top of another comes after it
        layers.sort(key=lambda layer: (-layer[0] + 0.0, layer[1]))
        first = {}
        for i, s in enumerate(flat.scene.tolist()):
            first.setdefault(s, i)
        for _, i, _, cover, corner, w in layers:
            s = int(flat.scene[i])
            c0, r0 = int(corner[0]), int(corner[1])
            left, top = max(c0, 0), max(r0, 0)
            right, bottom = min(c0 + w, size), min(r0 + w, size)
            if left >= right or top >= bottom:
                continue
            box = (slice(top - r0, bottom - r0), slice(left - c0, right - c0))
            alpha = cover[box][..., None]
            target = image[s, top:bottom, left:right]
            target.lerp_(colours[i][box], alpha)
            owner_map[s, top:bottom, left:right][cover[box] > 0.5] = i - first[s]
    # a soft shoulder instead of clipping, then sRGB
    image = torch.where(image > 0.8, 0.8 + 0.25 * torch.tanh((image - 0.8) / 0.25), image)
    image = image.clamp(0, 1) ** (1 / 2.2)
    image = image.permute(0, 3, 1, 2).contiguous()
    return (image, owner_map) if return_owner else image
