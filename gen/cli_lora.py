"""`gen lora`: which adapters there are, what one of them is, and weights with adapters merged into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gen import adapters, catalog, printing
from gen.convert import DTYPES
from gen.errors import GenError
from gen.progress import Progress


@click.group("lora", short_help="List low-rank adapters, look into one, fuse them into weights.")
def lora_command() -> None:
    """Low-rank adapters: small files that change what weights draw.

    \b
      gen lora list
      gen lora show stars.safetensors
      gen run pixart-sigma "a red star" --lora stars=0.8 --lora night=0.5
      gen lora fuse pixart-sigma --lora stars=0.8 --output fused/

    Your own have names when they lie in GEN_HOME/loras, as NAME.safetensors or as a folder NAME. The forms of
    PEFT, diffusers and kohya's scripts are read. Adapters are merged into the weights when those are loaded,
    before they are quantised: a step costs the same, and other adapters or scales load the transformer anew.
    """


@lora_command.command("list", short_help="Show published adapters and your own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Names of those on this machine only.")
def list_adapters(as_json: bool, quiet: bool) -> None:
    """Show the published adapters and those in GEN_HOME/loras, with the installed weights that each fits."""
    if quiet:
        for name in adapters.names():
            printing.line(name)
        return
    found = [adapters.describe(name) for name in dict.fromkeys((*adapters.published(), *adapters.local()))]
    if as_json:
        printing.ok({"folder": str(adapters.home()), "loras": found})
        return
    header = ("LORA", "WHERE", "INSTALLED", "RANK", "LAYERS", "SIZE", "FITS")
    printing.table([header, *map(_line, found)])


def _line(about: dict[str, Any]) -> tuple[str, ...]:
    start = about["name"], about["where"], "yes" if about["installed"] else "-"
    if about["problem"]:
        return (*start, "-", "-", "-", about["problem"])
    return (
        *start,
        "-".join(dict.fromkeys((str(about["ranks"][0]), str(about["ranks"][-1])))),
        str(about["layers"]),
        f"{about['bytes'] / 2**20:,.1f} MiB",
        ", ".join(about["fits"]) or f"nothing installed{_seems(about)}",
    )


def _seems(about: dict[str, Any]) -> str:
    return f"; it seems to be for {about['seems_for']}" if about["seems_for"] else ""


@lora_command.command("show", short_help="Look into an adapter.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def show_adapter(name: str, as_json: bool) -> None:
    """Show what the adapter NAME, a file or a folder, changes, and which installed weights it fits."""
    about = adapters.describe(name)
    if about["problem"] and about["installed"]:
        adapters.facts(name)  # which says it with a hint
    if as_json:
        printing.ok(about)
        return
    if not about["installed"]:
        raise GenError(f"The adapter {name} is {about['problem']}.", about["summary"], "not_installed")
    ranks = ", ".join(map(str, about["ranks"]))
    facts = {
        "name": about["name"],
        "file": about["file"],
        "size": f"{about['bytes']:,} bytes",
        "fingerprint": about["fingerprint"],
        "style": about["style"],
        "layers": str(about["layers"]),
        "rank": ranks,
        "made for": about["base"] or "(it does not say)",
        "seems for": about["seems_for"] or "(no model known here)",
        "fits": ", ".join(about["fits"]) or "no installed weights",
        **{f"not {reference}": problem for reference, problem in about["fits_not"].items()},
    }
    if about["left_out"]:
        facts["left out"] = f"{len(about['left_out'])} tensors for a text encoder"
    for title, value in facts.items():
        printing.line(f"{title:<16} {value}")


@lora_command.command("fuse", short_help="Write weights with adapters merged into them.")
@click.argument("model")
@click.option(
    "--lora",
    "names",
    metavar="NAME[=X]",
    multiple=True,
    required=True,
    help="An adapter, and how much of it. May be given again.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write the weights to."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DTYPES[0],
    help="Precision of the transformer; float32 rounds nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def fuse_adapters(model: str, names: tuple[str, ...], output: Path, dtype: str, as_json: bool) -> None:
    """Write the weights MODEL, e.g. pixart-sigma:toy, with adapters merged into them, and print the folder.

    It is complete, and needs the adapters no more.
    """
    talk = Progress()
    held = adapters.check(catalog.LORA, names)
    if held is None:
        raise GenError("No LoRA is named.", "Give --lora NAME.", "bad_input")
    made = adapters.fuse(model, held, output, dtype, report=talk.say)
    if as_json:
        printing.ok(made)
    else:
        printing.line(made["folder"])
