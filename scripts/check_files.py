"""Look over the files named on the command line before they are committed.

Text files: no trailing white space, exactly one newline at the end, no merge conflict marks.
Any file: no more than 1 MB, so that a checkpoint or a video never slips in (weights/toy is exempted
by the caller, .pre-commit-config.yaml). Exit code 1 and one line per finding when something is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

LARGEST_BYTES = 1_000_000
CONFLICT_MARKS = ("<<<<<<< ", ">>>>>>> ")


def findings(path: Path) -> list[str]:
    """Say what is wrong with one file; an empty list when nothing is."""
    content = path.read_bytes()
    found = []
    if len(content) > LARGEST_BYTES:
        found.append(f"{path}: {len(content):,} bytes; {LARGEST_BYTES:,} is the limit")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return found  # a picture or another binary file: only its size matters
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip():
            found.append(f"{path}:{number}: white space at the end of the line")
        if line.startswith(CONFLICT_MARKS):
            found.append(f"{path}:{number}: a merge conflict mark")
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{path}: should end in exactly one newline")
    return found


def main(arguments: list[str]) -> int:
    """Check every file in `arguments`; return the exit code."""
    found = [line for name in arguments for line in findings(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
