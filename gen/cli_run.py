"""`gen run`: from flags, files and stdin to checked requests, and from events to lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gen import adapters, catalog, outputs, printing, prompts
from gen.errors import GenError, cancelled
from gen.progress import Progress, duration
from gen.request import (
    DEVICES,
    DTYPES,
    EXACT,
    MEMORY,
    QUANTIZE,
    Input,
    Request,
    Result,
    Settings,
    value_words,
)
from gen.texts import read_text

TYPED = 3  # the rank of what stands on the command line itself
RANKS = {ParameterSource.COMMANDLINE: TYPED, ParameterSource.ENVIRONMENT: 2, ParameterSource.DEFAULT_MAP: 1}
METAVARS = {
    "text": "TEXT",
    "integer": "N",
    "number": "X",
    "size": "N",
    "seed": "N",
    "choice": "NAME",
    "label": "CLASS",
    "image": "FILE",
    "mask": "FILE",
    "sides": "SIDES",
    "points": "FILE",
    "lora": "NAME[=X]",
}
FILE_LIMIT = 2**24  # bytes of prompts
EXAMPLES = {  # by Model.makes and Model.subject
    ("image", "prompt"): "a red cube",
    ("image", "class_label"): "red cube",
    ("cloud", "class_label"): "chair",
}


def run(ctx: click.Context, /, **params: Any) -> None:
    """Draw pictures and shapes: gen run MODEL PROMPT.

    MODEL is a name from `gen list`, such as pixart-sigma or pixart-sigma:toy. PROMPT may be '-' to read it
    from stdin; for a model of classes it is the name or number of one. Several prompts and seeds give a
    picture for each pair. Shapes are saved as GLB, with PLY, OBJ and a PNG from all sides beside it.

    \b
      gen run pixart-sigma "a red cube"
      gen run pixart-sigma "a red cube" --seed 1 --seed 2 --size 128x192
      gen run pixart-sigma --prompts prompts.txt --output pictures/
      gen run --repeat pictures/20261120-153012-1-a-red-cube.png
      gen run dit-3d chair --files all
    """
    talk = Progress(quiet=params["quiet"])
    ranks = {name: RANKS.get(source, 0) for name in params if (source := ctx.get_parameter_source(name))}
    recipe = _recipe(params["repeat"])
    requests = _requests(params, ranks, recipe)
    settings = _settings(params, ranks, recipe)
    if recipe:
        for difference in _differences(recipe, requests[0]):
            talk.say(f"warning: {difference}")
    if params["dry_run"]:
        _show_plans(requests, settings, as_json=params["json"] or params["stream"])
    else:
        _draw(requests, settings, talk, params)


def options() -> list[click.Parameter]:
    """The parameters of `gen run`: a flag for every input of every model, then what every model shares.

    Values of inputs stay text here: Input.check is the one that judges them.
    """
    inputs: dict[str, dict[str, Input]] = {}  # by name, then by model
    for row in catalog.MODELS.values():
        for one in row.inputs:
            inputs.setdefault(one.name, {})[row.name] = one
    path = click.Path(path_type=Path)
    return [
        click.Argument(["model"], required=False),
        click.Argument(["words"], nargs=-1, metavar="[PROMPT]"),
        *(_input_option(one) for one in inputs.values()),
        _option("--size", metavar="WxH|N", help="Width and height at once."),
        _option(
            "--prompts", metavar="FILE|-", env=False, help="Every line of a file, or of stdin, is a prompt."
        ),
        _option(
            "--repeat",
            metavar="FILE",
            type=path,
            env=False,
            help="Draw it again from the recipe inside a file made here; other flags change the recipe.",
        ),
        _option(
            "--weights",
            metavar="TAG",
            help="Weights of the model, as in MODEL:TAG (default: best installed).",
        ),
        _option(
            "--output",
            "-o",
            metavar="DIR|FILE",
            type=path,
            help="Where to save (default: GEN_HOME/outputs); FILE is a .png, or for shapes a .glb.",
        ),
        _option("--device", type=click.Choice(DEVICES), default="auto", help="Where to compute."),
        _option("--dtype", type=click.Choice(DTYPES), default="auto", help="Precision of the numbers."),
        _option("--attention", metavar="NAME", default="auto", help="Attention backend."),
        _option(
            "--memory",
            type=click.Choice(MEMORY),
            default=MEMORY[0],
            help="least: the text encoder is read layer by layer, as auto does when it would not fit; "
            "sequential: so are all networks; group: blocks of them wait outside of the GPU.",
        ),
        _option(
            "--quantize",
            type=click.Choice(QUANTIZE),
            default=QUANTIZE[0],
            help="int8: faster for large models, and not quite the same picture.",
        ),
        click.Option(
            ["--compile"], is_flag=True, help="torch.compile: slow to start, for a GPU's many pictures."
        ),
        _option(
            "--exact",
            type=click.Choice(EXACT),
            default=EXACT[0],
            help="plain: no shortcut of any kind, for comparing; the same picture up to rounding.",
        ),
        _option(
            "--saver",
            metavar="TEXT",
            default="",
            help='Less work, not quite the same picture: "guidance=0.1:0.6", "taylor=2:1", "tgate=10", with '
            "commas between.",
        ),
        click.Option(["--dry-run"], is_flag=True, help="Show what would be done, with estimates, and stop."),
        click.Option(["--json"], is_flag=True, help="One JSON object on stdout: {ok, data} or {ok, error}."),
        click.Option(
            ["--stream"], is_flag=True, help="A JSON object for every event, the last one as --json."
        ),
        click.Option(["--quiet", "-q"], is_flag=True, help="No progress; ids instead of paths."),
    ]


def _option(
    *names: str, env: bool = True, kind: type[click.Option] = click.Option, **facts: Any
) -> click.Option:
    variable = "GEN_" + names[0].strip("-").replace("-", "_").upper()
    return kind([*names], envvar=variable if env else None, **facts)


class _Names(click.Option):
    """May be given again; in the environment a colon is between two, and gen.toml may have one or a list."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return super().type_cast_value(ctx, (value,) if isinstance(value, str) else value)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        text = self.resolve_envvar_value(ctx)
        return text and tuple(text.split(os.pathsep))


