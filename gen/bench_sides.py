"""Both sides of `gen bench`, on the same numbers: what is done to each, how it is timed and judged."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gen import bench, doctor, gemm, loader
from gen.bench import BASELINES, SIDES, Case, Line, Options, Side, Step
from gen.bench_subjects import STEPS, SUBJECTS
from gen.doctor import gib
from gen.errors import GenError
from gen.request import Settings

JUDGED = (0, 7, 13)  # steps whose predictions are compared: the largest of few rounding errors is luck
EXACT_32 = 1e-5  # relative, float32: rounding of different orders of the same sums
EXACT_16 = 1.05  # times the error of diffusers in bfloat16, in the mean square
HEAD = 72  # of all DiT and PixArt XL
FULL_SCORES = 2**31  # bytes of scores that `math` attention may hold


@dataclass(kw_only=True)
class Made:
    """One side, ready: a network or pipeline, and how it begins a picture."""

    side: Side
    model: Any
    networks: list[nn.Module]
    done: tuple[str, ...]
    precision: str  # of float32 products through oneDNN, as the treatment left it

    def call(self, step: Step) -> Step:
        """The step under the switches of this side, so that sides do not disturb each other."""

        def guarded(index: int) -> Any:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode() if self.side.whose == "ours" else torch.no_grad())
                stack.enter_context(gemm.float32_products(self.precision))
                return step(index)

        return guarded


class Unsuited(Exception):
    """A side that cannot be had of this network; the message says why."""


# --- treatments --------------------------------------------------------------------------------------


def _as_loaded(theirs: Any) -> list[str]:
    return []


def _plain(pipeline: Any) -> list[str]:
    """Every operation at every step, as published."""
    pipeline.set_attention("sdpa")
    pipeline.prepare("plain")
    return ["plain"]


def _compiled(theirs: Any) -> list[str]:
    """Each block by itself, since diffusers' `compile_repeated_blocks` refuses these families."""
    blocks = getattr(theirs, "transformer", theirs).transformer_blocks
    for block in blocks:
        block.compile()
    return [f"{len(blocks)} compiled blocks"]


def _lean(pipeline: Any) -> list[str]:
    """As the loader readies a pipeline for drawing."""
    pipeline.set_attention("auto")
    pipeline.prepare("lean")
    return ["lean"]


def _int8(pipeline: Any) -> list[str]:
    """As the loader does it: projections joined first, and what is not quantised packed."""
    pipeline.set_attention("auto")
    pipeline.prepare("lean", int8=True)
    return ["int8"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to a side once it has its weights."""

    apply: Callable[[Any], list[str]]
    module: str = ""  # that it needs
    fewer: bool = False  # whether it leaves out what need not be computed
    copies: bool = False  # whether it holds weights of its own afterwards
    bytes: float | None = None  # per weight of such a copy; None: those of its type


TREATMENTS = {
    "as loaded": Treatment(apply=_as_loaded),
    "compiled": Treatment(apply=_compiled),
    "plain": Treatment(apply=_plain),
    "lean": Treatment(apply=_lean, fewer=True, copies=True),
    "int8": Treatment(apply=_int8, module="pipelines.int8", fewer=True, copies=True, bytes=1),
}


def missing(side: Side, device: str) -> str | None:
    """Why this side cannot run here, or None."""
    needed = TREATMENTS[side.treatment].module
    if needed and importlib.util.find_spec(needed) is None:
        return f"this version has no {needed}"
    if side.treatment == "compiled" and device == "cpu":
        return doctor.compiler_missing()
    return None


# --- measuring ---------------------------------------------------------------------------------------


def measure(cases: Sequence[Case], options: Options, report: bench.Report) -> dict[str, Any]:
    """All cases that run in this process, and what they are held against."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, _ = loader.choose_device(Settings(device=options.device))
    # Before and after: a peak that another program disturbed would flatter every percentage
    before = _products(options, device, report)
    results = {case.name: list(_case(case, options, device, report)) for case in cases}
    products = _best(before, _products(options, device, report))
    for case in cases:
        for found in results[case.name]:
            _hold_against(products, found["lines"])
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "products": [rate.to_json() for rate in products],
        "cases": results,
        "attention": list(_attention(cases, options, device, report)) if options.attention else [],
    }


