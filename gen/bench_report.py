"""The document that `gen bench` writes: machine, versions, commit, command, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gen.doctor import gib


def markdown(data: Mapping[str, Any]) -> str:
    """The measurement, as `gen.bench.run` returns it, in Markdown."""
    machine, versions = data["machine"], data["versions"]
    graphics = ", ".join(one["name"] for one in machine["gpus"]) or "no GPU"
    packages = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    units = ", ".join(machine["cpu"]["instructions"]) or "none that matter"
    load = data["load"]
    parts = [
        f"# Speed, measured {data['when']}",
        f"    {data['command']}",
        f"Commit {data['commit']}. {machine['cpu']['name']}, {machine['cpu']['cores']} cores, instructions: "
        f"{units}; {graphics}; {gib(machine['memory']['total'])} of memory. {packages}."
        + (f" On {data['device']} with {data['threads']} threads." if data["device"] else ""),
        f"Load average {load['start']:.1f} at the start, {load['end']:.1f} at the end (the measurement "
        f"itself counts). {data['rounds']} rounds in turns; a warm-up of each side is not counted. Ratios "
        "are taken within each round: how many times as fast as the baseline, the median and the least.",
    ]
    if data["products"]:
        rows = [
            (one["dtype"], one["way"], significant(one["tflops"]), f"{one['error']:.1e}")
            for one in data["products"]
        ]
        parts.append("## Matrix products\n\nThe fastest of each type is what percentages refer to.")
        parts.append(grid([("type", "way", "TFLOP/s", "error against float64"), *rows]))
    for case in data["cases"]:
        parts += _case_markdown(case)
    if data["attention"]:
        header = ("attention", "tokens", "type", "ms", "error against float32", "why not")
        lines = [
            (
                one["name"],
                str(one["tokens"]),
                one["dtype"],
                milliseconds(one["seconds"]),
                "-" if one["error"] is None else f"{one['error']:.1e}",
                one["missing"] or "",
            )
            for one in data["attention"]
        ]
        parts += ["## Attention at head size 72, 2 x 16 heads", grid([header, *lines])]
    return "\n\n".join(parts) + "\n"


def _case_markdown(case: Mapping[str, Any]) -> list[str]:
    facts = [
        f"{case[name]} {words}"
        for name, words in (
            ("layers", "blocks"),
            ("size", "px"),
            ("tokens", "tokens"),
            ("batch", "at a time"),
        )
        if case.get(name)
    ]
    parts = [f"## {case['case']}" + (f": {', '.join(facts)}" if facts else "")]
    about = f"{case['summary'][0].upper()}{case['summary'][1:]}; times are for one {case['unit']}."
    if case.get("flops"):
        plain, lean = (significant(case["flops"][name] / 1e12) for name in ("plain", "lean"))
        about += f" It takes {plain} TFLOP as published, of which {lean} need computing at every step."
    parts.append(about)
    baselines = case["baselines"]
    header = ["", "ms", "fastest", "slowest", *(f"× {name}" for name in baselines), "class", "quality"]
    rows, details, missing = [], [], []
    for line in case["lines"]:
        if line["missing"]:
            missing.append(f"{line['side']} did not run: {line['missing']}.")
            continue
        times = [milliseconds(line["seconds"][key]) for key in ("median", "min", "max")]
        ratios = [
            f"{one['median']:.2f} ({one['min']:.2f})" if (one := line["ratios"].get(name)) else "-"
            for name in baselines
        ]
        quality = line["quality"]
        rows.append((line["side"], *times, *ratios, quality["class"], quality["words"]))
        details.append(_details(line))
    if rows:
        parts.append(grid([tuple(header), *rows]))
    if any(any(cell != "-" for cell in row[1:]) for row in details):
        titles = ("", "TFLOP/s as published", "TFLOP/s computed", "of the peak", "first call, s")
        more = ("first step of a picture, ms", "weights", "largest memory", "done to it")
        parts.append(grid([(*titles, *more), *details]))
    return [*parts, *missing]


def _details(line: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(name: str, form: Callable[[Any], str]) -> str:
        return "-" if line[name] is None else form(line[name])

    return (
        line["side"],
        shown("plain_tflops", significant),
        shown("tflops", significant),
        shown("peak_percent", "{:.0f} %".format),
        shown("first_call", "{:.2f}".format),
        shown("first_step", milliseconds),
        shown("weights_bytes", gib),
        shown("peak_bytes", gib),
        ", ".join(line["done"]) or "-",
    )


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def milliseconds(seconds: float | None) -> str:
    """Three digits that mean something."""
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"


def significant(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
