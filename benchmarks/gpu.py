"""Everything that is to be measured on a GPU, one report for each question.

    python -m benchmarks.gpu --output benchmarks/results

Each line of `QUESTIONS` is a call of `gen bench`; what is to be reached stands beside it and goes into the
report. On a machine without a GPU only `--layers` and `--device cpu` make sense: they prove that every line
runs. The largest needs 20 GB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

GEN = (sys.executable, "-c", "from gen.cli import main; main()")
SIDES = "diffusers-bf16,diffusers-bf16-compiled,ours-bf16,ours-int8"
# Name of the report -> arguments of gen bench, and what is to be reached
QUESTIONS: dict[str, tuple[list[str], str]] = {
    "pixart-sigma-xl-1024": (
        ["pixart-sigma-xl-1024", "--tokens", "20,300", "--sides", SIDES, "--attention"],
        "at least 2.2 times diffusers eager in bfloat16 and 1.3 times the compiled one; 20 steps have a "
        "floor of 0.31 s at 790 TFLOP/s",
    ),
    "pixart-delta-xl-1024": (
        ["pixart-delta-xl-1024", "--tokens", "20", "--sides", SIDES],
        "four steps, times four of the line, in at most 0.15 s without text encoder",
    ),
    "dit-xl-256_batch-8": (
        ["dit-xl-256", "--batch", "8", "--sides", SIDES],
        "the time of 50 steps, times fifty of the line",
    ),
    "toy": (["toy"], "prompt to picture, which Python's own time bounds: try gen run --compile beside it"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the reports")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--layers", help="fewer blocks, to see whether it runs")
    parser.add_argument("--size", help="fewer pixels, to see whether it runs")
    parser.add_argument("--rounds", default="5")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    layers = ["--layers", chosen.layers] if chosen.layers else []
    size = ["--size", chosen.size] if chosen.size else []
    failed = []
    for name, (arguments, goal) in QUESTIONS.items():
        report = chosen.output / f"{name}_{chosen.device}_{time.strftime('%Y-%m-%d')}.md"
        options = ["--device", chosen.device, "--rounds", chosen.rounds, "--output", str(report)]
        more = (layers if name != "toy" else []) + (size if name.startswith("pixart") else [])
        command = [*GEN, "bench", *arguments, *options, *more]
        print(f"{name}: {goal}", file=sys.stderr)
        if subprocess.run(command).returncode:
            failed.append(name)
            continue
        with report.open("a", encoding="utf-8") as file:
            file.write(f"\n## To be reached\n\n{goal[0].upper()}{goal[1:]}.\n")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
