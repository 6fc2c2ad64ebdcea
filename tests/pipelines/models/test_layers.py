"""Position tables and time features against diffusers'."""

from __future__ import annotations

import pytest
import torch

from pipelines.models.layers import position_table, time_features


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
