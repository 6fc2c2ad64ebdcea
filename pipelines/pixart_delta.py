"""PixArt-delta and PixArt-alpha: words to a picture, in a few steps, with edges to follow. Chen et al. 2024,
arXiv:2401.05252; Chen et al. 2023, arXiv:2310.00426.

`PixArtSigmaPipeline` with the other backbone, which reads 120 tokens and, at 1024 pixels, the size of the
picture. It adds two things:

- Walks of distilled networks, in the table `DISTILLED`: LCM, and DMD's single step. Guidance is distilled
  into them, so it is off unless asked for. diffusers walks LCM at other timesteps than the published code;
  here the published ones are taken, also for a folder that stores diffusers' scheduler.
- A control picture, whose edges steer the layout through `PixArtControlNet`. diffusers has no such pipeline.

It reads folders of diffusers' `PixArtAlphaPipeline` and of our Sigma pipeline, with two more parts where they
are present: `controlnet/` and `hed/`, the network that finds edges.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from pipelines import Step, attention, components, schedulers, step_savers
from pipelines.bins import BINS
from pipelines.canvas import kept_steps
from pipelines.image_to_image import STRENGTH
from pipelines.latent_images import Generators, ImagePipelineOutput, Predict, check_choice
from pipelines.lcm import LCMSolver, OneStep
from pipelines.models.hed import CONTROL_KINDS, EDGES, HED, control_picture, edges_at, load_hed, rgb
from pipelines.models.network import read_json
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet
from pipelines.pixart_sigma import PixArtSigmaPipeline
from pipelines.scheduler_base import noise_schedule, settings

if TYPE_CHECKING:
    from PIL.Image import Image

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"  # families, as model_index.json names them
TOKENS = {ALPHA: 120, SIGMA: 300}
MICRO_RATIOS = ("exact", "bin")


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A walk of a distilled network: a row of the table."""

    summary: str
    solver: type[LCMSolver] | type[OneStep]
    steps: int  # that it takes unless told otherwise
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, scheduler: Any) -> LCMSolver | OneStep:
        """Its solver with the stored scheduler's noise schedule and, where it has them, its other options."""
        stored = settings(scheduler)
        known = {one.name for one in fields(self.solver.config_class)}
        own = {name: stored[name] for name in stored.keys() & known}
        return self.solver(**own | noise_schedule(scheduler) | dict(self.options))


DISTILLED: Mapping[str, Distilled] = {
    "lcm": Distilled(
        summary="LCM at the timesteps of the published code: 4 steps",
        solver=LCMSolver,
        steps=4,
        options={"timestep_spacing": "official"},
    ),
    "lcm-diffusers": Distilled(
        summary="LCM as diffusers walks it: 4 steps",
        solver=LCMSolver,
        steps=4,
        options={"timestep_spacing": "diffusers"},
    ),
    "one-step": Distilled(summary="DMD: one step, from timestep 400", solver=OneStep, steps=1),
}
STEPS, GUIDANCE = 20, 4.5  # of all other walks


