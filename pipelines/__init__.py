"""The methods: diffusion pipelines and their networks, usable without the rest of the studio.

A pipeline is handed a folder or its parts and draws; it knows nothing of registries, requests, files or
pages. Networks live in `pipelines.models`, one per file. This package imports third parties only, and
importing it costs nothing: torch is loaded by the module that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What a denoising loop yields after each step."""

    index: int  # from 0
    count: int  # of all steps
    latents: Tensor  # (B, C, Y, X), float32, after this step
    timestep: Tensor  # the timestep this step started from
    denoised: Tensor | None = (
        None  # (B, C, Y, X): the picture the network expects by now, where the solver knows
    )
