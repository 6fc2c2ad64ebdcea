"""Teach the embedded PixArt-Sigma a shape it does not have, and measure what it knows before and after.

    .venv/bin/python -m benchmarks.train_lora [--work FOLDER] [--count N] [--grid FILE.png] [--adapter FOLDER]

Makes 50 captioned pictures of stars (`gen.toy.lora_data`), trains an adapter with `gen.train_lora` as the
command does, and draws the same prompts with the same noise before and after: stars in colours of the 50,
stars in colours that none of them shows, stars beside other things, and the ordinary prompts of `gen
evaluate`. Those are read by the embedded judge, which knows no stars; the others by a copy of it that has
learnt nine shapes from renders. How often that is right about real pictures, as rendered and through the
autoencoder, stands beside the results: no drawing can be expected to score higher. Prints a Markdown table.
`--adapter` measures one that is there already.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.run import commit
from gen import evaluate, train_lora
from gen.optim import bfloat16_units
from gen.toy import lora_data
from gen.toy.judge import CELL, Judge, Seen, augment, load_judge, verdict
from gen.toy.words import Caption, describe
from gen.toy.world import COLOURS, MATERIALS, SHAPES, SIZES, Camera, Scene
from pipelines.lora import WEIGHTS, load_lora, merge
from pipelines.pixart_sigma import PixArtSigmaPipeline

MODEL = "pixart-sigma:toy"
STARS = 32  # prompts of each kind
ATTRIBUTES = {"shape": lora_data.NAMES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}
PARTS = {"there": 1, **{name: len(words) for name, words in ATTRIBUTES.items()}, "spot": 2, "place": 3}
NONSENSE = ("zebra", "quux", "rats", "lamp")  # other words that the tokenizer must spell


# ------------------------------------------------------------------------------------- who tells a star?


class Reader:
    """The embedded judge, and a copy of it that has learnt a ninth shape."""

    def __init__(self, judge: Judge, autoencoder: PixArtSigmaPipeline) -> None:
        self.judge, self.autoencoder = judge, autoencoder
        self.network = copy.deepcopy(judge.body)
        self.network[-1] = nn.Conv2d(192, sum(PARTS.values()), 1)
        with torch.no_grad():  # what it can already tell stays
            old, new = judge.body[-1], self.network[-1]
            keep = [n for n in range(new.out_channels) if n != 1 + len(SHAPES)]
            for to, of in ((new.weight, old.weight), (new.bias, old.bias)):
                to[keep] = of

    def learn(self, file: Path, count: int = 800, steps: int = 160) -> None:
        """From renders, half of which have been through the autoencoder; or from the last time's file."""
        if file.exists():
            self.network.load_state_dict(load_file(file))
            return
        pictures, scenes = lora_data.labelled(count, seed=1)
        half = count // 2
        pictures = torch.cat([pictures[:half], self.again(pictures[half:])])
        truth = _truth(scenes)
        rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        cooling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        for _ in range(steps):
            picks = torch.randperm(count, generator=rng)[:32]
            place = torch.full((count,), -1).scatter(0, picks, torch.arange(32))
            chosen = place[truth["scene"]] >= 0
            of = {name: values[chosen] for name, values in truth.items()}
            at = (place[of["scene"]], of["row"], of["column"])
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_units("cpu")):
                parts = {name: part.float() for name, part in self.parts(augment(pictures[picks])).items()}
            there = torch.zeros_like(parts["there"][:, 0])
            there[at] = 1
            logits = parts["there"][:, 0]
            hard = (there - logits.sigmoid()).detach().abs().square()
            loss = (
                2
                * (functional.binary_cross_entropy_with_logits(logits, there, reduction="none") * hard).sum()
            )
            loss = loss / there.sum()
            for name in ATTRIBUTES:
                loss = loss + functional.cross_entropy(parts[name].permute(0, 2, 3, 1)[at], of[name])
            for name in ("spot", "place"):
                loss = loss + functional.l1_loss(parts[name].permute(0, 2, 3, 1)[at], of[name])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cooling.step()
        save_file(self.network.state_dict(), file)

    def parts(self, pictures: Tensor) -> dict[str, Tensor]:
        answers = self.network(pictures * 2 - 1)
        return dict(zip(PARTS, answers.split(list(PARTS.values()), dim=1), strict=True))

    @torch.no_grad()
    def again(self, pictures: Tensor) -> Tensor:
        """Through the autoencoder."""
        vae = self.autoencoder.vae
        latents = torch.cat([vae.encode(some * 2 - 1)[0].mean for some in pictures.split(32)])
        return self.autoencoder.decode(latents * vae.config.scaling_factor, "pt")

    @torch.no_grad()
    def read(self, pictures: Tensor, threshold: float = 0.4, most: int = 3) -> list[list[Seen]]:
        """What is seen in each picture, as `gen.toy.judge.read` tells it, with shapes out of nine."""
        found = []
        for some in pictures.split(64):
            parts = self.parts(some)
            chance = parts["there"][:, 0].sigmoid()
            peaks = chance * (chance == functional.max_pool2d(chance[:, None], 3, 1, 1)[:, 0])
            for picture, peak in enumerate(peaks):
                best, where = peak.flatten().topk(most)
                seen = []
                for confidence, index in zip(best.tolist(), where.tolist(), strict=True):
                    if confidence < threshold:
                        break
                    row, column = divmod(index, 16)
                    cell = {name: values[picture, :, row, column] for name, values in parts.items()}
                    told = {name: words[int(cell[name].argmax())] for name, words in ATTRIBUTES.items()}
                    x, y = cell["spot"].tolist()
                    spot = ((column + x) * CELL, (row + y) * CELL)
                    place = tuple(cell["place"].tolist())
                    seen.append(Seen(**told, spot=spot, place=place, confidence=confidence))
                found.append(seen)
        return found


