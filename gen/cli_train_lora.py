"""`gen train-lora`: from flags to a training, and the folder of its adapter on stdout."""

from __future__ import annotations

from pathlib import Path

import click

from gen import printing
from gen.request import DEVICES

LAYERS = ("attn", "attn+ff", "all")  # as pipelines.lora_training has them, which would load torch


@click.command("train-lora", short_help="Teach a model something new from some pictures.")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write the adapter to.",
)
@click.option("--trigger", default="", metavar="TEXT", help="Caption of pictures without one of their own.")
@click.option(
    "--rank", type=click.IntRange(1, 1024), default=16, show_default=True, help="Rank of the change."
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 100_000, min_open=True),
    help="Strength of the change times its rank, default the rank.",
)
@click.option(
    "--layers",
    type=click.Choice(LAYERS),
    default="attn+ff",
    show_default=True,
    help="Which learn: attention, feed-forward as well, or every linear layer.",
)
@click.option(
    "--steps", type=click.IntRange(1, 1_000_000), default=1200, show_default=True, help="Steps in all."
)
@click.option(
    "--batch", type=click.IntRange(1, 4096), help="Pictures a step: 32 for embedded weights, else 1."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, 1, min_open=True),
    help="0.002 for embedded weights, else 0.0001.",
)
@click.option(
    "--keep-rest",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Share of each batch that keeps all else as it is: 0.5 where there are prompts for it, else 0.",
)
@click.option(
    "--keep-prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What is to stay, a prompt a line, 1000 at most; embedded weights have prompts of their own.",
)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Stop in good order after this time."
)
@click.option("--resume/--fresh", default=True, show_default=True, help="Go on from the last training.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all chance."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads to use.")
@click.option(
    "--device", type=click.Choice(DEVICES), default="auto", envvar="GEN_DEVICE", help="Where to compute."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    model: str,
    folder: Path,
    output: Path,
    trigger: str,
    rank: int,
    alpha: float | None,
    layers: str,
    steps: int,
    batch: int | None,
    learning_rate: float | None,
    keep_rest: float | None,
    keep_prompts: Path | None,
    minutes: float | None,
    resume: bool,
    seed: int,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Teach MODEL, e.g. pixart-sigma:toy, what the pictures in FOLDER show, and print the adapter's folder.

    Captions stand in name.txt beside name.png, or in metadata.jsonl, a line {"file_name", "text"} a picture;
    --trigger serves those without. What is learnt is a small adapter, the weights stay as they are:

    \b
      gen train-lora pixart-sigma:toy pictures/ --output stars
      gen run pixart-sigma:toy "a red star" --lora stars

    Stop it at any moment: the same command goes on. What it encodes is kept in .train, or in GEN_TRAIN_DIR.
    """
    from gen import train_lora
    from gen.progress import Progress

    plan = train_lora.Plan(
        rank=rank,
        alpha=alpha,
        layers=layers,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        keep_rest=keep_rest,
        seed=seed,
    )
    made = train_lora.train(
        model,
        folder,
        output,
        plan,
        trigger=trigger,
        keep_prompts=keep_prompts,
        minutes=minutes,
        resume=resume,
        threads=threads,
        device=device,
        report=Progress().say,
    )
    if as_json:
        printing.ok({"folder": str(made)})
    else:
        printing.line(str(made))