class PixArtDeltaPipeline(PixArtSigmaPipeline):
    """The parts of PixArt-Sigma, and two that may be absent: a control branch, and HED to find edges."""

    families = (ALPHA, SIGMA)

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        controlnet: PixArtControlNet | None = None,
        hed: HED | None = None,
        family: str = ALPHA,  # as which it is saved; it decides how many tokens are read
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        check_choice("family", family, self.families)
        self.family = family
        self.controlnet: PixArtControlNet | None = None
        self.hed: HED | None = None
        self.attach(controlnet, hed)

    def attach(self, controlnet: PixArtControlNet | None = None, hed: HED | None = None) -> Self:
        """Give it a control branch, HED, or both. Raises ValueError for a branch of another base."""
        if controlnet is not None:
            controlnet.check_base(self.transformer)
            self.controlnet = controlnet
        self.hed = self.hed if hed is None else hed
        return self

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        torch_dtype: torch.dtype | None = None,  # None: as stored
        device: torch.device | str | None = None,  # None: the CPU
        own_parts: bool = True,  # False: diffusers' and transformers' classes for all but the transformer
        offload: Mapping[str, str] | None = None,  # parts that stay elsewhere: see `pipelines.streaming`
    ) -> Self:
        """Read a diffusers folder of either family, and `controlnet/` and `hed/` where they lie beside.

        Raises ValueError as PixArtSigmaPipeline does, and when the control branch is missing although
        model_index.json lists it, or does not fit the transformer.
        """
        folder = Path(folder)
        options: dict[str, Any] = {"torch_dtype": torch_dtype, "device": device}
        pipeline = super().from_pretrained(folder, own_parts=own_parts, offload=offload, **options)
        index = read_json(folder / "model_index.json")
        pipeline.family = index["_class_name"]
        # The converter of published weights writes the folder only; it cannot know the index.
        if index.get("controlnet") not in (None, [None, None]) or (folder / "controlnet").is_dir():
            where = (offload or {}).get("controlnet")
            controlnet = components.load(folder / "controlnet", "PixArtControlNet", offload=where, **options)
            try:
                pipeline.attach(controlnet)
            except ValueError as error:
                raise ValueError(f"{folder / 'controlnet'}: {error}") from error
        if (folder / "hed").is_dir():
            pipeline.attach(hed=load_hed(folder / "hed", device=device))
        return pipeline

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that diffusers' pipeline of this family reads as well, if not the control branch."""
        folder = Path(folder)
        super().save_pretrained(folder)
        for name, part in (("controlnet", self.controlnet), ("hed", self.hed)):
            if part is not None:
                part.save_pretrained(folder / name)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks. HED stays in its precision: edges must not depend on it."""
        super().to(device, dtype)
        if self.controlnet is not None:
            self.controlnet.to(device=device, dtype=dtype)
        if self.hed is not None:
            self.hed.to(device=device)
        return self

    def set_attention(self, name: str = "auto") -> str:
        """Choose the attention function of the transformer and of its control branch."""
        chosen = super().set_attention(name)
        if self.controlnet is not None:
            attention.set_attention(self.controlnet, chosen)
        return chosen

    # The recipe

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        num_inference_steps: int | None = None,  # None: as many as the walk is for
        **options: Any,  # see PixArtSigmaPipeline.__call__ and `denoise`
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw, and return the pictures."""
        return super().__call__(prompt, negative_prompt, num_inference_steps, **options)

    def denoise(
        self,
        prompt: str | list[str] | None = None,
        *,
        scheduler: str = schedulers.STORED,  # or a name of `scheduler_names`
        num_inference_steps: int | None = None,  # None: as many as the walk is for
        guidance_scale: float | None = None,  # None: 1, which is none, for distilled walks, 4.5 for others
        max_sequence_length: int | None = None,  # tokens; None: 120 for alpha, 300 for Sigma
        micro_ratio: str = "exact",  # of height and width as drawn; "bin": the published way, two decimals
        control_image: Image | np.ndarray | None = None,  # of any size; one for all pictures
        control_kind: str = "soft",  # how its edges are found: a name of CONTROL_KINDS
        controlnet_conditioning_scale: float = 1.0,  # 0: as without a control picture
        control_guidance_start: float = 0.0,  # fractions of the steps: control works in those that lie
        control_guidance_end: float = 1.0,  # entirely between the two, as in diffusers
        **options: Any,  # see PixArtSigmaPipeline.denoise
    ) -> Iterator[Step]:
        """Yield a Step after each denoising step; stop iterating to cancel.

        The encoder of the control picture gives a distribution, and a sample of it is taken, as in training.
        The sample's seed follows from the seed of the picture's generator, whatever was drawn from that
        before; so the control does not move the noise, and picture n of a batch equals the single picture
        with its generator. One generator for all pictures means one sample for all.
        """
        yield from super().denoise(
            prompt,
            **self._settle(scheduler, num_inference_steps, guidance_scale, max_sequence_length),
            micro_ratio=micro_ratio,
            control_image=control_image,
            control_kind=control_kind,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            **options,
        )

    # Its verbs

    def check(
        self,
        prompt: str | list[str] | None = None,
        *,
        scheduler: str = schedulers.STORED,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        micro_ratio: str = "exact",
        control_image: Image | np.ndarray | None = None,
        control_kind: str = "soft",
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        **options: Any,
    ) -> None:
        """Raise ValueError for anything `denoise` could not do with these arguments, before any work."""
        settled = self._settle(scheduler, num_inference_steps, guidance_scale, max_sequence_length)
        super().check(prompt, timesteps=timesteps, **settled, **options)
        steps = settled["num_inference_steps"] if timesteps is None else len(timesteps)
        laid_out = self.canvas_of(**options)
        if laid_out is not None and not laid_out.grown:
            steps = kept_steps(steps, options.get("strength", STRENGTH)) or steps
        check_choice("micro_ratio", micro_ratio, MICRO_RATIOS)
        if micro_ratio == "bin" and self.transformer.config.micro_conditions and self.native_size not in BINS:
            raise ValueError(
                f"micro_ratio 'bin' needs bins, and there are none for {self.native_size} pixels"
            )
        _check_number("controlnet_conditioning_scale", controlnet_conditioning_scale, math.inf)
        _check_number("control_guidance_start", control_guidance_start, 1)
        _check_number("control_guidance_end", control_guidance_end, 1)
        if control_guidance_start >= control_guidance_end:
            raise ValueError(
                f"control_guidance_start must be below control_guidance_end, "
                f"not {control_guidance_start!r} and {control_guidance_end!r}"
            )
        check_choice("control_kind", control_kind, CONTROL_KINDS)
        if control_image is None:
            return
        if self.controlnet is None:
            raise ValueError("control_image needs a control branch, and these weights have none")
        if not any(_steered(steps, control_guidance_start, control_guidance_end)):
            raise ValueError(
                f"none of {steps} steps lies between control_guidance_start {control_guidance_start!r} "
                f"and control_guidance_end {control_guidance_end!r}"
            )
        if options.get("hires") is not None:
            size = (options.get("height"), options.get("width")) if laid_out is None else laid_out.size
            drawn = self.drawn_size(*size, options.get("use_resolution_binning", True))
            larger = self.hires_size(drawn, options["hires"])
            if self._hires_tile(larger, options.get("hires_tile")) is not None:
                raise ValueError(
                    f"control_image steers a picture as a whole, and hires of {larger[1]} x {larger[0]} is "
                    "drawn in tiles; leave the control_image out, or take a smaller hires"
                )
        if controlnet_conditioning_scale != 0:
            step_savers.check_control(step_savers.parse(options.get("savers", ())))
        self._check_control(control_image, control_kind)

    def scheduler_names(self) -> tuple[str, ...]:
        """What `scheduler` may be."""
        return (*super().scheduler_names(), *DISTILLED)

    def distilled(self, scheduler: str = schedulers.STORED) -> Distilled | None:
        """The row of a distilled walk, also when it is the one that lies in the folder; else None."""
        if scheduler != schedulers.STORED:
            return DISTILLED.get(scheduler)
        if isinstance(self.scheduler, OneStep):
            return DISTILLED["one-step"]
        if isinstance(self.scheduler, LCMSolver) or type(self.scheduler).__name__ == "LCMScheduler":
            return DISTILLED["lcm"]
        return None

    @torch.inference_mode()
    def control_preview(
        self,
        image: Image | np.ndarray,
        kind: str = "soft",
        height: int | None = None,  # pixels; None: native
        width: int | None = None,
        use_resolution_binning: bool = True,
    ) -> Image:
        """The edges that steer a picture of this size, in grey, as large as it is drawn.

        Raises ValueError as `check` does. It needs no control branch.
        """
        from PIL import Image as pil

        self._check_size("height", height, use_resolution_binning)
        self._check_size("width", width, use_resolution_binning)
        check_choice("control_kind", kind, CONTROL_KINDS)
        self._check_control(image, kind)
        edges_YX = self._edges(image, kind, self.drawn_size(height, width, use_resolution_binning))
        return pil.fromarray((edges_YX * 255).round().astype("uint8"))

    # Below stairs

    def _settle(
        self, scheduler: str, steps: int | None, guidance_scale: float | None, tokens: int | None
    ) -> dict[str, Any]:
        """Arguments of PixArtSigmaPipeline.denoise, without None."""
        row = self.distilled(scheduler)
        if steps is None:
            steps = STEPS if row is None else row.steps
        if guidance_scale is None:
            guidance_scale = GUIDANCE if row is None else 1.0
        return {
            "scheduler": scheduler,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "max_sequence_length": TOKENS[self.family] if tokens is None else tokens,
        }

    def _index(self) -> dict[str, tuple[str, str]]:
        # Not diffusers': it has no such class, and passes over what its pipeline does not ask for.
        more = {} if self.controlnet is None else {"controlnet": ("pipelines", "PixArtControlNet")}
        return super()._index() | more

    def _walk(self, name: str) -> Any:
        row = self.distilled(name)
        if row is None:
            return super()._walk(name)
        if name == schedulers.STORED and not isinstance(self.scheduler, LCMSolver | OneStep):
            config = self.scheduler.config
            if not LCMSolver.supports(config):  # diffusers' class, with options that ours does not have
                return super()._walk(name)
        return row.make(self.scheduler)

    def _prepare(
        self,
        captions: Tensor,
        mask: Tensor,
        timesteps: Tensor,
        size: tuple[int, int],
        guidance_scale: float,
        generator: Generators = None,
        plan: step_savers.Plan = (),
        *,
        micro_ratio: str,
        control_image: Image | np.ndarray | None,
        control_kind: str,
        controlnet_conditioning_scale: float,
        control_guidance_start: float,
        control_guidance_end: float,
    ) -> Predict:
        conditions = self.micro_conditions(*size)
        if micro_ratio == "bin" and self.native_size in BINS:
            conditions["aspect_ratio"] = torch.full_like(
                conditions["aspect_ratio"], bin_ratio(*size, self.native_size)
            )
        given = (captions, mask, timesteps, conditions, guidance_scale)
        if control_image is None or controlnet_conditioning_scale == 0:
            return self.predictor_for(*given, plan=plan)
        controlled = ControlledPixArt(self.transformer, self.controlnet)
        network = functools.partial(
            controlled,
            control_latents=self._control_latents(control_image, control_kind, size, generator),
            conditioning_scale=controlnet_conditioning_scale,
        )
        steered = _steered(len(timesteps), control_guidance_start, control_guidance_end)
        alone = self.predictor_for(*given, plan=plan)
        with_control = self.predictor_for(*given, network, controlled.text_states, plan)

        def predict(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            return (with_control if steered[index] else alone)(latents, index, timestep)

        return predict

    def _check_control(self, image: Any, kind: str) -> None:
        """Raises ValueError when edges of this kind cannot be found in this picture."""
        if kind == "hed" and self.hed is None:
            others = ", ".join(other for other in CONTROL_KINDS if other != kind)
            raise ValueError(
                "control_kind 'hed' needs the weights of HED, in hed/ beside the other parts; "
                f"without any: {others}"
            )
        reason = EDGES[kind].missing() if kind in EDGES else None
        if reason is not None:
            raise ValueError(f"control_kind '{kind}' cannot be had: {reason}")
        try:
            rgb(image)
        except ValueError as error:
            raise ValueError(f"control_image: {error}") from error

    def _edges(self, image: Image | np.ndarray, kind: str, size: tuple[int, int]) -> np.ndarray:
        return edges_at(image, kind, *size, network=self.hed)

    def _control_latents(
        self, image: Image | np.ndarray, kind: str, size: tuple[int, int], generator: Generators
    ) -> Tensor:
        """(1, C, Y, X) for all pictures or (B, C, Y, X) with one for each, scaled as latents are."""
        picture = control_picture(self._edges(image, kind, size))
        found = self.vae.encode(picture.to(self.vae.device, self.vae.dtype))[0]
        mean, spread = found.mean.float(), torch.exp(0.5 * found.logvar.float())
        one_for_all = generator is None or isinstance(generator, torch.Generator)
        noise = [
            torch.randn(mean.shape, generator=None if one is None else _offspring(one))
            for one in ([generator] if one_for_all else generator)
        ]
        latents = mean + spread * torch.cat(noise).to(mean.device)
        return (latents * self.vae.config.scaling_factor).to(self.device, self.transformer.dtype)


def bin_ratio(height: int, width: int, native: int) -> float:
    """Height / width as the native size's bins write it, with two decimals; of other sizes the nearest."""
    bins = BINS[native]
    own = [key for key, size in bins.items() if size == (height, width)]  # the largest bins' keys are rough
    return min((float(key) for key in own or bins), key=lambda ratio: abs(ratio - height / width))


def _steered(steps: int, start: float, end: float) -> list[bool]:
    """For each step whether control works in it."""
    return [start <= index / steps and (index + 1) / steps <= end for index in range(steps)]


def _check_number(name: str, value: Any, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= most:
        wanted = "a number of 0 or more" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _offspring(generator: torch.Generator) -> torch.Generator:
    """On the CPU, of a seed that follows from the generator's, which is left as it is."""
    digest = hashlib.sha256(f"control picture {generator.initial_seed()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
