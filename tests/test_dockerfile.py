"""The Dockerfile cannot be built by the tests (no container engine), so what can be read is read."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest of the line) in order, with continued lines joined and comments left out."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in values("ENV") for pair in shlex.split(rest))


def sources() -> list[str]:
    """Everything that COPY takes from the build context."""
    return [name for rest in values("COPY") for name in rest.split()[:-1]]


def is_ignored(name: str) -> bool:
    """Whether .dockerignore keeps `name` out of the build context: the last pattern that matches decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep = pattern.startswith("!")
            pattern = pattern.lstrip("!")
            if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, pattern.removeprefix("**/")):
                ignored = not keep
    return ignored


def test_the_base_image_names_its_version():
    (base,) = values("FROM")
    assert re.fullmatch(r"python:3\.11[\w.-]*", base)


def test_only_known_instructions_are_used():
    known = {
        "FROM",
        "LABEL",
        "SHELL",
        "RUN",
        "ARG",
        "WORKDIR",
        "COPY",
        "ENV",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in instructions()} <= known


@pytest.mark.parametrize("name", sorted(set(sources())))
def test_every_file_that_is_copied_exists_and_reaches_the_build(name):
    assert (ROOT / name).exists(), f"COPY {name}: there is no such file"
    assert not is_ignored(name), f"COPY {name}: .dockerignore leaves it out"


@pytest.mark.parametrize("name", [".git", ".venv", ".train", "tests", "benchmarks", "docs", ".env"])
def test_what_the_image_does_not_need_stays_outside(name):
    assert is_ignored(name)


def test_what_the_wheel_is_made_of_is_copied():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name for name in found if "." not in name}
    files = {settings["project"]["readme"], *settings["project"]["license-files"], "pyproject.toml"}
    assert set(sources()) == packages | files | {"requirements.txt"}


def test_pins_are_installed_before_the_source_is_copied():
    order = [f"{name} {rest}" for name, rest in instructions()]
    pins = next(i for i, line in enumerate(order) if "pip install" in line and "-r run.txt" in line)
    source = next(i for i, line in enumerate(order) if line.startswith("COPY gen"))
    studio = next(i for i, line in enumerate(order) if "--no-deps" in line)
    assert pins < source < studio


def test_the_line_that_cuts_the_requirements_cuts_off_tests_and_tools_only():
    (command,) = [rest for rest in values("RUN") if "sed" in rest]
    pattern = re.search(r"sed '/\^(.*?)/,\$d'", command)[1]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (cut,) = [i for i, line in enumerate(lines) if line.startswith(pattern)]
    assert any(line.startswith("torch==") for line in lines[:cut])
    assert any(line.startswith("setuptools==") for line in lines[:cut]), "--no-build-isolation needs it"
    assert any(line.startswith("pytest==") for line in lines[cut:])


def test_pip_leaves_no_cache_in_the_image():
    commands = [rest for rest in values("RUN") if "pip install" in rest]
    assert commands
    assert all("--no-cache-dir" in command for command in commands)


def test_it_runs_as_user_1000_and_writes_below_that_users_home():
    (user,) = values("USER")
    assert user == "1000"
    assert any("--uid 1000" in rest for rest in values("RUN"))
    settings = environment()
    for name in ("GEN_HOME", "HF_HOME", "GRADIO_TEMP_DIR"):
        assert settings[name].startswith("/home/gen/"), name
    last_root = max(i for i, (name, _) in enumerate(instructions()) if name in {"RUN", "COPY"})
    assert last_root < [name for name, _ in instructions()].index("USER"), "nothing is installed by the user"


def test_it_serves_on_7860_and_says_that_serving_openly_is_meant():
    assert values("EXPOSE") == ["7860"]
    settings = environment()
    assert settings["GEN_PORT"] == "7860"
    assert settings["GEN_HOST"] == "0.0.0.0"
    assert settings["GEN_PUBLIC"] == "1"


def test_the_settings_named_here_are_read_by_the_server():
    code = "".join(path.read_text() for path in (ROOT / "app").glob("*.py"))
    for name in ("GEN_HOST", "GEN_PORT", "GEN_PUBLIC"):
        assert name in code, f"the Dockerfile sets {name}, and nothing in app/ reads it"


def test_commands_are_in_exec_form_and_start_the_page():
    assert [json.loads(rest) for rest in values("ENTRYPOINT")] == [["gen"]]
    assert [json.loads(rest) for rest in values("CMD")] == [["serve"]]


def test_the_health_check_is_python_that_compiles():
    (check,) = values("HEALTHCHECK")
    command = json.loads(check.split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "GEN_PORT" in command[2]
    (route,) = re.findall(r"'(/[\w/]+)'", command[2])
    assert f'"{route}"' in (ROOT / "app" / "server.py").read_text(), "the door must let the check in"
