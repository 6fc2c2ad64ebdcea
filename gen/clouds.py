"""What the engine does with clouds of points: units and colours at the end, a quick look on the way.

Clouds of the embedded weights are coloured by the parts that the judge of clouds sees in them, others by
height. Shapes: P points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gen import point_files, point_views
from weights import store

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGE = "cloud-judge-toy"
LOOKS = 12  # previews of a drawing
SIDE = 256  # pixels of a preview
DOT = 3  # pixels of a point in it
SKY, FAR = (250, 250, 252), 0.45  # behind the points; brightness of the farthest of them
# From where a preview looks: rows are right, up, and towards the eye
_TURN, _TILT = math.radians(35), math.radians(22)
EYE = np.array(
    [
        (math.cos(_TURN), 0, -math.sin(_TURN)),
        (-math.sin(_TURN) * math.sin(_TILT), math.cos(_TILT), -math.cos(_TURN) * math.sin(_TILT)),
        (math.sin(_TURN) * math.cos(_TILT), math.sin(_TILT), math.cos(_TURN) * math.cos(_TILT)),
    ],
    np.float32,
)


@dataclass(frozen=True)
class Made:
    """A cloud that was drawn."""

    cloud: point_files.Cloud
    coloured_by: str  # "part" or "height"
    lacks: str = ""  # what went without


def decode(pipeline: Any, latents: Any, *, toy: bool) -> Made:
    """The cloud of latents (1, 3, P), with colours. Raises bad_input where they are no cloud."""
    points = pipeline.decode(latents)[0]
    if not toy:
        return Made(point_files.cloud(points), "height")
    colours = by_part(points)
    if colours is None:
        lacks = f"Coloured by height, as the weights {JUDGE}, which tell parts, are not on this machine."
        return Made(point_files.cloud(points), "height", lacks)
    return Made(point_files.cloud(points, colours), "part")


def by_part(points: np.ndarray) -> np.ndarray | None:
    """Colours (P, 3) uint8 of the parts of toy shapes; None without the judge. Raises corrupt_weights."""
    import torch

    from gen import loader
    from gen.toy import cloud_judge

    folder = store.find(JUDGE)
    if folder is None or not (folder / cloud_judge.FILE).is_file():
        return None
    with loader.explained(folder):
        store.read_header(folder / cloud_judge.FILE)
    _, parts = cloud_judge.read(cloud_judge.load_judge(folder), torch.from_numpy(points)[None])
    return point_views.part_colours(parts[0].numpy())


def preview(pipeline: Any, step: Any) -> Image | None:
    """The cloud that is expected by now, at every few steps and at the last."""
    if step.index % max(1, step.count // LOOKS) and step.index + 1 < step.count:
        return None
    return glance(pipeline.decode(step.latents if step.denoised is None else step.denoised)[0])


def glance(points: np.ndarray) -> Image:
    """A picture of points (P, 3) in some milliseconds: dots in the colours of their height, the near in
    front."""
    from PIL import Image

    points = np.nan_to_num(np.asarray(points, np.float32))
    low, high = np.quantile(points, (0.005, 0.995), axis=0)  # strays of early steps lie far away
    centred = (points - (low + high) / 2) / max(float(np.linalg.norm(high - low)), 1e-6)
    right, up, near = EYE @ centred.T
    order = np.argsort(near)  # painted from the back
    shade = FAR + (1 - FAR) * np.linspace(0, 1, len(order))[:, None]
    colours = (point_views.height_colours(points)[order] * shade).astype(np.uint8)
    column, row = ((SIDE * (0.5 + 0.92 * at[order])).astype(int) for at in (right, -up))
    picture = np.full((SIDE + DOT, SIDE + DOT, 3), SKY, np.uint8)
    inside = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE)
    column, row, colours = column[inside], row[inside], colours[inside]
    for y in range(DOT):
        for x in range(DOT):
            picture[row + y, column + x] = colours
    return Image.fromarray(picture[:SIDE, :SIDE])