def _input_option(of: Mapping[str, Input]) -> click.Option:
    """One flag for an input that several models may have; where they differ, their help says so by name."""
    one = next(iter(of.values()))
    several = one.name in ("prompt", "seed")
    again = several or one.kind == "lora"
    defaults = {model: other.default_words() for model, other in of.items()}
    default = ""
    if len(set(defaults.values())) > 1:
        default = "default " + ", ".join(f"for {model} {words}" for model, words in defaults.items())
    elif defaults and (words := next(iter(defaults.values()))) and not several:
        default = f"default {words}"
    facts = [
        _choices(of) if one.kind == "choice" else one.limits() if one.kind not in ("size", "label") else "",
        default if one.kind != "size" and one.default != "default" else "",
        f"for {', '.join(of)}" if len(of) < len(catalog.MODELS) and not several else "",
        "may be given several times" if again else "",
    ]
    remarks = "; ".join(fact for fact in facts if fact)
    return _option(
        f"--{one.name.replace('_', '-')}",
        env=not several,
        type=click.STRING,
        multiple=again,
        kind=_Names if one.kind == "lora" else click.Option,
        metavar=METAVARS[one.kind],
        help=one.help[0].upper() + one.help[1:] + (f" ({remarks})." if remarks else "."),
    )


def _choices(of: Mapping[str, Input]) -> str:
    """`one of a, b; for dit also c`."""
    offered = {model: one.choices or () for model, one in of.items()}
    common = [
        word for word in next(iter(offered.values())) if all(word in words for words in offered.values())
    ]
    more = {model: [word for word in words if word not in common] for model, words in offered.items()}
    also = (f"for {model} also {', '.join(words)}" for model, words in more.items() if words)
    return "; ".join((f"one of {', '.join(common)}", *also))


