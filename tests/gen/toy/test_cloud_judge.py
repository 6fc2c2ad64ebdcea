"""The judge of clouds learns families and parts, and says only parts that a family has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen import train
from gen.toy import cloud_judge, models3d
from gen.toy import dit3d as toy_dit3d


@pytest.fixture(scope="module")
def sampled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    clouds = [models3d.cloud(shape, 256, k) for k, shape in zip(range(96), models3d.shapes(5), strict=False)]
    points = torch.stack([torch.from_numpy(points) for points, _ in clouds]).half()
    parts = torch.stack([torch.from_numpy(parts) for _, parts in clouds])
    return points, parts, torch.arange(96) % len(models3d.NAMES)


def test_it_learns_families_and_parts(
    sampled: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    task = cloud_judge.CloudJudgeTask(*sampled, seed=0, seen=128)
    before = task.evaluate(tmp_path)
    schedule = train.Schedule(steps=200, batch=16, lr=3e-3, warmup=5, ema=0.9)
    train.fit(task, schedule, tmp_path, report=lambda _: None)
    after = task.evaluate(tmp_path)  # of shapes it has not seen
    assert after["family"] > 0.8 > before["family"] and after["part"] > 0.7 > before["part"]
    cloud_judge.save_judge(task.module, tmp_path / "judge", {"recipe": "cloud-judge:toy"})
    points = sampled[0][:6].float()
    family, part = cloud_judge.read(cloud_judge.load_judge(tmp_path / "judge"), points)
    again, parts = cloud_judge.read(task.module, points)
    assert torch.equal(family, again) and (part == parts).float().mean() > 0.99  # half precision


def test_parts_are_those_of_the_family_it_sees() -> None:
    torch.manual_seed(0)
    family, part = cloud_judge.read(cloud_judge.CloudJudge().eval(), torch.randn(12, 50, 3))
    for number, row in zip(family.tolist(), part, strict=True):
        names = {models3d.PARTS[one] for one in row.tolist()}
        assert names <= set(models3d.FAMILIES[models3d.NAMES[number]].parts)


def test_the_order_of_points_does_not_matter() -> None:
    torch.manual_seed(0)
    judge, points = cloud_judge.CloudJudge().eval(), torch.randn(2, 40, 3)
    order = torch.randperm(40)
    with torch.no_grad():
        family, part = judge(points)
        other, moved = judge(points[:, order])
    torch.testing.assert_close(other, family)
    torch.testing.assert_close(moved, part[:, order])


def test_shards_hold_what_the_shapes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gen.toy import data

    monkeypatch.setattr(data, "SHARD", 6)
    monkeypatch.setattr(toy_dit3d, "STORED", 32)
    make = lambda start: toy_dit3d.sample_shard(9, start)  # noqa: E731
    data.write_shards(tmp_path, 12, make, verb="sampled", report=lambda _: None)
    points, parts, labels = toy_dit3d.load_shards(tmp_path, 12)
    assert points.shape == (12, 32, 3) and parts.shape == (12, 32)
    shape = next(models3d.shapes(9, start=8))
    assert models3d.NAMES[labels[8]] == shape.family
    expected, owners = models3d.cloud(shape, 32, 8)
    torch.testing.assert_close(points[8].float(), torch.from_numpy(expected), atol=1e-3, rtol=0)
    assert torch.equal(parts[8], torch.from_numpy(owners))
    mean, std = toy_dit3d.statistics(points)
    moved = (points.float() - torch.tensor(mean)) / std
    assert moved.mean((0, 1)).abs().max() < 1e-4 and moved.square().mean() == pytest.approx(1, abs=1e-3)
