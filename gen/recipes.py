"""Training runs: one row each, and the steps of each run. `gen train NAME` looks here.

Every number that shapes the result stands in this file. A run works in a folder of its own
(`.train/<name>` in a source tree), where each stage leaves a checkpoint, a log and sample sheets; it can
be stopped and started again at any moment. It starts from the weights that ship, where there are any:
`--fresh` starts from nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gen.errors import GenError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    summary: str
    run: Callable[[Run], None]
    minutes: float | None  # a sensible length on two CPU cores; None: until its steps are done
    ships: str = ""  # key of weights.registry that it makes
    data: str = ""  # what the folder must hold that is to be given with --data; empty: it makes its own
    options: Mapping[str, str] = field(default_factory=dict)  # what --set can change, with its values


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run in one process. `rank` 0 writes; the others only lend a hand."""

    name: str
    work: Path
    output: Path
    shipped: Path | None  # weights to go on from
    device: str
    minutes: float | None
    resume: bool
    data: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    world: int = 1
    report: Callable[[str], None] = print

    def share(self, row: Mapping[str, Any]) -> float | None:
        """Minutes of a stage, by its share."""
        return None if self.minutes is None else row["share"] * self.minutes

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def together(self) -> None:
        """Wait for the other processes."""
        import torch.distributed as dist

        if self.world > 1:
            dist.barrier()


# ------------------------------------------------------------------------------------------ pixart-sigma:toy

SCENES = 40_000
SCENES_SEED = 20261120
# Times are shares of the run's minutes; on a GPU the steps run out first.
AUTOENCODER = {
    "share": 0.25,
    "steps": 40_000,
    "batch": 48,
    "lr": 4e-3,
    "ema": 0.995,
    "warmup": 40,
    "cooldown": 0.6,
}
DECODER = {
    "share": 0.06,
    "steps": 10_000,
    "batch": 48,
    "lr": 1e-3,
    "ema": 0.99,
    "warmup": 20,
    "cooldown": 0.8,
}
TEXT = {
    "share": 0.08,
    "steps": 6_000,
    "batch": 64,
    "lr": 1.2e-3,
    "ema": 0.998,
    "warmup": 100,
    "cooldown": 0.4,
}
TRANSFORMER = {
    "share": 0.67,
    "steps": 60_000,
    "batch": 64,
    "lr": 2e-3,
    "ema": 0.998,
    "warmup": 100,
    "cooldown": 0.5,
    "mixed": True,
}
NETWORK = {"layers": 6, "heads": 6, "head_dim": 32, "caption_channels": 192}
PROBE_BLOCK = 3


def _schedule(row: dict[str, Any]):
    from gen.train import Schedule

    return Schedule(**{k: v for k, v in row.items() if k != "share"})


