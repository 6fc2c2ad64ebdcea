"""Time a first picture: `gen run` against the plainest diffusers script, same weights, same seed.

Each measurement is a fresh process, from start to exit, as a person waits for it. The two sides take turns.
A first round, which fills the disk cache, is not counted. Prints a Markdown table; benchmarks/README.md says
what becomes of it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from PIL import Image, ImageChops

from gen import catalog

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red cube"
SEED = "0"


@dataclass
class Side:
    """One of the two programs, and what was measured of it."""

    name: str
    command: list[str]
    output: Path
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def run(self, counted: bool) -> None:
        """Run once in a fresh process. Raises CalledProcessError when it fails."""
        self.output.unlink(missing_ok=True)
        started = time.perf_counter()
        # wait4 tells the largest memory of this very process; subprocess does not.
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code:
            print(said, file=sys.stderr)
            raise subprocess.CalledProcessError(code, self.command)
        if counted:
            self.seconds.append(seconds)
            self.peak_bytes = max(self.peak_bytes, usage.ru_maxrss * 1024)


def sides(folder: Path, scratch: Path) -> list[Side]:
    """The two programs, drawing the same prompt from the same folder into `scratch`."""
    ours, plain = scratch / "gen.png", scratch / "plain.png"
    script = str(ROOT / "benchmarks" / "plain_diffusers.py")
    gen = [sys.executable, "-m", "gen.cli", "run", "pixart-sigma:toy", "--prompt", PROMPT, "--seed", SEED]
    return [
        Side("gen run", [*gen, "--output", str(ours)], ours),
        Side("plain diffusers", [sys.executable, script, str(folder), PROMPT, str(plain), SEED], plain),
    ]


def commit() -> str:
    """The short commit of the tree, with a mark when files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def report(measured: list[Side], difference: int) -> str:
    """The Markdown table, with what is needed to understand it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    lines = [
        f"commit {commit()}; Python {platform.python_version()}, {packages}; {platform.machine()}, "
        f"{os.cpu_count()} CPUs; load {os.getloadavg()[0]:.1f}",
        "",
        "| | median seconds | fastest | slowest | peak memory |",
        "|---|---|---|---|---|",
    ]
    for side in measured:
        lines.append(
            f"| {side.name} | {statistics.median(side.seconds):.2f} | {min(side.seconds):.2f} "
            f"| {max(side.seconds):.2f} | {side.peak_bytes / 1e6:.0f} MB |"
        )
    ratio = statistics.median(measured[0].seconds) / statistics.median(measured[1].seconds)
    lines += ["", f"Ratio {ratio:.2f}. Largest difference of a pixel's channel: {difference} of 255."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each side (default 3)")
    runs = parser.parse_args().runs
    if runs < 1:
        parser.error("--runs must be at least 1")
    _, _, folder = catalog.choose(catalog.MODELS["pixart-sigma"], "toy")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GEN_HOME"] = scratch
        measured = sides(folder, Path(scratch))
        for number in range(runs + 1):
            for side in measured:
                side.run(counted=number > 0)
        pictures = [Image.open(side.output).convert("RGB") for side in measured]
        channels = ImageChops.difference(*pictures).getextrema()
        print(report(measured, max(high for _, high in channels)))


if __name__ == "__main__":
    main()
