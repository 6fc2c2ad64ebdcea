"""Make docs/images/page-*.png again: the page on a desk in light and dark, and on a phone.

    .venv/bin/python scripts/screenshots.py [--seed N]

Draws with the best installed weights into a throw-away user folder, so that the history shows these pictures
and nothing of yours. Needs Chromium (scripts/install_chromium.sh).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
LARGEST_BYTES = 700_000
HISTORY = (
    "a shiny red cube",
    "a small yellow ball on a blue cylinder",
    "a purple torus",
    "a white pyramid on a dark ground",
    "a large orange capsule on a green ground",
    "a cyan cone behind a brown cube",
    "a pink diamond",
    "a black cylinder right of a yellow cone",
)
SHOWN = "a green cone left of a purple torus"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)


@contextmanager
def page_served() -> Iterator[str]:
    """Run the server in a thread on a free port; yield its address."""
    from app import server

    with server.bind("127.0.0.1", 0) as listener:
        running = server.runner(server.create_app())
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield server.address(listener, None)
        finally:
            running.should_exit = True
            thread.join()


def draw_history(seed: int) -> None:
    """Fill the library, oldest first."""
    import gen

    for prompt in reversed(HISTORY):
        for _ in gen.run(gen.Request.build("pixart-sigma", {"prompt": prompt}, seed=seed)):
            pass


def photograph(url: str, seed: int) -> None:
    """Open the page as different people do, draw, and keep what they see."""
    from playwright.sync_api import Page, sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("There is no `chromium` on PATH: run scripts/install_chromium.sh.")

    def draw(page: Page) -> None:
        page.set_default_timeout(120_000)
        page.goto(url)
        page.locator("#history .tile img").first.wait_for()
        page.get_by_label("Prompt", exact=True).fill(SHOWN)
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_role("button", name="Generate").click()
        page.locator("img.result").wait_for(timeout=600_000)
        page.locator("#history").get_by_role("button", name=SHOWN).first.wait_for()
        page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")

    desk = {"viewport": {"width": 1280, "height": 960}}
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])
        page = browser.new_page(**desk)
        draw(page)
        keep(page.screenshot(full_page=True), "page-desktop.png")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(500)
        keep(page.screenshot(full_page=True), "page-dark.png")
        page.close()

        page = browser.new_page(**phone)
        draw(page)
        page.evaluate("document.getElementById('result').scrollIntoView({ block: 'start' })")
        page.wait_for_timeout(500)
        keep(page.screenshot(), "page-phone.png")
        browser.close()


def keep(png: bytes, name: str) -> None:
    """Write a screenshot, with a palette when all its colours make it too large for a README."""
    import io

    from PIL import Image

    path = IMAGES / name
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.save(path, "PNG", optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, "PNG", optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", file=sys.stderr)
    assert path.stat().st_size <= LARGEST_BYTES, f"{name} is too large"


def main() -> None:
    """Parse, draw, photograph."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=7, help="of all pictures (default 7)")
    seed = parser.parse_args().seed
    sys.path.insert(0, str(ROOT))
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ["GEN_HOME"] = home
        draw_history(seed)
        with page_served() as url:
            photograph(url, seed)


if __name__ == "__main__":
    main()
