"""The front door of the command line: whatever happens behind it ends in a clear message and an exit code.

Results go to stdout, talk goes to stderr. The commands themselves are in gen.commands; they are imported only
once signals are in hand, so that Ctrl-C during the first tenth of a second is as calm as later.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gen import printing
from gen.errors import GenError, cancelled


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # "ü" ends no command
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        error = _attempt(arguments)
        return 0 if error is None else _tell(error, as_json="--json" in arguments or "--stream" in arguments)
    except printing.Unwritable as unwritable:
        return _without_stdout(unwritable.cause)


def _attempt(arguments: Sequence[str]) -> GenError | None:
    """Run the command. What can end one becomes a GenError, but for a stdout that cannot be written to."""
    stopped: list[int] = []  # signals that came
    try:
        with _signals(stopped):
            from gen import commands

            commands.cli.main(args=[*arguments], prog_name="gen", standalone_mode=False)
        return None
    except GenError as error:
        return error
    except printing.Unwritable:
        raise
    except KeyboardInterrupt:
        return cancelled()
    except Exception as error:
        # A signal while a library is imported may come as an ImportError.
        return cancelled() if stopped or _aborted(error) else _usage(error) or _bug(error)


def _aborted(error: Exception) -> bool:
    """What click makes of a KeyboardInterrupt, also where a command took the signal into its own hands."""
    import click

    return isinstance(error, click.Abort)


def _usage(error: Exception) -> GenError | None:
    """Click's complaints about the command line, in our form."""
    import click

    if not isinstance(error, click.UsageError):
        return None
    path = error.ctx.command_path if error.ctx else "gen"
    code = "unknown_option" if isinstance(error, click.NoSuchOption) else "bad_input"
    return GenError(error.format_message().rstrip(".") + ".", f"See: {path} --help", code)


def _tell(error: GenError, as_json: bool) -> int:
    """The error on stderr, and on stdout as well when a program reads it. Returns the exit code."""
    if as_json:
        finished = {"data": {"results": error.finished}} if error.finished else {}
        printing.as_json({"ok": False, "error": error.to_json(), **finished})
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    word = "\x1b[31merror:\x1b[0m" if colour else "error:"
    print("\n".join(filter(None, (f"{word} {error.message}", error.hint))), file=sys.stderr)
    return error.exit_code


def _bug(error: Exception) -> GenError:
    """An unexpected exception: one line for the user, the traceback for whoever mends it."""
    from gen import library

    path = library.log_bug(error)
    if path is None:
        import traceback

        traceback.print_exception(error)
    return GenError(
        f"An unexpected error, which is a bug: {type(error).__name__}: {error}",
        f"The details are in {path}." if path else "The details stand above; no log could be written.",
        "failed",
    )


def _without_stdout(cause: OSError) -> int:
    """The reader of stdout has gone, as `head` does, or stdout is a file on a full disk."""
    import errno

    # What Python still holds must go nowhere, else it complains once more when it flushes at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if cause.errno == errno.EPIPE:
        return 1
    full = GenError(f"Cannot write to stdout: {cause.strerror}.", "Free some space.", "disk_full")
    return _tell(full, as_json=False)


@contextmanager
def _signals(came: list[int]) -> Iterator[None]:
    """SIGTERM ends a command in the same good order as Ctrl-C. What the parent had ignored stays ignored."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def __getattr__(name: str) -> Any:
    if name == "cli":  # the click group, for documents and tests
        from gen import commands

        return commands.cli
    raise AttributeError(f"module 'gen.cli' has no attribute {name!r}")


if __name__ == "__main__":
    main()
