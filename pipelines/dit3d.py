"""DiT-3D: a class to a cloud of points. Mo et al. 2023, arXiv:2307.01831.

Clouds are walked in the units of the training, in which every coordinate has about the spread of the noise,
and handed out in the units of the data: `std` times as large, around `mean`. Both lie in model_index.json.

Any scheduler of `pipelines.schedulers` will do; "ddpm" is the published one, `PointDiffusion`, of which the
published scripts take 1000 steps. Noise is drawn in float32 on the generator's device, so that a CPU seed
means one cloud on every device and in every dtype.

Shapes: B clouds, P points, K known points.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipelines import Step, attention, components, lean, schedulers
from pipelines.class_labels import ClassLabels, Labels
from pipelines.dit import conditioned
from pipelines.dpm_solver import DPMSolver, DPMSolverConfig
from pipelines.latent_images import (
    MAX_STEPS,
    Predict,
    accepted,
    check_choice,
    check_guidance,
    check_integer,
)
from pipelines.models.dit3d import DiT3DModel
from pipelines.models.network import read_json
from pipelines.point_diffusion import WARM, PointDiffusion, PointDiffusionConfig
from pipelines.scheduler_base import (
    Generators,
    Scheduler,
    index_entry,
    noise_schedule,
    settings,
    standard_noise,
)

Callback = Callable[["DiT3DPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

PUBLISHED = "ddpm"  # the name of PointDiffusion, whichever scheduler is stored
OUTPUT_TYPES = ("np", "pt", "latent")
NUM_POINTS = 2048  # of a cloud, as published
MOST_POINTS = 1_000_000
FARTHEST = 10.0  # spreads of the data from their mean that a known point may lie
# Schedulers that add noise on the way: two runs from nearly equal noise end far apart.
RANDOM = (
    "PointDiffusion",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "LCMSolver",
    "SASolverScheduler",
)


@dataclass(frozen=True, kw_only=True)
class WarmSolverConfig(DPMSolverConfig):
    """With betas that rise and then stay."""

    betas = PointDiffusionConfig.betas
    signal = PointDiffusionConfig.signal


class WarmSolver(DPMSolver):
    """DPM-Solver++ on a schedule that only `PointDiffusion` can store, such as that of airplanes."""

    config_class = WarmSolverConfig
    covered: ClassVar[dict[str, tuple[Any, ...]]] = DPMSolver.covered | {"beta_schedule": tuple(WARM)}


@dataclass
class PointCloudPipelineOutput:
    """(B, P, 3) float32 in the units of the data; an array, or a tensor for "pt"."""

    clouds: Any


class DiT3DPipeline(ClassLabels):
    """Two parts, the names of the classes, the units of the data, and the recipe."""

    parts = ("transformer", "scheduler")

    def __init__(
        self,
        transformer: DiT3DModel,
        scheduler: Any,  # a model to copy: every run walks its own
        id2label: Mapping[Any, str] | None = None,  # number of a class -> its names, separated by commas
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),  # of x, y and z over the data
        std: float = 1.0,  # of all coordinates around it
    ) -> None:
        if transformer.config.in_channels != 3:
            raise ValueError(
                f"the transformer has {transformer.config.in_channels} channels; a cloud has 3, x, y and z"
            )
        self.transformer = transformer
        self.scheduler = scheduler
        self.mean, self.std = _read_units(mean, std)
        self.name_classes(id2label or {})
        self.exact = lean.LEAN
        self.interrupt = False  # a callback may set it to stop after the current step

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        torch_dtype: torch.dtype | None = None,  # None: as stored
        device: torch.device | str | None = None,  # None: the CPU
        own_parts: bool = True,  # False: diffusers' class for the scheduler, where it has one
        offload: Mapping[str, str] | None = None,  # parts that stay elsewhere: see `pipelines.streaming`
    ) -> Self:
        """Read a folder that `save_pretrained` wrote.

        Raises ValueError naming the file: parts missing, another family, keys or tensors that do not fit,
        numbers that are not finite, names of classes that the weights do not have, no units.
        """
        folder = Path(folder)
        classes = components.read_index(folder, "DiT3DPipeline", cls.parts)
        if classes["transformer"] != "DiT3DModel":
            raise ValueError(f"{folder}: a {classes['transformer']} does not belong into a DiT3DPipeline")
        options = {"torch_dtype": torch_dtype, "device": device, "own": own_parts}
        loaded = {
            name: components.load(folder / name, known, offload=(offload or {}).get(name), **options)
            for name, known in classes.items()
        }
        path = folder / "model_index.json"
        index = read_json(path)
        lacking = [name for name in ("mean", "std") if name not in index]
        if lacking:
            raise ValueError(f"{path} lacks {' and '.join(map(repr, lacking))}, the units of the data")
        try:
            return cls(**loaded, id2label=index.get("id2label"), mean=index["mean"], std=index["std"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder in diffusers' form, for `from_pretrained`; diffusers has no such pipeline."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        components.write_index(
            folder,
            "DiT3DPipeline",
            {"transformer": ("pipelines", "DiT3DModel"), "scheduler": index_entry(self.scheduler)},
            {**self.stored_names(), "mean": list(self.mean), "std": self.std},
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the network."""
        self.transformer.to(device=device, dtype=dtype)
        return self

    def set_attention(self, name: str = "auto") -> str:
        """Choose the transformer's attention function; see `pipelines.attention`."""
        return attention.set_attention(self.transformer, name)

    def prepare(self, exact: str = "lean", *, int8: bool = False) -> Self:
        """Ready the network for drawing: see `LatentImagePipeline.prepare`."""
        self.exact = lean.prepare_all(exact, self.transformer, int8=int8)
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    # The recipe

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Labels,
        *,
        output_type: str = "np",
        return_dict: bool = True,
        **options: Any,  # see `denoise`
    ) -> PointCloudPipelineOutput | tuple[Any]:
        """Draw, and return the clouds."""
        step = None
        for step in self.denoise(class_labels, output_type=output_type, **options):  # noqa: B007 - the last
            pass
        assert step is not None  # there is at least one step
        clouds = self.decode(step.latents, output_type, options.get("known_points"))
        return PointCloudPipelineOutput(clouds) if return_dict else (clouds,)

    @torch.inference_mode()
    def denoise(
        self,
        class_labels: Labels,
        *,
        num_points: int = NUM_POINTS,
        guidance_scale: float = 1.0,  # 1 or less: no guidance, half the work; as published
        num_inference_steps: int = 50,  # 1000 as published, with the scheduler "ddpm"
        scheduler: str = schedulers.STORED,  # or a name of pipelines.schedulers
        generator: Generators = None,  # one for all clouds, or a list with one for each
        eta: float = 0.0,  # for schedulers that have it
        known_points: Any = None,  # (K, 3), or (B, K, 3), of the data's units: become the first K points
        latents: Tensor | None = None,  # (B, 3, P) of standard noise, instead of drawing it
        output_type: str = "np",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[Step]:
        """Yield a Step after each denoising step, with latents (B, 3, P); stop iterating to cancel."""
        # 1. Refuse what we cannot do
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self.check(**arguments)
        # 2. Classes to numbers
        labels = self.get_label_ids(class_labels)
        # 3. Lay out the schedule, on a copy: runs share nothing
        walk = self._walk(scheduler)
        walk.set_timesteps(num_inference_steps, device=self.device)
        # 4. Start from noise, as strong as the schedule begins
        if latents is None:
            latents = self.noise(len(labels), num_points, generator)
        latents = latents.to(self.device, torch.float32) * walk.init_noise_sigma
        # 5. Walk
        predict = self.predictor(labels, walk.timesteps, guidance_scale)
        known = None if known_points is None else self.encode(known_points)
        if known is not None:
            predict = self.keeping(predict, known, settings(walk)["prediction_type"])
        extra = accepted(walk.step, {"generator": generator, "eta": eta})
        count = len(walk.timesteps)
        self.interrupt = False
        for index, timestep in enumerate(walk.timesteps):
            prediction = predict(walk.scale_model_input(latents, timestep), index, timestep)
            latents = walk.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if known is not None and index == count - 1:
                latents = _replaced(latents, known)
            if callback_on_step_end is not None:
                chosen = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                returned = callback_on_step_end(self, index, timestep, chosen) or {}
                latents = returned.get("latents", latents)
            yield Step(index, count, latents, timestep, getattr(walk, "denoised", None))
            if self.interrupt:
                return

    def interpolate(
        self,
        class_labels: Labels,  # one class
        seed_a: int,
        seed_b: int,
        count: int = 8,  # of clouds, those of the two seeds among them
        *,
        num_points: int = NUM_POINTS,
        output_type: str = "np",
        **options: Any,  # see `denoise`
    ) -> PointCloudPipelineOutput:
        """Clouds on the way from that of one seed to that of another. Point p moves from point p to point p.

        Raises ValueError for schedulers that add noise on the way, besides what `check` raises for.
        """
        labels = self.get_label_ids(class_labels)
        if len(labels) != 1:
            raise ValueError(f"interpolation stays within one class, and here are {len(labels)}")
        for name in ("generator", "latents"):
            if options.get(name) is not None:
                raise ValueError(f"interpolation starts from its two seeds; leave out {name}")
        name = options.get("scheduler", schedulers.STORED)
        check_choice("scheduler", name, schedulers.names())
        walk = type(self._walk(name)).__name__
        if walk in RANDOM or options.get("eta", 0.0) != 0:
            raise ValueError(
                f"interpolation needs a scheduler that adds no noise on the way, unlike {walk}"
                f"{' with eta' if walk not in RANDOM else ''}; take 'dpm++', or 'ddim' with eta 0"
            )
        check_integer("num_points", num_points, 2, MOST_POINTS)
        noise = self.noise_between(seed_a, seed_b, count, num_points)
        options |= {"num_points": num_points, "latents": noise, "output_type": output_type}
        made = self(labels * count, **options)
        assert isinstance(made, PointCloudPipelineOutput)
        return made

    def _walk(self, name: str) -> Any:
        """The scheduler of this name, for one run."""
        if name == schedulers.STORED or (name == PUBLISHED and isinstance(self.scheduler, PointDiffusion)):
            return copy.deepcopy(self.scheduler)
        noise = noise_schedule(self.scheduler)
        if name == PUBLISHED:
            return PointDiffusion(**noise)
        if noise["beta_schedule"] not in WARM or noise["beta_schedule"] == "linear":
            return schedulers.make(name, self.scheduler)
        if name in OF_WARM:
            return OF_WARM[name](noise)
        betas = PointDiffusionConfig(**noise).betas().tolist()
        return schedulers.SCHEDULERS[name].make({**noise, "beta_schedule": "linear", "trained_betas": betas})

    def predictor(self, labels: Sequence[int], timesteps: Tensor, guidance_scale: float = 1.0) -> Predict:
        """The function a step calls: latents (B, 3, P) to the guided prediction.

        `labels` has one class for each cloud. Caches wrap the function, one per run.
        """
        transformer, clouds = self.transformer, len(labels)
        guided = guidance_scale > 1.0
        halves = [*labels, *[transformer.config.null_label] * clouds] if guided else [*labels]
        network = conditioned(transformer, halves, timesteps, self.exact)

        def predict(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            predicted = network(latents, index).sample[:, :3].float()
            if not guided:
                return predicted
            of_class, of_none = predicted.chunk(2)
            return of_none + guidance_scale * (of_class - of_none)

        return predict

    def keeping(self, predict: Predict, known: Tensor, prediction_type: str) -> Predict:
        """`predict` that knows the answer for the first K points: they end at `known` (B or 1, 3, K).

        On the way they are `known` with the noise of the timestep, whatever the scheduler: it is told the
        truth about them, and does the rest. So what the network is shown of them is what it was trained on.
        """
        signal = _signal(self.scheduler)
        truth = TRUTH[prediction_type]

        def kept(latents: Tensor, index: int, timestep: Tensor) -> Tensor:
            alpha, sigma = _alpha_sigma(signal, float(timestep))
            noise = (latents[..., : known.shape[2]] - alpha * known) / sigma
            return _replaced(predict(latents, index, timestep), truth(known, noise, alpha, sigma))

        return kept

    # Its verbs

    def check(
        self,
        class_labels: Labels,
        *,
        num_points: int = NUM_POINTS,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        scheduler: str = schedulers.STORED,
        generator: Generators = None,
        eta: float = 0.0,
        known_points: Any = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **_: Any,
    ) -> None:
        """Raise ValueError for anything `denoise` could not do with these arguments, before any work."""
        batch = len(self.get_label_ids(class_labels))
        check_integer("num_points", num_points, 2, MOST_POINTS)
        check_guidance(guidance_scale)
        if guidance_scale > 1.0 and self.transformer.config.null_label is None:
            raise ValueError("these weights know no cloud without a class: guidance_scale must be 1 or less")
        if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
            raise ValueError(f"eta must be a number from 0 to 1, not {eta!r}")
        check_choice("scheduler", scheduler, schedulers.names())
        own = scheduler in (schedulers.STORED, PUBLISHED, *OF_WARM)  # the others may take seconds to import
        walk = self._walk(scheduler) if own else None
        most = settings(self.scheduler).get("num_train_timesteps", MAX_STEPS)
        least = 2 if isinstance(walk, PointDiffusion) else 1
        check_integer("num_inference_steps", num_inference_steps, least, most)
        if walk is None:
            noise_schedule(self.scheduler)
        else:
            walk.set_timesteps(num_inference_steps)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents"}
        if unknown:
            raise ValueError(f"callbacks can be given latents, not {', '.join(sorted(unknown))}")
        if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != batch:
            raise ValueError(f"there are {len(generator)} generators for {batch} clouds")
        if latents is not None:
            shape = (batch, 3, num_points)
            if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
                raise ValueError(f"latents must be a tensor of {shape}, not {_described(latents)}")
            if not torch.isfinite(latents).all():
                raise ValueError("latents hold numbers that are not finite (NaN or infinity)")
        if known_points is not None:
            self._check_known(known_points, batch, num_points)

    def _check_known(self, known_points: Any, batch: int, num_points: int) -> None:
        known = self.encode(known_points)
        if known.shape[0] not in (1, batch):
            raise ValueError(f"known_points are of {known.shape[0]} clouds, and {batch} are asked for")
        if known.shape[2] > num_points:
            raise ValueError(
                f"there are {known.shape[2]} known points for clouds of {num_points}; "
                "give fewer, or ask for more with num_points"
            )
        reach = known.abs().max().item()
        if reach > FARTHEST:
            raise ValueError(
                f"known_points lie up to {reach:.0f} times the data's spread of {self.std:.3g} from its "
                "mean; bring them to the size and place of the clouds of the training"
            )

    def noise(self, batch: int, num_points: int = NUM_POINTS, generator: Generators = None) -> Tensor:
        """(batch, 3, P) of standard noise, float32.

        With a list of generators cloud n gets what it would get alone.
        """
        return standard_noise((batch, 3, num_points), generator, self.device)

    def noise_between(self, seed_a: int, seed_b: int, count: int, num_points: int = NUM_POINTS) -> Tensor:
        """(count, 3, P): noise of one seed, turned step by step into that of another; as strong all along."""
        check_integer("count", count, 2, 10_000)
        shares = [index / (count - 1) for index in range(count)]
        return torch.cat([self.noise_at(seed_a, seed_b, share, num_points) for share in shares])

    def noise_at(self, seed_a: int, seed_b: int, share: float, num_points: int = NUM_POINTS) -> Tensor:
        """(1, 3, P): noise of one seed, turned by this share of the way (0 to 1) into that of another."""
        for name, seed in (("seed_a", seed_a), ("seed_b", seed_b)):
            check_integer(name, seed, -(2**63), 2**64 - 1)
        first, last = (
            self.noise(1, num_points, torch.Generator("cpu").manual_seed(seed)) for seed in (seed_a, seed_b)
        )
        cosine = (first * last).sum().double() / (first.norm().double() * last.norm().double())
        angle = torch.acos(cosine.clamp(-1, 1)).item()
        if math.sin(angle) < 1e-6:  # one seed twice
            return first
        turn = share * angle
        of_first, of_last = (math.sin(part) / math.sin(angle) for part in (angle - turn, turn))
        return of_first * first + of_last * last

    def encode(self, points: Any) -> Tensor:
        """Points (K, 3), or (B, K, 3), in the units of the data, to (1 or B, 3, K) in those of the training.

        Raises ValueError for anything else, and for numbers that are not finite.
        """
        try:
            known = torch.as_tensor(points).to(self.device, torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"known_points must be (K, 3) numbers, not {_described(points)}") from error
        if known.ndim == 2:
            known = known[None]
        if known.ndim != 3 or known.shape[2] != 3 or not known.shape[1]:
            raise ValueError(
                f"known_points must be (K, 3), or (clouds, K, 3), not {_described(points)}; "
                "a row is one point"
            )
        if not torch.isfinite(known).all():
            raise ValueError("known_points hold numbers that are not finite (NaN or infinity)")
        return ((known - known.new_tensor(self.mean)) / self.std).mT.float()

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,  # (B, 3, P)
        output_type: str = "np",
        known_points: Any = None,  # as given to `denoise`: kept to the last bit, which rounding would cost
    ) -> Any:
        """Clouds (B, P, 3) float32 in the units of the data: an array, or a tensor for "pt".

        Latents of any step will do; the clouds that the network expects by then (`Step.denoised`) are better
        to look at.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return latents
        clouds = latents.float().mT * self.std + torch.tensor(self.mean, device=latents.device)
        if known_points is not None:
            known = torch.as_tensor(known_points).to(clouds)
            clouds[:, : known.shape[-2]] = known
        return clouds if output_type == "pt" else clouds.cpu().numpy()


# Schedulers of ours for schedules that no other can store
OF_WARM: Mapping[str, Callable[[Mapping[str, Any]], DPMSolver]] = {
    "dpm++": lambda noise: WarmSolver(**noise),
    "dpm++-official": lambda noise: WarmSolver(**noise, timestep_spacing="continuous"),
}

# What a network that knew the cloud would answer: from cloud, noise, and the shares of both
TRUTH: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda cloud, noise, alpha, sigma: noise,
    "v_prediction": lambda cloud, noise, alpha, sigma: alpha * noise - sigma * cloud,
    "sample": lambda cloud, noise, alpha, sigma: cloud.expand_as(noise),
}


def _replaced(values: Tensor, known: Tensor) -> Tensor:
    """(B, 3, P) whose first K points are `known` (B or 1, 3, K)."""
    count = known.shape[2]
    return torch.cat([known.expand(len(values), -1, -1).to(values), values[..., count:]], dim=2)


def _signal(scheduler: Any) -> Tensor:
    """The cloud's share of the variance at each timestep of the training, float64."""
    if isinstance(scheduler, Scheduler):
        return scheduler.config.signal(torch.float64)
    return scheduler.alphas_cumprod.double()


def _alpha_sigma(signal: Tensor, timestep: float) -> tuple[float, float]:
    """Shares of cloud and noise at a timestep; log alpha is linear between whole ones."""
    below = min(int(timestep), len(signal) - 1)
    above = min(below + 1, len(signal) - 1)
    share = timestep - below
    log_signal = (1 - share) * math.log(signal[below]) + share * math.log(signal[above])
    return math.exp(log_signal / 2), math.sqrt(-math.expm1(log_signal))


def _read_units(mean: Any, std: Any) -> tuple[tuple[float, float, float], float]:
    """Raises ValueError for anything but three numbers and a positive one."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not isinstance(mean, list | tuple) or len(mean) != 3 or not all(map(number, mean)):
        raise ValueError(f"mean must be three numbers, of x, y and z, not {mean!r}")
    if not number(std) or std <= 0:
        raise ValueError(f"std must be a number above 0, not {std!r}")
    x, y, z = map(float, mean)
    return (x, y, z), float(std)


def _described(value: Any) -> str:
    """A shape where there is one."""
    return str(tuple(value.shape)) if hasattr(value, "shape") else f"a {type(value).__name__}"
