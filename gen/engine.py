"""run(request, settings): the only orchestration. Events out, files and library rows on the way.

The caller iterates; closing the iterator stops the run within one step and leaves nothing half-written.
Results of a request are drawn one by one, so that each is bit-equal to the single one of its seed. What
differs between pictures and other things is in gen.outputs.
"""

from __future__ import annotations

import bisect
import logging
import platform
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen import __version__, adapters, artifacts, catalog, library, loader, memory, outputs, pictures, prompts
from gen.errors import GenError
from gen.request import Event, Input, Request, Result, Settings

if TYPE_CHECKING:
    from weights.registry import Checkpoint

log = logging.getLogger(__name__)

SAVING_EVERY = 0.2  # seconds between the events of this stage: frames of a film follow each other fast


def run(request: Request, settings: Settings | None = None) -> Generator[Event, None, None]:
    """Make the results of the request. Yields Events (see there for the kinds), the last of kind "done".

    Raises GenError: not_installed, corrupt_weights, bad_input, output_not_writable, disk_full, out_of_memory,
    failed. What can be refused is refused before weights are loaded.
    """
    settings = settings or Settings()
    row, _ = catalog.find(request.model)
    tag, facts, folder = catalog.choose(row, request.weights)
    of = outputs.OUTPUTS[row.makes]
    singles = request.each()
    spoken = [_spoken(row, alone) for alone in singles]
    distinct = list({str(words): alone for words, alone in zip(spoken, singles, strict=True)}.values())
    width, height = (request.inputs.get(side, facts.native_size) for side in ("width", "height"))
    arguments = {one.argument: _argument(one, request.inputs[one.name]) for one in row.inputs if one.argument}
    if settings.saver:
        if not row.savers:
            raise GenError(f"{row.name} has no step savers.", "Leave --saver out.", "bad_input")
        arguments["savers"] = settings.saver
    room = of.bytes(request.inputs, width * height)
    given = of.given(request.inputs, folder)
    place = artifacts.prepare(settings.output, request.count, room, of)

    memory.forget_peak("cpu")
    started = time.perf_counter()
    note = f"{row.name}:{tag}" + (f" (TOY weights, {of.toy})" if facts.is_toy else "")
    yield Event(kind="stage", stage="loading", note=note, images=request.count)
    with _explained(request):
        loaded = loader.load(row, folder, settings, adapters.wanted(request.inputs))
        more = of.start(loaded.pipeline, request.inputs, request.seed, given)
        for alone in distinct:
            _check(loaded.pipeline, row, arguments | _spoken(row, alone) | more)
    loading = time.perf_counter() - started
    notes = (
        *dict.fromkeys(note for alone in distinct for note in _unread(loaded.pipeline, row, facts, alone)),
        *_idle(row, request),
        *(f"{one.label}: {words}." for one in row.inputs if (words := _changes(one, arguments))),
        *filter(None, [of.given_words(given)]),
        *dict.fromkeys(
            note
            for alone in distinct
            if facts.is_toy and not loaded.loras  # which may have taught it the word
            for note in _unknown(loaded.pipeline, row, alone)
        ),
        *adapters.remarks(request.inputs, facts),
        *_slow(loaded),
        *_unlike(settings),
    )
    for note in notes:
        yield Event(kind="note", note=note)

    results: list[Result] = []
    for image, alone in enumerate(singles):
        if asked := prompts.asked(request, alone):
            yield Event(kind="note", note=f'Prompt: "{_short(alone.subject)}"')
        drawing = _Drawing(of, alone, image, request.count, given, loading if image == 0 else 0.0)
        with _explained(request):
            yield from drawing.draw(
                loaded, arguments | spoken[image], facts, settings.preview, (height, width)
            )
        remarks = [of.lacks(drawing.thing)]
        entry = yield from drawing.saved(
            artifacts.saving(
                drawing.thing,
                settings.output,
                place,
                _entry(alone, facts, loaded, drawing, settings, folder, asked),
                of,
                remarks.append,
            )
        )
        for remark in filter(None, remarks):
            yield Event(kind="note", note=remark)
        result = Result(
            id=entry.id,
            path=entry.path,
            files=entry.paths,
            seed=alone.seed,
            width=entry.width,
            height=entry.height,
            seconds=entry.seconds,
            recipe=entry.recipe,
        )
        results.append(result)
        yield Event(kind="result", result=result, image=image, images=request.count)
    yield Event(kind="done", results=tuple(results), images=request.count)


