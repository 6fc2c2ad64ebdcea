"""What our schedulers have in common: the noise schedule, its file, and noise itself.

Each of `dpm_solver`, `lcm` and `learned_range` holds the mathematics of one walk down this schedule, in the
words of diffusers' schedulers: `set_timesteps`, then one `step` per timestep.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipelines.models.network import read_json

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the batch, or one for each row


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How much noise lies over the picture at each timestep; diffusers' names, and the defaults of DiT."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # or "scaled_linear"
    prediction_type: str = "epsilon"  # or "v_prediction", "sample"

    def __post_init__(self) -> None:
        count = self.num_train_timesteps
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ValueError(f"num_train_timesteps must be an integer of 2 or more, not {count!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas must rise within 0..1, not from {self.beta_start!r} to {self.beta_end!r}"
            )

    def signal(self, dtype: torch.dtype) -> Tensor:
        """The picture's share of the latents' variance at each timestep: diffusers' `alphas_cumprod`."""
        start, end, count = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = torch.linspace(start, end, count, dtype=dtype)
        else:
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=dtype) ** 2
        return torch.cumprod(1.0 - betas, dim=0)


class Scheduler:
    """A configuration and its file. Subclasses fill in the class attributes and the walk."""

    config_name = "scheduler_config.json"
    order = 1  # calls of the network per step
    init_noise_sigma = 1.0

    config_class: ClassVar[type[NoiseConfig]]
    published: ClassVar[tuple[str, str]]  # library and class that read the same file, for model_index.json
    # Entries of the file that are no options of ours, but that the published class needs.
    header: ClassVar[Mapping[str, Any]] = {}
    # What diffusers means by an entry that its file leaves out, where that differs from our default.
    implied: ClassVar[Mapping[str, Any]] = {}
    # For each option the values that are computed here; any value is fine for an option in neither table.
    covered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
    }
    idle: ClassVar[frozenset[str]] = frozenset()  # options that change nothing here

    config: Any
    denoised: Tensor | None = None  # what the network expects the picture to be, after the last step

    def __init__(self, config: Any = None, **options: Any) -> None:
        self.config = self.config_class(**options) if config is None else config
        for name, values in self.covered.items():
            value = getattr(self.config, name, values[0])
            if value not in values:
                raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, not {value!r}")

    @classmethod
    def supports(cls, entries: Mapping[str, Any]) -> bool:
        """Whether a scheduler_config.json describes what this class computes."""
        return not cls.objection(entries)

    @classmethod
    def objection(cls, entries: Mapping[str, Any]) -> str:
        """Why a scheduler_config.json with these entries is not for this class; empty when it is."""
        known = _names(cls.config_class) | cls.covered.keys() | cls.idle
        strange = [
            f"{key} {reprlib.repr(value)}"
            for key, value in sorted(entries.items())
            if not key.startswith("_")
            and (key not in known or (key in cls.covered and value not in cls.covered[key]))
        ]
        return f"asks for options that {cls.__name__} does not have: {', '.join(strange)}" if strange else ""

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read scheduler_config.json. Raises ValueError when it is missing or not supported."""
        path = Path(folder) / cls.config_name
        entries = read_json(path)
        if objection := cls.objection(entries):
            raise ValueError(f"{path} {objection}")
        entries = {**cls.implied, **entries}
        chosen = {key: entries[key] for key in entries.keys() & _names(cls.config_class)}
        try:
            return cls(cls.config_class(**cls.translate(chosen)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def translate(cls, entries: dict[str, Any]) -> dict[str, Any]:
        """From diffusers' values to ours."""
        return entries

    def save_pretrained(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = {"_class_name": self.published[1], **self.header, **asdict(self.config)}
        (folder / self.config_name).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """On this schedule networks take the latents as they are."""
        return sample

    def expected(self, sample: Tensor, answer: Tensor, alpha: float, sigma: float) -> Tensor:
        """The picture that the network's answer means, in latents that are alpha picture + sigma noise."""
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * answer) / alpha
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * answer
        return answer


class OrderedScheduler(Scheduler):
    """A walk whose steps must come in order, at timesteps of which the number or the list is given."""

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        # float32, as the schedules of published models were computed
        self.alphas_cumprod = self.config.signal(torch.float32)
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        self._index = 0
        self._begin = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Walk from this timestep on instead of the first; `add_noise` brings a picture there. To be called
        after `set_timesteps`, which starts over."""
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(f"there are {len(self.timesteps)} timesteps; none is number {begin_index}")
        self._begin = self._index = begin_index
        self.denoised = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Pictures as they are at a timestep of the walk, which is one number in a tensor."""
        alpha, sigma = self._level(self.timesteps.tolist().index(timesteps.item()))
        return (alpha * original_samples.float() + sigma * noise.float()).to(original_samples.dtype)

    def _level(self, index: int) -> tuple[float, float]:
        """alpha and sigma at a timestep of the walk, where alpha^2 + sigma^2 = 1."""
        raise NotImplementedError

    def _chosen(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
        if num_inference_steps is None and timesteps is not None:
            return [int(timestep) for timestep in timesteps]
        if num_inference_steps is not None and timesteps is None:
            return self._spaced(num_inference_steps)
        raise ValueError("give num_inference_steps or timesteps")

    def _spaced(self, steps: int) -> list[int]:
        """So many timesteps, descending. Raises ValueError where there are not as many."""
        raise NotImplementedError


def settings(scheduler: Any) -> Mapping[str, Any]:
    """The configuration of a scheduler, ours or diffusers', by name."""
    return scheduler.config if isinstance(scheduler.config, Mapping) else vars(scheduler.config)


def noise_schedule(scheduler: Any) -> dict[str, Any]:
    """Of these the noise schedule: options for any other scheduler, to walk the same model.

    Raises ValueError where they do not say it all.
    """
    stored = settings(scheduler)
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if stored.get(name) not in (None, False):
            raise ValueError(f"the stored schedule has {name}, which no other scheduler takes over")
    return {field.name: stored[field.name] for field in fields(NoiseConfig)}


def index_entry(scheduler: Any) -> tuple[str, str]:
    """(library, class) of a scheduler, as model_index.json names it."""
    if isinstance(scheduler, Scheduler):
        return scheduler.published
    return "diffusers", type(scheduler).__name__


def standard_noise(
    shape: Sequence[int], generator: Generators = None, device: torch.device | None = None
) -> Tensor:
    """float32 from the generator's device, so that a CPU seed means one picture on every device.

    With a list of generators a row gets what it would get alone.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = torch.device("cpu") if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=torch.float32).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"there are {len(generator)} generators for {shape[0]} pictures")
    return torch.cat([standard_noise((1, *shape[1:]), one, device) for one in generator])


def _names(config_class: type) -> set[str]:
    return {field.name for field in fields(config_class)}
