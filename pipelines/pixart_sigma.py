"""PixArt-Sigma: words to a picture. Chen et al. 2024, arXiv:2403.04692.

The pipeline reads and writes ordinary diffusers folders, takes the arguments of diffusers'
`PixArtSigmaPipeline` and draws the same pictures. Three things differ, on purpose:

- `denoise` is a generator that yields after each step. Leaving the loop, or `close()`, cancels the picture.
- A prompt is encoded at its real length. diffusers pads to 300 tokens and masks them, to the same effect.
- Noise is drawn in float32 on the generator's device, so that a CPU seed means one picture on every device
  and in every dtype; diffusers draws it in the dtype of the text encoder.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from pipelines import Step, canvas, components, image_to_image, prompts, schedulers, step_savers
from pipelines.bins import BINS, nearest_bin
from pipelines.image_to_image import HIRES_STRENGTH, MASK_BLUR, STRENGTH
from pipelines.latent_images import (
    MAX_STEPS,
    OUTPUT_TYPES,
    TILED_FROM,
    Generators,
    ImagePipelineOutput,
    LatentImagePipeline,
    Predict,
    accepted,
    check_choice,
    check_guidance,
    check_integer,
)
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.prompts import States, TextTurns, Words
from pipelines.scheduler_base import index_entry, noise_schedule
from pipelines.step_savers import StepSaver

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger(__name__)

Callback = Callable[["PixArtSigmaPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Embeddings(Protocol):
    """What keeps encoded prompts: vectors (L, D) of a text of which so many tokens are read."""

    def get(self, text: str, tokens: int) -> Tensor | None: ...

    def put(self, text: str, tokens: int, vectors: Tensor) -> None: ...


Given = tuple[Tensor | None, Tensor | None]  # vectors (B, L, D) and their mask, or neither
NULL_CAPTIONS = ("own", "prompt")
PADDED = 300  # tokens to which captions are padded in training


class _Index:
    """In place of tables of modulation: the number of the step."""

    def at(self, step: int) -> int:
        return step


class PixArtSigmaPipeline(LatentImagePipeline):
    """Five parts and the recipe that joins them. Parts may be ours or the libraries', in any mixture."""

    parts = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    families: tuple[str, ...] = ("PixArtSigmaPipeline",)  # whose folders it reads
    family = "PixArtSigmaPipeline"  # as which it is saved

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: PixArtTransformer2DModel,
        scheduler: Any,  # a model to copy: every run walks its own
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.embeddings: Embeddings | None = None  # where encoded prompts are kept, if anywhere
        super().__init__(vae, transformer, scheduler)

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
        """Read a diffusers folder.

        Raises ValueError naming the file: parts missing, another family, keys or tensors that do not fit,
        numbers that are not finite, parts that do not fit each other.
        """
        folder = Path(folder)
        classes = components.read_index(folder, cls.families, cls.parts)
        loaded = components.load_all(
            folder,
            classes,
            torch_dtype=torch_dtype,
            device=device,
            own=own_parts,
            offload=offload,
        )
        text_width, caption_width = (
            loaded["text_encoder"].config.d_model,
            loaded["transformer"].config.caption_channels,
        )
        if caption_width not in (None, text_width):
            raise ValueError(
                f"{folder}: the text encoder writes {text_width} numbers per token, "
                f"the transformer reads {caption_width}"
            )
        return cls(**loaded)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that diffusers' pipeline reads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.parts:
            getattr(self, name).save_pretrained(folder / name)
        components.write_index(folder, self.family, self._index())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks."""
        for name in ("text_encoder", "vae", "transformer"):
            getattr(self, name).to(device=device, dtype=dtype)
        return self

    # The recipe

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 20,
        *,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,  # from here on as in `denoise`
        mask_image: Any = None,
        mask_blur: int = MASK_BLUR,
        padding_mask_crop: int | None = None,
        outpaint: str | Mapping[str, int] | None = None,
        hires: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        use_resolution_binning: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw, and return the pictures."""
        step = None
        for step in self.denoise(  # noqa: B007 - the last step is what we are after
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            image=image,
            mask_image=mask_image,
            mask_blur=mask_blur,
            padding_mask_crop=padding_mask_crop,
            outpaint=outpaint,
            hires=hires,
            use_resolution_binning=use_resolution_binning,
            output_type=output_type,
            **options,
        ):
            pass
        assert step is not None  # there is at least one step
        laid_out = self.canvas_of(
            image=image,
            mask_image=mask_image,
            mask_blur=mask_blur,
            padding_mask_crop=padding_mask_crop,
            outpaint=outpaint,
            height=height,
            width=width,
            use_resolution_binning=use_resolution_binning,
        )
        size = (height or self.native_size, width or self.native_size)
        images = self.finish(step.latents, output_type, size, laid_out, hires)
        return ImagePipelineOutput(images) if return_dict else (images,)

    @torch.inference_mode()
    def denoise(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] = "",
        height: int | None = None,  # pixels; None: native
        width: int | None = None,
        num_inference_steps: int = 20,
        timesteps: Sequence[int] | None = None,  # instead of a number of steps
        scheduler: str = schedulers.STORED,  # or a name of pipelines.schedulers
        guidance_scale: float = 4.5,  # 1 or less: no guidance, half the work
        null_caption: str = "own",  # "prompt": the published way, see `encode_null`
        generator: Generators = None,  # one for all pictures, or a list with one for each
        savers: str | Sequence[StepSaver] = (),  # "guidance=0.1:0.6", see pipelines.step_savers
        num_images_per_prompt: int = 1,
        image: Image | np.ndarray | None = None,  # to start from; one for all pictures
        strength: float = STRENGTH,  # the part of the steps that is walked from it; 1: all, from noise alone
        mask_image: Image | np.ndarray | None = None,  # as large as the image: white is drawn anew
        mask_blur: int = MASK_BLUR,  # pixels over which its edge is feathered, on either side
        padding_mask_crop: int | None = None,  # pixels around the mask: only that part is drawn, at full size
        outpaint: str | Mapping[str, int] | None = None,  # "left=64": the canvas grows; walked in full
        hires: float | None = None,  # 1 to 4: enlarge what was drawn so many times, and refine it
        hires_strength: float = HIRES_STRENGTH,  # the part of the steps that is walked for that
        hires_steps: int | None = None,  # None: as many as for the first size
        hires_tile: int | None = None,  # pixels per side; None: all at once up to twice the native size
        hires_upscale: str = "pixels",  # or "latents": what is enlarged
        eta: float = 0.0,  # for schedulers that have it
        latents: Tensor | None = None,  # (B, C, Y, X) of standard noise, instead of drawing it
        prompt_embeds: Tensor | None = None,  # (B, L, D), instead of a prompt
        prompt_attention_mask: Tensor | None = None,  # (B, L)
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,  # tokens
        prompt_syntax: str = "off",  # "on": (words:1.3) and [a|b] mean something, see pipelines.prompts
        long_prompt: str = "cut",  # "chunks": what is longer is read in parts, one behind the other
        use_resolution_binning: bool = True,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **more: Any,  # what a subclass adds, for its `check` and `_prepare`
    ) -> Iterator[Step]:
        """Yield a Step after each denoising step; stop iterating to cancel.

        `image` without height and width: as large as it is, or nearly. What comes out is made whole by
        `finish`, which puts back what a mask leaves alone and crops to size.
        """
        # 1. Refuse what we cannot do
        arguments = {name: value for name, value in locals().items() if name not in ("self", "more")}
        self.check(**arguments, **more)
        # 2. Lay out the picture and the schedules, on copies: runs share nothing
        laid_out = self.canvas_of(**arguments)
        passes = self._passes(laid_out, **arguments)
        count, done = sum(len(one.timesteps) for one in passes), 0
        # 3. Words to text states, the unconditional half first
        guided = guidance_scale > 1.0
        text = self._text(count, **arguments)
        batch = len(text.states[0][0]) // (2 if guided else 1)
        self.interrupt = False
        for one in passes:
            # 4. Start from noise, as strong as the schedule begins, or from a picture and less noise
            walk = one.walk
            noise = self.noise(batch, *one.size, generator) if done or latents is None else latents
            noise = noise.to(self.device, torch.float32)
            known = self._known(one, noise, laid_out, latents if done else None, hires_upscale)
            latents = noise * walk.init_noise_sigma if known is None else known.start(one)
            # 5. Walk
            scale = guidance_scale if guided else 1.0
            plan = self._plan(savers, one.timesteps, scale)
            captions, mask = text.during(done, len(one.timesteps))
            predict = self._prepare(
                captions, mask, one.timesteps, one.seen, scale, generator, plan=plan, **more
            )
            if one.tile is not None:
                predict = image_to_image.in_tiles(predict, one.tile // self.vae_scale_factor)
            extra = accepted(walk.step, {"generator": generator, "eta": eta})
            for index, timestep in enumerate(one.timesteps):
                prediction = predict(walk.scale_model_input(latents, timestep), index, timestep)
                latents = walk.step(prediction, timestep, latents, **extra, return_dict=False)[0]
                expected = getattr(walk, "denoised", None)
                if known is not None:
                    coming = one.timesteps[index + 1 : index + 2]
                    latents = known.keep(latents, walk, coming if len(coming) else None)
                    expected = None if expected is None else known.keep(expected, walk, None)
                if callback_on_step_end is not None:
                    offered = {"latents": latents, "prompt_embeds": text.at(done)[0]}
                    chosen = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, done, timestep, chosen) or {}
                    latents = returned.get("latents", latents)
                yield Step(done, count, latents, timestep, expected)
                done += 1
                if self.interrupt:
                    return

    def predictor(
        self,
        text: Any,
        modulation: Any,
        guidance_scale: float,
        network: Callable[..., Any] | None = None,  # called like the transformer; None: the transformer
        plan: step_savers.Plan = (),  # what each step computes; empty: all of it
        alone: Any = None,  # `text` of the conditional half, for steps of the plan that compute only that
    ) -> Predict:
        """The function a step calls: latents to the guided prediction."""
        transformer, channels = self.transformer, self.transformer.config.in_channels
        network = network or transformer
        guided = guidance_scale > 1.0
        full = step_savers.Call(guided=guided)

        def predict(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            call = plan[index] if plan else full
            both = call.guided == guided  # or there is one half only
            predicted = network(
                latents.to(transformer.dtype),
                text=text if both else alone,
                modulation=modulation.at(index),
                **call.hooks,
            ).sample
            if transformer.out_channels == 2 * channels:  # the other half is the learned variance
                predicted = predicted[:, :channels]
            predicted = predicted.float()
            if not call.guided:
                return predicted
            without, with_text = predicted.chunk(2)
            return without + guidance_scale * (with_text - without)

        return predict

    def predictor_for(
        self,
        captions: Tensor | TextTurns,  # those that take turns bring their masks
        mask: Tensor | None,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
        guidance_scale: float,
        network: Callable[..., Any] | None = None,  # called like the transformer; None: the transformer
        text_states: Callable[..., Any] | None = None,  # its own; None: the transformer's
        plan: step_savers.Plan = (),
        modulation: Any = None,  # where it is there already
    ) -> Predict:
        """`predictor`, out of what it needs computed once; or its twin where `exact` is "plain", which
        computes everything at every step and over padded captions, as published."""
        if self.exact != "plain" and modulation is None:
            modulation = self.transformer.modulation(timesteps, conditions)
        if isinstance(captions, TextTurns):
            more: Any = (timesteps, conditions, guidance_scale, network, text_states, plan, modulation)
            each = {turn: self.predictor_for(*states, *more) for turn, states in captions.taken.items()}
            turns = captions.turns
            return lambda latents, index, timestep: each[turns[index]](latents, index, timestep)
        assert mask is not None
        if self.exact != "plain":
            text_states = text_states or self.transformer.text_states
            text, alone = text_states(captions, mask), None
            if guidance_scale > 1.0 and not all(call.guided for call in plan):
                half = len(captions) // 2
                alone = text_states(captions[half:], mask[half:])
            return self.predictor(text, modulation, guidance_scale, network, plan, alone)
        network = network or self.transformer
        padding = max(0, PADDED - captions.shape[1])
        captions, mask = (
            functional.pad(captions, (0, 0, 0, padding)),
            functional.pad(mask.bool(), (0, padding)),
        )
        rows = len(captions)

        def at_step(latents: Tensor, *, text: None, modulation: int) -> Any:
            halves = latents.repeat(rows // len(latents), 1, 1, 1)
            return network(halves, captions, timesteps[modulation].expand(rows), conditions, mask)

        return self.predictor(None, _Index(), guidance_scale, at_step)

    # Its verbs

    def check(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        timesteps: Sequence[int] | None = None,
        scheduler: str = schedulers.STORED,
        guidance_scale: float = 4.5,
        null_caption: str = "own",
        generator: Generators = None,
        savers: str | Sequence[StepSaver] = (),
        num_images_per_prompt: int = 1,
        image: Image | np.ndarray | None = None,
        strength: float = STRENGTH,
        mask_image: Image | np.ndarray | None = None,
        mask_blur: int = MASK_BLUR,
        padding_mask_crop: int | None = None,
        outpaint: str | Mapping[str, int] | None = None,
        hires: float | None = None,
        hires_strength: float = HIRES_STRENGTH,
        hires_steps: int | None = None,
        hires_tile: int | None = None,
        hires_upscale: str = "pixels",
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 300,
        prompt_syntax: str = "off",
        long_prompt: str = "cut",
        use_resolution_binning: bool = True,
        output_type: str = "pil",
        eta: float = 0.0,
        clean_caption: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Raise ValueError for anything `denoise` could not do with these arguments, before any work."""
        arguments = {name: value for name, value in locals().items() if name != "self"}
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        _check_texts("prompt", prompt)
        _check_texts("negative_prompt", negative_prompt)
        _check_embeds("prompt", prompt_embeds, prompt_attention_mask)
        _check_embeds("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask)
        check_guidance(guidance_scale)
        rows = _rows(prompt, prompt_embeds)
        negatives = _rows(negative_prompt, negative_prompt_embeds)  # one serves all prompts
        if guidance_scale > 1.0 and negatives not in (1, rows):
            raise ValueError(f"there are {negatives} negative prompts for {rows} prompts")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, 10_000)
        check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_integer("max_sequence_length", max_sequence_length, 1, 10_000)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("scheduler", scheduler, self.scheduler_names())
        check_choice("null_caption", null_caption, NULL_CAPTIONS)
        check_choice("long_prompt", long_prompt, prompts.LONG)
        check_choice("prompt_syntax", prompt_syntax, prompts.SYNTAX)
        if prompt_syntax == "on":
            negative = negative_prompt if guidance_scale > 1.0 else None
            count = num_inference_steps if timesteps is None else len(timesteps)
            self._check_syntax([*_texts(prompt), *_texts(negative)], count, clean_caption)
        self._check_walk(scheduler, num_inference_steps, timesteps)
        self._check_size("height", height, use_resolution_binning)
        self._check_size("width", width, use_resolution_binning)
        image_to_image.check(
            native=self.native_size,
            multiple=self.size_multiple,
            walks=self._walk_lengths(**arguments),
            **{name: arguments[name] for name in image_to_image.ARGUMENTS},
        )
        laid_out = self.canvas_of(**arguments)
        if laid_out is not None and laid_out.grown and laid_out.box is None:
            self._check_size("the height of the canvas", laid_out.size[0], use_resolution_binning)
            self._check_size("the width of the canvas", laid_out.size[1], use_resolution_binning)
        if step_savers.parse(savers):
            for one in self._passes(laid_out, **arguments):
                plan = self._plan(savers, one.timesteps, guidance_scale)
                if one.tile is not None and any(call.hooks for call in plan):
                    raise ValueError(
                        "savers that look back to earlier steps cannot be used with tiles, of which each has "
                        "a past of its own; take guidance alone, or a larger hires_tile"
                    )
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents", "prompt_embeds"}
        if unknown:
            raise ValueError(
                f"callbacks can be given latents and prompt_embeds, not {', '.join(sorted(unknown))}"
            )
        batch = rows * num_images_per_prompt
        if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != batch:
            raise ValueError(f"there are {len(generator)} generators for {batch} pictures")
        if latents is not None:
            rows, columns = self._latent_size(*self._passes(laid_out, **arguments)[0].size)
            shape = (batch, self.transformer.config.in_channels, rows, columns)
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")

    def _check_syntax(self, texts: Sequence[str], count: int, clean_caption: bool) -> None:
        """Raises ValueError for brackets that cannot be read, and for weights that cannot be given."""
        read, _ = prompts.variants(texts, count)
        if any(words.weights for row in read for words in row):
            if clean_caption:
                raise ValueError("clean_caption rewrites the text, so that no word can be weighted; take one")
            prompts.spans(self.tokenizer, "a")

    def _check_walk(self, scheduler: str, num_inference_steps: int, timesteps: Sequence[int] | None) -> None:
        """Raises ValueError for timesteps that were never trained on, or that this scheduler cannot walk."""
        if timesteps is not None:
            most = getattr(self.scheduler.config, "num_train_timesteps", MAX_STEPS) - 1
            whole = all(isinstance(one, Integral) and 0 <= one <= most for one in timesteps)
            if not len(timesteps) or not whole or any(b >= a for a, b in pairwise(timesteps)):
                raise ValueError(f"timesteps must be descending integers from {most} to 0, not {timesteps!r}")
        if scheduler == schedulers.STORED and getattr(self.scheduler, "learned_variance", False):
            raise ValueError(
                f"the stored {type(self.scheduler).__name__} needs the learned variance, which this pipeline "
                f"leaves; take another scheduler: {', '.join(schedulers.SCHEDULERS)}"
            )
        if scheduler != schedulers.STORED:
            noise_schedule(self.scheduler)
        # Those of the table may take seconds to import, and have no objections to a number of steps.
        if timesteps is not None or scheduler not in schedulers.SCHEDULERS:
            self._laid_out(scheduler, num_inference_steps, timesteps)

    def scheduler_names(self) -> tuple[str, ...]:
        """What `scheduler` may be."""
        return schedulers.names()

    def drawn_size(
        self, height: int | None, width: int | None, use_resolution_binning: bool
    ) -> tuple[int, int]:
        """(height, width) in pixels at which the network draws: the nearest bin, where its size has bins."""
        height, width = height or self.native_size, width or self.native_size
        if use_resolution_binning and self.native_size in BINS:
            return nearest_bin(height, width, self.native_size)
        return height, width

    # From a picture, and larger

    def canvas_of(
        self,
        *,
        image: Image | np.ndarray | None = None,
        mask_image: Image | np.ndarray | None = None,
        mask_blur: int = MASK_BLUR,
        padding_mask_crop: int | None = None,
        outpaint: str | Mapping[str, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = True,
        **others: Any,
    ) -> canvas.Canvas | None:
        """How a picture lies for drawing; None without one. Raises ValueError, see `pipelines.canvas`."""
        if image is None:
            return None
        if padding_mask_crop is None and not (height and width):
            binned = use_resolution_binning and self.native_size in BINS
            smallest, multiple = (4, 1) if binned else (2, self.size_multiple)
            picture = canvas.as_rgb(image)
            width, height = canvas.fitted(
                picture.size,
                (width or None, height or None),
                self.native_size // smallest,
                self.native_size * 2,
                multiple,
            )
        size = (height or self.native_size, width or self.native_size)
        return canvas.lay_out(
            image, size, mask_image, blur=mask_blur, padding=padding_mask_crop, outpaint=outpaint
        )

    def hires_size(self, size: tuple[int, int], factor: float) -> tuple[int, int]:
        """(height, width) of a picture of this size, enlarged: multiples of what can be drawn."""
        multiple = self.size_multiple
        height, width = (max(1, round(side * factor / multiple)) * multiple for side in size)
        return height, width

    def finish(
        self,
        latents: Tensor,
        output_type: str = "pil",
        size: tuple[int, int] | None = None,  # (height, width) asked for
        laid_out: canvas.Canvas | None = None,  # its own size goes before
        hires: float | None = None,
    ) -> Any:
        """`decode` for what `denoise` gives with a picture or with hires: as large as it is to be, and with
        everything that a mask leaves alone exactly as it was."""
        size = size if laid_out is None else laid_out.size
        if hires is not None:
            size = self.hires_size(size or (self.native_size, self.native_size), hires)
        if laid_out is None or laid_out.mask is None or output_type == "latent":
            return self.decode(latents, output_type, size=size)
        images = [laid_out.finish(one) for one in self.decode(latents, "pil", size=size)]
        if output_type == "pil":
            return images
        stacked = torch.cat([image_to_image.pixels(one) for one in images])
        return stacked if output_type == "pt" else stacked.permute(0, 2, 3, 1).numpy()

    @torch.inference_mode()
    def encode_pictures(self, images: Tensor) -> Tensor:
        """(B, 3, Y, X) in 0..1 to latents (B, C, y, x) in float32: the middle of what the encoder finds.

        One at a time, and large ones in tiles, as in `decode`.
        """
        vae, factor = self.vae, self.vae_scale_factor

        def encode(picture: Tensor) -> Tensor:
            mean = vae.encode((picture * 2 - 1).to(vae.device, vae.dtype))[0].mean
            return mean.float() * vae.config.scaling_factor

        large = images.shape[-2] * images.shape[-1] > TILED_FROM
        if not large:
            return torch.cat([encode(row) for row in images.split(1)]).to(self.device)
        tiled = [image_to_image.encode_in_tiles(encode, row, factor=factor) for row in images.split(1)]
        return torch.cat(tiled).to(self.device)

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str | Words],  # as they are read: brackets are text
        max_sequence_length: int = 300,
        clean_caption: bool = False,
        long_prompt: str = "cut",
    ) -> tuple[Tensor, Tensor]:
        """Texts to (B, L, D) vectors and a (B, L) mask, L being the longest text's number of tokens.

        Every text is encoded by itself and at its real length, so that its vectors do not depend on its
        neighbours. Longer texts than `max_sequence_length` tokens are cut, and the log says so; or they are
        encoded in chunks, each as a text of its own, and the chunks' vectors stand behind each other.
        """
        rows = []
        for text in texts:
            words = self._cleaned(text, clean_caption)
            parts = [words]
            if long_prompt == "chunks":
                cuts = prompts.chunks(self._length, words.text, max_sequence_length)
                parts = [words.part(*cut) for cut in cuts]
            rows.append(torch.cat([self._encoded(part, max_sequence_length) for part in parts]))
        return _pad(rows)

    @torch.inference_mode()
    def encode_null(
        self,
        texts: str | Sequence[str | Words],
        mask: Tensor,
        max_sequence_length: int = 300,
        clean_caption: bool = False,
        long_prompt: str = "cut",  # of the prompts; null captions are cut
    ) -> tuple[Tensor, Tensor]:
        """Null captions the published way: (B, L, D) and the mask (B, L) of the prompts, which they share.

        The published code attends the null caption over as many tokens as the prompt has, the padding behind
        its end token included; diffusers over its own tokens only. `texts`: one, or one for each row.
        """
        texts = [texts] if isinstance(texts, str) else texts
        device = self.text_encoder.device
        rows = []
        for index, count in enumerate(mask.bool().sum(1).tolist()):
            words = self._cleaned(texts[index * len(texts) // len(mask)], clean_caption)
            ids = self.tokenizer(words.text, truncation=True, max_length=max_sequence_length).input_ids
            padding = [self.tokenizer.pad_token_id] * (count - len(ids))
            ids_1L = torch.tensor([ids + padding], device=device)
            real_1L = torch.arange(ids_1L.shape[1], device=device)[None] < len(ids)
            states = self.text_encoder(input_ids=ids_1L, attention_mask=real_1L.long())[0][0]
            if words.weights:
                states = torch.cat([self._weighted(states[: len(ids)], ids, words), states[len(ids) :]])
            rows.append(states[:count])
        captions, shared = _pad(rows)
        return captions.to(self.device, self.transformer.dtype), shared.to(self.device)

    def parts_read(self, text: str, max_sequence_length: int = 300) -> list[str]:
        """The chunks in which a text is read with long_prompt "chunks"."""
        words = self._cleaned(text, False)
        cuts = prompts.chunks(self._length, words.text, max_sequence_length)
        return [words.part(*cut).text for cut in cuts]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, the end token included."""
        return self._length(prompt.lower().strip())

    def unknown_words(self, prompt: str) -> list[str]:
        """Words that the tokenizer can only spell letter by letter: the model has never learned them."""

        def spelled(word: str) -> bool:
            ids = self.tokenizer(word, add_special_tokens=False).input_ids
            return len(word) > 1 and all(len(self.tokenizer.decode([one]).strip()) <= 1 for one in ids)

        words = re.findall(r"[^\W_]+", prompt.lower())
        return [word for word in dict.fromkeys(words) if spelled(word)]

    def micro_conditions(self, height: int, width: int) -> dict[str, Tensor]:
        """Size and aspect ratio, for those models that read them (PixArt-alpha at 1024 pixels)."""
        size = torch.tensor([[height, width]], dtype=torch.float32, device=self.device)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}

    # Below stairs; subclasses replace the first three

    def _index(self) -> dict[str, tuple[str, str]]:
        """Part -> (library, class), for model_index.json."""
        return {
            "tokenizer": ("transformers", "T5Tokenizer"),
            "text_encoder": ("transformers", "T5EncoderModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "transformer": ("diffusers", "PixArtTransformer2DModel"),
            "scheduler": index_entry(self.scheduler),
        }

    def _walk(self, name: str) -> Any:
        """The scheduler of this name, for one run."""
        if name == schedulers.STORED:
            return copy.deepcopy(self.scheduler)
        return schedulers.make(name, self.scheduler)

    def _laid_out(self, name: str, num_inference_steps: int, timesteps: Sequence[int] | None) -> Any:
        """The scheduler of this name, its steps chosen. Raises ValueError when it cannot take them."""
        walk = self._walk(name)
        if timesteps is None:
            walk.set_timesteps(num_inference_steps, device=self.device)
        elif "timesteps" in accepted(walk.set_timesteps, {"timesteps": timesteps}):
            walk.set_timesteps(timesteps=[int(one) for one in timesteps], device=self.device)
        else:
            raise ValueError(
                f"{type(walk).__name__} cannot be told its timesteps; give num_inference_steps, "
                "or take another scheduler"
            )
        return walk

    def _walk_lengths(
        self,
        *,
        num_inference_steps: int,
        timesteps: Sequence[int] | None,
        hires_steps: int | None,
        **others: Any,
    ) -> tuple[int, int]:
        """Steps of the schedules of both passes, of which the last parts are walked."""
        first = num_inference_steps if timesteps is None else len(timesteps)
        return first, hires_steps or first

    def _passes(
        self,
        laid_out: canvas.Canvas | None,
        *,
        scheduler: str,
        num_inference_steps: int,
        timesteps: Sequence[int] | None,
        strength: float,
        height: int | None,
        width: int | None,
        hires: float | None,
        hires_strength: float,
        hires_steps: int | None,
        hires_tile: int | None,
        use_resolution_binning: bool,
        **others: Any,
    ) -> list[image_to_image.Pass]:
        """The walks to be taken: one, and with hires a second one at the larger size."""
        height, width = (height, width) if laid_out is None else laid_out.size
        size = self.drawn_size(height, width, use_resolution_binning)
        full = laid_out is None or laid_out.grown
        parts: list[tuple[Any, float, tuple[int, int], int | None]] = [
            (
                self._laid_out(scheduler, num_inference_steps, timesteps),
                1.0 if full else strength,
                size,
                None,
            )
        ]
        if hires is not None:
            larger = self.hires_size(size, hires)
            tile = self._hires_tile(larger, hires_tile)
            walk = self._laid_out(
                scheduler, hires_steps or num_inference_steps, None if hires_steps else timesteps
            )
            parts.append((walk, hires_strength, larger, tile))
        passes = [
            image_to_image.Pass(walk, image_to_image.last_part(walk, part), size, tile)
            for walk, part, size, tile in parts
        ]
        return [one for one in passes if len(one.timesteps)]  # a picture is only enlarged at strength 0

    def _hires_tile(self, size: tuple[int, int], tile: int | None) -> int | None:
        """Pixels per side of the tiles in which a size is refined; None: all at once."""
        if tile is None and max(size) > image_to_image.TILED_BEYOND * self.native_size:
            tile = self.native_size
        return None if tile is None or tile >= max(size) else tile

    def _known(
        self,
        one: image_to_image.Pass,
        noise: Tensor,
        laid_out: canvas.Canvas | None,
        earlier: Tensor | None,  # latents of the pass before
        upscale: str,
    ) -> image_to_image.Known | None:
        """What a pass starts from beside noise; None: nothing."""
        stays = None
        if laid_out is not None and (earlier is None or laid_out.mask is not None):
            stays = image_to_image.known(
                laid_out, one.size, self.encode_pictures, noise, self.vae_scale_factor
            )
        if earlier is None:
            return stays
        if upscale == "latents":
            latents = image_to_image.enlarged(earlier, self._latent_size(*one.size))
        else:
            images = image_to_image.enlarged(self.decode(earlier, "pt"), one.size).clamp(0, 1)
            latents = self.encode_pictures(images)
        if stays is None or stays.free is None:
            return image_to_image.Known(latents, noise, None)
        latents = torch.where(stays.free, latents, stays.latents)
        return image_to_image.Known(latents, noise, stays.free)

    def _prepare(
        self,
        captions: Tensor | TextTurns,  # (B or 2 B, L, D), the unconditional half first
        mask: Tensor | None,
        timesteps: Tensor,
        size: tuple[int, int],  # (height, width) in pixels, as drawn
        guidance_scale: float,  # 1: there is one half only
        generator: Generators = None,
        plan: step_savers.Plan = (),
    ) -> Predict:
        """Compute once what no step changes, and give the function a step calls."""
        conditions = self.micro_conditions(*size)
        return self.predictor_for(captions, mask, timesteps, conditions, guidance_scale, plan=plan)

    def _text(
        self,
        count: int,  # of steps
        *,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str],
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        guidance_scale: float,
        null_caption: str,
        num_images_per_prompt: int,
        prompt_syntax: str,
        clean_caption: bool,
        max_sequence_length: int,
        long_prompt: str,
        **others: Any,
    ) -> TextTurns:
        """What each step reads, on the transformer's device. Every different text is encoded once."""
        limits: dict[str, Any] = {
            "clean_caption": clean_caption,
            "max_sequence_length": max_sequence_length,
            "long_prompt": long_prompt,
        }
        given = prompt_embeds, prompt_attention_mask
        negative_given = negative_prompt_embeds, negative_prompt_attention_mask
        guided = guidance_scale > 1.0
        own = _texts(prompt) if prompt_embeds is None else []
        against = _texts(negative_prompt) if guided and negative_prompt_embeds is None else []
        read, turns = prompts.variants([*own, *against], count, prompt_syntax)

        @functools.cache
        def positive(row: prompts.Row) -> States:
            return _repeat(*self._captions(row, given, **limits), num_images_per_prompt)

        @functools.cache
        def alone(row: prompts.Row) -> States:
            return self._captions(row, negative_given, **limits)

        def negative(row: prompts.Row, of: prompts.Row) -> States:
            if null_caption == "prompt" and negative_prompt_embeds is None:
                return self.encode_null(row, positive(of)[1], **limits)
            captions, mask = alone(row)
            return _repeat(captions, mask, len(positive(of)[0]) // len(captions))

        def states(row: prompts.Row) -> States:
            words, others = row[: len(own)], row[len(own) :]
            return _stack(negative(others, words), positive(words)) if guided else positive(words)

        return TextTurns([states(row) for row in read], turns)

    def _captions(self, texts: Sequence[str | Words], given: Given, **limits: Any) -> States:
        """(B, L, D) and (B, L), on the transformer's device: what was handed in, else the texts encoded."""
        plain = [one.text if isinstance(one, Words) and not one.weights else one for one in texts]
        embeds, mask = given if given[0] is not None else self.encode(plain, **limits)
        assert embeds is not None and mask is not None
        return embeds.to(self.device, self.transformer.dtype), mask.to(self.device)

    def _cleaned(self, text: str | Words, clean_caption: bool) -> Words:
        """As the network was trained to read it."""
        if isinstance(text, Words):
            if text.weights:
                return text.cleaned()
            text = text.text
        return Words(_clean(text, clean_caption))

    def _encoded(self, words: Words, limit: int) -> Tensor:
        """(L, D) of a cleaned text, cut to the limit."""
        ids = self.tokenizer(words.text, truncation=True, max_length=limit).input_ids
        if len(ids) == limit and self._length(words.text) > limit:
            log.warning("the model reads %d tokens; the end of the prompt is cut off", limit)
        row = self._vectors(words.text, ids)
        return self._weighted(row, ids, words) if words.weights else row

    def _weighted(self, row: Tensor, ids: Sequence[int], words: Words) -> Tensor:
        """The vectors (L, D) of these tokens, with the words' weights."""
        weights = prompts.token_weights(self.tokenizer, words, len(ids))
        nothing = self.tokenizer("").input_ids

        def encode(some: Sequence[int]) -> Tensor:
            # Kept by their numbers, behind a character that no text has.
            name = "" if list(some) == list(nothing) else "\0" + ",".join(map(str, some))
            return self._vectors(name, some)

        return prompts.weigh(row, ids, weights, encode, encode(nothing)[-1])

    def _vectors(self, name: str, ids: Sequence[int]) -> Tensor:
        """(L, D) of these tokens, and kept by this name if they are kept at all."""
        device = self.text_encoder.device
        row = self.embeddings.get(name, len(ids)) if self.embeddings else None
        if row is None:
            ids_1L = torch.tensor([list(ids)], device=device)
            row = self.text_encoder(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L))[0][0]
            if self.embeddings:
                self.embeddings.put(name, len(ids), row)
        return row.to(device)

    def _length(self, text: str) -> int:
        """Tokens of a cleaned text, the end token included."""
        return len(self.tokenizer(text, verbose=False).input_ids)


def _texts(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or [])


def _check_texts(name: str, texts: Any) -> None:
    if texts is None or isinstance(texts, str):
        return
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or a list of texts")


def _check_embeds(name: str, embeds: Tensor | None, mask: Tensor | None) -> None:
    if embeds is None:
        return
    if embeds.ndim != 3:
        raise ValueError(f"{name}_embeds must be (prompts, tokens, width), not {tuple(embeds.shape)}")
    if mask is None or mask.shape != embeds.shape[:2]:
        raise ValueError(f"{name}_embeds need a {name}_attention_mask of shape {tuple(embeds.shape[:2])}")
    if not mask.bool().any(dim=1).all():
        raise ValueError(f"{name}_attention_mask has a row without any token")


def _rows(texts: str | list[str] | None, embeds: Tensor | None) -> int:
    if embeds is not None:
        return embeds.shape[0]
    return len(texts) if isinstance(texts, list) else 1


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors of (L, D) to one of (B, longest, D) and its mask."""
    longest = max(len(row) for row in rows)
    padded = torch.stack([functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


def _repeat(captions: Tensor, mask: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Each row several times, side by side."""
    return captions.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)


def _stack(*batches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of captions and masks, of different lengths, to one."""
    longest = max(captions.shape[1] for captions, _ in batches)
    padded = [
        (functional.pad(captions, (0, 0, 0, longest - captions.shape[1])), _pad_mask(mask, longest))
        for captions, mask in batches
    ]
    return torch.cat([captions for captions, _ in padded]), torch.cat([mask for _, mask in padded])


def _pad_mask(mask: Tensor, length: int) -> Tensor:
    return functional.pad(mask.bool(), (0, length - mask.shape[1]), value=False)


def _clean(text: str, thoroughly: bool) -> str:
    """As the network was trained to read it.

    `thoroughly` is diffusers' cleaning of captions from the web, twice as it does it. It imports diffusers:
    seconds.
    """
    if not thoroughly:
        return text.lower().strip()
    from diffusers import PixArtSigmaPipeline as Theirs
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if not (is_bs4_available() and is_ftfy_available()):
        raise ValueError("clean_caption needs two more packages: pip install beautifulsoup4 ftfy")
    cleaner = Theirs.__new__(Theirs)  # the method reads nothing but a class attribute
    return cleaner._clean_caption(cleaner._clean_caption(text))
