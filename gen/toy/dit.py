"""Training of `dit:toy`: one object of the toy world by its class, a pair of colour and shape, as a task for
`gen.train`.

It draws in the latents of the shipped autoencoder and predicts v rather than noise, without a variance; the
reasons are those of `gen.toy.pixart`. Three things save images: it starts from the body of the shipped
PixArt, which has seen the world already; while it learns, a class' vector is the sum of its colour's, its
shape's and its own, so that what is learned of one red thing serves all; and the probe in its middle names
the shape and colour in each patch. Sums and probe are gone from the exported weights.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gen.optim import MuonAdamW, split_parameters
from gen.toy import words, world
from gen.toy.denoising import (
    BETAS,
    NoiseLevels,
    WithProbe,
    draw_times,
    patch_labels,
    plain_attention,
    probe_loss,
    seeded_generator,
)
from gen.toy.judge import Judge, read
from gen.toy.pixart import finish_folder, start_folder
from gen.toy.world import COLOURS, SHAPES, Scene, Thing
from pipelines.dit import DiTPipeline
from pipelines.dpm_solver import DPMSolver
from pipelines.models.autoencoder import AutoencoderKL
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.layers import time_features
from pipelines.models.pixart import PixArtTransformer2DModel

# --------------------------------------------------------------------------------------------------- classes

CLASSES = world.colour_shape_pairs("all")  # (colour, shape); a class is a place in this list
NULL = len(CLASSES)  # the label of no class
DROPOUT = 0.1  # share of labels that become it
_NUMBERS = {pair: number for number, pair in enumerate(CLASSES)}


def class_of(thing: Thing) -> int:
    return _NUMBERS[thing.colour, thing.shape]


def id2label() -> dict[int, str]:
    """Class -> its names, separated by commas: "red cube" first, then every colour word with every shape
    word. No name belongs to two classes."""
    names = {}
    for number, (colour, shape) in enumerate(CLASSES):
        colours = dict.fromkeys((colour, *words.COLOUR_WORDS[colour]))
        shapes = dict.fromkeys((shape, *words.SHAPE_WORDS[shape]))
        names[number] = ", ".join(f"{c} {s}" for c in colours for s in shapes)
    return names


def scenes(seed: int, *, start: int = 0, which: str = "all") -> Iterator[Scene]:
    """An endless stream of scenes with one thing, each a function of (seed, its index) and of `which`
    pairs. All of them: a class that is never seen cannot be drawn."""
    pairs = world.colour_shape_pairs(which)
    index = start
    while True:
        yield world.sample_scene(random.Random(f"{seed}:{index}"), relation="alone", pairs=pairs)
        index += 1


# ------------------------------------------------------------------------------------------------ transformer


def transformer_config(layers: int, heads: int, head_dim: int) -> dict:
    """DiT over 16 x 16 latents, patch 2: 64 tokens; 4 channels out, for no variance is learned."""
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_embeds_ada_norm": len(CLASSES),
    }


@torch.no_grad()
def initialise(transformer: DiTTransformer2DModel) -> None:
    """DiT's start: Xavier matrices, silent modulation and output; gates a little open, as in the toy PixArt,
    so that the branches speak from the start."""
    for name, p in transformer.named_parameters():
        if name.endswith("bias") or "norm1.linear" in name or name.startswith(("proj_out", "class_embedder")):
            p.zero_()
        else:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    for block in transformer.transformer_blocks:
        gates = block.norm1.linear.bias.view(6, -1)
        gates[2] = gates[5] = 0.3


@torch.no_grad()
def initialise_from(transformer: DiTTransformer2DModel, pixart: PixArtTransformer2DModel) -> None:
    """Start as the toy PixArt without its cross-attention; classes say nothing yet.

    Raises ValueError for a PixArt of another size.
    """
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"):
        ours, theirs = getattr(transformer.config, key), getattr(pixart.config, key)
        if ours != theirs:
            raise ValueError(f"a PixArt with {key} {theirs} is no start for a DiT with {ours}")
    state, source = transformer.state_dict(), pixart.state_dict()
    for key in state.keys() & source.keys():  # patches, self-attention, feed-forward
        state[key].copy_(source[key])
    embedder, shared = transformer.timestep_embedder, pixart.adaln_single
    embedder.load_state_dict(shared.emb.timestep_embedder.state_dict())
    transformer.class_embedder.embedding_table.weight.zero_()
    for block, other in zip(transformer.transformer_blocks, pixart.transformer_blocks, strict=True):
        block.norm1.linear.weight.copy_(shared.linear.weight)
        block.norm1.linear.bias.copy_(shared.linear.bias + other.scale_shift_table.flatten())
    # The last modulation: PixArt adds the vector of the timestep as it is, DiT a linear map of it after SiLU.
    # That is fitted; a little ridge keeps it calm where classes will move the vector.
    vector = embedder(time_features(torch.arange(1000, device=transformer.device)))
    known = torch.cat([F.silu(vector), torch.ones_like(vector[:, :1])], dim=1).double()
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1], device=known.device, dtype=known.dtype)
    fitted = torch.linalg.solve(known.T @ known + ridge, known.T @ vector.double()).float()
    transformer.proj_out_1.weight.copy_(fitted[:-1].T.repeat(2, 1))
    transformer.proj_out_1.bias.copy_(fitted[-1].repeat(2) + pixart.scale_shift_table.flatten())
    # Of each pixel of a patch the first channels, the picture's: PixArt leaves the others unused
    for name in ("weight", "bias"):
        rows = getattr(pixart.proj_out, name).unflatten(0, (transformer.config.patch_size**2, -1))
        getattr(transformer.proj_out_2, name).copy_(rows[:, : transformer.config.in_channels].flatten(0, 1))


class _SumOfParts(nn.Module):
    """Rows of the class table (classes + 1, D): to each class' own add those of its colour and shape."""

    def __init__(self, table: torch.Tensor, spread: float) -> None:
        super().__init__()
        self.colour = nn.Parameter(spread * torch.randn(len(COLOURS), table.shape[1]))
        self.shape = nn.Parameter(spread * torch.randn(len(SHAPES), table.shape[1]))

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        parts = (self.colour[:, None] + self.shape).flatten(0, 1)  # in the order of CLASSES
        return table + F.pad(parts, (0, 0, 0, 1))