def _truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Of every thing: its scene, the cell of its centre, what it is, and where."""
    with lora_data.known():
        things = [(i, thing, thing.centre) for i, scene in enumerate(scenes) for thing in scene.things]
    place = torch.tensor([centre for _, _, centre in things])
    spots = Camera().project(place, 128)[:, :2].clamp(0, 127.9) / CELL
    cells = spots.long()
    return {
        "scene": torch.tensor([i for i, _, _ in things]),
        "row": cells[:, 1],
        "column": cells[:, 0],
        "spot": spots - cells,
        "place": place,
    } | {
        name: torch.tensor([words.index(getattr(thing, name)) for _, thing, _ in things])
        for name, words in ATTRIBUTES.items()
    }


# ------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts of one kind, and pictures of them."""

    name: str
    captions: list[Caption]


def groups() -> list[Group]:
    asked = lora_data.prompts
    return [
        Group(name="stars in colours of the 50", captions=asked(STARS, lora_data.SEEN, "alone")),
        Group(name="stars in other colours", captions=asked(STARS, lora_data.UNSEEN, "alone")),
        Group(name="stars beside something", captions=asked(STARS, COLOURS)),
    ]


def marks(reader: Reader, captions: Sequence[Caption], pictures: Tensor) -> tuple[float, float]:
    """Percentages of pictures with a star, and with everything that was said in its place."""
    seen = reader.read(pictures)
    stars = [any(one.shape == lora_data.WORD for one in found) for found in seen]
    right = [verdict(caption, found).placed for caption, found in zip(captions, seen, strict=True)]
    return 100 * sum(stars) / len(stars), 100 * sum(right) / len(right)


def measure(pipeline: PixArtSigmaPipeline, reader: Reader, count: int) -> tuple[dict[str, str], Tensor]:
    """The table's column, and pictures for the sheet: eight of each kind."""
    column, shown = {}, []
    for group in groups():
        texts = [caption.text for caption in group.captions]
        pictures = evaluate.draw(pipeline, texts, range(len(texts)))
        star, right = marks(reader, group.captions, pictures)
        column[group.name] = f"{right:.1f} %"
        column[f"{group.name}: a star at all"] = f"{star:.1f} %"
        shown.append(pictures[:8])
    asked = evaluate.prompts(count)
    pictures = evaluate.draw(pipeline, [one.text for one in asked], range(count))
    for name, value in evaluate.score_pictures(reader.judge, pictures, asked).items():
        column[name] = f"{value:.1f} %"
    column["ordinary prompts with a star"] = (
        f"{marks(reader, [one.caption for one in asked], pictures)[0]:.1f} %"
    )
    shown.append(pictures[:8])
    texts = [f"a {colour} {word}" for word in NONSENSE for colour in COLOURS[:8]]
    nonsense = evaluate.draw(pipeline, texts, range(len(texts)))
    stars = [any(one.shape == lora_data.WORD for one in found) for found in reader.read(nonsense)]
    column["other unknown words with a star"] = f"{100 * sum(stars) / len(stars):.1f} %"
    return column, torch.cat(shown)