def _case(case: Case, options: Options, device: str, report: bench.Report) -> Iterator[dict[str, Any]]:
    subject = SUBJECTS[case.subject](case, options, device)
    sides = bench.chosen(options)
    why = {side.name: missing(side, device) for side in sides}
    runnable = [side for side in sides if why[side.name] is None]
    _check_memory(subject, runnable, device)
    lengths: Sequence[int | None] = (options.tokens or bench.TOKENS) if "tokens" in case.takes else (None,)
    report(f"{case.name}: making weights")
    all_made = []
    for side in runnable:
        try:
            all_made.append(make(side, subject))
        except Unsuited as unsuited:
            why[side.name] = str(unsuited)
    expected = _references(subject, all_made, lengths)
    subject.forget()
    first: set[str] = set()
    for tokens in lengths:
        report(f"{case.name}" + (f", {tokens} tokens" if tokens else ""))
        lines = {
            side.name: Line(side=side.name, summary=side.summary, missing=why[side.name]) for side in sides
        }
        steps = {}
        for made in all_made:
            report(f"  {made.side.name}")
            steps[made.side.name] = _begin(
                made, subject, tokens, lines[made.side.name], expected[tokens], first
            )
        report(f"  {options.rounds} rounds")
        taken = bench.in_turns(steps, options.rounds, lambda: gemm.synchronise(device))
        counted = subject.flops(tokens)
        for name, seconds in taken.items():
            lines[name].seconds = seconds
            if counted:
                _fill_in_rates(lines[name], SIDES[name], counted)
        bench.compare([*lines.values()])
        _name_equal_time(lines)
        yield bench.entry(
            case,
            [*lines.values()],
            {
                **subject.facts(tokens),
                "flops": counted,
                "baselines": [name for name in BASELINES if lines.get(name) and lines[name].seconds],
            },
        )


def make(side: Side, subject: Any) -> Made:
    """The side with its weights, treated. Raises Unsuited."""
    with gemm.float32_products(gemm.float32_precision()):  # what a treatment sets is its own
        model = subject.ours(side.dtype) if side.whose == "ours" else subject.theirs(side.dtype)
        try:
            done = TREATMENTS[side.treatment].apply(model)
        except ValueError as error:  # a network that has nothing to pack, quantise or attend with
            raise Unsuited(str(error)) from error
        precision = gemm.float32_precision()
    networks = subject.networks(model)
    return Made(side=side, model=model, networks=networks, done=tuple(done), precision=precision)


def _references(
    subject: Any, all_made: Sequence[Made], lengths: Sequence[int | None]
) -> dict[int | None, dict[str, Tensor]]:
    """Answers of diffusers for every length, by type: in float32, and where bfloat16 is to be judged in that
    too. A side that is not measured is made for it, and dropped."""
    answers: dict[int | None, dict[str, Tensor]] = {tokens: {} for tokens in lengths}
    there = {made.side.name: made for made in all_made}
    judged = any(made.side.dtype == "bfloat16" for made in all_made)
    for name in BASELINES if judged else BASELINES[:1]:
        made = there.get(name) or make(SIDES[name], subject)
        for tokens in lengths:
            step = made.call(subject.begin(made.side, made.model, tokens))
            answers[tokens][SIDES[name].dtype] = _answers(step, subject.case)
    return answers


def _begin(
    made: Made, subject: Any, tokens: int | None, line: Line, expected: Mapping[str, Tensor], first: set[str]
) -> Step:
    """Begin a picture and do its first step: what it answers, what it takes, what it holds."""
    device = subject.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

    def begin_and_step() -> tuple[Step, float]:
        gemm.synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode(made.side.whose == "ours"):
            step = made.call(subject.begin(made.side, made.model, tokens))
        step(0)
        gemm.synchronise(device)
        return step, time.perf_counter() - start

    step, seconds = begin_and_step()
    if made.side.name not in first:
        line.first_call = seconds
        first.add(made.side.name)
        step, seconds = begin_and_step()
    line.first_step = seconds
    line.quality = judge(made.side, _answers(step, subject.case), expected, subject.case.pictures)
    line.weights_bytes = sum(_bytes(network) for network in made.networks)
    line.done = (*made.done, *_attention_chosen(made))
    if device == "cuda":
        line.peak_bytes = torch.cuda.max_memory_allocated() - held
    return step


