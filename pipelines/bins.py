"""Aspect-ratio bins: the sizes PixArt was trained on. arXiv:2403.04692, appendix.

Keys are height / width as published, values are (height, width) in pixels. A request is drawn in the bin
whose key is nearest, then resized and cropped to the size asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Bins = Mapping[str, tuple[int, int]]

_1024 = """
    0.25:512x2048 0.26:512x1984 0.27:512x1920 0.28:512x1856 0.32:576x1792 0.33:576x1728 0.35:576x1664
    0.4:640x1600 0.42:640x1536 0.48:704x1472 0.5:704x1408 0.52:704x1344 0.57:768x1344 0.6:768x1280
    0.68:832x1216 0.72:832x1152 0.78:896x1152 0.82:896x1088 0.88:960x1088 0.94:960x1024 1.0:1024x1024
    1.07:1024x960 1.13:1088x960 1.21:1088x896 1.29:1152x896 1.38:1152x832 1.46:1216x832 1.67:1280x768
    1.75:1344x768 2.0:1408x704 2.09:1472x704 2.4:1536x640 2.5:1600x640 2.89:1664x576 3.0:1728x576
    3.11:1792x576 3.62:1856x512 3.75:1920x512 3.88:1984x512 4.0:2048x512
"""
_2880 = """
    0.25:1408x5760 0.26:1408x5568 0.27:1408x5376 0.28:1408x5184 0.32:1600x4992 0.33:1600x4800
    0.34:1600x4672 0.4:1792x4480 0.42:1792x4288 0.47:1920x4096 0.49:1920x3904 0.51:1920x3776
    0.55:2112x3840 0.59:2112x3584 0.68:2304x3392 0.72:2304x3200 0.78:2496x3200 0.83:2496x3008
    0.89:2688x3008 0.93:2688x2880 1.0:2880x2880 1.07:2880x2688 1.12:3008x2688 1.21:3008x2496
    1.28:3200x2496 1.39:3200x2304 1.47:3392x2304 1.7:3584x2112 1.82:3840x2112 2.03:3904x1920
    2.13:4096x1920 2.39:4288x1792 2.5:4480x1792 2.92:4672x1600 3.0:4800x1600 3.12:4992x1600
    3.68:5184x1408 3.82:5376x1408 3.95:5568x1408 4.0:5760x1408
"""
# The bins that the 256, 512 and 1024 pixel models are asked for at inference leave these out.
_RARE = frozenset({"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"})


def _table(text: str, scale: float = 1.0, without: frozenset[str] = frozenset()) -> Bins:
    bins = {}
    for entry in text.split():
        key, size = entry.split(":")
        if key not in without:
            height, width = (int(int(side) * scale) for side in size.split("x"))
            bins[key] = (height, width)
    return MappingProxyType(bins)


BINS: Mapping[int, Bins] = MappingProxyType(
    {
        256: _table(_1024, 1 / 4, _RARE),
        512: _table(_1024, 1 / 2, _RARE),
        1024: _table(_1024, 1, _RARE),
        2048: _table(_1024, 2),
        2880: _table(_2880),
    }
)


def nearest_bin(height: int, width: int, native: int) -> tuple[int, int]:
    """The (height, width) of the native size's bin with the nearest ratio; of two as near, the first."""
    bins = BINS[native]
    return bins[min(bins, key=lambda key: abs(float(key) - height / width))]
