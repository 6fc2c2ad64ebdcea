"""The commands of `gen`: parse, call, print. How they end is in gen.cli, and `gen run` has gen.cli_run to
itself.

Nothing heavy is imported at the top: `gen --help` and `gen list` answer before torch could be loaded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gen import (
    catalog,
    cli_add,
    cli_bench,
    cli_grid,
    cli_lora,
    cli_prompts,
    cli_run,
    cli_train_lora,
    cli_weights,
    outputs,
    printing,
)
from gen.convert import DTYPES as CONVERTED_DTYPES
from gen.errors import GenError, did_you_mean
from gen.progress import Progress
from gen.request import DEVICES
from weights.convert import FAMILIES

if TYPE_CHECKING:
    from gen.library import Entry

ONCE = ("prompt", "prompts", "repeat", "seed", "help")  # options of one run, which gen.toml may not set


class Commands(click.Group):
    """Our own commands, and those that other packages add through the entry-point group `gen.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Ours in the order of the file, then the added ones."""
        return [*self.commands, *sorted({one.name for one in _added()} - set(self.commands))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; installed packages are searched only when it is not ours."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        return next((one.load() for one in _added() if one.name == cmd_name), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with our own sentence for an unknown name."""
        name = args[0]
        if name.startswith("-") or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        commands = self.list_commands(ctx)
        hint = did_you_mean(name[:60], commands) or f"The commands are {', '.join(commands)}."
        if name.partition(":")[0] in catalog.MODELS:
            hint = f"To draw with it: gen run {name} PROMPT"
        raise GenError(f"There is no command '{name[:60]}'.", hint, "bad_input")


def _added() -> Sequence[Any]:
    from importlib.metadata import entry_points

    return [*entry_points(group="gen.commands")]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gen-studio", prog_name="gen", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Pictures and shapes from diffusion transformers, on this machine.

    Results go to stdout, one per line; progress and messages to stderr. Options may also come from the
    environment (GEN_STEPS for --steps) or from gen.toml, in this folder or in ~/.config/gen-studio, with a
    table for each command. What is typed wins over the environment, and that over gen.toml.

    Results, history and logs lie in GEN_HOME (~/.local/share/gen-studio). Weights are looked for in
    GEN_WEIGHTS_DIR first, as toy/NAME below it.

    \b
    Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not installed, 4 corrupt weights, 5 out of memory,
    6 disk full, 7 no server, 130 cancelled.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # What a pipeline warns of, the engine says in an Event, once and with what to do.
    logging.getLogger("pipelines").setLevel(logging.ERROR)
    ctx.default_map = _config()


cli.add_command(cli_run.command)
cli.add_command(cli_grid.command)


cli.add_command(cli_weights.list_command)
cli.add_command(cli_weights.show_command)
cli.add_command(cli_weights.pull_command)
cli.add_command(cli_weights.verify_command)
cli.add_command(cli_weights.rm_command)
cli.add_command(cli_add.add_command)


@cli.command(short_help="Show what was drawn, newest first.")
@click.argument("text", required=False, default="")
@click.option("--model", metavar="MODEL", help="Only results of this model.")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="At most so many."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, recipes included.")
@click.option("--quiet", "-q", is_flag=True, help="Ids only.")
def history(text: str, model: str | None, limit: int, as_json: bool, quiet: bool) -> None:
    """Show what was drawn, newest first; TEXT is words of the prompt, a seed or an id."""
    from gen import library

    name = catalog.find(model)[0].name if model is not None else None
    entries = library.search(text, name, limit)
    if as_json:
        printing.ok({"results": [entry.to_json() for entry in entries]})
    elif quiet:
        for entry in entries:
            printing.line(entry.id)
    elif entries:
        header = ("ID", "WHEN", "WEIGHTS", "SIZE", "SEED", "PROMPT")
        printing.table([header, *(_history_line(entry) for entry in entries)])
    else:
        click.echo("Nothing found." if text or model else "Nothing was drawn yet.", err=True)


def _history_line(entry: Entry) -> tuple[str, ...]:
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created))
    prompt = " ".join(entry.prompt.split())
    prompt = prompt if len(prompt) <= 60 else prompt[:57] + "..."
    row = catalog.MODELS.get(entry.model)  # gone in a later version: its results are listed still
    of = outputs.OUTPUTS[row.makes if row else "image"]
    size = of.size_made(entry.request["inputs"], entry.width, entry.height)
    return entry.id, moment, f"{entry.model}:{entry.weights}", size, str(entry.seed), prompt


DEVICE = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", envvar="GEN_DEVICE", help="Where to compute."
)


@cli.command(short_help="Train weights from a recipe.")
@click.argument("name")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write the weights to.")
@click.option("--resume/--fresh", default=True, show_default=True, help="Go on from the last training.")
@DEVICE
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Stop in good order after this time."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads to use.")
@click.option(
    "--data",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="What to learn from, for recipes that do not make their own: dit-3d.",
)
@click.option(
    "--set",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="Change an option of the recipe, e.g. size=B/4. May be given again.",
)
def train(
    name: str,
    output: Path | None,
    resume: bool,
    device: str,
    minutes: float | None,
    threads: int | None,
    data: Path | None,
    options: tuple[str, ...],
) -> None:
    """Train weights from a recipe, e.g. pixart-sigma:toy, and print their folder."""
    from gen import train as training

    changes = dict(one.partition("=")[::2] for one in options)
    folder = training.train(
        name,
        output=output,
        resume=resume,
        device=device,
        minutes=minutes,
        threads=threads,
        data=data,
        options=changes,
    )
    printing.line(str(folder))


cli.add_command(cli_train_lora.command)
cli.add_command(cli_lora.lora_command)


@cli.command(short_help="Measure the quality of weights.")
@click.argument("name")
@click.option("--prompts", type=click.IntRange(1, 100_000), help="How many, default as for the record.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps, default the model's own.")
@DEVICE
@click.option("--grid", metavar="FILE.png", type=click.Path(path_type=Path), help="Save a sheet of pictures.")
@click.option("--record", is_flag=True, help="Write the table into the weights' own record.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(
    name: str,
    prompts: int | None,
    steps: int | None,
    device: str,
    grid: Path | None,
    record: bool,
    as_json: bool,
) -> None:
    """Measure weights, e.g. pixart-sigma:toy, against what they are expected to reach."""
    from gen import evaluate as evaluation

    talk = Progress()
    table = evaluation.evaluate(name, prompts=prompts, steps=steps, device=device, grid=grid, report=talk.say)
    if record:
        talk.say(f"recorded in {evaluation.record(name, table)}")
    if as_json:
        printing.ok(table)
    else:
        printing.line(evaluation.markdown(table))


@cli.command(short_help="Convert an official checkpoint.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "family", type=click.Choice([*FAMILIES]), required=True, help="What the file holds.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Folder to write, default the file's name."
)
@click.option(
    "--config",
    metavar="FILE.json",
    type=click.Path(path_type=Path),
    help="What shapes do not tell, in the official words: num_heads, input_size, ...",
)
@click.option(
    "--with",
    "companions",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A pipeline whose autoencoder, text encoder and scheduler to copy.",
)
@click.option(
    "--dtype",
    type=click.Choice(CONVERTED_DTYPES),
    default=CONVERTED_DTYPES[0],
    help="Precision of the numbers.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def convert(
    file: Path,
    family: str,
    output: Path | None,
    config: Path | None,
    companions: Path | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Convert an official .pt, .pth or .safetensors file to a diffusers folder, and print its path.

    Every tensor must find its place, and every place its tensor; otherwise nothing is written, and the
    names are listed.
    """
    from gen import convert as conversion

    talk = Progress()
    found = conversion.convert_file(
        file,
        family,
        output or file.with_suffix(""),
        config=config,
        companions=companions,
        dtype=dtype,
        report=talk.say,
    )
    talk.say(
        f"{found['converted']} of {found['tensors']} tensors converted, {len(found['computed'])} computed "
        "instead, 0 missing, 0 unused"
    )
    if as_json:
        printing.ok(found)
    else:
        printing.line(found["folder"])


cli.add_command(cli_bench.bench_command)
cli.add_command(cli_bench.doctor_command)
cli.add_command(cli_prompts.command)


# --- gen.toml ----------------------------------------------------------------------------------------


def _config() -> dict[str, dict[str, Any]]:
    """gen.toml as click's default map: a table per command, e.g. [run] with steps = 30. Raises bad_input."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gen-studio" / "gen.toml"
    merged: dict[str, dict[str, Any]] = {}
    for path in (config, Path("gen.toml")):  # the nearer one last: it wins
        if not path.is_file():
            continue
        import tomllib

        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{path} cannot be read: {error}."
            raise GenError(message, "Mend the file or move it away.", "bad_input") from None
        for name, table in tables.items():
            merged.setdefault(name, {}).update(_checked_table(path, name, table))
    return merged


def _checked_table(path: Path, name: str, table: Any) -> dict[str, Any]:
    """A table of gen.toml whose keys are options of the command: a mistyped one must not be silently idle."""
    ctx = click.Context(cli)
    command = cli.get_command(ctx, name)
    if command is None or not isinstance(table, dict):
        commands = cli.list_commands(ctx)
        hint = did_you_mean(name, commands) or f"Write a table for a command, {', '.join(commands)}."
        raise GenError(f"{path}: '{name}' is not a table for a command.", hint, "bad_input")
    known = {str(one.name) for one in command.params if isinstance(one, click.Option) and not one.is_flag}
    known -= set(ONCE)
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"[{name}] knows {', '.join(sorted(known))}."
            raise GenError(f"{path}: [{name}] knows no '{key}'.", hint, "bad_input")
    return table