class _Drawing:
    """One result on its way from noise to what it is, and the clock beside it."""

    def __init__(
        self, of: outputs.Output, request: Request, image: int, images: int, given: Any, loading: float
    ) -> None:
        self.of = of
        self.request = request  # for this one alone
        self.given = given
        self.image = image
        self.images = images
        self.seconds: dict[str, float] = {"loading": loading}
        self.thing: Any = None
        self.attention: dict[str, str] = {}  # functions that computed it
        self.in_tiles = False  # whether decoding went tile by tile, which changes pixels a little
        self._since = time.perf_counter()

    def stage(self, name: str) -> Event:
        return Event(kind="stage", stage=name, image=self.image, images=self.images)

    def draw(
        self,
        loaded: loader.Loaded,
        arguments: dict[str, Any],
        facts: Checkpoint,
        preview: bool,
        size: tuple[int, int],
    ) -> Iterator[Event]:
        """Events of the stages encoding, denoising and decoding; then `thing` is what was drawn."""
        import torch

        from pipelines import attention

        pipeline = loaded.pipeline
        if loaded.device == "cuda":
            memory.forget_peak(loaded.device)
        # Noise comes from the CPU's generator on every device, so that a seed means one result.
        seed = self.request.seed
        generator = torch.Generator("cpu").manual_seed(seed)
        arguments = arguments | self.of.start(pipeline, self.request.inputs, seed, self.given)
        yield self.stage("encoding")
        self._lap("")
        first = 0.0
        with closing(pipeline.denoise(**arguments, generator=generator)) as steps:
            for step in steps:
                now = time.perf_counter()
                if step.index == 0:
                    # The first step arrives together with the encoding; only the later ones can be timed.
                    self._lap("encoding")
                    first = now
                    yield self.stage("denoising")
                if not torch.isfinite(step.latents).all():
                    raise _not_finite(step, loaded)
                left = (now - first) / step.index * (step.count - step.index - 1) if step.index else None
                if left is not None:
                    left += (self.images - self.image - 1) * (now - first) / step.index * step.count
                yield Event(
                    kind="step",
                    index=step.index + 1,
                    count=step.count,
                    image=self.image,
                    images=self.images,
                    eta_seconds=left,
                    preview=self.of.preview(pipeline, step) if preview else None,
                )
        self._lap("denoising")
        yield self.stage("decoding")
        self._lap("")
        self.thing = self.of.decode(pipeline, step.latents, size, facts, self.given)
        self.in_tiles = getattr(pipeline, "decoded_in_tiles", False)
        self.attention = attention.chosen(pipeline.transformer)
        self._lap("decoding")

    def saved(self, steps: Generator[str, None, library.Entry]) -> Generator[Event, None, library.Entry]:
        """Events of the stage saving, between which it may be stopped; returns the row."""
        last = time.perf_counter()
        yield self.stage("saving")
        with closing(steps):
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    entry: library.Entry = end.value
                    return entry
                if time.perf_counter() > last + SAVING_EVERY:
                    last = time.perf_counter()
                    yield self.stage("saving")

    def _lap(self, name: str) -> None:
        """Book the time since the last lap under this name; without a name it was the caller's time."""
        now = time.perf_counter()
        if name:
            self.seconds[name] = now - self._since
        self._since = now


def _spoken(row: catalog.Model, alone: Request) -> dict[str, Any]:
    """The arguments that may differ from picture to picture of a request: its texts."""
    return {one.argument: alone.inputs[one.name] for one in row.inputs if one.kind == "text" and one.argument}


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _argument(one: Input, value: Any) -> Any:
    """What the pipeline is given: the value, or the picture that it refers to. Raises bad_input."""
    return pictures.read(value) if one.kind in ("image", "mask") and value is not None else value


def _changes(one: Input, arguments: Mapping[str, Any]) -> str:
    """What was done to a picture that was handed in."""
    picture = arguments.get(one.argument) if one.kind in ("image", "mask") else None
    return "" if picture is None else pictures.changes(picture)


def _check(pipeline: Any, row: catalog.Model, arguments: dict[str, Any]) -> None:
    try:
        pipeline.check(**arguments)
    except ValueError as error:  # the catalog's limits should have caught it; the pipeline has the last word
        said = str(error)
        for one in row.inputs:  # in the words that people typed
            said = said.replace(one.argument, one.name) if one.argument else said
        hint = f"`gen show {row.name}` lists what it takes."
        raise GenError(f"The model refuses this: {said}.", hint, "bad_input") from error


def _idle(row: catalog.Model, request: Request) -> Iterator[str]:
    """A sentence for each value that changes nothing, because the one it belongs to is missing."""
    labels = {one.name: one.label for one in row.inputs}
    for one in row.inputs:
        if (
            one.only_with
            and request.inputs[one.only_with] is None
            and request.inputs[one.name] != one.default
        ):
            yield f"{one.label} changes nothing without {labels[one.only_with]}."


def _unread(pipeline: Any, row: catalog.Model, facts: Checkpoint, request: Request) -> Iterator[str]:
    """A sentence for each text whose end the model does not read, or not at once."""
    limit = facts.max_tokens
    for one in row.inputs:
        if one.kind != "text" or not limit:
            continue
        # Null captions of the published way are cut in any case.
        cut = one.name == "negative_prompt" and request.inputs.get("null_caption") == "prompt"
        for text in prompts.read_texts(request.inputs, one.name):
            tokens = pipeline.count_tokens(text)
            if tokens <= limit:
                continue
            if request.inputs.get("long_prompt") == "chunks" and not cut:
                parts = len(pipeline.parts_read(text, limit))
                yield f"{one.label} has {tokens} tokens and is read in {parts} chunks."
                continue
            rest = _short(_rest(pipeline, text, limit))
            yield f'{one.label} has {tokens} tokens, of which the model reads {limit}. Not read: "{rest}"'


