"""The engine and the command line of Gen Studio: knows models by their row in the catalog, never by class.

Python in four names: `gen.models()`, `gen.Request.build("pixart-sigma", {"prompt": "a red cube"})`,
`gen.run(request, gen.Settings())`, an iterator of Events of which those of kind "result" carry a picture.
Browsers are served by `app`; the methods live in `pipelines`, the bytes in `weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gen.catalog import Model
    from gen.request import Event, Request, Settings

__all__ = ["Request", "Settings", "models", "run"]


def models() -> list[Model]:
    """The rows of the catalog."""
    from gen.catalog import MODELS

    return [*MODELS.values()]


def run(request: Request, settings: Settings | None = None) -> Iterator[Event]:
    """Make what the request asks for; see gen.engine.run."""
    from gen import engine

    return engine.run(request, settings)


def __getattr__(name: str) -> type:
    # `import gen` must cost nothing: the command line imports this package before it knows what to do.
    if name in ("Request", "Settings"):
        from gen import request

        return getattr(request, name)
    raise AttributeError(f"module 'gen' has no attribute {name!r}")
