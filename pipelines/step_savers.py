"""Step savers: less work for a picture that is no longer quite the same. Off unless asked for.

Each is a row of `SAVERS`. Before a run, `plan` settles one `Call` for each of its steps: whether both halves
of guidance are computed or the conditional one alone, whether the blocks are computed, and what is hooked
into the network's forward for that. What a saver remembers from step to step lives in the plan, so runs share
nothing and the network stays as it is.

Written down they are a text: "guidance=0.1:0.6,taylor=3:1". Reading it needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, astuple, dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """What savers must know of a run before it starts."""

    levels: Sequence[float]  # of noise at each step: its timestep as a share of those trained on, 1 to 0
    guided: bool  # whether there are two halves at all
    conditional: int  # which half of a guided batch has the words or the class: 0 or 1
    cross_attention: bool  # whether the network has any


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one step asks of the network."""

    guided: bool  # both halves; False: the conditional one alone
    computed: bool = True  # False: the blocks are spared
    hooks: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)  # for the network's forward


Plan = Sequence[Call]  # one for each step; empty: every step is computed in full


@dataclass(frozen=True)
class StepSaver:
    """A way to save work, and its parameters. They are checked when it is made; `apply` does the rest."""

    name: ClassVar[str]
    form: ClassVar[str]  # of the parameters, as text
    summary: ClassVar[str]
    paper: ClassVar[str]
    inside: ClassVar[bool]  # whether it hooks into the blocks, where a control branch reads along

    def objection(self, run: Run) -> str:
        """Why it would do nothing in such a run, or nothing sensible; empty when it is fine."""
        return ""

    def apply(self, calls: Sequence[Call], run: Run) -> list[Call]:
        """The calls of all steps, with less to do."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.name}=" + ":".join(f"{value:.15g}" for value in astuple(self))


@dataclass(frozen=True)
class GuidanceInterval(StepSaver):
    """Guidance only at noise levels from `low` to `high`; elsewhere the unconditional half is not computed.

    The paper gives levels as the ratio of noise to picture. 0.28 to 5.42, its interval for SDXL, is 0.08 to
    0.58 here, on the schedule that DiT and PixArt were trained on.
    """

    name = "guidance"
    form = "LOW:HIGH"
    summary = "guidance only between two noise levels, 0 to 1; elsewhere half the work"
    paper = "arXiv:2404.07724"
    inside = False

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"guidance works between two levels, 0 <= LOW < HIGH <= 1, not {self}")

    def objection(self, run: Run) -> str:
        if not run.guided:
            return "it changes nothing without guidance; give a guidance_scale above 1, or leave it out"
        if not any(map(self._holds, run.levels)):
            levels = ", ".join(f"{level:.3g}" for level in run.levels[:8])
            more = ", ..." if len(run.levels) > 8 else ""
            return (
                f"none of the steps lies in it (their levels: {levels}{more}); widen it, or take more steps"
            )
        return ""

    def apply(self, calls: Sequence[Call], run: Run) -> list[Call]:
        return [
            replace(call, guided=call.guided and self._holds(level))
            for call, level in zip(calls, run.levels, strict=True)
        ]

    def _holds(self, level: float) -> bool:
        return self.low <= level <= self.high


@dataclass(frozen=True)
class FrozenText(StepSaver):
    """After `steps` steps the output of each cross-attention stays as it is, and guidance ends.

    What stays is the mean of the two halves at the last full step, as in the paper. Without guidance, as for
    distilled networks, only the cross-attention is saved.
    """

    name = "tgate"
    form = "STEPS"
    summary = "after so many steps cross-attention is frozen and the unconditional half dropped"
    paper = "arXiv:2404.02747"
    inside = True

    steps: int

    def __post_init__(self) -> None:
        _check_integer("the number of steps before tgate closes", self.steps, 1, 1000)

    def objection(self, run: Run) -> str:
        return "" if run.cross_attention else "it freezes cross-attention, and this network has none"

    def apply(self, calls: Sequence[Call], run: Run) -> list[Call]:
        if self.steps >= len(calls):
            return list(calls)
        kept: dict[int, Tensor] = {}  # by block (B, N, D)

        def keep(both: bool, block: Any, x_BND: Tensor, text: Any, index: int) -> Tensor:
            after_BND = block.attend_text(x_BND, text, index)
            change_BND = after_BND - x_BND
            kept[index] = sum(change_BND.chunk(2)) / 2 if both else change_BND
            return after_BND

        def add(block: Any, x_BND: Tensor, text: Any, index: int) -> Tensor:
            return x_BND + kept[index]

        last = calls[self.steps - 1]
        return [
            *calls[: self.steps - 1],
            replace(last, hooks={**last.hooks, "attend": partial(keep, last.guided)}),
            *(
                replace(call, guided=False, hooks={**call.hooks, "attend": add})
                for call in calls[self.steps :]
            ),
        ]


@dataclass(frozen=True)
class Forecast(StepSaver):
    """Of `interval` steps one is computed. In the others the change that all blocks together make to the
    tokens is forecast from the steps before: a polynomial of degree `order` in the number of the step.

    Order 0 repeats the last change. The paper forecasts each layer by itself, and its differences are those
    of evenly spaced steps; this is one tensor for all layers, and exact for polynomials at any spacing. The
    first steps are computed until there are enough for the polynomial, and so is the last one. Where guidance
    sets in on the way, the unconditional half has no past, and they are computed anew.
    """

    name = "taylor"
    form = "INTERVAL[:ORDER]"
    summary = "one of INTERVAL steps is computed, the blocks of the others forecast (ORDER 0 to 2; 1)"
    paper = "arXiv:2503.06923"
    inside = True

    interval: int
    order: int = 1

    def __post_init__(self) -> None:
        _check_integer("the interval of taylor", self.interval, 1, 1000)
        _check_integer("the order of taylor", self.order, 0, 2)

    def apply(self, calls: Sequence[Call], run: Run) -> list[Call]:
        past = Past(self.order, run.conditional)
        planned = []
        known = last = 0
        guided = False
        for index, call in enumerate(calls):
            if call.guided and not guided:
                known = 0
            guided = call.guided
            enough = known > self.order and index - last < self.interval
            computed = not enough or index == len(calls) - 1
            if computed:
                known, last = known + 1, index
            work = past.compute if computed else past.forecast
            hook = partial(work, index, call.guided)
            planned.append(replace(call, computed=computed, hooks={**call.hooks, "around": hook}))
        return planned


class Past:
    """What the blocks changed in the last computed steps of one run."""

    def __init__(self, order: int, conditional: int = 0) -> None:
        self.order = order
        self.conditional = conditional
        # Number of the step, whether both halves were computed, and the change (B or 2 B, N, D). In float32:
        # differences of rounded numbers would be mostly rounding.
        self._points: list[tuple[int, bool, Tensor]] = []

    def compute(self, index: int, both: bool, blocks: Callable[[Tensor], Tensor], x_BND: Tensor) -> Tensor:
        """Run the blocks, and remember what they changed."""
        after_BND = blocks(x_BND)
        change_BND = after_BND.float() - _rows(x_BND, len(after_BND)).float()
        usable = [point for point in self._points if point[1] or not both]
        self._points = [*usable, (index, both, change_BND)][-self.order - 1 :]
        return after_BND

    def forecast(self, index: int, both: bool, blocks: Callable[[Tensor], Tensor], x_BND: Tensor) -> Tensor:
        """Change the tokens as the blocks probably would."""
        weights = _extrapolation([point[0] for point in self._points], index)
        changes = [
            change.chunk(2)[self.conditional] if had_both and not both else change
            for _, had_both, change in self._points
        ]
        change_BND: Any = sum(weight * change for weight, change in zip(weights, changes, strict=True))
        return _rows(x_BND, len(change_BND)) + change_BND.to(x_BND.dtype)


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r}")


def _rows(x_BND: Tensor, rows: int) -> Tensor:
    """As the network repeats its tokens, once for each half."""
    return x_BND if len(x_BND) == rows else x_BND.repeat(rows // len(x_BND), 1, 1)


def _extrapolation(places: Sequence[int], at: int) -> list[float]:
    """Lagrange's weights: the polynomial through values at these places, at another place."""
    return [math.prod((at - b) / (a - b) for b in places if b != a) for a in places]


