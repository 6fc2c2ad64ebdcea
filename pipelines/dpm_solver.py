"""DPM-Solver++ of order 1 and 2, multistep. Lu et al. 2022, arXiv:2211.01095, algorithm 2.

Configuration, timesteps and numbers are those of diffusers' `DPMSolverMultistepScheduler`. It is here because
importing any scheduler of diffusers takes longer than drawing with the small weights; `supports` says which
configurations it covers, and the pipeline takes diffusers' class for the others.

Two things are beyond diffusers. `timestep_spacing="continuous"` is the walk of the published PixArt code: its
timesteps are even in time and fractional (diffusers rounds them), and it ends at timestep 0 rather than at no
noise at all. `timestep_spacing="late"` takes shorter and shorter steps towards the end, for clouds of points:
what is thinner than the noise of the last step is lost in it.

Every step is a weighted sum of the picture so far and of the last two pictures the network expected, so the
weights of all steps are worked out beforehand, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.scheduler_base import NoiseConfig, OrderedScheduler

LATE = 1.5  # power of the spacing of this name: at 50 steps of 1000 the last is from 3 rather than from 20


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig(NoiseConfig):
    """Names and defaults of diffusers, as far as they are supported."""

    solver_order: int = 2  # or 1
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    timestep_spacing: str = "linspace"  # or "leading", "trailing", "continuous", "late"
    steps_offset: int = 0


class DPMSolver(OrderedScheduler):
    """A walk down the schedule: `set_timesteps`, then one `step` per timestep."""

    config: DPMSolverConfig
    config_class = DPMSolverConfig
    published = ("diffusers", "DPMSolverMultistepScheduler")
    covered: ClassVar[dict[str, tuple[Any, ...]]] = OrderedScheduler.covered | {
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        "timestep_spacing": ("linspace", "leading", "trailing", "continuous", "late"),
        "trained_betas": (None,),
        "thresholding": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "use_flow_sigmas": (False,),
        "lambda_min_clipped": (-math.inf,),
        "variance_type": (None,),
        "rescale_betas_zero_snr": (False,),
        "use_dynamic_shifting": (False,),
    }
    idle = frozenset({"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"})

    def __init__(self, config: DPMSolverConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._sigmas: list[float] = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,  # descending, instead of a number of steps
    ) -> None:
        """Choose the timesteps and start over."""
        if timesteps is None and num_inference_steps and self.config.timestep_spacing == "continuous":
            last = self.config.num_train_timesteps - 1
            times = torch.linspace(last, 0, num_inference_steps + 1, dtype=torch.float64)
            self.timesteps = times[:-1].float().to(device)
            self._sigmas = self._between(times)
        else:
            chosen = self._chosen(num_inference_steps, timesteps)
            self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)
            alphas = self.alphas_cumprod
            ratios = (((1 - alphas) / alphas) ** 0.5).tolist()
            self._sigmas = [ratios[min(max(t, 0), len(ratios) - 1)] for t in chosen] + [0.0]
        self._index = self._begin = 0
        self.denoised = None

    def _level(self, index: int) -> tuple[float, float]:
        return _alpha_sigma(self._sigmas[index])

    def _between(self, times: Tensor) -> list[float]:
        """sigma / alpha at fractional timesteps: log alpha is linear between whole ones."""
        log_alphas = 0.5 * self.alphas_cumprod.double().log()
        below = times.floor().long().clamp(0, len(log_alphas) - 2)
        share = times - below
        log_alpha = log_alphas[below] * (1 - share) + log_alphas[below + 1] * share
        return ((-2 * log_alpha).expm1().sqrt()).tolist()

    def _spaced(self, steps: int) -> list[int]:
        """Timesteps of the three customs (arXiv:2305.08891, table 2) and our own; rounding half to even, as
        numpy does."""
        last = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            return [round((last - 1) * index / steps) for index in range(steps, 0, -1)]
        if self.config.timestep_spacing == "late":
            return [max(1, round((last - 1) * (index / steps) ** LATE)) for index in range(steps, 0, -1)]
        if self.config.timestep_spacing == "leading":
            stride = last // (steps + 1)
            if not stride:
                raise ValueError(f"timestep_spacing 'leading' takes 1 to {last - 1} steps, not {steps}")
            return [stride * index + self.config.steps_offset for index in range(steps, 0, -1)]
        return [round(last - index * (last / steps)) - 1 for index in range(steps)]

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """The latents of the next timestep, as a tuple of one. Steps must come in order."""
        index, last = self._index, len(self._sigmas) - 2
        if index > last:
            raise ValueError("call set_timesteps before step, and step once per timestep")
        alpha, sigma = _alpha_sigma(self._sigmas[index])
        expected = self.expected(sample, model_output, alpha, sigma)
        next_alpha, next_sigma = _alpha_sigma(self._sigmas[index + 1])
        # exp(-h) of the paper, where h is the difference in log signal to noise
        decay = (alpha * next_sigma) / (sigma * next_alpha)
        weight = next_alpha * (1.0 - decay)
        result = (next_sigma / sigma) * sample.float() + weight * expected
        if self.config.solver_order == 2 and self._begin < index < last:  # the first has none before
            assert self.denoised is not None
            earlier = math.log(self._sigmas[index - 1] / self._sigmas[index])  # h of the step before
            if earlier > 0 and decay < 1:  # rounding may put a timestep twice, at 1000 steps
                ratio = earlier / -math.log(decay)
                result = result + (0.5 * weight / ratio) * (expected - self.denoised)
        self.denoised = expected
        self._index += 1
        return (result.to(expected.dtype),)


def _alpha_sigma(ratio: float) -> tuple[float, float]:
    """From sigma / alpha to both, where alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / math.sqrt(ratio**2 + 1.0)
    return alpha, ratio * alpha
