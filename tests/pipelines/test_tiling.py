"""Tiles that cover everything once blended, and never need more than one tile's memory."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from pipelines import tiling


def enlarge(latents: torch.Tensor) -> torch.Tensor:
    """A decoder without neighbours: tiles of it must fit together exactly."""
    return functional.interpolate(latents[:, :3] * 2 + 1, scale_factor=8, mode="nearest")


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (17, 16), (40, 23), (64, 64), (33, 100)])
def test_tiles_of_a_local_decoder_make_the_whole(size):
    latents = torch.randn(2, 4, *size)
    shapes = []

    def decode(piece):
        shapes.append(piece.shape[-2:])
        return enlarge(piece)

    found = tiling.decode_in_tiles(decode, latents, factor=8, tile=16, overlap=4)
    assert found.shape == (2, 3, size[0] * 8, size[1] * 8)
    assert torch.allclose(found, enlarge(latents), atol=1e-5)
    assert max(max(shape) for shape in shapes) <= 16


@pytest.mark.parametrize("length", [1, 16, 17, 28, 29, 100, 513])
def test_tiles_reach_both_ends_and_overlap(length):
    found = tiling.starts(length, 16, 4)
    assert found[0] == 0
    assert found[-1] + 16 >= length
    assert all(after - before <= 12 for before, after in pairwise(found))


def test_seams_are_blended_and_not_cut():
    """A decoder that adds its own tile's mean jumps from tile to tile; the blend must not."""
    latents = torch.linspace(0, 1, 40).expand(1, 4, 40, 40)

    def decode(piece):
        return enlarge(piece * 0 + piece.mean())

    found = tiling.decode_in_tiles(decode, latents, factor=8, tile=16, overlap=8)
    jumps = (found[..., 1:] - found[..., :-1]).abs().max()
    whole = found.max() - found.min()
    assert whole > 0.5
    assert jumps < whole / 32
