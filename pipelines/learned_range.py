"""The official sampler of DiT: ancestral sampling with a learned variance, on a shortened chain.

Ho et al. 2020, arXiv:2006.11239 (the walk); Nichol & Dhariwal 2021, arXiv:2102.09672, section 3 (the
variance, equation 15, and the shortened chain, section 4). The network answers twice the channels of the
picture: its guess of the noise, then where between two bounds the logarithm of the variance lies.

diffusers has no schedule that does this: its `DDPMScheduler` with the variance `learned_range` raises inside
its own pipeline of DiT.

Tables are float64; k counts the kept timesteps of the chain from the cleanest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipelines.scheduler_base import Generators, NoiseConfig, Scheduler, noise_schedule, standard_noise


class LearnedRangeScheduler(Scheduler):
    """A walk down the chain: `set_timesteps`, then one `step` per timestep, in any order."""

    config: NoiseConfig
    config_class = NoiseConfig
    published = ("pipelines", "LearnedRangeScheduler")
    covered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear",),
        "prediction_type": ("epsilon",),
    }
    learned_variance = True  # `step` wants all channels of the network, not only those of the noise

    # Tables of the shortened chain, float64, entry k for its timestep k from the cleanest
    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    timesteps: Tensor  # int64, those the network is asked for, descending

    def __init__(self, config: NoiseConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._keep(range(self.config.num_train_timesteps), device=None)

    @classmethod
    def like(cls, scheduler: Any) -> Self:
        """One for the noise schedule of another scheduler, ours or diffusers'.

        Raises ValueError where the other's schedule is not one this sampler has.
        """
        return cls(**noise_schedule(scheduler))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Shorten the chain to so many timesteps, evenly spread from the first to the last.

        Raises ValueError for less than 2 or more than there are. One would be the timestep 0 in the official
        code, which takes noise for a picture that is nearly done.
        """
        most = self.config.num_train_timesteps
        count = num_inference_steps
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= most:
            raise ValueError(f"num_inference_steps must be an integer from 2 to {most}, not {count!r}")
        # Added up instead of multiplied, so that halves are rounded to the side the official code takes.
        stride, position, kept = (most - 1) / (count - 1), 0.0, []
        for _ in range(count):
            kept.append(round(position))
            position += stride
        self._keep(kept, device)

    def _keep(self, kept: Sequence[int], device: torch.device | str | None) -> None:
        """Lay out the chain that has these ascending timesteps only, and start over."""
        signal = self.config.signal(torch.float64)[list(kept)]
        before = torch.cat([signal.new_ones(1), signal[:-1]])
        self.betas = 1.0 - signal / before
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        before = torch.cat([signal.new_ones(1), self.alphas_cumprod[:-1]])
        noise = 1.0 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1.0 - before) / noise
        # At the cleanest timestep it is 0, which has no logarithm: that of the next one stands in.
        bounded = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = bounded.log()
        # The posterior's mean, equation 7 of the first paper, as weights of the expected and noisy picture
        self._expected_weights = (self.betas * before.sqrt() / noise).tolist()
        self._sample_weights = ((1.0 - before) * (1.0 - self.betas).sqrt() / noise).tolist()
        self._log_betas = self.betas.log().tolist()
        self._log_floors = self.posterior_log_variance_clipped.tolist()
        self._signals = self.alphas_cumprod.tolist()
        self._places = {int(timestep): place for place, timestep in enumerate(kept)}
        self.timesteps = torch.tensor(list(kept)[::-1], dtype=torch.int64, device=device)
        self.denoised = None

    def step(
        self,
        model_output: Tensor,  # (B, 2 C, Y, X): the noise, then the place between the two variances, -1..1
        timestep: Tensor | int,
        sample: Tensor,  # (B, C, Y, X)
        generator: Generators = None,
        variance_noise: Tensor | None = None,  # (B, C, Y, X) of standard noise, instead of drawing it
        return_dict: bool = True,  # either way the result is a tuple
    ) -> tuple[Tensor]:
        """The latents of the next timestep, as a tuple of one. At timestep 0 nothing is drawn or added.

        Raises ValueError for a timestep that is not in the chain, and for an output without its variance.
        """
        place = self._places.get(int(timestep))
        if place is None:
            raise ValueError(f"timestep {int(timestep)} is not in this chain; call set_timesteps")
        channels = sample.shape[1]
        if model_output.shape[1] != 2 * channels:
            raise ValueError(
                f"the network answers {model_output.shape[1]} channels for {channels}; "
                "this sampler needs the learned variance as well, which makes twice as many"
            )
        noise, between = model_output.split(channels, dim=1)
        signal = self._signals[place]
        # Not clipped: these are latents, which have no bounds.
        self.denoised = math.sqrt(1.0 / signal) * sample - math.sqrt(1.0 / signal - 1.0) * noise
        result = self._expected_weights[place] * self.denoised + self._sample_weights[place] * sample
        if place > 0:
            if variance_noise is None:
                variance_noise = standard_noise(sample.shape, generator, sample.device)
            fraction = (between + 1.0) / 2.0
            log_variance = fraction * self._log_betas[place] + (1.0 - fraction) * self._log_floors[place]
            result = result + (0.5 * log_variance).exp() * variance_noise.to(result)
        return (result,)