# --- what to draw ----------------------------------------------------------------------------------------


def _requests(
    params: Mapping[str, Any], ranks: Mapping[str, int], recipe: Mapping[str, Any] | None
) -> list[Request]:
    """A request for each prompt and seed. All are checked before the first is drawn."""
    reference = _reference(params["model"], params["weights"], recipe)
    row, _ = catalog.find(reference)
    # Repeating means: as it was. Only what is typed now may change it, no general preference.
    values = _inputs(row, params, ranks, lowest=TYPED if recipe else 1)
    texts = _texts(params["words"], params["prompt"], params["prompts"])
    seeds = params["seed"] or (None,)
    if recipe:
        values = {**prompts.as_recorded(recipe["request"]["inputs"]), **values}
        seeds = params["seed"] or (recipe["request"]["seed"],)
    elif not texts and row.subject not in values:
        raise GenError(
            f"There is no {row.subject.replace('_', ' ')}, so there is nothing to draw.",
            f'Say what to draw, e.g. gen run {reference} "{EXAMPLES[row.makes, row.subject]}"',
            "bad_input",
        )
    if texts and row.subject in values and not recipe:
        flag = f"--{row.subject.replace('_', '-')}"
        raise GenError(
            f"What to draw is said twice, in words and by {flag}.", "Use one of them.", "bad_input"
        )
    requests = [
        Request.build(reference, {**values, **text}, seed)
        for text in ([{row.subject: text} for text in texts] or [{}])
        for seed in seeds
    ]
    output = params["output"]
    of = outputs.OUTPUTS[row.makes]
    if len(requests) > 1 and output is not None and output.suffix.lower() == of.ending:
        message = f"{len(requests)} {of.noun}s cannot all be {output.name}."
        raise GenError(message, "Give a folder as the output.", "bad_input")
    return requests


def _reference(model: str | None, weights: str | None, recipe: Mapping[str, Any] | None) -> str:
    """MODEL[:TAG] from the argument, --weights and the recipe."""
    if model is None and recipe is None:
        example = f'gen run {next(iter(catalog.MODELS))} "a red cube"'
        raise GenError("No model is named.", f"Choose one from `gen list`, e.g. {example}", "bad_input")
    made_with = recipe["request"] if recipe else {}
    name = model or str(made_with["model"])
    row, tag = catalog.find(name)
    if recipe and row.name != made_with["model"]:
        message = f"The file was made with {made_with['model']}, not with {row.name}."
        raise GenError(message, "Leave the model out to repeat it.", "bad_input")
    # "--weights pixart-sigma:toy" is accepted as well: people copy it from `gen list`.
    chosen = weights.removeprefix(f"{row.name}:") if weights else None
    if chosen and tag and tag != chosen:
        raise GenError(
            f"{name} and --weights {weights} contradict each other.", "Give only one.", "bad_input"
        )
    tag = chosen or tag or made_with.get("weights")
    return f"{row.name}:{tag}" if tag else row.name


def _inputs(
    row: catalog.Model, params: Mapping[str, Any], ranks: Mapping[str, int], lowest: int
) -> dict[str, Any]:
    """Values by input name, of at least this rank.

    What is typed and not taken by the model is an error; a preference from the environment is not.
    """
    taken = {one.name for one in row.inputs}
    known = {one.name for other in catalog.MODELS.values() for one in other.inputs}
    for name in (*known, "size"):
        takes = {"width", "height"} <= taken if name == "size" else name in taken
        if ranks[name] == TYPED and not takes:
            raise catalog.not_taken(row, name)
    values = {name: params[name] for name in taken - {"prompt", "seed"} if ranks[name] >= lowest}
    if ranks["size"] < lowest or not {"width", "height"} <= taken:
        return values
    for name, value in zip(("width", "height"), parse_size(params["size"]), strict=True):
        if name in values and ranks[name] == ranks["size"]:
            raise GenError(
                f"--size and --{name} contradict each other.", "Give only one of them.", "bad_input"
            )
        if name not in values or ranks[name] < ranks["size"]:  # the one said nearer to the user wins
            values[name] = value
    return values


