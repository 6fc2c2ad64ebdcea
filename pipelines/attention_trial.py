"""Which of several attention functions is the fastest here: measured once, and remembered.

Functions differ in their rounding, and pixels would with them, so a trial must not be repeated lightly:
`remember` names a file for what was found. Functions are what `pipelines.attention` says; `sdpa` is always
among them, and stays where no other is clearly faster and about as exact.

Shapes: B batch, N tokens that look, L tokens looked at, H heads, K head width.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.attention_kernels import math_attention, sdpa_attention

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Given = tuple[Tensor, Tensor, Tensor, Tensor | None]  # q_BHNK, k_BHLK, v_BHLK, mask

MARGIN = 0.9  # of the seconds of `sdpa`: a rival must be that good, or noise would choose
SLACK = 1.05  # times the larger error of `sdpa` and `math`: what a rival may have
FEW = 8  # heads that a trial on a CPU computes: more take longer and say the same
ROUNDS = 5
PATIENCE = 1.0  # seconds after which a trial ends, if there were two rounds
SAMPLE = 64  # queries whose error is looked at, or up to twice as many
# What an optional package may raise that was built for another torch, driver or device.
BROKEN = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Verdict:
    """What a trial found."""

    name: str
    seconds: dict[str, float | None]  # of a call, by name; None where it failed or was not exact enough


_verdicts: dict[str, Verdict] = {}  # of this process and of the file
_file: Path | None = None
_lock = threading.Lock()  # two trials at once would disturb each other


def remember(path: Path | str | None) -> None:
    """Keep what `auto` measures in this JSON file, and take from it what it holds; None: keep no file.

    A file that cannot be read or written is a warning in the log, never an error: it is measured again.
    """
    global _file
    with _lock:
        path = None if path is None else Path(path)
        if path != _file:
            _file = path
            _verdicts.clear()


def decide(functions: Mapping[str, Attend], given: Given) -> str:
    """The name of the fastest for such arguments, on this machine. The first call for a form measures."""
    key = form(given)
    with _lock:
        verdict = _verdicts.get(key)
        if verdict is None and _file is not None:
            _verdicts.update(_read(_file))
            verdict = _verdicts.get(key)
        if verdict is None or verdict.seconds.keys() != functions.keys():  # others are installed by now
            if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return "sdpa"  # a graph being recorded must not be waited for
            verdict = trial(functions, given)
            if verdict is None:
                return "sdpa"
            log.debug("attention for %s: %s of %s", key, verdict.name, verdict.seconds)
            _verdicts[key] = verdict
            if _file is not None:
                _write(_file, key, verdict)
        return verdict.name


def form(given: Given) -> str:
    """Machine, type and shape; numbers of tokens and heads are rounded up to a power of two."""
    q_BHNK, k_BHLK, _, mask = given
    batch, heads, tokens, width = q_BHNK.shape
    rows, columns, count = (1 << (n - 1).bit_length() for n in (tokens, k_BHLK.shape[2], batch * heads))
    if q_BHNK.is_cuda:
        machine = torch.cuda.get_device_name(q_BHNK.device)
    else:
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        machine, count = f"{q_BHNK.device.type} {capability} {threads} threads", min(count, FEW)
    dtype = str(q_BHNK.dtype).removeprefix("torch.")
    shape = f"{rows}x{columns} {count}x{width}{'' if mask is None else ' masked'}"
    return f"{machine}, torch {torch.__version__}, {dtype} {shape}"


def _read(path: Path) -> dict[str, Verdict]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        verdicts = {key: Verdict(entry["chosen"], dict(entry["seconds"])) for key, entry in entries.items()}
        for verdict in verdicts.values():
            verdict.seconds[verdict.name]  # of those compared
        return verdicts
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read, so attention is measured again: %r", path, error)
        return {}


def _write(path: Path, key: str, verdict: Verdict) -> None:
    """Add it to what the file holds by now; another process may have added others."""
    verdicts = _read(path) | {key: verdict}
    entries = {key: {"chosen": one.name, "seconds": one.seconds} for key, one in sorted(verdicts.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(json.dumps(entries, indent=2) + "\n")
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s cannot be written, so attention will be measured again: %s", path, error)


def trial(functions: Mapping[str, Attend], given: Given) -> Verdict | None:
    """Compare errors, then seconds, in turn; the first call of each is not timed.

    None when nothing could be found out: the arguments are not finite, or memory is too small.
    """
    if given[0].device.type == "cpu":
        given = _few_heads(given)
    try:
        allowed = _allowed_error(_few_heads(given))
        if not math.isfinite(allowed):
            return None
        seconds = {name: _enter(name, attend, given, allowed) for name, attend in functions.items()}
        begin = time.perf_counter()
        for done in range(ROUNDS):
            if done >= 2 and time.perf_counter() - begin > PATIENCE:
                break
            for name, best in seconds.items():
                if best is not None:
                    seconds[name] = min(best, _seconds(functions[name], given))
    except torch.OutOfMemoryError as error:
        log.warning("memory is too small to measure attention, it stays 'sdpa': %s", error)
        return None
    timed = {name: value for name, value in seconds.items() if value is not None}
    fastest = min(timed, key=timed.__getitem__)
    return Verdict(fastest if timed[fastest] < MARGIN * timed["sdpa"] else "sdpa", seconds)


def _enter(name: str, attend: Attend, given: Given, allowed: float) -> float | None:
    """None for a function that fails or is not exact enough, and infinity for others."""
    try:
        found_BHNK = attend(*given)
    except torch.OutOfMemoryError:
        raise
    except BROKEN as problem:
        if name == "sdpa":
            raise
        log.info("attention '%s' is left out, it fails here: %s", name, problem)
        return None
    error = relative_error(found_BHNK[:1, :FEW], _few_heads(given))
    if name != "sdpa" and not error <= allowed:
        log.info("attention '%s' is left out, its error is %.1e and may be %.1e", name, error, allowed)
        return None
    return math.inf


def _seconds(attend: Attend, given: Given) -> float:
    """Of one call."""
    calls = 1
    if given[0].is_cuda:  # one alone would be mostly waiting
        calls = 10
        torch.cuda.synchronize(given[0].device)
    begin = time.perf_counter()
    for _ in range(calls):
        attend(*given)
    if given[0].is_cuda:
        torch.cuda.synchronize(given[0].device)
    return (time.perf_counter() - begin) / calls


def _few_heads(given: Given) -> Given:
    q_BHNK, k_BHLK, v_BHLK, mask = given
    if mask is not None:
        mask = mask.expand(*q_BHNK.shape[:3], k_BHLK.shape[2])[:1, :FEW]
    return q_BHNK[:1, :FEW], k_BHLK[:1, :FEW], v_BHLK[:1, :FEW], mask


def relative_error(found_BHNK: Tensor, given: Given) -> float:
    """Of some queries, evenly spaced, against float32."""
    q_BHNK, k_BHLK, v_BHLK, mask = given
    some = slice(None, None, max(1, q_BHNK.shape[2] // SAMPLE))
    if mask is not None:
        mask = mask.expand(*q_BHNK.shape[:3], k_BHLK.shape[2])[:, :, some]
    exact = math_attention(q_BHNK[:, :, some].float(), k_BHLK.float(), v_BHLK.float(), mask)
    return ((found_BHNK[:, :, some].float() - exact).norm() / exact.norm()).item()


def _allowed_error(given: Given) -> float:
    if given[0].dtype == torch.float32:
        return 1e-5
    return SLACK * max(_error_of(attend, given) for attend in (sdpa_attention, math_attention))


def _error_of(attend: Attend, given: Given) -> float:
    q_BHNK, k_BHLK, v_BHLK, mask = given
    some = slice(None, None, max(1, q_BHNK.shape[2] // SAMPLE))  # `math` would need room for all scores
    part = (q_BHNK[:, :, some], k_BHLK, v_BHLK, None if mask is None else mask[:, :, some])
    return relative_error(attend(*part), part)
