"""The page as a person meets it: headless Chromium, a real server, the real engine, tiny random weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageFilter
from playwright.sync_api import Browser, Page, expect

import gen
from gen import artifacts, point_inputs
from tests.app.conftest import Server, looking, serving

LONG = {"Steps": 200, "Width": 256, "Height": 256}  # some seconds on one core


def fill(page: Page, prompt: str, **numbers: int) -> None:
    """Write into the form. Numbers by the label of their slider."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in numbers.items():
        box = page.get_by_label(f"number input for {label}")
        box.fill(str(value))
        box.press("Tab")


def generate(page: Page, prompt: str, **numbers: int) -> None:
    fill(page, prompt, **numbers)
    page.get_by_role("button", name="Generate").click()


def reload(page: Page) -> None:
    """Once all that the page asked for has been answered: it complains of streams that break."""
    page.wait_for_timeout(3000)
    page.reload()


def result(page: Page) -> dict[str, int]:
    """Wait for the picture; return its own size and the size at which it is seen."""
    expect(page.locator("img.result")).to_be_visible()
    page.wait_for_function("document.querySelector('img.result').complete")
    return page.locator("img.result").evaluate(
        "image => ({width: image.naturalWidth, height: image.naturalHeight, seen: image.clientWidth})"
    )


def steps_seen(page: Page) -> list[int]:
    return [int(found[1]) for said in progress(page) if (found := re.search(r"step (\d+)/", said["text"]))]


def progress(page: Page) -> list[dict]:
    return page.evaluate("window.progress")


def wait_for_a_step(page: Page) -> None:
    page.wait_for_function("window.progress.some(({text}) => /step [1-9]/.test(text))", polling=20)


def message(page: Page) -> str:
    box = page.locator("#message .message")
    expect(box).to_be_visible()
    return box.inner_text()


# ------------------------------------------------------------------------------------------------ drawing


def test_a_prompt_becomes_a_picture_with_progress_preview_recipe_and_download(page: Page, server: Server):
    fill(page, "a shiny red cube", Steps=60)
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Generate").click()
    seen = result(page)

    assert (seen["width"], seen["height"]) == (128, 128)
    assert seen["seen"] > 300, "small pictures are shown enlarged"
    words = [said["text"] for said in progress(page)]
    assert any(said.startswith("Loading the model") for said in words), words
    steps = steps_seen(page)
    assert len(steps) > 3 and steps == sorted(steps), steps
    assert any("left" in said for said in words), "no estimate of the time left was shown"
    assert any(said["preview"] for said in progress(page)), "no preview was shown"

    recipe = page.get_by_role("region", name="Recipe")
    expect(recipe.get_by_role("row", name="Prompt a shiny red cube")).to_be_visible()
    expect(recipe.get_by_role("row", name="Seed 7")).to_be_visible()
    expect(recipe.get_by_role("row", name="Model pixart-sigma:toy TOY")).to_be_visible()
    expect(page.locator("figcaption .badge")).to_have_text("TOY")
    recipe.get_by_text("Recipe as JSON").click()
    raw = json.loads(recipe.locator("pre").inner_text())

    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download").click()
    downloaded = Path(waiting.value.path())
    assert waiting.value.suggested_filename.endswith("-7-a-shiny-red-cube.png")
    assert artifacts.read_recipe(downloaded) == raw
    assert downloaded.read_bytes() == server.files[-1].read_bytes()


def test_the_page_draws_the_pixels_that_python_draws(
    page: Page, server: Server, weights_dir: Path, monkeypatch
):
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(weights_dir))
    generate(page, "the same from everywhere", Steps=4, Width=96)
    assert result(page)["width"] == 96
    from_page = server.files[-1]
    request = gen.Request.from_json(artifacts.read_recipe(from_page)["request"])
    (from_python,) = [event.result.path for event in gen.run(request) if event.kind == "result"]
    assert from_python != from_page
    np.testing.assert_array_equal(np.asarray(Image.open(from_page)), np.asarray(Image.open(from_python)))


