"""Pictures of clouds of points, drawn by numpy: little balls under a wide sky, on a turntable.

Every point becomes a ball that is large enough to touch its neighbours. How much of the sky a ball sees is
found out once per cloud, by looking at the cloud from all over the sky; what is left for each frame is a
depth buffer and a few sums per pixel. Light comes with the camera, so that every side is well lit.

Points are (P, 3) in rows, y up. Shapes: P points, Y X rows and columns of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 60  # of a turntable
SIZE = 400  # pixels per side of a frame
VIEWS, COLUMNS, VIEW_SIZE = 8, 4, 320  # of a sheet

FINER = 2  # pixels drawn per side of a pixel shown
TILT = math.radians(22)  # of the camera, looking down
START = math.radians(-35)  # of the turntable: a front is seen from its side and a little from above
OPENING = math.radians(28)  # of the camera's view
SKY = 96  # directions from which the sky shines
SKY_SIZE = 72  # pixels per side of a look at the cloud from the sky
NEIGHBOURS = 16

# Of parts of things: those that stand next to each other are easily told apart.
PALETTE = np.array(
    [
        (58, 134, 200),
        (240, 160, 60),
        (88, 178, 128),
        (228, 98, 98),
        (140, 112, 200),
        (64, 178, 190),
        (232, 128, 168),
        (240, 205, 120),
    ],
    np.uint8,
)
# Of clouds without colours, from the ground to the top
HEIGHTS = np.array([(72, 92, 168), (58, 150, 186), (110, 190, 160), (240, 196, 112)], np.float32)
BACKGROUND = np.array([(250, 250, 252), (222, 226, 234)], np.float32)  # above and below


def part_colours(parts: np.ndarray) -> np.ndarray:
    """Numbers of parts (P,) to colours (P, 3) uint8."""
    return PALETTE[np.asarray(parts, dtype=np.int64) % len(PALETTE)]


def height_colours(points: np.ndarray) -> np.ndarray:
    """(P, 3) uint8 for a cloud that has no colours."""
    heights = points[:, 1]
    low, high = np.quantile(heights, (0.01, 0.99))
    share = np.clip((heights - low) / max(high - low, 1e-9), 0, 1) * (len(HEIGHTS) - 1)
    stops = np.arange(len(HEIGHTS))
    return (
        np.stack([np.interp(share, stops, column) for column in HEIGHTS.T], axis=1).round().astype(np.uint8)
    )


def normals(points: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """(P, 3): the direction in which each point's neighbours spread least. Which side is out is not known."""
    from scipy.spatial import cKDTree

    _, near = cKDTree(points).query(points, min(neighbours, len(points)))
    apart = points[near] - points[near].mean(1, keepdims=True)
    _, axes = np.linalg.eigh(np.einsum("pki,pkj->pij", apart, apart))
    return axes[:, :, 0]


def spacing(points: np.ndarray) -> float:
    """About how far a point is from the next along the surface."""
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(points).query(points, min(7, len(points)))
    return float(np.median(distances[:, -1])) / 2


@dataclass(frozen=True)
class Scene:
    """A cloud made ready to be looked at from any side: in a ball of radius 1 around the origin."""

    points: np.ndarray  # (P, 3)
    normals: np.ndarray  # (P, 3)
    colours: np.ndarray  # (P, 3), linear light in 0..1
    sky: np.ndarray  # (P,): share of the sky that is seen
    radius: float  # of the balls
    ground: float  # its height
    shadow: np.ndarray  # (Y, X) in 0..1, on the ground; rows along z


def arrange(points: np.ndarray, colours: np.ndarray | None = None) -> Scene:
    """`points` (P, 3) and `colours` (P, 3) uint8; without colours those of the height."""
    points = np.asarray(points, np.float64)
    colours = height_colours(points) if colours is None else colours
    low, high = points.min(0), points.max(0)
    points = points - (low + high) / 2
    points /= np.linalg.norm(points, axis=1).max()
    radius = float(np.clip(0.85 * spacing(points), 0.004, 0.1))
    ground = float(points[:, 1].min()) - radius
    sky = _sky_seen(points, radius)
    return Scene(
        points,
        normals(points),
        linear(colours).astype(np.float32),
        sky.astype(np.float32),
        radius,
        ground,
        _shadow(points, radius, ground),
    )


