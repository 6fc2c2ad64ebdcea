"""Pictures of toy scenes, through any camera.

Sphere tracing of signed distances, vectorised over all things of one shape, with coverage anti-aliasing
from the closest approach of each ray, and shadows softened by the ray's clearance (the technique of Inigo
Quilez, "soft shadows in raymarched SDFs"). Things are traced in windows around themselves, the ground's
shadows at half size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gen.toy.solids import SOLIDS, Solid
from gen.toy.world import BACKGROUNDS, COLOURS, GROUND, PAINT, Camera, Scene


def _linear(rgb: torch.Tensor) -> torch.Tensor:
    return rgb.clamp_min(0) ** 2.2


def _table(rows: dict, device: torch.device | str) -> torch.Tensor:
    return _linear(torch.tensor([rows[k] for k in rows], dtype=torch.float32, device=device))


@dataclass
class _Flat:
    """Scenes as tensors, one row a thing: T things of B scenes, ordered by scene."""

    scene: torch.Tensor  # (T,) which scene
    shape: list[str]
    colour: torch.Tensor  # (T,)
    shiny: torch.Tensor  # (T,)
    centre: torch.Tensor  # (T, 3)
    radius: torch.Tensor  # (T,)
    cos: torch.Tensor
    sin: torch.Tensor
    background: torch.Tensor  # (B,)
    light: torch.Tensor  # (B, 3) unit vector towards the light


def _flatten(batch: Sequence[Scene], device: torch.device | str) -> _Flat:
    things = [(i, t) for i, s in enumerate(batch) for t in s.things]

    def tensor(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    heading = tensor([t.heading for _, t in things])
    azimuth = tensor([s.light for s in batch]) - 0.75  # the light stands to the left and in front
    up = math.sin(math.radians(52))
    flat = math.cos(math.radians(52))
    return _Flat(
        scene=tensor([i for i, _ in things], torch.long),
        shape=[t.shape for _, t in things],
        colour=tensor([COLOURS.index(t.colour) for _, t in things], torch.long),
        shiny=tensor([float(t.material == "shiny") for _, t in things]),
        centre=tensor([t.centre for _, t in things]).reshape(-1, 3),
        radius=tensor([t.radius for _, t in things]),
        cos=heading.cos(),
        sin=heading.sin(),
        background=tensor([BACKGROUNDS.index(s.background) for s in batch], torch.long),
        light=torch.stack(
            [azimuth.sin() * flat, -azimuth.cos() * flat, torch.full_like(azimuth, up)], dim=-1
        ),
    )


class _Local:
    """World points and directions (n, P, 3) in the unit frames of n things (rotated by -heading, scaled
    by 1/radius)."""

    def __init__(self, flat: _Flat, index: torch.Tensor) -> None:
        self.centre = flat.centre[index][:, None]
        self.radius = flat.radius[index][:, None]
        self.cos, self.sin = flat.cos[index][:, None], flat.sin[index][:, None]

    def direction(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, z = d.unbind(-1)
        return x * self.cos + y * self.sin, y * self.cos - x * self.sin, z

    def point(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.direction((p - self.centre) / self.radius[..., None])

    def world(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.stack([x * self.cos - y * self.sin, x * self.sin + y * self.cos, z], dim=-1)


def _shadow(
    solid: Solid, local: _Local, points: torch.Tensor, light: torch.Tensor, steps: int
) -> torch.Tensor:
    """How much of the light and of the sky reaches `points` (n, P, 3) past one thing each: (n, P, 2) in
    0..1."""
    px, py, pz = local.point(points)
    lx, ly, lz = local.direction(light)
    near = -(px * lx + py * ly + pz * lz)  # where the ray is closest to the centre
    t = (near - solid.bound).clamp_min(0.02)
    ambient = (0.42 + 0.58 * (solid.distance(px, py, pz) / 0.75)).clamp(0.42, 1)
    clearance = torch.ones_like(t)
    for _ in range(steps):
        d = solid.distance(px + t * lx, py + t * ly, pz + t * lz)
        clearance = torch.minimum(clearance, d / (0.16 * t + 0.03))
        t = t + d.clamp(0.06, 0.6)
    clearance = torch.where(near + solid.bound > 0.02, clearance, torch.ones_like(t)).clamp(-1, 1) * 0.5 + 0.5
    return torch.stack([clearance * clearance * (3 - 2 * clearance), ambient], dim=-1)


def _groups(flat: _Flat, width: torch.Tensor | None = None) -> Iterator[tuple[Solid, torch.Tensor]]:
    """Things of one shape together, and of one window width if given."""
    keys: dict[tuple[str, int], list[int]] = {}
    widths = width.tolist() if width is not None else [0] * len(flat.shape)
    for i, (shape, w) in enumerate(zip(flat.shape, widths, strict=True)):
        keys.setdefault((shape, int(w)), []).append(i)
    for (shape, _), index in keys.items():
        yield SOLIDS[shape], torch.tensor(index, device=flat.centre.device)


def _pairs(flat: _Flat) -> list[tuple[int, int]]:
    """(receiver, caster) for every two things of one scene."""
    by_scene: dict[int, list[int]] = {}
    for i, s in enumerate(flat.scene.tolist()):
        by_scene.setdefault(s, []).append(i)
    return [(a, b) for group in by_scene.values() for a in group for b in group if a != b]


def _environment(d: torch.Tensor, sky: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """What a mirror sees: ground below, a bright horizon, and a soft box overhead. d (..., 3) -> (..., 3)."""
    z = d[..., 2:]
    box = torch.sigmoid((z - 0.62) * 14) * torch.sigmoid((0.97 - z) * 30)
    above = sky * (0.55 + 0.45 * z.clamp(0, 1)) + 1.1 * box
    return torch.lerp(ground * 0.55, above, torch.sigmoid(z * 9))


@torch.inference_mode()
def render(
    batch: Sequence[Scene],
    *,
    camera: Camera | None = None,
    size: int = 128,
    device: torch.device | str = "cpu",
    return_owner: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, size, size) float32 in 0..1. With `return_owner` also (B, size, size) int64: the
    number of the thing seen in each pixel, counted within its scene, or -1 for the ground."""
    camera = camera or Camera()
    flat = _flatten(batch, device)
    eye, axes = (t.to(device) for t in camera.frame())
    focal = size / 2 / math.tan(math.radians(camera.field_of_view) / 2)
    B, T = len(batch), len(flat.shape)
    grounds = _table({k: v[0] for k, v in GROUND.items()}, device)[flat.background]
    skies = _table({k: v[1] for k, v in GROUND.items()}, device)[flat.background]

    # --- the ground: its colour fades with distance, its shadows are computed at half size (they are soft)
    def rays(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        d = (
            torch.stack(
                [(column - size / 2) / focal, (size / 2 - row) / focal, torch.ones_like(column)], dim=-1
            )
            @ axes
        )
        return d / d.norm(dim=-1, keepdim=True)

    axis = torch.arange(size, device=device) + 0.5
    d_full = rays(axis[None, :].expand(size, size), axis[:, None].expand(size, size))
    reach = eye[2] / (-d_full[..., 2]).clamp_min(1e-3)
    far = torch.sigmoid((reach - camera.distance * 1.5) / (camera.distance * 0.14))
    far = torch.where(d_full[..., 2] < -1e-3, far, torch.ones_like(far))
    half = size // 2
    axis = (torch.arange(half, device=device) + 0.5) * 2
    d_half = rays(axis[None, :].expand(half, half), axis[:, None].expand(half, half)).reshape(-1, 3)
    floor = eye + d_half * (eye[2] / (-d_half[:, 2]).clamp_min(0.05))[:, None]
    lit = torch.ones(B, half * half, 2, device=device)
    for solid, index in _groups(flat):
        owner = flat.scene[index]
        part = _shadow(solid, _Local(flat, index), floor[None], flat.light[owner][:, None], 12)
        # several things of a scene can have one shape, so multiply one by one
        for k in range(len(index)):
            lit[owner[k]] *= part[k]
    lit = torch.nn.functional.interpolate(
        lit.view(B, half, half, 2).permute(0, 3, 1, 2),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
    )
    sun = (0.42 + 0.58 * lit[:, 0]) * lit[:, 1].sqrt()
    pool = 1.06 - 0.16 * ((floor[:, 0] ** 2 + floor[:, 1] ** 2) / 9).clamp(0, 1).view(half, half)
    pool = torch.nn.functional.interpolate(
        pool[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0]
    image = grounds[:, None, None] * (sun * pool)[..., None]
    image = torch.lerp(image, skies[:, None, None].expand_as(image), far[None, ..., None])

    # --- the things: each traced in a window around itself
    owner_map = torch.full((B, size, size), -1, dtype=torch.long, device=device)
    if T:
        bounds = torch.tensor([SOLIDS[s].bound for s in flat.shape], device=device) * flat.radius
        spot = camera.project(flat.centre, size)
        apparent = focal * bounds / (spot[:, 2].square() - bounds.square()).clamp_min(0.05).sqrt()
        width = (2 * (apparent + 2.5) / 16).ceil() * 16
        paints = _table(PAINT, device)
        layers = []
        colours: list[torch.Tensor] = [torch.empty(0)] * T
        others: dict[int, list[int]] = {}
        for a, b in _pairs(flat):
            others.setdefault(a, []).append(b)
        for solid, index in _groups(flat, width):
            n, w = len(index), int(width[index[0]])
            local = _Local(flat, index)
            corner = (spot[index, :2] - w / 2).round()
            grid = torch.arange(w, device=device) + 0.5
            column = (corner[:, 0, None] + grid)[:, None, :].expand(n, w, w).reshape(n, -1)
            row = (corner[:, 1, None] + grid)[:, :, None].expand(n, w, w).reshape(n, -1)
            d = rays(column, row)
            dx, dy, dz = local.direction(d)
            ox, oy, oz = local.point(eye[None, None])
            along = -(ox * dx + oy * dy + oz * dz)
            t = (along - solid.bound).clamp_min(0)
            pixel = 1 / focal  # width of a pixel at distance 1
            best, best_t = torch.full_like(t, 9.0), t
            for _ in range(22):
                gap = solid.distance(ox + t * dx, oy + t * dy, oz + t * dz)
                closer = gap / t < best
                best, best_t = torch.where(closer, gap / t, best), torch.where(closer, t, best_t)
                t = t + gap
            cover = (1 - best / pixel).clamp(0, 1)
            t = torch.where(cover >= 1, t, best_t)
            x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
            # normal by four evaluations at the corners of a tetrahedron
            e = 0.012
            f1 = solid.distance(x + e, y - e, z - e)
            f2 = solid.distance(x - e, y - e, z + e)
            f3 = solid.distance(x - e, y + e, z - e)
            f4 = solid.distance(x + e, y + e, z + e)
            normal = local.world(f1 - f2 - f3 + f4, -f1 - f2 + f3 + f4, -f1 + f2 - f3 + f4)
            normal = torch.nn.functional.normalize(normal, dim=-1)
            points = eye + d * (t * local.radius)[..., None]

            # light and sky that reach it past the other things of the scene
            reach_light = torch.ones(n, w * w, 2, device=device)
            casting = [(k, b) for k, i in enumerate(index.tolist()) for b in others.get(i, ())]
            by_shape: dict[str, list[tuple[int, int]]] = {}
            for k, b in casting:
                by_shape.setdefault(flat.shape[b], []).append((k, b))
            for shape, pairs in by_shape.items():
                rows = torch.tensor([k for k, _ in pairs], device=device)
                casters = torch.tensor([b for _, b in pairs], device=device)
                towards = flat.light[flat.scene[casters]][:, None]
                part = _shadow(
                    SOLIDS[shape], _Local(flat, casters), points[rows] + 0.02 * normal[rows], towards, 9
                )
                for m, k in enumerate(rows.tolist()):
                    reach_light[k] *= part[m]

            owner = flat.scene[index]
            light = flat.light[owner][:, None]
            sky, ground = skies[owner][:, None], grounds[owner][:, None]
            paint = paints[flat.colour[index]][:, None]
            shiny = flat.shiny[index][:, None, None]
            n_l = (normal * light).sum(-1, keepdim=True)
            direct = n_l.clamp_min(0) * reach_light[..., :1]
            hemisphere = torch.lerp(ground * 0.5, 0.35 * sky + 0.35, normal[..., 2:] * 0.5 + 0.5)
            # the ground darkens the foot of things that stand on it
            foot = (points[..., 2:] / 0.45).clamp(0, 1) * 0.35 + 0.65
            ambient = hemisphere * foot * reach_light[..., 1:]
            mirror = d - 2 * (d * normal).sum(-1, keepdim=True) * normal
            fresnel = (1 + (d * normal).sum(-1, keepdim=True)).clamp(0, 1) ** 4
            glint = (mirror * light).sum(-1, keepdim=True).clamp_min(0)
            matte = paint * (0.62 * ambient + 0.82 * direct) + 0.05 * glint**12 * reach_light[..., :1]
            seen = _environment(mirror, sky, ground) * foot
            metal = (
                paint * (0.30 * ambient + 0.50 * direct)
                + (0.62 * paint + 0.05) * seen
                + fresnel * 0.30 * seen
                + 1.5 * glint**60 * reach_light[..., :1]
            )
            colour = torch.lerp(matte, metal, shiny)
            depth = torch.where(cover > 0, t * local.radius, torch.full_like(t, 1e9))
            for k, i in enumerate(index.tolist()):
                colours[i] = colour[k].view(w, w, 3)
                layers.append((float((depth[k]).min()), i, k, cover[k].view(w, w), corner[k], w))
        # paint from far to near; a thing on top of another comes after it
        layers.sort(key=lambda layer: (-layer[0] + 0.0, layer[1]))
        first = {}
        for i, s in enumerate(flat.scene.tolist()):
            first.setdefault(s, i)
        for _, i, _, cover, corner, w in layers:
            s = int(flat.scene[i])
            c0, r0 = int(corner[0]), int(corner[1])
            left, top = max(c0, 0), max(r0, 0)
            right, bottom = min(c0 + w, size), min(r0 + w, size)
            if left >= right or top >= bottom:
                continue
            box = (slice(top - r0, bottom - r0), slice(left - c0, right - c0))
            alpha = cover[box][..., None]
            target = image[s, top:bottom, left:right]
            target.lerp_(colours[i][box], alpha)
            owner_map[s, top:bottom, left:right][cover[box] > 0.5] = i - first[s]
    # a soft shoulder instead of clipping, then sRGB
    image = torch.where(image > 0.8, 0.8 + 0.25 * torch.tanh((image - 0.8) / 0.25), image)
    image = image.clamp(0, 1) ** (1 / 2.2)
    image = image.permute(0, 3, 1, 2).contiguous()
    return (image, owner_map) if return_owner else image