def _pixart_sigma_toy(run: Run) -> None:
    import torch
    from transformers import T5EncoderModel, T5Tokenizer

    from gen.toy import data, world
    from gen.toy import pixart as toy_pixart
    from gen.train import fit
    from pipelines.models.pixart import PixArtTransformer2DModel

    work, fresh = run.work, run.shipped is None
    before = read_facts(run.shipped) if run.shipped else {}
    # 1. Scenes: a run that goes on from shipped weights sees new ones
    runs = before.get("runs", 1 if before else 0)
    scenes_seed = SCENES_SEED + runs
    _render(run, scenes_seed, SCENES)
    pictures, owners = data.load_shards(work / "scenes", SCENES)

    # 2. Autoencoder: from nothing, or a better decoder for the shipped one's latents, which stay
    if not (work / "vae").exists():
        row = AUTOENCODER if fresh else DECODER
        start = None if fresh else toy_pixart.load_autoencoder(run.shipped / "vae")
        task = toy_pixart.AutoencoderTask(pictures, owners, seed=3, device=run.device, decoder_of=start)
        minutes = run.share(row)
        fit(task, _schedule(row), work, resume=run.resume, minutes=minutes, report=run.report)
        if run.leads:
            if fresh:
                toy_pixart.normalise_latents(task.module, pictures[:2000], run.device)
            run.report(f"{task.name}: {task.evaluate(work)['psnr']:.2f} dB")
            task.module.save_pretrained(work / "vae")
        run.together()
    del pictures
    vae = toy_pixart.load_autoencoder(work / "vae").to(run.device)
    _encode(run, lambda pictures: toy_pixart.encode_pictures(vae, pictures, run.device), SCENES)
    latents, owners = data.load_latents(work / "latents", SCENES)

    # 3. Text encoder
    if run.leads and not fresh and not (work / "text_encoder").exists():
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(run.shipped / part, work / part, dirs_exist_ok=True)
        shutil.copy(run.shipped / toy_pixart.TEXT_PROBE, work / toy_pixart.TEXT_PROBE)
    run.together()
    if not (work / "text_encoder").exists():
        tokenizer = toy_pixart.build_tokenizer()
        text = toy_pixart.TextTask(tokenizer, seed=5, device=run.device)
        fit(
            text,
            _schedule(TEXT),
            work,
            resume=run.resume,
            minutes=run.share(TEXT),
            report=run.report,
        )
        if run.leads:
            told, held_out = text.evaluate(work)["slots"], text.evaluate(work, "held_out")["slots"]
            run.report(f"text: {told:.2%} of slots told, {held_out:.2%} with held-out pairs")
            toy_pixart.save_text(text.module, tokenizer, work)
        run.together()

    # 4. Transformer
    transformer = PixArtTransformer2DModel(**toy_pixart.transformer_config(**NETWORK))
    if fresh:
        torch.manual_seed(9)
        toy_pixart.initialise(transformer)
    else:
        transformer = PixArtTransformer2DModel.from_pretrained(
            run.shipped / "transformer", torch_dtype=torch.float32
        )
    scenes = list(itertools.islice(world.scenes(scenes_seed), len(latents)))
    encoder = T5EncoderModel.from_pretrained(work / "text_encoder", torch_dtype=torch.float32)
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    task = toy_pixart.TransformerTask(
        transformer,
        encoder,
        tokenizer,
        latents,
        owners,
        scenes,
        seed=9,
        probe_block=PROBE_BLOCK,
        device=run.device,
        judged=toy_pixart.Sampler(work) if run.leads else None,
    )
    facts = fit(
        task,
        _schedule(TRANSFORMER),
        work,
        resume=run.resume,
        minutes=run.share(TRANSFORMER),
        report=run.report,
    )
    if run.leads:
        toy_pixart.export(
            task.module.transformer,
            work,
            run.output,
            {
                **_origin(run),
                "seed": {"scenes": scenes_seed, "autoencoder": 3, "text": 5, "transformer": 9},
                "steps": facts["step"] + before.get("steps", 0),
                "images_seen": facts["images"] + before.get("images_seen", 0),
                "network": NETWORK,
                "runs": runs + 1,
            },
        )


# ------------------------------------------------------------------------------------------------- dit:toy

DIT_SCENES = 16_000
DIT_SEED = 20261121
DIT = {
    "steps": 40_000,  # on two CPU cores the minutes run out first
    "batch": 64,
    "lr": 2e-3,
    "ema": 0.998,
    "warmup": 100,
    "cooldown": 0.5,
    "mixed": True,
}
DIT_NETWORK = {"layers": 6, "heads": 6, "head_dim": 32}
# Of the first vectors of colours and shapes. Beside weights that have learned the timestep they start small,
# so as not to drown it.
DIT_SPREAD = {"nothing": 0.5, "pixart-sigma-toy": 0.1, "dit-toy": 0.0}


