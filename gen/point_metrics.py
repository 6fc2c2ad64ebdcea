"""How far clouds of points are from other clouds, and sets of clouds from other sets.

The measures of PointFlow (Yang et al. 2019, arXiv:1906.12320) and of Achlioptas et al. 2018
(arXiv:1707.02392), as the published code of DiT-3D computes them: distances are squared, and its earth
mover's distance is an approximation that is neither exact nor symmetric. `exact_emd` is there to see by how
much it is off.

Clouds are (P, 3) rows of x, y and z; a set is (n, P, 3). In a matrix of distances rows are references and
columns are samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

GROUP = 512  # neighbouring query points, at most, that share their candidates
BLOCK = 1 << 20  # distances in flight: what the cache of a CPU holds
EXACT = "donot_use_mm_for_euclid_dist"  # from differences: products would round near points away
LEVELS = (*(-(4.0**j) for j in range(7, -2, -1)), 0.0)  # of the approximate transport, from near to far


# ---------------------------------------------------------------------------------- between two clouds


def chamfer_matrix(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, P, 3) and (S, Q, 3) to (R, S): mean squared distance to the nearest point, both ways added."""
    if rows is columns:
        there = _nearest_means(rows, columns)
        return there + there.T
    return _nearest_means(columns, rows) + _nearest_means(rows, columns).T


def _nearest_means(queries: Tensor, clouds: Tensor) -> Tensor:
    """(S, Q, 3) and (R, P, 3) to (R, S): the mean over the points of a query of the squared distance to the
    nearest point of a cloud.

    Exact, but not every distance is looked at. All query points are put into groups of neighbours. Only
    points of a cloud that are at most twice the group's radius farther from its centre than the nearest one
    can be nearest to a member, by the triangle inequality.
    """
    count, size = queries.shape[:2]
    points = queries.reshape(-1, 3).float()
    order = _grouped(points)
    grouped = points[order]
    centres = (grouped.amin(1) + grouped.amax(1)) / 2
    # Near the centre numbers are small, and so are the roundings of products of them.
    local = grouped - centres[:, None]
    squares = local.square().sum(-1, keepdim=True)
    reach = 2 * squares.amax(1).sqrt()
    left = torch.cat([-2 * local, torch.ones_like(squares)], dim=-1)  # times [y, |y|^2] below

    def means(cloud: Tensor) -> Tensor:
        unsorted = torch.empty_like(points[:, 0])
        unsorted[order] = (_nearest(left, centres, reach, cloud) + squares[..., 0]).clamp_(min=0)
        return unsorted.view(count, size).mean(1)

    return torch.stack(_in_parallel(means, clouds.float()))


def _in_parallel(work: Callable[[Tensor], Tensor], items: Tensor) -> list[Tensor]:
    """Each item on a core of its own: these tensors are too small for several cores to share one."""
    threads = torch.get_num_threads()
    if items.is_cuda or threads == 1 or len(items) == 1:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def _nearest(left: Tensor, centres: Tensor, reach: Tensor, cloud: Tensor) -> Tensor:
    """(groups, members): squared distances to the nearest point of one cloud, less the own squares."""
    apart = torch.cdist(centres, cloud, compute_mode=EXACT)
    near = apart <= (apart.amin(1, keepdim=True) + reach) * (1 + 1e-5)  # a little more, for roundings
    group, candidates = near.nonzero().unbind(1)  # group after group
    counts = torch.bincount(group, minlength=len(centres))
    starts = counts.cumsum(0) - counts
    by_count = counts.argsort()
    result = left.new_empty(left.shape[:2])
    sorted_counts = counts[by_count].tolist()
    done = 0
    while done < len(sorted_counts):
        # Groups of about as many candidates are handled together: the last of them has most.
        end = done + 1
        while end < len(sorted_counts) and (end + 1 - done) * left.shape[1] * sorted_counts[end] <= BLOCK:
            end += 1
        groups, most = by_count[done:end], sorted_counts[end - 1]
        places = torch.arange(most, device=cloud.device).minimum(counts[groups, None] - 1)
        local = cloud.T[:, candidates[starts[groups, None] + places]] - centres.T[:, groups, None]
        right = torch.cat([local, local.square().sum(0, keepdim=True)]).transpose(0, 1)
        result[groups] = torch.bmm(left[groups], right).amin(2)
        done = end
    return result


