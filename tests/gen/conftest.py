"""Small real weights that the engine finds as pixart-sigma:toy, and short ways to draw with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen import cli, engine
from gen.request import Request, Result, Settings


@pytest.fixture(scope="session")
def weights_root(tiny_toy_folder, tmp_path_factory) -> Path:
    """What GEN_WEIGHTS_DIR may name: a folder with toy/pixart-sigma in it."""
    root = tmp_path_factory.mktemp("weights")
    (root / "toy").mkdir()
    (root / "toy" / "pixart-sigma").symlink_to(tiny_toy_folder)
    return root


@pytest.fixture
def installed(weights_root, tmp_path, monkeypatch) -> Path:
    """pixart-sigma:toy is on this machine, nothing else is, and no gen.toml of the user is in the way."""
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(weights_root))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    return weights_root


@pytest.fixture
def installed_dit(installed, tiny_dit_folder, tmp_path, monkeypatch) -> Path:
    """dit:toy is on this machine as well."""
    root = tmp_path / "weights"
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "dit").symlink_to(tiny_dit_folder)
    (root / "toy" / "pixart-sigma").symlink_to((installed / "toy" / "pixart-sigma").resolve())
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(root))
    return root


@pytest.fixture
def installed_delta(installed, tiny_delta_folder, tmp_path, monkeypatch) -> Path:
    """pixart-delta:toy is on this machine as well, with its control branch."""
    root = tmp_path / "weights"
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "pixart-delta").symlink_to(tiny_delta_folder)
    (root / "toy" / "pixart-sigma").symlink_to((installed / "toy" / "pixart-sigma").resolve())
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(root))
    return root


@pytest.fixture
def installed_dit3d(installed, tiny_dit3d_folder, tmp_path, monkeypatch) -> Path:
    """dit-3d:toy is on this machine as well."""
    root = tmp_path / "weights"
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "dit-3d").symlink_to(tiny_dit3d_folder)
    (root / "toy" / "pixart-sigma").symlink_to((installed / "toy" / "pixart-sigma").resolve())
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(root))
    return root


@pytest.fixture
def draw(installed):
    """draw("a red cube", seed=1) -> the list of results, in two steps at 64 pixels unless told otherwise."""

    def draw(prompt: str = "a red cube", settings: Settings | None = None, **values) -> list[Result]:
        values = {"steps": 2, "width": 64, "height": 64, "seed": 1, "prompt": prompt} | values
        events = [*engine.run(Request.build("pixart-sigma:toy", values), settings)]
        return [*events[-1].results]

    return draw


@pytest.fixture
def gen(capsys):
    """The command line: words to exit code, stdout and stderr."""

    def gen(*arguments: object) -> tuple[int, str, str]:
        code = cli.execute([str(one) for one in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return gen
