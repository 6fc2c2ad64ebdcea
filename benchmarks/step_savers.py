"""Step savers on the embedded models: what they save, and what the pictures lose.

    .venv/bin/python -m benchmarks.step_savers [--model pixart-sigma|dit] [--count N] [--saver TEXT]...

Draws held-out prompts, or classes in turn, once in full, once with each saver, and once with as many plain
steps as the saver's work would pay for: "same work, fewer steps". Work is counted in rows of the blocks, two
for a step with guidance, by a hook in the network. The embedded judge reads every picture, and the PSNR is
against the full picture of the same seed. `--seconds` adds wall time, which means something only on a machine
that does nothing else. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import commit
from gen import catalog, evaluate
from gen.toy import dit as toy_dit
from gen.toy.judge import load_judge, read, verdict
from pipelines import step_savers
from pipelines.dit import DiTPipeline
from pipelines.pixart_sigma import PixArtSigmaPipeline

BATCH = 16
SAVERS = {
    "pixart-sigma": (
        "guidance=0.1:0.6",
        "guidance=0.2:0.8",
        "guidance=0.3:1",
        "guidance=0.5:1",
        "tgate=10",
        "tgate=5",
        "taylor=2:0",
        "taylor=2:1",
        "taylor=2:2",
        "taylor=3:0",
        "taylor=3:1",
        "taylor=3:2",
        "taylor=4:1",
        "guidance=0.3:1,taylor=2:1",
        "guidance=0.3:1,taylor=3:1",
    ),
    "dit": (
        "guidance=0.1:0.6",
        "guidance=0.3:1",
        "guidance=0.5:1",
        "taylor=2:0",
        "taylor=2:1",
        "taylor=3:1",
        "taylor=4:1",
        "guidance=0.3:1,taylor=2:1",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One way of drawing, measured."""

    pictures: Tensor  # (n, 3, Y, X) in 0..1
    right: list[bool]
    rows: float  # of the blocks, for one picture
    seconds: float  # for one picture, without text and autoencoder


class Subject:
    """A model, what it is asked for, and whether it drew that."""

    def __init__(self, name: str, count: int) -> None:
        _, _, folder = catalog.choose(catalog.MODELS[name], "toy")
        self.judge = load_judge(evaluate._embedded("judge-toy"))
        self.pipeline: Any
        self.given: Sequence[Any]
        self.is_right: Callable[[int, Any], bool]
        if name == "dit":
            self.pipeline = DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32)
            labels = self.given = toy_dit.even_labels(count)
            self.is_right = lambda n, seen: (
                [(one.colour, one.shape) for one in seen] == [toy_dit.CLASSES[labels[n]]]
            )
            self.options: dict[str, Any] = {"guidance_scale": toy_dit.GUIDANCE}
        else:
            self.pipeline = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
            asked = evaluate.prompts(count)
            self.given = [one.text for one in asked]
            self.is_right = lambda n, seen: verdict(asked[n].caption, seen).placed
            self.options = {"guidance_scale": 4.5, "use_resolution_binning": False}

    def draw(self, steps: int, savers: str = "") -> Drawn:
        """Picture n from noise of seed n."""
        rows: list[int] = []
        layer = self.pipeline.transformer.transformer_blocks[-1].ff
        hook = layer.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        pictures, seconds = [], 0.0
        for some in _portions(len(self.given)):
            run = self.pipeline.denoise(
                [self.given[n] for n in some],
                num_inference_steps=steps,
                savers=savers,
                generator=[torch.Generator().manual_seed(n) for n in some],
                **self.options,
            )
            with closing(run):
                step = next(run)  # brings the encoding of the text, which no saver changes
                start = time.perf_counter()
                for step in run:  # noqa: B007 - the last one is wanted
                    pass
                seconds += time.perf_counter() - start
            pictures.append(self.pipeline.decode(step.latents, "pt").float())
        hook.remove()
        drawn = torch.cat(pictures)
        seen = [one for some in drawn.split(64) for one in read(self.judge, some)]
        return Drawn(
            pictures=drawn,
            right=[self.is_right(n, one) for n, one in enumerate(seen)],
            rows=sum(rows) / len(drawn),
            seconds=seconds / len(drawn),
        )


def _portions(count: int) -> list[range]:
    return [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def psnr(found: Tensor, expected: Tensor) -> float:
    """Median over the pictures: the mean would be that of the few that did not change."""
    errors = (found - expected).pow(2).flatten(1).mean(1)
    return statistics.median((-10 * errors.clamp(min=1e-10).log10()).tolist())


def line(name: str, drawn: Drawn, full: Drawn, seconds: bool) -> str:
    pairs = list(zip(drawn.right, full.right, strict=True))
    won, lost = (sum(one and not other for one, other in some) for some in (pairs, [p[::-1] for p in pairs]))
    cells = [
        name,
        f"{drawn.rows:.0f}",
        f"{full.rows / drawn.rows:.2f}",
        f"{100 * sum(drawn.right) / len(drawn.right):.1f} %",
        "" if drawn is full else f"+{won} -{lost}",
        "" if drawn is full else f"{psnr(drawn.pictures, full.pictures):.1f}",
        *([f"{drawn.seconds:.3f}"] if seconds else []),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SAVERS, default="pixart-sigma")
    parser.add_argument("--count", type=int, default=128, help="pictures for each way of drawing")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--saver", action="append", metavar="TEXT", help="instead of the usual ones")
    parser.add_argument("--seconds", action="store_true", help="show wall time; only for a quiet machine")
    arguments = parser.parse_args()
    if arguments.count < 16:
        parser.error("--count must be at least 16: fewer pictures say nothing")
    try:
        for text in arguments.saver or ():
            step_savers.parse(text)
    except ValueError as error:
        parser.error(str(error))
    subject = Subject(arguments.model, arguments.count)
    full = subject.draw(arguments.steps)
    heads = ["", "rows", "less work", "right", "against full", "PSNR, dB", *["seconds"] * arguments.seconds]
    load = f"; load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads" if arguments.seconds else ""
    print(
        f"commit {commit()}; torch {version('torch')}; {platform.machine()}{load}\n\n"
        f"{arguments.model}:toy, {arguments.count} pictures, float32; full is {arguments.steps} steps. "
        "PSNR is the median.\n\n"
        f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        + line(f"full, {arguments.steps} steps", full, full, arguments.seconds),
        flush=True,
    )
    plain: dict[int, Drawn] = {arguments.steps: full}
    for text in arguments.saver or SAVERS[arguments.model]:
        saved = subject.draw(arguments.steps, text)
        print(line(f"`{text}`", saved, full, arguments.seconds), flush=True)
        steps = max(1, round(saved.rows / full.rows * arguments.steps))
        if steps not in plain:
            plain[steps] = subject.draw(steps)
            print(line(f"{steps} plain steps", plain[steps], full, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
