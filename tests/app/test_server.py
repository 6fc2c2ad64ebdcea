"""The server around the page: who comes in, what REST answers, which files go out, how the command ends."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image

from app import server
from gen import library, pictures, point_inputs
from gen.catalog import MODELS
from gen.errors import GenError
from tests.app.conftest import ROOT, serving
from tests.app.test_views import entry

HERE = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One user folder for the module: an app remembers where its cache is."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("GEN_HOME", str(folder))
        patch.delenv("GRADIO_TEMP_DIR", raising=False)
        yield folder


@pytest.fixture(scope="module")
def app(home: Path):
    return server.create_app()


@pytest.fixture
def client(app, home: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("GEN_HOME", str(home))
    return TestClient(app, base_url=HERE)


def kept(path: Path, name: str) -> Path:
    """A picture in the library under the id `name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with library.adding() as add:
        Image.new("RGB", (8, 4), "red").save(path, "PNG")
        add(entry(id=name, path=path))
    return path


# --------------------------------------------------------------------------------------------------- REST


def test_health_answers(client: TestClient):
    answer = client.get("/api/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"


def test_models_are_the_catalog_with_what_is_installed(client: TestClient, weights_dir: Path, monkeypatch):
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(weights_dir))
    models = client.get("/api/models").json()["models"]
    assert [one["name"] for one in models] == [*MODELS]
    (toy,) = [one for one in models[0]["weights"] if one["tag"] == "toy"]
    assert toy["installed"] and toy["toy"]
    width = {one["name"]: one for one in toy["inputs"]}["width"]
    assert (width["default"], width["minimum"], width["maximum"], width["step"]) == (128, 64, 256, 16)


def a_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_comes_in_as_bytes_and_is_answered_with_its_reference(client: TestClient):
    answer = client.post("/api/inputs", content=a_picture(), headers={"X-Name": "my%20photo.png"})
    assert answer.status_code == 200
    reference = answer.json()
    assert reference == pictures.keep(reference)
    assert reference["name"] == "my photo.png"
    assert pictures.read(reference).size == (40, 30)


def test_what_is_no_picture_or_too_large_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    for content, words in ((b"", "is empty"), (b"<svg/>" * 100, "is not a picture")):
        answer = client.post("/api/inputs", content=content)
        assert answer.status_code == 422
        assert words in answer.json()["error"]["message"]
    monkeypatch.setattr(pictures, "MOST_BYTES", 10)
    answer = client.post("/api/inputs", content=a_picture())
    assert answer.status_code == 422
    assert "larger than" in answer.json()["error"]["message"]


def test_a_request_is_drawn_with_a_picture_sent_as_base64(
    client: TestClient, tiny_delta_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "pixart-delta").symlink_to(tiny_delta_folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path))
    inputs = {"prompt": "a cube", "width": 64, "height": 64, "steps": 1}
    inputs["control_image"] = {"data": base64.b64encode(a_picture()).decode(), "name": "red.png"}
    answer = client.post("/api/generations", json={"model": "pixart-delta:toy", "inputs": inputs, "seed": 4})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    lines = client.get(f"/api/generations/{job}/events").text.splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "done", last
    made = last["results"][0]["recipe"]["request"]["inputs"]["control_image"]
    assert made["name"] == "red.png"
    assert client.get(f"/api/generations/{job}").json() == {"id": job, "state": "done"}
    assert client.delete(f"/api/generations/{job}").json()["state"] == "done"
    assert client.get(f"/files/{last['results'][0]['id']}").status_code == 200


def test_a_cloud_is_drawn_and_its_files_go_out_by_id_and_kind(
    client: TestClient, tiny_dit3d_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "dit-3d").symlink_to(tiny_dit3d_folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path))
    inputs = {"class_label": "mug", "points": 64, "steps": 2, "files": "points"}
    answer = client.post("/api/generations", json={"model": "dit-3d:toy", "inputs": inputs, "seed": 4})
    assert answer.status_code == 202, answer.text
    events = client.get(f"/api/generations/{answer.json()['id']}/events").text.splitlines()
    last = json.loads(events[-1])
    assert last["event"] == "done", last
    (result,) = last["results"]
    assert result["files"].keys() == {"glb", "ply", "obj", "png"}
    for kind, path in result["files"].items():
        answer = client.get(f"/files/{result['id']}/{kind}")
        assert answer.content == Path(path).read_bytes()
        shown = "inline" if kind == "png" else "attachment"
        assert answer.headers["content-disposition"] == f'{shown}; filename="{Path(path).name}"'
    assert client.get(f"/files/{result['id']}").content[:4] == b"glTF"
    for kind in ("mp4", "..%2f..%2flibrary.sqlite3", "GLB"):
        answer = client.get(f"/files/{result['id']}/{kind}")
        assert answer.status_code == 404, kind
        assert b"SQLite" not in answer.content
    assert client.get("/files/nobody/glb").status_code == 404


def test_points_come_in_as_bytes_and_stay_in_the_cloud_that_is_drawn(
    client: TestClient, tiny_dit3d_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "dit-3d").symlink_to(tiny_dit3d_folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path))
    text = b"\n".join(b"%f %f %f" % (x / 50, x % 7 / 20, x % 3 / 10) for x in range(20))
    answer = client.post("/api/inputs?kind=points", content=text, headers={"X-Name": "..%2Fa%20leg.xyz"})
    assert answer.status_code == 200, answer.text
    reference = answer.json()
    assert reference["name"] == "a leg.xyz" and reference == point_inputs.keep(reference)
    inputs = {"class_label": "mug", "points": 64, "steps": 2, "files": "points", "known_points": reference}
    answer = client.post("/api/generations", json={"model": "dit-3d:toy", "inputs": inputs, "seed": 4})
    assert answer.status_code == 202, answer.text
    events = client.get(f"/api/generations/{answer.json()['id']}/events").text.splitlines()
    (result,) = json.loads(events[-1])["results"]
    found = point_inputs.read_points(result["files"]["ply"])
    assert np.array_equal(found[:20], point_inputs.read(reference))


def test_no_file_of_the_server_is_read_in_the_name_of_points(
    client: TestClient, tiny_dit3d_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "dit-3d").symlink_to(tiny_dit3d_folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path))
    secret = tmp_path / "secret.xyz"
    secret.write_text("1 2 3\n4 5 6\n" * 20)
    before = sorted((library.home() / "inputs").glob("*"))
    for sent in (
        str(secret),
        {"data": str(secret)},
        {"sha256": f"../../{secret.name}"},
        {"sha256": "0" * 64, "name": str(secret)},
        {"name": str(secret)},
        {"path": str(secret)},
        [str(secret)],
    ):
        inputs = {"class_label": "mug", "known_points": sent}
        answer = client.post("/api/generations", json={"model": "dit-3d:toy", "inputs": inputs})
        assert answer.status_code == 422, sent
        assert answer.json()["error"]["code"] == "bad_input"
    for content, kind, words in (
        (b"hello", "points", "no file of points"),
        (b"", "points", "is empty"),
        (b"1 2 3", "sounds", "No files of the kind 'sounds'"),
    ):
        answer = client.post(f"/api/inputs?kind={kind}", content=content)
        assert answer.status_code == 422
        assert words in answer.json()["error"]["message"]
    assert sorted((library.home() / "inputs").glob("*")) == before


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"not json", 422, "is not JSON"),
        (b"[" * 100_000, 422, "is not JSON"),
        (b"[]", 422, "must be a JSON object"),
        (b'{"model": "nothing"}', 404, "No model"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_words(
    client: TestClient, body: bytes, status: int, words: str
):
    answer = client.post("/api/generations", content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_job_that_nobody_knows_is_not_found(client: TestClient):
    for path in ("/api/generations/nobody", "/api/generations/nobody/events"):
        assert client.get(path).status_code == 404
    assert client.delete("/api/generations/nobody").status_code == 404


def test_a_file_goes_out_by_its_id_as_what_it_is(client: TestClient, home: Path):
    path = kept(home / "outputs" / "red.png", "id1")
    answer = client.get("/files/id1")
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'inline; filename="red.png"'
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_could_run_as_a_page_is_only_ever_downloaded(client: TestClient, home: Path):
    kept(home / "outputs" / "evil.svg", "id2")
    answer = client.get("/files/id2")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("name", ["nothing", "..%2f..%2flibrary.sqlite3", "%2fetc%2fpasswd", "' OR 1=1 --"])
def test_only_ids_of_the_library_are_files(client: TestClient, home: Path, name: str):
    kept(home / "outputs" / f"{abs(hash(name))}.png", f"other-{abs(hash(name))}")
    answer = client.get(f"/files/{name}")
    assert answer.status_code == 404
    assert b"SQLite" not in answer.content and b"root:" not in answer.content


def test_a_file_that_was_moved_away_is_said_to_be_gone(client: TestClient, home: Path):
    kept(home / "outputs" / "gone.png", "id3").unlink()
    answer = client.get("/files/id3")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


# --------------------------------------------------------------------------------------------------- door


def test_the_page_is_there_and_may_load_nothing_from_elsewhere(client: TestClient):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_the_page_has_no_telemetry_sharing_or_programs_interface(client: TestClient, home: Path):
    config = client.get("/config").json()
    assert not config["analytics_enabled"]
    assert len(config["dependencies"]) > 8
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}
    assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    cache = home / "cache" / "gradio"
    assert os.environ["GRADIO_TEMP_DIR"] == str(cache)
    assert cache.stat().st_mode & 0o077 == 0, "nobody else looks into it"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""])
def test_a_name_from_elsewhere_that_points_here_gets_nothing(client: TestClient, host: str):
    assert client.get("/api/models", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_the_names_of_this_computer_come_in(client: TestClient, host: str):
    assert client.get("/api/models", headers={"host": host}).status_code == 200


def test_other_sites_cannot_press_buttons_here(client: TestClient):
    join = "/gradio_api/queue/join"
    foreign = client.post(join, json={}, headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403
    own = client.post(join, json={}, headers={"origin": HERE})
    assert own.status_code != 403


def test_with_a_token_nobody_comes_in_without_it(home: Path):
    client = TestClient(
        server.create_app(token="open sesame", local_only=False), base_url="http://studio.example"
    )
    assert client.get("/api/health").status_code == 200, "a container's health check knows no token"
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/api/models", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api/models", headers={"cookie": "gen_token=wrong"}).status_code == 401
    assert client.get("/api/models", headers={"authorization": "Bearer open sesame"}).status_code == 200
    assert not client.cookies

    answer = client.get("/?token=open+sesame&__theme=dark", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?__theme=dark", "the word does not stay in the address"
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200, "the cookie is enough from now on"


# ------------------------------------------------------------------------------------- without any weights


def test_without_weights_the_page_opens_and_says_how_to_get_some(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gen.catalog.store.find", lambda key: None)
    client = TestClient(server.create_app(), base_url=HERE)
    assert client.get("/").status_code == 200
    said = json.dumps(client.get("/config").json()["components"])
    assert "are not on this machine" in said
    assert "gen train pixart-sigma:toy" in said
    assert "(not installed)" in said


# ------------------------------------------------------------------------------------------------ command


def run(*arguments: str, **environment: str):
    clean = {name: None for name in os.environ if name.startswith("GEN_")}
    return CliRunner().invoke(server.serve_command, arguments, env={**clean, **environment})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_an_address_that_others_reach_is_refused_without_a_token(host: str):
    ended = run("--host", host)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    assert "--token" in ended.stderr and "GEN_PUBLIC" in ended.stderr
    assert run(GEN_HOST=host).exit_code == 2, "the environment is no way around it"


@pytest.mark.parametrize("port", ["-1", "65536", "many"])
def test_an_impossible_port_is_refused(port: str):
    assert run("--port", port).exit_code == 2


def test_a_port_in_use_is_said_to_be_and_another_proposed():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("--port", str(port))
    assert ended.exit_code == 7
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "--port 0" in ended.stderr
    assert "Traceback" not in ended.output


def test_an_address_of_another_computer_cannot_be_listened_on():
    with pytest.raises(GenError, match=r"Cannot listen on 203\.0\.113\.9"):
        server.bind("203.0.113.9", 0)


def test_a_container_serves_openly_when_told_to_and_ends_on_control_c(tmp_path: Path):
    with serving(tmp_path, GEN_HOST="0.0.0.0", GEN_PUBLIC="1") as running:
        assert running.url.startswith("http://127.0.0.1:"), "an address that can be opened"
        # An open page holds a stream like this one for as long as it is open.
        with httpx.stream("GET", f"{running.url}gradio_api/heartbeat/somebody", timeout=60) as stream:
            assert next(stream.iter_bytes())
            assert running.stop() == 0
    assert running.lines == [running.lines[0], "Stop it with Ctrl-C.\n", "Stopped.\n"], "nothing else is said"


def test_a_token_is_part_of_the_address_that_is_printed():
    with server.bind("127.0.0.1", 0) as listener:
        assert server.address(listener, "a b&c").endswith("/?token=a+b%26c")
        assert server.address(listener, None).endswith("/")


def test_importing_the_command_is_light():
    code = "import sys, app.server; print(*{'torch', 'gradio', 'fastapi', 'uvicorn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "", "gen --help imports app.server and must stay quick"
