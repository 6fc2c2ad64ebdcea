"""What several networks share exactly: features and positions, attention, feed-forward, patches.

Names of parameters are those of diffusers, whose checkpoints load.

Shapes: B batch, N image tokens, L tokens looked at, D width, H heads, K head width, C channels, Y X rows and
columns, of tokens or of latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.attention import Attend, sdpa_attention

TIME_FEATURES = 256


class Output(NamedTuple):
    """Named like diffusers' output, and a tuple as well."""

    sample: Tensor  # of the form of what the network was given; see each network


def time_features(values_B: Tensor) -> Tensor:
    """Numbers, fractional ones too, to 256 float32 features: 128 cosines, then 128 sines."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, dtype=torch.float32, device=values_B.device)
    angles = values_B.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_codes(positions: Tensor, width: int) -> Tensor:
    """(n,) positions to (n, width) float32: sines, then cosines, computed in float64."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def position_table(rows: int, columns: int, width: int, base: int, scale: float) -> Tensor:
    """(rows * columns, width) float32 sine-cosine table; the first half of the width codes the column.

    `base` is the number of tokens per side of the native picture and `scale` the interpolation scale: a
    picture of any size spans the same coordinates. Coordinates are rounded to float32, as in the published
    code.
    """

    def coordinates(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float32) / (count / base) / scale

    column_YXD = position_codes(coordinates(columns), width // 2)[None, :].expand(rows, -1, -1)
    row_YXD = position_codes(coordinates(rows), width // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([column_YXD, row_YXD], dim=-1).reshape(rows * columns, width)


class Positions:
    """Position tables (1, N, D), each computed once per size, type and device."""

    most = 16  # sizes that a long-lived page keeps

    def __init__(self) -> None:
        self._tables: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def get(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        compute: Callable[[], Tensor],  # (N, D) float32, of this size
    ) -> Tensor:
        key = (size, dtype, device)
        if key not in self._tables:
            if len(self._tables) >= self.most:  # forget the oldest
                del self._tables[next(iter(self._tables))]
            self._tables[key] = compute().to(device=device, dtype=dtype)[None]
        return self._tables[key]


class Embedder(nn.Module):
    """Linear, SiLU, linear: features of a number to the width of the network."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(features)))


_JOINT = ("to_q", "to_k", "to_v")


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these numbers, for inference."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _split_state(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for kind in ("weight", "bias"):
        joint = state.pop(f"{prefix}to_qkv.{kind}", None)
        if joint is not None:
            state.update(
                (f"{prefix}{name}.{kind}", part) for name, part in zip(_JOINT, joint.chunk(3), strict=True)
            )


class Attention(nn.Module):
    """Multi-head attention; `attend` is the function of `pipelines.attention` it computes with."""

    attend: Attend

    def __init__(self, width: int, context: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context, width, bias=bias)
        self.to_v = nn.Linear(context, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])
        self.to_qkv: nn.Module | None = None  # the first three in one: see `fuse`
        self.attend = sdpa_attention

    def split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def out(self, y_BND: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](y_BND))

    def keys_and_values(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Two of (B, H, L, K)."""
        return self.split(self.to_k(x_BLD)), self.split(self.to_v(x_BLD))

    def queries(self, x_BND: Tensor) -> Tensor:
        """(B, H, N, K)."""
        return self.split(self.to_q(x_BND))

    def project(self, x_BND: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the same tokens, (B, N, D) each, heads not yet apart."""
        if self.to_qkv is not None:
            return self.to_qkv(x_BND).chunk(3, dim=-1)
        return self.to_q(x_BND), self.to_k(x_BND), self.to_v(x_BND)

    @torch.no_grad()
    def fuse(self) -> None:
        """Make one layer of the first three, for attention of tokens to themselves.

        The state dict stays that of three.
        """
        parts = (self.to_q, self.to_k, self.to_v)
        self.to_qkv = linear_of(
            torch.cat([part.weight for part in parts]),
            None if self.to_q.bias is None else torch.cat([part.bias for part in parts]),
        )
        del self.to_q, self.to_k, self.to_v
        self._split_hook = self.register_state_dict_post_hook(_split_state)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Undo `fuse`."""
        assert isinstance(self.to_qkv, nn.Linear)
        weights, bias = self.to_qkv.weight.chunk(3), self.to_qkv.bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.to_qkv = None
        for name, weight, part in zip(_JOINT, weights, biases, strict=True):
            setattr(self, name, linear_of(weight.clone(), None if part is None else part.clone()))
        self._split_hook.remove()

    def to_itself(self, x_BND: Tensor) -> Tensor:
        """Self-attention."""
        return self.mix(*(self.split(part) for part in self.project(x_BND)))

    def mix(self, q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the queries find, put together again: (B, N, D)."""
        return self.out(self.attend(q_BHNK, k_BHLK, v_BHLK, mask).transpose(1, 2).flatten(2))

    def forward(self, x_BND: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mix(self.queries(x_BND), k_BHLK, v_BHLK, mask)


class Gelu(nn.Module):
    """Linear, then GELU: exact, or in its tanh approximation."""

    def __init__(self, width: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)
        self.approximate = approximate
        self.fused = False  # whether the GELU is in `proj` already: see `pipelines.lean`

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = self.proj(x_BND)
        return y_BND if self.fused else functional.gelu(y_BND, approximate=self.approximate)


class AdaLayerNorm(nn.LayerNorm):
    """Normalised tokens, scaled and shifted by a table of some rows: adaLN's first half."""

    lean = False  # whether one row for all may be taken as the norm's own weights, which saves a pass

    def modulate(self, x_BND: Tensor, shift_R1D: Tensor, scale_R1D: Tensor) -> Tensor:
        if self.lean and shift_R1D.shape[0] == 1 and not self.elementwise_affine:
            weights = (scale_R1D[0, 0], shift_R1D[0, 0])
            return functional.layer_norm(x_BND, self.normalized_shape, *weights, self.eps)
        return torch.addcmul(shift_R1D, self(x_BND), scale_R1D)


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float, approximate: str = "tanh") -> None:
        super().__init__()
        self.net = nn.Sequential(
            Gelu(width, 4 * width, approximate), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.net(x_BND)


class PatchEmbed(nn.Module):
    """Squares of latents to tokens, rows first."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, latents_BCYX: Tensor) -> Tensor:
        return self.proj(latents_BCYX).flatten(2).transpose(1, 2)


def unpatch(x_BND: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, rows * columns, patch * patch * C) tokens, laid out row, column, channel, to (B, C, Y, X)."""
    x = x_BND.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
