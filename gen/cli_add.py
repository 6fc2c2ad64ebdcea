"""`gen add`: from flags to a row of the table of added weights. What is checked is in gen.added."""

from __future__ import annotations

from pathlib import Path

import click

from gen import printing
from gen.progress import Progress


@click.command("add", short_help="Add weights of your own, where they lie.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--as", "name", metavar="[MODEL:]TAG", help="Name to draw with it by (default: the file's).")
@click.option(
    "--with",
    "companion",
    metavar="FOLDER|MODEL:TAG",
    help="Where text encoder, tokenizer, autoencoder and scheduler come from, for a single file "
    "(default: those of the published weights that are most like it).",
)
@click.option(
    "--size", type=click.IntRange(1), metavar="N", help="Its native size in pixels, if it does not say."
)
@click.option(
    "--config",
    metavar="FILE.json",
    type=click.Path(path_type=Path),
    help="What shapes do not tell, in the official words: num_heads, pe_interpolation, ...",
)
@click.option("--licence", metavar="TEXT", help="Its licence, for `gen list` and for recipes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def add_command(
    path: Path,
    name: str | None,
    companion: str | None,
    size: int | None,
    config: Path | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Add weights under a tag of your own, and print the name to draw with them by.

    PATH is a folder of a pipeline as diffusers writes it, or one .safetensors file with a PixArt transformer:
    with official names, ComfyUI's, or those of diffusers. It stays where it is, and nothing of it is copied;
    a file that moves or changes later is told. `gen rm NAME` forgets it.

    \b
      gen add ~/models/my-pixart --as pixart-sigma:mine
      gen add ~/ComfyUI/models/diffusion_models/pixart_sigma.safetensors --as comfy
      gen run pixart-sigma:comfy "a red cube"
    """
    from gen import added

    talk = Progress()
    found = added.add(
        path, name, companion=companion, size=size, config=config, licence=licence, report=talk.say
    )
    about = found.to_json()
    layouts = {"folder": "a folder of diffusers", "official": "the official layout"}
    layout = layouts.get(found.layout, "the layout of diffusers")
    talk.say(
        f"{layout}, {about['parameters'] / 1e6:,.1f} M parameters, "
        f"{about['native_size']} pixels{' (TOY weights)' if about['toy'] else ''}; nothing was copied"
    )
    for part, folder in about["parts"].items():
        talk.say(f"{part} from {folder}")
    if found.left_out:
        talk.say(f"left out: {len(found.left_out)} tensors of other networks, such as {found.left_out[0]}")
    if as_json:
        printing.ok(about)
    else:
        printing.line(about["name"])
