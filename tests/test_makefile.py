"""The Makefile is the front door of the source tree: it explains itself and passes words on unchanged."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"setup", "run", "serve", "lint", "test", "test-fast", "bench", "docs", "wheel", "clean"}


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env={**outside, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_make_alone_lists_every_target_with_a_sentence():
    result = make()
    assert result.returncode == 0, result.stderr
    listed = dict(re.findall(r"^  make ([a-z-]+)\s+(\S.+)$", result.stdout, re.M))
    assert set(listed) == TARGETS | {"help"}


def test_every_target_is_phony():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.M)
    assert set(phony.split()) == TARGETS | {"help"}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_can_be_planned(target):
    """`make -n` resolves prerequisites and variables without running anything."""
    result = make("-n", target)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("target", ["run", "serve", "lint", "test", "test-fast", "bench", "docs", "wheel"])
def test_every_working_target_sets_up_first_but_only_when_something_changed(target, tmp_path):
    never, stamped = tmp_path / "never", tmp_path / "stamped"
    stamped.mkdir()
    (stamped / ".installed").touch()
    assert "pip install" in make("-n", target, f"VENV={never}").stdout
    assert "pip install" not in make("-n", target, f"VENV={stamped}").stdout


def test_changed_pins_install_again(tmp_path):
    (tmp_path / ".installed").touch()
    assert "pip install" in make("-n", "setup", f"VENV={tmp_path}", "-W", "requirements.txt").stdout


PROMPTS = [
    "two words",
    'it\'s "quoted"',
    "costs $5 and $(shell echo x) `ls`",
    "a; b & c | d # e",
    "back\\slash",
    "ünï 红",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_reaches_the_command_unchanged(prompt, tmp_path):
    """A stand-in for the gen command writes down the words it was given."""
    said = tmp_path / "said"
    binary = tmp_path / "bin" / "gen"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(said))}\n')
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    (tmp_path / ".installed").touch()
    for result in (
        make("run", f"VENV={tmp_path}", f"PROMPT={prompt}"),
        make("run", f"VENV={tmp_path}", PROMPT=prompt),
    ):
        assert result.returncode == 0, result.stderr
        assert said.read_text().split("\0")[:-1] == ["run", "pixart-sigma", "--prompt", prompt]


def test_an_old_python_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'env'}")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / "env").exists()


def test_ci_runs_make_test_and_passes_its_exit_code_on(tmp_path):
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "make $*"\nexit 7\n')
    fake.chmod(0o755)
    result = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (7, "make test\n")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_can_be_run_and_parse(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
