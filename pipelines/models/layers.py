"""What several networks share exactly: time features, position tables, small embedders.

Shapes: B batch, D width, Y X rows and columns of tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

TIME_FEATURES = 256


def time_features(values_B: Tensor) -> Tensor:
    """Numbers, fractional ones too, to 256 float32 features: 128 cosines, then 128 sines."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, dtype=torch.float32, device=values_B.device)
    angles = values_B.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(rows: int, columns: int, width: int, base: int, scale: float) -> Tensor:
    """(rows * columns, width) float32 sine-cosine table; the first half of the width codes the column.

    `base` is the number of tokens per side of the native picture and `scale` the interpolation scale: a
    picture of any size spans the same coordinates. Coordinates are rounded to float32, as in the published
    code.
    """

    def coordinates(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float32) / (count / base) / scale

    def code(positions: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angles = positions.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    column_YXD = code(coordinates(columns))[None, :].expand(rows, -1, -1)
    row_YXD = code(coordinates(rows))[:, None].expand(-1, columns, -1)
    return torch.cat([column_YXD, row_YXD], dim=-1).reshape(rows * columns, width)


class Embedder(nn.Module):
    """Linear, SiLU, linear: features of a number to the width of the network."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(features)))
