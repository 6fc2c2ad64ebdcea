"""Our numbers against those of the official implementations: one test for each case of a golden set.

`GEN_GOLDEN_DIR` names another set than the one in data/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.golden import delta, dit, dit3d, numbers, pixart

Check = Callable[[numbers.Case], None]
# By how a case's name begins, the longest beginning first
CHECKS: dict[str, Check] = {
    "dit_": dit.check_dit,
    "dit3d_": dit3d.check_dit3d,
    "sigma_": pixart.check_sigma,
    "delta_": delta.check_delta,
}
# Systems that are not built yet: their cases must fail, and say so when they no longer do
COMING = ("mv_adapter/",)


def find(case: numbers.Case) -> Check | None:
    beginnings = sorted((b for b in CHECKS if case.name.startswith(b)), key=len, reverse=True)
    return CHECKS[beginnings[0]] if beginnings else None


def params() -> list:
    made = []
    for case in numbers.cases():
        label = f"{case.folder.name}/{case.name}"
        coming = case.name.startswith(COMING) or label.startswith(COMING)
        marks = [pytest.mark.xfail(reason="this system is not built yet", strict=True)] if coming else []
        made.append(pytest.param(case, id=label, marks=marks))
    return made


@pytest.mark.parametrize("case", params())
def test_case(case: numbers.Case) -> None:
    check = find(case)
    assert check is not None, f"nothing checks {case.name}"
    torch.manual_seed(0)
    check(case)


def test_there_are_cases() -> None:
    assert numbers.cases(), f"no golden set in {numbers.ROOT}"


PROBED = [folder for folder in numbers.folders() if "fill_probe_first4" in numbers.read_meta(folder)]


@pytest.mark.parametrize("folder", PROBED, ids=lambda folder: folder.name)
def test_weights_are_made_as_the_set_says(folder: Path) -> None:
    meta = numbers.read_meta(folder)
    case = numbers.Case(folder, "probe", {})
    shapes = {
        name: shape
        for entry in meta["cases"].values()
        if isinstance(entry.get("state_dict"), dict)
        for name, shape in entry["state_dict"].items()
    }
    for name, wanted in meta["fill_probe_first4"].items():
        if name in shapes:
            found = case.fill({name: shapes[name]})[name].flatten()[:4]
            assert found.tolist() == pytest.approx(wanted, rel=1e-6)
