"""Toy scenes in words: the caption grammar, and what each caption says.

Synonyms, articles, word order and how much is told vary; what is told is always true of the scene.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from gen.toy.world import Scene, Thing

SHAPE_WORDS = {
    "sphere": ("sphere", "ball", "sphere", "ball", "orb", "globe"),
    "cube": ("cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "can", "drum"),
    "cone": ("cone",),
    "torus": ("torus", "ring", "donut", "torus", "doughnut"),
    "pyramid": ("pyramid",),
    "capsule": ("capsule", "capsule", "pill"),
    "diamond": ("diamond", "diamond", "octahedron", "gem"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "green": ("green", "green", "green", "emerald"),
    "cyan": ("cyan", "cyan", "turquoise", "teal"),
    "blue": ("blue", "blue", "blue", "navy"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose"),
    "brown": ("brown", "brown", "chocolate"),
    "white": ("white", "white", "ivory"),
    "black": ("black", "black", "ebony"),
}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "large", "big", "huge"),
}
MATERIAL_WORDS = {
    "matte": ("matte", "matte", "dull", "rubber", "matt"),
    "shiny": ("shiny", "metallic", "glossy", "metal", "polished"),
}
BACKGROUND_WORDS = {
    "grey": ("grey", "gray", "light grey"),
    "beige": ("beige", "sand-coloured", "cream"),
    "blue": ("blue", "sky blue", "pale blue"),
    "green": ("green", "pale green", "mint green"),
    "lavender": ("lavender", "lilac", "purple"),
    "dark": ("dark", "black", "night"),
}
RELATION_WORDS = {
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left of {b}",
        "{a} and {b}",
        "{a} next to {b}",
        "{a} on the left and {b} on the right",
        "on the left {a}, on the right {b}",
        "{a} on the left side of {b}",
        "left of {b} is {a}",
        "to the left of {b} there is {a}",
        "{a} beside {b}",
    ),
    "right of": (
        "{a} to the right of {b}",
        "{a} right of {b}",
        "{a} on the right of {b}",
        "{a} on the right and {b} on the left",
        "on the right {a}, on the left {b}",
        "{a} on the right side of {b}",
        "right of {b} is {a}",
        "to the right of {b} there is {a}",
    ),
    "in front of": (
        "{a} in front of {b}",
        "{a} before {b}",
        "in front of {b} there is {a}",
        "{a} standing in front of {b}",
        "in front of {b} is {a}",
        "{a} in the foreground and {b} in the background",
    ),
    "behind": (
        "{a} behind {b}",
        "{a} standing behind {b}",
        "behind {b} there is {a}",
        "behind {b} is {a}",
        "{a} at the back of {b}",
        "{a} in back of {b}",
    ),
    "on top of": (
        "{a} on top of {b}",
        "{a} on {b}",
        "{a} above {b}",
        "{a} standing on {b}",
        "on top of {b} there is {a}",
        "{b} under {a}",
        "{b} below {a}",
        "{a} stacked on {b}",
        "{b} with {a} on top",
    ),
    "row": (
        "{a}, {b} and {c}",
        "{a}, {b}, and {c}",
        "from left to right {a}, {b} and {c}",
        "a row of {a}, {b} and {c}",
        "{a}, {b}, {c}",
        "{a} next to {b} next to {c}",
        "{a}, then {b}, then {c}",
        "{b} between {a} and {c}",
        "{a} left of {b} and {c} right of {b2}",
    ),
}
OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "a photo of ",
    "an image of ",
    "a render of ",
    "there is ",
    "a 3d render of ",
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence and what it says: None where it leaves an attribute open. Things are in the scene's
    order."""

    text: str
    relation: str
    things: tuple[dict[str, str | None], ...] = field(default=())
    background: str | None = None


def _phrase(
    thing: Thing, rng: random.Random, detail: float, article: bool
) -> tuple[str, dict[str, str | None]]:
    size = rng.choice(SIZE_WORDS[thing.size]) if rng.random() < detail else None
    material = rng.choice(MATERIAL_WORDS[thing.material]) if rng.random() < detail else None
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    extras = [w for w in (size, material) if w]
    if len(extras) == 2 and rng.random() < 0.25:
        extras.reverse()
    form = rng.random()
    if form < 0.88:
        words = [*extras, colour, shape]
    elif form < 0.94:  # "a cube that is red"
        words = [*extras, shape, "that is", colour]
    else:  # "a red small cube"
        words = [colour, *extras, shape]
    text = " ".join(words)
    if article:
        start = rng.random()
        text = (
            f"the {text}"
            if start < 0.08
            else f"one {text}"
            if start < 0.12
            else f"a{'n' if text[0] in 'aeiou' else ''} {text}"
        )
    said = {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size if size else None,
        "material": thing.material if material else None,
    }
    return text, said


def describe(scene: Scene, rng: random.Random) -> Caption:
    """The scene in words: synonyms, articles, word order and how much is said vary with `rng`."""
    detail = rng.choice((0.0, 0.0, 0.3, 0.6, 1.0))
    article = rng.random() < 0.92
    phrases, said = zip(*(_phrase(t, rng, detail, article) for t in scene.things), strict=True)
    if scene.relation == "alone":
        text = phrases[0]
    else:
        names = dict(zip("abc", phrases, strict=False))
        text = rng.choice(RELATION_WORDS[scene.relation]).format(
            **names, b2="it" if rng.random() < 0.5 else names["b"]
        )
    opening = rng.choice(OPENINGS)
    if not (opening == "there is " and ("there is" in text or " is " in text)):
        text = opening + text
    background = None
    if rng.random() < 0.3:
        word = rng.choice(BACKGROUND_WORDS[scene.background])
        article_b = "an" if word[0] in "aeiou" else "a"
        background = scene.background
        text += rng.choice(
            (
                f" on {article_b} {word} background",
                f" on {article_b} {word} ground",
                f", {word} background",
                f" against {article_b} {word} background",
                f" on {article_b} {word} floor",
            )
        )
    return Caption(text=text, relation=scene.relation, things=said, background=background)