SAVERS: Mapping[str, type[StepSaver]] = {
    one.name: one for one in (GuidanceInterval, FrozenText, Forecast)
}  # in the order in which they are applied

APART: Mapping[frozenset[str], str] = {
    frozenset({"guidance", "tgate"}): "both decide at which steps there is guidance",
    frozenset({"tgate", "taylor"}): "a forecast cannot look back through the gate, behind which the network "
    "does something else",
}


def parse(savers: str | Iterable[StepSaver]) -> tuple[StepSaver, ...]:
    """The savers that a text names, in the order of the table; empty text names none.

    Raises ValueError for what is no saver, for parameters out of range, and for two that do not go together.
    """
    found = (
        [_parse(part.strip()) for part in savers.split(",")]
        if isinstance(savers, str) and savers
        else [*savers]
    )
    for one in found:
        if not isinstance(one, StepSaver):
            raise ValueError(f"a step saver is one of {', '.join(SAVERS)}, not {one!r}")
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the step saver {twice} is given twice")
    for pair in combinations(names, 2):
        if reason := APART.get(frozenset(pair)):
            raise ValueError(f"the step savers {' and '.join(pair)} do not go together: {reason}; take one")
    order = list(SAVERS)
    return tuple(sorted(found, key=lambda one: order.index(one.name)))