def _grouped(points: Tensor) -> Tensor:
    """(groups, members) numbers of neighbouring points: halved along the longest side again and again.

    All groups have as many members, so the last point may be in several.
    """
    halvings = max(0, math.ceil(math.log2(len(points) / GROUP)))
    padding = -len(points) % 2**halvings
    order = torch.arange(len(points) + padding, device=points.device).clamp(max=len(points) - 1)[None]
    for _ in range(halvings):
        boxes = points[order]
        longest = (boxes.amax(1) - boxes.amin(1)).argmax(1)
        along = boxes.gather(2, longest[:, None, None].expand(-1, order.shape[1], 1))[:, :, 0]
        order = order.gather(1, along.argsort(1)).view(2 * len(order), -1)
    return order


def emd_matrix(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, P, 3) and (S, P, 3) to (R, S): the approximate earth mover's distance as published.

    Mass moves in ten rounds, in the first to near neighbours only, in the last to wherever there is room; the
    cost is squared distance, over the number of points. It depends on which cloud comes first. Takes seconds
    for each pair of thousands of points on a CPU.
    """
    per_row = [_transport_costs(row[None].expand(len(columns), -1, -1), columns) for row in rows]
    return torch.stack(per_row)


def _transport_costs(left: Tensor, right: Tensor) -> Tensor:
    """(n, P, 3) twice to (n,)."""
    chunk = max(1, (BLOCK << 3) // (left.shape[1] * right.shape[1]))
    parts = [
        _transport(a, b) for a, b in zip(left.float().split(chunk), right.float().split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _transport(left: Tensor, right: Tensor) -> Tensor:
    (count, size), other = left.shape[:2], right.shape[1]
    squared = _squared_distances(left, right)
    # What each point still has to give, or to take; the smaller cloud's points count for more.
    give = squared.new_full((count, size, 1), max(1.0, other / size))
    take = squared.new_full((count, other, 1), max(1.0, size / other))
    cost = squared.new_zeros(count)
    for level in LEVELS:
        kernel = (level * squared).exp()
        share = give / (1e-9 + kernel @ take)
        asked = take * (kernel.transpose(1, 2) @ share)
        granted = (take / (asked + 1e-9)).clamp(max=1) * take
        take = (take - asked).clamp(min=0)
        cost += (share * ((kernel * squared) @ granted)).sum((1, 2))
        give = (give - share * (kernel @ granted)).clamp(min=0)
    return cost / size


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """(.., P, 3) and (.., Q, 3) to (.., P, Q)."""
    return torch.cdist(left, right, compute_mode=EXACT).square()


def exact_emd(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the best pairing of two clouds (P, 3). Seconds for thousands of points.

    Raises ValueError for clouds of different sizes.
    """
    from scipy.optimize import linear_sum_assignment

    if first.shape != second.shape:
        raise ValueError(
            f"clouds of {len(first)} and {len(second)} points cannot be paired; give as many of each"
        )
    costs = _squared_distances(first.double(), second.double())
    pairs = linear_sum_assignment(costs.cpu().numpy())
    return float(costs[pairs].mean())


# ------------------------------------------------------------------------------------ between two sets


def coverage_scores(rs: Tensor) -> dict[str, float]:
    """Of distances (references, samples): `mmd`, the mean distance of references to their nearest sample
    (small: every reference is met well), `cov`, the share of references that are nearest to some sample, and
    `mmd_smp`, the mean distance of samples to their nearest reference."""
    nearest = rs.min(0)
    return {
        "mmd": float(rs.amin(1).mean()),
        "cov": len(nearest.indices.unique()) / len(rs),
        "mmd_smp": float(nearest.values.mean()),
    }


