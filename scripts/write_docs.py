"""Write docs/cli.md from the commands themselves. `make docs` runs it; tests/test_docs.py compares.

`python scripts/write_docs.py --check` writes nothing and ends with exit code 1 when the file is out of date.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from gen.commands import cli

CLI_MD = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
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


def main(arguments: list[str]) -> int:
    """Write the file, or with --check only compare; return the exit code."""
    text = cli_md()
    fresh = CLI_MD.exists() and CLI_MD.read_text(encoding="utf-8") == text
    if "--check" in arguments:
        return 0 if fresh else 1
    if not fresh:
        CLI_MD.write_text(text, encoding="utf-8")
        print(f"wrote {os.path.relpath(CLI_MD)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
