"""How pulling and checking are told."""

from __future__ import annotations

import io
import time

import pytest

from gen import cli_weights
from gen.pull import State


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    talk = cli_weights._Talk(quiet=False)
    talk.stream, talk.live, talk.moment = Terminal(), True, moment
    return talk


def show(talk, seconds: float, done: int, total: int = 1000 * 2**20) -> str:
    talk.moment[0] += seconds
    before = len(talk.stream.getvalue())
    talk.show_state(State(file="a.safetensors", done=done * 2**20, total=total))
    return talk.stream.getvalue()[before:]


def test_the_time_left_follows_from_the_last_seconds(talk):
    assert "left" not in show(talk, 0, 100), "one moment makes no speed"
    assert "10.0 MiB/s, 1 min 28 s left" in show(talk, 2, 120)
    assert show(talk, 0.05, 121) == "", "not more than ten times a second"
    for _ in range(30):  # faster from now on: the slow start is forgotten
        last = show(talk, 1, int(talk.seen[-1][1] / 2**20) + 20)
    assert "20.0 MiB/s" in last
    assert "\r[##############------] 0.70 GiB of 0.98 GiB" in last and "a.safetensors" in last
    assert "left" not in show(talk, 1, 1000)


def test_bytes_that_proved_useless_give_no_negative_speed(talk):
    show(talk, 0, 100)
    show(talk, 1, 200)
    assert "MiB/s" not in show(talk, 1, 0)
    assert "50.0 MiB/s" in show(talk, 2, 100)


def test_elsewhere_a_line_is_said_now_and_then(talk):
    talk.live = False
    assert show(talk, 0, 1).endswith("a.safetensors\n")
    assert show(talk, 3, 30) == ""
    assert show(talk, 3, 60).count("\n") == 1
    talk.quiet = True
    assert show(talk, 30, 600) == ""
