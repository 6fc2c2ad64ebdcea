"""REST: what models there are, whether the server is well, and the files that were made.

Files are addressed by the id of their row in the library, never by a path.
"""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

import gen
from gen import library
from gen.catalog import MODELS, Model, installed
from gen.errors import GenError

router = APIRouter()

# What a browser may show in place. Everything else is offered as a download: an SVG or HTML file shown in
# place could run scripts as this page.
SHOWN_IN_PLACE = {".png": "image/png"}


@router.get("/api/health")
def health() -> dict[str, str]:
    """Say that the server answers."""
    return {"status": "ok", "version": gen.__version__}


@router.get("/api/models")
def models() -> dict[str, Any]:
    """The catalog: every model with its inputs and its weights, and which of those are installed."""
    return {"models": [describe(row) for row in MODELS.values()]}


def describe(row: Model) -> dict[str, Any]:
    """One row of the catalog as JSON. The limits of the inputs depend on the weights, so they stand there."""
    here = installed(row)
    return {
        "name": row.name,
        "summary": row.summary,
        "makes": row.makes,
        "weights": [
            {
                "tag": tag,
                "installed": tag in here,
                "toy": row.checkpoint(tag).is_toy,
                "summary": row.checkpoint(tag).summary,
                "licence": row.checkpoint(tag).licence,
                "inputs": [one.to_json() for one in row.inputs_for(tag)],
            }
            for tag in row.weights
        ],
    }


@router.get("/files/{result_id}")
def file(result_id: str) -> FileResponse:
    """The file of one result. Raises not_found for an unknown id, or when the file has been moved away."""
    entry = library.get(result_id)
    if not entry.path.is_file():
        raise GenError(
            f"The file of '{result_id}' is no longer where it was saved.",
            "Was it moved or deleted?",
            "not_found",
        )
    shown_as = SHOWN_IN_PLACE.get(entry.path.suffix.lower())
    return FileResponse(
        entry.path,
        media_type=shown_as or "application/octet-stream",
        filename=entry.path.name,
        content_disposition_type="inline" if shown_as else "attachment",
        # A result never changes: its id is new each time.
        headers={"Cache-Control": "private, max-age=31536000, immutable"},
    )
