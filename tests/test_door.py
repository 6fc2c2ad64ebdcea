"""The front door: the wheel holds what it should and nothing else, and draws from an empty folder.

The wheel is built from a copy of just the files it is made of, installed beside (not into) the test
environment, and run through its own `gen` script, so that nothing can be borrowed from the source tree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

import gen

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "gen", "pipelines", "weights")
INGREDIENTS = ("pyproject.toml", "README.md", "LICENSE", *PACKAGES)


def pip(*arguments: object, **options) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)
    assert done.returncode == 0, f"pip {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"


def source_files() -> set[str]:
    """What belongs into the wheel: every file of the four packages, the toy weights included."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without network from a copy (setuptools leaves its leavings where it builds)."""
    tree = tmp_path_factory.mktemp("tree")
    for name in INGREDIENTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, tree)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """Call the installed `gen` from an empty folder, with an empty home and no way to the network."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        nowhere = "http://127.0.0.1:9"  # the discard port: whoever tries to download fails at once
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GEN_")},
            "PYTHONPATH": str(installed), "HOME": str(tmp_path / "home"), "GEN_HOME": str(tmp_path / "gen"),
            "HF_HOME": str(tmp_path / "hf"), "http_proxy": nowhere, "https_proxy": nowhere,
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, str(installed / "bin" / "gen"), *arguments],
            cwd=empty, env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip

    return call


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source_files()


def test_the_wheel_carries_the_embedded_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "weights/toy/pixart-sigma/model_index.json" in names
    assert any(name.endswith(".safetensors") for name in names)


def test_the_wheel_says_who_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name.split("/", 1)[1]: archive.read(name).decode() for name in archive.namelist()
                 if ".dist-info/" in name}  # fmt: skip
    about = Parser().parsestr(texts["METADATA"])
    assert about["Name"] == "gen-studio"
    assert about["Version"] == gen.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "gen = gen.cli:main" in texts["entry_points.txt"]
    assert "serve = app.server:serve_command" in texts["entry_points.txt"]


def test_the_version_is_the_same_everywhere(run):
    assert f"## [{gen.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    said = run("--version")
    assert said.returncode == 0, said.stderr
    assert gen.__version__ in said.stdout


def test_list_works_from_the_installed_copy_in_an_empty_folder(run):
    listed = run("list")
    assert listed.returncode == 0, listed.stderr
    assert "pixart-sigma" in listed.stdout


def test_serve_is_found_through_its_entry_point(run):
    shown = run("serve", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--port" in shown.stdout


def test_the_first_picture_comes_without_network_from_the_installed_copy(run, installed):
    done = run("run", "pixart-sigma", "--prompt", "a red cube", "--steps", "2", "--seed", "7", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    again = run("run", "pixart-sigma", "--prompt", "a red cube", "--steps", "2", "--seed", "7")
    (path,) = again.stdout.split("\n")[:-1]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (128, 128)
    assert not list((installed.parent / "empty").glob("*")), "nothing is left in the folder one works in"
