"""What all pipelines share that draw pictures in the latents of an autoencoder: noise, decoding, previews,
sizes, and the checks of arguments."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from pipelines import attention, lean, step_savers, tiling
from pipelines.bins import BINS
from pipelines.lora import LoraPipeline
from pipelines.scheduler_base import Generators, standard_noise
from pipelines.step_savers import StepSaver

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Predict = Callable[[Tensor, int, Tensor], Tensor]  # latents, index of the step, timestep -> prediction

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_STEPS = 1000  # as many as there are training timesteps
TILED_FROM = 1536 * 1536  # pixels; a decoder of SDXL's width takes about 6 GB in float32 for as many


@dataclass
class ImagePipelineOutput:
    """Named like diffusers' result."""

    images: Any


class LatentImagePipeline(LoraPipeline):
    """The part of a pipeline that does not depend on what is asked for: words, a class or a control image."""

    conditional_half = 1  # which half of a guided batch sees the condition
    cross_attention = True  # whether the transformer reads a text at every block

    def __init__(self, vae: Any, transformer: Any, scheduler: Any) -> None:
        self.vae = vae
        self.transformer = transformer
        self.scheduler = scheduler  # a model to copy: every run walks its own
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.interrupt = False  # a callback may set it to stop after the current step
        self.exact = lean.LEAN
        self.decoded_in_tiles = False
        self._preview_map: Tensor | None = None

    def set_attention(self, name: str = "auto") -> str:
        """Choose the transformer's attention function; see `pipelines.attention`.

        The one layer of an autoencoder of ours takes part in `auto` only: its head is as wide as the layer.
        """
        chosen = attention.set_attention(self.transformer, name)
        if any(hasattr(module, "attend") for module in self.vae.modules()):
            attention.set_attention(self.vae, "auto" if name == "auto" else "sdpa")
        return chosen

    def prepare(self, exact: str = "lean", *, int8: bool = False) -> Self:
        """Ready loaded networks for drawing, in the dtype and place they have now.

        "lean": the same numbers up to rounding, in fewer operations; see `pipelines.lean`, which says what is
        no longer possible afterwards. "plain": every operation at every step, as published. A pipeline that
        was not made ready computes once per picture what no step changes, and leaves the networks as they
        are. `int8` is faster and not the same: see `pipelines.int8`.

        Raises ValueError for another word, for int8 that is to be plain, and for a network too small for it.
        """
        branch = getattr(self, "controlnet", None)
        self.exact = lean.prepare_all(exact, self.transformer, branch, int8=int8)
        halved = self.vae.dtype in (torch.bfloat16, torch.float16)
        if exact == "lean" and halved:  # a quarter faster on a CPU; in float32 it is slower there
            self.vae.to(memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def native_size(self) -> int:
        """Pixels per side of the pictures it was trained on."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """Sizes that are drawn as they are must be multiples of this many pixels."""
        return self.transformer.config.patch_size * self.vae_scale_factor

    def noise(self, batch: int, height: int, width: int, generator: Generators = None) -> Tensor:
        """(batch, C, Y, X) of standard noise, float32, for a picture of this size in pixels.

        With a list of generators picture n gets what it would get alone.
        """
        shape = (self.transformer.config.in_channels, *self._latent_size(height, width))
        return standard_noise((batch, *shape), generator, self.device)

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # (B, C, Y, X)
        output_type: str = "pil",
        size: tuple[int, int] | None = None,  # (height, width) to resize and crop to; None: as drawn
        tiled: bool | None = None,  # in overlapping tiles, for little memory; None: for large pictures
    ) -> Any:
        """Latents to pictures: a list of PIL images, a (B, 3, Y, X) tensor or (B, Y, X, 3) array in 0..1.

        When memory does not suffice for a picture as a whole it is decoded in tiles. Whether any was, for
        whatever reason, `decoded_in_tiles` tells afterwards.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return latents
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        factor = self.vae_scale_factor
        large = scaled[0, 0].numel() * factor**2 > TILED_FROM

        def at_once(row: Tensor) -> Tensor:
            return self.vae.decode(row, return_dict=False)[0]

        def decode(row: Tensor) -> Tensor:
            if not self.decoded_in_tiles:
                try:
                    return at_once(row)
                except (MemoryError, RuntimeError) as error:
                    if tiled is False or not tiling.out_of_memory(error):
                        raise
                    log.warning("decoding in tiles: memory did not suffice for the whole picture")
            # Outside of the handler, whose error keeps the memory of the attempt
            self.decoded_in_tiles = True
            return tiling.decode_in_tiles(at_once, row, factor=factor)

        self.decoded_in_tiles = large if tiled is None else tiled
        # One at a time: less memory, and a picture does not depend on its neighbours.
        images = torch.cat([decode(row) for row in scaled.split(1)]).float()
        if size is not None:
            images = _resize_and_crop(images, *size)
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else [_to_pil(one) for one in array]

    @torch.inference_mode()
    def preview(self, latents: Tensor) -> Image:
        """A rough picture of the first latents, at full size, for much less than a step: no decoder.

        Colours are a linear function of the latent channels, fitted once to how the encoder sees a colour
        chart.
        """
        if self._preview_map is None:
            self._preview_map = self._fit_preview()
        table = self._preview_map
        colours = torch.einsum("cyx,cr->yxr", latents[0].to(table), table[:-1]) + table[-1]
        small = _to_pil((colours / 2 + 0.5).nan_to_num().clamp(0, 1).cpu().numpy())
        factor = self.vae_scale_factor
        return small.resize((small.width * factor, small.height * factor), resample=3)  # bicubic

    def _plan(
        self, savers: str | Sequence[StepSaver], timesteps: Tensor, guidance_scale: float
    ) -> step_savers.Plan:
        """What each step computes. Raises ValueError for savers that have no use in such a run."""
        if self.exact == lean.PLAIN and step_savers.parse(savers):
            raise ValueError("savers leave work out, and plain means that nothing is; take one of the two")
        return step_savers.plan(
            savers,
            timesteps,
            getattr(self.scheduler.config, "num_train_timesteps", MAX_STEPS),
            guided=guidance_scale > 1.0,
            conditional=self.conditional_half,
            cross_attention=self.cross_attention,
        )

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    def _check_size(self, name: str, pixels: int | None, use_resolution_binning: bool) -> None:
        if pixels is None:
            return
        native, multiple = self.native_size, self.size_multiple
        if use_resolution_binning and native in BINS:
            check_integer(name, pixels, native // 4, native * 2)  # resized and cropped from the nearest bin
            return
        check_integer(name, pixels, native // 2, native * 2)
        if pixels % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple}, not {pixels}")

    def _fit_preview(self) -> Tensor:
        """(C + 1, 3): latent channels and a constant to red, green and blue in -1..1, by least squares."""
        cells, side = 8, self.vae_scale_factor
        draw = torch.Generator().manual_seed(0)
        levels = torch.rand(1, 3, cells, cells, generator=draw) * 2 - 1
        levels[..., cells // 2 :] = levels[..., cells // 2 :].mean(dim=1, keepdim=True)  # half of it grey
        chart = levels.repeat_interleave(2 * side, 2).repeat_interleave(2 * side, 3)
        encoded = self.vae.encode(chart.to(self.vae.device, self.vae.dtype))[0]
        mean = (encoded.mean * self.vae.config.scaling_factor).float().cpu()
        seen = mean[0].flatten(1).T
        wanted = functional.avg_pool2d(chart, side)[0].flatten(1).T
        fitted = torch.linalg.lstsq(torch.cat([seen, torch.ones(len(seen), 1)], dim=1), wanted).solution
        return fitted.to(self.device)


def check_guidance(scale: Any) -> None:
    """Raises ValueError unless it is a number of 0 or more."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale) or scale < 0:
        raise ValueError(f"guidance_scale must be a number of 0 or more, not {scale!r}")


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options the function has parameters for: schedulers differ."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


def _resize_and_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize until both sides are covered, then cut from the centre."""
    drawn_height, drawn_width = images.shape[-2:]
    if (drawn_height, drawn_width) == (height, width):
        return images
    ratio = max(height / drawn_height, width / drawn_width)
    # Rounding down could lose the last pixel: 1088 * (900 / 1088) is 899.99.
    rows, columns = (max(int(drawn_height * ratio), height), max(int(drawn_width * ratio), width))
    images = functional.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[..., top : top + height, left : left + width]


def _to_pil(array: Any) -> Image:
    """(Y, X, 3) in 0..1 to an image."""
    from PIL import Image as pil

    return pil.fromarray((array * 255).round().astype("uint8"))
