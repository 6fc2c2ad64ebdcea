"""Training of `dit-3d:toy`: clouds of points of six families of shapes, as a task for `gen.train`.

The network is DiT-3D with few tokens: 32 voxels per side in patches of 8 are 64 of them. It predicts v rather
than noise, and its blocks start as those of the shipped `dit:toy`, as the paper's start as DiT's (Mo et al.
2023, arXiv:2307.01831, section 3.4).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gen.optim import MuonAdamW, split_parameters
from gen.toy import data
from gen.toy.denoising import BETAS, NoiseLevels, draw_times, plain_attention, seeded_generator
from gen.toy.models3d import NAMES, Shape, cloud, shapes
from gen.toy.pixart import finish_folder, start_folder
from pipelines.dit3d import DiT3DPipeline
from pipelines.dpm_solver import DPMSolver
from pipelines.models.dit3d import DiT3DModel

STORED = 4096  # points of a shape on disk
POINTS = 2048  # of these, what a step of training sees, and what is drawn
NULL = len(NAMES)  # the label of no class
DROPOUT = 0.1  # share of labels that become it
# How often a family is trained on, beside 1 for each: wings are the thinnest things there are
CHANCES = {"airplane": 4.0, "car": 2.0, "lamp": 0.6, "mug": 0.6, "table": 0.6}


def transformer_config(layers: int, heads: int, head_dim: int, voxels: int = 32, patch: int = 8) -> dict:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "sample_size": voxels,
        "patch_size": patch,
        "num_embeds_ada_norm": len(NAMES),
    }


# ------------------------------------------------------------------------------------------------------ data


def class_of(shape: Shape) -> int:
    return NAMES.index(shape.family)


def sample_shard(seed: int, start: int) -> dict[str, Tensor]:
    """`data.SHARD` shapes from `start` on: points (N, STORED, 3) float16 and the part of each, (N, STORED)
    uint8."""
    drawn = [
        cloud(shape, STORED, start + k)
        for k, shape in enumerate(itertools.islice(shapes(seed, start=start), data.SHARD))
    ]
    return {
        "points": torch.from_numpy(np.stack([points for points, _ in drawn])).half(),
        "parts": torch.from_numpy(np.stack([parts for _, parts in drawn])),
    }


def load_shards(folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, parts and classes (N,) of the first `count` shapes; families come in turn."""
    shards = [load_file(data.shard_path(folder, start)) for start in range(0, count, data.SHARD)]
    points, parts = (torch.cat([shard[key] for shard in shards]) for key in ("points", "parts"))
    return points, parts, torch.arange(len(points)) % len(NAMES)


