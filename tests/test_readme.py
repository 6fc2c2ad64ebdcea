"""The README's commands are real: each is taken by the real parser, the cheap ones are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gen.commands import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# These answer in a moment and change nothing, so they are run and not only parsed.
CHEAP = {"list", "show", "history"}


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands(first: str) -> list[list[str]]:
    """The lines of bash blocks that call `first`, as words, without remarks."""
    lines = [line for block in fenced("bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == first]


def line(words: list[str]) -> str:
    return " ".join(words)


def test_the_readme_opens_with_the_two_commands():
    first = fenced("bash")[0].splitlines()
    assert [one.split("#")[0].strip() for one in first] == ["make run", "make test"]


def test_there_are_examples_to_look_at():
    assert {words[1] for words in commands("gen")} >= {"list", "show", "run", "history"}


@pytest.mark.parametrize("words", commands("gen"), ids=line)
def test_every_example_is_taken_by_the_parser(words):
    """Unknown commands, options and values end in a usage error here; nothing is run."""
    context = click.Context(cli, info_name="gen", **cli.context_settings)
    name, command, rest = cli.resolve_command(context, words[1:])
    assert command is not None, f"there is no `gen {name}`"
    if "--help" not in rest:
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    "words", [one for one in commands("gen") if one[1] in CHEAP or "--help" in one], ids=line
)
def test_every_cheap_example_runs(words, tmp_path):
    command = [sys.executable, "-m", "gen.cli", *words[1:]]
    home = {**os.environ, "GEN_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=home, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


def test_commands_named_in_the_text_exist():
    named = set(re.findall(r"`gen ([a-z]+)", TEXT))
    assert named
    for name in named:
        assert cli.get_command(click.Context(cli), name) is not None, f"`gen {name}` does not exist"


def test_the_python_example_works_as_printed(capsys, monkeypatch, tmp_path):
    """Run as it stands; the embedded weights draw for real."""
    monkeypatch.setenv("GEN_HOME", str(tmp_path))
    (code,) = fenced("python")
    exec(compile(code, "README.md", "exec"), {})
    printed = Path(capsys.readouterr().out.strip())
    assert printed.is_file()
    assert printed.is_relative_to(tmp_path)


def test_the_settings_of_the_space_fit_the_dockerfile():
    """Hugging Face reads the block at the top of the README."""
    head = dict(one.split(": ", 1) for one in TEXT.split("---\n")[1].splitlines())
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert head["sdk"] == "docker"
    assert f"EXPOSE {head['app_port']}" in dockerfile
    assert head["license"] == "apache-2.0"
    assert len(head["short_description"]) <= 60
    assert head["title"] == "Gen Studio"


@pytest.mark.parametrize("place", ["picture", "screenshots", "quality"])
def test_the_places_that_programs_fill_are_there_once(place):
    assert TEXT.count(f"<!-- {place}:begin -->") == TEXT.count(f"<!-- {place}:end -->") == 1
    assert TEXT.index(f"<!-- {place}:begin -->") < TEXT.index(f"<!-- {place}:end -->")


def test_the_first_picture_comes_before_the_first_command():
    picture = re.search(r"!\[.+?\]\((.+?)\)", TEXT)
    assert picture.start() < TEXT.index("```bash")
    assert (ROOT / picture[1]).is_file()
