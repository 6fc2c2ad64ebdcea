"""Schedules of distilled models: a few steps, or one, and each of them expects the whole picture.

`LCMSolver`: latent consistency models, Luo et al. 2023, arXiv:2310.04378, as PixArt-delta has them,
arXiv:2401.05252. `OneStep`: distribution matching distillation, Yin et al. 2023, arXiv:2311.18828.
Neither wants guidance, which is distilled into the network.

Every step turns the network's answer into the picture it expects and, unless it is the last, adds fresh noise
for the next timestep. The words are those of `pipelines.dpm_solver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.scheduler_base import Generators, NoiseConfig, OrderedScheduler, standard_noise


@dataclass(frozen=True, kw_only=True)
class LCMConfig(NoiseConfig):
    """Names of diffusers' `LCMScheduler`; defaults of PixArt-delta, whose betas are others."""

    original_inference_steps: int = 50  # timesteps the network was distilled on
    timestep_scaling: float = 10.0
    timestep_spacing: str = "official"  # or "diffusers": see SPACINGS


@dataclass(frozen=True, kw_only=True)
class OneStepConfig(NoiseConfig):
    """Names of diffusers' `DDPMScheduler`, and the timestep."""

    timestep: int = 400  # at which pure noise is handed in, as if it were a picture half way


