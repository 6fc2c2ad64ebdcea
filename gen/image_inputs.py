"""Drawing that starts from a picture, and larger pictures: which values go together, and what they mean for
files. The methods are pipelines.image_to_image; pictures and masks are kept by gen.pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from gen import pictures
from gen.catalog import STRENGTH
from gen.errors import GenError
from gen.request import Input
from pipelines import canvas  # needs no torch


@dataclass(frozen=True)
class Given:
    """What `pipeline.finish` needs beside latents, and what a person should know."""

    canvas: canvas.Canvas | None
    hires: float | None
    words: str


def settle(inputs: Mapping[str, Any], absent: Set[str], limits: Mapping[str, Input]) -> dict[str, Any]:
    """The size that follows from the image where it was left out. Raises bad_input for values that do not go
    together, before any weights are loaded."""
    image, mask, outpaint = (inputs[name] for name in ("image", "mask", "outpaint"))
    padding, hires, steps = (inputs[name] for name in ("mask_padding", "hires", "steps"))
    for name in ("mask", "outpaint"):
        if image is None and inputs[name] is not None:
            raise GenError(
                f"{limits[name].label} is given without an image.",
                "Give the picture it belongs to: --image FILE, or on the page the field Image.",
                "bad_input",
            )
    if mask is not None:
        _check_mask(image, mask)
    if image is not None and padding is not None and mask is None and outpaint is None:
        raise GenError(
            "Mask padding is what lies around a mask, and there is none.",
            "Give a mask, or leave the padding out.",
            "bad_input",
        )
    if image is not None and outpaint is None and (hires is None or inputs["strength"] > 0):
        _check_steps("strength", inputs["strength"], steps, limits)
    if hires is not None:
        _check_steps("hires_strength", inputs["hires_strength"], inputs["hires_steps"] or steps, limits)
        multiple = int(limits["width"].step or 1)
        if inputs["hires_tile"] is not None and inputs["hires_tile"] % multiple:
            raise GenError(
                f"Hires tile {inputs['hires_tile']} is not a multiple of {multiple}.",
                f"Try {inputs['hires_tile'] // multiple * multiple or multiple}.",
                "bad_input",
            )
    if image is None or padding is not None:
        return {}
    asked = {side: inputs[side] for side in ("width", "height") if side not in absent}
    size = fitted(image, limits, asked)
    _check_grown(size, outpaint, limits)
    return size


def _check_mask(image: Mapping[str, str], mask: Mapping[str, str]) -> None:
    (width, height), own = pictures.size(image), pictures.size(mask)
    if own != (width, height):
        raise GenError(
            f"The mask is {own[0]} x {own[1]} pixels and the image {width} x {height}: they must be of one "
            "size.",
            "Paint the mask on the image itself, or save it as large.",
            "bad_input",
        )
    if pictures.read(mask).getbbox() is None:
        raise GenError(
            "The mask is black everywhere, so nothing is to be drawn anew.",
            "White is what is drawn anew; leave the mask out to draw all of the image.",
            "bad_input",
        )


def _check_steps(name: str, strength: float, steps: int, limits: Mapping[str, Input]) -> None:
    if not canvas.kept_steps(steps, strength):
        words = canvas.no_steps(limits[name].label, strength, steps)
        raise GenError(f"{words}.", "Take more of it, or more steps.", "bad_input")


def fitted(
    image: Mapping[str, str], limits: Mapping[str, Input], asked: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Width and height: as asked, or else as the kept picture has them. Raises bad_input."""
    side, asked = limits["width"], asked or {}
    try:
        width, height = canvas.fitted(
            pictures.size(image),
            (asked.get("width"), asked.get("height")),
            int(side.minimum or 1),
            int(side.maximum or 1),
            int(side.step or 1),
        )
    except ValueError as error:
        words = str(error)
        raise GenError(
            f"{words[0].upper()}{words.partition(';')[0][1:]}.",
            "Crop it, or give --width and --height: then its middle is taken.",
            "bad_input",
        ) from error
    return {"width": width, "height": height}


def _check_grown(size: Mapping[str, int], outpaint: str | None, limits: Mapping[str, Input]) -> None:
    left, top, right, bottom = canvas.margins(outpaint)
    for name, more in (("width", left + right), ("height", top + bottom)):
        if not more:
            continue
        try:
            limits[name].check(size[name] + more)
        except GenError as error:
            raise GenError(
                f"Outpaint makes the {name} {size[name]} + {more} = {size[name] + more}. {error.message}",
                f"{error.hint} With --mask-padding the picture keeps its own size, however large.",
                "bad_input",
            ) from error


def given(inputs: Mapping[str, Any]) -> Given:
    """The canvas of a request, its pictures read. Raises bad_input when they are gone."""
    if inputs["image"] is None:
        return Given(None, inputs["hires"], "")
    image = pictures.read(inputs["image"])
    mask = None if inputs["mask"] is None else pictures.read(inputs["mask"])
    laid_out = canvas.lay_out(
        image,
        (inputs["height"], inputs["width"]),
        mask,
        blur=inputs["mask_blur"],
        padding=inputs["mask_padding"],
        outpaint=inputs["outpaint"],
    )
    return Given(laid_out, inputs["hires"], " ".join(_said(inputs, image.size, laid_out)))


def _said(inputs: Mapping[str, Any], own: tuple[int, int], laid_out: canvas.Canvas) -> list[str]:
    said = []
    size = inputs["width"], inputs["height"]
    if laid_out.box is not None:
        left, top, right, bottom = laid_out.box
        said.append(
            f"Of the image {right - left} x {bottom - top} pixels are drawn, at {size[0]} x {size[1]}."
        )
    elif own != size:
        cropped = "" if own[0] * size[1] == own[1] * size[0] else " and cropped around its middle"
        said.append(f"The image is {own[0]} x {own[1]} pixels; scaled{cropped} to {size[0]} x {size[1]}.")
    if laid_out.grown and inputs["strength"] != STRENGTH.default:
        said.append("With outpaint all steps are walked: strength changes nothing.")
    return said


def seen(inputs: Mapping[str, Any], native: int) -> tuple[int, int]:
    """(height, width) in pixels of the most that the network sees at once, for what memory it takes."""
    height, width = (int(inputs.get(side) or native) for side in ("height", "width"))
    if inputs.get("outpaint") and inputs.get("mask_padding") is None:
        left, top, right, bottom = canvas.margins(inputs["outpaint"])
        height, width = height + top + bottom, width + left + right
    if hires := inputs.get("hires"):
        height, width = round(height * hires), round(width * hires)
        tile = inputs.get("hires_tile") or (native if max(height, width) > 2 * native else None)
        if tile:
            height, width = min(height, tile), min(width, tile)
    return height, width
