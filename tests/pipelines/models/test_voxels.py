"""Voxelising and reading back against loops over single points, and what cannot be voxelised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipelines.models.voxels import check_clouds, devoxelize, voxel_coordinates, voxelize


def clouds(batch: int = 2, points: int = 50) -> Tensor:
    return torch.randn(batch, 3, points, generator=torch.Generator().manual_seed(3))


def test_voxels_hold_the_mean_of_their_points() -> None:
    points, side = clouds(), 4
    features = torch.randn(2, 5, 50)
    coordinates = voxel_coordinates(points, side)
    found = voxelize(features, coordinates, side)
    for row in range(2):
        members: dict[tuple[int, ...], list[Tensor]] = {}
        for n in range(50):
            place = tuple(round(c) for c in coordinates[row, :, n].tolist())
            members.setdefault(place, []).append(features[row, :, n])
        assert any(len(group) > 1 for group in members.values())
        for place in ((x, y, z) for x in range(side) for y in range(side) for z in range(side)):
            wanted = torch.stack(members[place]).mean(0) if place in members else torch.zeros(5)
            assert torch.allclose(found[row, :, *place], wanted, atol=1e-6)


def test_coordinates_put_the_farthest_point_on_the_border() -> None:
    points = 7 * clouds() + torch.tensor([1.0, -20.0, 300.0])[:, None]
    found = voxel_coordinates(points, 32)
    centred = points - points.mean(2, keepdim=True)
    size = centred.norm(dim=1).amax(1)
    wanted = (32 * (centred / (2 * size[:, None, None]) + 0.5)).clamp(0, 31)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert torch.equal(
        voxel_coordinates(torch.tensor([[[-1.0, 1.0], [0, 0], [0, 0]]]), 8)[0, 0], torch.tensor([0.0, 7.0])
    )


def test_a_grid_of_coordinates_is_read_as_it_is() -> None:
    side = 6
    axis = torch.arange(side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]
    at = torch.cat(
        [torch.rand(1, 3, 80) * (side - 1), torch.tensor([0.0, 2.0, side - 1.0]).expand(1, 3, 3)], 2
    )
    torch.testing.assert_close(devoxelize(grid, at), at, rtol=0, atol=1e-5)


def test_a_point_alone_in_its_voxel_comes_back_when_it_lies_on_it() -> None:
    side = 5
    at = torch.tensor([[[0.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 4.0, 0.0]]])
    features = torch.randn(1, 7, 3)
    assert torch.equal(devoxelize(voxelize(features, at, side), at), features)


def test_gradients_reach_features_and_grid_and_no_coordinates() -> None:
    points = clouds().double().requires_grad_()
    coordinates = voxel_coordinates(points, 4)
    assert not coordinates.requires_grad
    at = coordinates.double()
    features = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    grid = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: voxelize(f, at, 4), features)
    assert torch.autograd.gradcheck(lambda g: devoxelize(g, at), grid)


def test_a_batch_equals_its_clouds() -> None:
    points = clouds(3)
    at = voxel_coordinates(points, 8)
    grid = voxelize(points, at, 8)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(voxel_coordinates(points[one], 8), at[one])
        assert torch.equal(voxelize(points[one], at[one], 8), grid[one])
        assert torch.equal(devoxelize(grid[one], at[one]), devoxelize(grid, at)[one])


def test_a_cloud_that_is_not_finite_spoils_no_other() -> None:
    points = clouds(2)
    expected = voxelize(points[:1], voxel_coordinates(points[:1], 4), 4)
    points[1, 0, 3] = math.nan
    at = voxel_coordinates(points, 4)
    grid = voxelize(points, at, 4)
    assert torch.equal(grid[:1], expected)
    assert devoxelize(grid, at)[1].isnan().any() and devoxelize(grid, at)[0].isfinite().all()


def with_nan() -> Tensor:
    points = clouds(3)
    points[2, 1, 4] = math.nan
    return points


def flat() -> Tensor:
    points = clouds(2)
    points[1] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    return points


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (with_nan(), r"cloud 2 of 3 holds numbers that are not finite .*; remove"),
        (with_nan() * math.inf, "cloud 0 of 3 holds numbers that are not finite"),
        (flat(), r"cloud 1 of 2 has all points in one place.*; give another"),
        (clouds()[0], r"clouds are \(3, 50\); they must be \(clouds, 3, points\)"),
        (clouds()[:, :2], r"clouds are \(2, 2, 50\)"),
        (torch.randn(4, 2, 3), r"\(4, 2, 3\).*; transpose the last two"),
        (clouds().long(), r"clouds hold torch\.int64"),
        (clouds(points=9), r"have 9 points where 10 are needed; give more"),
        (clouds(points=1), r"have 1 points where 10 are needed"),
    ],
)
def test_what_cannot_be_voxelised_is_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_clouds(given, num_points=10)


def test_good_clouds_pass_and_so_do_their_colours() -> None:
    check_clouds(clouds(), num_points=50)
    check_clouds(torch.cat([clouds(), torch.zeros(2, 3, 50)], 1))
    line = clouds()
    line[:, 1:] = 0  # thin, and of some size
    check_clouds(line)
