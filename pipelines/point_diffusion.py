"""The official sampler of DiT-3D: ancestral sampling with a fixed variance. Ho et al. 2020, arXiv:2006.11239.

Its betas are linear, or `warm0.1` for airplanes: they rise over the first tenth of the chain and then stay.
Section 3.2 gives the variance, the smaller of the two; equation 7 the mean. A chain may be shortened, as in
Nichol & Dhariwal 2021, arXiv:2102.09672, section 4; as published, all of its 1000 steps are walked.

Betas and the share of signal are computed in float64 and rounded to float32, and everything else follows
from the rounded ones, as in the published code: near the clean end that differs by some ten-thousandths. k
counts the kept timesteps of the chain from the cleanest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.scheduler_base import Generators, NoiseConfig, Scheduler, standard_noise

# Part of the chain over which the betas rise; then they stay at their end
WARM: Mapping[str, float] = {"linear": 1.0, "warm0.1": 0.1, "warm0.2": 0.2, "warm0.5": 0.5}
LEAST_VARIANCE = 1e-20  # whose logarithm stands in for that of 0


@dataclass(frozen=True, kw_only=True)
class PointDiffusionConfig(NoiseConfig):
    """Words of diffusers. Defaults are those of DiT-3D, but for airplanes: see AIRPLANE."""

    beta_schedule: str = "linear"  # or "warm0.1", "warm0.2", "warm0.5"
    variance_type: str = "fixed_small"
    clip_sample: bool = False  # what the network expects the cloud to be; no published script does
    clip_sample_range: float = 0.5

    def betas(self) -> Tensor:
        """(num_train_timesteps,) float64."""
        count = self.num_train_timesteps
        warm = int(count * WARM[self.beta_schedule])
        betas = torch.full((count,), self.beta_end, dtype=torch.float64)
        betas[:warm] = torch.linspace(self.beta_start, self.beta_end, warm, dtype=torch.float64)
        return betas

    def signal(self, dtype: torch.dtype) -> Tensor:
        return torch.cumprod(1.0 - self.betas(), dim=0).to(dtype)


# How the category of exactly this name was trained
AIRPLANE: Mapping[str, Any] = {"beta_schedule": "warm0.1", "beta_start": 1e-5, "beta_end": 0.008}


class PointDiffusion(Scheduler):
    """A walk down the chain: `set_timesteps`, then one `step` per timestep, in any order."""

    config: PointDiffusionConfig
    config_class = PointDiffusionConfig
    published = ("pipelines", "PointDiffusion")
    covered: ClassVar[dict[str, tuple[Any, ...]]] = Scheduler.covered | {
        "beta_schedule": tuple(WARM),
        "variance_type": ("fixed_small",),
    }

    # Tables of the kept chain, entry k for its timestep k from the cleanest
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor  # of what the network expects the cloud to be
    posterior_mean_coef2: Tensor  # of the noisy cloud
    timesteps: Tensor  # int64, those the network is asked for, descending

    def __init__(self, config: PointDiffusionConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._keep(range(self.config.num_train_timesteps), device=None)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Shorten the chain to so many timesteps, evenly spread from the first to the last.

        Raises ValueError for less than 2 or more than there are.
        """
        most, count = self.config.num_train_timesteps, num_inference_steps
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= most:
            raise ValueError(f"num_inference_steps must be an integer from 2 to {most}, not {count!r}")
        self._keep([round(index * (most - 1) / (count - 1)) for index in range(count)], device)

    def _keep(self, kept: Sequence[int], device: torch.device | str | None) -> None:
        """Lay out the chain that has these ascending timesteps only, and start over."""
        whole = self.config.betas()
        signal = self.config.signal(torch.float64)[list(kept)]
        before = torch.cat([signal.new_ones(1), signal[:-1]])
        betas = whole if len(kept) == len(whole) else 1.0 - signal / before
        betas, signal, before = betas.float(), signal.float(), before.float()
        noise = 1.0 - signal
        self.betas = betas
        self.alphas_cumprod = signal
        self.sqrt_recip_alphas_cumprod = (1.0 / signal).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1.0 / signal - 1.0).sqrt()
        self.posterior_variance = betas * (1.0 - before) / noise
        self.posterior_log_variance_clipped = self.posterior_variance.clamp(min=LEAST_VARIANCE).log()
        self.posterior_mean_coef1 = betas * before.sqrt() / noise
        self.posterior_mean_coef2 = (1.0 - before) * (1.0 - betas).sqrt() / noise
        self._places = {int(timestep): place for place, timestep in enumerate(kept)}
        self.timesteps = torch.tensor(list(kept)[::-1], dtype=torch.int64, device=device)
        self.denoised = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clouds (B, C, P) with the noise that they have at their timesteps (B,) of the chain."""
        places = torch.tensor([self._place(timestep) for timestep in timesteps.flatten().tolist()])
        signal = self.alphas_cumprod[places].to(original_samples)[:, None, None]
        return signal.sqrt() * original_samples + (1.0 - signal).sqrt() * noise

    def step(
        self,
        model_output: Tensor,  # (B, C, P): the noise, or what `prediction_type` says
        timestep: Tensor | int,
        sample: Tensor,  # (B, C, P)
        generator: Generators = None,  # one, or one for each cloud
        variance_noise: Tensor | None = None,  # (B, C, P) of standard noise, instead of drawing it
        return_dict: bool = True,  # either way the result is a tuple
    ) -> tuple[Tensor]:
        """The clouds of the next timestep, as a tuple of one. At timestep 0 nothing is drawn or added.

        Raises ValueError for a timestep that is not in the chain, and for an output of another shape.
        """
        place = self._place(int(timestep))
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network answers {tuple(model_output.shape)} for clouds of {tuple(sample.shape)}"
            )
        of_sample = float(self.sqrt_recip_alphas_cumprod[place])
        of_noise = float(self.sqrt_recipm1_alphas_cumprod[place])
        self.denoised = self.expected(sample, model_output, 1.0 / of_sample, of_noise / of_sample)
        if self.config.clip_sample:
            bound = self.config.clip_sample_range
            self.denoised = self.denoised.clamp(-bound, bound)
        of_sample = float(self.posterior_mean_coef2[place])
        result = float(self.posterior_mean_coef1[place]) * self.denoised + of_sample * sample
        if place > 0:
            if variance_noise is None:
                variance_noise = standard_noise(sample.shape, generator, sample.device)
            deviation = math.exp(0.5 * float(self.posterior_log_variance_clipped[place]))
            result = result + deviation * variance_noise.to(result)
        return (result,)

    def _place(self, timestep: int) -> int:
        if timestep not in self._places:
            raise ValueError(f"timestep {timestep} is not in this chain; call set_timesteps")
        return self._places[timestep]