def test_several_pictures_come_one_by_one_and_each_can_be_looked_at(page: Page):
    page.get_by_label("Seed", exact=True).fill("9223372036854775807")
    generate(page, "a row of pictures", Steps=5, Count=3)
    result(page)
    tiles = page.locator("#result .tile")
    expect(tiles).to_have_count(3)
    names = [tile.get_attribute("aria-label") for tile in tiles.all()]
    assert [name.rpartition(" ")[2] for name in names] == ["9223372036854775807", "0", "1"], (
        "seeds wrap around"
    )
    tiles.nth(2).click()
    expect(page.get_by_role("row", name="Seed 1", exact=True)).to_be_visible()
    expect(tiles.nth(2)).to_have_attribute("aria-current", "true")
    assert any("picture 2 of 3" in said["text"] for said in progress(page))


def test_stop_takes_effect_at_once_and_leaves_nothing_behind(page: Page, server: Server):
    before = server.files
    generate(page, "never finished", **LONG)
    wait_for_a_step(page)
    expect(page.get_by_role("button", name="Drawing")).to_be_disabled()
    clicked_at = steps_seen(page)[-1]
    page.get_by_role("button", name="Stop").click()
    assert "Stopped" in message(page)
    # The engine stops within one step; the steps between are those that went by while the click travelled.
    assert steps_seen(page)[-1] - clicked_at < 40, steps_seen(page)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert server.files == before
    expect(page.locator("#history").get_by_text("never finished")).to_have_count(0)


def test_a_closed_tab_does_not_end_the_job_and_the_next_one_picks_it_up(browser: Browser, server: Server):
    with looking(browser, server.url, interrupted=True) as page:
        generate(page, "outlives its tab", **LONG)
        wait_for_a_step(page)
    with looking(browser, server.url, interrupted=True) as page:
        wait_for_a_step(page)  # without pressing anything
        first = steps_seen(page)[0]
        page.reload()
        wait_for_a_step(page)
        assert steps_seen(page)[-1] >= first
        assert result(page)["width"] == 256
        expect(page.locator("#history").get_by_text("outlives its tab")).to_have_count(1)


@pytest.fixture(scope="session")
def others(
    tiny_toy_folder: Path,
    tiny_dit_folder: Path,
    tiny_delta_folder: Path,
    tiny_dit3d_folder: Path,
    tmp_path_factory,
) -> Iterator[Server]:
    """A server with models of classes, of pictures and of clouds, and one that takes a control image."""
    root = tmp_path_factory.mktemp("others")
    (root / "toy").mkdir()
    for folder in (tiny_toy_folder, tiny_dit_folder, tiny_delta_folder, tiny_dit3d_folder):
        (root / "toy" / folder.name).symlink_to(folder)
    with serving(tmp_path_factory.mktemp("home"), GEN_WEIGHTS_DIR=str(root)) as running:
        yield running
    talk = "".join(running.lines)
    assert talk.count("Traceback") == talk.count("exceptions.InvalidPathError"), talk


def choose(page: Page, model: str) -> None:
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=model).click()


def test_a_class_is_found_by_typing_and_drawn(browser: Browser, others: Server):
    with looking(browser, others.url) as page:
        choose(page, "dit:toy")
        box = page.get_by_label("Class", exact=True)
        box.click()
        box.press_sequentially("crims")
        expect(page.get_by_role("option")).to_have_count(1)
        page.get_by_role("option", name="red cube, crimson box").click()
        page.get_by_role("button", name="Generate").click()
        assert result(page)["width"] == 128
        expect(page.get_by_role("row", name="Class red cube")).to_be_visible()


PAINTED = """canvas => {
  const { width, height } = canvas;
  const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, width, height).data;
  let painted = 0, sum = 0;
  for (let n = 3; n < pixels.length; n += 4) {
    if (pixels[n]) painted += 1;
    sum = (sum * 31 + pixels[n - 3] + pixels[n]) % 1000003;
  }
  return [painted / width / height, sum];
}"""


