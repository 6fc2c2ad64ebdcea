"""Decoding large latents in tiles that overlap, so that memory stays what one tile needs.

A decoder's group norms see a tile rather than the whole, so the picture differs a little from one decoded
at once; neighbouring tiles are blended linearly where they overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one side begin: evenly, at least `overlap` apart from covering each other's end."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which memory runs out, on a CPU or a GPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
    )


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor],  # (B, C, y, x) -> (B, 3, factor * y, factor * x)
    latents: Tensor,  # (B, C, Y, X)
    *,
    factor: int,  # pixels per latent and side
    tile: int = 64,  # latents per side
    overlap: int = 16,
) -> Tensor:
    """(B, 3, factor * Y, factor * X), equal to `decode(latents)` where one tile covers everything."""
    rows, columns = latents.shape[-2:]
    row_starts, column_starts = starts(rows, tile, overlap), starts(columns, tile, overlap)
    height, width = min(tile, rows), min(tile, columns)
    sums = weights = None
    for top in row_starts:
        for left in column_starts:
            piece = decode(latents[..., top : top + height, left : left + width])
            if sums is None:
                shape = (*piece.shape[:-2], rows * factor, columns * factor)
                sums = torch.zeros(shape, dtype=torch.float32, device=piece.device)
                weights = torch.zeros(shape[-2:], dtype=torch.float32, device=piece.device)
            assert weights is not None
            ramp = (
                _ramp(top, height, row_starts, factor)[:, None]
                * _ramp(left, width, column_starts, factor)[None]
            ).to(piece.device)
            at = (
                ...,
                slice(top * factor, (top + height) * factor),
                slice(left * factor, (left + width) * factor),
            )
            sums[at] += piece.float() * ramp
            weights[at] += ramp
    assert sums is not None and weights is not None
    return sums / weights


def _ramp(start: int, length: int, all_starts: list[int], factor: int) -> Tensor:
    """Weights of a tile along one side, in pixels: rising over what it shares with the tile before, falling
    over what it shares with the next."""
    ramp = torch.ones(length * factor)
    for before, after in pairwise(all_starts):
        shared = (before + length - after) * factor
        rise = (torch.arange(shared) + 0.5) / shared
        if after == start:
            ramp[:shared] *= rise
        if before == start:
            ramp[-shared:] *= rise.flip(0)
    return ramp