def _dit_toy(run: Run) -> None:
    import torch

    from gen.toy import data
    from gen.toy import dit as toy_dit
    from gen.toy import pixart as toy_pixart
    from gen.train import fit
    from pipelines.models.autoencoder import AutoencoderKL
    from pipelines.models.dit import DiTTransformer2DModel
    from pipelines.models.pixart import PixArtTransformer2DModel
    from weights import store

    work = run.work
    before = read_facts(run.shipped) if run.shipped else {}
    runs = before.get("runs", 1 if before else 0)
    scenes_seed = DIT_SEED + runs  # a run that goes on from shipped weights sees new scenes
    # 1. The autoencoder, and the body to start from, copied: what ships may be replaced while this goes on
    if run.leads and not (work / "vae").exists():
        source = run.shipped or store.find("pixart-sigma-toy")
        if source is None:
            raise GenError(
                "dit:toy draws in the latents of pixart-sigma:toy, which is not here.",
                hint="Train it first: gen train pixart-sigma:toy",
                code="not_installed",
            )
        if run.resume and not run.shipped:
            shutil.copytree(source / "transformer", work / "pixart", dirs_exist_ok=True)
        building = work / f".vae.{os.getpid()}"
        shutil.copytree(source / "vae", building)
        building.rename(work / "vae")
    run.together()

    # 2. Scenes with one thing, as latents
    _render(run, scenes_seed, DIT_SCENES, which="all", stream=toy_dit.scenes)
    vae = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32, device=run.device)
    _encode(run, lambda pictures: toy_pixart.encode_pictures(vae, pictures, run.device), DIT_SCENES)
    latents, owners = data.load_latents(work / "latents", DIT_SCENES)
    scenes = list(itertools.islice(toy_dit.scenes(scenes_seed), len(latents)))

    # 3. Transformer
    torch.manual_seed(11)
    transformer = DiTTransformer2DModel(**toy_dit.transformer_config(**DIT_NETWORK))
    if run.shipped:
        start = "dit-toy"
        transformer = DiTTransformer2DModel.from_pretrained(
            run.shipped / "transformer", torch_dtype=torch.float32
        )
    elif (work / "pixart").exists():
        start = "pixart-sigma-toy"
        pixart = PixArtTransformer2DModel.from_pretrained(work / "pixart", torch_dtype=torch.float32)
        toy_dit.initialise_from(transformer, pixart)
    else:
        start = "nothing"
        toy_dit.initialise(transformer)
    task = toy_dit.ClassTask(
        transformer,
        latents,
        owners,
        scenes,
        seed=11,
        probe_block=PROBE_BLOCK,
        spread=DIT_SPREAD[start],
        device=run.device,
        judged=toy_dit.Sampler(work) if run.leads else None,
    )
    facts = fit(task, _schedule(DIT), work, resume=run.resume, minutes=run.minutes, report=run.report)
    if run.leads:
        toy_dit.export(
            task.module.transformer,
            work,
            run.output,
            {
                **_origin(run),
                "start": before.get("start", start),
                "seed": {"scenes": scenes_seed, "transformer": 11},
                "steps": facts["step"] + before.get("steps", 0),
                "images_seen": facts["images"] + before.get("images_seen", 0),
                "network": DIT_NETWORK,
                "runs": runs + 1,
            },
        )


# ------------------------------------------------------------------------------------------ pixart-delta:toy

DELTA_SCENES = 24_000
EDGE_SCENES = 12_000  # of these; finding edges takes longer than drawing a scene
DELTA_SEED = 20270101
DISTILLED = {
    "share": 0.65,
    "steps": 20_000,  # on two CPU cores the minutes run out first
    "batch": 64,
    "lr": 5e-4,
    "ema": 0.995,
    "warmup": 50,
    "cooldown": 0.4,
    "clip": 0.0,  # the loss is one of absolute errors: its gradients are bounded
    "mixed": True,
}
CONTROL = {
    "share": 0.35,
    "steps": 20_000,
    "batch": 64,
    "lr": 1e-3,
    "ema": 0.998,
    "warmup": 50,
    "cooldown": 0.5,
    "mixed": True,
}
CONTROL_BLOCKS = 3  # of six: half, as published


