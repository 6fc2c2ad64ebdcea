import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from gen import engine, jobs, library
from gen.errors import GenError
from gen.request import Event, Request, Settings

pytestmark = pytest.mark.usefixtures("installed")
LONG = 200  # steps: seconds, if nobody stops it


def build(**values) -> Request:
    known = {"prompt": "a red cube", "steps": 2, "width": 64, "height": 64, "seed": 1}
    return Request.build("pixart-sigma:toy", known | values)


def submit(settings: Settings | None = None, **values) -> str:
    return jobs.submit(build(**values), settings)


def wait_for_step(id: str) -> None:
    """Return when the job has taken its first step."""
    next(event for event in jobs.watch(id) if event.kind == "step")


def test_a_job_runs_to_its_end_and_its_events_are_those_of_the_engine():
    id = submit()
    events = [*jobs.watch(id)]
    assert [event.kind for event in events] == [event.kind for event in engine.run(build())]
    assert jobs.state(id) == "done"
    assert events[-1].results[0].path.exists()


def test_a_job_draws_the_pixels_of_a_direct_run(draw):
    with (
        Image.open([*jobs.watch(submit(seed=9))][-1].results[0].path) as one,
        Image.open(draw(seed=9)[0].path) as two,
    ):
        assert one.tobytes() == two.tobytes()


def test_who_comes_late_gets_everything_from_the_start_or_from_where_they_were():
    id = submit()
    everything = [event.to_json() for event in jobs.watch(id)]
    assert [event.to_json() for event in jobs.watch(id)] == everything
    assert [event.to_json() for event in jobs.watch(id, after=4)] == everything[4:]
    assert [*jobs.watch(id, after=99)] == []


def test_several_may_watch_and_none_of_them_stops_the_job_by_leaving():
    id = submit(steps=30)
    leaver = jobs.watch(id)
    next(leaver)
    leaver.close()
    seen = [[], []]
    threads = [threading.Thread(target=lambda box=box: box.extend(jobs.watch(id))) for box in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0][-1].kind == "done"
    assert [event.kind for event in seen[0]] == [event.kind for event in seen[1]]


def test_only_the_newest_preview_is_kept():
    id = submit(steps=5)
    [*jobs.watch(id)]
    previews = [event.preview for event in jobs.watch(id) if event.kind == "step"]
    assert previews[:-1] == [None] * 4
    assert isinstance(previews[-1], Image.Image)


def test_cancelling_stops_within_a_step_and_leaves_nothing():
    id = submit(steps=LONG)
    wait_for_step(id)
    jobs.cancel(id)
    events = [*jobs.watch(id)]
    assert jobs.state(id) == "cancelled"
    assert events[-1].kind == "failed"
    assert events[-1].error["code"] == "cancelled"
    assert len([event for event in events if event.kind == "step"]) < LONG
    assert library.search() == []
    assert [path for path in library.home().rglob("*.p*") if path.is_file()] == []


def test_a_waiting_job_is_taken_out_of_the_queue():
    running, waiting = submit(steps=LONG), submit()
    assert jobs.state(waiting) == "queued"
    jobs.cancel(waiting)
    assert jobs.state(waiting) == "cancelled"
    assert [event.kind for event in jobs.watch(waiting)] == ["failed"]
    jobs.cancel(running)
    assert [*jobs.watch(running)][-1].error["code"] == "cancelled"


def test_jobs_run_in_order_of_submission():
    first, second = submit(), submit()
    [*jobs.watch(second)]
    assert jobs.state(first) == "done"
    ids = [job.id for job in jobs.list()]
    assert ids.index(second) < ids.index(first)


def test_cancelling_a_finished_job_changes_nothing():
    id = submit()
    [*jobs.watch(id)]
    jobs.cancel(id)
    assert jobs.state(id) == "done"


def test_a_failure_is_the_last_event_and_the_worker_lives_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    id = submit(Settings(output=tmp_path / "file" / "below"))
    last = [*jobs.watch(id)][-1]
    assert (last.kind, last.error["code"], jobs.state(id)) == ("failed", "output_not_writable", "failed")
    assert last.error["message"]
    assert [*jobs.watch(submit())][-1].kind == "done"


def test_a_bug_ends_the_job_with_the_place_of_its_log(monkeypatch):
    def broken(request: Request, settings: Settings):
        yield Event(kind="stage", stage="loading")
        raise ZeroDivisionError("a bug of this test")

    monkeypatch.setattr(engine, "run", broken)
    last = [*jobs.watch(submit())][-1]
    assert last.error["code"] == "failed"
    assert "a bug of this test" in last.error["message"]
    [log] = (library.home() / "logs").iterdir()
    assert str(log) in last.error["hint"]
    monkeypatch.undo()


@pytest.mark.parametrize("call", [jobs.watch, jobs.cancel, jobs.state])
def test_an_unknown_id_is_not_found_at_once(call):
    with pytest.raises(GenError) as caught:
        call("no-such-job")
    assert caught.value.code == "not_found"


def test_the_end_of_the_program_stops_the_job_in_good_order():
    program = (
        "from gen import jobs; from gen.request import Request\n"
        "request = Request.build('pixart-sigma:toy', {'prompt': 'x', 'steps': 200, 'width': 256})\n"
        "first = jobs.submit(request); jobs.submit(request)\n"
        "next(event for event in jobs.watch(first) if event.kind == 'step')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert library.search() == []
    assert [path for path in library.home().rglob("*.p*") if path.is_file()] == []


def test_old_jobs_are_forgotten(monkeypatch):
    monkeypatch.setattr(jobs, "KEEP", 1)
    first, second = submit(), submit()
    [*jobs.watch(second)]
    time.sleep(0.01)
    third = submit()
    [*jobs.watch(third)]
    assert jobs.state(third) == "done"
    with pytest.raises(GenError):
        jobs.state(first)