def parse_size(text: str) -> tuple[str, str]:
    """`128x192` -> ("128", "192"); `128` -> ("128", "128"). Whether the numbers are any good is checked
    later."""
    width, cross, height = text.lower().replace("×", "x").partition("x")
    if not width.strip() or (cross and not height.strip()):
        message = f"The size '{text[:60]}' lacks its width or height."
        raise GenError(message, "Write WIDTHxHEIGHT, e.g. 128x192, or one number.", "bad_input")
    return width, height or width


def _texts(words: Sequence[str], flags: Sequence[str], file: str | None) -> list[str]:
    """The prompts, from one of the three ways to give them."""
    ways = [way for way, used in (("PROMPT", words), ("--prompt", flags), ("--prompts", file)) if used]
    if len(ways) > 1:
        raise GenError(f"Prompts come from {' and '.join(ways)} at once.", "Use one of them.", "bad_input")
    if file is None:
        return [
            read_text("-", FILE_LIMIT) if text == "-" else text
            for text in ([" ".join(words)] if words else flags)
        ]
    texts = [line.strip() for line in read_text(file, FILE_LIMIT).splitlines() if line.strip()]
    if not texts:
        raise GenError(f"No line of {file} holds a prompt.", "Write one prompt a line.", "bad_input")
    return texts


# --- repeating ----------------------------------------------------------------------------------------