def _delta_toy(run: Run) -> None:
    import torch
    from transformers import T5EncoderModel, T5Tokenizer

    from gen.toy import data, world
    from gen.toy import delta as toy_delta
    from gen.toy import pixart as toy_pixart
    from gen.train import fit
    from pipelines.models.pixart import PixArtTransformer2DModel
    from pipelines.models.pixart_control import PixArtControlNet
    from weights import store

    work = run.work
    before = read_facts(run.shipped) if run.shipped else {}
    runs = before.get("runs", 1 if before else 0)
    scenes_seed = DELTA_SEED + runs  # a run that goes on from shipped weights sees new scenes

    # 1. The teacher, and all but the transformer, copied: what ships may be replaced while this goes on
    if run.leads and not (work / "teacher").exists():
        source = store.find("pixart-sigma-toy")
        if source is None:
            raise GenError(
                "pixart-delta:toy is distilled from pixart-sigma:toy, which is not here.",
                hint="Train it first: gen train pixart-sigma:toy",
                code="not_installed",
            )
        for part in ("vae", "text_encoder", "tokenizer"):
            shutil.copytree(source / part, work / part, dirs_exist_ok=True)
        building = work / f".teacher.{os.getpid()}"
        shutil.copytree(source / "transformer", building)
        building.rename(work / "teacher")
    run.together()

    # 2. Scenes, as latents; and the latents of their edges
    _render(run, scenes_seed, DELTA_SCENES)
    vae = toy_pixart.load_autoencoder(work / "vae").to(run.device)
    _encode(run, lambda pictures: toy_pixart.encode_pictures(vae, pictures, run.device), DELTA_SCENES)
    latents, _ = data.load_latents(work / "latents", DELTA_SCENES)
    scenes = list(itertools.islice(world.scenes(scenes_seed), len(latents)))
    captions = toy_pixart.Captions(
        T5EncoderModel.from_pretrained(work / "text_encoder", torch_dtype=torch.float32),
        T5Tokenizer.from_pretrained(work / "tokenizer"),
        scenes,
        empty=0.05,
        device=run.device,
    )

    # 3. The student
    def network(folder: Path) -> PixArtTransformer2DModel:
        return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)

    task = toy_delta.DistillTask(
        network(work / "teacher"),
        captions,
        latents,
        seed=13,
        student=network(run.shipped / "transformer") if run.shipped else None,
        device=run.device,
        judged=toy_pixart.Sampler(work, build=toy_delta.assemble, steps=toy_delta.STEPS, guidance=1.0)
        if run.leads
        else None,
    )
    minutes = run.share(DISTILLED)
    facts = fit(task, _schedule(DISTILLED), work, resume=run.resume, minutes=minutes, report=run.report)
    student = task.module["student"]

    # 4. Its control branch
    _encode(run, lambda pictures: toy_delta.encode_edges(vae, pictures, run.device), EDGE_SCENES, "edges")
    edge_latents, _ = data.load_latents(work / "edges", EDGE_SCENES)
    if run.shipped:
        control = PixArtControlNet.from_pretrained(run.shipped / "controlnet", torch_dtype=torch.float32)
    else:
        control = PixArtControlNet.from_transformer(student, CONTROL_BLOCKS)
    held_out = list(itertools.islice(world.scenes(scenes_seed, start=DELTA_SCENES), 12))
    branch = toy_delta.ControlTask(
        student,
        control,
        captions,
        latents[: len(edge_latents)],
        edge_latents,
        seed=15,
        device=run.device,
        judged=toy_delta.ControlSampler(student, work, held_out) if run.leads else None,
    )
    minutes = run.share(CONTROL)
    more = fit(branch, _schedule(CONTROL), work, resume=run.resume, minutes=minutes, report=run.report)
    if run.leads:
        toy_delta.export(
            student,
            control,
            work,
            run.output,
            {
                **_origin(run),
                "seed": {"scenes": scenes_seed, "transformer": 13, "control": 15},
                "steps": facts["step"] + before.get("steps", 0),
                "images_seen": facts["images"] + before.get("images_seen", 0),
                "control_steps": more["step"] + before.get("control_steps", 0),
                "control_images_seen": more["images"] + before.get("control_images_seen", 0),
                "network": {**NETWORK, "control_blocks": CONTROL_BLOCKS},
                "runs": runs + 1,
            },
        )


# ----------------------------------------------------------------------------------------------- dit-3d:toy

