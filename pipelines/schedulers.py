"""The table of schedulers that can walk a model's noise schedule, whichever one its folder came with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.dpm_solver import DPMSolver
from pipelines.scheduler_base import noise_schedule

STORED = "default"  # the one that lies in the folder of the weights


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A row of the table."""

    summary: str
    make: Callable[[Mapping[str, Any]], Any]  # from the noise schedule, in diffusers' words


def _library(name: str, **options: Any) -> Callable[[Mapping[str, Any]], Any]:
    """A scheduler of diffusers, imported when it is asked for."""

    def make(noise: Mapping[str, Any]) -> Any:
        import diffusers

        return getattr(diffusers, name)(**noise, **options)

    return make


SCHEDULERS: Mapping[str, Walk] = {
    "dpm++": Walk(
        summary="DPM-Solver++ of order 2, as diffusers walks it",
        make=lambda noise: DPMSolver(**noise),
    ),
    "dpm++-official": Walk(
        summary="DPM-Solver++ at the fractional timesteps of the published PixArt code",
        make=lambda noise: DPMSolver(**noise, timestep_spacing="continuous"),
    ),
    "ddim": Walk(
        summary="DDIM, no noise added on the way",
        make=_library("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
    ),
    "ddpm": Walk(
        summary="ancestral, with noise at every step: many steps",
        make=_library("DDPMScheduler", clip_sample=False, timestep_spacing="trailing"),
    ),
    "euler": Walk(summary="Euler's method", make=_library("EulerDiscreteScheduler")),
    "unipc": Walk(summary="UniPC of order 2", make=_library("UniPCMultistepScheduler")),
    "sa": Walk(summary="SA-Solver, with noise on the way: 25 steps", make=_library("SASolverScheduler")),
}


def names() -> tuple[str, ...]:
    return (STORED, *SCHEDULERS)


def make(name: str, stored: Any) -> Any:
    """The scheduler called `name`, for the noise schedule of the `stored` one.

    Raises ValueError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(names())}, not {name!r}")
    return SCHEDULERS[name].make(noise_schedule(stored))