def draw(scene: Scene, turn: float = START, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: the cloud seen from `turn` radians around it."""
    from scipy import ndimage

    side = size * FINER
    axes = _camera(turn)
    distance = 1.08 / math.sin(OPENING / 2)
    focal = side / 2 / math.tan(OPENING / 2)
    seen = (scene.points @ axes.T).astype(np.float32)  # right, up, towards the camera
    depth = distance - seen[:, 2]
    centre_x = side / 2 + focal * seen[:, 0] / depth
    centre_y = side / 2 - focal * seen[:, 1] / depth
    reach = focal * scene.radius / depth
    owner, near = _balls(centre_x, centre_y, depth, reach, scene.radius, side)

    rows, columns = np.nonzero(owner >= 0)
    which = owner[rows, columns]
    # The ball's own roundness, on the roundness of the surface that it stands on
    across = (columns + 0.5 - centre_x[which]) / reach[which]
    up = (centre_y[which] - rows - 0.5) / reach[which]
    out = np.sqrt(np.clip(1 - across**2 - up**2, 0, 1))
    surface = (scene.normals @ axes.T).astype(np.float32)
    surface *= np.where(surface[:, 2:] < 0, -1, 1)
    facing = 0.5 * np.stack([across, up, out], axis=1).astype(np.float32) + 0.8 * surface[which]
    facing /= np.sqrt(np.einsum("ni,ni->n", facing, facing))[:, None]
    # Far behind what is around it in the picture: a crease or a gap
    far = np.where(owner >= 0, near, distance + 1)[:: 2 * FINER, :: 2 * FINER]
    around = ndimage.gaussian_filter(far, side / (120 * FINER))[rows // (2 * FINER), columns // (2 * FINER)]
    crease = np.clip((near[rows, columns] - around) / 0.35, 0, 1)
    sky = scene.sky[which] * (1 - 0.55 * crease)
    key = np.clip(facing @ KEY * 0.8 + 0.2, 0, None) * (0.35 + 0.65 * sky)
    fill = np.clip(facing @ FILL, 0, None)
    gloss = 0.12 * np.clip(facing @ HALF, 0, 1) ** 40 * sky
    light = np.stack([0.62 * sky, 0.8 * key, 0.16 * fill], axis=1) @ np.stack(
        [SKY_LIGHT, KEY_LIGHT, FILL_LIGHT]
    )
    shaded = np.zeros((side, side, 4), np.float32)  # and whether there is a ball
    shaded[rows, columns, :3] = scene.colours[which] * light + gloss[:, None]
    shaded[rows, columns, 3] = 1
    shaded = shaded.reshape(size, FINER, size, FINER, 4).mean((1, 3))
    backdrop = _backdrop(scene, axes, distance, focal / FINER, size)
    return srgb(shaded[..., :3] + backdrop * (1 - shaded[..., 3:]))


def turntable(
    points: np.ndarray, colours: np.ndarray | None = None, frames: int = FRAMES, size: int = SIZE
) -> Iterator[np.ndarray]:
    """Frames (size, size, 3) uint8 of one turn; the next after the last would be the first."""
    scene = arrange(points, colours)
    for index in range(frames):
        yield draw(scene, START + 2 * math.pi * index / frames, size)


def sheet(
    points: np.ndarray,
    colours: np.ndarray | None = None,
    views: int = VIEWS,
    columns: int = COLUMNS,
    size: int = VIEW_SIZE,
) -> Image:
    """Views from all around in one picture, row by row."""
    from PIL import Image

    rows = -(-views // columns)
    picture = Image.new("RGB", (columns * size, rows * size), tuple(BACKGROUND[1].astype(int)))
    for index, frame in enumerate(turntable(points, colours, views, size)):
        picture.paste(Image.fromarray(frame), (index % columns * size, index // columns * size))
    return picture


# Lights, in the camera's axes: right, up, towards it
def _unit(*direction: float) -> np.ndarray:
    return np.array(direction) / math.hypot(*direction)


KEY, FILL = _unit(-0.5, 0.75, 0.6), _unit(0.8, 0.1, 0.4)
HALF = (KEY + _unit(0, 0, 1)) / np.linalg.norm(KEY + _unit(0, 0, 1))
KEY_LIGHT, FILL_LIGHT, SKY_LIGHT = np.array([[1, 0.97, 0.92], [0.8, 0.9, 1], [0.95, 0.98, 1.05]])
SHADE = np.array([0.62, 0.60, 0.57], np.float32)  # of the light on the floor, what its darkest spot lacks

EMPTY = np.iinfo(np.int64).max  # of a pixel without a ball
REACH, TEXELS = 2.0, 50.0  # the shadow's picture: from -REACH to REACH, so many pixels per unit


def _camera(turn: float) -> np.ndarray:
    """Its axes as rows: right, up, and from the thing towards the camera."""
    towards = np.array([math.sin(-turn) * math.cos(TILT), math.sin(TILT), math.cos(-turn) * math.cos(TILT)])
    right = np.array([math.cos(-turn), 0, -math.sin(-turn)])
    return np.stack([right, np.cross(towards, right), towards])


def _balls(
    x: np.ndarray, y: np.ndarray, depth: np.ndarray, reach: np.ndarray, radius: float, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which ball is seen in each pixel (-1 for none), and how far away it is there: both (side, side)."""
    steps = np.arange(-math.ceil(reach.max()), math.ceil(reach.max()) + 1)
    columns, rows = (np.floor(at).astype(np.int64)[:, None] + steps for at in (x, y))
    off_x, off_y = (
        ((cells + 0.5 - at[:, None]) / reach[:, None]).astype(np.float32) ** 2
        for cells, at in ((columns, x), (rows, y))
    )
    off_x[(columns < 0) | (columns >= side)] = 2
    off_y[(rows < 0) | (rows >= side)] = 2
    off = off_y[:, :, None] + off_x[:, None]
    ball, row, column = np.nonzero(off < 1)
    near = depth[ball] - radius * np.sqrt(1 - off[ball, row, column])
    pixel = rows[ball, row] * side + columns[ball, column]
    # The nearest of each pixel: depth in the high bits, the ball in the low ones
    scale = 2**30 / (float(depth.max()) + radius)
    keys = np.full(side * side, EMPTY)
    np.minimum.at(keys, pixel, (near * scale).astype(np.int64) << 32 | ball)
    empty = keys == EMPTY
    owner = np.where(empty, -1, keys & 0xFFFFFFFF).reshape(side, side)
    return owner, np.where(empty, np.inf, (keys >> 32) / scale).astype(np.float32).reshape(side, side)


def _sky_seen(points: np.ndarray, radius: float) -> np.ndarray:
    """(P,) in 0..1: the share of the sky from which each point is seen, straight above counting most."""
    from scipy.spatial import cKDTree

    golden = math.pi * (3 - math.sqrt(5))
    heights = 1 - (np.arange(SKY) + 0.5) / SKY * 1.35  # a little from below as well: the ground is bright
    seen, weights = np.zeros(len(points)), np.clip(heights + 0.45, 0.1, None)
    scale = SKY_SIZE / 2 / (1 + 3 * radius)
    wide = np.full(len(points), max(1.5 * radius * scale, 0.8))
    for index, (height, weight) in enumerate(zip(heights, weights, strict=True)):
        towards = _unit(
            math.cos(golden * index) * math.sqrt(1 - height**2),
            height,
            math.sin(golden * index) * math.sqrt(1 - height**2),
        )
        right = np.cross([0.0, 1.0, 1e-3], towards)
        right /= np.linalg.norm(right)
        x, y = points @ right, points @ np.cross(towards, right)
        away = 2 - points @ towards
        column, row = SKY_SIZE / 2 + scale * x, SKY_SIZE / 2 - scale * y
        _, near = _balls(column, row, away, wide, 0.0, SKY_SIZE)
        at = near[row.astype(int).clip(0, SKY_SIZE - 1), column.astype(int).clip(0, SKY_SIZE - 1)]
        seen += weight * (away <= at + 3.0 * radius)
    _, close = cKDTree(points).query(points, min(8, len(points)))
    return (seen / weights.sum())[close].mean(1)


def _shadow(points: np.ndarray, radius: float, ground: float) -> np.ndarray:
    """(Y, X) in 0..1: how much of the sky is missing on the ground; rows along z."""
    from scipy import ndimage

    side = round(2 * REACH * TEXELS)
    total = np.zeros((side, side))
    for soft, weight in ((2.0, 0.45), (6.0, 0.35), (16.0, 0.35)):
        texture = np.zeros((side, side))
        # The higher, the fainter and the wider
        share = np.exp(-(points[:, 1] - ground) / (0.06 * soft))
        at = ((points[:, [2, 0]] + REACH) * TEXELS).astype(int).clip(0, side - 1)
        np.add.at(texture, (at[:, 0], at[:, 1]), share)
        blurred = ndimage.gaussian_filter(texture, soft)
        total += weight * (1 - np.exp(-blurred * 9 * (radius * TEXELS) ** 2))
    return np.clip(total, 0, 1)


def _backdrop(scene: Scene, axes: np.ndarray, distance: float, focal: float, side: int) -> np.ndarray:
    """(side, side, 3) in linear light: a bright room without corners, and the shadow on its floor."""
    from scipy import ndimage

    middle = ((np.arange(side) + 0.5 - side / 2) / focal).astype(np.float32)
    share = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    share = share**2 * (3 - 2 * share)
    picture = linear(BACKGROUND[0]) * (1 - share) + linear(BACKGROUND[1]) * share
    edge = (middle**2 + middle[:, None] ** 2) / (2 * middle[-1] ** 2)
    # Where the ray of a pixel meets the floor; below the horizon in all of the picture
    right, up, back = axes.astype(np.float32)
    x, y = middle[None], -middle[:, None]
    fall = np.minimum(x * right[1] + y * up[1] - back[1], -1e-6)
    far = (scene.ground - back[1] * distance) / fall
    across, along = (
        back[axis] * distance + far * (x * right[axis] + y * up[axis] - back[axis]) for axis in (0, 2)
    )
    texels = [(along + REACH) * TEXELS - 0.5, (across + REACH) * TEXELS - 0.5]
    dark = ndimage.map_coordinates(scene.shadow, texels, order=1, mode="constant", output=np.float32)
    return picture * (1 - 0.10 * edge[..., None]) * (1 - dark[..., None] * SHADE)


def linear(srgb: np.ndarray) -> np.ndarray:
    """0..255 to linear light in 0..1."""
    values = np.asarray(srgb, np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb(light: np.ndarray) -> np.ndarray:
    """Linear light to uint8."""
    values = np.clip(light, 0, 1)
    values = np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)
    return (values * 255 + 0.5).astype(np.uint8)