CLOUD_SHAPES = 9_000
CLOUD_SEED = 20270301
DIT3D = {
    "steps": 60_000,  # on two CPU cores the minutes run out first
    "batch": 64,
    "lr": 2e-3,
    "ema": 0.998,
    "warmup": 100,
    "cooldown": 0.5,
    "mixed": True,
}


def _clouds(run: Run, seed: int, count: int) -> None:
    """Shapes 0..count-1 of this seed as clouds of points, in the folder `shapes`."""
    from gen.toy import data
    from gen.toy import dit3d as toy_dit3d

    place = {"rank": run.rank, "world": run.world, "report": run.report}
    sample = functools.partial(toy_dit3d.sample_shard, seed)
    data.write_shards(run.work / "shapes", count, sample, verb="sampled", **place)
    run.together()


def _dit3d_toy(run: Run) -> None:
    import torch

    from gen.toy import dit3d as toy_dit3d
    from gen.train import fit
    from pipelines.models.dit import DiTTransformer2DModel
    from pipelines.models.dit3d import DiT3DModel
    from weights import store

    work = run.work
    before = read_facts(run.shipped) if run.shipped else {}
    runs = before.get("runs", 1 if before else 0)
    seed = CLOUD_SEED + runs  # a run that goes on from shipped weights sees new shapes
    # What a fresh run starts from, copied: what ships may be replaced while this goes on
    if run.leads and not run.shipped and run.resume and not (work / "dit").exists():
        source = store.find("dit-toy")
        if source is not None:
            building = work / f".dit.{os.getpid()}"
            shutil.copytree(source / "transformer", building)
            building.rename(work / "dit")
    _clouds(run, seed, CLOUD_SHAPES)
    points, _, labels = toy_dit3d.load_shards(work / "shapes", CLOUD_SHAPES)

    torch.manual_seed(17)
    transformer = DiT3DModel(**toy_dit3d.transformer_config(**DIT_NETWORK))
    toy_dit3d.initialise(transformer)
    start, normalisation = "nothing", None
    if run.shipped:
        start = "dit-3d-toy"
        transformer, normalisation = toy_dit3d.load_shipped(run.shipped)
    elif (work / "dit").exists():
        start = "dit-toy"
        transformer.take_blocks(
            DiTTransformer2DModel.from_pretrained(work / "dit", torch_dtype=torch.float32)
        )
    task = toy_dit3d.CloudTask(
        transformer, points, labels, seed=17, normalisation=normalisation, device=run.device
    )
    if run.leads:
        task.judged = toy_dit3d.Sampler(task.normalisation)
    # Weights that have learned most of it keep more of it at half the rate.
    schedule = DIT3D if runs < 2 else {**DIT3D, "lr": DIT3D["lr"] / 2}
    facts = fit(task, _schedule(schedule), work, resume=run.resume, minutes=run.minutes, report=run.report)
    if run.leads:
        toy_dit3d.export(
            task.module,
            task.normalisation,
            run.output,
            {
                **_origin(run),
                "start": before.get("start", start),
                "seed": {"shapes": seed, "transformer": 17},
                "steps": facts["step"] + before.get("steps", 0),
                "clouds_seen": facts["images"] + before.get("clouds_seen", 0),
                "network": DIT_NETWORK,
                "runs": runs + 1,
            },
        )


CLOUD_JUDGE = {
    "steps": 3_000,
    "batch": 32,
    "lr": 3e-3,
    "ema": 0.99,
    "warmup": 50,
    "cooldown": 0.6,
    "mixed": True,
}


def _cloud_judge_toy(run: Run) -> None:
    from gen.toy import cloud_judge
    from gen.toy import dit3d as toy_dit3d
    from gen.train import fit
    from weights import store

    before = read_facts(run.shipped) if run.shipped else {}
    _clouds(run, 777, 4_000)
    points, parts, labels = toy_dit3d.load_shards(run.work / "shapes", 4_000)
    task = cloud_judge.CloudJudgeTask(points, parts, labels, seed=19, device=run.device)
    if run.shipped:
        task.module.load_state_dict(cloud_judge.load_judge(run.shipped).state_dict())
    facts = fit(
        task, _schedule(CLOUD_JUDGE), run.work, resume=run.resume, minutes=run.minutes, report=run.report
    )
    if run.leads:
        found = task.evaluate(run.work)
        run.report("judge of clouds: " + ", ".join(f"{k} {v:.2%}" for k, v in found.items()))
        quality = {
            **_origin(run),
            "seed": 19,
            "steps": facts["step"] + before.get("steps", 0),
            "clouds_seen": facts["images"] + before.get("clouds_seen", 0),
            "quality": found,
        }
        cloud_judge.save_judge(task.module, run.output, quality)
        store.write_sums(run.output)


