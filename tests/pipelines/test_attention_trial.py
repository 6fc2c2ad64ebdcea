"""What `auto` measures: who may win, and what is remembered."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import attention_trial
from pipelines.attention_kernels import math_attention, sdpa_attention
from pipelines.attention_trial import Attend, Given, decide, form, remember, trial


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_trial, "_verdicts", {})
    monkeypatch.setattr(attention_trial, "_file", None)


def given(dtype: torch.dtype = torch.bfloat16, tokens: int = 33, masked: bool = False) -> Given:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, tokens, 24).to(dtype).unbind()
    return q, k, v, (torch.arange(tokens) < 20)[None, None, None] if masked else None


def late(attend: Attend, seconds: float = 0.02) -> Attend:
    def slow(*arguments: Any) -> Tensor:
        time.sleep(seconds)
        return attend(*arguments)

    return slow


def failing(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_the_faster_one_wins(masked: bool) -> None:
    found = trial({"sdpa": late(sdpa_attention), "math": math_attention}, given(masked=masked))
    assert found is not None and found.name == "math"
    found = trial({"sdpa": sdpa_attention, "math": late(math_attention)}, given(masked=masked))
    assert found is not None and found.name == "sdpa"


@torch.inference_mode()
def test_one_that_is_hardly_faster_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {sdpa_attention: 1.0, math_attention: 0.95}
    monkeypatch.setattr(attention_trial, "_seconds", lambda attend, _: times[attend])
    functions = {"sdpa": sdpa_attention, "math": math_attention}
    assert decide(functions, given()) == "sdpa"
    times[math_attention] = 0.85
    assert decide(functions, given(tokens=70)) == "math"


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 1e-4), (torch.bfloat16, 1.02)])
@torch.inference_mode()
def test_one_that_is_not_exact_enough_is_left_out(dtype: torch.dtype, factor: float) -> None:
    def off(*arguments: Any) -> Tensor:
        return (factor * sdpa_attention(*arguments).float()).to(dtype)

    found = trial({"sdpa": late(sdpa_attention), "off": off}, given(dtype))
    assert found is not None and found.name == "sdpa" and found.seconds["off"] is None


@torch.inference_mode()
def test_one_that_fails_is_left_out() -> None:
    found = trial({"sdpa": late(sdpa_attention), "broken": failing, "math": math_attention}, given())
    assert found is not None and found.name == "math" and found.seconds["broken"] is None


@torch.inference_mode()
def test_a_failure_of_sdpa_itself_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"):
        trial({"sdpa": failing, "math": math_attention}, given())


@torch.inference_mode()
def test_arguments_that_are_not_finite_decide_nothing(tmp_path: Path) -> None:
    remember(tmp_path / "attention.json")
    q, k, v, _ = given()
    q[0, 0, 0, 0] = torch.nan
    assert decide({"sdpa": late(sdpa_attention), "math": math_attention}, (q, k, v, None)) == "sdpa"
    assert not list(tmp_path.iterdir())


def test_a_trial_changes_no_random_numbers() -> None:
    arguments = given()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trial({"sdpa": sdpa_attention, "math": math_attention}, arguments)
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names that were compared, trial by trial; they are the real ones."""
    made: list[set[str]] = []
    real = attention_trial.trial

    def counted(functions: dict[str, Attend], arguments: Given) -> Any:
        made.append(set(functions))
        return real(functions, arguments)

    monkeypatch.setattr(attention_trial, "trial", counted)
    return made


FUNCTIONS = {"sdpa": late(sdpa_attention), "math": math_attention}


@torch.inference_mode()
def test_similar_sizes_are_measured_once(trials: list[set[str]]) -> None:
    assert [decide(FUNCTIONS, given(tokens=tokens)) for tokens in (33, 50, 64, 65)] == ["math"] * 4
    assert len(trials) == 2


def test_type_mask_and_threads_are_measured_each() -> None:
    forms = {form(given()), form(given(torch.float32)), form(given(masked=True))}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        forms.add(form(given()))
    finally:
        torch.set_num_threads(threads)
    assert len(forms) == 4


@torch.inference_mode()
def test_another_process_takes_what_the_file_holds(tmp_path: Path, trials: list[set[str]]) -> None:
    path = tmp_path / "home" / "attention.json"
    remember(path)
    assert decide(FUNCTIONS, given()) == "math"
    decide(FUNCTIONS, given(tokens=70))
    assert len(json.loads(path.read_text())) == 2
    assert [file.name for file in path.parent.iterdir()] == ["attention.json"]
    remember(None)  # forgets, as a new process knows nothing
    remember(path)
    # By now another would be the faster, and yet pixels must not change.
    swapped = {"sdpa": sdpa_attention, "math": late(math_attention)}
    assert decide(swapped, given()) == "math"
    assert len(trials) == 2


@torch.inference_mode()
def test_it_is_measured_again_when_there_are_others_to_choose_from(trials: list[set[str]]) -> None:
    decide(FUNCTIONS, given())
    decide(FUNCTIONS | {"newer": late(math_attention)}, given())
    decide(FUNCTIONS | {"newer": late(math_attention)}, given())
    assert trials == [{"sdpa", "math"}, {"sdpa", "math", "newer"}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {"chosen": "math"}}',
        b'{"a": {"chosen": "x", "seconds": {}}}',
    ],
)
@torch.inference_mode()
def test_a_damaged_file_is_a_warning_and_is_written_anew(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "attention.json"
    path.write_bytes(content)
    remember(path)
    assert decide(FUNCTIONS, given()) == "math"
    assert "cannot be read" in caplog.text
    assert [entry["chosen"] for entry in json.loads(path.read_text()).values()] == ["math"]


@torch.inference_mode()
def test_a_place_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trials: list[set[str]]
) -> None:
    (tmp_path / "file").write_text("in the way")
    remember(tmp_path / "file" / "attention.json")
    assert [decide(FUNCTIONS, given()) for _ in range(2)] == ["math", "math"]
    assert "cannot be written" in caplog.text and len(trials) == 1