def neighbour_scores(rr: Tensor, rs: Tensor, ss: Tensor) -> dict[str, float]:
    """1-NNA: how often the nearest other cloud is of the same set. 0.5 is ideal, 1 means that the sets can be
    told apart. `1nn_acc_t` counts references only, `1nn_acc_f` samples only."""
    both = torch.cat([torch.cat([rr, rs], dim=1), torch.cat([rs.T, ss], dim=1)])
    both = both + torch.diag(both.new_full((len(both),), torch.inf))
    references = torch.arange(len(both), device=both.device) < len(rr)
    right = references[both.argmin(0)] == references
    return {
        "1nn_acc": float(right.double().mean()),
        "1nn_acc_t": float(right[references].double().mean()),
        "1nn_acc_f": float(right[~references].double().mean()),
    }


def jsd(samples: Tensor, references: Tensor, resolution: int = 28) -> float:
    """Jensen-Shannon divergence, in bits, of where in space the two sets (n, P, 3) have their points.

    Space is the ball of radius 0.5, in cells of a grid; a point outside counts for the nearest cell.
    """
    from scipy.spatial import cKDTree

    axis = torch.arange(resolution, dtype=torch.float32) * (1.0 / (resolution - 1)) - 0.5
    cells = torch.cartesian_prod(axis, axis, axis)
    tree = cKDTree(cells[cells.norm(dim=1) <= 0.5].numpy())

    def occupancy(clouds: Tensor) -> Tensor:
        _, index = tree.query(clouds.reshape(-1, 3).cpu().numpy(), workers=-1)
        return torch.bincount(torch.from_numpy(index), minlength=tree.n).double() / len(index)

    def entropy(shares: Tensor) -> Tensor:
        return -torch.xlogy(shares, shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))

    one, other = occupancy(samples), occupancy(references)
    return float(entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"CD": chamfer_matrix, "EMD": emd_matrix}


def compare_sets(
    samples: Tensor,  # (S, P, 3)
    references: Tensor,  # (R, P, 3)
    *,
    distances: tuple[str, ...] = ("CD",),  # of DISTANCES; EMD takes very long on a CPU
    batch: int | None = None,  # clouds compared at a time, the scores averaged; None: the whole sets
) -> dict[str, float]:
    """Every score by name: `CD_mmd`, `CD_cov`, `CD_1nn_acc` and so on, and `JSD`.

    The published script compares batches of 64 and averages: that flatters, as among fewer references one is
    more easily the nearest. Its numbers can only be compared with such ones; `batch=64` gives them.

    Raises ValueError for an unknown distance, and for sets that cannot be compared.
    """
    unknown = [name for name in distances if name not in DISTANCES]
    if unknown:
        raise ValueError(f"no distance called {unknown[0]!r}; there are {', '.join(DISTANCES)}")
    for what, clouds in (("samples", samples), ("references", references)):
        if clouds.ndim != 3 or clouds.shape[2] != 3 or 0 in clouds.shape:
            raise ValueError(f"{what} are {tuple(clouds.shape)}; they must be (clouds, points, 3)")
        if not bool(clouds.isfinite().all()):
            raise ValueError(f"{what} hold numbers that are not finite (NaN or infinity); leave these out")
    if batch is not None and len(samples) != len(references):
        raise ValueError(
            f"{len(samples)} samples and {len(references)} references cannot go in batches together; "
            "give as many of each, or no batch"
        )
    pairs = [(samples, references)]
    if batch is not None:
        pairs = list(zip(samples.split(batch), references.split(batch), strict=True))
    found = [_scores(some, others, distances) for some, others in pairs]
    return {name: sum(scores[name] for scores in found) / len(found) for name in found[0]}


def _scores(samples: Tensor, references: Tensor, distances: tuple[str, ...]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name in distances:
        matrix = DISTANCES[name]
        rs = matrix(references, samples)
        rr, ss = matrix(references, references), matrix(samples, samples)
        both = coverage_scores(rs) | neighbour_scores(rr, rs, ss)
        scores |= {f"{name}_{key}": value for key, value in both.items()}
    return scores | {"JSD": jsd(samples, references)}