# --------------------------------------------------------------------------------------------------- dit-3d

DIT3D_PUBLISHED = {
    "steps": 10**9,  # stop it by --minutes, or when the scores no longer move
    "batch": 16,
    "lr": 1e-4,
    "ema": 0.9999,
    "warmup": 1,
    "cooldown": 0.0,
    "clip": 0.0,
    "save_every": 600,
    "evaluate_every": 3600,
}
DIT3D_OPTIONS = {"size": "S/4", "voxels": "32", "classes": "all", "blocks": "", "evaluate-every": "3600"}


def _dit3d(run: Run) -> None:
    import torch

    from gen import shapenet
    from gen.toy import dit3d as toy_dit3d
    from gen.train import fit
    from pipelines.models.dit import DiTTransformer2DModel
    from pipelines.models.dit3d import SIZES, VOXELS, DiT3DModel

    assert run.data is not None  # `start` saw to it
    size, voxels = run.options["size"], run.options["voxels"]
    if size not in SIZES or voxels not in map(str, VOXELS):
        raise GenError(
            f"There is no DiT-3D {size} at {voxels} voxels.",
            f"Sizes are {', '.join(SIZES)}; voxels {', '.join(map(str, VOXELS))}.",
            "bad_input",
        )
    named = run.options["classes"]
    categories = shapenet.find_categories(run.data, () if named == "all" else named.split(","))
    train, validation = (
        shapenet.read(run.data, categories, split, test_points=split == "val") for split in ("train", "val")
    )
    if run.leads:
        for split, shapes in (("train", train), ("val", validation)):
            run.report(f"{split}: {len(shapes.points)} shapes, {len(shapes.broken)} files left out")
            for reason in shapes.broken[:20]:
                run.report(f"  {reason}")
    torch.manual_seed(21)
    options = {**SIZES[size], "sample_size": int(voxels), "num_embeds_ada_norm": len(categories)}
    transformer = DiT3DModel(**options)
    toy_dit3d.initialise(transformer)
    if run.options["blocks"]:
        try:
            transformer.take_blocks(
                DiTTransformer2DModel.from_pretrained(run.options["blocks"], torch_dtype=torch.float32)
            )
        except ValueError as error:
            raise GenError(
                f"No blocks can be taken from {run.options['blocks']}: {error}.",
                "Give the transformer folder of a DiT of the same depth and width.",
                "bad_input",
            ) from error
    normalisation = shapenet.statistics(train.points)
    scheduler = shapenet.build_scheduler(categories)
    judged = None
    if run.leads:
        judged = shapenet.Sampler(validation, categories, normalisation, scheduler)
    task = shapenet.CloudTask(
        transformer, train, normalisation, scheduler, seed=21, device=run.device, judged=judged
    )
    schedule = _schedule({**DIT3D_PUBLISHED, "evaluate_every": float(run.options["evaluate-every"])})
    facts = fit(task, schedule, run.work, resume=run.resume, minutes=run.minutes, report=run.report)
    if run.leads:
        pipeline = shapenet.assemble(task.module, scheduler, categories, normalisation)
        toy_dit3d.save(
            pipeline,
            run.output,
            {
                **_origin(run),
                "options": dict(run.options),
                "categories": list(categories),
                "shapes": len(train.points),
                "left_out": list(train.broken),
                "seed": 21,
                "steps": facts["step"],
                "clouds_seen": facts["images"],
            },
        )


# ----------------------------------------------------------------------------------------------- judge:toy