def test_a_cloud_is_seen_turned_and_downloaded_and_comes_back_from_the_history(
    browser: Browser, others: Server
):
    with looking(browser, others.url, viewport={"width": 1280, "height": 900}) as page:
        choose(page, "dit-3d:toy")
        page.get_by_label("Class", exact=True).click()
        expect(page.get_by_role("option")).to_have_count(3)
        page.get_by_role("option", name="chair").click()
        form = page.locator("#form")
        for label, value in {"Points": 300, "Steps": 30}.items():
            box = form.get_by_label(f"number input for {label}")
            box.fill(str(value))
            box.press("Tab")
        page.get_by_role("button", name="Generate").click()
        canvas = page.locator("#result cloud-viewer canvas")
        expect(canvas).to_be_visible()
        page.wait_for_timeout(300)  # a frame
        assert any(said["preview"] for said in progress(page)), "no preview was shown"
        part, first = canvas.evaluate(PAINTED)
        assert 0.02 < part < 0.9, part

        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        seen = [first]

        def look() -> int:
            page.wait_for_timeout(200)
            seen.append(canvas.evaluate(PAINTED)[1])
            return seen[-1]

        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 90, y + 20, steps=4)
        page.mouse.up()
        assert look() != first, "dragging turns it"
        page.mouse.move(x - 90, y)
        assert look() == seen[-2], "only while held"
        canvas.focus()
        page.keyboard.press("ArrowLeft")
        look()
        page.keyboard.press("+")
        look()
        assert len({*seen[:2], *seen[3:]}) == 4, "keys turn it and come closer"
        canvas.dblclick()
        assert look() == first, "and back to the start"

        entry = page.get_by_role("region", name="Recipe")
        expect(entry.get_by_role("row", name="Class chair")).to_be_visible()
        expect(entry.get_by_role("row", name="Points 300")).to_be_visible()
        expect(page.locator("figcaption .badge")).to_have_text("TOY")
        links = page.locator("#result .actions a")
        names = []
        for link in links.all():
            with page.expect_download() as waiting:
                link.click()
            names.append(waiting.value.suggested_filename)
            recipe = artifacts.read_recipe(others.home / "outputs" / others.files[-1].parent.name / names[-1])
            assert recipe["request"]["inputs"]["points"] == 300
            assert Path(waiting.value.path()).stat().st_size > 1000
        endings = {name.partition("chair")[2] for name in names}
        assert {".glb", ".ply", ".obj", ".png"} <= endings

        reload(page)
        tile = page.locator("#history").get_by_role("button", name="chair").first
        page.wait_for_function("document.querySelector('#history .first-view img')?.naturalWidth > 0")
        tile.click()
        expect(canvas).to_be_visible()
        page.wait_for_timeout(300)
        assert canvas.evaluate(PAINTED)[0] > 0.02
        page.get_by_role("button", name="Use this recipe").click()
        expect(page.get_by_label("number input for Points")).to_have_value("300")


def test_known_points_are_uploaded_stay_and_come_back_from_the_history(
    browser: Browser, others: Server, tmp_path: Path
):
    points = np.random.default_rng(3).uniform(-0.4, 0.4, (50, 3)).astype(np.float32)
    np.save(tmp_path / "a leg.npy", points)
    with looking(browser, others.url) as page:
        choose(page, "dit-3d:toy")
        page.get_by_label("Class", exact=True).click()
        page.get_by_role("option", name="mug").click()
        form = page.locator("#form")
        for label, value in {"Points": 120, "Steps": 3}.items():
            box = form.get_by_label(f"number input for {label}")
            box.fill(str(value))
            box.press("Tab")
        form.get_by_role("button", name="More").click()
        field = form.locator("#dit-3d-known_points")
        field.locator("input[type=file]").set_input_files(tmp_path / "a leg.npy")
        expect(field).to_contain_text("a leg")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#result cloud-viewer canvas")).to_be_visible()
        expect(page.get_by_role("row", name=re.compile(r"Known points a leg\.npy"))).to_be_visible()
        expect(page.locator("#message")).to_contain_text("50 of 50 in a leg.npy are kept")

        reload(page)
        page.locator("#history").get_by_role("button", name="mug").first.click()
        page.get_by_role("button", name="Use this recipe").click()
        expect(form.get_by_label("number input for Points")).to_have_value("120")
        page.wait_for_timeout(1500)  # the form is made anew, open or closed
        if not field.is_visible():
            form.get_by_role("button", name="More").click()
        expect(field).to_contain_text("a leg")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#history").get_by_role("button", name="mug")).to_have_count(2)
        clouds = [path for path in others.files if path.name.endswith("-mug.ply")]
        first, second = map(point_inputs.read_points, clouds)
        assert np.array_equal(first[:50], points) and np.array_equal(first, second)


