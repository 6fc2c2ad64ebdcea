"""Shards: rendered and encoded scenes survive stopping, sharing and reading back."""

import itertools
from pathlib import Path

import pytest
import torch

from gen.toy import data, world
from gen.toy.render import render


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD", 8)


def test_shards_hold_the_scenes_whoever_rendered_them(tmp_path: Path, small: None) -> None:
    for rank in (0, 1):
        data.render_shards(tmp_path, 5, 24, rank=rank, world=2, report=lambda _: None)
    pictures, owners = data.load_shards(tmp_path, 24)
    assert pictures.shape == (24, 3, 128, 128) and owners.shape == (24, 8, 8)
    scenes = list(itertools.islice(world.scenes(5), 24))
    again = (render(scenes[16:]) * 255).round()
    assert (pictures[16:].float() - again).abs().max() <= 1
    for i, scene in enumerate(scenes):
        assert set(owners[i].unique().tolist()) <= {-1, *range(len(scene.things))}
        assert (owners[i] >= 0).sum() >= 2


def test_a_stopped_rendering_goes_on(tmp_path: Path, small: None) -> None:
    data.render_shards(tmp_path, 5, 16, report=lambda _: None)
    before = data.shard_path(tmp_path, 0).stat().st_mtime_ns
    said: list[str] = []
    data.render_shards(tmp_path, 5, 24, report=said.append)
    assert len(said) == 1 and data.shard_path(tmp_path, 0).stat().st_mtime_ns == before
    assert len(data.load_shards(tmp_path, 24)[0]) == 24
    assert len(data.load_shards(tmp_path, 8)[0]) == 8


def test_latents_stay_beside_their_scenes(tmp_path: Path, small: None) -> None:
    data.render_shards(tmp_path / "scenes", 5, 16, report=lambda _: None)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures.float(), 8).half()

    data.encode_shards(tmp_path / "scenes", tmp_path / "latents", encode, 16, report=lambda _: None)
    latents, owners = data.load_latents(tmp_path / "latents", 16)
    pictures, expected = data.load_shards(tmp_path / "scenes", 16)
    assert torch.equal(latents, encode(pictures)) and torch.equal(owners, expected)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no rendered scenes in"):
        data.load_shards(tmp_path, 10)


def test_a_patch_belongs_to_the_thing_that_fills_it() -> None:
    owner = torch.full((1, 128, 128), -1)
    owner[0, :16, :16] = 1
    owner[0, :16, 16:18] = 0  # too little to count
    owner[0, 16:32, :10] = 2
    owner[0, 16:32, 10:16] = 0
    patches = data.patch_owners(owner)[0]
    assert patches[0, 0] == 1 and patches[0, 1] == -1 and patches[1, 0] == 2 and patches[5, 5] == -1
