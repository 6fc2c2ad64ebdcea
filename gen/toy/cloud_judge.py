"""The judge of clouds: which family a cloud of points is of, and on which part each of its points lies.

PointNet without its turning of the input (Qi et al. 2017, arXiv:1612.00593): each point alone through a few
layers, the maximum over all points as the description of the whole, and for the parts both together. It is
trained on sampled shapes only, never on generated ones, with points moved a little and some left out. Its
parts also colour what is generated: see `gen.point_files`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gen.optim import MuonAdamW, split_parameters
from gen.toy.denoising import seeded_generator
from gen.toy.models3d import FAMILIES, NAMES, PARTS

FILE = "judge.safetensors"


class CloudJudge(nn.Module):
    """(B, P, 3) points -> logits of families (B, families) and of parts (B, P, parts). Parts that a family
    does not have are left to the reader: see `read`."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 256)) -> None:
        super().__init__()
        a, b, c = widths
        self.near = nn.Sequential(nn.Linear(3, a), nn.GELU(), nn.Linear(a, a), nn.GELU())
        self.far = nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, c))
        self.family = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, b), nn.GELU(), nn.Linear(b, len(NAMES)))
        self.whole = nn.Linear(c, b)
        self.part = nn.Sequential(
            nn.Linear(a + b, b), nn.GELU(), nn.Linear(b, b), nn.GELU(), nn.Linear(b, len(PARTS))
        )

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        near = self.near(4 * points)  # half a unit of space is about one of the network's
        whole = self.far(near).amax(1)
        told = self.whole(whole)[:, None].expand(-1, points.shape[1], -1)
        return self.family(whole), self.part(torch.cat([near, told], dim=-1))


@torch.no_grad()
def read(judge: CloudJudge, points: Tensor) -> tuple[Tensor, Tensor]:
    """Families (B,) and parts (B, P), numbers in `NAMES` and `PARTS`; only parts that the family has."""
    families, parts = [], []
    own = torch.zeros(len(NAMES), len(PARTS), dtype=torch.bool)
    for number, name in enumerate(NAMES):
        own[number, [PARTS.index(part) for part in FAMILIES[name].parts]] = True
    for some in points.split(32):
        family, part = judge(some)
        families.append(family.argmax(-1))
        parts.append(part.masked_fill(~own[families[-1]][:, None], -torch.inf).argmax(-1))
    return torch.cat(families), torch.cat(parts)


class CloudJudgeTask:
    """Training on sampled shapes: points (N, P, 3), their parts (N, P) and families (N,)."""

    name = "cloud-judge"

    def __init__(
        self,
        points: Tensor,
        parts: Tensor,
        labels: Tensor,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        seen: int = 1024,  # points of a cloud in a step
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.seen = device, seen
        self.module = CloudJudge().to(device)
        self.held = min(600, len(points) // 8)
        self.points, self.parts, self.labels = points, parts, labels
        self.seed = seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = seeded_generator(f"cloud-judge:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("near", "far", "part"))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = self.rng
        picks = torch.randint(self.held, len(self.points), (batch,), generator=rng)
        which = torch.randint(self.points.shape[1], (batch, self.seen), generator=rng)
        x = self.points[picks].float().gather(1, which[..., None].expand(-1, -1, 3))
        level = 0.02 * torch.rand(batch, 1, 1, generator=rng)
        size = 1 + 0.1 * (torch.rand(batch, 1, 1, generator=rng) - 0.5)
        x = size * x + level * torch.randn(x.shape, generator=rng)
        family, part = self.module(x.to(self.device))
        truth = self.parts[picks].gather(1, which).long().to(self.device)
        families = F.cross_entropy(family.float(), self.labels[picks].to(self.device))
        parts = F.cross_entropy(part.float().flatten(0, 1), truth.flatten())
        return families + parts, {"family": families.detach(), "part": parts.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Shares of held-out shapes whose family, and of their points whose part, is read rightly."""
        points = self.points[: self.held, :2048].float().to(self.device)
        family, part = read(self.module, points)
        return {
            "family": (family.cpu() == self.labels[: self.held]).float().mean().item(),
            "part": (part.cpu() == self.parts[: self.held, :2048]).float().mean().item(),
        }


def save_judge(judge: CloudJudge, folder: Path, facts: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in judge.state_dict().items()}, folder / FILE)
    (folder / "toy.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_judge(folder: Path) -> CloudJudge:
    """In float32, for reading."""
    judge = CloudJudge()
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / FILE).items()})
    return judge.eval()
