"""The table of models, the one place where a model is added: command line, page, API and tests follow the
row.

Pipelines are named by string and imported only when the model runs, so that `gen list` starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gen.errors import GenError, did_you_mean
from gen.request import Input
from weights import registry, store


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row: a method, the weights it can run with, and the values it takes."""

    name: str  # what people type
    summary: str  # one line for `gen list`, the page and the API
    pipeline: str  # "module:Class"
    weights: Mapping[str, str]  # tag -> key of weights.registry, best first
    makes: str  # "image"
    inputs: tuple[Input, ...]  # in the order of the form
    max_tokens: int = 0  # of the prompt; what goes beyond is cut, and said. 0: takes no text

    @property
    def subject(self) -> str:
        """Name of the input that says what is to be seen: the first required one."""
        return next(one.name for one in self.inputs if one.required)

    def checkpoint(self, tag: str) -> registry.Checkpoint:
        return registry.CHECKPOINTS[self.weights[tag]]

    def inputs_for(self, tag: str) -> tuple[Input, ...]:
        """`inputs` with the limits and defaults that depend on the weights filled in."""
        facts = self.checkpoint(tag)
        sized: dict[str, Any] = {
            "default": facts.native_size,
            "minimum": facts.smallest,
            "maximum": facts.largest,
            "step": facts.size_multiple,
        }
        filled = {"size": sized}
        if any(one.kind == "label" for one in self.inputs):
            folder = store.find(self.weights[tag])
            filled["label"] = {"choices": store.class_names(folder) if folder else ()}
        return tuple(replace(one, **filled[one.kind]) if one.kind in filled else one for one in self.inputs)


PROMPT = Input(
    name="prompt",
    kind="text",
    label="Prompt",
    help="what to draw",
    argument="prompt",
    required=True,
)
NEGATIVE_PROMPT = Input(
    name="negative_prompt",
    kind="text",
    label="Negative prompt",
    help="what to keep out of the picture",
    argument="negative_prompt",
    default="",
)
WIDTH = Input(
    name="width", kind="size", label="Width", help="pixels, default the weights' own size", argument="width"
)
HEIGHT = replace(WIDTH, name="height", label="Height", argument="height")
STEPS = Input(
    name="steps",
    kind="integer",
    label="Steps",
    help="denoising steps; more is slower and up to a point better",
    argument="num_inference_steps",
    default=20,
    minimum=1,
    maximum=200,
    step=1,
)
GUIDANCE = Input(
    name="guidance",
    kind="number",
    label="Guidance",
    help="how closely to follow the prompt; 1 is no guidance",
    argument="guidance_scale",
    default=4.5,
    minimum=1,
    maximum=30,
    step=0.1,
)
SCHEDULER = Input(
    name="scheduler",
    kind="choice",
    label="Scheduler",
    help="how to walk from noise to picture; default is the one that came with the weights",
    argument="scheduler",
    default="default",
    choices=("default", "dpm++", "dpm++-official", "ddim", "ddpm", "euler", "unipc", "sa"),
    advanced=True,
)
NULL_CAPTION = Input(
    name="null_caption",
    kind="choice",
    label="Null caption",
    help="over how many tokens the negative prompt is read: its own, or as published the prompt's",
    argument="null_caption",
    default="own",
    choices=("own", "prompt"),
    advanced=True,
)
CLASS_LABEL = Input(
    name="class_label",
    kind="label",
    label="Class",
    help="what to draw, one of the classes the weights know; by name or by number",
    argument="class_labels",
    required=True,
)
SEED = Input(
    name="seed",
    kind="seed",
    label="Seed",
    help="same seed, same picture; left out, one is drawn and told",
    argument="",
)
COUNT = Input(
    name="count",
    kind="integer",
    label="Count",
    help="pictures to draw, with seeds counting up",
    argument="",
    default=1,
    minimum=1,
    maximum=64,
    step=1,
)


def index(*rows: Model) -> dict[str, Model]:
    """By name; a name that stands twice is a mistake in the table."""
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "two models have the same name"
    return table