def _recipe(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from gen import artifacts

    return artifacts.read_recipe(path)


def _settings(
    params: Mapping[str, Any], ranks: Mapping[str, int], recipe: Mapping[str, Any] | None
) -> Settings:
    """From the flags; when repeating, what is not typed is as it was when the picture was made."""
    chosen = {
        name: params[name]
        for name in ("device", "dtype", "attention", "memory", "quantize", "compile", "exact", "saver")
    }
    if recipe:  # older ones name fewer settings
        chosen = {
            name: value if ranks[name] == TYPED else recipe["settings"].get(name, value)
            for name, value in chosen.items()
        }
    return Settings(**chosen, output=params["output"], preview=False)


def _differences(recipe: Mapping[str, Any], request: Request) -> list[str]:
    """What has changed since the picture was made and may change its pixels."""
    from gen import engine, loader
    from weights import store

    _, _, folder = catalog.choose(catalog.MODELS[request.model], request.weights)
    with loader.explained(folder):
        now = store.fingerprint(folder)
    then = recipe["weights"]["fingerprint"]
    found = (
        [f"the weights are not those of then ({then}, now {now}): expect another picture"]
        if now != then
        else []
    )
    old, new = recipe["versions"], engine.versions()
    changed = [
        f"{name} {old[name]}, now {new[name]}" for name in new if old.get(name, new[name]) != new[name]
    ]
    found += adapters.changed(recipe["weights"], request.inputs)
    if changed:
        found.append(f"versions have changed since ({'; '.join(changed)}): pixels may differ slightly")
    return found


# --- drawing ----------------------------------------------------------------------------------------


def _draw(requests: list[Request], settings: Settings, talk: Progress, params: Mapping[str, Any]) -> None:
    """Run the requests, and print each result as soon as it is there."""
    from gen import engine

    results: list[Result] = []
    lines = not params["json"] and not params["stream"]
    try:
        for number, request in enumerate(requests):
            talk.noun = outputs.OUTPUTS[catalog.MODELS[request.model].makes].noun
            if len(requests) > 1 and not talk.quiet:
                talk.say(f"request {number + 1}/{len(requests)}: {request.subject[:60]}")
            with closing(engine.run(request, settings)) as events:
                for event in events:
                    talk.show(event)
                    if params["stream"]:
                        printing.as_json(event.to_json())
                    if event.result is not None:
                        results.append(event.result)
                        talk.clear()
                        _tell_of_files(event.result, talk)
                        if lines:
                            printing.line(event.result.id if talk.quiet else str(event.result.path))
    except (GenError, KeyboardInterrupt) as stop:
        # What was finished before stays finished, and the envelope of the error names it.
        error = stop if isinstance(stop, GenError) else cancelled()
        error.finished = [result.to_json() for result in results]
        raise error from stop
    finally:
        talk.clear()
    if not lines:
        printing.ok({"results": [result.to_json() for result in results]})


def _tell_of_files(result: Result, talk: Progress) -> None:
    """What lies beside the file whose path is printed."""
    beside = [path.name for path in result.files.values() if path != result.path]
    if beside and not talk.quiet:
        talk.say(f"beside {result.path.name}: {', '.join(beside)}")


def _show_plans(requests: list[Request], settings: Settings, as_json: bool) -> None:
    """--dry-run: the resolved parameters, with memory and time as far as they are known."""
    plans = [_plan(request, settings) for request in requests]
    if as_json:
        printing.ok({"plans": plans})
        return
    for request, plan in zip(requests, plans, strict=True):
        memory = _memory_words(plan)
        seconds = plan["seconds"]
        given = [(name, value) for name, value in request.inputs.items() if value is not None]
        facts = {
            "model": f"{request.model}:{request.weights}" + (" (TOY weights)" if plan["toy"] else ""),
            **{name: value_words(value) for name, value in given},
            "seed": request.seed,
            "count": request.count,
            "output": plan["output"],
            "memory": memory,
            "time": "not known before the first picture" if seconds is None else f"about {duration(seconds)}",
        }
        printing.line("\n".join(f"{name:<16} {value}" for name, value in facts.items()))


def _memory_words(plan: Mapping[str, Any]) -> str:
    def mib(count: int) -> str:
        return f"{count / 2**20:,.0f} MiB"

    expected = plan["memory"]
    words = (
        f"about {mib(expected['peak_bytes'])} (+- {mib(expected['error_bytes'])}) "
        f"of {mib(expected['memory_bytes'])}, of it {mib(plan['weights_bytes'])} of weights "
        f"({plan['parameters'] / 1e6:,.1f} M numbers)"
    )
    for part, count in expected["streamed_bytes"].items():
        words += f"; {part} ({mib(count)}) is brought when it is called"
    if plan["peak_bytes"]:
        words += f"; {mib(plan['peak_bytes'])} when last drawn"
    return words if expected["fits"] else f"{words}: it may NOT FIT"


def _plan(request: Request, settings: Settings) -> dict[str, Any]:
    from gen import library, loader, memory
    from weights import store

    tag, facts, folder = catalog.choose(catalog.MODELS[request.model], request.weights)
    with loader.explained(folder):
        store.verify(folder, checksums=False)
        parameters = store.parameters(folder)
    of = outputs.OUTPUTS[catalog.MODELS[request.model].makes]
    device, dtype = loader.choose_device(settings, parameters)
    expected = memory.of_request(request, facts, folder, device, dtype, settings.memory)
    past = library.typical(request.model, tag, request.inputs, facts.native_size if of.sized else None)
    return {
        "request": request.to_json(),
        "toy": facts.is_toy,
        "licence": facts.licence,
        "output": str((settings.output or library.outputs()).absolute()),
        "parameters": parameters,
        "weights_bytes": sum(expected.weights.values()),
        "memory": expected.to_json(),
        "device": device,
        "dtype": dtype,
        "peak_bytes": past and past.peak_bytes,
        "seconds": past and round(past.loading_seconds + past.drawing_seconds * request.count, 2),
    }


command = click.Command(
    "run",
    callback=click.pass_context(run),
    params=options(),
    help=run.__doc__,
    short_help="Draw pictures and shapes: gen run MODEL PROMPT.",
)
