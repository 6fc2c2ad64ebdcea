"""Training of DiT-3D on folders in the form of ShapeNetCore.v2.PC15k, as published.

Such a folder holds `<synset>/<train|val|test>/*.npy`, each 15,000 points (P, 3). The first 10,000 are for
training, the others for testing, whatever the split (Yang et al. 2019, arXiv:1906.12320). A step sees 2048 of
a shape's points, drawn with replacement; all shapes are moved by one mean and scaled by one spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen.errors import GenError, did_you_mean
from gen.point_metrics import compare_sets
from gen.toy.denoising import plain_attention, seeded_generator
from pipelines.dit3d import DiT3DPipeline
from pipelines.models.dit3d import DiT3DModel
from pipelines.point_diffusion import AIRPLANE, PointDiffusion

POINTS = 2048
FILE_POINTS = 15_000
TRAIN_POINTS = 10_000  # of these; what follows is for testing
DROPOUT = 0.1  # share of labels that become that of no class

# Synset of each category, in the order of the published table
_TABLE = """
airplane 02691156  bag 02773838  basket 02801938  bathtub 02808440  bed 02818832  bench 02828884
bottle 02876657  bowl 02880940  bus 02924116  cabinet 02933112  can 02747177  camera 02942699
cap 02954340  car 02958343  chair 03001627  clock 03046257  dishwasher 03207941  monitor 03211117
table 04379243  telephone 04401088  tin_can 02946921  tower 04460130  train 04468005
keyboard 03085013  earphone 03261776  faucet 03325088  file 03337140  guitar 03467517
helmet 03513137  jar 03593526  knife 03624134  lamp 03636649  laptop 03642806  speaker 03691459
mailbox 03710193  microphone 03759954  microwave 03761084  motorcycle 03790512  mug 03797390
piano 03928116  pillow 03938244  pistol 03948459  pot 03991062  printer 04004475
remote_control 04074963  rifle 04090263  rocket 04099429  skateboard 04225987  sofa 04256520
stove 04330267  vessel 04530566  washer 04554684  cellphone 02992529  birdhouse 02843684
bookshelf 02871439
"""
CATEGORIES: Mapping[str, str] = dict(zip(_TABLE.split()[::2], _TABLE.split()[1::2], strict=True))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What was read of one split: points (N, P, 3) float32 and classes (N,), numbers of `categories`."""

    points: Tensor
    labels: Tensor
    broken: tuple[str, ...]  # files that were left out, and why


