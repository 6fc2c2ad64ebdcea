"""`gen prompts`: how a prompt is read, and which styles and wildcards there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gen import catalog, printing, prompts
from gen.errors import GenError
from gen.request import Request


@click.command("prompts", short_help="Show how a prompt is read, or what it may hold.")
@click.argument("words", nargs=-1, metavar="[PROMPT]")
@click.option("--model", metavar="MODEL", default="pixart-sigma", help="Whose tokens to count.")
@click.option("--style", metavar="NAME", help="Words around the prompt.")
@click.option("--negative-prompt", metavar="TEXT", help="What to keep out of the picture.")
@click.option("--seed", metavar="N", help="Which picture's wildcards to pick; left out, any.")
@click.option("--steps", metavar="N", help="Of which words take turns.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    words: tuple[str, ...],
    model: str,
    style: str | None,
    negative_prompt: str | None,
    seed: str | None,
    steps: str | None,
    as_json: bool,
) -> None:
    """Show how a prompt is read, without drawing: wildcards, weights, turns, tokens, and what is cut off.

    \b
      (red:1.3)         counts 1.3 times, 0 to 2
      [cow|horse]       the steps take turns
      [cow:horse:0.4]   cow in the first 0.4 of the steps, then horse
      __colour__        a line of colour.txt, picked by the seed
      \\( \\[ \\__         the characters themselves

    Without a prompt: the styles and the wildcards there are.
    """
    if not words:
        _list(as_json)
        return
    row, _ = catalog.find(model)
    if "prompt" not in {one.name for one in row.inputs}:
        raise GenError(f"{row.name} reads no prompt.", "See `gen list` for others.", "bad_input")
    given = {"style": style, "negative_prompt": negative_prompt, "seed": seed, "steps": steps}
    request = Request.build(
        model,
        {"prompt": " ".join(words), "long_prompt": "chunks"}
        | {name: value for name, value in given.items() if value is not None},
    )
    _, facts, folder = catalog.choose(row, request.weights)
    inputs = request.each()[0].inputs
    texts = {
        name: _read(inputs[name], int(inputs["steps"]), folder, facts.max_tokens)
        for name in prompts.TEXTS
        if inputs[name]
    }
    if as_json:
        reference = f"{request.model}:{request.weights}"
        printing.ok({"model": reference, "seed": request.seed, "steps": inputs["steps"], **texts})
        return
    for name, text in texts.items():
        label = next(one.label for one in row.inputs if one.name == name)
        printing.line(f"{label}: {text['text']}")
        for one in text["read"]:
            _show(one, alone=len(text["read"]) == 1, limit=facts.max_tokens)


def _read(text: str, steps: int, folder: Path, limit: int | None) -> dict[str, Any]:
    """All that is read of a text in the course of the steps."""
    from pipelines import components
    from pipelines.prompts import chunks, variants

    tokenizer = components.load(folder / "tokenizer", "T5Tokenizer")

    def count(words: str) -> int:
        return len(tokenizer(words, verbose=False).input_ids)

    found = []
    rows, turns = variants([text], steps)
    for number, (words,) in enumerate(rows):
        cleaned = words.cleaned()
        cuts = chunks(count, cleaned.text, limit) if limit else [(0, len(cleaned.text))]
        found.append(
            {
                "text": words.text,
                "steps": [step + 1 for step, turn in enumerate(turns) if turn == number],
                "tokens": count(cleaned.text),
                "weights": [
                    {"words": part, "weight": weight} for part, weight in _runs(words) if weight != 1
                ],
                "chunks": [cleaned.part(*cut).text for cut in cuts],
            }
        )
    return {"text": text, "read": found}


def _runs(words: Any) -> list[tuple[str, float]]:
    """Neighbouring characters of the same weight."""
    runs: list[tuple[str, float]] = []
    for letter, weight in zip(words.text, words.weights, strict=False):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + letter, weight)
        else:
            runs.append((letter, weight))
    return runs


def _show(one: Mapping[str, Any], alone: bool, limit: int | None) -> None:
    when = "read" if alone else f"steps {_spans(one['steps'])}"
    printing.line(f"  {when}: {one['text']}")
    for part in one["weights"]:
        printing.line(f"    {part['weight']:g} x {part['words'].strip()}")
    most = f" of {limit}" if limit else ""
    printing.line(f"    {one['tokens']} tokens{most}")
    if len(one["chunks"]) > 1:
        printing.line(f"    with --long-prompt chunks, {len(one['chunks'])} parts; else the rest is cut off:")
        for number, part in enumerate(one["chunks"], 1):
            printing.line(f"      {number}: {part}")


def _spans(steps: list[int]) -> str:
    """`1-4, 6`, and of many the first."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")


def _list(as_json: bool) -> None:
    styles, files = prompts.styles(), prompts.Wildcards()
    if as_json:
        printing.ok(
            {
                "styles": {name: vars(one) for name, one in styles.items()},
                "wildcards": {name: files.lines(name) for name in files.files},
            }
        )
        return
    printing.table([("STYLE", "PROMPT"), *((name, one.prompt) for name, one in styles.items())])
    printing.line("")
    if not files.files:
        folders = " or ".join(map(str, prompts.wildcard_folders()))
        printing.line(f"No wildcards: write one choice a line into NAME.txt in {folders}.")
        return
    rows = [(f"__{name}__", str(len(files.lines(name))), str(path)) for name, path in files.files.items()]
    printing.table([("WILDCARD", "LINES", "FILE"), *rows])
