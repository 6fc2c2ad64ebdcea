"""DPM-Solver++ of order 1 and 2, multistep. Lu et al. 2022, arXiv:2211.01095, algorithm 2.

Configuration, timesteps and numbers are those of diffusers' `DPMSolverMultistepScheduler`. It is here because
importing any scheduler of diffusers takes longer than drawing with the small weights; `supports` says which
configurations it covers, and the pipeline takes diffusers' class for the others.

One thing is beyond diffusers: `timestep_spacing="continuous"`, the walk of the published PixArt code. Its
timesteps are even in time and fractional (diffusers rounds them), and it ends at timestep 0 rather than at no
noise at all.

Every step is a weighted sum of the picture so far and of the last two pictures the network expected, so the
weights of all steps are worked out beforehand, in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.models.network import read_json


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig:
    """Names and defaults of diffusers, as far as they are supported."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # or "scaled_linear"
    solver_order: int = 2  # or 1
    prediction_type: str = "epsilon"  # or "v_prediction", "sample"
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    timestep_spacing: str = "linspace"  # or "leading", "trailing", "continuous"
    steps_offset: int = 0


# For each option the values that are computed here; any value is fine for an option not in either table.
COVERED: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "solver_order": (1, 2),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "timestep_spacing": ("linspace", "leading", "trailing", "continuous"),
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
# Options that only matter together with one that is not covered.
IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}


class DPMSolver:
    """A walk down the schedule: `set_timesteps`, then one `step` per timestep."""

    config_name = "scheduler_config.json"
    order = 1  # calls of the network per step
    init_noise_sigma = 1.0

    def __init__(self, config: DPMSolverConfig | None = None, **options: Any) -> None:
        self.config = DPMSolverConfig(**options) if config is None else config
        for name, values in COVERED.items():
            if getattr(self.config, name, values[0]) not in values:
                raise ValueError(f"{name} must be one of {values}, not {getattr(self.config, name)!r}")
        start, end, count = self.config.beta_start, self.config.beta_end, self.config.num_train_timesteps
        if self.config.beta_schedule == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        else:
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        # float32, as the schedules of published models were computed
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.timesteps = torch.arange(count - 1, -1, -1)
        self.denoised: Tensor | None = None  # what the network expects the picture to be, after the last step
        self._sigmas: list[float] = []
        self._index = 0

    @classmethod
    def supports(cls, entries: Mapping[str, Any]) -> bool:
        """Whether a scheduler_config.json describes what this class computes."""
        known = {field.name for field in fields(DPMSolverConfig)} | COVERED.keys() | IDLE
        return all(
            key.startswith("_") or (key in known and (key not in COVERED or value in COVERED[key]))
            for key, value in entries.items()
        )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read scheduler_config.json. Raises ValueError when it is missing or not supported."""
        path = Path(folder) / cls.config_name
        entries = read_json(path)
        if not cls.supports(entries):
            raise ValueError(f"{path} asks for options that this solver does not have")
        known = {field.name for field in fields(DPMSolverConfig)}
        return cls(DPMSolverConfig(**{key: entries[key] for key in entries.keys() & known}))

    def save_pretrained(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = {"_class_name": "DPMSolverMultistepScheduler", **asdict(self.config)}
        (folder / self.config_name).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,  # descending, instead of a number of steps
    ) -> None:
        """Choose the timesteps and start over."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps")
        self._index = 0
        self.denoised = None
        if timesteps is None and self.config.timestep_spacing == "continuous":
            last = self.config.num_train_timesteps - 1
            times = torch.linspace(last, 0, num_inference_steps + 1, dtype=torch.float64)
            self.timesteps = times[:-1].float().to(device)
            self._sigmas = self._between(times)
            return
        chosen = self._spaced(num_inference_steps) if timesteps is None else [int(t) for t in timesteps]
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)
        alphas = self.alphas_cumprod
        ratios = (((1 - alphas) / alphas) ** 0.5).tolist()
        self._sigmas = [ratios[min(max(t, 0), len(ratios) - 1)] for t in chosen] + [0.0]

    def _between(self, times: Tensor) -> list[float]:
        """sigma / alpha at fractional timesteps: log alpha is linear between whole ones."""
        log_alphas = 0.5 * self.alphas_cumprod.double().log()
        below = times.floor().long().clamp(0, len(log_alphas) - 2)
        share = times - below
        log_alpha = log_alphas[below] * (1 - share) + log_alphas[below + 1] * share
        return ((-2 * log_alpha).expm1().sqrt()).tolist()

    def _spaced(self, steps: int) -> list[int]:
        """Timesteps of the three customs, arXiv:2305.08891 table 2; rounding half to even, as numpy does."""
        last = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            return [round((last - 1) * index / steps) for index in range(steps, 0, -1)]
        if self.config.timestep_spacing == "leading":
            stride = last // (steps + 1)
            return [stride * index + self.config.steps_offset for index in range(steps, 0, -1)]
        return [round(last - index * (last / steps)) - 1 for index in range(steps)]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """This solver's network takes the latents as they are."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """The latents of the next timestep, as a tuple of one. Steps must come in order."""
        if not self._sigmas:
            raise ValueError("call set_timesteps before step")
        index, last = self._index, len(self._sigmas) - 2
        alpha, sigma = _alpha_sigma(self._sigmas[index])
        if self.config.prediction_type == "epsilon":
            expected = (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "v_prediction":
            expected = alpha * sample - sigma * model_output
        else:
            expected = model_output

        next_alpha, next_sigma = _alpha_sigma(self._sigmas[index + 1])
        # exp(-h) of the paper, where h is the difference in log signal to noise
        decay = (alpha * next_sigma) / (sigma * next_alpha)
        weight = next_alpha * (1.0 - decay)
        result = (next_sigma / sigma) * sample.float() + weight * expected
        if self.config.solver_order == 2 and 0 < index < last:
            assert self.denoised is not None
            earlier = math.log(self._sigmas[index - 1] / self._sigmas[index])  # h of the step before
            ratio = earlier / -math.log(decay)
            result = result + (0.5 * weight / ratio) * (expected - self.denoised)
        self.denoised = expected
        self._index += 1
        return (result.to(expected.dtype),)


def _alpha_sigma(ratio: float) -> tuple[float, float]:
    """From sigma / alpha to both, where alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / math.sqrt(ratio**2 + 1.0)
    return alpha, ratio * alpha