def find_categories(root: Path, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The categories to train on, in order; a class is a place in it. Without names all that are there.

    Raises GenError for names that are unknown or have no folder, and for a folder of another form.
    """
    there = tuple(name for name, synset in CATEGORIES.items() if (root / synset).is_dir())
    if not there:
        raise GenError(
            f"{root} holds no shapes in the form of ShapeNetCore.v2.PC15k.",
            "It must hold folders like 03001627/train with .npy files in them.",
            "bad_input",
        )
    for name in names:
        if name not in CATEGORIES:
            hint = did_you_mean(name, CATEGORIES) or f"There are {', '.join(there)}."
            raise GenError(f"There is no category '{name[:60]}'.", hint, "bad_input")
        if name not in there:
            raise GenError(
                f"{root} has no {name}: its folder would be {CATEGORIES[name]}.",
                f"There are {', '.join(there)}.",
                "bad_input",
            )
    return tuple(dict.fromkeys(names)) or there


def read(root: Path, categories: Sequence[str], split: str, *, test_points: bool = False) -> Shapes:
    """All shapes of a split. Files that cannot be used are left out, and told.

    Raises GenError when a category has no file that can be used.
    """
    points, labels, broken = [], [], []
    for number, name in enumerate(categories):
        folder = root / CATEGORIES[name] / split
        found = 0
        for path in sorted(folder.glob("*.npy")):
            try:
                cloud = _read_cloud(path)
            except (OSError, ValueError) as error:
                broken.append(f"{path.relative_to(root)}: {error}")
                continue
            points.append(cloud[TRAIN_POINTS:] if test_points else cloud[:TRAIN_POINTS])
            labels.append(number)
            found += 1
        if not found:
            why = f" {len(broken)} files there cannot be used, e.g. {broken[-1]}." if broken else ""
            raise GenError(
                f"{folder} has no shapes.{why}", "Every category needs .npy files of (15000, 3).", "bad_input"
            )
    return Shapes(
        points=torch.from_numpy(np.stack(points)), labels=torch.tensor(labels), broken=tuple(broken)
    )


def _read_cloud(path: Path) -> np.ndarray:
    """(15000, 3) float32. Raises ValueError with what is wrong."""
    try:
        cloud = np.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError("cut short") from error
    if not isinstance(cloud, np.ndarray) or cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"not points (P, 3) but {getattr(cloud, 'shape', type(cloud).__name__)}")
    if len(cloud) != FILE_POINTS:
        raise ValueError(f"{len(cloud)} points and not {FILE_POINTS}")
    cloud = cloud.astype(np.float32)
    if not np.isfinite(cloud).all():
        raise ValueError("numbers that are not finite (NaN or infinity)")
    if (cloud.max(0) == cloud.min(0)).all():
        raise ValueError("all points in one place")
    return cloud


def statistics(points: Tensor) -> tuple[list[float], float]:
    """The mean of each coordinate over all points, and the spread of all numbers together."""
    flat = points.reshape(-1, 3).double()
    return flat.mean(0).tolist(), float(flat.std(correction=0))


def build_scheduler(categories: Sequence[str]) -> PointDiffusion:
    """The published noise: another one where airplanes are the only category."""
    return PointDiffusion(**(AIRPLANE if list(categories) == ["airplane"] else {}))


class CloudTask:
    """Prediction of the noise on normalised clouds; one label in ten is that of no class."""

    name = "dit3d"

    def __init__(
        self,
        transformer: DiT3DModel,
        train: Shapes,
        normalisation: tuple[list[float], float],
        scheduler: PointDiffusion,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        judged: Callable[[DiT3DModel, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.scheduler = device, scheduler
        self.module = transformer.to(device)
        plain_attention(device, transformer)
        mean, std = normalisation
        self.points = (train.points - torch.tensor(mean, dtype=torch.float32)) / std
        self.labels = train.labels
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = seeded_generator(f"shapenet:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), lr=lr, weight_decay=0.0)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = self.rng
        picks = torch.randint(len(self.points), (batch,), generator=rng)
        which = torch.randint(self.points.shape[1], (batch, POINTS), generator=rng)
        x = self.points[picks[:, None], which].mT.to(self.device)
        null = self.module.config.null_label
        dropped = torch.rand(batch, generator=rng) < DROPOUT
        labels = self.labels[picks] if null is None else self.labels[picks].masked_fill(dropped, null)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (batch,), generator=rng)
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        noisy = self.scheduler.add_noise(x, noise, t)
        out = self.module(noisy, t.to(self.device), labels.to(self.device)).sample
        return (out - noise).square().mean(), {}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module, folder) if self.judged else {}


class Sampler:
    """Scores of what the network draws while it is trained, against shapes of the validation split: few of
    them, so that the numbers say how training goes and not more."""

    def __init__(
        self,
        validation: Shapes,
        categories: Sequence[str],
        normalisation: tuple[list[float], float],
        scheduler: PointDiffusion,
        count: int = 32,
        steps: int = 50,
    ) -> None:
        self.categories, self.normalisation, self.scheduler = categories, normalisation, scheduler
        self.labels = validation.labels[:: max(1, len(validation.labels) // count)][:count]
        self.references = validation.points[:: max(1, len(validation.labels) // count)][:count, :POINTS]
        self.steps = steps

    def __call__(self, transformer: DiT3DModel, folder: Path) -> dict[str, float]:
        from gen.toy.dit3d import draw, save_sheet

        pipeline = assemble(transformer, self.scheduler, self.categories, self.normalisation)
        labels = self.labels.tolist()
        clouds = draw(pipeline, labels, range(len(labels)), steps=self.steps, scheduler="dpm++")
        save_sheet(clouds[:32], folder / "samples.png", columns=8)
        scores = compare_sets(clouds, self.references)
        return {name: scores[name] for name in ("CD_mmd", "CD_cov", "CD_1nn_acc", "JSD")}


def assemble(
    transformer: DiT3DModel,
    scheduler: PointDiffusion,
    categories: Sequence[str],
    normalisation: tuple[list[float], float],
) -> DiT3DPipeline:
    mean, std = normalisation
    return DiT3DPipeline(transformer, scheduler, dict(enumerate(categories)), mean=mean, std=std)
