"""Clouds of points to grids of voxels and back, as DiT-3D does both. Mo et al. 2023, arXiv:2307.01831.

Averaging into voxels and reading between them come from PVCNN, Liu et al. 2019, arXiv:1907.03739. Both are
one scatter or gather over the whole batch here, so there is nothing to compile. On a GPU the order in which
a scatter adds is not fixed, and its last bits may differ from run to run.

Gradients reach features and grid; coordinates get none, as in the published kernels.

Shapes: B clouds, P points, C features, X Y Z voxels along the three axes, G of them altogether, J corners.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_clouds(clouds: Tensor, num_points: int = 1) -> None:
    """Refuse what cannot be voxelised: (B, 3 or more, P) numbers, the first three being x, y and z.

    Raises ValueError naming the first cloud that does not fit. It reads every number, so call it at the door.
    """
    if clouds.ndim != 3 or clouds.shape[1] < 3:
        raise ValueError(
            f"clouds are {tuple(clouds.shape)}; they must be (clouds, 3, points), x, y and z in three rows"
            + ("; transpose the last two" if clouds.ndim == 3 and clouds.shape[2] == 3 else "")
        )
    if not clouds.is_floating_point():
        raise ValueError(f"clouds hold {clouds.dtype}; they must hold floating-point numbers")
    count = clouds.shape[2]
    if count < num_points:
        raise ValueError(f"the clouds have {count} points where {num_points} are needed; give more points")
    spread = clouds[:, :3].amax(2) - clouds[:, :3].amin(2)
    for problem, bad in (
        (
            "holds numbers that are not finite (NaN or infinity); remove these points",
            ~clouds.isfinite().all(2).all(1),
        ),
        ("has all points in one place, so it has no size; give another", (spread == 0).all(1)),
    ):
        if bad.any():
            raise ValueError(f"cloud {int(bad.nonzero()[0])} of {len(clouds)} {problem}")


@torch.no_grad()
def voxel_coordinates(
    points: Tensor,  # (B, 3, P)
    resolution: int,
    *,
    normalize: bool = True,  # each cloud to its own centre and size; without, -1..1 spans the grid
    eps: float = 0.0,  # added to the size
) -> Tensor:
    """Where the points lie in a grid of `resolution` voxels per side: (B, 3, P) float32, 0..resolution - 1.

    The scale is `resolution`, not one less, so that the last voxel holds all that lies beyond its middle: so
    it was published. A cloud whose points are all equal has no size and becomes NaN: see `check_clouds`.
    """
    points = points.float()
    points = points - points.mean(2, keepdim=True)
    if normalize:
        size = points.square().sum(1, keepdim=True).amax(2, keepdim=True).sqrt()
        points = points / (2 * size + eps) + 0.5
    else:
        points = (points + 1) / 2
    return (points * resolution).clamp(0, resolution - 1)


def voxelize(features: Tensor, coordinates: Tensor, resolution: int) -> Tensor:
    """Mean of the features in each voxel, 0 in empty ones: (B, C, P) and (B, 3, P) to (B, C, X, Y, Z).

    A point belongs to the voxel nearest to its coordinate; halves go to the even one.
    """
    index_B1P = _flat(coordinates.round().long(), resolution)[:, None]
    shape = (features.shape[0], features.shape[1], resolution**3)
    sums_BCG = features.new_zeros(shape).scatter_add(2, index_B1P.expand_as(features), features)
    ones_B1P = features.new_ones(index_B1P.shape)
    counts_B1G = features.new_zeros(shape[0], 1, shape[2]).scatter_add_(2, index_B1P, ones_B1P)
    return (sums_BCG / counts_B1G.clamp_(min=1)).unflatten(2, (resolution,) * 3)


def devoxelize(grid: Tensor, coordinates: Tensor) -> Tensor:
    """The grid's values at the points, trilinear between voxels: (B, C, X, Y, Z), (B, 3, P) to (B, C, P)."""
    resolution = grid.shape[-1]
    low_B3P = coordinates.floor()
    share_B3P = (coordinates - low_B3P).to(grid.dtype)
    low_B3P = low_B3P.long()
    # Beyond the last voxel the share is 0, whatever is read there.
    ends_2B3P = torch.stack([low_B3P, low_B3P + 1])
    shares_2B3P = torch.stack([1 - share_B3P, share_B3P])
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    index_BJP = torch.stack(
        [
            _flat(torch.stack([ends_2B3P[end][:, axis] for axis, end in enumerate(corner)], 1), resolution)
            for corner in corners
        ],
        dim=1,
    )
    weight_BJP = torch.stack(
        [shares_2B3P[x][:, 0] * shares_2B3P[y][:, 1] * shares_2B3P[z][:, 2] for x, y, z in corners], dim=1
    )
    batch, channels, points = grid.shape[0], grid.shape[1], coordinates.shape[2]
    read = grid.flatten(2).gather(2, index_BJP.flatten(1)[:, None].expand(-1, channels, -1))
    return (read.view(batch, channels, 8, points) * weight_BJP[:, None]).sum(2)


def _flat(index_B3P: Tensor, resolution: int) -> Tensor:
    """(B, P) numbers of voxels. Clamped, so that a NaN spoils its own cloud and not the memory of a GPU."""
    x, y, z = index_B3P.clamp(0, resolution - 1).unbind(1)
    return (x * resolution + y) * resolution + z
