"""DiT: a class to a picture. Peebles & Xie 2022, arXiv:2212.09748.

The pipeline reads and writes ordinary diffusers folders and takes the arguments of diffusers' `DiTPipeline`.
It draws what the official code draws, which diffusers' does not: see `pipelines.models.dit` for the network.
With `LearnedRangeScheduler` it is the official sampler, with any other scheduler it takes the noise and
leaves the learned variance. Further differences to diffusers, on purpose:

- `denoise` is a generator that yields after each step. Leaving the loop, or `close()`, cancels the picture.
- The label of no class follows from the weights' number of classes; diffusers' is 1000, whatever the model.
- Noise is drawn in float32 on the generator's device, so that a CPU seed means one picture on every device
  and in every dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines import Step, components, schedulers, step_savers
from pipelines.class_labels import ClassLabels, Labels
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
from pipelines.learned_range import LearnedRangeScheduler
from pipelines.models.dit import DiTTransformer2DModel, Modulation
from pipelines.models.network import read_json
from pipelines.scheduler_base import index_entry, noise_schedule, standard_noise
from pipelines.step_savers import StepSaver

Callback = Callable[["DiTPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

OFFICIAL = "learned-range"  # the official sampler, next to those of pipelines.schedulers
TABLE_BYTES = 2**27  # of adaLN tables computed ahead


class DiTPipeline(ClassLabels, LatentImagePipeline):
    """Three parts, the names of the classes, and the recipe. Parts may be ours or the libraries'."""

    conditional_half = 0
    cross_attention = False

    parts = ("vae", "transformer", "scheduler")

    def __init__(
        self,
        vae: Any,
        transformer: DiTTransformer2DModel,
        scheduler: Any,  # a model to copy: every run walks its own
        id2label: Mapping[Any, str] | None = None,  # number of a class -> its names, separated by commas
    ) -> None:
        super().__init__(vae, transformer, scheduler)
        self.name_classes(id2label or {})

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        torch_dtype: torch.dtype | None = None,  # None: as stored
        device: torch.device | str | None = None,  # None: the CPU
        own_parts: bool = True,  # False: diffusers' classes for the VAE and the scheduler
        offload: Mapping[str, str] | None = None,  # parts that stay elsewhere: see `pipelines.streaming`
    ) -> Self:
        """Read a diffusers folder.

        Raises ValueError naming the file: parts missing, another family, keys or tensors that do not fit,
        numbers that are not finite, names of classes that the weights do not have.
        """
        folder = Path(folder)
        classes = components.read_index(folder, "DiTPipeline", cls.parts)
        # The published folders call it by its older name, which belongs to another family elsewhere.
        if classes["transformer"] not in ("DiTTransformer2DModel", "Transformer2DModel"):
            raise ValueError(f"{folder}: a {classes['transformer']} does not belong into a DiTPipeline")
        classes["transformer"] = "DiTTransformer2DModel"
        loaded = components.load_all(
            folder, classes, torch_dtype=torch_dtype, device=device, own=own_parts, offload=offload
        )
        index = folder / "model_index.json"
        try:
            return cls(**loaded, id2label=read_json(index).get("id2label"))
        except ValueError as error:
            raise ValueError(f"{index}: {error}") from error

    def save_pretrained(self, folder: Path | str, *, published: bool = True) -> None:
        """Write a folder that diffusers' pipeline reads as well, unless the scheduler is ours alone.

        `published` False writes the smaller file of weights, which only we read.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.vae.save_pretrained(folder / "vae")
        self.transformer.save_pretrained(folder / "transformer", published=published)
        self.scheduler.save_pretrained(folder / "scheduler")
        # What diffusers does not have it must not look for: it would fill missing weights with random ones.
        components.write_index(
            folder,
            "DiTPipeline",
            {
                "vae": ("diffusers", "AutoencoderKL"),
                "transformer": ("diffusers" if published else "pipelines", "DiTTransformer2DModel"),
                "scheduler": index_entry(self.scheduler),
            },
            self.stored_names(),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks."""
        self.vae.to(device=device, dtype=dtype)
        self.transformer.to(device=device, dtype=dtype)
        return self

    # The recipe

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Labels,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,  # see `denoise`
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw, and return the pictures."""
        step = None
        for step in self.denoise(class_labels, output_type=output_type, **options):  # noqa: B007 - the last
            pass
        assert step is not None  # there is at least one step
        images = self.decode(step.latents, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    @torch.inference_mode()
    def denoise(
        self,
        class_labels: Labels,
        *,
        height: int | None = None,  # pixels; None: native
        width: int | None = None,
        guidance_scale: float = 4.0,  # 1 or less: no guidance, half the work
        guidance_channels: int | None = None,  # of the noise, from the first; None: all; officially 3
        num_inference_steps: int = 50,
        scheduler: str = schedulers.STORED,  # or "learned-range", or a name of pipelines.schedulers
        generator: Generators = None,  # one for all pictures, or a list with one for each
        savers: str | Sequence[StepSaver] = (),  # "guidance=0.1:0.6", see pipelines.step_savers
        num_images_per_prompt: int = 1,
        eta: float = 0.0,  # for schedulers that have it
        latents: Tensor | None = None,  # (B, C, Y, X) of standard noise, instead of drawing it
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[Step]:
        """Yield a Step after each denoising step; stop iterating to cancel."""
        # 1. Refuse what we cannot do
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self.check(**arguments)
        # 2. Classes to numbers
        labels = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
        # 3. Lay out the schedule, on a copy: runs share nothing
        walk = self._walk(scheduler)
        walk.set_timesteps(num_inference_steps, device=self.device)
        # 4. Start from noise, as strong as the schedule begins
        if latents is None:
            latents = self.noise(
                len(labels), height or self.native_size, width or self.native_size, generator
            )
        latents = latents.to(self.device, torch.float32) * walk.init_noise_sigma
        # 5. Walk
        plan = self._plan(savers, walk.timesteps, guidance_scale)
        predict = self.predictor(labels, walk.timesteps, guidance_scale, guidance_channels, plan)
        learned = _learned_variance(walk)
        extra = {} if learned else accepted(walk.step, {"generator": generator, "eta": eta})
        count = len(walk.timesteps)
        self.interrupt = False
        for index, timestep in enumerate(walk.timesteps):
            prediction = predict(walk.scale_model_input(latents, timestep), index, timestep)
            if learned:
                extra = {"variance_noise": self.step_noise(latents, generator, guidance_scale > 1.0)}
            else:
                prediction = prediction[:, : latents.shape[1]]
            latents = walk.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                chosen = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                returned = callback_on_step_end(self, index, timestep, chosen) or {}
                latents = returned.get("latents", latents)
            yield Step(index, count, latents, timestep, getattr(walk, "denoised", None))
            if self.interrupt:
                return

    def _walk(self, name: str) -> Any:
        """The scheduler of this name, for one run."""
        if name == schedulers.STORED:
            return copy.deepcopy(self.scheduler)
        if name == OFFICIAL:
            return LearnedRangeScheduler.like(self.scheduler)
        return schedulers.make(name, self.scheduler)

    def predictor(
        self,
        labels: Sequence[int],  # one for each picture
        timesteps: Tensor,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        plan: step_savers.Plan = (),  # what each step computes; empty: all of it
    ) -> Predict:
        """The function a step calls: latents (B, C, Y, X) to the guided prediction, all its channels.

        Guidance moves the first `guidance_channels` channels of the noise. All others, the variance among
        them, are those of the class itself. The official code guides 3 of 4, and its published numbers
        were measured so.
        """
        transformer, pictures = self.transformer, len(labels)
        guided = guidance_scale > 1.0
        moved = transformer.config.in_channels if guidance_channels is None else guidance_channels
        halves = [*labels, *[transformer.config.null_label] * pictures] if guided else [*labels]
        network = conditioned(transformer, halves, timesteps, self.exact)
        full = step_savers.Call(guided=guided)

        def predict(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            call = plan[index] if plan else full
            rows = None if call.guided == guided else pictures  # or the first half alone
            predicted = network(latents.to(transformer.dtype), index, rows, **call.hooks).sample.float()
            if not call.guided:
                return predicted
            of_class, of_none = predicted.chunk(2)
            noise = of_none[:, :moved] + guidance_scale * (of_class[:, :moved] - of_none[:, :moved])
            return torch.cat([noise, of_class[:, moved:]], dim=1)

        return predict

    # Its verbs

    def check(
        self,
        class_labels: Labels,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 50,
        scheduler: str = schedulers.STORED,
        generator: Generators = None,
        savers: str | Sequence[StepSaver] = (),
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **_: Any,
    ) -> None:
        """Raise ValueError for anything `denoise` could not do with these arguments, before any work."""
        config = self.transformer.config
        labels = self.get_label_ids(class_labels)
        check_guidance(guidance_scale)
        if guidance_scale > 1.0 and config.null_label is None:
            raise ValueError(
                "these weights know no picture without a class: guidance_scale must be 1 or less"
            )
        if guidance_channels is not None:
            check_integer("guidance_channels", guidance_channels, 1, config.in_channels)
        check_choice("scheduler", scheduler, (*schedulers.names(), OFFICIAL))
        own = scheduler in (schedulers.STORED, OFFICIAL)  # the others may take seconds to import
        walk = self._walk(scheduler) if own else None
        learned = walk is not None and _learned_variance(walk)
        if learned and self.transformer.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"these weights answer {self.transformer.out_channels} channels for {config.in_channels}, "
                "without the variance that the official sampler needs; take another scheduler"
            )
        most = getattr(self.scheduler.config, "num_train_timesteps", MAX_STEPS)
        check_integer("num_inference_steps", num_inference_steps, 2 if learned else 1, most)
        if walk is None:
            noise_schedule(self.scheduler)
        else:
            walk.set_timesteps(num_inference_steps)
        if step_savers.parse(savers):
            if walk is None:
                walk = self._walk(scheduler)
                walk.set_timesteps(num_inference_steps)
            self._plan(savers, walk.timesteps, guidance_scale)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, 10_000)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents"}
        if unknown:
            raise ValueError(f"callbacks can be given latents, not {', '.join(sorted(unknown))}")
        self._check_size("height", height, use_resolution_binning=False)
        self._check_size("width", width, use_resolution_binning=False)
        batch = len(labels) * num_images_per_prompt
        if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != batch:
            raise ValueError(f"there are {len(generator)} generators for {batch} pictures")
        if latents is not None:
            rows, columns = self._latent_size(height or self.native_size, width or self.native_size)
            shape = (batch, config.in_channels, rows, columns)
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")

    def step_noise(self, latents: Tensor, generator: Generators, guided: bool) -> Tensor:
        """Standard noise for one step of the official sampler, as `latents`.

        The official code walks both halves of a guided batch, each with its own noise. What happens to the
        second changes nothing: both are started afresh from the first in every step. So its noise is drawn,
        to leave the generator where the official code does, and dropped. With a list of generators picture n
        gets what it would get alone.
        """
        times = 2 if guided else 1
        batch, *shape = latents.shape
        if generator is None or isinstance(generator, torch.Generator):
            return standard_noise((times * batch, *shape), generator, latents.device)[:batch]
        return torch.cat([standard_noise((times, *shape), one, latents.device)[:1] for one in generator])


def conditioned(transformer: Any, labels: Sequence[int], timesteps: Tensor, exact: str) -> Callable[..., Any]:
    """The network with its labels: latents or clouds and the index of a step -> its output.

    `transformer` is a DiT, in two dimensions or three. Where `exact` is "plain" everything is computed at
    every step for every row, as published; else tables are computed ahead, and rows shared.
    """
    if exact != "plain":
        modulation = modulations(transformer, labels, timesteps)

        def lean(x: Tensor, index: int, first: int | None = None, **hooks: Any) -> Any:
            tables = modulation(index)
            if first is not None:  # of the labels, instead of all
                tables = tables.at(slice(first))
            return transformer(x, modulation=tables, **hooks)

        return lean
    rows, device = len(labels), transformer.device
    labels_R = torch.tensor(labels, device=device)

    def at_step(x: Tensor, index: int, first: None = None) -> Any:
        halves = x.repeat(rows // len(x), *[1] * (x.ndim - 1))
        return transformer(halves, timesteps[index].to(device).expand(rows), labels_R)

    return at_step


def modulations(transformer: Any, labels: Sequence[int], timesteps: Tensor) -> Callable[[int], Modulation]:
    """Index of a step -> adaLN tables of these labels, computed for many steps at once.

    `transformer` is a DiT, in two dimensions or three.
    """
    device = transformer.device
    different, rows = torch.tensor(labels).unique(return_inverse=True)
    different, rows = different.to(device), rows.to(device)
    config = transformer.config
    one_step = len(different) * (6 * config.num_layers + 2) * config.width * transformer.dtype.itemsize
    ahead = max(1, TABLE_BYTES // one_step)
    start, table = 0, None

    def modulation(index: int) -> Modulation:
        nonlocal start, table
        if table is None or not start <= index < start + ahead:
            start = index
            chosen = timesteps[start : start + ahead].to(device)
            table = transformer.modulation(
                chosen.repeat_interleave(len(different)), different.repeat(len(chosen))
            )
        return table.at((index - start) * len(different) + rows)

    return modulation


def _learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler's step wants the channels of the variance as well."""
    return getattr(scheduler, "learned_variance", False)
