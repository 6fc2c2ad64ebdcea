"""Text that people hand in as a file: prompts, wildcards, styles."""

from __future__ import annotations

import sys
from pathlib import Path

from gen.errors import GenError


def read_text(source: Path | str, most: int, hint: str = "Check the name.") -> str:
    """The text of a file of at most so many bytes, or of stdin for '-'. `hint` is for one that cannot be
    read. Raises bad_input."""
    try:
        if source == "-":
            raw = sys.stdin.buffer.read(most + 1)
        else:
            with Path(source).open("rb") as file:
                raw = file.read(most + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise GenError(f"Cannot read {source}: {error.strerror}.", hint, "bad_input") from None
    except UnicodeDecodeError:
        raise GenError(f"{source} is not UTF-8 text.", "Save it as UTF-8.", "bad_input") from None
    if len(raw) > most:
        raise GenError(f"{source} is longer than {most // 2**20} MiB.", "Split it up.", "bad_input")
    return text
