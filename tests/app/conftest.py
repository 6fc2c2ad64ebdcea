"""A real server process with the real engine on small random weights, and a browser to look at its page."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds for anything on the page: only a failure ever waits that long
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Server:
    """A running `python -m app`."""

    process: subprocess.Popen[str]
    home: Path
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def stop(self) -> int:
        """Press Ctrl-C and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)

    @property
    def files(self) -> list[Path]:
        """Everything below outputs/, hidden and unfinished files included."""
        return sorted(path for path in (self.home / "outputs").rglob("*") if path.is_file())


@contextmanager
def serving(home: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Start a server on a free port and wait until it has printed its address; end it afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GEN_", "GRADIO_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "--port", "0", *arguments],
        cwd=ROOT,
        env={**kept, "GEN_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process, home)
    said: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)
            said.put(line)
        said.put("")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while not server.url:
            line = said.get(timeout=240)
            assert line, f"the server ended at once: {''.join(server.lines)}"
            if found := re.search(r"http://\S+", line):
                server.url = found[0]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        listener.join(timeout=10)


@pytest.fixture(scope="session")
def weights_dir(tiny_toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GEN_WEIGHTS_DIR with a pixart-sigma:toy of random numbers, slow enough for pressing Stop."""
    from pipelines.models.pixart import PixArtTransformer2DModel

    folder = tmp_path_factory.mktemp("weights")
    toy = folder / "toy" / "pixart-sigma"
    shutil.copytree(tiny_toy_folder, toy)
    config = json.loads((toy / "transformer" / "config.json").read_text())
    deeper = {name: value for name, value in config.items() if not name.startswith("_")} | {"num_layers": 10}
    PixArtTransformer2DModel(**deeper).save_pretrained(toy / "transformer")
    return folder


@pytest.fixture(scope="session")
def server(weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the browser tests share."""
    with serving(tmp_path_factory.mktemp("home"), GEN_WEIGHTS_DIR=str(weights_dir)) as running:
        yield running
        assert running.stop() == 0, "Ctrl-C is the ordinary way to end"
    talk = "".join(running.lines)
    assert "Traceback" not in talk, talk
    assert running.lines[-1] == "Stopped.\n"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium from the system."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(
            "The browser tests need Chromium, and there is no `chromium` on PATH: run `make setup test`, "
            "or scripts/install_chromium.sh alone."
        )
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*CHROMIUM_FLAGS])
        yield browser
        browser.close()


# Notes down every text of the progress line, so that a test sees steps that pass while it looks elsewhere.
NOTE_PROGRESS = """
window.progress = [];
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const words = document.querySelector(".progress .words");
  const preview = document.querySelector(".stage[aria-busy] img");
  const text = words && [...words.children].map((one) => one.textContent).join(" | ");
  if (!text || text === window.progress.at(-1)?.text) return;
  window.progress.push({ text, preview: preview?.naturalWidth });
}).observe(document.body, { subtree: true, childList: true, characterData: true }));
"""


@dataclass
class Watched:
    """What a page did that a person does not see."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def looking(
    browser: Browser, url: str, interrupted: bool = False, painting: bool = False, **context: object
) -> Iterator[Page]:
    """Open the page in a fresh profile. In the end no request has gone elsewhere, and nothing complained.

    `interrupted`: the page is left while it listens to a job; its console may say that the stream broke.
    `painting`: Gradio's editor is opened. Its library complains of old calls of its own, each as a bare stack
    trace; a mask that is put back is loaded a first time before there is a canvas, which it says; and the
    graphics driver calls reading the canvas slow.
    """
    watched = Watched()
    profile = browser.new_context(**context)
    profile.set_default_timeout(PATIENCE)
    page = profile.new_page()
    page.add_init_script(NOTE_PROGRESS)
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on(
        "console",
        lambda said: watched.complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.goto(url)
    page.locator("button.generate").wait_for()
    page.locator("#history .tiles, #history .hint-line").first.wait_for()
    try:
        yield page
    finally:
        profile.close()
    here = url.split("?")[0]
    elsewhere = [one for one in watched.requests if not one.startswith((here, "data:", "blob:"))]
    assert not elsewhere, f"the page asked for {elsewhere}"
    assert watched.requests, "requests were not seen at all"
    broken = ("AbortError", "Connection errored out") if interrupted else ()
    broken += ("Method not implemented.",)  # what Gradio's client says at the end of every upload
    broken += ("GL Driver Message", "No draw texture found for layer") if painting else ()
    complaints = [one for one in watched.complaints if not any(words in one for words in broken)]
    complaints = [one for one in complaints if not (painting and one.startswith("    at "))]
    assert not complaints, complaints


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page on a desk."""
    with looking(browser, server.url, viewport={"width": 1280, "height": 900}) as page:
        yield page