def test_a_cloud_that_cannot_be_read_leaves_its_picture(browser: Browser, others: Server):
    with looking(browser, others.url) as page:
        page.evaluate(
            """() => document.body.insertAdjacentHTML("afterbegin",
                '<cloud-viewer id="bad" src="/api/health"><img alt="fallback"></cloud-viewer>')"""
        )
        page.wait_for_function("document.querySelector('#bad').title.includes('no PLY')")
        expect(page.locator("#bad img")).to_be_attached()
        assert page.locator("#bad canvas").count() == 0


def test_a_control_image_shows_its_edges_steers_and_comes_back_from_the_history(
    browser: Browser, others: Server, tmp_path: Path
):
    photo = Image.new("RGB", (200, 150), "white")
    photo.paste("red", (60, 40, 140, 110))
    photo.save(tmp_path / "a box.png")
    (tmp_path / "no picture.png").write_text("words " * 99)
    inputs = others.home / "inputs"
    before = set(inputs.iterdir()) if inputs.exists() else set()
    with looking(browser, others.url) as page:
        choose(page, "pixart-delta:toy")
        form = page.locator("#form")
        field = form.locator("#pixart-delta-control_image")
        field.locator("input[type=file]").set_input_files(tmp_path / "a box.png")
        edges = form.get_by_alt_text("Edges found in the control image")
        expect(edges).to_be_visible()
        soft = edges.get_attribute("src")
        form.get_by_label("Control kind").click()
        page.get_by_role("option", name="canny").click()
        expect(edges).not_to_have_attribute("src", soft)
        form.locator("#pixart-delta-prompt textarea").fill("a red box")
        page.get_by_role("button", name="Generate").click()
        assert result(page)["width"] == 128
        expect(page.get_by_role("row", name=re.compile(r"Control image a box\.png"))).to_be_visible()
        expect(page.get_by_role("row", name="Steps 4")).to_be_visible()
        kept = [path for path in inputs.iterdir() if path not in before]
        assert len(kept) == 1

        reload(page)
        page.locator("#history").get_by_role("button", name="a red box").first.click()
        page.get_by_role("button", name="Use this recipe").click()
        expect(edges).to_be_visible()
        expect(form.get_by_label("Control kind")).to_have_value("canny")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#history").get_by_role("button", name="a red box")).to_have_count(2)
        first, second = (np.asarray(Image.open(path)) for path in others.files[-2:])
        np.testing.assert_array_equal(first, second)
        assert [path for path in inputs.iterdir() if path not in before] == kept

        field.get_by_role("button", name=re.compile("remove|clear", re.I)).first.click()
        expect(edges).to_be_hidden()
        field.locator("input[type=file]").set_input_files(tmp_path / "no picture.png")
        expect(form.get_by_text("is not a picture that can be read here")).to_be_visible()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#message .message")).to_contain_text("is not a picture")


