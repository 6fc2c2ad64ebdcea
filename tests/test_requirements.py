"""requirements.txt is the tested environment: exact, complete, and free of anything of one machine."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "requirements.txt").read_text()
LINES = [line.strip() for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras that the tested environment holds; ray is for clusters.
TESTED_EXTRAS = ("flash", "dev")


def pins() -> dict[str, str]:
    """Package name -> version, of the lines that apply to this interpreter."""
    found = {}
    for line in LINES:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            found[canonicalize_name(wanted.name)] = str(wanted.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("line", LINES)
def test_every_line_is_one_exact_public_release(line):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+==\d[\w.]*( ; [^;]+)?", line), (
        "name==version, without a local version (+cpu), an address or an option"
    )


def test_no_package_stands_twice():
    names = [canonicalize_name(Requirement(line).name) for line in LINES]
    assert sorted(names) == sorted(set(names))


def test_the_comments_name_no_address():
    assert "://" not in TEXT


def test_the_tests_run_on_the_pinned_versions():
    """Except for torch: a GPU machine may bring its own, as long as the packaging accepts it."""
    pinned = pins()
    installed = {name: importlib.metadata.version(name) for name in pinned}
    torch = installed.pop("torch").partition("+")[0]
    assert installed == {name: version for name, version in pinned.items() if name != "torch"}
    (wanted,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert torch in wanted.specifier


def test_everything_the_packaging_asks_for_is_pinned_and_fits():
    asked = [*PROJECT["dependencies"], *(line for extra in TESTED_EXTRAS
                                         for line in PROJECT["optional-dependencies"][extra])]  # fmt: skip
    for line in asked:
        wanted = Requirement(line)
        version = pins().get(canonicalize_name(wanted.name))
        assert version is not None, f"pyproject.toml asks for {wanted.name}; requirements.txt has no pin"
        assert version in wanted.specifier, f"pyproject.toml asks for {wanted}; the pin is {version}"


def test_everything_the_pins_ask_for_is_pinned_too():
    """Indirect requirements, except the CUDA libraries that some builds of torch bring along."""
    missing = set()
    for name in pins():
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            if name == "torch" and re.match(r"nvidia|cuda|triton", wanted.name):
                continue
            if canonicalize_name(wanted.name) not in pins():
                missing.add(f"{wanted.name} (for {name})")
    assert not missing


def imported_third_parties(*folders: str) -> set[str]:
    """Top names of the modules that our code imports and that neither Python nor we bring."""
    import ast
    import sys

    ours = {"app", "gen", "pipelines", "weights"}
    tops = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    tops.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    tops.add(node.module.split(".")[0])
    return tops - ours - set(sys.stdlib_module_names)


# FlashAttention 3 is in no package index; its row of the attention table says where it is to be had.
FROM_SOURCE = {"flash_attn_interface"}


def test_what_the_code_imports_is_declared():
    """An import that works only because some other package brings it breaks when that one changes."""
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = {canonicalize_name(Requirement(line).name)
                for lines in PROJECT["optional-dependencies"].values() for line in lines}  # fmt: skip
    undeclared = {
        module
        for module in imported_third_parties("app", "gen", "pipelines", "weights")
        if module not in FROM_SOURCE
        and not {canonicalize_name(name) for name in providers.get(module, [module])} & (declared | optional)
    }
    assert not undeclared


def test_every_pin_runs_on_every_python_that_the_packaging_admits():
    """soupsieve 4.1 asks for 3.11.5, for instance, and Debian 12 has 3.11.2."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asked = {name: importlib.metadata.metadata(name).get("Requires-Python", "") for name in pins()}
    assert {name: wanted for name, wanted in asked.items() if oldest not in SpecifierSet(wanted)} == {}
