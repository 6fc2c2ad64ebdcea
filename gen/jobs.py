"""Work in the background: the page submits a request, watches its events, and may go away and come back.

One worker thread of this process runs the requests in order. Jobs live in memory; the durable queue will keep
this interface. Closing a watcher never stops a job; only `cancel` does, within one step.
"""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gen.errors import GenError, cancelled
from gen.request import Event, Request, Settings

log = logging.getLogger(__name__)

KEEP = 200  # finished jobs that can still be replayed


@dataclass(eq=False)
class _Job:
    id: str
    request: Request
    settings: Settings
    created: float
    state: str = "queued"  # queued | running | done | failed | cancelled
    events: list[Event] = field(default_factory=list)
    previewed: int | None = None  # which event has a preview
    stop: bool = False

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What `list` tells about a job."""

    id: str
    state: str
    created: float  # seconds since 1970
    request: Request


_jobs: dict[str, _Job] = {}  # in order of submission
_queue: deque[_Job] = deque()
_changed = threading.Condition()  # guards everything above, and the events and states of jobs
_worker: threading.Thread | None = None
_closing = False


def submit(request: Request, settings: Settings | None = None) -> str:
    """Put a request at the end of the queue and return the job's id at once."""
    global _worker
    job = _Job(secrets.token_hex(6), request, settings or Settings(), time.time())
    with _changed:
        _jobs[job.id] = job
        _queue.append(job)
        finished = [old.id for old in _jobs.values() if old.over]
        for old in finished[: max(0, len(finished) - KEEP)]:
            del _jobs[old]
        if _worker is None or not _worker.is_alive():
            # A daemon: a forgotten job does not keep the program alive, and _close stops it in good order.
            _worker = threading.Thread(target=_work, name="gen-jobs", daemon=True)
            _worker.start()
        _changed.notify_all()
    return job.id


def watch(id: str, after: int = 0) -> Iterator[Event]:
    """Replay the job's events from number `after` on, then follow until it is over.

    The last event is "done" or "failed" (whose error may have the code "cancelled"). Raises not_found.
    Of the steps that are replayed only the newest keeps its preview.
    """
    return _follow(_find(id), after)


def _follow(job: _Job, after: int) -> Iterator[Event]:
    while True:
        with _changed:
            while len(job.events) <= after and not job.over:
                _changed.wait()
            fresh = job.events[after:]
            if not fresh:
                return
        yield from fresh
        after += len(fresh)


def cancel(id: str) -> None:
    """Stop the job within one step, or take it out of the queue; a finished one stays. Raises not_found."""
    job = _find(id)
    with _changed:
        job.stop = True
        if job.state == "queued":
            _queue.remove(job)
            _finish(job, "cancelled", _failed(cancelled()))


def state(id: str) -> str:
    """queued, running, done, failed or cancelled. Raises not_found."""
    return _find(id).state


def list() -> Sequence[JobInfo]:
    """All remembered jobs, newest first."""
    with _changed:
        return [
            JobInfo(id=job.id, state=job.state, created=job.created, request=job.request)
            for job in reversed(_jobs.values())
        ]


def _find(id: str) -> _Job:
    with _changed:
        job = _jobs.get(id)
    if job is None:
        raise GenError(
            f"No job '{id[:60]}'.",
            "Jobs are forgotten when the program ends; see `gen history`.",
            "not_found",
        )
    return job


def _failed(error: GenError) -> Event:
    return Event(kind="failed", error=error.to_json())


def _add(job: _Job, event: Event) -> None:
    with _changed:
        if event.preview is not None:  # one preview per job, or long jobs would fill the memory
            if job.previewed is not None:
                job.events[job.previewed] = replace(job.events[job.previewed], preview=None)
            job.previewed = len(job.events)
        job.events.append(event)
        _changed.notify_all()


def _finish(job: _Job, state: str, event: Event) -> None:
    with _changed:
        _add(job, event)
        job.state = state
        _changed.notify_all()


def _work() -> None:
    """The worker thread: one job after the other until the program ends."""
    while True:
        with _changed:
            _changed.wait_for(lambda: _queue or _closing)
            if _closing:
                return
            job = _queue.popleft()
            job.state = "running"
            _changed.notify_all()
        _run(job)


def _run(job: _Job) -> None:
    from gen import engine

    events = engine.run(job.request, job.settings)
    try:
        for event in events:
            if event.kind == "done":
                _finish(job, "done", event)
                return
            _add(job, event)
            if job.stop:
                raise cancelled()
    except GenError as error:
        events.close()  # first, so that nothing half-written is there when watchers hear of the end
        _finish(job, "cancelled" if error.code == "cancelled" else "failed", _failed(error))
    except Exception as error:  # a bug: it must reach the watchers and the log, and not end the worker
        from gen import library

        log.exception("job %s failed unexpectedly", job.id)
        events.close()
        path = library.log_bug(error)
        message = f"An unexpected error ended the job: {type(error).__name__}: {error}"
        _finish(
            job, "failed", _failed(GenError(message, f"This is a bug; the details are in {path}.", "failed"))
        )
    finally:
        events.close()


def _close() -> None:
    """At the end of the program: stop the running job at its next step, with nothing half-written."""
    global _closing
    with _changed:
        _closing = True
        for job in _jobs.values():
            job.stop = True
        _changed.notify_all()
    if _worker is not None and _worker is not threading.current_thread():
        _worker.join(timeout=10)


atexit.register(_close)
