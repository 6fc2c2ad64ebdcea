"""Clouds of points to closed meshes, for printing and for programs that know triangles only.

Points that were drawn by chance leave gaps in their sheets, several times as wide as they are apart, and no
growth closes those without closing the handle of a mug as well. So sheets are evened out first: neighbours
that lie in one plane get points between them where there are none.

Then the cloud is blown up until its points grow together, what is enclosed is filled, and the whole is shrunk
again: a morphological closing, on a grid of distances. What the cloud leaves open stays open (a mug can be
filled), what it encloses becomes solid (a fuselage), and sheets and rods keep a least thickness. Then the
surface of the distances is smoothed (Taubin 1995, a signal processing approach to fair surface design), which
keeps its volume.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gen.errors import GenError

if TYPE_CHECKING:
    from trimesh import Trimesh

CELLS = 80  # of the grid along the longest side, or less where the points are few
# Times the spacing of the points: holes in the surface up to twice as wide are closed. The first is taken
# after which the next encloses little more: gaps between parts are to stay, gaps between points are not.
GROWTHS = (2.3, 2.8, 3.4, 4.2)
NEARLY = 0.85
LEAST = 0.8  # of half the thickness of a sheet, in spacings
KEPT = 0.01  # a piece is kept that this share of the points lies next to
SOFT = 1.0  # cells over which the depth is blurred
ROUNDS = 15  # of smoothing


@dataclass(frozen=True)
class Mesh:
    """Closed, its triangles counter-clockwise seen from outside."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int64
    normals: np.ndarray  # (V, 3) float32
    colours: np.ndarray  # (V, 3) uint8


NEIGHBOURS = 16
# Of sheets, when they are evened out: thickness and tilt of what counts as one plane, and from where on a gap
# is one and up to where it is part of the sheet, in spacings
THICKNESS, TILT, ALIKE = 0.4, 0.35, 0.85
GAP, BRIDGE = 0.85, 5.0
FILLINGS = 5  # rounds; each fills in from the rims


def reconstruct(points: np.ndarray, colours: np.ndarray) -> Mesh:
    """A closed mesh around points (P, 3), with the colours (P, 3) uint8 of the nearest ones.

    Raises failed where the points have no surface that could be closed.
    """
    from scipy.spatial import cKDTree

    points = np.asarray(points, np.float64)
    mesh = _solid(points)
    _, nearest = cKDTree(points).query(mesh.vertices)
    return Mesh(
        np.asarray(mesh.vertices, np.float32),
        np.asarray(mesh.faces),
        np.asarray(mesh.vertex_normals, np.float32),
        np.ascontiguousarray(colours[nearest]),
    )


def _solid(points: np.ndarray) -> Trimesh:
    import trimesh
    from scipy import ndimage
    from scipy.spatial import cKDTree

    from gen.point_views import spacing

    size = float((points.max(0) - points.min(0)).max())
    apart = max(spacing(points), 0.6 * size / CELLS)
    given, points = points, _evened(points, spacing(points))
    cell = max(size / CELLS, apart / 2)
    limit = GROWTHS[-1] * apart + 2 * cell
    low = points.min(0) - limit - cell
    shape = np.ceil((points.max(0) + limit + cell - low) / cell).astype(int) + 1
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1) * cell + low
    # 1. Blow up: how far a place is from the cloud, as far as that matters
    distance, _ = cKDTree(points).query(grid.reshape(-1, 3), distance_upper_bound=limit)
    distance = np.minimum(distance, limit).reshape(shape)
    # 2. Fill
    solids = [_filled(distance > growth * apart) for growth in GROWTHS]
    left = [_left(solid, growth * apart / cell) for growth, solid in zip(GROWTHS, solids, strict=True)]
    enough = (now >= NEARLY * after for now, after in itertools.pairwise([*left, 0]))
    chosen = next(index for index, is_enough in enumerate(enough) if is_enough)
    grow, inside = GROWTHS[chosen] * apart, solids[chosen]
    distance[inside & (distance > grow)] = 0
    # 3. Shrink: measured from the blown-up surface, to the left-over thickness
    skin, _ = _surface(distance, grow)
    depth = grow - distance
    limit = grow + 2 * cell
    near, _ = cKDTree(skin * cell + low).query(grid[inside], distance_upper_bound=limit)
    depth[inside] = np.minimum(near, limit)
    depth, level = ndimage.gaussian_filter(depth, SOFT), grow - max(LEAST * apart, cell)
    if depth.max() <= level:  # all of it is thinner than a cell
        raise _no_surface()
    depth[_filled(depth < level) & (depth < level)] = limit  # pockets that have lost their opening
    vertices, faces = _surface(-depth, -level)
    mesh = trimesh.Trimesh(vertices * cell + low, faces, process=False)
    # 4. Leave out crumbs, and smooth
    _, nearest = cKDTree(mesh.vertices).query(given)
    bodies = trimesh.graph.connected_component_labels(mesh.edges, len(mesh.vertices))
    shares = np.bincount(bodies[nearest], minlength=bodies.max() + 1) / len(given)
    mesh.update_faces((shares >= KEPT)[bodies[mesh.faces[:, 0]]])
    mesh.remove_unreferenced_vertices()
    trimesh.smoothing.filter_taubin(mesh, lamb=0.5, nu=0.525, iterations=ROUNDS)
    if not (mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0):
        raise _no_surface()
    return mesh