def test_a_mask_is_painted_on_a_picture_and_only_there_it_is_drawn_anew(
    browser: Browser, others: Server, tmp_path: Path
):
    pixels = np.random.default_rng(2).integers(0, 256, (96, 160, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    with looking(browser, others.url, painting=True, viewport={"width": 1280, "height": 1100}) as page:
        choose(page, "pixart-sigma:toy")
        form = page.locator("#form")
        editor = form.locator("#pixart-sigma-mask")
        expect(editor).to_be_hidden()
        form.locator("#pixart-sigma-image input[type=file]").set_input_files(tmp_path / "noise.png")
        expect(form.get_by_label("number input for Width")).to_have_value("160")
        expect(form.get_by_label("number input for Height")).to_have_value("96")
        canvas = editor.locator("canvas").first
        expect(canvas).to_be_visible()
        page.wait_for_timeout(1500)  # until the picture lies on it
        form.locator("#pixart-sigma-prompt textarea").fill("painted over")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.40, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.45, middle, steps=8)
        page.mouse.up()
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Generate").click()
        assert result(page) | {"seen": 0} == {"width": 160, "height": 96, "seen": 0}
        expect(page.get_by_role("row", name=re.compile("^Mask picture"))).to_be_visible()
        recipe = artifacts.read_recipe(others.files[-1])
        mask = np.asarray(
            Image.open(others.home / "inputs" / f"{recipe['request']['inputs']['mask']['sha256']}.png")
        )
        assert mask.shape == (96, 160)
        rows, columns = np.nonzero(mask)
        assert 0.01 < (mask > 0).mean() < 0.5, "as much as was painted"
        assert abs(rows.mean() - 48) < 12 and columns.mean() < 80, "where it was painted"
        drawn = np.asarray(Image.open(others.files[-1]).convert("RGB"))
        differs = (drawn != pixels).any(axis=2)
        assert differs[mask > 0].mean() > 0.9
        reach = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(9))) > 0
        assert not differs[~reach].any(), "what was not painted on stays in every bit"

        reload(page)
        page.locator("#history").get_by_role("button", name="painted over").first.click()
        page.get_by_role("button", name="Use this recipe").click()
        expect(editor.locator("canvas").first).to_be_visible()
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#history").get_by_role("button", name="painted over")).to_have_count(2)
        again = np.asarray(Image.open(others.files[-1]).convert("RGB"))
        np.testing.assert_array_equal(drawn, again)

        form.locator("#pixart-sigma-image").get_by_role(
            "button", name=re.compile("remove|clear", re.I)
        ).first.click()
        expect(editor).to_be_hidden()


def test_a_file_of_the_server_that_was_not_uploaded_cannot_be_named(others: Server, tmp_path: Path):
    secret = tmp_path / "secret.png"
    Image.effect_noise((64, 64), 90).save(secret)
    before = sorted((others.home / "inputs").glob("*"))
    config = httpx.get(f"{others.url}config").json()
    (event,) = [one["id"] for one in config["dependencies"] if one["api_name"] == "preview_edges"]
    image = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["pixart-delta:toy", image, "soft", 128, 128], "fn_index": event, "session_hash": "s"}
    assert httpx.post(f"{others.url}gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{others.url}gradio_api/queue/data?session_hash=s", timeout=60) as answer:
        (told,) = [json.loads(line[5:]) for line in answer.iter_lines() if "process_completed" in line]
    assert not told["success"]
    assert sorted((others.home / "inputs").glob("*")) == before


# ------------------------------------------------------------------------------------------------ history


def test_the_history_survives_a_reload_is_searched_and_gives_recipes_back(page: Page):
    page.get_by_label("Negative prompt").fill("dull colours")
    generate(page, "a green cone for the record", Steps=6, Width=96, Guidance=3)
    result(page)
    seed = page.get_by_role("row", name=re.compile("^Seed")).locator("td").inner_text()

    reload(page)
    history = page.locator("#history")
    expect(history.get_by_text("a green cone for the record")).to_have_count(1)
    search = page.get_by_label("Search the history")
    search.fill("record cone")
    expect(history.locator(".tile")).to_have_count(1)
    search.fill("no such thing")
    expect(history.get_by_text("Nothing matches.")).to_be_visible()
    search.fill(seed)
    expect(history.locator(".tile")).to_have_count(1)

    history.get_by_role("button", name="a green cone for the record").click()
    assert result(page)["width"] == 96
    page.get_by_role("button", name="Use this recipe").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a green cone for the record")
    expect(page.get_by_label("Negative prompt")).to_have_value("dull colours")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(seed)
    for label, value in {"Steps": "6", "Width": "96", "Height": "128", "Guidance": "3", "Count": "1"}.items():
        expect(page.get_by_label(f"number input for {label}")).to_have_value(value)
    page.get_by_role("button", name="Random").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("prompt", "seed", "expected"),
    [
        ("", "", "Prompt is empty"),
        ("word " * 2000, "", "Prompt"),
        ("a cube", "minus one", "Seed must be a whole number"),
        ("a cube", "9223372036854775808", "out of range"),
    ],
)
def test_bad_input_is_explained_beside_the_form(
    page: Page, server: Server, prompt: str, seed: str, expected: str
):
    before = server.files
    page.get_by_label("Seed", exact=True).fill(seed)
    generate(page, prompt)
    assert expected in message(page)
    expect(page.locator("#message [role=alert]")).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    assert server.files == before


