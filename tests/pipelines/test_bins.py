"""Aspect-ratio tables against those of diffusers, where it has them."""

from __future__ import annotations

import pytest

from pipelines.bins import BINS, nearest_bin


@pytest.mark.parametrize("native", [256, 512, 1024, 2048])
def test_bins_are_those_of_diffusers(native: int) -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

    module = pipeline_pixart_sigma if native == 2048 else pipeline_pixart_alpha
    theirs = getattr(module, f"ASPECT_RATIO_{native}_BIN")
    ours = {float(key): size for key, size in BINS[native].items()}
    assert ours == {float(key): tuple(int(side) for side in size) for key, size in theirs.items()}


def test_the_4k_table_has_forty_sizes_of_about_2880_squared() -> None:
    assert len(BINS[2880]) == 40
    for key, (height, width) in BINS[2880].items():
        assert abs(height / width - float(key)) < 0.01 or key == "4.0"  # really 4.09, as published
        assert 0.87 < height * width / 2880**2 < 1.01


@pytest.mark.parametrize(
    ("height", "width", "native", "expected"),
    [
        (1024, 1024, 1024, (1024, 1024)),
        (512, 512, 1024, (1024, 1024)),
        (1080, 1920, 1024, (768, 1344)),
        (100, 10_000, 1024, (512, 2048)),
        (128, 512, 256, (128, 512)),
        (1000, 900, 512, (544, 480)),
    ],
)
def test_the_nearest_ratio_is_taken(height: int, width: int, native: int, expected: tuple[int, int]) -> None:
    assert nearest_bin(height, width, native) == expected
