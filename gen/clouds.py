"""What the engine does with clouds of points: known points and seeds to go between at the start, a quick look
on the way, units and colours at the end.

Clouds of the embedded weights are coloured by the parts that the judge of clouds sees in them, others by
height. Known points are drawn around in the space of the weights, and the cloud is handed out in that of
their file, where they lie as they lay. Shapes: P points, K known points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gen import point_files, point_inputs, point_views
from gen.errors import GenError
from weights import store

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGE = "cloud-judge-toy"
LOOKS = 12  # previews of a drawing
SIDE = 256  # pixels of a preview
DOT = 3  # pixels of a point in it
SKY, DIM = (250, 250, 252), 0.45  # behind the points; brightness of the farthest of them
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


# Names of parts of a shape -> axis and side of the middle of its box
PARTS = {"left": (0, -1), "right": (0, 1), "bottom": (1, -1), "top": (1, 1), "back": (2, -1), "front": (2, 1)}
FITS = ("auto", "as-is", "box")
# In spreads of the data: how far from their mean points may lie to be taken for points of its space, how long
# they must be, and how long the box of a shape is.
FAR, SHORT, LONG = 6.0, 1.0, 6.0
NOISY = ("ddpm", "sa")  # schedulers that add noise on the way; as in pipelines.dit3d, which loads torch
NOISY_CLASSES = (
    *("PointDiffusion", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "LCMSolver"),
    "SASolverScheduler",
)


@dataclass(frozen=True, kw_only=True)
class Known:
    """Points that stay: those of a file, or of a part of it. A place of the file is `times` one of the
    weights' space, and `shift`."""

    points: np.ndarray  # (K, 3) float32, in the file's units
    of: int  # in the file
    times: float
    shift: np.ndarray  # (3,) float64
    name: str  # of the file
    part: str

    @property
    def fitted(self) -> np.ndarray:
        """(K, 3) float32 in the space of the weights; bit-equal where nothing had to be fitted."""
        if self.as_is:
            return self.points
        return np.asarray((self.points.astype(np.float64) - self.shift) / self.times, np.float32)

    @property
    def as_is(self) -> bool:
        return self.times == 1 and not self.shift.any()

    @property
    def words(self) -> str:
        """What was done, for people."""
        which = "all" if self.part == "all" else f"the {self.part} part"
        kept = f"Known points: {len(self.points)} of {self.of} in {self.name} are kept ({which})"
        if self.as_is:
            return f"{kept}, as they are."
        moved = " ".join(f"{value:.4g}" for value in self.shift)
        return (
            f"{kept}. The file is {self.times:.4g} times as large as the space of the weights and moved by "
            f"{moved}; the cloud is drawn in that space and handed out in the units of the file."
        )

    @property
    def recipe(self) -> dict[str, Any]:
        return {"points": len(self.points), "times": self.times, "shift": self.shift.tolist()}


@dataclass(frozen=True)
class Made:
    """A cloud that was drawn."""

    cloud: point_files.Cloud
    coloured_by: str  # "part" or "height"
    lacks: str = ""  # what went without
    known: Known | None = None

    @property
    def said(self) -> dict[str, Any]:
        """For the recipe."""
        return {"coloured_by": self.coloured_by, **({"known": self.known.recipe} if self.known else {})}


def check(inputs: Mapping[str, Any], folder: Path) -> None:
    """Raise bad_input for values that do not go together."""
    if inputs["second_seed"] is not None:
        _check_between(inputs, folder)
    known = given(inputs, folder)
    if known is not None and len(known.points) >= inputs["points"]:
        raise GenError(
            f"{len(known.points)} points are known, and the whole cloud is to have {inputs['points']}: there "
            "is nothing to draw.",
            f"Keep a part of them (--known-part {' or '.join(PARTS)}), or ask for more with --points.",
            "bad_input",
        )