JUDGE_SCENES = 20_000
JUDGE = {
    "steps": 8_000,
    "batch": 32,
    "lr": 3e-3,
    "ema": 0.995,
    "warmup": 50,
    "cooldown": 0.5,
    "mixed": True,
}


def _judge_toy(run: Run) -> None:
    from gen.toy import data, judge, world
    from gen.train import fit
    from weights import store

    before = read_facts(run.shipped) if run.shipped else {}
    _render(run, 777, JUDGE_SCENES, which="all")
    pictures, _ = data.load_shards(run.work / "scenes", JUDGE_SCENES)
    scenes = list(itertools.islice(world.scenes(777, which="all"), len(pictures)))
    task = judge.JudgeTask(pictures, scenes, seed=7, device=run.device)
    if run.shipped:
        task.module.load_state_dict(judge.load_judge(run.shipped).state_dict())
    facts = fit(task, _schedule(JUDGE), run.work, resume=run.resume, minutes=run.minutes, report=run.report)
    if run.leads:
        found = task.evaluate(run.work)
        run.report("judge: " + ", ".join(f"{k} {v:.2%}" for k, v in found.items()))
        judge.save_judge(
            task.module,
            run.output,
            {
                **_origin(run),
                "seed": 7,
                "steps": facts["step"] + before.get("steps", 0),
                "images_seen": facts["images"] + before.get("images_seen", 0),
                "quality": found,
            },
        )
        store.write_sums(run.output)


# ---------------------------------------------------------------------------------------------- shared stages


def _render(run: Run, seed: int, count: int, **more: Any) -> None:
    """Scenes 0..count-1 of this seed, in the folder `scenes`."""
    from gen.toy import data

    place = {"rank": run.rank, "world": run.world, "device": run.device, "report": run.report}
    data.render_shards(run.work / "scenes", seed, count, **place, **more)
    run.together()


def _encode(run: Run, encode: Callable[[Any], Any], count: int, folder: str = "latents") -> None:
    """What `encode` makes of the pictures of scenes 0..count-1, in a folder beside."""
    from gen.toy import data

    place = {"rank": run.rank, "world": run.world, "report": run.report}
    data.encode_shards(run.work / "scenes", run.work / folder, encode, count, **place)
    run.together()


# --------------------------------------------------------------------------------------------------- records


