"""The table of checkpoints: where each comes from, what it may be used for, which sizes of picture it
knows."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of weights: embedded, then `folder` is set (relative to weights/), or published: `repo_id`."""

    key: str
    summary: str
    licence: str
    native_size: int  # pixels per side of the pictures it was trained on
    size_multiple: int  # pixels; width and height must be multiples of it
    smallest: int  # pixels per side
    largest: int  # pixels per side
    folder: str = ""
    repo_id: str = ""
    is_toy: bool = False  # trained in hours on procedural pictures: said wherever its pictures appear
    recipe: str = ""  # name for `gen train`; empty when the weights are not ours to make

    def __post_init__(self) -> None:
        assert bool(self.folder) != bool(self.repo_id), f"{self.key}: give a folder or a repo_id"


TOY = Checkpoint(
    key="pixart-sigma-toy",
    summary="Embedded: coloured shapes on a ground, trained from scratch in hours",
    licence="Apache-2.0",
    native_size=128,
    size_multiple=16,
    smallest=64,
    largest=256,
    folder="toy/pixart-sigma",
    is_toy=True,
    recipe="pixart-sigma:toy",
)

JUDGE = replace(
    TOY,
    key="judge-toy",
    summary="Embedded: reads shape, colour, size, material and position back from toy pictures",
    folder="toy/judge",
    recipe="judge:toy",
)

# Sizes between half and double the native one; the pipeline picks the nearest trained aspect ratio and crops.
XL_1024 = Checkpoint(
    key="pixart-sigma-xl-1024",
    summary="PixArt-Sigma XL/2, 611 M parameters with T5-XXL, 1024 pixels",
    licence="CreativeML Open RAIL++-M",
    native_size=1024,
    size_multiple=8,
    smallest=512,
    largest=2048,
    repo_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
)


def _sized(key: str, repo: str, size: int) -> Checkpoint:
    return replace(
        XL_1024,
        key=key,
        summary=f"PixArt-Sigma XL/2, 611 M parameters with T5-XXL, {size} pixels",
        native_size=size,
        smallest=size // 2,
        largest=size * 2,
        repo_id=f"PixArt-alpha/PixArt-Sigma-XL-2-{repo}",
    )


def index(*rows: Checkpoint) -> dict[str, Checkpoint]:
    """By key; a key that stands twice is a mistake in the table."""
    table = {row.key: row for row in rows}
    assert len(table) == len(rows), "two checkpoints have the same key"
    return table


CHECKPOINTS = index(
    XL_1024,
    _sized("pixart-sigma-xl-2k", "2K-MS", 2048),
    _sized("pixart-sigma-xl-512", "512-MS", 512),
    _sized("pixart-sigma-xl-256", "256x256", 256),
    TOY,
    JUDGE,
)