def _check_between(inputs: Mapping[str, Any], folder: Path) -> None:
    name = inputs["scheduler"]
    own = _read(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if name in NOISY or (name == "default" and own in NOISY_CLASSES):
        raise GenError(
            f"Between two seeds the way is lost in the noise that the scheduler '{name}' adds.",
            "Take --scheduler dpm++, which adds none.",
            "bad_input",
        )
    if inputs["blend"] is not None and inputs["count"] > 1:
        raise GenError(
            f"Blend is one place between the two seeds, and {inputs['count']} clouds are asked for.",
            "Leave blend out to have them spread from the one seed to the other, or ask for one.",
            "bad_input",
        )
    if inputs["seed"] == inputs["second_seed"]:
        raise GenError("Both seeds are the same: there is nothing between.", "Change one.", "bad_input")


def given(inputs: Mapping[str, Any], folder: Path) -> Known | None:
    """The known points, brought to the space of the weights in the folder. Raises bad_input."""
    reference = inputs["known_points"]
    if reference is None:
        return None
    points = point_inputs.read(reference)
    times, shift = _fit(points, inputs["known_fit"], folder)
    part, kept = inputs["known_part"], points
    if part != "all":
        axis, side = PARTS[part]
        middle = (points[:, axis].min() + points[:, axis].max()) / 2
        kept = points[(points[:, axis] - middle) * side > 0]
        if not len(kept):
            message = f"No point of {reference['name']} lies in its {part} part."
            raise GenError(message, f"Keep another: {', '.join(PARTS)}.", "bad_input")
    return Known(points=kept, of=len(points), times=times, shift=shift, name=reference["name"], part=part)


def _fit(points: np.ndarray, fit: str, folder: Path) -> tuple[float, np.ndarray]:
    """How the space of the weights becomes that of the file: times, and shift."""
    index = _read(folder / "model_index.json")
    try:
        mean, std = np.array(index["mean"], np.float64).reshape(3), float(index["std"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"{folder / 'model_index.json'} does not say the units of its clouds."
        raise GenError(message, "Fetch or train the weights again.", "corrupt_weights") from error
    low, high = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    longest = float((high - low).max())
    reach = max(np.abs(low - mean).max(), np.abs(high - mean).max())
    belongs = reach <= FAR * std and longest >= SHORT * std
    if fit == "as-is" or (fit == "auto" and belongs):
        return 1.0, np.zeros(3)
    times = longest / (LONG * std)
    return times, (low + high) / 2 - times * mean


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenError(f"{path} cannot be read.", "Fetch the weights again.", "corrupt_weights") from error
    return found if isinstance(found, dict) else {}


def start(pipeline: Any, inputs: Mapping[str, Any], seed: int, known: Known | None) -> dict[str, Any]:
    """What `denoise` is told beside the values that it takes itself."""
    told: dict[str, Any] = {} if known is None else {"known_points": known.fitted}
    if inputs["second_seed"] is None:
        return told
    blend = 0.5 if inputs["blend"] is None else inputs["blend"]
    return told | {"latents": pipeline.noise_at(seed, inputs["second_seed"], blend, inputs["points"])}


def decode(pipeline: Any, latents: Any, known: Known | None = None, *, toy: bool) -> Made:
    """The cloud of latents (1, 3, P), with colours. Raises bad_input where they are no cloud."""
    points = pipeline.decode(latents, known_points=None if known is None else known.fitted)[0]
    colours = by_part(points) if toy else None
    if known is not None and not known.as_is:
        points = np.asarray(points.astype(np.float64) * known.times + known.shift, np.float32)
        points[: len(known.points)] = known.points
    if colours is not None:
        return Made(point_files.cloud(points, colours), "part", known=known)
    lacks = f"Coloured by height, as the weights {JUDGE}, which tell parts, are not on this machine."
    return Made(point_files.cloud(points), "height", lacks if toy else "", known)


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
    shade = DIM + (1 - DIM) * np.linspace(0, 1, len(order))[:, None]
    colours = (point_views.height_colours(points)[order] * shade).astype(np.uint8)
    column, row = ((SIDE * (0.5 + 0.92 * at[order])).astype(int) for at in (right, -up))
    picture = np.full((SIDE + DOT, SIDE + DOT, 3), SKY, np.uint8)
    inside = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE)
    column, row, colours = column[inside], row[inside], colours[inside]
    for y in range(DOT):
        for x in range(DOT):
            picture[row + y, column + x] = colours
    return Image.fromarray(picture[:SIDE, :SIDE])
