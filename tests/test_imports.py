"""Imports point downwards: app -> gen -> {pipelines, weights}; importing starts quickly and leaves no trace.

The rule is read from the source, not from what happens to run: an import inside a function counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Which of our packages each of our packages may import, besides itself. Third parties are free.
MAY_IMPORT = {
    "app": {"gen"},
    "gen": {"pipelines", "weights"},
    "pipelines": set(),
    "weights": set(),
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute dotted names of every module that `source` imports, wherever the statement stands.

    `package` is the dotted package the file lies in; relative imports are resolved against it.
    `importlib.import_module("x")` and `__import__("x")` with a literal name count as imports.
    """
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            modules.add(base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                modules.add(node.args[0].value)
    return modules


def broken_rule(source: str, path: str) -> str | None:
    """One sentence when the file at `path` (relative to the repository) imports what it may not."""
    parts = Path(path).with_suffix("").parts
    package = parts[0]
    tops = {module.split(".")[0] for module in imported_modules(source, ".".join(parts[:-1]))}
    wrong = tops & (set(MAY_IMPORT) - MAY_IMPORT[package] - {package})
    if not wrong:
        return None
    allowed = " and ".join(sorted(MAY_IMPORT[package])) or "only third parties"
    return f"{path} imports {', '.join(sorted(wrong))}; {package}/ may import {allowed}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    sentence = broken_rule(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert sentence is None, sentence


def test_every_package_of_ours_is_looked_at():
    seen = {path.relative_to(ROOT).parts[0] for path in SOURCES}
    assert seen == set(MAY_IMPORT), "a package without sources would pass the rule unread"


FORBIDDEN = [
    ("pipelines/x.py", "import gen.engine", "pipelines/x.py imports gen; pipelines/ may import only third"),
    ("pipelines/models/x.py", "from weights.store import find", "pipelines/models/x.py imports weights;"),
    ("weights/x.py", "def f():\n    from pipelines.models import pixart", "weights/x.py imports pipelines;"),
    ("gen/x.py", "try:\n    import app\nexcept ImportError:\n    raise", "gen/x.py imports app;"),
    ("gen/x.py", "import importlib\nimportlib.import_module('app.server')", "gen/x.py imports app;"),
    ("app/x.py", "import torch, weights.store", "app/x.py imports weights; app/ may import gen"),
    ("app/x.py", "def f():\n    import gen\n    from pipelines import Step", "app/x.py imports pipelines;"),
]
ALLOWED = [
    ("app/x.py", "from gen.catalog import MODELS\nfrom . import controls\nimport gradio"),
    ("gen/x.py", "import torch\ndef f():\n    from weights import store\n    import pipelines.x as x"),
    ("pipelines/models/x.py", "from .. import Step\nfrom .layers import positions\nimport diffusers"),
    ("weights/x.py", "from . import registry\nimport generic, application"),
]


@pytest.mark.parametrize(("path", "source", "sentence"), FORBIDDEN)
def test_the_rule_notices_what_it_forbids(path, source, sentence):
    assert (broken_rule(source, path) or "").startswith(sentence)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_the_rule_lets_pass_what_it_allows(path, source):
    assert broken_rule(source, path) is None


def python(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter whose home, user folder and working folder are empty."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GEN_")},
        "HOME": str(home),
        "GEN_HOME": str(tmp_path / "gen-home"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=environment,
        text=True,
        capture_output=True,
        timeout=280,
        check=False,
    )


# Runs the real command inside one interpreter and then says what it loaded.
RUN_AND_LIST_MODULES = """
import sys
from gen.cli import main
sys.argv = ["gen", *{arguments!r}]
code = 0
try:
    code = main() or 0
except SystemExit as stopped:
    code = stopped.code or 0
heavy = sorted(set(sys.modules) & {{"torch", "diffusers", "transformers", "gradio", "numpy", "fastapi"}})
print("LOADED", code, *heavy)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["run", "--help"], ["run", "pixart-sigma", "--help"]], ids=" ".join
)
def test_looking_around_loads_neither_torch_nor_gradio(arguments, tmp_path):
    result = python(RUN_AND_LIST_MODULES.format(arguments=arguments), tmp_path)
    lines = result.stdout.splitlines()
    assert len(lines) > 1, f"gen {' '.join(arguments)} printed nothing: {result.stderr}"
    assert lines[-1] == "LOADED 0", f"gen {' '.join(arguments)} should load nothing heavy: {lines[-1]}"


def test_importing_the_light_modules_and_listing_loads_no_torch_and_creates_no_file(tmp_path):
    light = [
        "gen",
        "gen.catalog",
        "gen.request",
        "gen.errors",
        "gen.library",
        "gen.artifacts",
        "gen.jobs",
        "gen.cli",
        "weights",
        "weights.registry",
        "weights.store",
    ]
    result = python(
        f"import importlib, sys\nimport gen.cli\nfor name in {light!r}: importlib.import_module(name)\n"
        "sys.argv = ['gen', 'list']\n"
        "try:\n    gen.cli.main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert left_behind(tmp_path) == []


def test_importing_the_heavy_modules_creates_no_file_and_prints_nothing(tmp_path):
    result = python("import gen.engine, gen.loader, pipelines.pixart_sigma, app.server, app.page", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert left_behind(tmp_path) == []


def left_behind(folder: Path) -> list[str]:
    """Files below `folder`, except caches that third parties write for themselves."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    )