def _answers(step: Step, case: Case) -> Tensor:
    """What is compared: a picture, or the predictions of several steps."""
    return torch.cat([step(index).float().cpu() for index in (JUDGED[:1] if case.pictures else JUDGED)])


def judge(side: Side, found: Tensor, expected: Mapping[str, Tensor], pictures: bool) -> dict[str, Any]:
    """How far an answer is from diffusers' in float32: its class, the number, and both in words."""
    exact = expected["float32"]
    if torch.equal(found, exact):
        words = "the reference" if side.name == "diffusers-fp32" else "bit-equal"
        return {"class": "A", "error": 0.0, "words": words}
    if not torch.isfinite(found).all():
        raise GenError(
            f"{side.name} answers numbers that are not finite.",
            "Measure the other sides with --sides, and report this as a bug.",
            "failed",
        )
    if pictures:
        return bench.picture_quality(found, exact) | {"class": "C" if side.promise == "C" else "-"}
    error = _relative(found, exact)
    psnr = 20 * math.log10(float(exact.max() - exact.min()) / _distance(found, exact))
    quality: dict[str, Any] = {"class": side.promise, "error": error, "psnr": psnr}
    if side.promise == "C":
        return quality | {"words": f"{psnr:.1f} dB of the prediction, error {error:.1e}"}
    if side.dtype == "float32":
        kept, words = error <= EXACT_32, f"error {error:.1e}"
    else:
        ratio = error / _relative(expected["bfloat16"], exact)
        # By the mean square: the largest of some thousand rounding errors is luck, a tenth off either way
        mean = _distance(found, exact) / _distance(expected["bfloat16"], exact)
        quality |= {"of_diffusers_error": ratio, "of_diffusers_mean_error": mean}
        words = (
            f"error {error:.1e}; of diffusers' in bfloat16 {mean:.2f} in the mean square, {ratio:.2f} at most"
        )
        kept = mean <= EXACT_16
    quality["class"] = "B" if kept else "none"
    return quality | {"words": words if kept else f"{words}: more than class B allows"}


