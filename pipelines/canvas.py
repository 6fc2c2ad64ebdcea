"""What is drawn of a picture that is handed in, and what of it stays: fitting, growing, masks, putting back.

Pictures are PIL images and stay in 8 bits, so that what a mask leaves alone is equal in every bit. Needs no
torch: a request is judged by these functions before weights are loaded. Sizes of pictures are (width, height)
as PIL has them; `size` arguments are (height, width) as pipelines have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIDES = ("left", "top", "right", "bottom")
MOST_GROWTH = 8192  # pixels per side
WHITE = 128  # greys of a mask from which on it is white
Margins = tuple[int, int, int, int]  # left, top, right, bottom


def margins(outpaint: str | Mapping[str, int] | Sequence[int] | None) -> Margins:
    """Pixels by which the canvas grows on each side: "left=64,right=64", "64,0,64,0" or "64" for all sides.

    Raises ValueError for anything else, and when nothing grows; None grows nothing.
    """
    if outpaint is None:
        return 0, 0, 0, 0
    if isinstance(outpaint, str):
        grown = _margins(outpaint)
    elif isinstance(outpaint, Mapping):
        if unknown := [side for side in outpaint if side not in SIDES]:
            raise ValueError(f"outpaint has the sides {', '.join(SIDES)}, not {unknown[0]!r}")
        grown = [outpaint.get(side, 0) for side in SIDES]
    else:
        grown = list(outpaint)
    if len(grown) != 4 or any(isinstance(one, bool) or not isinstance(one, int) for one in grown):
        raise ValueError(f"outpaint needs whole numbers of pixels for {', '.join(SIDES)}, not {outpaint!r}")
    if min(grown) < 0 or max(grown) > MOST_GROWTH:
        raise ValueError(f"outpaint grows each side by 0 to {MOST_GROWTH} pixels, not {outpaint!r}")
    if not any(grown):
        raise ValueError("outpaint grows no side")
    left, top, right, bottom = grown
    return left, top, right, bottom


def _margins(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    try:
        if "=" not in text:
            numbers = [int(part) for part in parts]
            return numbers * 4 if len(numbers) == 1 else numbers
        named: dict[str, int] = {}
        for part in parts:
            side, _, number = part.partition("=")
            if side.strip() not in SIDES or side.strip() in named:
                raise ValueError
            named[side.strip()] = int(number)
    except ValueError:
        raise ValueError(
            f'outpaint is written "left=64,right=64", or "64,0,64,0" for {", ".join(SIDES)}, not {text!r}'
        ) from None
    return [named.get(side, 0) for side in SIDES]


def margins_text(grown: Margins) -> str:
    """`left=64,right=64`: the form in which it is written down."""
    return ",".join(f"{side}={pixels}" for side, pixels in zip(SIDES, grown, strict=True) if pixels)


def kept_steps(steps: int, strength: float) -> int:
    """How many of the steps are walked: the last ones, as in diffusers."""
    return min(int(steps * strength), steps)


def no_steps(name: str, strength: float, steps: int) -> str:
    """Why a strength is refused that leaves no step to walk."""
    least = math.ceil(100 / steps) / 100
    return f"{name} {strength:g} of {steps} steps leaves none to walk; the least is {least:g}"


def fitted(
    picture: tuple[int, int],  # (width, height)
    wanted: tuple[int | None, int | None],  # (width, height), what was asked for
    smallest: int,
    largest: int,
    multiple: int,
) -> tuple[int, int]:
    """(width, height) at which a picture is drawn: its own where that is possible, else the nearest.

    Raises ValueError for a picture so long and narrow that no size comes near.
    """
    low, high = -(-smallest // multiple) * multiple, largest // multiple * multiple
    long, short = max(picture), min(picture)
    if wanted == (None, None) and long * low > short * high:
        raise ValueError(
            f"the picture is {picture[0]} x {picture[1]} pixels, and no side may be more than "
            f"{high / low:.3g} times the other; crop it, or say width and height, and its middle is taken"
        )
    if wanted == (None, None):
        scale = min(1.0, high / long)
        scale = max(scale, low / short)
    else:
        scale = next(ask / own for ask, own in zip(wanted, picture, strict=True) if ask is not None)

    def side(ask: int | None, own: int) -> int:
        return ask or min(max(round(own * scale / multiple) * multiple, low), high)

    return side(wanted[0], picture[0]), side(wanted[1], picture[1])


@dataclass(frozen=True)
class Canvas:
    """A picture laid out for drawing."""

    whole: Image  # RGB: the picture, fitted and grown; what stays is taken from here
    mask: Image | None  # L, as large: 255 is drawn anew, 0 stays, between is mixed; None: all is drawn
    size: tuple[int, int]  # (height, width) at which `box` is drawn
    box: tuple[int, int, int, int] | None  # left, top, right, bottom of what is drawn, perhaps beyond
    grown: bool = False  # whether parts of it are new

    def picture(self, size: tuple[int, int]) -> Image:
        """What is drawn, at this (height, width)."""
        return _drawn(self.whole, self.box, self.size, size)

    def free(self, size: tuple[int, int]) -> Image | None:
        """The mask over what is drawn, at this (height, width)."""
        return None if self.mask is None else _drawn(self.mask, self.box, self.size, size)

    def finish(self, drawn: Image) -> Image:
        """The drawn part in its place, and everything else as it was, enlarged if the whole was."""
        from PIL import Image as pil

        if self.mask is None:
            return drawn
        if self.box is None:
            whole, mask = self.whole, self.mask
            if drawn.size != whole.size:
                whole = whole.resize(drawn.size, pil.Resampling.LANCZOS)
                mask = mask.resize(drawn.size, pil.Resampling.BILINEAR)
            return pil.composite(drawn, whole, mask)
        left, top, right, bottom = self.box
        layer = self.whole.copy()
        layer.paste(drawn.resize((right - left, bottom - top), pil.Resampling.LANCZOS), (left, top))
        return pil.composite(layer, self.whole, self.mask)


def lay_out(
    image: Image | np.ndarray,
    size: tuple[int, int],  # (height, width) of the picture, or with `padding` of what is drawn
    mask: Image | np.ndarray | None = None,  # as large as the image; white is drawn anew
    *,
    blur: int = 0,  # pixels over which the mask's edge is feathered, on either side of it
    padding: int | None = None,  # pixels around the mask: only that part is drawn; None: all of the picture
    outpaint: str | Mapping[str, int] | Sequence[int] | None = None,
) -> Canvas:
    """The canvas of a picture.

    Without `padding` the picture is fitted to `size`, covering it from the middle, and then grows. With it
    the picture keeps its own size, and the part around the mask is drawn at `size`.

    Raises ValueError: no picture, a mask of another size, a mask that is black everywhere, bad `outpaint`.
    """
    import numpy as np
    from PIL import Image as pil

    picture, area = as_rgb(image), None
    grown = margins(outpaint)
    if mask is not None:
        area = as_mask(mask)
        if area.size != picture.size:
            raise ValueError(
                f"mask_image is {area.width} x {area.height} pixels and the image {picture.width} x "
                f"{picture.height}; they must be of one size"
            )
    if padding is None:
        picture = cover(picture, size)
        area = None if area is None else as_mask(cover(area, size))
    if any(grown):
        left, top, right, bottom = grown
        around = ((top, bottom), (left, right))
        before = np.zeros((picture.height, picture.width), "uint8") if area is None else np.asarray(area)
        # The seam lies inside the picture, so that all of what is new is drawn anew
        rows, columns = before.shape
        stays = np.zeros(before.shape, bool)
        stays[
            blur if top else 0 : rows - (blur if bottom else 0),
            blur if left else 0 : columns - (blur if right else 0),
        ] = True
        before = np.where(stays, before, 255).astype("uint8")
        area = pil.fromarray(np.pad(before, around, constant_values=255))
        picture = pil.fromarray(np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge"))
    if area is None:
        return Canvas(picture, None, size, None)
    if area.getbbox() is None:
        raise ValueError("mask_image is black everywhere: nothing is to be drawn anew; white is")
    soft = feathered(area, blur)
    if padding is None:
        return Canvas(picture, soft, (picture.height, picture.width), None, any(grown))
    box = _around(soft, padding, size)
    return Canvas(picture, soft, size, box, any(grown))


def as_rgb(image: Any) -> Image:
    """A PIL image, or an array (Y, X, 3) of uint8, as RGB. Raises ValueError for anything else."""
    return _plain(image, "image").convert("RGB")


def as_mask(mask: Any) -> Image:
    """A PIL image or an array of uint8 as a mask: 255 where it is nearer to white, else 0."""
    return _plain(mask, "mask_image").convert("L").point(lambda grey: 255 if grey >= WHITE else 0)


def _plain(image: Any, name: str) -> Image:
    from PIL import Image as pil

    if isinstance(image, pil.Image):
        return image
    shape: tuple[int, ...] = tuple(getattr(image, "shape", ()))
    dtype = str(getattr(image, "dtype", ""))
    if dtype != "uint8" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3):
        what = f"an array of {dtype} {shape}" if dtype else type(image).__name__
        raise ValueError(f"{name} must be a PIL image or an array (Y, X, 3) of uint8, not {what}")
    return pil.fromarray(image)


def cover(picture: Image, size: tuple[int, int]) -> Image:
    """Resized until it covers the size, and cut from the middle."""
    from PIL import Image as pil
    from PIL import ImageOps

    height, width = size
    if picture.size == (width, height):
        return picture
    kind = pil.Resampling.BILINEAR if picture.mode == "L" else pil.Resampling.LANCZOS
    return ImageOps.fit(picture, (width, height), kind)


def feathered(mask: Image, pixels: int) -> Image:
    """The mask with its edge spread over so many pixels on either side; beyond them it is what it was."""
    from PIL import ImageFilter

    if not pixels:
        return mask
    # Two boxes: their reach is what their radii add up to, where a Gaussian's would have no end.
    for radius in (pixels // 2, pixels - pixels // 2):
        mask = mask.filter(ImageFilter.BoxBlur(radius))
    return mask


def _around(mask: Image, padding: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part around a mask's white, in the shape of `size`. It stays within where it can, and goes beyond
    on both sides where the picture is too narrow."""
    height, width = size
    white = mask.getbbox()
    assert white is not None
    left, top, right, bottom = white
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    wide, high = right - left, bottom - top
    wide, high = max(wide, -(-high * width // height)), max(high, -(-wide * height // width))

    def place(start: int, end: int, length: int, most: int) -> int:
        if length > most:
            return (most - length) // 2
        return min(max((start + end - length) // 2, 0), most - length)

    left, top = place(left, right, wide, mask.width), place(top, bottom, high, mask.height)
    return left, top, left + wide, top + high


def _drawn(
    whole: Image, box: tuple[int, int, int, int] | None, asked: tuple[int, int], size: tuple[int, int]
) -> Image:
    """`box` of a picture or mask at the (height, width) at which the network draws.

    A pipeline that draws at another shape than `asked` resizes what it has drawn until it covers that shape,
    and cuts from the middle. This is the way back; what is cut off later continues the edge.
    """
    import numpy as np
    from PIL import Image as pil

    if box is not None:
        left, top, right, bottom = box
        outside = (
            (max(-top, 0), max(bottom - whole.height, 0)),
            (max(-left, 0), max(right - whole.width, 0)),
        )
        whole = whole.crop((max(left, 0), max(top, 0), min(right, whole.width), min(bottom, whole.height)))
        whole = _padded(whole, outside)
    height, width = size
    ratio = max(asked[0] / height, asked[1] / width)
    inner = min(round(asked[1] / ratio), width), min(round(asked[0] / ratio), height)
    if whole.size != inner:
        kind = pil.Resampling.BILINEAR if whole.mode == "L" else pil.Resampling.LANCZOS
        whole = whole.resize(inner, kind)
    top, left = (height - whole.height) // 2, (width - whole.width) // 2
    drawn = _padded(whole, ((top, height - whole.height - top), (left, width - whole.width - left)))
    assert np.asarray(drawn).shape[:2] == size
    return drawn


def _padded(picture: Image, around: tuple[tuple[int, int], tuple[int, int]]) -> Image:
    import numpy as np
    from PIL import Image as pil

    if not any(map(any, around)):
        return picture
    pixels = np.asarray(picture)
    widths = around if pixels.ndim == 2 else (*around, (0, 0))
    return pil.fromarray(np.pad(pixels, widths, mode="edge"))
