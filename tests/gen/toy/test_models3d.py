"""Shapes: closed meshes that follow from their numbers, and clouds that lie on them evenly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gen.toy import models3d
from gen.toy.models3d import FAMILIES, NAMES, PARTS


def drawn(count: int, seed: int = 3) -> list[models3d.Shape]:
    return list(itertools.islice(models3d.shapes(seed), count))


def test_there_are_six_families_of_six_numbers_and_more() -> None:
    assert set(NAMES) == {"airplane", "car", "chair", "lamp", "mug", "table"}
    assert all(len(family.ranges) >= 6 for family in FAMILIES.values())
    assert all(low < high for family in FAMILIES.values() for low, high in family.ranges.values())


def test_a_shape_is_a_function_of_seed_and_index() -> None:
    assert list(itertools.islice(models3d.shapes(3, start=5), 4)) == drawn(9)[5:]
    assert drawn(6, seed=4) != drawn(6)
    assert [shape.family for shape in drawn(12)] == [*NAMES, *NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_closed_and_face_outwards(name: str) -> None:
    shapes = [shape for shape in drawn(120) if shape.family == name]
    for shape in shapes[:8]:
        parts = models3d.build(shape)
        assert tuple(part for part, _ in parts) == FAMILIES[name].parts
        for part, mesh in parts:
            assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0, part


@pytest.mark.parametrize("name", NAMES)
def test_every_number_moves_the_surface(name: str) -> None:
    family = FAMILIES[name]
    middle = {key: (low + high) / 2 for key, (low, high) in family.ranges.items()}

    def corners(numbers: dict[str, float]) -> np.ndarray:
        return np.concatenate([mesh.vertices for _, mesh in family.build(numbers)])

    for key, (_, high) in family.ranges.items():
        assert np.abs(corners({**middle, key: high}) - corners(middle)).max() > 0.005, key


def test_clouds_are_centred_of_one_size_and_lie_on_their_parts() -> None:
    import trimesh

    for index, shape in enumerate(drawn(6)):
        points, owners = models3d.cloud(shape, 1500, seed=index)
        assert points.dtype == np.float32 and points.shape == (1500, 3) and owners.shape == (1500,)
        low, high = points.min(0), points.max(0)
        assert np.linalg.norm(high - low) == pytest.approx(1, abs=0.04)
        assert np.abs(low + high).max() < 0.06
        parts = models3d.build(shape)
        vertices = np.concatenate([mesh.vertices for _, mesh in parts])
        low, high = vertices.min(0), vertices.max(0)
        back = points * np.linalg.norm(high - low) + (low + high) / 2
        for part, mesh in parts:
            own = back[owners == PARTS.index(part)]
            assert len(own) > 10
            # each point in the plane of one of the part's triangles
            planes = np.einsum("fk,pfk->pf", mesh.face_normals, own[:, None] - mesh.triangles[None, :, 0])
            assert np.abs(planes).min(1).max() < 1e-5
        areas = {part: trimesh.Trimesh.area.fget(mesh) for part, mesh in parts}
        for part, area in areas.items():
            share = (owners == PARTS.index(part)).mean()
            assert share == pytest.approx(area / sum(areas.values()), abs=0.06)


def test_clouds_follow_from_their_seed() -> None:
    shape = drawn(1)[0]
    first, again, other = (models3d.cloud(shape, 64, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
