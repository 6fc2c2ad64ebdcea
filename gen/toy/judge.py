"""The judge: reads shape, colour, size, material and position of each thing back from a toy picture.

A small convolutional network, trained on renders only (all colour-shape pairs, noise, blur and brightness
augmented), never on generated pictures. It answers for each cell of a 16 x 16 grid: is there the centre
of a thing, and which? So things are found where they are, and relations follow from the positions, as for
a person.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gen.optim import MuonAdamW, split_parameters
from gen.toy.words import Caption
from gen.toy.world import COLOURS, MATERIALS, SHAPES, SIZES, Camera, Scene

CELL = 8  # pixels
_PARTS = {
    "there": 1,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "material": len(MATERIALS),
    "spot": 2,
    "place": 3,
}
_ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Judge(nn.Module):
    """(B, 3, 128, 128) pictures in 0..1 -> (B, answers, 16, 16); `answers` are the parts of `_PARTS` in a
    row."""

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 5, stride=2, padding=2),
            _Residual(a),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            _Residual(b),
            _Residual(b),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            _Residual(c),
            _Residual(c, 2),
            _Residual(c, 3),
            _Residual(c),
            nn.GroupNorm(8, c),
            nn.SiLU(),
            nn.Conv2d(c, 192, 1),
            nn.SiLU(),
            nn.Conv2d(192, sum(_PARTS.values()), 1),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures * 2 - 1)

    @staticmethod
    def parts(answers: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(_PARTS, answers.split(list(_PARTS.values()), dim=1), strict=True))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the judge sees of one thing. `spot` is its centre in pixels (column, row); `place` the centre
    in world units."""

    shape: str
    colour: str
    size: str
    material: str
    spot: tuple[float, float]
    place: tuple[float, float, float]
    confidence: float  # of there being a thing


def targets(scenes: Sequence[Scene], camera: Camera | None = None) -> dict[str, torch.Tensor]:
    """Per thing (n things of B scenes): scene, cell (row, column), attributes as numbers, spot within the
    cell 0..1, place."""
    rows = [(i, t) for i, s in enumerate(scenes) for t in s.things]
    place = torch.tensor([t.centre for _, t in rows])
    pixel = (camera or Camera()).project(place, 128)[:, :2].clamp(0, 127.99) / CELL
    cell = pixel.floor().long()
    return {
        "scene": torch.tensor([i for i, _ in rows]),
        "row": cell[:, 1],
        "column": cell[:, 0],
        "spot": pixel - cell,
        "place": place,
        **{k: torch.tensor([v.index(getattr(t, k)) for _, t in rows]) for k, v in _ATTRIBUTES.items()},
    }


