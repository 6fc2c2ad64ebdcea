"""Drawing that starts from a picture: noise of the middle of a schedule over its latents, masks, a second
pass at a larger size, and tiles for sizes beyond what a network knows.

- A picture with noise on it, from which the rest of the walk is taken: SDEdit, Meng et al. 2021,
  arXiv:2108.01073. `strength` is diffusers' part of the steps, the last ones.
- Under a mask, after every step, what stays is set to the known picture with the noise of the next timestep:
  as diffusers' inpainting of networks that were not trained for it, after Avrahami et al. 2022,
  arXiv:2206.02779.
- Tiles that overlap, their predictions blended at every step: MultiDiffusion, Bar-Tal et al. 2023,
  arXiv:2302.08113. Solvers are linear in the prediction, so this equals blending their results.

Where things lie in pixels is `pipelines.canvas`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pipelines import tiling
from pipelines.canvas import Canvas, kept_steps, no_steps
from pipelines.latent_images import MAX_STEPS, check_choice, check_integer

if TYPE_CHECKING:
    from PIL.Image import Image

HIRES_MOST = 4.0  # times the size
UPSCALES = ("pixels", "latents")
STRENGTH, MASK_BLUR = 0.6, 4  # unless told otherwise
# Lower than is usual with other models: at 0.5 this schedule, with its linear betas, leaves 8 % of the
# picture's variance where Stable Diffusion's leaves 28 %; it does at 0.35
HIRES_STRENGTH = 0.3
MOST_BLUR, MOST_PADDING = 256, 4096  # pixels
TILED_BEYOND = 2  # times the native size; larger pictures are refined in tiles of the native size


ARGUMENTS = (
    "image",
    "strength",
    "mask_image",
    "mask_blur",
    "padding_mask_crop",
    "outpaint",
    "hires",
    "hires_strength",
    "hires_steps",
    "hires_tile",
    "hires_upscale",
)


def check(
    *,
    native: int,  # pixels per side
    multiple: int,
    walks: tuple[int, int],  # steps of both schedules
    image: Any,
    strength: float,
    mask_image: Any,
    mask_blur: int,
    padding_mask_crop: int | None,
    outpaint: Any,
    hires: float | None,
    hires_strength: float,
    hires_steps: int | None,
    hires_tile: int | None,
    hires_upscale: str,
) -> None:
    """Raises ValueError for values out of range, or that do not go together."""
    _check_number("strength", strength, 0, 1)
    _check_number("hires_strength", hires_strength, 0, 1)
    check_integer("mask_blur", mask_blur, 0, MOST_BLUR)
    check_choice("hires_upscale", hires_upscale, UPSCALES)
    if image is None:
        for name, value in (("mask_image", mask_image), ("outpaint", outpaint)):
            if value is not None:
                raise ValueError(f"{name} needs an image to work on, and there is none")
    if padding_mask_crop is not None:
        check_integer("padding_mask_crop", padding_mask_crop, 0, MOST_PADDING)
        if mask_image is None and outpaint is None:
            raise ValueError("padding_mask_crop is what lies around a mask_image, and there is none")
    none = image is not None and outpaint is None and not kept_steps(walks[0], strength)
    if none and (strength > 0 or hires is None):
        raise ValueError(no_steps("strength", strength, walks[0]))
    if hires_steps is not None:
        check_integer("hires_steps", hires_steps, 1, MAX_STEPS)
    if hires_tile is not None:
        check_integer("hires_tile", hires_tile, native // 2, 4 * native)
        if hires_tile % multiple:
            raise ValueError(f"hires_tile must be a multiple of {multiple}, not {hires_tile}")
    if hires is not None:
        _check_number("hires", hires, 1, HIRES_MOST)
        if not kept_steps(walks[1], hires_strength):
            raise ValueError(no_steps("hires_strength", hires_strength, walks[1]))


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # also true of NaN
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")


@dataclass(frozen=True)
class Pass:
    """One walk at one size."""

    walk: Any  # a scheduler that stands at the first of the timesteps
    timesteps: Tensor  # those that are walked, the last of the scheduler's
    size: tuple[int, int]  # (height, width) in pixels, as drawn
    tile: int | None = None  # pixels per side; None: all at once

    @property
    def whole(self) -> bool:
        """Whether all of the schedule is walked, which starts from noise alone."""
        return len(self.timesteps) == len(self.walk.timesteps)

    @property
    def seen(self) -> tuple[int, int]:
        """(height, width) in pixels of what the network sees at once."""
        if self.tile is None:
            return self.size
        return min(self.size[0], self.tile), min(self.size[1], self.tile)


def last_part(walk: Any, strength: float) -> Tensor:
    """The timesteps at its end that are walked, and the walk put to their beginning."""
    order = getattr(walk, "order", 1)
    skipped = len(walk.timesteps) - kept_steps(len(walk.timesteps) // order, strength) * order
    if strength >= 1.0:
        skipped = 0
    if 0 < skipped < len(walk.timesteps) and hasattr(walk, "set_begin_index"):  # others look timesteps up
        walk.set_begin_index(skipped)
    timesteps: Tensor = walk.timesteps[skipped:]
    return timesteps


def noised(walk: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents of a picture with the noise of a timestep over them."""
    result: Tensor = walk.add_noise(latents, noise, timestep.reshape(1))
    return result


