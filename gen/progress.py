"""Talk on stderr while a run goes on: one live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from gen.request import Event


class Progress:
    """Draws Events. `quiet` leaves only notes, which are warnings and choices a user must hear of."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.noun = "picture"  # what is being made
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.live and not os.environ.get("NO_COLOR")
        self._drawn = 0  # characters of the live line
        self._said = 0.0  # when the last plain step line was written

    def show(self, event: Event) -> None:
        if event.kind == "note":
            self.say(f"note: {event.note}")
        if self.quiet:
            return
        which = f"{self.noun} {event.image + 1}/{event.images}, " if event.images > 1 else ""
        if event.kind == "stage":
            self._said = time.monotonic()
            if event.stage == "loading":  # which weights, and that they are toys, must stay to be read
                self.say(f"loading {event.note}")
            else:
                self._draw(f"{which}{event.stage}", plain=event.stage == "denoising")
        elif event.kind == "step":
            left = "" if event.eta_seconds is None else f", {duration(event.eta_seconds)} left"
            # Elsewhere than on a terminal a line a step would be noise: one every five seconds.
            due = time.monotonic() - self._said >= 5
            if due:
                self._said = time.monotonic()
            bar = f"{self._bar(event.index / event.count)} " if self.live else ""
            self._draw(f"{which}{bar}step {event.index}/{event.count}{left}", plain=due)
        elif event.kind == "result" and event.result is not None:
            result = event.result
            self.say(f"{which}seed {result.seed}, {duration(result.seconds)}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        self._write(f"{line}\n")

    def clear(self) -> None:
        """Remove the live line."""
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _draw(self, line: str, plain: bool) -> None:
        if not self.live:
            if plain:
                self._write(f"{line}\n")
            return
        line = line[: shutil.get_terminal_size().columns - 1]
        self._write(
            "\r" + (f"\x1b[2m{line}\x1b[0m" if self.colour else line) + " " * (self._drawn - len(line))
        )
        self._drawn = len(line)

    def _bar(self, done: float, width: int = 20) -> str:
        full = round(done * width)
        return "[" + "#" * full + "-" * (width - full) + "]"

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (BrokenPipeError, ValueError):  # nobody listens (any more): the work goes on
            self.quiet = True


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
