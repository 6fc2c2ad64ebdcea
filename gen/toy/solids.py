"""The solids of the toy world: signed distances and what placing a solid needs to know.

Distances are in a frame scaled to radius 1, centred on the solid. Lower bounds are enough for sphere tracing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


def _smooth_max(a: torch.Tensor, b: torch.Tensor, k: float = 0.06) -> torch.Tensor:
    return torch.maximum(a, b) + (k - (a - b).abs()).clamp_min(0).square() / (4 * k)


def _sphere(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x * x + y * y + z * z).sqrt() - 0.92


def _cube(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x, y, z = x.abs() - 0.69, y.abs() - 0.69, z.abs() - 0.69
    outside = (x.clamp_min(0).square() + y.clamp_min(0).square() + z.clamp_min(0).square()).sqrt()
    return outside + torch.maximum(torch.maximum(x, y), z).clamp_max(0) - 0.07


def _cylinder(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    side, cap = (x * x + y * y).sqrt() - 0.63, z.abs() - 0.78
    outside = (side.clamp_min(0).square() + cap.clamp_min(0).square()).sqrt()
    return outside + torch.maximum(side, cap).clamp_max(0) - 0.07


def _cone(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    # apex at z = 1.02, base radius 0.84 at z = -0.95
    slope = math.hypot(0.84, 1.97)
    side = ((x * x + y * y).sqrt() * 1.97 + (z - 1.02) * 0.84) / slope
    return _smooth_max(side, -0.95 - z)


def _torus(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    ring = (x * x + z * z).sqrt() - 0.68  # upright: the hole looks along y
    return (ring * ring + y * y).sqrt() - 0.29


def _pyramid(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    # apex at z = 0.72, square base of half-width 0.9 at z = -0.66
    slope = math.hypot(0.9, 1.38)
    side = (torch.maximum(x.abs(), y.abs()) * 1.38 + (z - 0.72) * 0.9) / slope
    return _smooth_max(side, -0.66 - z, 0.04)


def _capsule(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x = (x.abs() - 0.56).clamp_min(0)
    return (x * x + y * y + z * z).sqrt() - 0.50


def _diamond(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x.abs() * 1.2 + y.abs() * 1.2 + z.abs() - 1.0) / math.sqrt(2 * 1.2**2 + 1) - 0.012


@dataclass(frozen=True)
class Solid:
    distance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    height: float  # bottom to top, in radii
    centre: float  # of the height, where the local origin lies
    bound: float  # radius of a sphere around the local origin that holds the solid
    turn: float  # headings are drawn in +-turn radians
    away: float = 0.0  # headings nearer to 0 than this are moved away, so that corners show


SOLIDS = {
    "sphere": Solid(_sphere, 1.84, 0.5, 0.95, 0.0),
    "cube": Solid(_cube, 1.52, 0.5, 1.28, 0.75, 0.2),
    "cylinder": Solid(_cylinder, 1.70, 0.5, 1.10, 0.0),
    "cone": Solid(_cone, 1.93, 0.49, 1.28, 0.0),
    "torus": Solid(_torus, 1.94, 0.5, 0.99, 0.55),
    "pyramid": Solid(_pyramid, 1.36, 0.485, 1.44, 0.75, 0.2),
    "capsule": Solid(_capsule, 1.00, 0.5, 1.07, 0.5),
    "diamond": Solid(_diamond, 2.03, 0.5, 1.03, 0.7, 0.2),
}