@dataclass(frozen=True)
class Known:
    """What is known of a picture while it is drawn."""

    latents: Tensor  # (B or 1, C, Y, X)
    noise: Tensor  # (B, C, Y, X), the same at every timestep
    free: Tensor | None  # (1, 1, Y, X) of bool: where it is drawn anew; None: everywhere

    def start(self, one: Pass) -> Tensor:
        """Latents for the first timestep of a pass: noise alone where all of it is walked."""
        if not one.whole:
            return self.at(one.walk, one.timesteps[:1])
        return self.keep(self.noise * one.walk.init_noise_sigma, one.walk, one.timesteps[:1])

    def at(self, walk: Any, timestep: Tensor | None) -> Tensor:
        """As it would be at this timestep; None: at the end."""
        latents = self.latents.expand_as(self.noise)
        return latents if timestep is None else noised(walk, latents, self.noise, timestep)

    def keep(self, latents: Tensor, walk: Any, timestep: Tensor | None) -> Tensor:
        """Latents for this timestep, of which what is not free is set to what is known."""
        if self.free is None:
            return latents
        return torch.where(self.free, latents, self.at(walk, timestep).to(latents))


def pixels(picture: Image) -> Tensor:
    """(1, 3, Y, X) in 0..1."""
    import numpy as np

    array = np.asarray(picture.convert("RGB"))
    return torch.tensor(array).permute(2, 0, 1)[None].float() / 255


def free_cells(mask: Image, factor: int) -> Tensor:
    """(1, 1, Y, X) of bool: the latents with any pixel that is not to stay."""
    import numpy as np

    levels = torch.tensor(np.asarray(mask))[None, None].float()
    return functional.max_pool2d(levels, factor) > 0


def known(
    canvas: Canvas, size: tuple[int, int], encode: Callable[[Tensor], Tensor], noise: Tensor, factor: int
) -> Known:
    """What is known of a canvas that is drawn at this (height, width)."""
    latents = encode(pixels(canvas.picture(size)))
    mask = canvas.free(size)
    return Known(latents, noise, None if mask is None else free_cells(mask, factor).to(noise.device))


def encode_in_tiles(
    encode: Callable[[Tensor], Tensor],  # (B, 3, f y, f x) -> (B, C, y, x)
    images: Tensor,
    *,
    factor: int,
    tile: int = 64,  # latents per side
    overlap: int = 16,
) -> Tensor:
    """(B, C, Y, X), equal to `encode(images)` where one tile covers everything."""
    cells = functional.pixel_unshuffle(images, factor)

    def one(piece: Tensor) -> Tensor:
        return encode(functional.pixel_shuffle(piece, factor))

    return tiling.decode_in_tiles(one, cells, factor=1, tile=tile, overlap=overlap)


def in_tiles(
    predict: Callable[[Tensor, int, Tensor], Tensor],
    tile: int,  # latents per side; neighbours share a quarter
) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The same prediction tile by tile, mixed where tiles overlap."""

    def predict_tiles(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
        def one(piece: Tensor) -> Tensor:
            return predict(piece, index, timestep)

        return tiling.decode_in_tiles(one, latents, factor=1, tile=tile, overlap=tile // 4)

    return predict_tiles


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, Y, X) to another (Y, X), bicubic."""
    return functional.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
