"""REST: what models there are, drawing, whether the server is well, and the files that were made.

Files are addressed by the id of their row in the library, never by a path; what goes in comes as bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter
from fastapi import Request as Incoming
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse

import gen
from gen import jobs, library, pictures, point_inputs
from gen.catalog import MODELS, Model, installed
from gen.errors import GenError

router = APIRouter()

# What a browser may show in place. Everything else is offered as a download: an SVG or HTML file shown in
# place could run scripts as this page.
SHOWN_IN_PLACE = {".png": "image/png", ".mp4": "video/mp4"}


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


# Kind of input -> what keeps a file of it
KEEPERS = {"image": pictures.keep, "points": point_inputs.keep}


@router.post("/api/inputs")
async def keep(incoming: Incoming, kind: str = "image") -> dict[str, str]:
    """Keep the picture, or with ?kind=points the points, in the body, of any content type; the header X-Name
    may say its name.

    Answers with its reference {"sha256", "name"}, which stands for it in a request.
    """
    if kind not in KEEPERS:
        known = f"Say ?kind={' or ?kind='.join(KEEPERS)}."
        raise GenError(f"No files of the kind '{kind[:60]}' are kept.", known, "bad_input")
    content = await read(incoming, pictures.MOST_BYTES)
    reference = await run_in_threadpool(KEEPERS[kind], content)
    return reference | pictures.named(unquote(incoming.headers.get("x-name", "")))


@router.post("/api/generations", status_code=202)
async def submit(incoming: Incoming) -> dict[str, str]:
    """Queue what the body asks for: the JSON of a Request, as recipes hold it. Answers with the job's id.

    A picture, or a file of points, is a reference from /api/inputs, {"data": base64, "name"}, base64 or a
    data URL.
    """
    body = await read(incoming, pictures.MOST_BYTES * 4 // 3 + 2**20)
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        hint = 'Send {"model": ..., "inputs": {...}}.'
        raise GenError("The body is not JSON.", hint, "bad_input") from None
    request = await run_in_threadpool(gen.Request.from_json, sent)
    return {"id": jobs.submit(request)}


@router.get("/api/generations/{job_id}")
def state(job_id: str) -> dict[str, str]:
    """Whether a job is queued, running, done, failed or cancelled. Raises not_found."""
    return {"id": job_id, "state": jobs.state(job_id)}


@router.get("/api/generations/{job_id}/events")
def events(job_id: str) -> StreamingResponse:
    """The events of a job, a JSON object on each line, until it is over. Raises not_found."""
    watched = jobs.watch(job_id)

    def lines() -> Iterator[str]:
        for event in watched:
            yield json.dumps(event.to_json()) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.delete("/api/generations/{job_id}")
def cancel(job_id: str) -> dict[str, str]:
    """Stop a job within one step; one that is over stays. Raises not_found."""
    jobs.cancel(job_id)
    return {"id": job_id, "state": jobs.state(job_id)}


async def read(incoming: Incoming, most: int) -> bytes:
    """The body, which is not taken further than `most` bytes. Raises bad_input."""
    content = bytearray()
    async for chunk in incoming.stream():
        content += chunk
        if len(content) > most:
            raise GenError(f"The body is larger than {most // 2**20} MiB.", "Send less.", "bad_input")
    return bytes(content)


@router.get("/files/{result_id}")
def file(result_id: str) -> FileResponse:
    """The own file of a result. Raises not_found for an unknown id, or when the file has been moved away."""
    return sent(result_id, library.get(result_id).path)


@router.get("/files/{result_id}/{kind}")
def file_of_kind(result_id: str, kind: str) -> FileResponse:
    """One of the files of a result, by a key of its `files`. Raises not_found."""
    paths = library.get(result_id).paths
    if kind not in paths:
        raise GenError(
            f"'{result_id}' has no file of the kind '{kind[:60]}'.",
            f"It has {', '.join(paths)}.",
            "not_found",
        )
    return sent(result_id, paths[kind])


def sent(result_id: str, path: Path) -> FileResponse:
    """A file of the library on its way. Raises not_found."""
    if not path.is_file():
        raise GenError(
            f"The file of '{result_id}' is no longer where it was saved.",
            "Was it moved or deleted?",
            "not_found",
        )
    shown_as = SHOWN_IN_PLACE.get(path.suffix.lower())
    return FileResponse(
        path,
        media_type=shown_as or "application/octet-stream",
        filename=path.name,
        content_disposition_type="inline" if shown_as else "attachment",
        # A result never changes: its id is new each time.
        headers={"Cache-Control": "private, max-age=31536000, immutable"},
    )
