import io

import pytest

from gen.progress import Progress, duration
from gen.request import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


EVENTS = [
    Event(kind="stage", stage="loading", note="pixart-sigma:toy"),
    Event(kind="note", note="hear this"),
    Event(kind="stage", stage="denoising"),
    *(Event(kind="step", index=n, count=20, eta_seconds=20 - n) for n in range(1, 21)),
]


def shown(stream: io.StringIO, quiet: bool = False) -> str:
    progress = Progress(quiet=quiet, stream=stream)
    for event in EVENTS:
        progress.show(event)
    progress.clear()
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_a_few_plain_lines():
    assert shown(io.StringIO()).splitlines() == ["loading pixart-sigma:toy", "note: hear this", "denoising"]


def test_on_a_terminal_there_is_one_line_that_is_gone_afterwards():
    text = shown(Terminal())
    assert "step 20/20, 0.0 s left" in text
    assert "[####################]" in text
    assert text.count("\n") == 2  # which weights, and the note: those stay
    assert text.endswith("\r")


def test_colour_can_be_switched_off(monkeypatch):
    assert "\x1b[" in shown(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in shown(Terminal())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in shown(Terminal())


def test_quiet_leaves_the_notes():
    assert shown(io.StringIO(), quiet=True) == "note: hear this\n"


def test_which_of_several_pictures_is_told():
    stream = io.StringIO()
    Progress(stream=stream).show(Event(kind="stage", stage="denoising", image=1, images=3))
    assert stream.getvalue() == "picture 2/3, denoising\n"


def test_a_listener_that_left_does_not_stop_the_work():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    stream.close()
    progress.show(EVENTS[0])
    progress.say("nobody hears this")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_easy_to_read(seconds, text):
    assert duration(seconds) == text