def _rest(pipeline: Any, text: str, limit: int) -> str:
    """What comes behind the longest beginning, in whole words, that is read in full."""
    words = text.split()
    read = bisect.bisect_right(
        range(len(words)),
        limit,
        key=lambda count: pipeline.count_tokens(" ".join(words[:count])),
    )
    return " ".join(words[read - 1 :])


def _unknown(pipeline: Any, row: catalog.Model, request: Request) -> Iterator[str]:
    """A sentence for each text with words that small weights have never met."""
    for one in row.inputs:
        texts = prompts.read_texts(request.inputs, one.name) if one.kind == "text" else []
        words = pipeline.unknown_words(" ".join(texts)) if texts else []
        if words:
            shown = ", ".join(f'"{word[:30]}"' for word in words[:8]) + (", ..." if len(words) > 8 else "")
            yield f"{one.label}: these TOY weights have never met {shown}. They know a few coloured solids."


def _slow(loaded: loader.Loaded) -> Iterator[str]:
    if (loaded.device, loaded.dtype) == ("cpu", "float16"):
        yield "float16 is very slow on a CPU; float32 or bfloat16 is several times faster."


def _unlike(settings: Settings) -> Iterator[str]:
    """A sentence for each setting that changes more than the last digits."""
    if settings.quantize != "none":
        yield f"Layers in {settings.quantize}: not quite the picture of this seed."
    if settings.saver:
        yield f"Step savers {settings.saver}: less work, and not quite the picture of this seed."


def _not_finite(step: Any, loaded: loader.Loaded) -> GenError:
    return GenError(
        f"Step {step.index + 1} of {step.count} produced values that are not numbers ({loaded.dtype} on "
        f"{loaded.device}).",
        "Try --dtype float32 (or bfloat16 on a GPU), or less guidance.",
        "failed",
    )


def _entry(
    request: Request,
    facts: Checkpoint,
    loaded: loader.Loaded,
    drawing: _Drawing,
    settings: Settings,
    folder: Path,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of library.Entry but for the files. Its recipe is the request for this one result alone."""
    created = time.time()
    seconds = sum(drawing.seconds.values())
    width, height = drawing.of.seen(drawing.thing)
    peak = memory.peak(loaded.device)
    planned = memory.of_request(request, facts, folder, loaded.device, loaded.dtype, settings.memory)
    recipe = {
        "request": request.to_json(),
        **({"asked": asked} if asked else {}),
        "weights": {
            "key": facts.key,
            "fingerprint": loaded.fingerprint,
            "licence": facts.licence,
            "toy": facts.is_toy,
            **_loras(loaded),
        },
        "settings": {
            "device": loaded.device,
            "dtype": loaded.dtype,
            "attention": loaded.attention,
            **({"attention_chosen": drawing.attention} if loaded.attention == "auto" else {}),
            "exact": loaded.exact,
            "quantize": loaded.quantize,
            "compile": loaded.compiled,
            "saver": settings.saver,
            **({"offloaded": dict(loaded.offloaded)} if loaded.offloaded else {}),
            **({"decoded_in_tiles": True} if drawing.in_tiles else {}),
        },
        "versions": versions(),
        "machine": _machine(loaded.device),
        "memory": {"planned": planned.to_json(), "peak_bytes": peak},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(created)),
        "seconds": {name: round(value, 3) for name, value in drawing.seconds.items()},
        **drawing.of.said(drawing.thing),
    }
    return {
        "id": library.new_id(),
        "created": created,
        "model": request.model,
        "weights": request.weights,
        "fingerprint": loaded.fingerprint,
        "seed": request.seed,
        "prompt": request.subject,
        "width": width,
        "height": height,
        "seconds": seconds,
        "peak_bytes": peak,
        "toy": facts.is_toy,
        "recipe": recipe,
    }


def _loras(loaded: loader.Loaded) -> dict[str, Any]:
    """What a recipe says of adapters; the second entry as older releases read it."""
    if not loaded.loras:
        return {}
    fingerprints = "+".join(one["fingerprint"] for one in loaded.loras)
    return {"loras": list(loaded.loras), "lora_fingerprint": fingerprints}


def versions() -> dict[str, str]:
    """What the pixels depend on, without importing any of it."""
    from importlib.metadata import version

    found = {"gen": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in ("torch", "diffusers", "transformers")}


def _machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"name": name, "threads": torch.get_num_threads()}


@contextmanager
def _explained(request: Request) -> Iterator[None]:
    """Running out of memory, in any of its spellings, as GenError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from pipelines.tiling import out_of_memory

        if not out_of_memory(error):
            raise
        loader.forget()
        of = outputs.OUTPUTS[catalog.MODELS[request.model].makes]
        size = of.size_asked(request.inputs)
        raise GenError(
            f"A {of.noun}{' of ' if size else ''}{size} did not fit into memory.",
            f"Try {of.smaller}, --dtype bfloat16, or end other programs that use the memory.",
            "out_of_memory",
        ) from error