def test_words_that_look_like_code_stay_words(page: Page):
    nasty = """<img src=x onerror="document.title='owned'"> ${document.title='owned'} {{value}} </script>"""
    page.get_by_label("Seed", exact=True).fill(nasty)
    generate(page, nasty, Steps=2)
    assert "<img" in message(page)
    expect(page.get_by_role("alert").first).to_be_visible()
    page.get_by_label("Seed", exact=True).fill("")
    page.get_by_role("button", name="Generate").click()
    result(page)
    assert page.locator("figcaption").inner_text().removeprefix("TOY").strip() == nasty
    assert page.locator("img.result").get_attribute("alt") == nasty
    assert page.title() == "Gen Studio"


# ------------------------------------------------------------------------------------------------ comfort


def test_an_example_and_control_enter_suffice(page: Page):
    page.get_by_role("button", name="a green cone left of a purple torus").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a green cone left of a purple torus")
    fill(page, "a green cone left of a purple torus", Steps=3)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    result(page)


def test_other_weights_bring_their_limits_and_say_when_they_are_missing(page: Page):
    page.get_by_label("Prompt", exact=True).fill("kept while choosing")
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="pixart-sigma:1024 (not installed)").click()
    width = page.get_by_label("number input for Width")
    expect(width).to_have_value("1024")
    assert (width.get_attribute("min"), width.get_attribute("max")) == ("512", "2048")
    expect(page.locator("#form").get_by_text("are not on this machine")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("kept while choosing")
    page.get_by_role("button", name="Generate").click()
    assert "not on this machine" in message(page)


def test_the_dark_button_turns_the_page_and_is_remembered(browser: Browser, server: Server):
    with looking(browser, server.url, color_scheme="light") as page:
        button = page.get_by_role("button", name="Dark mode")
        expect(button).to_have_attribute("aria-pressed", "false")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        reload(page)
        expect(button).to_have_attribute("aria-pressed", "true")
        button.click()
        expect(button).to_have_attribute("aria-pressed", "false")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
        page.emulate_media(color_scheme="dark")
        expect(button).to_have_attribute("aria-pressed", "true")


# Returns the texts and edges that fall short of WCAG 2.2.
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_suffice_for_everybody(browser: Browser, server: Server, scheme: str):
    with looking(browser, server.url, color_scheme=scheme) as page:
        generate(page, "", Steps=3)
        message(page)
        generate(page, "a picture to look at", Steps=3)
        result(page)
        page.get_by_role("region", name="Recipe").get_by_text("Recipe as JSON").click()
        page.get_by_label("Seed", exact=True).fill("-1")
        page.get_by_role("button", name="Generate").click()
        message(page)
        page.wait_for_timeout(300)  # colours change in 120 ms
        measured = page.evaluate(CONTRAST)
        assert measured["texts"] > 40 and measured["edges"] > 8, measured
        assert not measured["poor"], "\n".join(measured["poor"])
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 60")
        assert dark == (scheme == "dark")

        spoken = page.locator("body").aria_snapshot()
        controls = re.findall(r"- (button|link|textbox|combobox|slider|spinbutton|progressbar)\b(.*)", spoken)
        assert len(controls) > 20, spoken
        nameless = [role + rest for role, rest in controls if not rest.startswith(' "')]
        assert not nameless, nameless
        assert all(image.get_attribute("alt") is not None for image in page.locator("img").all())
        assert page.evaluate("document.documentElement.lang") == "en"


def test_a_phone_shows_everything_without_sideways_scrolling(browser: Browser, server: Server):
    phone = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}
    with looking(browser, server.url, **phone) as page:
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate("innerWidth") == 375
        assert page.evaluate(fits)
        fill(page, "a-word-that-does-not-break-" * 10, Steps=3)
        button = page.get_by_role("button", name="Generate")
        assert button.bounding_box()["height"] >= 44, "a finger needs room"
        button.tap()
        seen = result(page)
        assert 200 < seen["seen"] <= 375
        expect(page.locator("img.result")).to_be_in_viewport()
        page.get_by_text("Recipe as JSON").tap()
        assert page.evaluate(fits)
        for control in page.locator("button, input, textarea, img").all():
            box = control.bounding_box()
            assert box is None or box["x"] + box["width"] <= 376, control.evaluate("one => one.outerHTML")