def judge_loss(
    answers: torch.Tensor, truth: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Focal loss on where things are; cross-entropy and L1 on what they are, at their cells."""
    parts = Judge.parts(answers)
    there = torch.zeros_like(parts["there"][:, 0])
    at = (truth["scene"], truth["row"], truth["column"])
    there[at] = 1
    # cells next to a centre may say "there" a little: no penalty where the truth is one cell away
    near = F.max_pool2d(there[:, None], 3, 1, 1)[:, 0]
    logits = parts["there"][:, 0]
    chance = logits.sigmoid()
    hard = torch.where(there > 0, 1 - chance, chance).square()
    weight = torch.where(there > 0, 1.0, 1.0 - 0.7 * near)
    losses = {
        "there": (F.binary_cross_entropy_with_logits(logits, there, reduction="none") * hard * weight).sum()
        / there.sum()
    }
    for k in _ATTRIBUTES:
        losses[k] = F.cross_entropy(parts[k].permute(0, 2, 3, 1)[at], truth[k], label_smoothing=0.02)
    losses["spot"] = F.l1_loss(parts["spot"].permute(0, 2, 3, 1)[at], truth["spot"])
    losses["place"] = F.l1_loss(parts["place"].permute(0, 2, 3, 1)[at], truth["place"])
    total = 2 * losses["there"] + sum(losses[k] for k in _ATTRIBUTES) + losses["spot"] + losses["place"]
    return total, losses


@torch.no_grad()
def read(judge: Judge, pictures: torch.Tensor, *, threshold: float = 0.4, most: int = 3) -> list[list[Seen]]:
    """What stands in each of (B, 3, 128, 128) pictures in 0..1, most certain first."""
    parts = {k: v.float() for k, v in Judge.parts(judge(pictures)).items()}
    chance = parts["there"][:, 0].sigmoid()
    peaks = chance * (chance == F.max_pool2d(chance[:, None], 3, 1, 1)[:, 0])
    found: list[list[Seen]] = []
    for b in range(len(pictures)):
        confidence, where = peaks[b].flatten().topk(most)
        seen = []
        for c, w in zip(confidence.tolist(), where.tolist(), strict=True):
            if c < threshold:
                break
            row, column = divmod(w, peaks.shape[-1])
            cell = {k: v[b, :, row, column] for k, v in parts.items()}
            spot = cell["spot"].tolist()
            seen.append(
                Seen(
                    **{k: v[int(cell[k].argmax())] for k, v in _ATTRIBUTES.items()},
                    spot=((column + spot[0]) * CELL, (row + spot[1]) * CELL),
                    place=tuple(cell["place"].tolist()),
                    confidence=c,
                )
            )
        found.append(seen)
    return found


# ------------------------------------------------------------ does a picture show what a caption says?


def holds(relation: str, a: Seen, b: Seen) -> bool:
    """Whether `a` stands in `relation` to `b`, by the positions in the picture and in the world that was
    read."""
    (ax, ay), (bx, by) = a.spot, b.spot
    if relation == "left of":
        return ax < bx - 4
    if relation == "right of":
        return ax > bx + 4
    if relation == "in front of":
        return a.place[1] < b.place[1] - 0.15 and ay > by
    if relation == "behind":
        return a.place[1] > b.place[1] + 0.15 and ay < by
    if relation == "on top of":
        return a.place[2] > b.place[2] + 0.3 and ay < by - 6 and abs(ax - bx) < 24
    raise ValueError(f"{relation!r} is no relation between two things")


def _is(seen: Seen, said: dict[str, str | None], keys: Sequence[str]) -> bool:
    return all(said[k] is None or getattr(seen, k) == said[k] for k in keys)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one picture against its caption. `bound`: as many things as said, each with its own shape and
    colour, each in its slot. `relation`: the same, and the relation holds by position (the same thing for
    one object)."""

    count: bool  # as many things as said
    shapes: bool  # the right shapes are there, whatever their colours and places
    colours: bool
    bound: bool  # every shape with its colour
    placed: bool  # and every thing in its slot: shape + colour + slot together
    extras: bool  # size and material too, where said


def verdict(caption: Caption, seen: Sequence[Seen]) -> Verdict:
    """Try every way to match what is seen with what was said, and keep the kindest that the positions
    allow."""
    said = caption.things
    if len(seen) != len(said):
        return Verdict(count=False, shapes=False, colours=False, bound=False, placed=False, extras=False)
    shapes = sorted(s.shape for s in seen) == sorted(str(t["shape"]) for t in said)
    colours = sorted(s.colour for s in seen) == sorted(str(t["colour"]) for t in said)
    bound = placed = extras = False
    for order in _orders(len(said)):
        match = [seen[i] for i in order]
        right = all(_is(s, t, ("shape", "colour")) for s, t in zip(match, said, strict=True))
        bound |= right
        if caption.relation == "alone":
            stands = True
        elif caption.relation == "row":
            stands = holds("left of", match[0], match[1]) and holds("left of", match[1], match[2])
        else:
            stands = holds(caption.relation, match[0], match[1])
        placed |= right and stands
        extras |= (
            right
            and stands
            and all(_is(s, t, ("size", "material")) for s, t in zip(match, said, strict=True))
        )
    return Verdict(count=True, shapes=shapes, colours=colours, bound=bound, placed=placed, extras=extras)


def _orders(n: int) -> list[tuple[int, ...]]:
    return {1: [(0,)], 2: [(0, 1), (1, 0)]}.get(n) or [
        (0, 1, 2),
        (0, 2, 1),
        (1, 0, 2),
        (1, 2, 0),
        (2, 0, 1),
        (2, 1, 0),
    ]


def accuracy(judge: Judge, pictures: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of the things of `scenes` that are found and read rightly in `pictures` (B, 3, 128, 128), per
    attribute. `position`: the centre within 4 pixels and, in the world, within 0.35 units. `count`:
    scenes with the right number."""
    hits = {k: 0 for k in (*_ATTRIBUTES, "position", "found")}
    total = counts = 0
    for i in range(0, len(scenes), 64):
        seen_of = read(judge, pictures[i : i + 64])
        for seen, scene in zip(seen_of, scenes[i : i + 64], strict=True):
            counts += len(seen) == len(scene.things)
            spots = Camera().project(torch.tensor([t.centre for t in scene.things]), 128)[:, :2].tolist()
            for thing, spot in zip(scene.things, spots, strict=True):
                total += 1
                best = min(seen, key=lambda s: math.dist(s.spot, spot), default=None)
                if best is None or math.dist(best.spot, spot) > CELL:
                    continue
                hits["found"] += 1
                hits["position"] += (
                    math.dist(best.spot, spot) <= 4 and math.dist(best.place, thing.centre) <= 0.35
                )
                for k in _ATTRIBUTES:
                    hits[k] += getattr(best, k) == getattr(thing, k)
    return {k: v / total for k, v in hits.items()} | {"count": counts / len(scenes)}


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Blur, noise, brightness and contrast at random per picture: a decoder's faults, so that the judge
    reads through them."""
    B = len(pictures)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(B, 1, 1, 1) * (torch.rand(B, 1, 1, 1) < 0.4)
    pictures = torch.lerp(pictures, soft, mix)
    pictures = pictures * (1 + 0.12 * (torch.rand(B, 1, 1, 1) - 0.5)) + 0.06 * (torch.rand(B, 1, 1, 1) - 0.5)
    level = 0.04 * torch.rand(B, 1, 1, 1) * (torch.rand(B, 1, 1, 1) < 0.5)
    # noise of a decoder is rather coarse than white
    coarse = F.interpolate(
        torch.randn(B, 3, 32, 32), size=pictures.shape[-2:], mode="bilinear", align_corners=False
    )
    return (pictures + level * (0.5 * torch.randn_like(pictures) + coarse)).clamp(0, 1)


class JudgeTask:
    """Training of the judge on rendered scenes (N, 3, 128, 128) uint8."""

    name = "judge"

    def __init__(
        self, pictures: torch.Tensor, scenes: Sequence[Scene], *, seed: int, device: str = "cpu"
    ) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.module = Judge().to(device)
        self.held = min(1000, len(scenes) // 8)
        self.pictures, self.scenes = pictures, scenes
        self.seed = seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.random = random.Random(f"judge:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("body",))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01)

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        picks = self.random.choices(range(self.held, len(self.scenes)), k=batch)
        pictures = augment(self.pictures[picks].float() / 255).to(self.device)
        truth = {k: v.to(self.device) for k, v in targets([self.scenes[i] for i in picks]).items()}
        return judge_loss(self.module(pictures).float(), truth)

    def evaluate(self, folder: Path) -> dict[str, float]:
        held = self.pictures[: self.held].float().to(self.device) / 255
        return accuracy(self.module, held, self.scenes[: self.held])


def save_judge(judge: Judge, folder: Path, facts: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().cpu().contiguous() for k, v in judge.state_dict().items()}, folder / "judge.safetensors"
    )
    (folder / "toy.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_judge(folder: Path) -> Judge:
    """The judge in `folder`, in float32 for reading."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
    return judge.eval()
