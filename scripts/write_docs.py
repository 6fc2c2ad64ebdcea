"""Write docs/cli.md from the commands themselves, and README's quality table from the weights' own
record.

`make docs` runs it; tests/test_docs.py compares. `python scripts/write_docs.py --check` writes nothing
and ends with exit code 1 when a file is out of date.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gen.commands import cli
from gen.evaluate import markdown
from weights import registry

ROOT = Path(__file__).resolve().parents[1]
CLI_MD = ROOT / "docs" / "cli.md"
README = ROOT / "README.md"
HEAD = """\
# The command line

Written by `make docs` from `gen --help`; do not edit. Errors and exit codes: [errors.md](errors.md).
"""
COLUMNS = 100


def pages(
    command: click.Command, path: str, parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """(`gen run`, its --help text) for the command and everything below it, in the order of --help."""
    settings = {**command.context_settings, "max_content_width": COLUMNS, "terminal_width": COLUMNS}
    context = click.Context(command, info_name=path.split()[-1], parent=parent, **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None, f"`gen {name}` is listed and does not exist"
            yield from pages(below, f"{path} {name}", context)


def cli_md() -> str:
    """The text that docs/cli.md should have."""
    parts = [f"## {path}\n\n```text\n{text.rstrip()}\n```\n" for path, text in pages(cli, "gen")]
    return "\n".join([HEAD, *parts])


def measured() -> Iterator[dict[str, Any]]:
    """The tables that `gen evaluate --record` wrote into the embedded weights, in the registry's order."""
    for row in registry.CHECKPOINTS.values():
        path = ROOT / "weights" / row.folder / "toy.json"
        quality = (
            json.loads(path.read_text(encoding="utf-8"))["quality"] if row.folder and path.exists() else {}
        )
        if "rows" in quality:
            yield quality


def readme() -> str:
    """The text that README.md should have: the measured quality of the embedded weights between its
    markers."""
    tables = [markdown(quality) for quality in measured()]
    begin, end = "<!-- quality:begin -->\n", "<!-- quality:end -->"
    text, body = README.read_text(encoding="utf-8"), "\n".join(tables)
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{body}{end}", text, flags=re.S)


def main(arguments: list[str]) -> int:
    """Write what is out of date, or with --check only look; return the exit code."""
    stale = {
        path: text
        for path, text in ((CLI_MD, cli_md()), (README, readme()))
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if "--check" in arguments:
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
