"""Position tables and time features against diffusers'."""

from __future__ import annotations

import pytest
import torch

from pipelines.models.layers import Positions, position_table, time_features, unpatch


@pytest.mark.parametrize(
    ("rows", "columns", "base", "scale"), [(8, 8, 8, 1), (64, 64, 64, 2), (20, 12, 32, 0.5), (5, 9, 16, 4)]
)
def test_positions_equal_diffusers(rows: int, columns: int, base: int, scale: float) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(48, (rows, columns), base_size=base, interpolation_scale=scale)
    torch.testing.assert_close(
        position_table(rows, columns, 48, base, scale), theirs.float(), rtol=0, atol=1e-7
    )


def test_the_first_half_codes_the_column() -> None:
    table = position_table(3, 5, 16, base=4, scale=1).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert not torch.equal(table[:, 0, :8], table[:, 1, :8])


def test_time_features_equal_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    times = torch.tensor([0.0, 1.0, 20.5, 999.0])
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(times)
    torch.testing.assert_close(time_features(times), theirs, rtol=0, atol=1e-6)


def test_a_position_table_is_computed_once_per_size_and_the_oldest_is_forgotten() -> None:
    positions, asked = Positions(), []

    def compute(side: int) -> torch.Tensor:
        asked.append(side)
        return position_table(side, side, 8, side, 1.0)

    def get(side: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return positions.get((side, side), dtype, torch.device("cpu"), lambda: compute(side))

    assert get(2) is get(2) and get(2).shape == (1, 4, 8)
    assert get(2, torch.bfloat16).dtype == torch.bfloat16
    assert asked == [2, 2]
    for side in range(3, 3 + Positions.most):
        get(side)
    assert len(positions) == Positions.most
    get(2)
    assert asked[-1] == 2


def test_unpatch_undoes_the_cutting_into_patches() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    cut = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, rows, columns, row in patch, column in patch)
    tokens = cut.permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatch(tokens, 2, 3, 2), latents)
