"""`gen grid`: every cell an ordinary result, none drawn twice, and two sheets that can be read."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from gen import artifacts, cli, cli_grid, engine, grid, library
from gen.errors import GenError
from gen.request import Request

pytestmark = pytest.mark.usefixtures("installed")
SMALL = ("--size", "64", "--seed", "3")


@pytest.fixture
def gen(capfd):
    """gen("grid", ...) -> (exit code, stdout, stderr)."""

    def gen(*arguments: object) -> tuple[int, str, str]:
        code = cli.execute([*map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return gen


@pytest.fixture
def drawn(monkeypatch) -> list[Request]:
    """The requests that the engine was given; it still draws them."""
    seen: list[Request] = []
    plain = engine.run

    def run(request, settings=None):
        seen.append(request)
        return plain(request, settings)

    monkeypatch.setattr(engine, "run", run)
    return seen


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


class Table(HTMLParser):
    """What a page's table holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scopes: list[str | None] = []
        self.alts: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "th":
            self.scopes.append(found.get("scope"))
        if tag == "img":
            self.alts.append(found["alt"])
            self.links.append(found["src"])
        if tag == "a":
            self.links.append(found["href"])


def test_a_grid_is_results_a_picture_and_a_page(gen, tmp_path, drawn):
    out = tmp_path / "grid"
    axes = ("--x", "steps=1,2", "--y", "guidance=1,3,5")
    code, stdout, err = gen("grid", "pixart-sigma", "a red cube", *axes, *SMALL, "-o", out)
    assert code == 0, err
    assert stdout == f"{out / 'grid.png'}\n"
    assert "steps = 2, guidance = 5" in err
    made = [(one.inputs["steps"], one.inputs["guidance"]) for one in drawn]
    assert made == [(1, 1), (2, 1), (1, 3), (2, 3), (1, 5), (2, 5)]
    assert {one.seed for one in drawn} == {3}
    files = sorted((out / "cells").glob("*.png"))
    assert len(files) == 6 == len(library.search())
    recipe = artifacts.read_recipe(files[0])
    assert recipe["request"]["inputs"]["prompt"] == "a red cube"
    sheet = Image.open(out / "grid.png")
    assert sheet.width > 2 * grid.SMALLEST[0] and sheet.height > 3 * grid.SMALLEST[1]
    page = Table(out / "grid.html")
    assert page.scopes == ["col"] * 2 + ["row"] * 3
    assert page.alts[-1] == "a red cube: steps = 2, guidance = 5, seed 3"
    assert all((out / link).is_file() for link in page.links) and len(page.links) == 12
    text = (out / "grid.html").read_text()
    assert "TOY weights" in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://", text), "nothing is loaded from elsewhere"
    # A cell is what `gen run` draws with these options.
    alone = gen("run", "pixart-sigma", "a red cube", "--steps", "2", "--guidance", "3", *SMALL)[1].strip()
    assert pixels(alone) == pixels(next(c["picture"] for c in results(out) if (c["x"], c["y"]) == ("2", "3")))


def results(folder: Path) -> list[dict]:
    """Cells as grid.json has them, with the values of their axes."""
    state = json.loads((folder / "grid.json").read_text())
    x, y = state["plan"]["x"][1], (state["plan"]["y"] or ["", [""]])[1]
    found = []
    for key, entry in state["cells"].items():
        column, row = map(int, key.split(","))
        picture = {"picture": folder / entry["picture"]} if "picture" in entry else {}
        found.append({**entry, **picture, "x": x[column], "y": y[row]})
    return found


