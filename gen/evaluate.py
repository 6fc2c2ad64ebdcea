"""Measures of the embedded models: what a table row promises, on prompts and scenes that training never
saw.

Pictures are read by the judge (`gen.toy.judge`), which was trained on renders only. A picture counts when
everything said is there together: as many things, each shape with its colour, each thing in its slot.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen.errors import GenError

SEED = 5120  # of prompts and of noise; training uses other streams


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table. `gate` must hold for the weights to ship; `goal` is what they are trained
    towards."""

    name: str
    unit: str
    gate: float | None = None
    goal: float | None = None
    note: str = ""
    lower: bool = False  # whether less is better

    def passes(self, value: float) -> bool:
        return self.gate is None or (value <= self.gate if self.lower else value >= self.gate)


METRICS = (
    Metric(
        name="autoencoder", unit="dB", gate=36, goal=38, note="PSNR of reconstructions of held-out renders"
    ),
    Metric(
        name="text slots",
        unit="%",
        gate=99,
        note="captions whose every slot (shape, colour, role) the text encoder tells",
    ),
    Metric(name="one object", unit="%", gate=85, goal=97, note="shape and colour both right"),
    Metric(name="two objects", unit="%", gate=50, goal=88, note="every attribute bound to the right one"),
    Metric(name="relation", unit="%", gate=45, goal=85, note="the same, and each object in its slot"),
    Metric(name="three objects", unit="%", note="every attribute bound, from left to right as said"),
    Metric(
        name="held-out pairs", unit="%", goal=80, note="one object of a colour-shape pair never trained on"
    ),
    Metric(name="size and material", unit="%", note="one or two objects, all that was said right"),
    Metric(name="judge", unit="%", gate=98, note="its worst attribute on held-out renders"),
    Metric(name="judge, reconstructed", unit="%", note="shape and colour read through the autoencoder"),
)
DIT_METRICS = (
    Metric(
        name="class", unit="%", gate=85, goal=97, note="one object, with the shape and colour of its class"
    ),
    Metric(name="class shape", unit="%", note="one object of the right shape"),
    Metric(name="class colour", unit="%", note="one object of the right colour"),
    Metric(name="classes", unit="%", note="of the 88, those that come out right more often than not"),
)
_COMPARED = ("one object", "two objects", "relation")
DELTA_METRICS = (
    *(
        Metric(name=m.name, unit=m.unit, note=m.note)
        for m in METRICS
        if m.name in (*_COMPARED, "three objects", "held-out pairs", "size and material")
    ),
    Metric(
        name="against the teacher",
        unit="points",
        gate=-5,
        note="pixart-sigma:toy at 20 steps taken away; the worst of one object, two objects and relation",
    ),
    Metric(
        name="against few steps",
        unit="points",
        gate=15,
        note="the same, pixart-sigma:toy at as many steps taken away",
    ),
    Metric(name="edges", unit="%", note="F1 of the picture's edges against those it had to follow"),
    Metric(name="edges, free", unit="%", note="the same when it was not told to follow them"),
    Metric(name="control", unit="x", gate=2, note="the first as a multiple of the second"),
)
COMPARED_FAMILIES = ("airplane", "car", "chair")  # those that the paper measures
DIT3D_METRICS = (
    Metric(name="class", unit="%", gate=85, goal=97, note="clouds that the judge takes for their class"),
    *(
        Metric(
            name=f"1-NNA-CD, {family}",
            unit="%",
            gate=80,
            goal=60,
            lower=True,
            note="how often a cloud's nearest other is of its own set, generated or held out; 50 is ideal",
        )
        for family in COMPARED_FAMILIES
    ),
    *(
        Metric(
            name=f"COV-CD, {family}",
            unit="%",
            gate=35,
            goal=45,
            note="held-out shapes that are the nearest to some generated one",
        )
        for family in COMPARED_FAMILIES
    ),
    Metric(name="judge", unit="%", note="held-out shapes whose family it tells"),
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    caption: Any  # gen.world.Caption
    group: str  # "one" | "two" | "three" | "held-out"


def prompts(count: int) -> list[Prompt]:
    """`count` prompts in fixed shares, each a function of its number alone: 5 of 16 show one object, 6
    two, 2 three, and 3 one object of a held-out pair."""
    from gen.toy import world
    from gen.toy.words import describe

    groups = ["one"] * 5 + ["two"] * 6 + ["three"] * 2 + ["held-out"] * 3
    made = []
    for n in range(count):
        group = groups[n * 5 % 16]
        rng = random.Random(f"evaluate:{SEED}:{n}")
        relation = {"two": rng.choice(world.RELATIONS[1:-1]), "three": "row"}.get(group, "alone")
        pairs = world.colour_shape_pairs("held_out" if group == "held-out" else "seen")
        caption = describe(world.sample_scene(rng, relation=relation, pairs=pairs), rng)
        made.append(Prompt(text=caption.text, caption=caption, group=group))
    return made


def draw(
    pipeline: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 4.5,
    batch: int = 16,
    report: Callable[[str], None] | None = None,
):
    """(n, 3, Y, X) pictures in 0..1 of `texts`, picture i with noise of seed i."""
    import torch

    pictures = []
    for i in range(0, len(texts), batch):
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[i : i + batch]]
        made = pipeline(
            list(texts[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            use_resolution_binning=False,
            output_type="pt",
        )
        pictures.append(made.images.float().cpu())
        if report:
            report(f"drew {min(i + batch, len(texts))} of {len(texts)} pictures")
    return torch.cat(pictures)


def score_pictures(judge: Any, pictures: Any, asked: Sequence[Prompt]) -> dict[str, float]:
    """Percentages by metric name, over the prompts of each group."""
    from gen.toy.judge import read, verdict

    seen = [s for i in range(0, len(pictures), 64) for s in read(judge, pictures[i : i + 64])]
    verdicts = [(p.group, verdict(p.caption, s)) for p, s in zip(asked, seen, strict=True)]

    def share(groups: tuple[str, ...], field: str) -> float:
        chosen = [getattr(v, field) for g, v in verdicts if g in groups]
        return 100 * sum(chosen) / max(1, len(chosen))

    return {
        "one object": share(("one",), "bound"),
        "two objects": share(("two",), "bound"),
        "relation": share(("two",), "placed"),
        "three objects": share(("three",), "placed"),
        "held-out pairs": share(("held-out",), "bound"),
        "size and material": share(("one", "two"), "extras"),
    }


def _embedded(name: str) -> Path:
    from weights import registry, store

    folder = store.find(name)
    if folder is None:
        raise GenError(
            f"The weights {name} are not here.",
            hint=f"Train them: gen train {registry.CHECKPOINTS[name].recipe}",
            code="not_installed",
        )
    return folder


def evaluate(
    name: str,
    *,
    prompts: int | None = None,  # None: as many as its record is made with
    steps: int | None = None,  # None: as many as the model takes by itself
    device: str = "auto",
    grid: Path | None = None,  # where to save a sheet of the first pictures
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The quality table of `name` ("pixart-sigma:toy").

    Raises GenError for a model without measures, or whose weights are missing.
    """
    from gen import catalog

    if prompts is not None and prompts < 16:
        raise GenError(
            f"{prompts} prompts are too few to measure by.",
            hint="Use --prompts 16 or more.",
            code="bad_input",
        )
    model, tag = catalog.find(name)
    if (model.name, tag) not in MEASURES:
        known = ", ".join(f"{m}:{t}" for m, t in MEASURES)
        raise GenError(f"There are no measures for {name}.", hint=f"There are for {known}.", code="bad_input")
    measure, usual = MEASURES[model.name, tag]
    return measure(prompts or usual, steps, device, grid, report or (lambda _: None))


def _pixart_toy(
    count: int, steps: int | None, device: str, grid: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    import torch

    from gen.loader import explained
    from gen.toy import pixart as toy_pixart
    from gen.toy import world
    from gen.toy.judge import accuracy, load_judge
    from gen.toy.render import render
    from pipelines.pixart_sigma import PixArtSigmaPipeline

    steps = steps or 20
    folder = _embedded("pixart-sigma-toy")
    chosen = _device(device)
    with explained(folder):
        pipeline = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32, device=chosen)
    judge = load_judge(_embedded("judge-toy"))

    report("reading held-out renders")
    scenes = list(itertools.islice(world.scenes(SEED, which="all"), 512))
    renders = torch.cat([render(scenes[i : i + 32]) for i in range(0, len(scenes), 32)])
    read_back = accuracy(judge, renders, scenes)
    bytes_ = (renders[:256] * 255).round().to(torch.uint8)
    values = {"judge": 100 * min(read_back[k] for k in ("shape", "colour", "size", "material", "position"))}
    values["autoencoder"] = toy_pixart.reconstruction_psnr(pipeline.vae, bytes_, chosen)
    latents = toy_pixart.encode_pictures(pipeline.vae, bytes_, chosen).float().to(chosen)
    again = accuracy(judge, pipeline.decode(latents, "pt").cpu(), scenes[:256])
    values["judge, reconstructed"] = 100 * min(again["shape"], again["colour"])
    values["text slots"] = 100 * toy_pixart.text_slots(folder, chosen)

    asked = _prompts(count)
    pictures = draw(pipeline, [p.text for p in asked], range(count), steps=steps, report=report)
    values |= score_pictures(judge, pictures, asked)
    if grid:
        save_grid(pictures[:48], grid, columns=8, labels=[p.text for p in asked[:48]])
    return _table("pixart-sigma:toy", count, steps, 4.5, METRICS, values)


def _dit_toy(
    count: int, steps: int | None, device: str, grid: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    import torch

    from gen.loader import explained
    from gen.toy import dit as toy_dit
    from gen.toy.judge import load_judge
    from pipelines.dit import DiTPipeline

    steps = steps or toy_dit.STEPS
    folder = _embedded("dit-toy")
    chosen = _device(device)
    with explained(folder):
        pipeline = DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32, device=chosen)
    labels = toy_dit.even_labels(count)
    pictures = toy_dit.draw(pipeline, labels, range(count), steps=steps, report=report)
    marks = toy_dit.mark(load_judge(_embedded("judge-toy")), pictures, labels)
    if grid:
        names = [" ".join(toy_dit.CLASSES[label]) for label in labels[:88]]
        save_grid(pictures[:88], grid, columns=8, labels=names)
    drawn = [share > 50 for share in marks.by_class.values()]
    values = {
        "class": marks.right,
        "class shape": marks.shape,
        "class colour": marks.colour,
        "classes": 100 * sum(drawn) / len(drawn),
    }
    table = _table("dit:toy", count, steps, toy_dit.GUIDANCE, DIT_METRICS, values)
    return {**table, "of": "pictures, classes in turn"}


def _delta_toy(
    count: int, steps: int | None, device: str, grid: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    import torch

    from gen.loader import explained
    from gen.toy import delta as toy_delta
    from gen.toy import world
    from gen.toy.judge import load_judge
    from gen.toy.render import render
    from gen.toy.words import describe
    from pipelines.pixart_delta import PixArtDeltaPipeline
    from pipelines.pixart_sigma import PixArtSigmaPipeline

    steps = steps or toy_delta.STEPS
    options = {"torch_dtype": torch.float32, "device": _device(device)}
    folder, teacher = _embedded("pixart-delta-toy"), _embedded("pixart-sigma-toy")
    with explained(folder):
        pipeline = PixArtDeltaPipeline.from_pretrained(folder, **options)
    with explained(teacher):
        sigma = PixArtSigmaPipeline.from_pretrained(teacher, **options)
    judge = load_judge(_embedded("judge-toy"))

    asked = _prompts(count)
    texts = [p.text for p in asked]

    def marks(pipeline: Any, steps: int, guidance: float) -> tuple[Any, dict[str, float]]:
        pictures = draw(pipeline, texts, range(count), steps=steps, guidance=guidance, report=report)
        return pictures, score_pictures(judge, pictures, asked)

    pictures, values = marks(pipeline, steps, 1.0)
    for name, taken in (("against the teacher", 20), ("against few steps", steps)):
        _, others = marks(sigma, taken, 4.5)
        values[name] = min(values[one] - others[one] for one in _COMPARED)

    report("following edges")
    number = max(16, count // 4)
    scenes = list(itertools.islice(world.scenes(SEED), number))
    renders = torch.cat([render(scenes[i : i + 32]) for i in range(0, number, 32)])
    said = [describe(scene, random.Random(f"edges:{SEED}:{i}")).text for i, scene in enumerate(scenes)]
    followed = toy_delta.draw_controlled(pipeline, said, renders, steps=steps, report=report)
    free = toy_delta.draw_controlled(pipeline, said, None, steps=steps, report=report)
    f1, f1_free = (100 * toy_delta.mean_edge_f1(drawn, renders) for drawn in (followed, free))
    values |= {"edges": f1, "edges, free": f1_free, "control": f1 / max(f1_free, 1e-9)}
    if grid:
        save_grid(pictures[:48], grid, columns=8, labels=texts[:48])
        toy_delta.save_control_sheet(grid.with_stem(f"{grid.stem}-control"), renders, followed, said)
    return _table("pixart-delta:toy", count, steps, 1.0, DELTA_METRICS, values)


def _dit3d_toy(
    count: int, steps: int | None, device: str, grid: Path | None, report: Callable[[str], None]
) -> dict[str, Any]:
    import numpy as np
    import torch

    from gen.loader import explained
    from gen.point_metrics import compare_sets
    from gen.toy import dit3d as toy_dit3d
    from gen.toy.cloud_judge import load_judge, read
    from gen.toy.models3d import NAMES, cloud, shapes
    from pipelines.dit3d import DiT3DPipeline

    steps = steps or toy_dit3d.STEPS
    folder = _embedded("dit-3d-toy")
    with explained(folder):
        pipeline = DiT3DPipeline.from_pretrained(folder, torch_dtype=torch.float32, device=_device(device))
        pipeline.prepare()  # as `gen run` draws
    judge = load_judge(_embedded("cloud-judge-toy"))
    labels = toy_dit3d.even_labels(count)
    clouds = toy_dit3d.draw(pipeline, labels, range(count), steps=steps, report=report)
    held_out = itertools.islice(shapes(f"held-out:{SEED}"), count)
    truth = torch.from_numpy(
        np.stack([cloud(shape, toy_dit3d.POINTS, SEED + i)[0] for i, shape in enumerate(held_out)])
    )
    asked = torch.tensor(labels)
    values = {
        "class": 100 * (read(judge, clouds)[0] == asked).float().mean().item(),
        "judge": 100 * (read(judge, truth)[0] == asked).float().mean().item(),
    }
    for family in COMPARED_FAMILIES:
        report(f"comparing {family}s with held-out ones")
        own = asked == NAMES.index(family)
        scores = compare_sets(clouds[own], truth[own])
        values[f"1-NNA-CD, {family}"] = 100 * scores["CD_1nn_acc"]
        values[f"COV-CD, {family}"] = 100 * scores["CD_cov"]
    if grid:
        toy_dit3d.save_sheet(clouds[:48], grid, columns=len(NAMES))
    table = _table("dit-3d:toy", count, steps, toy_dit3d.GUIDANCE, DIT3D_METRICS, values)
    return {**table, "of": "clouds, families in turn"}


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _table(
    model: str,
    count: int,
    steps: int,
    guidance: float,
    metrics: Sequence[Metric],
    values: dict[str, float],
) -> dict[str, Any]:
    """Values by name as a table in the order of `metrics`."""
    table: dict[str, Any] = {
        "model": model,
        "prompts": count,
        "steps": steps,
        "guidance": guidance,
        "seed": SEED,
        "rows": [],
    }
    for m in metrics:
        value = values[m.name]
        table["rows"].append(
            {
                "metric": m.name,
                "value": round(value, 2),
                "unit": m.unit,
                "gate": m.gate,
                "goal": m.goal,
                "passed": m.passes(value),
                "note": m.note,
            }
        )
    return table


_prompts = prompts
MEASURES: dict[tuple[str, str | None], tuple[Callable[..., dict[str, Any]], int]] = {
    ("pixart-sigma", "toy"): (_pixart_toy, 512),
    ("dit", "toy"): (_dit_toy, 512),
    ("pixart-delta", "toy"): (_delta_toy, 512),
    ("dit-3d", "toy"): (_dit3d_toy, 6 * 306),  # 300 and more of each family
}


def save_grid(pictures: Any, path: Path, columns: int, labels: Sequence[str] = ()) -> None:
    """Pictures (n, 3, Y, X) in 0..1 as one PNG sheet, row by row, each with its label below if there are
    any."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    n, _, y, x = pictures.shape
    foot = 40 if labels else 0
    gap = 8 if labels else 0
    size = (columns * (x + gap) + gap, -(-n // columns) * (y + foot + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, picture in enumerate((pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        left, top = gap + i % columns * (x + gap), gap + i // columns * (y + foot + gap)
        sheet.paste(Image.fromarray(picture), (left, top))
        if labels:
            text = textwrap.fill(labels[i], x // 5, max_lines=3)
            draw.text((left, top + y + 3), text, fill="#333", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def record(name: str, table: dict[str, Any]) -> Path:
    """Write the table into the weights' own record, toy.json, and their checksums anew. Returns that file."""
    from gen import catalog
    from weights import store

    model, tag = catalog.find(name)
    folder = _embedded(model.weights[tag or ""])
    path = folder / "toy.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**facts, "quality": table}, indent=1) + "\n")
    store.write_sums(folder)
    return path


def markdown(table: dict[str, Any]) -> str:
    """The table as people read it."""
    lines = ["| measure | value | gate | goal | what it says |", "|---|---|---|---|---|"]
    for row in table["rows"]:
        mark = "" if row["gate"] is None else " ✓" if row["passed"] else " ✗"

        def number(value: float | None, unit: str = row["unit"]) -> str:
            return "" if value is None else f"{value:.4g} {unit}"

        cells = [
            row["metric"],
            number(round(row["value"], 1)) + mark,
            number(row["gate"]),
            number(row["goal"]),
        ]
        lines.append(f"| {' | '.join([*cells, row['note']])} |")
    asked = f"{table['prompts']} {table.get('of', 'held-out prompts')}"
    settings = f"{asked}, {table['steps']} steps, guidance {table['guidance']}"
    return f"`{table['model']}`, {settings}\n\n" + "\n".join(lines) + "\n"


def to_json(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=1)