def statistics(points: Tensor) -> tuple[list[float], float]:
    """The mean of each coordinate over all shapes, and one spread for all three: the published
    normalisation."""
    flat = points.float().flatten(0, 1)
    mean = flat.mean(0)
    return mean.tolist(), float((flat - mean).square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------ task


@torch.no_grad()
def initialise(transformer: DiT3DModel) -> None:
    """DiT's start: Xavier matrices, silent modulation and output; gates a little open."""
    for name, p in transformer.named_parameters():
        if name.endswith("bias") or "norm1.linear" in name or name.startswith("proj_out"):
            p.zero_()
        elif name.startswith("class_embedder"):
            p.normal_(std=0.5)
        else:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    for block in transformer.transformer_blocks:
        gates = block.norm1.linear.bias.view(6, -1)
        gates[2] = gates[5] = 0.3


class CloudTask:
    """v-prediction on clouds (N, STORED, 3), other points of a shape each time; one label in ten is that of
    no class."""

    name = "dit3d"

    def __init__(
        self,
        transformer: DiT3DModel,
        points: Tensor,
        labels: Tensor,
        *,
        seed: int,
        normalisation: tuple[list[float], float] | None = None,  # of weights to go on from
        device: torch.device | str = "cpu",
        judged: Callable[[DiT3DModel, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.module = transformer.to(device)
        plain_attention(device, transformer)
        self.normalisation = normalisation or statistics(points)
        centre, spread = torch.tensor(self.normalisation[0]), self.normalisation[1]
        self.points = torch.stack([((p.float() - centre) / spread).half() for p in points]).to(device)
        self.labels = labels
        self.chances = torch.tensor([CHANCES.get(name, 1.0) for name in NAMES])[labels]
        self.levels = NoiseLevels(device)
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = seeded_generator(f"dit3d:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("transformer_blocks",))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01, others_lr=0.5)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = self.rng
        picks = torch.multinomial(self.chances, batch, replacement=True, generator=rng)
        which = torch.rand((batch, self.points.shape[1]), generator=rng).argsort(dim=1)[:, :POINTS]
        dropped = torch.rand(batch, generator=rng) < DROPOUT
        labels = self.labels[picks].masked_fill(dropped, NULL).to(self.device)
        stored = self.points[picks.to(self.device)].float()
        x = stored.gather(1, which.to(self.device)[..., None].expand(-1, -1, 3)).mT
        t = draw_times(batch, rng).to(self.device)  # above 700 there is next to nothing to see
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        alpha, sigma = self.levels.alpha[t, None, None], self.levels.sigma[t, None, None]
        out = self.module(alpha * x + sigma * noise, t, labels).sample
        error = (out - (alpha * noise - sigma * x)).square().mean()
        return error, {}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module, folder) if self.judged else {}


# --------------------------------------------------------------------------------------------------- measures

STEPS, GUIDANCE = 50, 1.0  # the pipeline's defaults


def even_labels(count: int) -> list[int]:
    """`count` classes, each as often as any other, give or take one."""
    return [number % len(NAMES) for number in range(count)]


def draw(
    pipeline: DiT3DPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    scheduler: str = "default",
    batch: int = 32,
    report: Callable[[str], None] | None = None,
) -> Tensor:
    """(n, POINTS, 3) clouds of classes `labels`, cloud i with noise of seed i."""
    clouds = []
    for i in range(0, len(labels), batch):
        made = pipeline(
            list(labels[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_points=POINTS,
            scheduler=scheduler,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[i : i + batch]],
            output_type="pt",
        )
        clouds.append(made.clouds.float().cpu())
        if report:
            report(f"drew {min(i + batch, len(labels))} of {len(labels)} clouds")
    return torch.cat(clouds)


class Sampler:
    """What the network draws while it is trained: some clouds of each family, as a sheet (samples.png); the
    judge's marks where there is a judge; and how far they lie from the nearest of held-out shapes, against
    how far these lie from each other (1 is perfect)."""

    def __init__(self, normalisation: tuple[list[float], float], count: int = 48, steps: int = 25) -> None:
        from weights import store

        self.normalisation, self.count, self.steps = normalisation, count, steps
        self.judge_folder = store.find("cloud-judge-toy")

    def __call__(self, transformer: DiT3DModel, folder: Path) -> dict[str, float]:
        from gen.toy.cloud_judge import load_judge, read

        labels = even_labels(self.count)
        pipeline = assemble(transformer, self.normalisation)
        clouds = draw(pipeline, labels, range(self.count), steps=self.steps)
        save_sheet(clouds, folder / "samples.png", columns=len(NAMES))
        if self.judge_folder is None:
            return {}
        families, _ = read(load_judge(self.judge_folder), clouds)
        return {"class": 100 * (families == torch.tensor(labels)).float().mean().item()}


def save_sheet(clouds: Tensor, path: Path, columns: int, size: int = 160) -> None:
    """Clouds (n, P, 3) seen from the front, the right and above, row by row."""
    from PIL import Image

    rows = -(-len(clouds) // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, points in enumerate(clouds.numpy()):
        turn, tilt = 0.6, 0.4
        x, y, z = points.T
        x, z = np.cos(turn) * x + np.sin(turn) * z, np.cos(turn) * z - np.sin(turn) * x
        y, z = np.cos(tilt) * y - np.sin(tilt) * z, np.sin(tilt) * y + np.cos(tilt) * z
        order = np.argsort(z)
        at = [((v[order] * 0.95 + 0.5) * size).clip(0, size - 1).astype(int) for v in (x, -y)]
        grey = (200 - 180 * np.linspace(0, 1, len(order))).astype(np.uint8)
        sheet[i // columns * size + at[1], i % columns * size + at[0]] = grey[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, optimize=True)


# ----------------------------------------------------------------------------------------------------- export


def assemble(transformer: DiT3DModel, normalisation: tuple[list[float], float]) -> DiT3DPipeline:
    mean, std = normalisation
    scheduler = DPMSolver(**BETAS, prediction_type="v_prediction", timestep_spacing="late")
    return DiT3DPipeline(transformer, scheduler, dict(enumerate(NAMES)), mean=mean, std=std)


def load_shipped(folder: Path) -> tuple[DiT3DModel, tuple[list[float], float]]:
    """The network and the normalisation of exported weights."""
    pipeline = DiT3DPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return pipeline.transformer, (list(pipeline.mean), pipeline.std)


def export(
    transformer: DiT3DModel, normalisation: tuple[list[float], float], output: Path, facts: dict
) -> None:
    """One folder in fp16, with its record (toy.json) and checksums."""
    pipeline = assemble(copy.deepcopy(transformer), normalisation)
    pipeline.to(dtype=torch.float16)
    save(pipeline, output, facts)


def save(pipeline: DiT3DPipeline, output: Path, facts: dict) -> None:
    """A pipeline's folder, with the record of its training and checksums."""
    building = start_folder(output)
    pipeline.save_pretrained(building)
    finish_folder(building, output, facts)