def test_the_pictures_of_the_sheet_are_those_of_the_cells(gen, tmp_path):
    code, _, err = gen("grid", "pixart-sigma", "a red cube", "--x", "steps=1,2", *SMALL, "-o", tmp_path / "g")
    assert code == 0, err
    sheet = Image.open(tmp_path / "g" / "grid.png").convert("RGB")
    content = sheet.tobytes()
    for cell in results(tmp_path / "g"):
        with Image.open(cell["picture"]) as image:
            first = image.convert("RGB").tobytes()[: 3 * image.width]
            places = [found.start() for found in re.finditer(re.escape(first), content)]
            [(left, top)] = {(at // 3 % sheet.width, at // 3 // sheet.width) for at in places}
            box = (left, top, left + image.width, top + image.height)
            assert sheet.crop(box).tobytes() == image.convert("RGB").tobytes()


def test_a_second_call_draws_only_what_is_missing_and_with_the_same_seed(gen, tmp_path, drawn):
    command = (
        "grid",
        "pixart-sigma",
        "a red cube",
        "--x",
        "steps=1,2,3",
        "--size",
        "64",
        "-o",
        tmp_path / "g",
    )
    assert gen(*command)[0] == 0
    first = {cell["x"]: cell for cell in results(tmp_path / "g")}
    first["2"]["picture"].unlink()
    code, stdout, err = gen(*command, "--json")
    assert code == 0 and "2 of 3 cells are there already" in err
    assert len(drawn) == 4 and drawn[-1].inputs["steps"] == 2
    assert len({one.seed for one in drawn}) == 1, "drawn once for all cells, and kept"
    data = json.loads(stdout)["data"]
    assert (data["drawn"], data["kept"], data["axes"]) == (1, 2, {"x": "steps", "y": None})
    assert [Path(cell["picture"]).is_file() for cell in data["cells"]] == [True] * 3


def test_another_command_in_the_same_folder_is_refused(gen, tmp_path, drawn):
    command = ("grid", "pixart-sigma", "a red cube", "--x", "steps=1", "-o", tmp_path / "g", *SMALL)
    assert gen(*command)[0] == 0
    before = (tmp_path / "g" / "grid.json").read_bytes()
    for other in (("--guidance", "2"), ("--exact", "plain"), ("--y", "scheduler=ddim")):
        code, _, err = gen(*command, *other)
        assert code == 2 and "holds another grid" in err, other
    assert len(drawn) == 1
    assert (tmp_path / "g" / "grid.json").read_bytes() == before
    (tmp_path / "g" / "grid.json").write_text("{")
    assert gen(*command)[0] == 2


def test_stopping_keeps_what_is_there(gen, tmp_path, monkeypatch):
    command = ("grid", "pixart-sigma", "a red cube", "--x", "steps=1,2,3", "-o", tmp_path / "g", *SMALL)
    plain, calls = engine.run, []

    def stopped(request, settings=None):
        calls.append(request)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(request, settings)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", stopped)
        code, stdout, _ = gen(*command, "--json")
    assert code == 130
    assert len(json.loads(stdout)["data"]["results"]) == 1
    assert len(results(tmp_path / "g")) == 1
    assert "not drawn yet" in (tmp_path / "g" / "grid.html").read_text()
    assert Image.open(tmp_path / "g" / "grid.png").width > 3 * grid.SMALLEST[0]
    assert gen(*command)[0] == 0
    assert len(library.search()) == 3


def test_a_cell_that_fails_is_marked_and_the_others_are_drawn(gen, tmp_path, monkeypatch):
    command = ("grid", "pixart-sigma", "a red cube", "--x", "steps=1,2,3", "-o", tmp_path / "g", *SMALL)
    plain = engine.run

    def fails(request, settings=None):
        if request.inputs["steps"] == 2:
            raise GenError("A picture of 64x64 did not fit <here>.", "Try smaller.", "out_of_memory")
        return plain(request, settings)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", fails)
        code, stdout, err = gen(*command)
    assert code == 1 and stdout == f"{tmp_path / 'g' / 'grid.png'}\n"
    assert "1 of 3 cells failed" in err and "did not fit <here>" in err
    assert [cell["x"] for cell in results(tmp_path / "g") if "picture" in cell] == ["1", "3"]
    assert "did not fit &lt;here&gt;. Try smaller." in (tmp_path / "g" / "grid.html").read_text()
    paper = tuple(int(grid.ALARM_PAPER[at : at + 2], 16) for at in (1, 3, 5))
    assert paper in {colour for _, colour in Image.open(tmp_path / "g" / "grid.png").getcolors(1 << 24)}
    assert gen(*command)[0] == 0, "the same command tries it again"
    assert "Failed" not in (tmp_path / "g" / "grid.html").read_text()


def test_what_would_fail_everywhere_ends_it(gen, tmp_path, monkeypatch):
    def full(request, settings=None):
        raise GenError("No space left.", "", "disk_full")

    monkeypatch.setattr(engine, "run", full)
    assert gen("grid", "pixart-sigma", "a red cube", "--x", "steps=1,2", "-o", tmp_path / "g")[0] == 6


def test_prompts_sizes_seeds_and_settings_are_axes_too(gen, tmp_path, drawn):
    prompts = "prompt=a red cube, matte|<b>&amp; a ball"
    code, _, err = gen(
        *("grid", "pixart-sigma", "--x", prompts, "--y", "exact=lean,plain", *SMALL),
        *("--steps", "1", "-o", tmp_path / "a"),
    )
    assert code == 0, err
    assert [one.subject for one in drawn] == ["a red cube, matte", "<b>&amp; a ball"] * 2
    page = (tmp_path / "a" / "grid.html").read_text()
    assert "&lt;b&gt;&amp;amp; a ball" in page and "<b>" not in page
    assert Table(tmp_path / "a" / "grid.html").alts[1].startswith("<b>&amp; a ball: prompt = <b>")
    settings = [
        cell["settings"]
        for cell in json.loads((tmp_path / "a" / "grid.json").read_text())["plan"]["cells"].values()
    ]
    assert sorted({one["exact"] for one in settings}) == ["lean", "plain"]
    code, _, err = gen(
        *("grid", "pixart-sigma:toy", "a red cube", "--x", "size=64,64x128", "--y", "seed=1,2"),
        *("--steps", "1", "-o", tmp_path / "b"),
    )
    assert code == 0, err
    made = {(one.seed, one.inputs["width"], one.inputs["height"]) for one in drawn[4:]}
    assert made == {(1, 64, 64), (1, 64, 128), (2, 64, 64), (2, 64, 128)}


def test_clouds_show_their_picture_and_link_to_their_own_file(gen, tmp_path, installed_dit3d):
    axes = ("--x", "class_label=chair,mug", "--points", "16", "--steps", "1", "--files", "points")
    code, _, err = gen("grid", "dit-3d", *axes, "-o", tmp_path / "g")
    assert code == 0, err
    page = Table(tmp_path / "g" / "grid.html")
    assert [Path(link).suffix for link in page.links] == [".glb", ".png"] * 2
    assert all((tmp_path / "g" / link).is_file() for link in page.links)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--x", "steps"), 2, "has no values"),
        (("--x", "stepz=1,2"), 2, "There is no axis 'stepz'"),
        (("--x", "class_label=1,2"), 2, "takes no option 'class_label'"),
        (("--x", "steps=1,,2"), 2, "is empty"),
        (("--x", "steps=1,1"), 2, "stands twice"),
        (("--x", "steps=1,0"), 2, "The cell steps = 0 cannot be: Steps 0 is too small"),
        (("--x", "steps=1", "--y", "guidance=1,99"), 2, "The cell steps = 1, guidance = 99 cannot be"),
        (("--x", "steps=1", "--y", "steps=2"), 2, "Both axes are steps"),
        (("--x", "size=64", "--y", "width=64"), 2, "width and height at once"),
        (("--x", "steps=1,2", "--steps", "3"), 2, "steps is an axis, and given besides"),
        (("--x", "prompt=a|b"), 2, "prompt is an axis, and given besides"),
        (("--x", "quantize=none,int9"), 2, "Quantize cannot be 'int9'"),
        (("--x", "steps=1", "--seed", "1", "--seed", "2"), 2, "several prompts or seeds"),
        (("--x", "steps=1", "--count", "2"), 2, "--count"),
        (("--x", "saver=|nonsense=1"), 2, "The cell saver = nonsense=1 cannot be"),
        (("--x", "weights=toy,nine"), 2, "no weights 'nine'"),
        (("--x", "weights=toy,512"), 3, "not on this machine"),
    ],
)
def test_every_cell_is_checked_before_the_first_is_drawn(gen, tmp_path, drawn, arguments, code, words):
    found, stdout, err = gen("grid", "pixart-sigma", "a red cube", *arguments, "-o", tmp_path / "g")
    assert found == code
    assert words in err
    assert (stdout, drawn, (tmp_path / "g").exists()) == ("", [], False)


