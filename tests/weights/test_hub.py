"""Files from a hub into the cache: with the real client, over real connections to a server of our own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hub_server import connected, git_sum, safetensors, serving
from weights import hub, store

REPO = "someone/model"
LARGE = safetensors(1, 3 * 2**20)
FILES = {"config.json": b'{"a": 1}', "unet/model.safetensors": LARGE}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path) as server:
        server.publish(REPO, FILES)
        yield server


@pytest.fixture
def listing(server) -> hub.Listing:
    return hub.look(REPO)


def large(listing: hub.Listing) -> hub.File:
    return next(one for one in listing.files if one.path.endswith(".safetensors"))


def test_a_repository_is_listed_with_sizes_and_sums(server, listing):
    assert listing.revision == server.repositories[REPO].main and listing.asked == "main"
    assert (listing.licence, listing.gated) == ("openrail++", False)
    assert {one.path: (one.size, one.blob) for one in listing.files} == {
        "config.json": (8, git_sum(FILES["config.json"])),
        "unet/model.safetensors": (len(LARGE), hashlib.sha256(LARGE).hexdigest()),
    }


def test_what_came_is_what_the_client_finds(server, listing):
    told = []
    for file in listing.files:
        assert hub.fetch(listing, file, told.append) == hashlib.sha256(FILES[file.path]).hexdigest()
        assert hub.here(REPO, file)
    assert sum(told) == sum(map(len, FILES.values()))
    folder = hub.place(listing, listing.files)
    assert folder == store.snapshot(REPO)
    asked = len(server.seen)
    # The client's own words, in a process that reads the variables as people's do
    code = (
        "import sys; from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download\n"
        f"print(hf_hub_download('{REPO}', 'unet/model.safetensors', local_files_only=True))\n"
        f"print(snapshot_download('{REPO}', local_files_only=True))\n"
        "info = scan_cache_dir(); print(len(info.warnings), info.size_on_disk)\n"
        f"print(snapshot_download('{REPO}'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert Path(lines[0]).read_bytes() == LARGE
    assert lines[1] == str(folder) == lines[3]
    assert lines[2] == f"0 {sum(map(len, FILES.values()))}"
    assert all(method != "GET" or "/resolve/" not in path for method, path, _ in server.seen[asked:])


def test_what_the_client_pulled_is_not_pulled_again(server):
    code = f"from huggingface_hub import snapshot_download; snapshot_download('{REPO}')"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_DISABLE_XET": "1"},
    )
    listing = hub.look(REPO)
    assert all(hub.here(REPO, file) for file in listing.files)


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_is_taken_up_where_it_ended(server, listing, reset):
    # Slowly: a reset throws away what the reader's system holds and the reader has not read
    server.misbehave("model.safetensors", cut=2**20, times=2, reset=reset, slow=0.01)
    said, file = [], large(listing)
    hub.fetch(listing, file, say=said.append)
    assert hub.blob(REPO, file).read_bytes() == LARGE
    ranges = [asked for method, path, asked in server.seen if path.endswith("model.safetensors")]
    assert len(ranges) == 3 and ranges[0] == "" and all(ranges[1:])
    assert server.sent <= len(LARGE) + 2**19, "no more than what was under way came twice"
    assert len(said) == 2 and "trying again" in said[0]


def test_many_cuts_are_no_reason_to_give_up_while_bytes_come(server, listing):
    server.misbehave("model.safetensors", cut=2**18)
    hub.fetch(listing, large(listing))
    assert hub.here(REPO, large(listing)), "twelve cuts, with patience for three in a row"


def test_a_connection_that_gives_nothing_is_given_up_and_what_came_stays(server, listing):
    server.misbehave("model.safetensors", cut=2**20, times=1)
    server.misbehave("model.safetensors", cut=0)
    file = large(listing)
    with pytest.raises(hub.HubError) as caught:
        hub.fetch(listing, file)
    assert caught.value.kind == "unreachable"
    assert hub.begun(REPO, file) == 2**20 and not hub.here(REPO, file)
    server.faults.clear()
    before = server.sent
    hub.fetch(listing, file)
    assert server.sent - before == len(LARGE) - 2**20
    assert not hub.partial(REPO, file).exists()


def test_a_hub_without_ranges_is_read_from_the_start(server, listing):
    file = large(listing)
    server.misbehave("model.safetensors", cut=2**20, times=1)
    server.misbehave("model.safetensors", ranges=False)
    told = []
    hub.fetch(listing, file, told.append)
    assert hub.blob(REPO, file).read_bytes() == LARGE
    assert sum(told) == len(LARGE), "what proved useless is taken back"


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_corrupt_bytes_are_refused_and_leave_no_trace(server, listing, path):
    server.misbehave(path, flip=True)
    file = next(one for one in listing.files if one.path.endswith(path))
    said = []
    with pytest.raises(hub.HubError, match="other bytes than the hub published") as caught:
        hub.fetch(listing, file, say=said.append)
    assert caught.value.kind == "corrupt" and file.blob in str(caught.value)
    assert [*hub.blob(REPO, file).parent.iterdir()] == []
    assert len(said) == 1 and len(server.asked()) == 2, "tried once more"


def test_bytes_that_were_corrupt_once_are_pulled_once_more(server, listing):
    server.misbehave("model.safetensors", flip=True, times=1)
    hub.fetch(listing, large(listing))
    assert hub.blob(REPO, large(listing)).read_bytes() == LARGE


def test_a_part_of_something_else_is_found_out(server, listing):
    file = large(listing)
    hub.partial(REPO, file).parent.mkdir(parents=True)
    hub.partial(REPO, file).write_bytes(bytes(2**20))  # as after a crash of the whole machine
    hub.fetch(listing, file)
    assert hub.blob(REPO, file).read_bytes() == LARGE


def test_a_range_that_is_refused_begins_anew(server, listing):
    file = large(listing)
    hub.partial(REPO, file).parent.mkdir(parents=True)
    hub.partial(REPO, file).write_bytes(LARGE[:1000])
    server.misbehave("model.safetensors", status=416, times=1)
    told = []
    hub.fetch(listing, file, told.append)
    assert hub.blob(REPO, file).read_bytes() == LARGE
    assert sum(told) == len(LARGE) - 1000


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(server, status):
    server.misbehave("", status=status, times=3)
    said = []
    listing = hub.look(REPO, say=said.append)
    assert len(said) == 3 and str(status) in said[0]
    server.misbehave("model.safetensors", status=status, times=3)
    hub.fetch(listing, large(listing), say=said.append)
    assert len(said) == 6


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "busy"), (500, "server"), (403, "refused"), (401, "refused")]
)
def test_what_does_not_pass_is_told(server, listing, status, kind):
    server.misbehave("", status=status)
    for call in (lambda: hub.look(REPO), lambda: hub.fetch(listing, large(listing))):
        before = len(server.seen)
        with pytest.raises(hub.HubError, match=str(status)) as caught:
            call()
        assert caught.value.kind == kind
        assert len(server.seen) - before == (4 if status in hub.AGAIN else 1)


def test_a_wait_that_the_hub_asks_for_is_kept_unless_it_is_very_long(server, listing):
    server.misbehave("model.safetensors", status=429, times=1, headers={"Retry_After": "1"})
    said = []
    hub.fetch(listing, large(listing), say=said.append)
    assert "trying again in 1 s" in said[0]
    server.misbehave("config.json", status=429, headers={"Retry_After": "86400"})
    before = len(server.seen)
    with pytest.raises(hub.HubError) as caught:
        hub.fetch(listing, listing.files[0])
    assert caught.value.kind == "busy" and len(server.seen) - before == 1


def test_what_is_not_there_is_named(server, listing):
    for call, kind, words in (
        (lambda: hub.look("someone/else"), "no_repository", "someone/else"),
        (lambda: hub.look(REPO, "v9"), "no_revision", "'v9'"),
        (lambda: hub.fetch(listing, hub.File("gone.json", 3, "0" * 40)), "no_file", "gone.json"),
        (lambda: hub.look("not a name"), "no_repository", "not a name"),
    ):
        with pytest.raises(hub.HubError, match=words) as caught:
            call()
        assert caught.value.kind == kind


def test_a_gated_repository_is_listed_and_its_files_need_a_token(server, monkeypatch):
    server.publish("someone/gated", FILES, gated=True, token="hf_good")
    listing = hub.look("someone/gated")
    assert listing.gated
    for token in ("", "hf_bad"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(hub.HubError) as caught:
            hub.fetch(listing, large(listing))
        assert caught.value.kind == "gated"
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.fetch(listing, large(listing))
    assert "hf_good" in server.tokens


def test_a_file_on_another_server_is_read_there_and_the_token_stays_here(server, monkeypatch):
    """As the hub does with all large files: their address is signed, and no business of the token."""
    server.publish("someone/private", FILES, token="hf_good")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    listing = hub.look("someone/private")
    file = large(listing)
    hub.partial("someone/private", file).parent.mkdir(parents=True)
    hub.partial("someone/private", file).write_bytes(LARGE[: 2**20])
    with serving() as elsewhere:
        elsewhere.publish("someone/private", FILES)
        server.misbehave("model.safetensors", redirect=elsewhere.address)
        hub.fetch(listing, file)
        assert [asked for _, _, asked in elsewhere.seen] == [f"bytes={2**20}-"]
        assert "hf_good" in server.tokens and not elsewhere.tokens
    assert hub.blob("someone/private", file).read_bytes() == LARGE


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_nothing_is_asked(server, listing, monkeypatch, variable):
    before = len(server.seen)
    monkeypatch.setenv(variable, "1")
    for call in (lambda: hub.look(REPO), lambda: hub.fetch(listing, large(listing))):
        with pytest.raises(hub.HubError, match=variable) as caught:
            call()
        assert caught.value.kind == "offline"
    assert len(server.seen) == before


def test_a_hub_that_is_not_there_is_told(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.HubError, match=r"127\.0\.0\.1:9") as caught:
        hub.look(REPO)
    assert caught.value.kind == "unreachable"


@pytest.mark.parametrize("path", ["../../etc/x", "/etc/x", "a/../../b", "a\\b"])
def test_names_that_lead_out_of_the_cache_are_refused(server, path):
    server.publish("someone/evil", {path: b"x"})
    with pytest.raises(hub.HubError) as caught:
        hub.look("someone/evil")
    assert caught.value.kind == "server"


def test_a_file_that_never_ends_fills_no_disk(server, listing):
    file = large(listing)
    short = hub.File(file.path, 1000, file.blob)
    with pytest.raises(hub.HubError, match="longer than the hub published") as caught:
        hub.fetch(listing, short)
    assert caught.value.kind == "corrupt"
    assert not hub.begun(REPO, short)


def test_a_full_disk_is_told_and_what_came_stays(server, listing):
    """The limit on the size of files stands for the disk: it ends a write in the same way."""
    code = (
        "import resource, signal; from weights import hub\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"listing = hub.look('{REPO}')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))\n"
        "try:\n    hub.fetch(listing, listing.files[1])\n"
        "except hub.HubError as error:\n    print(error.kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "disk_full\n", done.stderr
    assert 0 < hub.begun(REPO, large(listing)) <= 2**20


def test_two_at_once_wait_for_each_other(server):
    said, order = [], []
    inside = threading.Event()

    def other() -> None:
        with hub.alone(REPO, said.append):
            order.append("other")

    with hub.alone(REPO):
        thread = threading.Thread(target=lambda: (inside.set(), other()))
        thread.start()
        inside.wait()
        thread.join(0.8)
        order.append("first")
    thread.join(20)
    assert order == ["first", "other"]
    assert len(said) == 1 and "another process" in said[0]


def test_the_same_bytes_of_two_repositories_are_stored_once(server, listing):
    server.publish("someone/other", {"x.safetensors": LARGE})
    other = hub.look("someone/other")
    [same] = other.files
    assert hub.twin("someone/other", same) is None
    hub.fetch(listing, large(listing))
    twin = hub.twin("someone/other", same)
    assert twin == hub.blob(REPO, large(listing))
    assert hub.link("someone/other", same, twin)
    assert hub.blob("someone/other", same).samefile(twin)
    # Damaged ones are no source
    hub.blob("someone/other", same).unlink()
    twin.write_bytes(LARGE[:-1] + b"?")
    assert not hub.link("someone/other", same, twin)
    assert not hub.here("someone/other", same)


def test_a_revision_is_pinned_by_its_record(server, listing):
    for file in listing.files:
        hub.fetch(listing, file)
    hub.place(listing, listing.files)
    hub.remember(listing, listing.files, {file.path: "0" * 64 for file in listing.files})
    record = json.loads(store.record_path(REPO).read_text())
    assert record["revision"] == listing.revision and record["hub"] == server.address
    assert record["files"]["config.json"] == {"size": 8, "blob": listing.files[0].blob, "sha256": "0" * 64}
    newer = store.repository(REPO) / "snapshots" / ("f" * 40)
    newer.mkdir()
    (store.repository(REPO) / "refs" / "main").write_text("f" * 40)
    assert store.snapshot(REPO).name == listing.revision
    store.record_path(REPO).write_text("{")
    assert store.snapshot(REPO) == newer, "a record that cannot be read pins nothing"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HOME": "/a/home"},
        {"HF_HUB_CACHE": "/a/cache", "HF_HOME": "/a/home"},
        {"HUGGINGFACE_HUB_CACHE": "/a/old", "HF_HOME": "/a/home"},
        {"XDG_CACHE_HOME": "/a/xdg"},
        {"HF_HOME": "~/mine", "HOME": "/a/user"},
    ],
    ids=str,
)
def test_the_cache_lies_where_the_client_has_it(given, monkeypatch):
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(store.hub_cache()) == done.stdout.strip()