def plain(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The same network without traces of training: the sums in the class table worked out, no hooks."""
    state = transformer.state_dict()
    table = "class_embedder.embedding_table"
    state = {k: v for k, v in state.items() if not k.startswith(table)}
    state[f"{table}.weight"] = transformer.class_embedder.embedding_table.weight.detach()
    made = DiTTransformer2DModel.empty(transformer.config)
    made.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    return made.eval()


class ClassTask:
    """v-prediction on latents (N, 4, 16, 16) of scenes with one thing; one label in ten is that of no class.

    `spread`: of the vectors of colours and shapes at the start; 0 for weights that know their classes.
    """

    name = "dit"

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        latents: torch.Tensor,
        owners: torch.Tensor,
        scenes: Sequence[Scene],
        *,
        seed: int,
        probe_block: int,
        spread: float,
        device: torch.device | str = "cpu",
        judged: Callable[[DiTTransformer2DModel, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device = device
        embedding = transformer.class_embedder.embedding_table
        parametrize.register_parametrization(embedding, "weight", _SumOfParts(embedding.weight, spread))
        self.module = WithProbe(transformer, probe_block).to(device)
        plain_attention(device, transformer)
        self.latents = latents.to(device)
        self.labels = torch.tensor([class_of(scene.things[0]) for scene in scenes[: len(latents)]])
        self.patches = patch_labels(owners, scenes).to(device)
        self.levels = NoiseLevels(device)
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = seeded_generator(f"dit:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("transformer.transformer_blocks",))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01, others_lr=0.5)

    def draw_labels(self, picks: torch.Tensor) -> torch.Tensor:
        """Classes (B,) of scenes `picks` (B,), a tenth of them made NULL."""
        dropped = torch.rand(len(picks), generator=self.rng) < DROPOUT
        return self.labels[picks].masked_fill(dropped, NULL)

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng = self.rng
        picks = torch.randint(len(self.latents), (batch,), generator=rng)
        labels = self.draw_labels(picks).to(self.device)
        t = draw_times(batch, rng).to(self.device)
        picks = picks.to(self.device)
        x = self.latents[picks].float()
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        noisy = self.levels.add(x, noise, t)
        out = self.module.transformer(noisy, timestep=t, class_labels=labels).sample
        error = (out - self.levels.velocity(x, noise, t)).square().mean()
        probe = probe_loss(self.module.probe(self.module.tokens), self.patches[picks])
        return error + 0.15 * (1 - 0.8 * progress) * probe, {"v": error.detach(), "probe": probe.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module.transformer, folder) if self.judged else {}


# --------------------------------------------------------------------------------------------------- measures

STEPS, GUIDANCE = 50, 4.0  # the pipeline's defaults


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Percentages of pictures in which the judge sees one thing, and it has the shape, colour, or both
    (`right`) of its class. `by_class`: the share with both, by the first name of the class."""

    right: float
    shape: float
    colour: float
    by_class: dict[str, float]


def even_labels(count: int) -> list[int]:
    """`count` classes, each as often as any other, give or take one."""
    return [number % len(CLASSES) for number in range(count)]


def draw(
    pipeline: DiTPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 32,
    report: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """(n, 3, Y, X) pictures in 0..1 of classes `labels`, picture i with noise of seed i."""
    pictures = []
    for i in range(0, len(labels), batch):
        made = pipeline(
            list(labels[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[i : i + batch]],
            output_type="pt",
        )
        pictures.append(made.images.float().cpu())
        if report:
            report(f"drew {min(i + batch, len(labels))} of {len(labels)} pictures")
    return torch.cat(pictures)


def mark(judge: Judge, pictures: torch.Tensor, labels: Sequence[int]) -> Marks:
    """Read pictures (n, 3, 128, 128) in 0..1 and compare them with the classes they should show."""
    rows: list[tuple[bool, bool]] = []
    for i in range(0, len(labels), 64):
        for seen, label in zip(read(judge, pictures[i : i + 64]), labels[i : i + 64], strict=True):
            colour, shape = CLASSES[label]
            alone = len(seen) == 1
            rows.append((alone and seen[0].shape == shape, alone and seen[0].colour == colour))
    hits: dict[str, list[bool]] = {}
    for label, (shape, colour) in zip(labels, rows, strict=True):
        hits.setdefault(" ".join(CLASSES[label]), []).append(shape and colour)

    def percent(values: Sequence[bool]) -> float:
        return 100 * sum(values) / len(values)

    return Marks(
        right=percent([shape and colour for shape, colour in rows]),
        shape=percent([shape for shape, _ in rows]),
        colour=percent([colour for _, colour in rows]),
        by_class={name: percent(values) for name, values in hits.items()},
    )


def measure(
    pipeline: DiTPipeline,
    judge: Judge,
    count: int = 512,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    report: Callable[[str], None] | None = None,
) -> Marks:
    """Marks of `count` pictures, classes drawn evenly, picture i always from noise of seed i."""
    labels = even_labels(count)
    pictures = draw(pipeline, labels, range(count), steps=steps, guidance=guidance, report=report)
    return mark(judge, pictures, labels)


class Sampler:
    """What the transformer draws while it is trained: each class once, as a sheet (samples.png), and the
    marks when there is a judge; the classes that came out wrong stand in wrong.json."""

    def __init__(self, work: Path, count: int = len(CLASSES), steps: int = 20) -> None:
        from weights import store

        self.work, self.count, self.steps = work, count, steps
        self.judge_folder = store.find("judge-toy")

    def __call__(self, transformer: DiTTransformer2DModel, folder: Path) -> dict[str, float]:
        from gen.evaluate import save_grid
        from gen.toy.judge import load_judge

        labels = even_labels(self.count)
        pictures = draw(assemble(transformer, self.work), labels, range(self.count), steps=self.steps)
        names = [" ".join(CLASSES[label]) for label in labels]
        save_grid(pictures, folder / "samples.png", columns=len(SHAPES), labels=names)
        if self.judge_folder is None:
            return {}
        marks = mark(load_judge(self.judge_folder), pictures, labels)
        wrong = [name for name, share in marks.by_class.items() if share < 100]
        (folder / "wrong.json").write_text(json.dumps(wrong, indent=1) + "\n")
        return {"class": marks.right, "shape": marks.shape, "colour": marks.colour}


# ----------------------------------------------------------------------------------------------------- export


def build_scheduler() -> DPMSolver:
    return DPMSolver(**BETAS, prediction_type="v_prediction")


def assemble(transformer: DiTTransformer2DModel, work: Path) -> DiTPipeline:
    """The pipeline of a run's parts."""
    vae = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32, device=transformer.device)
    return DiTPipeline(vae, transformer, build_scheduler(), id2label())


def export(transformer: DiTTransformer2DModel, work: Path, output: Path, facts: dict) -> None:
    """The run's parts as one folder in fp16, with its record (toy.json) and checksums.

    Only we read the transformer: diffusers would take other frequencies for the timestep, and 1000 for the
    label of no class.
    """
    building = start_folder(output)
    pipeline = assemble(plain(transformer), work)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(building, published=False)
    finish_folder(building, output, facts)
