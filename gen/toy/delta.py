"""Training of `pixart-delta:toy`: `pixart-sigma:toy` distilled to four steps, and a control branch that
follows edges, as tasks for `gen.train`.

The distillation is latent consistency (Luo et al. 2023, arXiv:2310.04378): from a noisy picture the student
must expect the same picture as from where one guided step of its teacher leads, and there its own slow
average is asked. Two things differ. Guidance of the teacher is on v, of which noise and picture follow. And
half of the noisy pictures are the student's own, met while it draws: a rendered scene with noise never
contradicts its caption, so it cannot teach how to mend what an earlier step got wrong.

The control branch learns on the frozen student, from rendered scenes and their own edges: with the edges
given, little about the picture is left open, and so the scene itself is what is expected.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen.optim import MuonAdamW, split_parameters
from gen.toy import pixart as toy_pixart
from gen.toy.denoising import BETAS, NoiseLevels, plain_attention, seeded_generator
from gen.toy.pixart import Captions, predict
from gen.toy.render import render
from gen.toy.words import describe
from gen.toy.world import Scene
from pipelines.lcm import LCMSolver
from pipelines.models.hed import control_picture, edges
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet
from pipelines.pixart_delta import SIGMA, PixArtDeltaPipeline

STEPS = 4
GUIDANCE = 4.5  # distilled into the student: the teacher's own default
STRIDE = 40  # timesteps of one step of the teacher
HUBER = 1e-3


def build_scheduler() -> LCMSolver:
    return LCMSolver(**BETAS, prediction_type="v_prediction")


class DistillTask:
    """Consistency on latents (N, 4, 16, 16) with fresh captions each time."""

    name = "distilled"

    def __init__(
        self,
        teacher: nn.Module,
        captions: Captions,
        latents: Tensor,
        *,
        seed: int,
        student: nn.Module | None = None,  # None: starts as the teacher
        own_share: float = 0.5,  # of the noisy pictures that the student meets while it draws
        device: torch.device | str = "cpu",
        judged: Callable[[nn.Module, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.captions, self.own_share = device, captions, own_share
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        student = copy.deepcopy(student or teacher).to(device).requires_grad_(True)
        average = copy.deepcopy(student).requires_grad_(False)
        # Together, so that a checkpoint holds both
        self.module = nn.ModuleDict({"student": student, "average": average})
        plain_attention(device, self.teacher, student, average)
        self.latents = latents.to(device)
        self.levels = NoiseLevels(device)
        self.solver = build_scheduler()
        self.empty = captions.encode([""])
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.captions.seed(f"distilled:{self.seed}:{key}")
        self.rng = seeded_generator(f"distilled:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module["student"], ("transformer_blocks",))
        return MuonAdamW(matrices, others, lr=lr, others_lr=0.5)

    def expected(self, network: nn.Module, noisy: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """The consistency function: the picture at the end of the path through `noisy` at `t` (B,)."""
        velocity = predict(network, noisy, t, states, mask).float()
        picture, _ = self.levels.split(noisy, velocity, t)
        skip, out = (
            torch.tensor(v, device=noisy.device)[:, None, None, None]
            for v in zip(*map(self.solver.boundary, t.tolist()), strict=True)
        )
        return out * picture + skip * noisy

    @torch.no_grad()
    def teach(self, noisy: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One guided DDIM step of the teacher: where it leads, and the timesteps there."""
        null, null_mask = (x.expand(len(noisy), *x.shape[1:]) for x in self.empty)
        pad = states.shape[1] - null.shape[1]
        states = torch.cat([states, F.pad(null, (0, 0, 0, pad))])
        mask = torch.cat([mask, F.pad(null_mask, (0, pad))])
        velocity = predict(self.teacher, noisy.repeat(2, 1, 1, 1), t.repeat(2), states, mask).float()
        asked, nothing = velocity.chunk(2)
        picture, noise = self.levels.split(noisy, nothing + GUIDANCE * (asked - nothing), t)
        then = (t - STRIDE).clamp(min=0)
        return self.levels.add(picture, noise, then), then

    @torch.no_grad()
    def draw_along(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy pictures as the student meets them some steps into a walk of some length, and when."""
        rng, count = self.rng, len(states)
        steps = (2, 3, 4, 4, 4, 8)[int(torch.randint(6, (), generator=rng))]
        self.solver.set_timesteps(steps)
        walk = self.solver.timesteps[: 1 + int(torch.randint(steps, (), generator=rng))]
        noisy = self._noise(count)
        for now, then in itertools.pairwise(walk.tolist()):
            t = torch.full((count,), now, device=self.device)
            picture = self.expected(self.module["student"], noisy, t, states, mask)
            noisy = self.levels.add(picture, self._noise(count), torch.full_like(t, then))
        return noisy, torch.full((count,), int(walk[-1]), device=self.device)

    def _noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.latents.shape[1:]), generator=self.rng).to(self.device)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        self._follow()
        rng = self.rng
        picks = torch.randint(len(self.latents), (batch,), generator=rng)
        states, mask = self.captions.draw(picks.tolist())
        own = int(batch * self.own_share)
        met, met_t = self.draw_along(states[:own], mask[:own])
        grid = self.solver.config.original_inference_steps
        t = (torch.randint(grid, (batch - own,), generator=rng) + 1) * (1000 // grid) - 1
        t = t.to(self.device)
        x = self.latents[picks[own:].to(self.device)].float()
        noisy = torch.cat([met, self.levels.add(x, self._noise(len(x)), t)])
        t = torch.cat([met_t, t])
        with torch.no_grad():
            nearer, then = self.teach(noisy, t, states, mask)
            target = self.expected(self.module["average"], nearer, then, states, mask)
        error = self.expected(self.module["student"], noisy, t, states, mask) - target
        huber = (error.square() + HUBER**2).sqrt() - HUBER
        by_row = huber.mean((1, 2, 3))
        return by_row.mean(), {"own": by_row[:own].detach().mean(), "scenes": by_row[own:].detach().mean()}

    @torch.no_grad()
    def _follow(self, decay: float = 0.95) -> None:
        """The average takes a step towards the student."""
        pairs = zip(self.module["average"].parameters(), self.module["student"].parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 1 - decay)

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module["student"], folder) if self.judged else {}


# ----------------------------------------------------------------------------------------------------- edges


def edge_kind(index: int) -> str:
    """How the edges of picture `index` are found: of three, two soft and one hard, as people draw them."""
    return "canny" if index % 3 == 2 else "soft"


@torch.no_grad()
def encode_edges(autoencoder: nn.Module, pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(N, 3, 128, 128) uint8 -> mean and spread of their edges' latents, (N, 8, 16, 16) float16."""
    found = []
    for i in range(0, len(pictures), 32):
        drawn = [
            control_picture(edges(np.ascontiguousarray(p.permute(1, 2, 0).numpy()), edge_kind(i + k)))
            for k, p in enumerate(pictures[i : i + 32])
        ]
        posterior = autoencoder.encode(torch.cat(drawn).to(device)).latent_dist
        found.append(torch.cat([posterior.mean, posterior.std], dim=1).half().cpu().contiguous())
    return torch.cat(found)


class ControlTask:
    """A control branch on a frozen, distilled base: v-prediction, at the timesteps of the distillation."""

    name = "control"

    def __init__(
        self,
        base: nn.Module,
        control: PixArtControlNet,
        captions: Captions,
        latents: Tensor,
        edge_latents: Tensor,  # (N, 8, 16, 16), of `encode_edges`
        *,
        seed: int,
        device: torch.device | str = "cpu",
        judged: Callable[[nn.Module, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.captions = device, captions
        self.module = control.to(device)
        base = base.to(device).eval().requires_grad_(False)
        plain_attention(device, base, control)
        self.network = ControlledPixArt(base, control)
        self.latents, self.edge_latents = latents.to(device), edge_latents.to(device)
        self.levels = NoiseLevels(device)
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.captions.seed(f"control:{self.seed}:{key}")
        self.rng = seeded_generator(f"control:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("controlnet_blocks",))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01, others_lr=0.5)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = self.rng
        picks = torch.randint(len(self.latents), (batch,), generator=rng)
        states, mask = self.captions.draw(picks.tolist())
        picks = picks.to(self.device)
        x = self.latents[picks].float()
        mean, spread = self.edge_latents[picks].float().chunk(2, dim=1)
        control = mean + spread * torch.randn(mean.shape, generator=rng).to(self.device)
        # Where nothing of the picture is seen yet, the edges say most: half of the times from there
        t = (torch.rand(batch, generator=rng) ** 0.5 * 1000).long().clamp(0, 999).to(self.device)
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        noisy = self.levels.add(x, noise, t)
        out = predict(self.network, noisy, t, states, mask, control_latents=control).float()
        error = out - self.levels.velocity(x, noise, t)
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean(), {"v": error.detach().square().mean()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module, folder) if self.judged else {}


# --------------------------------------------------------------------------------------------------- measures

TOLERANCE = 2  # pixels by which an edge may be off
EDGE_KIND = "canny"  # by which edges are compared: lines of one pixel


def edge_f1(picture: np.ndarray, wanted: np.ndarray) -> float:
    """How well the edges of two pictures (Y, X, 3) agree, 0 to 1: the harmonic mean of the shares of either's
    edge pixels that have one of the other's within `TOLERANCE` pixels."""
    from skimage.morphology import dilation, disk

    found, asked = (edges(p, EDGE_KIND) > 0.5 for p in (picture, wanted))
    if not found.any() or not asked.any():
        return float(found.any() == asked.any())
    reach = disk(TOLERANCE)
    precision = (found & dilation(asked, reach)).sum() / found.sum()
    recall = (asked & dilation(found, reach)).sum() / asked.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def mean_edge_f1(pictures: Tensor, wanted: Tensor) -> float:
    """Of pictures (n, 3, Y, X) in 0..1, in turn."""
    pairs = zip(*(x.permute(0, 2, 3, 1).contiguous().numpy() for x in (pictures, wanted)), strict=True)
    values = [edge_f1(ours.clip(0, 1), theirs.clip(0, 1)) for ours, theirs in pairs]
    return sum(values) / len(values)


def draw_controlled(
    pipeline: PixArtDeltaPipeline,
    texts: Sequence[str],
    pictures: Tensor | None,  # (n, 3, Y, X) in 0..1, whose edges are followed; None: no control
    *,
    steps: int = STEPS,
    report: Callable[[str], None] | None = None,
) -> Tensor:
    """(n, 3, Y, X) in 0..1: text i with the edges of picture i, from noise of seed i."""
    drawn = []
    for i, text in enumerate(texts):
        control = None if pictures is None else pictures[i].permute(1, 2, 0).contiguous().numpy()
        made = pipeline(
            text,
            num_inference_steps=steps,
            control_image=control,
            generator=torch.Generator("cpu").manual_seed(i),
            use_resolution_binning=False,
            output_type="pt",
        )
        drawn.append(made.images.float().cpu())
        if report and (i + 1) % 16 == 0:
            report(f"drew {i + 1} of {len(texts)} pictures")
    return torch.cat(drawn)


def save_control_sheet(path: Path, pictures: Tensor, drawn: Tensor, texts: Sequence[str]) -> None:
    """Three rows: pictures, their edges, and what was drawn from these and the texts; eight columns."""
    from gen.evaluate import save_grid

    lines = [torch.as_tensor(edges(p.permute(1, 2, 0).contiguous().numpy())) for p in pictures[:8]]
    rows = [pictures[:8], torch.stack(lines)[:, None].expand(-1, 3, -1, -1), drawn[:8]]
    save_grid(torch.cat(rows), path, columns=8, labels=[""] * (2 * len(lines)) + list(texts[:8]))


class ControlSampler:
    """What the control branch does while it is trained: a sheet of scenes, their edges and what is drawn
    from these, and the agreement of the edges."""

    def __init__(self, base: nn.Module, work: Path, scenes: Sequence[Scene]) -> None:
        self.base, self.work, self.pictures = base, work, render(scenes)
        rng = random.Random("control")
        self.texts = [describe(scene, rng).text for scene in scenes]

    def __call__(self, control: PixArtControlNet, folder: Path) -> dict[str, float]:
        drawn = draw_controlled(assemble(self.base, self.work, control), self.texts, self.pictures)
        save_control_sheet(folder / "control.png", self.pictures, drawn, self.texts)
        return {"edges": mean_edge_f1(drawn, self.pictures)}


# ----------------------------------------------------------------------------------------------------- export


def assemble(
    transformer: nn.Module, work: Path, control: PixArtControlNet | None = None
) -> PixArtDeltaPipeline:
    """The pipeline of a run's parts."""
    parts = toy_pixart.assemble(transformer, work)
    return PixArtDeltaPipeline(
        parts.tokenizer,
        parts.text_encoder,
        parts.vae,
        transformer,
        build_scheduler(),
        controlnet=control,
        family=SIGMA,
    )


def export(transformer: nn.Module, control: PixArtControlNet, work: Path, output: Path, facts: dict) -> None:
    """The run's parts as one diffusers folder in fp16, with its record (toy.json) and checksums."""
    building = toy_pixart.start_folder(output)
    pipeline = assemble(transformer, work, control)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(building)
    toy_pixart.finish_folder(building, output, facts)