def _evened(points: np.ndarray, apart: float) -> np.ndarray:
    """The points (P, 3), and more where a sheet of them has gaps; `apart` is their spacing."""
    from scipy.spatial import cKDTree

    for _ in range(FILLINGS):
        tree = cKDTree(points)
        length, which = tree.query(points, min(NEIGHBOURS, len(points) - 1) + 1)
        around = points[which] - points[which].mean(1, keepdims=True)
        spread, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", around, around))
        normals, flat = axes[:, :, 0], spread[:, 0] < THICKNESS * spread[:, 1]
        way, length, which = points[which[:, 1:]] - points[:, None], length[:, 1:], which[:, 1:]
        in_plane = np.abs(np.einsum("nki,ni->nk", way, normals)) < TILT * length
        alike = np.abs(np.einsum("nki,ni->nk", normals[which], normals)) > ALIKE
        wide = (length > 1.8 * GAP * apart) & (length < BRIDGE * apart)
        between = (points[:, None] + way / 2)[in_plane & alike & wide & flat[:, None]]
        if not len(between):
            break
        near, _ = tree.query(between)
        fresh = between[near > GAP * apart][np.argsort(-near[near > GAP * apart], kind="stable")]
        if not len(fresh):
            break
        points = np.concatenate([points, _apart(fresh, GAP * apart)])
    return points


def _apart(points: np.ndarray, distance: float) -> np.ndarray:
    """Those of the points, the first before the later, that are no nearer to each other than this."""
    from scipy.spatial import cKDTree

    kept = np.ones(len(points), bool)
    for index, close in enumerate(cKDTree(points).query_ball_point(points, distance)):
        if kept[index]:
            kept[[other for other in close if other > index]] = False
    return points[kept]


def _no_surface() -> GenError:
    return GenError(
        "These points do not add up to a closed surface.", "Save them as points, or draw more.", "failed"
    )


def _filled(empty: np.ndarray) -> np.ndarray:
    """All cells but the empty ones that can be reached from the corner."""
    from scipy import ndimage

    pieces, _ = ndimage.label(empty)
    return pieces != pieces[0, 0, 0]


def _left(solid: np.ndarray, cells: float) -> int:
    """How many cells are deeper in the solid than so many."""
    from scipy import ndimage

    return int(np.count_nonzero(ndimage.distance_transform_edt(solid) > cells))


def _surface(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices, in cells, and triangles where the values, higher outside, cross the level."""
    from skimage.measure import marching_cubes

    close = np.abs(values - level) < 1e-6  # a vertex on a corner of the grid would tear the surface
    values = np.where(close, level + 1e-6, values)
    vertices, faces, _, _ = marching_cubes(values, level)  # its triangles turn outwards so
    return vertices, faces
