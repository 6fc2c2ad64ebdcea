"""What can go wrong, said once: every expected failure is a GenError whose code stands in REGISTRY.

Front ends translate: the command line into an exit code and three lines on stderr, the REST API into an HTTP
status, the page into a message box. Anything that is not a GenError is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """How one code of GenError is shown to the outside."""

    exit: int  # exit code of the command line
    http: int  # status of the REST API
    meaning: str  # one line, also in docs/errors.md


REGISTRY: dict[str, Kind] = {
    "failed": Kind(1, 500, "Something expected to be possible failed, and no more precise code fits."),
    "output_not_writable": Kind(1, 500, "The picture or the history cannot be written to its place."),
    "bad_input": Kind(2, 422, "A value is missing, malformed or outside its limits."),
    "unknown_model": Kind(2, 404, "There is no model, or no weights of the model, of this name."),
    "unknown_option": Kind(2, 422, "The model does not take this option."),
    "not_found": Kind(2, 404, "There is no picture or job with this id."),
    "not_installed": Kind(3, 409, "The weights, or a package needed for this, are not on this machine."),
    "corrupt_weights": Kind(4, 500, "A file of the weights is missing, cut short or changed."),
    "out_of_memory": Kind(5, 507, "The work did not fit into the memory of the processor or the GPU."),
    "disk_full": Kind(6, 507, "No space was left while saving."),
    "network": Kind(1, 502, "The hub of published weights was not reached, or did not answer as it should."),
    "no_access": Kind(1, 403, "The repository is gated or private, and no token that may read it was given."),
    "no_server": Kind(7, 503, "No server could be reached or started at the address."),
    "cancelled": Kind(130, 499, "Stopped by the user before the end."),
}


class GenError(Exception):
    """An expected failure: `message` says what and why, `hint` what now, `code` is a key of REGISTRY."""

    def __init__(self, message: str, hint: str, code: str) -> None:
        assert code in REGISTRY, f"{code!r} is not in gen.errors.REGISTRY"
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.finished: list[dict[str, Any]] = []  # results that were complete before it happened

    @property
    def exit_code(self) -> int:
        return REGISTRY[self.code].exit

    @property
    def http_status(self) -> int:
        return REGISTRY[self.code].http

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


def cancelled() -> GenError:
    """The user's own wish, in the form of an error."""
    return GenError("Stopped before the end; nothing half-written was kept.", "", "cancelled")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean a, b?` when something known is close to the word, else an empty string."""
    import difflib  # 4 ms that only a mistake pays

    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"Did you mean {', '.join(close)}?" if close else ""