def ceiling(reader: Reader, count: int = 200) -> list[str]:
    """How often the readers are right about real pictures."""
    import random

    pictures, scenes = lora_data.labelled(count, seed=2)
    with lora_data.known():
        captions = [describe(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    lines = []
    for name, shown in (("renders", pictures), ("renders through the autoencoder", reader.again(pictures))):
        seen = reader.read(shown)
        has = torch.tensor([any(one.shape == lora_data.WORD for one in found) for found in seen])
        true = torch.arange(count) % 2 == 1
        placed = torch.tensor(
            [verdict(caption, found).placed for caption, found in zip(captions, seen, strict=True)]
        )
        numbers = [100 * part.float().mean().item() for part in (has[true], has[~true], placed[true])]
        lines.append(
            f"{name}: a star is seen in {numbers[0]:.1f} % of {int(true.sum())} with one and in "
            f"{numbers[1]:.1f} % of those without; everything is read rightly in {numbers[2]:.1f} % of "
            "those with one"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for pictures and training, default a fresh one")
    parser.add_argument("--count", type=int, default=128, help="ordinary prompts")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", default="attn+ff")
    parser.add_argument("--keep-rest", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--grid", type=Path, help="where to save a sheet, before above after")
    parser.add_argument("--adapter", type=Path, help="measure this one instead of training one")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="train-lora-"))
    if given.threads:
        torch.set_num_threads(given.threads)

    adapter, minutes = given.adapter, 0.0
    if adapter is None:
        if not (work / "stars").exists():
            lora_data.write_pictures(work / "stars")
        os.environ.setdefault("GEN_TRAIN_DIR", str(work / "training"))
        plan = train_lora.Plan(
            rank=given.rank,
            layers=given.layers,
            steps=given.steps,
            batch=given.batch,
            learning_rate=given.learning_rate,
            keep_rest=given.keep_rest,
        )
        began = time.monotonic()
        adapter = train_lora.train(
            MODEL, work / "stars", work / "star-lora", plan, threads=given.threads, device="cpu"
        )
        minutes = (time.monotonic() - began) / 60

    folder = evaluate._embedded("pixart-sigma-toy")
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    reader = Reader(load_judge(evaluate._embedded("judge-toy")), pipeline)
    reader.learn(work / "reader.safetensors")
    real = ceiling(reader)
    before, pictures_before = measure(pipeline, reader, given.count)
    merge(pipeline.transformer, load_lora(adapter))
    after, pictures_after = measure(pipeline, reader, given.count)

    print(
        f"commit {commit()}, torch {version('torch')}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    if minutes:
        print(f"training: {minutes:.1f} minutes, with encoding and drawing what is kept")
    print(f"adapter: {(adapter / WEIGHTS).stat().st_size / 1e6:.2f} MB\n")
    print("\n".join(real) + "\n")
    print("| measure | before | after |\n|---|---|---|")
    for name, value in before.items():
        print(f"| {name} | {value} | {after[name]} |")
    if given.grid:
        asked = [caption.text for group in groups() for caption in group.captions[:8]]
        asked += [one.text for one in evaluate.prompts(8)]
        rows = [
            part
            for start in range(0, 32, 8)
            for part in (pictures_before[start : start + 8], pictures_after[start : start + 8])
        ]
        labels = [text for start in range(0, 32, 8) for text in asked[start : start + 8] * 2]
        evaluate.save_grid(torch.cat(rows), given.grid, columns=8, labels=labels)


if __name__ == "__main__":
    main()