def _attention_chosen(made: Made) -> list[str]:
    """What `auto` took for this side, which shows only once it has computed."""
    if made.side.whose != "ours":
        return []
    from pipelines.attention import chosen

    sizes: dict[str, list[str]] = {}
    for size, name in chosen(made.model.transformer).items():
        sizes.setdefault(name, []).append(size)
    return [f"attention {name} ({', '.join(found)})" for name, found in sizes.items()]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def _distance(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square."""
    return float((found - exact).square().mean().sqrt())


def _bytes(network: nn.Module) -> int:
    """Of all tensors that the network holds: parameters, buffers, and packed weights, which are neither."""
    held: dict[int, int] = {}
    for module in network.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own += [value for value in vars(module).values() if isinstance(value, Tensor)]
        held |= {id(one): one.numel() * one.itemsize for one in own}
    return sum(held.values())


def _fill_in_rates(line: Line, side: Side, counted: Mapping[str, int]) -> None:
    seconds = bench.spread(line.seconds)["median"]
    computed = counted["lean" if TREATMENTS[side.treatment].fewer else "plain"]
    line.plain_tflops, line.tflops = counted["plain"] / seconds / 1e12, computed / seconds / 1e12


def _products(options: Options, device: str, report: bench.Report) -> list[gemm.Rate]:
    """Every way to multiply in the types of the sides."""
    found = []
    for dtype in dict.fromkeys(side.products or side.dtype for side in bench.chosen(options)):
        report(f"matrix products in {dtype}")
        found += gemm.rates(dtype, device, seconds=0.2)
    return found


def _best(*measured: Sequence[gemm.Rate]) -> list[gemm.Rate]:
    """The best of several measurements of each way, the fastest way of a type first."""
    best: dict[tuple[str, str], gemm.Rate] = {}
    for rate in (rate for rates in measured for rate in rates):
        key = (rate.dtype, rate.way)
        best[key] = max(best.get(key, rate), rate, key=lambda one: one.flops)
    order = [*dict.fromkeys(dtype for dtype, _ in best)]
    return sorted(best.values(), key=lambda rate: (order.index(rate.dtype), -rate.flops))


def _hold_against(products: Sequence[gemm.Rate], lines: Sequence[dict[str, Any]]) -> None:
    """Fill in which share of the fastest matrix product a line reaches."""
    for line in lines:
        side = SIDES[line["side"]]
        rates = [rate.flops for rate in products if rate.dtype == (side.products or side.dtype)]
        if line["tflops"] and rates:
            line["peak_percent"] = 100 * 1e12 * line["tflops"] / max(rates)


def _name_equal_time(lines: Mapping[str, Line]) -> None:
    """Drift is told beside what the exact side could do in the same time: fewer steps."""
    exact = lines.get("ours-bf16")
    for line in lines.values():
        if SIDES[line.side].promise == "C" and line.seconds and exact and exact.seconds:
            steps = STEPS * bench.spread(line.seconds)["median"] / bench.spread(exact.seconds)["median"]
            line.quality["words"] += f"; {STEPS} steps take as long as {steps:.1f} of {exact.side}"


def _check_memory(subject: Any, sides: Sequence[Side], device: str) -> None:
    """Refuse before an hour is spent swapping. Raises out_of_memory."""
    count = subject.parameters()
    sizes = {"float32": 4, "bfloat16": 2}
    needed = 4.0 * count  # the numbers themselves and the reference
    needed += 2.0 * count if any(side.dtype == "bfloat16" for side in sides) else 0.0
    for side in sides:
        treatment = TREATMENTS[side.treatment]
        if treatment.copies:
            needed += count * (sizes[side.dtype] if treatment.bytes is None else treatment.bytes)
    available = doctor.available_memory(device)
    if needed > available:
        raise GenError(
            f"{subject.case.name} needs {gib(int(needed))} for the weights of "
            f"{', '.join(side.name for side in sides)}, and {gib(available)} are free.",
            "Take fewer with --sides, or fewer blocks with --layers.",
            "out_of_memory",
        )


def _attention(
    cases: Sequence[Case], options: Options, device: str, report: bench.Report
) -> Iterator[dict[str, Any]]:
    """Every attention function at the head size of the large networks, for the tokens of these cases."""
    from pipelines.attention import survey

    sizes = {options.size or case.size for case in cases if case.subject in ("pixart", "dit")}
    types = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    for tokens in sorted((size // 16) ** 2 for size in sizes):
        for dtype in types:
            report(f"attention over {tokens} tokens in {dtype}")
            for row in survey(device):
                yield _attention_row(row.name, row.missing, tokens, dtype, device)


def _attention_row(name: str, missing: str | None, tokens: int, dtype: str, device: str) -> dict[str, Any]:
    from pipelines.attention import ATTENTION

    shape = (2, 16, tokens, HEAD)
    kind = getattr(torch, dtype)
    why = missing or ATTENTION[name].refuses(device, kind, HEAD)
    scores = math.prod(shape[:3]) * tokens * kind.itemsize
    if why is None and name == "math" and scores > FULL_SCORES:
        why = f"its scores would take {gib(scores)}"
    about = {"name": name, "tokens": tokens, "dtype": dtype, "missing": why}
    if why:
        return about | {"seconds": None, "error": None}
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw).to(device, kind) for _ in range(3))
    attend = ATTENTION[name].attend
    with torch.inference_mode():
        found = attend(q, k, v, None)[:1, :1].float()
        first = [one[:1, :1].float() for one in (q, k, v)]
        exact = functional.scaled_dot_product_attention(first[0], first[1], first[2])
        seconds = []
        for _ in range(5):
            gemm.synchronise(device)
            start = time.perf_counter()
            attend(q, k, v, None)
            gemm.synchronise(device)
            seconds.append(time.perf_counter() - start)
    error = float((found - exact).abs().max() / exact.abs().max())
    return about | {"seconds": min(seconds), "error": error}