def _parse(text: str) -> StepSaver:
    name, _, values = text.partition("=")
    if name not in SAVERS:
        forms = ", ".join(f"{one.name}={one.form}" for one in SAVERS.values())
        raise ValueError(f"there is no step saver {text!r}; there are {forms}")
    saver = SAVERS[name]
    kinds = [int if one.type in (int, "int") else float for one in fields(saver)]
    least = sum(one.default is MISSING for one in fields(saver))
    words = values.split(":") if values else []
    try:
        if not least <= len(words) <= len(kinds):
            raise ValueError
        numbers = [kind(word) for kind, word in zip(kinds, words, strict=False)]
    except ValueError:
        raise ValueError(f"the step saver {name} is written {name}={saver.form}, not {text!r}") from None
    return saver(*numbers)


def plan(
    savers: str | Iterable[StepSaver],
    timesteps: Tensor,  # of the walk
    trained: int,  # timesteps that the network was trained on
    *,
    guided: bool,
    conditional: int,
    cross_attention: bool,
) -> Plan:
    """The calls of one run, see `Run`; no run may take those of another. Without savers there is nothing to
    plan.

    Raises ValueError for a saver that has no use in such a run, and as `parse` does.
    """
    chosen = parse(savers)
    if not chosen:
        return ()
    run = Run(
        levels=[float(timestep) / trained for timestep in timesteps.tolist()],
        guided=guided,
        conditional=conditional,
        cross_attention=cross_attention,
    )
    calls = [Call(guided=guided) for _ in run.levels]
    for saver in chosen:
        if objection := saver.objection(run):
            raise ValueError(f"the step saver {saver} cannot be used here: {objection}")
        calls = saver.apply(calls, run)
    return tuple(calls)


def check_control(savers: Sequence[StepSaver]) -> None:
    """Raises ValueError for savers that cannot work beside a control branch."""
    for saver in savers:
        if saver.inside:
            raise ValueError(
                f"the step saver {saver} cannot be used with a control picture, whose branch reads between "
                "the blocks; leave one of the two out"
            )


def rows(calls: Iterable[Call]) -> int:
    """How many rows the blocks compute for one picture: two for a step with guidance, none for a forecast."""
    return sum(call.computed * (2 if call.guided else 1) for call in calls)
