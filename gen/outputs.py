"""The table of what models make: how each kind of result is decoded, shown on the way, and written to files.

A row of the catalog names its kind in `makes`; engine, files, history and page ask the row here, and have no
branches of their own. Nothing heavy is imported at the top: the command line reads endings from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from gen.request import Input
    from weights.registry import Checkpoint

Inputs = Mapping[str, Any]
Recipe = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One row. `thing` below is what `decode` gives."""

    noun: str
    toy: str  # what toy weights know of the world
    smaller: str  # what to try when memory is too small
    endings: Mapping[str, str]  # kind of file -> ending of its name; the first is the result's own file
    picture: str  # the kind of file that a browser shows as its picture
    # pipeline, latents, (Y, X), checkpoint, what `given` gave -> thing
    decode: Callable[[Any, Any, tuple[int, int], Checkpoint, Any], Any]
    preview: Callable[[Any, Any], Image | None]  # pipeline, Step -> a small picture; None: not at this step
    seen: Callable[[Any], tuple[int, int]]  # thing -> width and height of its picture, in pixels
    # thing, kind of file, path, recipe -> of what takes long the pieces, between which it may be stopped
    write: Callable[[Any, str, Path, Recipe], Iterable[object] | None]
    size_asked: Callable[[Inputs], str]  # how large it is to be, for people; empty where that is not asked
    size_made: Callable[[Inputs, int, int], str]  # inputs, width, height -> how large it is, for people
    bytes: Callable[[Inputs, int], int]  # inputs, pixels -> room for all its files, at most
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # value of the input "files" -> more
    always: tuple[str, ...]  # kinds of files that are made of each
    sized: bool = False  # whether its weights have a native size in pixels
    said: Callable[[Any], Recipe] = lambda thing: {}  # what the recipe says of the thing beside all else
    lacks: Callable[[Any], str] = lambda thing: ""  # what a person should know of it; empty for nothing
    # Raises bad_input for values that do not go together, in view of the folder of the weights
    check: Callable[[Inputs, Path], None] = lambda inputs, folder: None
    # Values that follow from others: what is known, what was left out, all inputs with their limits ->
    # values. Raises bad_input for values that do not go together
    settle: Callable[[Inputs, Set[str], Mapping[str, Input]], Inputs] = lambda inputs, absent, limits: {}
    # What was handed in and belongs to no single argument, read before weights are loaded; None: nothing
    given: Callable[[Inputs, Path], Any] = lambda inputs, folder: None
    given_words: Callable[[Any], str] = lambda given: ""  # what was done to it, for people
    # pipeline, inputs, seed, what `given` gave -> what `denoise` is told beside the inputs' own arguments
    start: Callable[[Any, Inputs, int, Any], dict[str, Any]] = lambda pipeline, inputs, seed, given: {}

    @property
    def ending(self) -> str:
        """Of the result's own file."""
        return next(iter(self.endings.values()))

    def kinds(self, inputs: Inputs) -> tuple[str, ...]:
        """The kinds of files to make, in the table's order."""
        wanted = {*self.always, *self.files.get(inputs.get("files", ""), ())}
        return tuple(kind for kind in self.endings if kind in wanted)


# ------------------------------------------------------------------------------------------------- pictures


def _decode_image(pipeline: Any, latents: Any, size: tuple[int, int], facts: Checkpoint, given: Any) -> Image:
    if given is None:
        image: Image = pipeline.decode(latents, "pil", size=size)[0]
    else:
        image = pipeline.finish(latents, "pil", size, given.canvas, given.hires)[0]
    return image


def _settle_image(inputs: Inputs, absent: Set[str], limits: Mapping[str, Input]) -> Inputs:
    if "image" not in limits:
        return {}
    from gen import image_inputs

    return image_inputs.settle(inputs, absent, limits)


def _given_image(inputs: Inputs, folder: Path) -> Any:
    if inputs.get("image") is None and inputs.get("hires") is None:
        return None  # without loading Pillow
    from gen import image_inputs

    return image_inputs.given(inputs)


