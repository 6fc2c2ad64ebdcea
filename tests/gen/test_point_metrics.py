"""Distances of clouds against sums written out, scores of sets against cases whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gen import point_metrics
from gen.point_metrics import (
    chamfer_matrix,
    compare_sets,
    coverage_scores,
    emd_matrix,
    exact_emd,
    jsd,
    neighbour_scores,
)


def clouds(count: int, points: int = 40, seed: int = 0, spread: float = 0.15) -> Tensor:
    return spread * torch.randn(count, points, 3, generator=torch.Generator().manual_seed(seed))


def plain_chamfer(rows: Tensor, columns: Tensor) -> Tensor:
    squared = (rows[:, None, :, None].double() - columns[None, :, None].double()).square().sum(-1)
    return squared.amin(3).mean(2) + squared.amin(2).mean(2)


@pytest.mark.parametrize("group", [1, 7, 512])
def test_chamfer_is_exact_however_points_are_grouped(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_metrics, "GROUP", group)
    monkeypatch.setattr(point_metrics, "BLOCK", 1000)
    rows, columns = clouds(4, 33), clouds(3, 50, seed=1) + 0.2
    torch.testing.assert_close(
        chamfer_matrix(rows, columns).double(), plain_chamfer(rows, columns), rtol=1e-5, atol=1e-8
    )


def test_chamfer_of_a_set_with_itself_is_symmetric_and_0_on_its_diagonal() -> None:
    rows = clouds(5)
    found = chamfer_matrix(rows, rows)
    assert torch.equal(found, found.T) and found.diagonal().abs().max() < 1e-7
    torch.testing.assert_close(found, chamfer_matrix(rows, rows.clone()))


def test_chamfer_keeps_its_digits_far_from_the_origin() -> None:
    rows, columns = clouds(2, 300, spread=1e-3) + 10, clouds(2, 300, seed=1, spread=1e-3) + 10
    torch.testing.assert_close(
        chamfer_matrix(rows, columns).double(), plain_chamfer(rows, columns), rtol=1e-4, atol=0
    )


def test_chamfer_of_points_in_one_place() -> None:
    same = torch.full((1, 20, 3), 0.3)
    other = torch.tensor([0.3, 0.3, 0.5]).expand(1, 700, 3)
    torch.testing.assert_close(chamfer_matrix(same, other), torch.tensor([[0.08]]))


def test_the_exact_distance_pairs_best() -> None:
    first = clouds(1, 30)[0]
    shuffled = first[torch.randperm(30)]
    assert exact_emd(first, shuffled) == pytest.approx(0)
    assert exact_emd(first, shuffled + torch.tensor([0.0, 0.0, 0.1])) == pytest.approx(0.01, rel=1e-5)
    with pytest.raises(ValueError, match="30 and 20 points cannot be paired"):
        exact_emd(first, first[:20])


def test_the_approximate_distance_moves_all_mass_and_costs_no_less_than_the_exact() -> None:
    rows, columns = clouds(3), clouds(2, seed=1) + 0.1
    found = emd_matrix(rows, columns)
    for i in range(3):
        for j in range(2):
            exact = exact_emd(rows[i], columns[j])
            assert exact * 0.999 <= float(found[i, j]) <= 3 * exact
    one = emd_matrix(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 3.0, 4.0]]]))  # one way to move it
    assert float(one) == pytest.approx(25, rel=1e-4)


def test_the_approximate_distance_does_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, columns = clouds(2), clouds(5, seed=1)
    expected = emd_matrix(rows, columns)
    monkeypatch.setattr(point_metrics, "BLOCK", 1)
    torch.testing.assert_close(emd_matrix(rows, columns), expected)


def test_coverage_of_a_matrix_read_by_hand() -> None:
    # Samples 0 and 1 are nearest to reference 0, sample 2 to reference 2; nothing is nearest to reference 1
    rs = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0], [5.0, 6.0, 7.0]])
    found = coverage_scores(rs)
    assert found["cov"] == pytest.approx(2 / 3)
    assert found["mmd"] == pytest.approx((1 + 3 + 5) / 3)
    assert found["mmd_smp"] == pytest.approx((1 + 2 + 7) / 3)


def test_neighbours_tell_apart_what_lies_apart_and_only_that() -> None:
    near = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    apart = torch.full((2, 2), 9.0)
    assert neighbour_scores(near, apart, near) == {"1nn_acc": 1, "1nn_acc_t": 1, "1nn_acc_f": 1}
    twins = torch.tensor([[0.5, 9.0], [9.0, 0.5]])  # each has its twin in the other set
    assert neighbour_scores(near, twins, near)["1nn_acc"] == 0
    uneven = neighbour_scores(near, apart, torch.tensor([[0.0, 20.0], [20.0, 0.0]]))
    assert (uneven["1nn_acc_t"], uneven["1nn_acc_f"], uneven["1nn_acc"]) == (1, 0, 0.5)


def test_divergence_is_0_for_the_same_places_and_1_for_others() -> None:
    here = torch.tensor([0.2, 0.0, 0.0]).expand(3, 10, 3)
    assert jsd(here, here[:1]) == pytest.approx(0)
    assert jsd(here, -here) == pytest.approx(1)
    half = torch.cat([here[:1], -here[:1]])  # 1/2 and 1/2 against 1 and 0
    assert jsd(half, here) == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25) - 0.5)
    outside = torch.tensor([9.0, 0.0, 0.0]).expand(1, 4, 3)
    assert jsd(outside, torch.tensor([0.5, 0.0, 0.0]).expand(1, 4, 3)) == pytest.approx(0)


def test_equal_sets_and_other_sets_score_as_they_should() -> None:
    references = torch.stack([clouds(1, 60, seed=n)[0] * (1 + n / 10) for n in range(12)])
    same = compare_sets(references.clone(), references)
    assert same["CD_cov"] == 1 and same["CD_mmd"] < 1e-7 and same["CD_1nn_acc"] == 0  # each meets its twin
    assert same["JSD"] == pytest.approx(0, abs=1e-9)
    other = compare_sets(references + 0.4, references, distances=("CD", "EMD"))
    assert other["CD_1nn_acc"] == other["EMD_1nn_acc"] == 1 and other["CD_cov"] < 0.5 < other["JSD"]


def test_batches_are_averaged_as_published() -> None:
    samples, references = clouds(6, seed=1), clouds(6, seed=2)
    found = compare_sets(samples, references, batch=4)
    parts = [compare_sets(samples[part], references[part]) for part in (slice(0, 4), slice(4, 6))]
    assert found == {name: (parts[0][name] + parts[1][name]) / 2 for name in found}
    assert found["CD_cov"] != compare_sets(samples, references)["CD_cov"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": clouds(2).mT}, r"samples are \(2, 3, 40\); they must be"),
        ({"references": clouds(2)[:0]}, r"references are \(0, 40, 3\)"),
        ({"samples": clouds(2) * torch.nan}, "samples hold numbers that are not finite"),
        ({"distances": ("L2",)}, "no distance called 'L2'; there are CD, EMD"),
        ({"samples": clouds(3), "batch": 2}, "3 samples and 2 references cannot go in batches"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"samples": clouds(2), "references": clouds(2, seed=1)} | change
    with pytest.raises(ValueError, match=message):
        compare_sets(given.pop("samples"), given.pop("references"), **given)


def test_threads_change_nothing_and_are_as_many_as_before() -> None:
    rows, columns = clouds(6), clouds(5, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(chamfer_matrix(rows, columns))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
