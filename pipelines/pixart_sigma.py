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
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from pipelines import Step, components, schedulers, step_savers
from pipelines.bins import BINS, nearest_bin
from pipelines.latent_images import (
    MAX_STEPS,
    OUTPUT_TYPES,
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
from pipelines.scheduler_base import index_entry, noise_schedule
from pipelines.step_savers import StepSaver

log = logging.getLogger(__name__)

Callback = Callable[["PixArtSigmaPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class Embeddings(Protocol):
    """What keeps encoded prompts: vectors (L, D) of a text of which so many tokens are read."""

    def get(self, text: str, tokens: int) -> Tensor | None: ...

    def put(self, text: str, tokens: int, vectors: Tensor) -> None: ...


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
        stream_text_encoder: bool = False,  # leave it in its file, and read each layer when it is called
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
            streamed=("text_encoder",) if stream_text_encoder else (),
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
        output_type: str = "pil",
        return_dict: bool = True,
        use_resolution_binning: bool = True,
        **options: Any,  # see `denoise`
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw, and return the pictures."""
        step = None
        for step in self.denoise(  # noqa: B007 - the last step is what we are after
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            use_resolution_binning=use_resolution_binning,
            output_type=output_type,
            **options,
        ):
            pass
        assert step is not None  # there is at least one step
        size = (height or self.native_size, width or self.native_size)
        images = self.decode(step.latents, output_type, size=size)
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
        eta: float = 0.0,  # for schedulers that have it
        latents: Tensor | None = None,  # (B, C, Y, X) of standard noise, instead of drawing it
        prompt_embeds: Tensor | None = None,  # (B, L, D), instead of a prompt
        prompt_attention_mask: Tensor | None = None,  # (B, L)
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,  # tokens
        use_resolution_binning: bool = True,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **more: Any,  # what a subclass adds, for its `check` and `_prepare`
    ) -> Iterator[Step]:
        """Yield a Step after each denoising step; stop iterating to cancel."""
        # 1. Refuse what we cannot do
        arguments = {name: value for name, value in locals().items() if name not in ("self", "more")}
        self.check(**arguments, **more)
        # 2. Words to text states, the unconditional half first
        guided = guidance_scale > 1.0
        limits: dict[str, Any] = {"clean_caption": clean_caption, "max_sequence_length": max_sequence_length}
        captions, mask = self._captions(prompt, prompt_embeds, prompt_attention_mask, **limits)
        captions, mask = _repeat(captions, mask, num_images_per_prompt)
        batch = len(captions)
        if guided:
            if null_caption == "prompt" and negative_prompt_embeds is None:
                empty, empty_mask = self.encode_null(negative_prompt, mask, **limits)
            else:
                empty, empty_mask = self._captions(
                    negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, **limits
                )
                empty, empty_mask = _repeat(empty, empty_mask, batch // len(empty))
            captions, mask = _stack((empty, empty_mask), (captions, mask))
        # 3. Lay out the schedule, on a copy: runs share nothing
        walk = self._laid_out(scheduler, num_inference_steps, timesteps)
        # 4. Start from noise, as strong as the schedule begins
        size = self.drawn_size(height, width, use_resolution_binning)
        noise = self.noise(batch, *size, generator) if latents is None else latents
        latents = noise.to(self.device, torch.float32) * walk.init_noise_sigma
        # 5. Walk
        strength = guidance_scale if guided else 1.0
        plan = self._plan(savers, walk.timesteps, strength)
        predict = self._prepare(captions, mask, walk.timesteps, size, strength, generator, plan=plan, **more)
        extra = accepted(walk.step, {"generator": generator, "eta": eta})
        count = len(walk.timesteps)
        self.interrupt = False
        for index, timestep in enumerate(walk.timesteps):
            prediction = predict(walk.scale_model_input(latents, timestep), index, timestep)
            latents = walk.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                offered = {"latents": latents, "prompt_embeds": captions}
                chosen = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, index, timestep, chosen) or {}
                latents = returned.get("latents", latents)
            yield Step(index, count, latents, timestep, getattr(walk, "denoised", None))
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
        captions: Tensor,
        mask: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
        guidance_scale: float,
        network: Callable[..., Any] | None = None,  # called like the transformer; None: the transformer
        text_states: Callable[..., Any] | None = None,  # its own; None: the transformer's
        plan: step_savers.Plan = (),
    ) -> Predict:
        """`predictor`, out of what it needs computed once; or its twin where `exact` is "plain", which
        computes everything at every step and over padded captions, as published."""
        if self.exact != "plain":
            text_states = text_states or self.transformer.text_states
            text, alone = text_states(captions, mask), None
            if guidance_scale > 1.0 and not all(call.guided for call in plan):
                half = len(captions) // 2
                alone = text_states(captions[half:], mask[half:])
            modulation = self.transformer.modulation(timesteps, conditions)
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
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 300,
        use_resolution_binning: bool = True,
        output_type: str = "pil",
        eta: float = 0.0,
        clean_caption: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Raise ValueError for anything `denoise` could not do with these arguments, before any work."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        _check_texts("prompt", prompt)
        _check_texts("negative_prompt", negative_prompt)
        _check_embeds("prompt", prompt_embeds, prompt_attention_mask)
        _check_embeds("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask)
        check_guidance(guidance_scale)
        prompts = _rows(prompt, prompt_embeds)
        negatives = _rows(negative_prompt, negative_prompt_embeds)  # one serves all prompts
        if guidance_scale > 1.0 and negatives not in (1, prompts):
            raise ValueError(f"there are {negatives} negative prompts for {prompts} prompts")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, 10_000)
        check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_integer("max_sequence_length", max_sequence_length, 1, 10_000)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("scheduler", scheduler, self.scheduler_names())
        check_choice("null_caption", null_caption, NULL_CAPTIONS)
        self._check_walk(scheduler, num_inference_steps, timesteps)
        if step_savers.parse(savers):
            walk = self._laid_out(scheduler, num_inference_steps, timesteps)
            self._plan(savers, walk.timesteps, guidance_scale)
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents", "prompt_embeds"}
        if unknown:
            raise ValueError(
                f"callbacks can be given latents and prompt_embeds, not {', '.join(sorted(unknown))}"
            )
        self._check_size("height", height, use_resolution_binning)
        self._check_size("width", width, use_resolution_binning)
        batch = prompts * num_images_per_prompt
        if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != batch:
            raise ValueError(f"there are {len(generator)} generators for {batch} pictures")
        if latents is not None:
            rows, columns = self._latent_size(*self.drawn_size(height, width, use_resolution_binning))
            shape = (batch, self.transformer.config.in_channels, rows, columns)
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")

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

    @torch.inference_mode()
    def encode(
        self, prompts: list[str], max_sequence_length: int = 300, clean_caption: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Texts to (B, L, D) vectors and a (B, L) mask, L being the longest text's number of tokens.

        Every text is encoded by itself and at its real length, so that its vectors do not depend on its
        neighbours. Longer texts than `max_sequence_length` tokens are cut, and the log says so.
        """
        kept = self.embeddings
        rows = []
        for text in prompts:
            cleaned = _clean(text, clean_caption)
            ids = self.tokenizer(cleaned, truncation=True, max_length=max_sequence_length).input_ids
            if len(ids) == max_sequence_length and len(
                self.tokenizer(cleaned, verbose=False).input_ids
            ) > len(ids):
                log.warning(
                    "the model reads %d tokens; the end of the prompt is cut off", max_sequence_length
                )
            device = self.text_encoder.device
            row = kept.get(cleaned, len(ids)) if kept else None
            if row is None:
                ids_1L = torch.tensor([ids], device=device)
                row = self.text_encoder(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L))[0][0]
                if kept:
                    kept.put(cleaned, len(ids), row)
            rows.append(row.to(device))
        return _pad(rows)

    @torch.inference_mode()
    def encode_null(
        self,
        texts: str | list[str],
        mask: Tensor,
        max_sequence_length: int = 300,
        clean_caption: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Null captions the published way: (B, L, D) and the mask (B, L) of the prompts, which they share.

        The published code attends the null caption over as many tokens as the prompt has, the padding behind
        its end token included; diffusers over its own tokens only. `texts`: one, or one for each row.
        """
        texts = [texts] if isinstance(texts, str) else texts
        device = self.text_encoder.device
        rows = []
        for index, count in enumerate(mask.bool().sum(1).tolist()):
            text = _clean(texts[index * len(texts) // len(mask)], clean_caption)
            ids = self.tokenizer(text, truncation=True, max_length=max_sequence_length).input_ids
            padding = [self.tokenizer.pad_token_id] * (count - len(ids))
            ids_1L = torch.tensor([ids + padding], device=device)
            real_1L = torch.arange(ids_1L.shape[1], device=device)[None] < len(ids)
            states = self.text_encoder(input_ids=ids_1L, attention_mask=real_1L.long())[0]
            rows.append(states[0, :count])
        captions, shared = _pad(rows)
        return captions.to(self.device, self.transformer.dtype), shared.to(self.device)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, the end token included."""
        return len(self.tokenizer(prompt.lower().strip(), verbose=False).input_ids)

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

    def _prepare(
        self,
        captions: Tensor,  # (B or 2 B, L, D), the unconditional half first
        mask: Tensor,
        timesteps: Tensor,
        size: tuple[int, int],  # (height, width) in pixels, as drawn
        guidance_scale: float,  # 1: there is one half only
        generator: Generators = None,
        plan: step_savers.Plan = (),
    ) -> Predict:
        """Compute once what no step changes, and give the function a step calls."""
        conditions = self.micro_conditions(*size)
        return self.predictor_for(captions, mask, timesteps, conditions, guidance_scale, plan=plan)

    def _captions(
        self, texts: str | list[str] | None, embeds: Tensor | None, mask: Tensor | None, **limits: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) and (B, L), on the transformer's device: what was handed in, else the texts encoded."""
        if embeds is None:
            embeds, mask = self.encode([texts] if isinstance(texts, str) else list(texts or []), **limits)
        assert mask is not None
        return embeds.to(self.device, self.transformer.dtype), mask.to(self.device)


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