MODELS = index(
    Model(
        name="pixart-sigma",
        summary="Text to image: PixArt-Sigma, a diffusion transformer guided by a T5 text encoder",
        pipeline="pipelines.pixart_sigma:PixArtSigmaPipeline",
        weights={
            "1024": "pixart-sigma-xl-1024",
            "2k": "pixart-sigma-xl-2k",
            "512": "pixart-sigma-xl-512",
            "256": "pixart-sigma-xl-256",
            "toy": "pixart-sigma-toy",
        },
        makes="image",
        inputs=(
            PROMPT,
            NEGATIVE_PROMPT,
            WIDTH,
            HEIGHT,
            STEPS,
            GUIDANCE,
            SEED,
            COUNT,
            SCHEDULER,
            NULL_CAPTION,
        ),
        max_tokens=300,
    ),
    Model(
        name="dit",
        summary="Class to image: DiT, the diffusion transformer that the others grew from",
        pipeline="pipelines.dit:DiTPipeline",
        weights={"512": "dit-xl-512", "256": "dit-xl-256", "toy": "dit-toy"},
        makes="image",
        inputs=(
            CLASS_LABEL,
            replace(STEPS, default=50, maximum=1000),
            replace(GUIDANCE, help="how clearly to show the class; 1 is no guidance", default=4.0),
            SEED,
            COUNT,
            replace(SCHEDULER, choices=(*(SCHEDULER.choices or ()), "learned-range")),
        ),
    ),
)


def find(reference: str) -> tuple[Model, str | None]:
    """`pixart-sigma:toy` -> its row and the tag; the tag is None when the reference names none."""
    name, colon, tag = reference.partition(":")
    row = MODELS.get(name)
    if row is None:
        known = f"The models are {', '.join(MODELS)}; `gen list` shows them."
        raise GenError(f"No model '{name[:60]}'.", did_you_mean(name[:60], MODELS) or known, "unknown_model")
    if colon and tag not in row.weights:
        known = f"Its weights are {', '.join(row.weights)}; `gen show {name}` tells more."
        raise GenError(
            f"{name} has no weights '{tag[:60]}'.",
            did_you_mean(tag[:60], row.weights) or known,
            "unknown_model",
        )
    return row, tag or None


def choose(row: Model, tag: str | None) -> tuple[str, registry.Checkpoint, Path]:
    """The tag asked for, else the best installed one, with its facts and folder. Raises not_installed."""
    for candidate in (tag,) if tag else row.weights:
        folder = store.find(row.weights[candidate])
        if folder is not None:
            return candidate, row.checkpoint(candidate), folder
    if tag is None:
        recipe = next((facts.recipe for facts in map(row.checkpoint, row.weights) if facts.recipe), "")
        raise GenError(
            f"No weights of {row.name} are on this machine.",
            f"Train small ones (gen train {recipe}), or get published ones: gen show {row.name}",
            "not_installed",
        )
    facts = row.checkpoint(tag)
    how = f"hf download {facts.repo_id}" if facts.repo_id else f"gen train {facts.recipe}"
    raise GenError(
        f"The weights {row.name}:{tag} are not on this machine.",
        f"Take installed ones (`gen list` marks them), or get these first: {how}",
        "not_installed",
    )


def installed(row: Model) -> list[str]:
    """The tags whose weights are on this machine, best first."""
    return [tag for tag, key in row.weights.items() if store.find(key) is not None]


def not_taken(row: Model, name: str) -> GenError:
    """The error for an option that this model does not have; names the models that do."""
    name = str(name)[:60]  # a stranger's JSON may hold anything
    names = [one.name for one in row.inputs]
    takers = [other.name for other in MODELS.values() if name in (one.name for one in other.inputs)]
    hint = (
        f"Models that take it: {', '.join(takers)}."
        if takers
        else did_you_mean(name, names) or f"It takes {', '.join(names)}."
    )
    return GenError(f"{row.name} takes no option '{name}'.", hint, "unknown_option")
