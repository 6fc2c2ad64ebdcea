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
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines import Step, components, schedulers
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

Labels = int | str | Sequence[int | str]  # classes by number or by name
Callback = Callable[["DiTPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

OFFICIAL = "learned-range"  # the official sampler, next to those of pipelines.schedulers
TABLE_BYTES = 2**27  # of adaLN tables computed ahead


class DiTPipeline(LatentImagePipeline):
    """Three parts, the names of the classes, and the recipe. Parts may be ours or the libraries'."""

    parts = ("vae", "transformer", "scheduler")

    def __init__(
        self,
        vae: Any,
        transformer: DiTTransformer2DModel,
        scheduler: Any,  # a model to copy: every run walks its own
        id2label: Mapping[Any, str] | None = None,  # number of a class -> its names, separated by commas
    ) -> None:
        super().__init__(vae, transformer, scheduler)
        self.id2label = _read_labels(id2label or {}, self.num_classes)
        self._names = _names(self.id2label)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        torch_dtype: torch.dtype | None = None,  # None: as stored
        device: torch.device | str | None = None,  # None: the CPU
        own_parts: bool = True,  # False: diffusers' classes for the VAE and the scheduler
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
        loaded = {
            name: components.load(
                folder / name, classes[name], torch_dtype=torch_dtype, device=device, own=own_parts
            )
            for name in cls.parts
        }
        channels, drawn = loaded["vae"].config.latent_channels, loaded["transformer"].config.in_channels
        if channels != drawn:
            raise ValueError(
                f"{folder}: the VAE has {channels} latent channels, the transformer draws {drawn}"
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
        schedulers = {
            "DPMSolver": ("diffusers", "DPMSolverMultistepScheduler"),
            "LearnedRangeScheduler": ("pipelines", "LearnedRangeScheduler"),
        }
        scheduler = type(self.scheduler).__name__
        names = {str(number): text for number, text in sorted(self.id2label.items())}
        components.write_index(
            folder,
            "DiTPipeline",
            {
                "vae": ("diffusers", "AutoencoderKL"),
                "transformer": ("diffusers" if published else "pipelines", "DiTTransformer2DModel"),
                "scheduler": schedulers.get(scheduler, ("diffusers", scheduler)),
            },
            {"id2label": names} if names else {},
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks."""
        self.vae.to(device=device, dtype=dtype)
        self.transformer.to(device=device, dtype=dtype)
        return self

    @property
    def num_classes(self) -> int:
        """Classes are numbered from 0 to this, without it."""
        return self.transformer.config.num_embeds_ada_norm

    # The names of the classes

    def find_labels(self, text: str) -> list[tuple[int, str]]:
        """(number, name) of every class with a name that holds the text, whole names first.

        Where no name does, those that are spelled much alike; the empty text finds all.
        """
        wanted = text.strip().casefold()
        found = [(name, numbers) for name, numbers in self._names.items() if wanted in name.casefold()]
        if not found:
            by_fold = {name.casefold(): name for name in self._names}
            close = difflib.get_close_matches(wanted, by_fold, n=5, cutoff=0.6)
            return [(number, by_fold[fold]) for fold in close for number in self._names[by_fold[fold]]]

        def rank(entry: tuple[int, str]) -> tuple[bool, bool, int, str]:
            number, name = entry
            return name.casefold() != wanted, not name.casefold().startswith(wanted), number, name

        return sorted(((number, name) for name, numbers in found for number in numbers), key=rank)

    def get_label_ids(self, class_labels: Labels) -> list[int]:
        """Numbers of classes given by number, by one of their names, or by a number in letters ("207").

        Upper and lower case are told apart only where that decides between two classes. Raises ValueError
        for a number out of range, an unknown name, or a name of several classes.
        """
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        if not isinstance(labels, list | tuple) or not labels:
            raise ValueError(f"class_labels must be a class or a list of classes, not {class_labels!r}")
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: Any) -> int:
        if isinstance(label, str):
            name = label.strip()
            numbers = self._called(name)
            if len(numbers) == 1:
                return numbers[0]
            if numbers:
                listed = ", ".join(f"{number} ({self.id2label[number]})" for number in numbers)
                raise ValueError(f"'{name}' names several classes: {listed}; give the number")
            if not name.isdecimal():
                raise ValueError(self._no_such_name(name))
            label = int(name)
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"a class is given by number or by name, not {label!r}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"there is no class {label}; they are numbered from 0 to {self.num_classes - 1}")
        return label

    def _called(self, name: str) -> list[int]:
        """Classes of exactly this name; else of it in other letters; else of all these names at once."""
        if name in self._names:
            return sorted(self._names[name])
        folded = name.casefold()
        alike = [numbers for known, numbers in self._names.items() if known.casefold() == folded]
        return sorted(set().union(*alike)) or [n for n, text in self.id2label.items() if text == name]

    def _no_such_name(self, name: str) -> str:
        if not self._names:
            return f"no class is called '{name}': these weights have no names; give a number"
        close = list(dict.fromkeys(known for _, known in self.find_labels(name)))[:5] if name else []
        if close:
            return f"no class is called '{name}'. Did you mean {', '.join(close)}?"
        return f"no class is called '{name}'; they also have numbers, from 0 to {self.num_classes - 1}"

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
        predict = self.predictor(labels, walk.timesteps, guidance_scale, guidance_channels)
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
    ) -> Predict:
        """The function a step calls: latents (B, C, Y, X) to the guided prediction, all its channels.

        Guidance moves the first `guidance_channels` channels of the noise. All others, the variance among
        them, are those of the class itself. The official code guides 3 of 4, and its published numbers
        were measured so. Caches wrap the function, one per run.
        """
        transformer, pictures = self.transformer, len(labels)
        guided = guidance_scale > 1.0
        moved = transformer.config.in_channels if guidance_channels is None else guidance_channels
        halves = [*labels, *[transformer.config.null_label] * pictures] if guided else [*labels]
        modulation = self._modulations(halves, timesteps)

        def predict(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            predicted = transformer(
                latents.to(transformer.dtype), modulation=modulation(index)
            ).sample.float()
            if not guided:
                return predicted
            of_class, of_none = predicted.chunk(2)
            noise = of_none[:, :moved] + guidance_scale * (of_class[:, :moved] - of_none[:, :moved])
            return torch.cat([noise, of_class[:, moved:]], dim=1)

        return predict

    def _modulations(self, labels: Sequence[int], timesteps: Tensor) -> Callable[[int], Modulation]:
        """Index of a step -> adaLN tables of these labels, computed for many steps at once."""
        transformer = self.transformer
        different, rows = torch.tensor(labels).unique(return_inverse=True)
        different, rows = different.to(self.device), rows.to(self.device)
        config = transformer.config
        one_step = len(different) * (6 * config.num_layers + 2) * config.width * transformer.dtype.itemsize
        ahead = max(1, TABLE_BYTES // one_step)
        start, table = 0, None

        def modulation(index: int) -> Modulation:
            nonlocal start, table
            if table is None or not start <= index < start + ahead:
                start = index
                chosen = timesteps[start : start + ahead].to(self.device)
                table = transformer.modulation(
                    chosen.repeat_interleave(len(different)), different.repeat(len(chosen))
                )
            return table.at((index - start) * len(different) + rows)

        return modulation

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
        learned = own and _learned_variance(self._walk(scheduler))
        if learned and self.transformer.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"these weights answer {self.transformer.out_channels} channels for {config.in_channels}, "
                "without the variance that the official sampler needs; take another scheduler"
            )
        most = getattr(self.scheduler.config, "num_train_timesteps", MAX_STEPS)
        check_integer("num_inference_steps", num_inference_steps, 2 if learned else 1, most)
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
            source = "cpu" if generator is None else generator.device
            drawn = torch.randn((times * batch, *shape), generator=generator, device=source)[:batch]
        else:
            alone = [torch.randn((times, *shape), generator=one, device=one.device)[:1] for one in generator]
            drawn = torch.cat([row.to(latents.device) for row in alone])
        return drawn.to(latents.device)


def _learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler's step wants the channels of the variance as well."""
    return getattr(scheduler, "learned_variance", False)


def _read_labels(id2label: Mapping[Any, str], classes: int) -> dict[int, str]:
    """Names by number. Raises ValueError for what is not a class of these weights or not a text."""
    if not isinstance(id2label, Mapping):
        raise ValueError("id2label must map numbers of classes to names")
    labels = {}
    for key, names in id2label.items():
        if not str(key).isdecimal() or not int(key) < classes:
            raise ValueError(f"id2label names a class {key!r}, the weights have 0 to {classes - 1}")
        if not isinstance(names, str):
            raise ValueError(f"id2label: the names of class {key} must be a text, not {names!r}")
        labels[int(key)] = names
    return labels


def _names(id2label: Mapping[int, str]) -> dict[str, set[int]]:
    """Every single name -> the classes that have it; some have two, such as the crane of ImageNet."""
    names: dict[str, set[int]] = {}
    for number, text in sorted(id2label.items()):
        for name in filter(None, (part.strip() for part in text.split(","))):
            names.setdefault(name, set()).add(number)
    return names