def _preview_image(pipeline: Any, step: Any) -> Image:
    """What the picture is going to be, where the solver knows it, else the noisy latents."""
    image: Image = pipeline.preview(step.latents if step.denoised is None else step.denoised)
    return image


def _write_image(thing: Any, kind: str, path: Path, recipe: Recipe) -> None:
    from gen import artifacts

    artifacts.write_png(thing, path, recipe)


# --------------------------------------------------------------------------------------------------- clouds


def _check_cloud(inputs: Inputs, folder: Path) -> None:
    if inputs["known_points"] is None and inputs["second_seed"] is None:
        return  # without loading numpy
    from gen import clouds

    clouds.check(inputs, folder)


def _given_cloud(inputs: Inputs, folder: Path) -> Any:
    from gen import clouds

    return clouds.given(inputs, folder)


def _start_cloud(pipeline: Any, inputs: Inputs, seed: int, given: Any) -> dict[str, Any]:
    from gen import clouds

    return clouds.start(pipeline, inputs, seed, given)


def _decode_cloud(pipeline: Any, latents: Any, size: tuple[int, int], facts: Checkpoint, given: Any) -> Any:
    from gen import clouds

    return clouds.decode(pipeline, latents, given, toy=facts.is_toy)


def _preview_cloud(pipeline: Any, step: Any) -> Image | None:
    from gen import clouds

    return clouds.preview(pipeline, step)


def _seen_cloud(thing: Any) -> tuple[int, int]:
    from gen import point_views

    rows = -(-point_views.VIEWS // point_views.COLUMNS)
    return point_views.COLUMNS * point_views.VIEW_SIZE, rows * point_views.VIEW_SIZE


def _write_cloud(thing: Any, kind: str, path: Path, recipe: Recipe) -> Iterable[object] | None:
    from gen import point_files

    return point_files.FORMATS[kind].write(path, thing.cloud, recipe)


OUTPUTS: Mapping[str, Output] = {
    "image": Output(
        noun="picture",
        toy="coloured shapes only",
        smaller="a smaller --size",
        endings={"png": ".png"},
        picture="png",
        always=("png",),
        decode=_decode_image,
        preview=_preview_image,
        seen=lambda thing: (thing.width, thing.height),
        write=_write_image,
        size_asked=lambda inputs: "x".join(
            str(inputs[side]) for side in ("width", "height") if side in inputs
        ),
        size_made=lambda inputs, width, height: f"{width}x{height}",
        # A PNG of noise is as large as its pixels
        bytes=lambda inputs, pixels: int(3 * pixels * (inputs.get("hires") or 1) ** 2),
        settle=_settle_image,
        given=_given_image,
        given_words=lambda given: given.words if given else "",
        sized=True,
    ),
    # The own file is GLB: nearly every viewer of three dimensions opens it, those of browsers and phones as
    # well, and it holds points as points and as little balls, for viewers that draw points as single dots.
    "cloud": Output(
        noun="cloud",
        toy="a few kinds of simple things",
        smaller="fewer --points",
        endings={  # as in gen.point_files, which loads numpy; a test compares
            "glb": ".glb",
            "mesh": ".mesh.glb",
            "ply": ".ply",
            "obj": ".obj",
            "png": ".png",
            "mp4": ".mp4",
        },
        picture="png",
        always=("glb", "ply", "obj", "png"),
        files={"points": (), "mesh": ("mesh",), "film": ("mp4",), "all": ("mesh", "mp4")},
        decode=_decode_cloud,
        preview=_preview_cloud,
        seen=_seen_cloud,
        write=_write_cloud,
        size_asked=lambda inputs: f"{inputs['points']} points",
        size_made=lambda inputs, width, height: f"{inputs['points']} points",
        bytes=lambda inputs, pixels: 500 * int(inputs["points"]) + 4 * 2**20,
        said=lambda thing: thing.said,
        lacks=lambda thing: thing.lacks,
        check=_check_cloud,
        given=_given_cloud,
        given_words=lambda given: given.words if given else "",
        start=_start_cloud,
    ),
}
