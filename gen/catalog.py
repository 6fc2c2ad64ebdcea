"""The table of models, the one place where a model is added: command line, page, API and tests follow the
row.

Pipelines are named by string and imported only when the model runs, so that `gen list` starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gen import adapters, prompts
from gen.errors import GenError, did_you_mean
from gen.request import Input
from weights import added, registry, store


class Tags(Mapping[str, str]):
    """Tag -> key of a model's weights, best first, with what `gen add` has added: that shows at once."""

    def __init__(self, model: str, published: Mapping[str, str]) -> None:
        self.model = model
        self.published: Mapping[str, str] = published

    def all(self) -> dict[str, str]:
        """Raises corrupt_weights for a damaged table."""
        try:
            return added.tags(self.model, self.published)
        except store.CorruptWeights as error:
            message = f"The table of added weights is damaged: {error}."
            hint = "Move it away, and add the weights again: gen add PATH"
            raise GenError(message, hint, "corrupt_weights") from error

    def __getitem__(self, tag: str) -> str:
        return self.published[tag] if tag in self.published else self.all()[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row: a method, the weights it can run with, and the values it takes."""

    name: str  # what people type
    summary: str  # one line for `gen list`, the page and the API
    pipeline: str  # "module:Class"
    weights: Mapping[str, str]  # tag -> key of weights.registry, best first; becomes Tags
    makes: str  # a key of gen.outputs.OUTPUTS
    inputs: tuple[Input, ...]  # in the order of the form
    savers: bool = False  # whether its pipeline can leave work out: see pipelines.step_savers

    def __post_init__(self) -> None:
        published = self.weights.published if isinstance(self.weights, Tags) else self.weights
        object.__setattr__(self, "weights", Tags(self.name, published))

    @property
    def subject(self) -> str:
        """Name of the input that says what is to be seen: the first required one."""
        return next(one.name for one in self.inputs if one.required)

    def checkpoint(self, tag: str) -> registry.Checkpoint:
        return store.checkpoint(self.weights[tag])

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
            filled["label"] = {"choices": _classes(folder) if folder else ()}
        if any(one.kind == "lora" for one in self.inputs):
            filled["lora"] = {"choices": adapters.names()}
        return tuple(
            _walked(replace(one, **filled[one.kind]) if one.kind in filled else one, facts.walk)
            for one in map(_styled, self.inputs)
        )


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        return store.class_names(folder)
    except store.CorruptWeights:
        return ()  # looking around goes on; a request is told


def _walked(one: Input, walk: str) -> Input:
    """With what the weights' own scheduler means, the one called default, filled in."""
    if one.by_walk is None:
        return one
    return replace(one, by_walk={**one.by_walk, "default": one.by_walk[walk]})


def _styled(one: Input) -> Input:
    """With the styles that are on this machine."""
    return replace(one, choices=prompts.style_names()) if one.name == "style" else one


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
STYLE = Input(
    name="style",
    kind="choice",
    label="Style",
    help="words around the prompts, ours or those of GEN_HOME/styles.json; `gen prompts` lists them",
    argument="",
    default=prompts.NO_STYLE,
    choices=(prompts.NO_STYLE, *prompts.STYLES),
    advanced=True,
)
LONG_PROMPT = Input(
    name="long_prompt",
    kind="choice",
    label="Long prompt",
    help="what is longer than the model reads: cut, or read in chunks, which no model was trained on",
    argument="long_prompt",
    default="cut",
    choices=("cut", "chunks"),  # as in pipelines.prompts
    advanced=True,
)
PROMPT_SYNTAX = Input(
    name="prompt_syntax",
    kind="choice",
    label="Prompt syntax",
    help="whether (words:1.3), [a|b], [a:b:0.5] and __wildcards__ mean something; off: they are text",
    argument="prompt_syntax",
    default="on",
    choices=("on", "off"),
    advanced=True,
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
# As pipelines.pixart_delta has them, which loads torch; a test compares.
DISTILLED_STEPS = {"": 20, "lcm": 4, "lcm-diffusers": 4, "one-step": 1}
DISTILLED_GUIDANCE = {"": 4.5, "lcm": 1.0, "lcm-diffusers": 1.0, "one-step": 1.0}
GUIDANCE_CHANNELS = Input(
    name="guidance_channels",
    kind="integer",
    label="Guidance channels",
    help="of the noise, from the first, those that guidance moves; left out, all. The published code: 3",
    argument="guidance_channels",
    minimum=1,
    maximum=4,
    step=1,
    advanced=True,
)
MICRO_RATIO = Input(
    name="micro_ratio",
    kind="choice",
    label="Aspect ratio told",
    help="to networks that read it: exact, or as published that of the nearest bin",
    argument="micro_ratio",
    default="exact",
    choices=("exact", "bin"),
    advanced=True,
)
CONTROL_IMAGE = Input(
    name="control_image",
    kind="image",
    label="Control image",
    help="a picture whose edges the drawing follows",
    argument="control_image",
    needs={"": "controlnet"},
)
CONTROL_KIND = Input(
    name="control_kind",
    kind="choice",
    label="Control kind",
    help="how edges are found: soft or hard lines, HED where its weights are; edges: it shows edges already",
    argument="control_kind",
    default="soft",
    choices=("soft", "hed", "canny", "edges"),
    only_with="control_image",
    needs={"hed": "hed"},
)
CONTROL_SCALE = Input(
    name="control_scale",
    kind="number",
    label="Control scale",
    help="how strictly to follow the edges; 0 is not at all",
    argument="controlnet_conditioning_scale",
    default=1.0,
    minimum=0,
    maximum=2,
    step=0.05,
    only_with="control_image",
)
CONTROL_START = Input(
    name="control_start",
    kind="number",
    label="Control start",
    help="the part of the steps after which the edges count",
    argument="control_guidance_start",
    default=0.0,
    minimum=0,
    maximum=1,
    step=0.05,
    only_with="control_image",
    advanced=True,
)
CONTROL_END = replace(
    CONTROL_START,
    name="control_end",
    label="Control end",
    help="the part of the steps after which the edges count no more",
    argument="control_guidance_end",
    default=1.0,
)
LORA = Input(
    name="lora",
    kind="lora",
    label="LoRA",
    help="low-rank changes merged into the weights: NAME or NAME=SCALE, of `gen lora list`, or a path",
    argument="",
    advanced=True,
)
LORA_SCALE = Input(
    name="lora_scale",
    kind="number",
    label="LoRA scale",
    help="how much of the LoRA to add; of several, how much of all of them",
    argument="",
    default=1.0,
    minimum=0,
    maximum=2,
    step=0.05,
    only_with="lora",
    advanced=True,
)
IMAGE = Input(
    name="image",
    kind="image",
    label="Image",
    help="a picture to start from; strength says how much of it is drawn anew",
    argument="image",
)
STRENGTH = Input(
    name="strength",
    kind="number",
    label="Strength",
    help="how much to change the image: the part of the steps that is walked; 1 keeps nothing of it",
    argument="strength",
    default=0.6,
    minimum=0,
    maximum=1,
    step=0.05,
    only_with="image",
)
MASK = Input(
    name="mask",
    kind="mask",
    label="Mask",
    help="what to draw anew, in white on black and as large as the image; the rest stays as it is",
    argument="mask_image",
    only_with="image",
)
MASK_BLUR = Input(
    name="mask_blur",
    kind="integer",
    label="Mask blur",
    help="pixels over which the mask's edge is feathered, on either side of it",
    argument="mask_blur",
    default=4,
    minimum=0,
    maximum=256,
    step=1,
    only_with="image",
    advanced=True,
)
MASK_PADDING = Input(
    name="mask_padding",
    kind="integer",
    label="Mask padding",
    help="pixels around the mask: only that part is drawn, at full size; left out, all of the image",
    argument="padding_mask_crop",
    minimum=0,
    maximum=4096,
    step=1,
    only_with="image",
    advanced=True,
)
OUTPAINT = Input(
    name="outpaint",
    kind="sides",
    label="Outpaint",
    help="pixels by which the image grows, such as left=64,right=64; what is new is drawn",
    argument="outpaint",
    only_with="image",
    advanced=True,
)
HIRES = Input(
    name="hires",
    kind="number",
    label="Hires",
    help="enlarge what was drawn so many times, and refine it; left out, not at all",
    argument="hires",
    minimum=1,
    maximum=4,
    step=0.25,
    advanced=True,
)
HIRES_STRENGTH = replace(
    STRENGTH,
    name="hires_strength",
    label="Hires strength",
    help="how much refining may change: the part of the steps that is walked; take less for tiles",
    argument="hires_strength",
    default=0.3,
    only_with="hires",
    advanced=True,
)
HIRES_STEPS = Input(
    name="hires_steps",
    kind="integer",
    label="Hires steps",
    help="steps of which refining walks its part; left out, as many as steps",
    argument="hires_steps",
    minimum=1,
    maximum=1000,
    step=1,
    only_with="hires",
    advanced=True,
)
HIRES_TILE = Input(
    name="hires_tile",
    kind="integer",
    label="Hires tile",
    help="pixels per side of overlapping tiles to refine in; left out, none up to twice the weights' size",
    argument="hires_tile",
    minimum=64,
    maximum=4096,
    step=16,
    only_with="hires",
    advanced=True,
)
HIRES_UPSCALE = Input(
    name="hires_upscale",
    kind="choice",
    label="Hires upscale",
    help="what is enlarged: the decoded pixels, or the latents, which need more strength",
    argument="hires_upscale",
    default="pixels",
    choices=("pixels", "latents"),
    only_with="hires",
    advanced=True,
)
PICTURE_INPUTS = (IMAGE, STRENGTH, MASK)
PICTURE_INPUTS_MORE = (
    MASK_BLUR,
    MASK_PADDING,
    OUTPAINT,
    HIRES,
    HIRES_STRENGTH,
    HIRES_STEPS,
    HIRES_TILE,
    HIRES_UPSCALE,
)
CLASS_LABEL = Input(
    name="class_label",
    kind="label",
    label="Class",
    help="what to draw, one of the classes the weights know; by name or by number",
    argument="class_labels",
    required=True,
)
POINTS = Input(
    name="points",
    kind="integer",
    label="Points",
    help="of the cloud; each is drawn with all others in view, and more take longer",
    argument="num_points",
    default=2048,
    minimum=16,
    maximum=16384,
    step=1,
)
FILES = Input(
    name="files",
    kind="choice",
    label="Files",
    help="beside the points and a picture: a closed mesh (seconds), a film of one turn (more seconds)",
    argument="",
    default="mesh",
    choices=("points", "mesh", "film", "all"),
)
KNOWN_POINTS = Input(
    name="known_points",
    kind="points",
    label="Known points",
    help="points that stay, the rest is drawn around them: a PLY, GLB, OBJ, NPY or text file, y up",
    argument="",
    advanced=True,
)
KNOWN_PART = Input(
    name="known_part",
    kind="choice",
    label="Known part",
    help="what to keep of the file: all, or what lies on this side of the middle of its box",
    argument="",
    default="all",
    choices=("all", "left", "right", "bottom", "top", "back", "front"),
    only_with="known_points",
    advanced=True,
)
KNOWN_FIT = Input(
    name="known_fit",
    kind="choice",
    label="Known fit",
    help="how the file is brought to the size of what was learnt: by its box, as it is, or as seems right",
    argument="",
    default="auto",
    choices=("auto", "as-is", "box"),
    only_with="known_points",
    advanced=True,
)
SECOND_SEED = Input(
    name="second_seed",
    kind="seed",
    label="Second seed",
    help="draw clouds on the way from the seed's to this one's: as many as count says, evenly spread",
    argument="",
    advanced=True,
)
BLEND = Input(
    name="blend",
    kind="number",
    label="Blend",
    help="one place between the seeds, 0 at the first, 1 at the second; left out, a single one is halfway",
    argument="",
    minimum=0,
    maximum=1,
    step=0.05,
    only_with="second_seed",
    advanced=True,
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
        savers=True,
        makes="image",
        inputs=(
            PROMPT,
            NEGATIVE_PROMPT,
            STYLE,
            WIDTH,
            HEIGHT,
            STEPS,
            GUIDANCE,
            *PICTURE_INPUTS,
            SEED,
            COUNT,
            SCHEDULER,
            NULL_CAPTION,
            LONG_PROMPT,
            PROMPT_SYNTAX,
            LORA,
            LORA_SCALE,
            *PICTURE_INPUTS_MORE,
        ),
    ),
    Model(
        name="pixart-delta",
        summary="Text to image in a few steps: PixArt-delta, distilled PixArt, with edges to follow",
        pipeline="pipelines.pixart_delta:PixArtDeltaPipeline",
        weights={
            "1024": "pixart-delta-xl-1024",
            "control": "pixart-delta-control-1024",
            "alpha": "pixart-alpha-xl-1024",
            "dmd": "pixart-alpha-dmd-512",
            "toy": "pixart-delta-toy",
        },
        savers=True,
        makes="image",
        inputs=(
            PROMPT,
            CONTROL_IMAGE,
            CONTROL_KIND,
            CONTROL_SCALE,
            replace(NEGATIVE_PROMPT, help="what to keep out of the picture; counts only with guidance"),
            STYLE,
            WIDTH,
            HEIGHT,
            replace(STEPS, default=None, by_walk=DISTILLED_STEPS),
            replace(GUIDANCE, default=None, by_walk=DISTILLED_GUIDANCE),
            *PICTURE_INPUTS,
            SEED,
            COUNT,
            replace(SCHEDULER, choices=(*(SCHEDULER.choices or ()), *filter(None, DISTILLED_STEPS))),
            NULL_CAPTION,
            LONG_PROMPT,
            PROMPT_SYNTAX,
            CONTROL_START,
            CONTROL_END,
            MICRO_RATIO,
            LORA,
            LORA_SCALE,
            *PICTURE_INPUTS_MORE,
        ),
    ),
    Model(
        name="dit",
        summary="Class to image: DiT, the diffusion transformer that the others grew from",
        pipeline="pipelines.dit:DiTPipeline",
        weights={"512": "dit-xl-512", "256": "dit-xl-256", "toy": "dit-toy"},
        savers=True,
        makes="image",
        inputs=(
            CLASS_LABEL,
            replace(STEPS, default=50, maximum=1000),
            replace(GUIDANCE, help="how clearly to show the class; 1 is no guidance", default=4.0),
            SEED,
            COUNT,
            replace(SCHEDULER, choices=(*(SCHEDULER.choices or ()), "learned-range")),
            GUIDANCE_CHANNELS,
            LORA,
            LORA_SCALE,
        ),
    ),
    Model(
        name="dit-3d",
        summary="Class to shape: DiT-3D, a diffusion transformer over voxels that draws clouds of points",
        pipeline="pipelines.dit3d:DiT3DPipeline",
        weights={"own": "dit-3d", "toy": "dit-3d-toy"},
        makes="cloud",
        inputs=(
            replace(
                CLASS_LABEL, help="what to make, one of the classes the weights know; by name or by number"
            ),
            POINTS,
            replace(STEPS, default=50, maximum=1000),
            replace(GUIDANCE, help="how clearly to show the class; 1 is no guidance", default=1.0),
            FILES,
            replace(SEED, help="same seed, same cloud; left out, one is drawn and told"),
            replace(COUNT, help="clouds to draw, with seeds counting up"),
            SCHEDULER,
            KNOWN_POINTS,
            KNOWN_PART,
            KNOWN_FIT,
            SECOND_SEED,
            BLEND,
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
    """The tag asked for, else the best installed one, with its facts and folder. Raises not_installed.

    A published checkpoint of several repositories is put together here; that may raise corrupt_weights,
    disk_full, output_not_writable.
    """
    for candidate in (tag,) if tag else row.weights:
        key = row.weights[candidate]
        if store.find(key) is None:
            continue
        try:
            folder = store.prepare(key)
            _check_family(row, candidate, folder)
            return candidate, row.checkpoint(candidate), folder
        except store.CorruptWeights as error:
            message = f"The weights {row.name}:{candidate} are damaged: {error}."
            again = f"If it is meant to be so: gen rm {row.name}:{candidate}, then gen add it again."
            hint = again
            if key in registry.CHECKPOINTS:
                mend = f"Have damaged files pulled again: gen verify {row.name}:{candidate} --repair"
                hint = mend if row.checkpoint(candidate).repo_id else "Fetch them again."
            raise GenError(message, hint, "corrupt_weights") from error
        except OSError as error:
            from gen import library

            raise library.disk_error(error, library.home()) from error
    if tag is None:
        recipe = next((facts.recipe for facts in map(row.checkpoint, row.weights) if facts.is_toy), "")
        raise GenError(
            f"No weights of {row.name} are on this machine.",
            f"Train small ones (gen train {recipe}), or get published ones: gen show {row.name}",
            "not_installed",
        )
    if row.weights[tag] not in registry.CHECKPOINTS:
        raise _gone(added.row(row.weights[tag]))
    facts, parts = row.checkpoint(tag), store.lacking(row.weights[tag])
    own = f"The weights {row.name}:{tag} are not on this machine."
    if facts.repo_id and "transformer" not in parts:
        raise GenError(
            f"The weights {row.name}:{tag} are on this machine without their {_and(parts)}.",
            f"{facts.repo_id} holds the transformer alone; the rest comes from another repository. Get it: "
            f"gen pull {row.name}:{tag}",
            "not_installed",
        )
    raise GenError(
        own,
        f"Take installed ones (`gen list` marks them), or get these first: {_way(facts)}",
        "not_installed",
    )


def _gone(one: added.Added) -> GenError:
    """The error for added weights of which something is where it was no more."""
    parts = added.lacking(one)
    if "transformer" in parts:
        back = f"Put it back, or forget it and add it anew: gen rm {one.reference}, gen add PATH"
        return GenError(f"{one.path}, added as {one.reference}, is no longer there.", back, "not_installed")
    home = one.companion or one.base
    return GenError(
        f"{one.reference} is a transformer alone, and its {_and(parts)} of {home} are no longer there.",
        f"Get them again, or add it with others: gen rm {one.reference}, gen add {one.path} --with FOLDER",
        "not_installed",
    )


def _check_family(row: Model, tag: str, folder: Path) -> None:
    """Another family's checkpoint in the place of these weights is told before a value is judged by it."""
    own = row.pipeline.rpartition(":")[2]
    known = {own, *(row.checkpoint(one).pipeline for one in row.weights)}
    if (found := store.family(folder)) and found not in known:
        raise GenError(
            f"{folder} holds a {found}, and {row.name}:{tag} is a {' or '.join(sorted(known))}.",
            "Another checkpoint lies in this folder: put the right one there, or see `gen list` for others.",
            "corrupt_weights",
        )


def _way(facts: registry.Checkpoint) -> str:
    """The commands by which a checkpoint comes to this machine."""
    if not facts.repo_id and facts.family:  # published outside of any hub, or one's own
        place = f"--output $GEN_WEIGHTS_DIR/{facts.folder}"
        unset = "" if os.environ.get("GEN_WEIGHTS_DIR") else "; set GEN_WEIGHTS_DIR to a folder of yours"
        return (
            f"gen convert FILE --as {facts.family} {place}, or gen train {facts.recipe} --data FOLDER {place}"
            + unset
        )
    if not facts.repo_id:
        return f"gen train {facts.recipe}"
    names = {key: f"{row.name}:{tag}" for row in MODELS.values() for tag, key in row.weights.items()}
    fetch = f"gen pull {names.get(facts.key, facts.key)}"
    if not facts.family:
        return fetch
    return f"{fetch}, then gen convert FILE --as {facts.family} --output $GEN_WEIGHTS_DIR/{facts.key}"


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def published(row: Model) -> Mapping[str, str]:
    """Tag -> key of the weights that the registry knows, without what was added."""
    assert isinstance(row.weights, Tags)
    return row.weights.published


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