# From the number of distilled timesteps and of steps to indices, counted from the noisiest timestep. They
# differ when the division leaves a rest: 4 of 50 are 999, 759, 519, 279 and 999, 759, 499, 259.
SPACINGS: Mapping[str, Callable[[int, int], list[int]]] = {
    "official": lambda origin, steps: [index * (origin // steps) for index in range(steps)],
    "diffusers": lambda origin, steps: [int(index * (origin / steps)) for index in range(steps)],
}


class _Jumps(OrderedScheduler):
    """What the two have in common."""

    covered: ClassVar[dict[str, tuple[Any, ...]]] = OrderedScheduler.covered | {
        "trained_betas": (None,),
        "thresholding": (False,),
        "clip_sample": (False,),
        "rescale_betas_zero_snr": (False,),
    }
    idle = frozenset({"dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "steps_offset"})

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._walk: list[int] = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,  # descending, instead of a number of steps
    ) -> None:
        """Choose the timesteps and start over. Raises ValueError for numbers the network never saw."""
        chosen = self._chosen(num_inference_steps, timesteps)
        last = self.config.num_train_timesteps - 1
        falling = sorted(set(chosen), reverse=True) == chosen
        if not chosen or not falling or chosen[0] > last or chosen[-1] < 0:
            raise ValueError(f"timesteps must fall, between {last} and 0, not be {chosen}")
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)
        self._walk = chosen
        self._index = self._begin = 0
        self.denoised = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """These networks take the latents as they are."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,  # instead of drawing it; the last step needs none
        return_dict: bool = True,  # either way the result is a tuple
    ) -> tuple[Tensor, Tensor]:
        """The latents of the next timestep and the picture that was expected; at the end both are the same.

        Steps must come in order. The sums are taken in float32: at the noisiest timestep the picture is
        what remains after dividing by 0.006.
        """
        if self._index >= len(self._walk):
            raise ValueError("call set_timesteps before step, and step once per timestep")
        now = self._walk[self._index]
        alpha, sigma = self._alpha_sigma(now)
        x = sample.float()
        expected = self.expected(x, model_output.float(), alpha, sigma)
        skip, out = self.boundary(now)
        expected = out * expected + skip * x
        self.denoised = expected.to(sample.dtype)
        self._index += 1
        if self._index == len(self._walk):
            return self.denoised, self.denoised
        alpha, sigma = self._alpha_sigma(self._walk[self._index])
        noise = variance_noise
        if noise is None:
            noise = standard_noise(sample.shape, generator, sample.device)
        if noise.shape != sample.shape:
            raise ValueError(f"the noise is {tuple(noise.shape)}, the latents are {tuple(sample.shape)}")
        return (alpha * expected + sigma * noise.to(x)).to(sample.dtype), self.denoised

    def boundary(self, timestep: int) -> tuple[float, float]:
        """How much of the latents and of the network's picture is taken: c_skip, c_out."""
        raise NotImplementedError

    def _level(self, index: int) -> tuple[float, float]:
        return self._alpha_sigma(self._walk[index])

    def _alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """Both in float64, where alpha^2 + sigma^2 = 1."""
        signal = self.alphas_cumprod[timestep].item()
        return math.sqrt(signal), math.sqrt(1.0 - signal)


class LCMSolver(_Jumps):
    """A few steps on the timesteps of the distillation."""

    config: LCMConfig
    config_class = LCMConfig
    published = ("diffusers", "LCMScheduler")
    implied: ClassVar[Mapping[str, Any]] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
    }
    covered: ClassVar[dict[str, tuple[Any, ...]]] = _Jumps.covered | {
        "timestep_spacing": (*SPACINGS, "leading", "linspace", "trailing"),
    }
    idle = _Jumps.idle | {"set_alpha_to_one"}

    def __init__(self, config: LCMConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.timestep_spacing not in SPACINGS:
            raise ValueError(
                f"timestep_spacing must be one of {', '.join(SPACINGS)}, not {self.config.timestep_spacing!r}"
            )
        if not 1 <= self.config.original_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"original_inference_steps must be 1 to {self.config.num_train_timesteps}, "
                f"not {self.config.original_inference_steps!r}"
            )

    @classmethod
    def translate(cls, entries: dict[str, Any]) -> dict[str, Any]:
        # diffusers' class has words for the spacing, and walks in one way whichever is chosen
        if entries["timestep_spacing"] not in SPACINGS:
            return entries | {"timestep_spacing": "diffusers"}
        return entries

    def boundary(self, timestep: int) -> tuple[float, float]:
        """At timestep 0 the latents are the picture; consistency models, arXiv:2303.01469."""
        spread = 0.5  # of the pictures, sigma_data
        scaled = self.config.timestep_scaling * timestep
        total = scaled**2 + spread**2
        return spread**2 / total, scaled / math.sqrt(total)

    def _spaced(self, steps: int) -> list[int]:
        origin = self.config.original_inference_steps
        if not 1 <= steps <= origin:
            raise ValueError(f"this model was distilled on {origin} timesteps and cannot take {steps} steps")
        stride = self.config.num_train_timesteps // origin
        chosen = SPACINGS[self.config.timestep_spacing](origin, steps)
        return [(origin - index) * stride - 1 for index in chosen]


class OneStep(_Jumps):
    """One call of the network, and its expected picture is the picture."""

    config: OneStepConfig
    config_class = OneStepConfig
    published = ("diffusers", "DDPMScheduler")  # which computes the same as its `pred_original_sample`
    header: ClassVar[Mapping[str, Any]] = {"clip_sample": False}
    idle = _Jumps.idle | {"timestep_spacing", "variance_type"}

    @classmethod
    def objection(cls, entries: Mapping[str, Any]) -> str:
        """Only files that name the timestep: any other file of a DDPM means many steps."""
        if "timestep" not in entries:
            return f"names no timestep for {cls.__name__}"
        return super().objection(entries)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,  # one, instead of the configured one
    ) -> None:
        """Start over. Raises ValueError for more than one step."""
        if timesteps is not None and len(timesteps) != 1:
            raise ValueError(f"this model draws in one step, not at {list(timesteps)}")
        super().set_timesteps(num_inference_steps, device, timesteps)

    def boundary(self, timestep: int) -> tuple[float, float]:
        return 0.0, 1.0

    def _spaced(self, steps: int) -> list[int]:
        if steps != 1:
            raise ValueError(f"this model draws in one step, not {steps}")
        return [self.config.timestep]