def test_a_folder_must_be_named_and_large_grids_are_refused(gen, tmp_path, monkeypatch):
    assert "needs a folder" in gen("grid", "pixart-sigma", "x", "--x", "steps=1")[2]
    monkeypatch.setattr(grid, "MOST_CELLS", 3)
    code, _, err = gen("grid", "pixart-sigma", "x", "--x", "steps=1,2,3,4", "-o", tmp_path / "g")
    assert code == 2 and "too large" in err


def test_two_at_once_in_a_folder_are_refused(gen, tmp_path):
    import fcntl

    command = ("grid", "pixart-sigma", "a red cube", "--x", "steps=1", "-o", tmp_path / "g", *SMALL)
    (tmp_path / "g").mkdir()
    with (tmp_path / "g" / ".grid.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = gen(*command)
    assert code == 1 and "Another gen grid is at work" in err
    assert not os.path.exists(tmp_path / "g" / "grid.json")


def test_words_are_wrapped_into_their_room():
    font = ImageFont.load_default(size=16)
    text = "a red cube on a blue ground " * 3 + "w" * 60
    lines = grid._wrapped(text, font, 150, most=20)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = grid._wrapped(text, font, 150, most=2)
    assert len(cut) == 2 and cut[-1].endswith("...") and font.getlength(cut[-1]) <= 150


def test_flags_of_run_are_flags_of_grid_but_for_those_of_one_result():
    names = {one.name for one in cli_grid.command.params}
    assert {"steps", "guidance", "device", "saver", "json", "quiet", "x", "y", "output"} <= names
    assert not names & {"prompts", "repeat", "count", "dry_run", "stream"}
