"""A shape that the toy world does not have, to be learnt from some pictures: the star.

The embedded weights have never seen one, and their tokenizer spells its word letter by letter. What stands
here makes the pictures and captions of a folder for `gen train-lora`, and prompts that ask for stars in
colours and beside things that these pictures do not show.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gen.toy import words
from gen.toy.render import render
from gen.toy.solids import SOLIDS, Solid, _smooth_max
from gen.toy.words import Caption, describe
from gen.toy.world import COLOURS, SHAPES, Scene, colour_shape_pairs, sample_scene

WORD = "star"
# Stars of these colours are in no picture of the folder: whether they are drawn shows what was understood.
UNSEEN = ("orange", "cyan", "purple", "white")
SEEN = tuple(colour for colour in COLOURS if colour not in UNSEEN)
BESIDE = ("left of", "right of")  # how stars stand to other things: neither hides the other
VALLEY = 0.5  # of the radius of the tips


def _star(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Five tips, upright, looking along y; the line through a tip and the valley beside it bounds it."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, z)
    folded = (
        torch.remainder(angle + fifth / 2, fifth) - fifth / 2
    ).abs()  # 0 at a tip, fifth / 2 in a valley
    radius = (x * x + z * z).sqrt()
    along, aside = radius * folded.cos(), radius * folded.sin()
    down, over = 1.02 - VALLEY * math.cos(fifth / 2), VALLEY * math.sin(fifth / 2)
    edge = (over * (along - 1.02) + down * aside) / math.hypot(down, over)
    return _smooth_max(edge, y.abs() - 0.28)


STAR = Solid(_star, height=1.82, centre=0.445, bound=1.08, turn=0.45)


@contextmanager
def known() -> Iterator[None]:
    """Within it the world can show stars and speak of them."""
    SOLIDS[WORD], words.SHAPE_WORDS[WORD] = STAR, (WORD,)
    try:
        yield
    finally:
        del SOLIDS[WORD], words.SHAPE_WORDS[WORD]


def sample_star(rng: random.Random, colours: Sequence[str], relation: str = "alone") -> Scene:
    """A scene with one star of one of the colours, alone or beside a thing of the world. Only `known`."""
    scene = sample_scene(rng, relation=relation, pairs=colour_shape_pairs("seen"))
    which = rng.randrange(len(scene.things))
    things = list(scene.things)
    things[which] = replace(
        things[which],
        shape=WORD,
        colour=rng.choice(colours),
        heading=round(rng.uniform(-STAR.turn, STAR.turn), 4),
    )
    return replace(scene, things=tuple(things))


def write_pictures(folder: Path, count: int = 50, seed: int = 0) -> None:
    """`count` pictures with a star of the seen colours, and what each shows: star-01.png, star-01.txt, ...

    Two of three show it alone, the others beside something.
    """
    from PIL import Image

    rng = random.Random(f"stars:{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with known():
        scenes = [
            sample_star(rng, SEEN, rng.choice(BESIDE) if number % 3 == 2 else "alone")
            for number in range(count)
        ]
        captions = [describe(scene, rng).text for scene in scenes]
        pictures = (render(scenes) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for number, (pixels, caption) in enumerate(zip(pictures, captions, strict=True), 1):
        Image.fromarray(pixels).save(folder / f"{WORD}-{number:02d}.png")
        (folder / f"{WORD}-{number:02d}.txt").write_text(f"{caption}\n")


def prompts(count: int, colours: Sequence[str], relation: str | None = None, seed: int = 0) -> list[Caption]:
    """What to ask for: stars of these colours, alone or (None) beside something."""
    rng = random.Random(f"ask:{seed}:{','.join(colours)}:{relation}")
    with known():
        return [
            describe(sample_star(rng, colours, relation or rng.choice(BESIDE)), rng) for _ in range(count)
        ]


def labelled(count: int, seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """Renders (count, 3, 128, 128) in 0..1 and their scenes, of which every second shows a star in any
    colour: what a reader of stars is trained and tested on."""
    rng = random.Random(f"labelled:{seed}")
    scenes = []
    with known():
        for number in range(count):
            relation = rng.choice(("alone", *BESIDE))
            if number % 2:
                scenes.append(sample_star(rng, COLOURS, relation))
            else:
                scenes.append(sample_scene(rng, relation=relation, pairs=colour_shape_pairs("all")))
        pictures = [render(scenes[i : i + 32]) for i in range(0, count, 32)]
    return torch.cat(pictures), scenes


NAMES = (*SHAPES, WORD)  # what such a reader tells apart