def _origin(run: Run) -> dict[str, Any]:
    """What made these weights: recipe, commit of the source (None outside a work tree), device."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"recipe": run.name, "commit": commit or None, "device": run.device}


def read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "toy.json"
    return json.loads(path.read_text()) if path.exists() else {}


RECIPES = {
    r.name: r
    for r in (
        Recipe(
            name="pixart-sigma:toy",
            summary="text to image, 128 px, from rendered scenes",
            run=_pixart_sigma_toy,
            minutes=180,
            ships="pixart-sigma-toy",
        ),
        Recipe(
            name="dit:toy",
            summary="a class to an image: one object, 88 pairs of colour and shape",
            run=_dit_toy,
            minutes=25,
            ships="dit-toy",
        ),
        Recipe(
            name="pixart-delta:toy",
            summary="pixart-sigma:toy in four steps, and a branch that follows edges",
            run=_delta_toy,
            minutes=75,
            ships="pixart-delta-toy",
        ),
        Recipe(
            name="dit-3d:toy",
            summary="a class to a cloud of points: six families of shapes",
            run=_dit3d_toy,
            minutes=60,
            ships="dit-3d-toy",
        ),
        Recipe(
            name="cloud-judge:toy",
            summary="reads the family and the parts of clouds of points",
            run=_cloud_judge_toy,
            minutes=4,
            ships="cloud-judge-toy",
        ),
        Recipe(
            name="dit-3d",
            summary="as published: clouds of points from a folder in the form of ShapeNetCore.v2.PC15k",
            run=_dit3d,
            minutes=None,
            data="folders like 03001627/train with .npy files of (15000, 3)",
            options=DIT3D_OPTIONS,
        ),
        Recipe(
            name="judge:toy", summary="reads toy pictures back", run=_judge_toy, minutes=15, ships="judge-toy"
        ),
    )
}


# --------------------------------------------------------------------------------------------------- the door


def start(
    name: str,
    *,
    output: Path | None = None,
    resume: bool = True,
    device: str = "auto",
    minutes: float | None = None,
    threads: int | None = None,  # CPU processes to train with
    data: Path | None = None,  # folder to learn from, for recipes that do not make their own
    options: Mapping[str, str] | None = None,  # of the recipe's, those to change
    report: Callable[[str], None] = print,
) -> Path:
    """Run recipe `name`; returns the folder of finished weights.

    Raises GenError for an unknown recipe or option, a device that is not there, and data that are missing or
    not wanted.
    """
    import torch

    from weights import store

    if name not in RECIPES:
        raise GenError(
            f"There is no recipe {name!r}.", hint=f"There are {', '.join(RECIPES)}.", code="unknown_model"
        )
    recipe = RECIPES[name]
    _check_data(recipe, data, options or {})
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise GenError("There is no CUDA device here.", hint="Use --device cpu.", code="bad_input")
    slug = name.replace(":", "-")
    root = Path(os.environ["GEN_TRAIN_DIR"]) if "GEN_TRAIN_DIR" in os.environ else Path.cwd() / ".train"
    work = root / slug
    if not resume and work.exists():
        for path in work.iterdir():  # rendered scenes are no result: they stay
            if path.name != "scenes":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)
    output = output or work / "out"
    shipped = _starting_point(work, store.find(recipe.ships) if resume and recipe.ships else None)
    world = (threads or min(2, os.cpu_count() or 1)) if device == "cpu" else 1
    options = {
        "name": name,
        "work": work,
        "output": output,
        "shipped": shipped,
        "device": device,
        "minutes": minutes or recipe.minutes,
        "resume": resume,
        "data": data,
        "options": {**recipe.options, **(options or {})},
        "world": world,
    }
    if world == 1:
        if device == "cpu":
            torch.set_num_threads(1)
        recipe.run(Run(**options, report=report))
        return output
    import torch.multiprocessing as mp

    rendezvous = work / f".rendezvous.{os.getpid()}"
    group = mp.start_processes(
        _process, (options, str(rendezvous)), nprocs=world, start_method="spawn", join=False
    )
    try:
        while not group.join():
            pass
    except KeyboardInterrupt:
        for process in group.processes:  # the leading one saves, the others follow it
            process.terminate()
        for process in group.processes:
            process.join(60)
        raise
    finally:
        for process in group.processes:
            process.kill()
        rendezvous.unlink(missing_ok=True)
    return output


def _check_data(recipe: Recipe, data: Path | None, options: Mapping[str, str]) -> None:
    for name in options:
        if name not in recipe.options:
            known = f"It takes {', '.join(recipe.options)}." if recipe.options else "It takes none."
            raise GenError(f"{recipe.name} has no option '{name[:60]}'.", known, "unknown_option")
    if recipe.data and data is None:
        raise GenError(f"{recipe.name} learns from a folder.", f"Give --data: {recipe.data}.", "bad_input")
    if data is not None and not recipe.data:
        raise GenError(f"{recipe.name} makes its own data.", "Leave --data out.", "bad_input")
    if data is not None and not data.is_dir():
        raise GenError(f"There is no folder {data}.", "Check --data.", "bad_input")


def _starting_point(work: Path, shipped: Path | None) -> Path | None:
    """The weights that this run started from, kept in its folder: they may be replaced while it goes on."""
    start = work / "start"
    if not start.exists():
        building = work / f".start.{os.getpid()}"
        if shipped:
            shutil.copytree(shipped, building)
        else:
            building.mkdir()
        building.rename(start)
    return start if any(start.iterdir()) else None


def _process(rank: int, options: dict[str, Any], rendezvous: str) -> None:
    import sys

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options["world"]
    )

    def report(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    try:
        RECIPES[options["name"]].run(Run(**options, rank=rank, report=report))
    except KeyboardInterrupt:
        return  # the parent was told as well, and says so
    finally:
        dist.destroy_process_group()
