"""The command line from outside. Most tests call it in this process and share its loaded weights; a few, for
signals, pipes and what is imported, start a process of their own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gen import cli, engine, library, loader
from gen.request import Request

pytestmark = pytest.mark.usefixtures("installed")
SMALL = ["--steps", "2", "--size", "64"]
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def gen(capfd):
    """gen("run", ...) -> (exit code, stdout, stderr)."""

    def gen(*arguments: str) -> tuple[int, str, str]:
        code = cli.execute([*map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return gen


def process(*arguments: str, **options) -> subprocess.Popen:
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "gen.cli", *arguments], **options)


def type_in(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def leftovers() -> list[Path]:
    """Files in the home that are no library."""
    return [p for p in library.home().rglob("*") if p.is_file() and not p.name.startswith("library.sqlite3")]


# Drawing


def test_a_run_prints_one_absolute_path_and_talks_on_stderr(gen):
    code, out, err = gen("run", "pixart-sigma", "a red cube", *SMALL, "--seed", "3")
    assert code == 0
    [path] = map(Path, out.splitlines())
    assert path.is_absolute()
    with Image.open(path) as image:
        assert image.size == (64, 64)
    assert "pixart-sigma:toy (TOY weights" in err
    assert "seed 3" in err
    assert "\r" not in err  # no bar: this is no terminal


def test_command_line_python_and_file_agree_on_the_pixels(gen, tmp_path):
    code, out, _ = gen(
        "run", "pixart-sigma:toy", "--prompt", "a red cube", *SMALL, "--seed", "3", "-o", tmp_path / "a.png"
    )
    assert (code, out) == (0, f"{tmp_path / 'a.png'}\n")
    values = {"prompt": "a red cube", "steps": 2, "width": 64, "height": 64, "seed": 3}
    direct = [*engine.run(Request.build("pixart-sigma", values))][-1].results[0].path
    code, out, err = gen("run", "--repeat", tmp_path / "a.png")
    assert code == 0
    assert "warning" not in err
    assert pixels(out.strip()) == pixels(direct) == pixels(tmp_path / "a.png")


def test_repeating_with_another_flag_changes_just_that(gen):
    _, first, _ = gen("run", "pixart-sigma", "a red cube", *SMALL, "--seed", "3", "--guidance", "2")
    code, again, _ = gen("run", "--repeat", first.strip(), "--seed", "4", "--json")
    assert code == 0
    request = json.loads(again)["data"]["results"][0]["recipe"]["request"]
    assert request["seed"] == 4
    assert request["inputs"] == library.search("3")[0].request["inputs"]


def test_repeating_warns_when_weights_or_versions_differ(gen, monkeypatch, tiny_toy_folder, tmp_path):
    _, first, _ = gen("run", "pixart-sigma", "a red cube", *SMALL)
    other = tmp_path / "other" / "toy" / "pixart-sigma"
    shutil.copytree(tiny_toy_folder, other)
    content = bytearray((other / NETWORK).read_bytes())
    content[-1] ^= 1
    (other / NETWORK).write_bytes(content)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "other"))
    versions = engine.versions()
    monkeypatch.setattr(engine, "versions", lambda: versions | {"torch": "99.0"})
    code, _, err = gen("run", "--repeat", first.strip())
    assert code == 0
    assert "the weights are not those of then" in err
    assert "now 99.0" in err


def test_several_prompts_and_seeds_give_a_picture_for_each_pair(gen):
    arguments = [
        "--prompt",
        "a red cube",
        "--prompt",
        "a blue ball",
        "--seed",
        "1",
        "--seed",
        "2",
        "--count",
        "2",
    ]
    code, out, err = gen("run", "pixart-sigma", *SMALL, *arguments)
    assert code == 0
    names = [Path(line).name.split("-", 2)[2] for line in out.splitlines()]
    assert (
        names
        == [
            *("1-a-red-cube.png", "2-a-red-cube.png", "2-a-red-cube-2.png", "3-a-red-cube.png"),
            *("1-a-blue-ball.png", "2-a-blue-ball.png", "2-a-blue-ball-2.png", "3-a-blue-ball.png"),
        ]
        or len(names) == 8
    )  # a second may pass between two pictures of one name
    assert [row.seed for row in reversed(library.search())] == [1, 2, 2, 3, 1, 2, 2, 3]
    assert "request 4/4" in err


def test_prompts_come_from_files_and_stdin(gen, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red cube\r\n\r\n  a blue ball \n".encode())
    once = ["run", "pixart-sigma", *SMALL, "--steps", "1"]
    assert gen(*once, "--prompts", file)[0] == 0
    type_in(monkeypatch, b"a green cone\na white ring\n")
    assert gen(*once, "--prompts", "-")[0] == 0
    type_in(monkeypatch, b"one prompt\nof two lines\n")
    assert gen(*once, "-")[0] == 0
    prompts = [row.prompt for row in reversed(library.search())]
    assert prompts == [
        "a red cube",
        "a blue ball",
        "a green cone",
        "a white ring",
        "one prompt\nof two lines",
    ]


def test_a_prompt_without_quotes_is_put_together(gen):
    assert planned(gen, "red", "cube")["prompt"] == "x red cube"


def test_json_is_one_envelope(gen):
    code, out, _ = gen("run", "pixart-sigma", "a red cube", *SMALL, "--json", "--count", "2", "--seed", "5")
    assert code == 0
    envelope = json.loads(out)
    assert envelope["ok"] is True
    assert [result["seed"] for result in envelope["data"]["results"]] == [5, 6]
    assert all(Path(result["path"]).is_file() for result in envelope["data"]["results"])


def test_stream_is_an_event_a_line_and_the_envelope_last(gen):
    code, out, _ = gen("run", "pixart-sigma", "a red cube", *SMALL, "--stream")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line.get("event") for line in lines] == [
        *("stage", "stage", "stage", "step", "step", "stage", "stage", "result", "done"),
        None,
    ]
    assert lines[-1]["ok"] is True
    assert lines[-1]["data"]["results"] == lines[-2]["results"]


def test_quiet_prints_ids_and_nothing_else(gen):
    code, out, err = gen("run", "pixart-sigma", "a red cube", *SMALL, "-q")
    assert (code, err) == (0, "")
    assert library.get(out.strip()).prompt == "a red cube"


def test_a_dry_run_shows_everything_and_makes_nothing(gen):
    code, out, _ = gen("run", "pixart-sigma", "a red cube", "--seed", "3", "--dry-run")
    assert code == 0
    assert not library.home().exists()
    facts = dict(line.split(None, 1) for line in out.splitlines() if " " in line.strip())
    assert facts["model"] == "pixart-sigma:toy (TOY weights)"
    assert (facts["width"], facts["seed"], facts["steps"]) == ("128", "3", "20")
    assert "M numbers" in facts["memory"]
    assert facts["time"] == "not known before the first picture"


def test_a_dry_run_knows_time_and_memory_from_history(gen):
    gen("run", "pixart-sigma", "a red cube", *SMALL)
    _, out, _ = gen("run", "pixart-sigma", "another", *SMALL, "--dry-run", "--json", "--count", "3")
    [plan] = json.loads(out)["data"]["plans"]
    past = library.search()[0]
    loading = past.recipe["seconds"]["loading"]
    assert plan["seconds"] == pytest.approx(loading + 3 * (past.seconds - loading), abs=0.02)
    assert plan["peak_bytes"] == past.peak_bytes
    assert plan["parameters"] * 4 == plan["weights_bytes"]


# Where values come from


def planned(gen, *arguments: str) -> dict:
    code, out, err = gen("run", "pixart-sigma", "x", *arguments, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)["data"]["plans"][0]["request"]["inputs"]


def test_flags_beat_the_environment_which_beats_the_near_and_the_far_file(gen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config" / "gen-studio"
    config.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert planned(gen)["steps"] == 20
    (config / "gen.toml").write_text("[run]\nsteps = 4\nguidance = 2.5\n")
    assert planned(gen)["steps"] == 4
    (tmp_path / "gen.toml").write_text("[run]\nsteps = 5\n")
    assert (planned(gen)["steps"], planned(gen)["guidance"]) == (5, 2.5)
    monkeypatch.setenv("GEN_STEPS", "6")
    assert planned(gen)["steps"] == 6
    assert planned(gen, "--steps", "7")["steps"] == 7


def test_the_nearest_word_on_the_size_wins(gen, monkeypatch):
    monkeypatch.setenv("GEN_WIDTH", "96")
    sizes = [planned(gen), planned(gen, "--size", "64x80"), planned(gen, "--height", "160")]
    assert [(one["width"], one["height"]) for one in sizes] == [(96, 128), (64, 80), (96, 160)]
    monkeypatch.setenv("GEN_SIZE", "64")
    code, _, err = gen("run", "pixart-sigma", "x", "--dry-run")
    assert code == 2
    assert "contradict" in err


def test_preferences_do_not_change_a_repeated_picture(gen, monkeypatch):
    _, first, _ = gen("run", "pixart-sigma", "a red cube", *SMALL)
    monkeypatch.setenv("GEN_STEPS", "9")
    _, out, _ = gen("run", "--repeat", first.strip(), "--dry-run", "--json")
    assert json.loads(out)["data"]["plans"][0]["request"]["inputs"]["steps"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nstepps = 3\n", "Did you mean steps"),
        ("[runn]\nsteps = 3\n", "Did you mean run?"),
        ("steps = 3\n", "is not a table"),
        ("[run]\nprompt = 'x'\n", "knows no 'prompt'"),
        ("[run\n", "cannot be read"),
        ("[run]\nsteps = 'many'\n", "whole number"),
    ],
)
def test_a_mistake_in_gen_toml_is_not_idle(gen, tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen.toml").write_text(text)
    code, _, err = gen("run", "pixart-sigma", "x", "--dry-run")
    assert code == 2
    assert words in err


# Bad input


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, "No model is named"),
        (["run", "pixart-sigma"], 2, "no prompt"),
        (["run", "pixart", "x"], 2, "Did you mean pixart-sigma, pixart-delta?"),
        (["run", "pixart-sigma:tyo", "x"], 2, "Did you mean toy?"),
        (["run", "pixart-sigma:1024", "x"], 3, "not on this machine"),
        (["run", "pixart-sigma", "x", "--weights", "1024"], 3, "not on this machine"),
        (["run", "pixart-sigma:toy", "x", "--weights", "1024"], 2, "contradict"),
        (["run", "pixart-sigma", ""], 2, "empty"),
        (["run", "pixart-sigma", "x" * 10_000], 2, "10,000 characters"),
        (["run", "pixart-sigma", "x", "--prompt", "y"], 2, "at once"),
        (["run", "pixart-sigma", "--prompts", "/nowhere"], 2, "Cannot read /nowhere"),
        (["run", "pixart-sigma", "--prompts", "/dev/null"], 2, "No line"),
        (["run", "pixart-sigma", "--prompts", "/dev/zero"], 2, "longer than 16 MiB"),
        (["run", "pixart-sigma", "x", "--size", "0"], 2, "too small"),
        (["run", "pixart-sigma", "x", "--size", "-64"], 2, "too small"),
        (["run", "pixart-sigma", "x", "--size", "100"], 2, "Try 96 or 112."),
        (["run", "pixart-sigma", "x", "--size", "64x"], 2, "lacks"),
        (["run", "pixart-sigma", "x", "--size", "1000000x64"], 2, "too large"),
        (["run", "pixart-sigma", "x", "--size", "64", "--width", "64"], 2, "contradict"),
        (["run", "pixart-sigma", "x", "--steps", "0"], 2, "too small"),
        (["run", "pixart-sigma", "x", "--steps", "1000000"], 2, "too large"),
        (["run", "pixart-sigma", "x", "--guidance", "nan"], 2, "finite"),
        (["run", "pixart-sigma", "x", "--guidance", "inf"], 2, "finite"),
        (["run", "pixart-sigma", "x", "--seed", "-1"], 2, "out of range"),
        (["run", "pixart-sigma", "x", "--seed", "9223372036854775808"], 2, "out of range"),
        (["run", "pixart-sigma", "x", "--seed", "1", "--seed", "one"], 2, "whole number"),
        (["run", "pixart-sigma", "x", "--count", "0"], 2, "too small"),
        (["run", "pixart-sigma", "x", "--device", "tpu"], 2, "tpu"),
        (["run", "pixart-sigma", "x", "--repeat", "/etc/hostname"], 2, "cannot be read as a PNG"),
        (["run", "pixart-sigma", "x", "--frobnicate"], 2, "--frobnicate"),
        (["run", "pixart-sigma", "x", "--count", "2", "-o", "two.png"], 2, "cannot all be two.png"),
        (
            ["run", "pixart-sigma", "x", "--seed", "1", "--seed", "2", "-o", "two.png"],
            2,
            "cannot all be two.png",
        ),
        (["run", "pixart-sigma", "x", "-o", "/dev/null/below"], 1, "Cannot write to /dev/null/below"),
        (["run", "pixart-sigma", "x", "-o", "picture.jpg"], 2, "Say picture.png"),
        (["run", "pixart-sigma", "x", "-o", "bytes\udcff"], 2, "is not text"),
        (["runn"], 2, "Did you mean run?"),
        (["pixart-sigma", "a red cube"], 2, "gen run pixart-sigma PROMPT"),
        (["show", "nothing"], 2, "The models are"),
        (["history", "--limit", "0"], 2, "limit"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_bad_input_is_answered_in_two_lines_with_the_right_exit_code(gen, arguments, code, words):
    found, out, err = gen(*arguments)
    assert found == code
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 2  # what and why; what now
    assert leftovers() == []


def test_the_last_of_many_prompts_is_checked_before_the_first_is_drawn(gen, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cube\n" + "x" * 5000 + "\n")
    code, out, _ = gen("run", "pixart-sigma", "--prompts", tmp_path / "prompts.txt", *SMALL)
    assert (code, out) == (2, "")
    assert library.search() == []


def test_an_option_that_only_other_models_take_names_them(gen, monkeypatch):
    from dataclasses import replace

    from gen import catalog

    row = catalog.MODELS["pixart-sigma"]
    plain = replace(row, name="plain", inputs=(catalog.PROMPT, catalog.SEED, catalog.COUNT))
    monkeypatch.setitem(catalog.MODELS, "plain", plain)
    for flag in (["--guidance", "3"], ["--size", "64"]):
        code, _, err = gen("run", "plain", "x", *flag)
        assert code == 2
        assert "plain takes no option" in err
    assert (
        "Models that take it: pixart-sigma, pixart-delta, dit, dit-3d."
        in gen("run", "plain", "x", "--guidance", "3")[2]
    )


def test_an_error_in_json_mode_is_an_envelope_too(gen):
    code, out, err = gen("run", "pixart-sigma", "x", "--steps", "0", "--json")
    assert code == 2
    assert json.loads(out) == {
        "ok": False,
        "error": {
            "code": "bad_input",
            "message": "Steps 0 is too small; the smallest is 1.",
            "hint": "Give a whole number, 1 to 200.",
        },
    }
    assert "Steps 0" in err


def test_pictures_finished_before_an_error_are_named_in_its_envelope(gen, tmp_path):
    taken = tmp_path / "out"
    code, out, _ = gen("run", "pixart-sigma", "x", *SMALL, "--json", "-o", taken, "--seed", "1")
    assert code == 0

    real, drawn = engine.run, []

    def second_fails(request, settings):
        drawn.append(request)
        if len(drawn) == 2:
            shutil.rmtree(taken)
            taken.write_text("in the way")
        return real(request, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run", second_fails)
        code, out, _ = gen(
            "run", "pixart-sigma", "x", *SMALL, "--json", "-o", taken, "--seed", "2", "--seed", "3"
        )
    envelope = json.loads(out)
    assert (code, envelope["error"]["code"]) == (1, "output_not_writable")
    assert [result["seed"] for result in envelope["data"]["results"]] == [2]


def test_corrupt_weights_end_with_their_own_exit_code(gen, tiny_toy_folder, tmp_path, monkeypatch):
    folder = tmp_path / "w" / "toy" / "pixart-sigma"
    shutil.copytree(tiny_toy_folder, folder)
    (folder / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:-7])
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "w"))
    code, out, err = gen("run", "pixart-sigma", "x", *SMALL)
    assert (code, out) == (4, "")
    assert "diffusion_pytorch_model.safetensors" in err
    assert leftovers() == []
    assert gen("run", "pixart-sigma", "x", "--dry-run")[0] == 4
    loader.forget()


def test_a_bug_is_told_in_a_line_and_kept_in_a_log(gen, monkeypatch):
    def broken(*_: object):
        raise ZeroDivisionError("a bug of this test")

    monkeypatch.setattr(engine, "run", broken)
    code, out, err = gen("run", "pixart-sigma", "x")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    [log] = (library.home() / "logs").iterdir()
    assert str(log) in err
    assert "ZeroDivisionError: a bug of this test" in log.read_text()


# Looking


def test_list_marks_what_is_installed(gen):
    code, out, _ = gen("list")
    assert code == 0
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert lines["pixart-sigma:toy"] == "yes"
    assert lines["pixart-sigma:1024"] == "-"
    installed = [name for name, mark in lines.items() if mark == "yes"]
    assert gen("list", "-q")[1].split() == installed
    data = json.loads(gen("list", "--json")[1])["data"]
    assert [row["name"] for row in data["weights"] if row["installed"]] == installed
    assert data["models"][0]["makes"] == "image"


def test_show_tells_the_options_for_the_weights(gen):
    _, out, _ = gen("show", "pixart-sigma")
    assert "Options with pixart-sigma:toy" in out
    assert "64 to 256 in steps of 16" in out
    assert "512 to 2048 in steps of 8" in gen("show", "pixart-sigma:1024")[1]
    data = json.loads(gen("show", "pixart-sigma:toy", "--json")[1])["data"]
    assert [one["name"] for one in data["inputs"]][:2] == ["prompt", "negative_prompt"]


def test_history_finds_what_was_drawn(gen, draw):
    code, out, err = gen("history")
    assert (code, out) == (0, "")
    assert "Nothing was drawn yet" in err
    red, blue = draw("a red cube\non two lines")[0], draw("a blue ball", seed=77)[0]
    assert [line.split()[0] for line in gen("history")[1].splitlines()] == ["ID", blue.id, red.id]
    assert gen("history", "cube", "-q")[1] == f"{red.id}\n"
    assert gen("history", "77", "-q")[1] == f"{blue.id}\n"
    data = json.loads(gen("history", "--limit", "1", "--json")[1])["data"]
    assert data["results"][0]["recipe"]["request"]["inputs"]["prompt"] == "a blue ball"
    assert gen("history", "--model", "nothing")[0] == 2


def test_the_version_is_that_of_the_package(gen):
    import gen as package

    code, out, _ = gen("--version")
    assert (code, out) == (0, f"gen {package.__version__}\n")


# Processes of their own


def test_help_and_list_start_quickly_and_import_nothing_heavy():
    run = "run pixart-sigma x --"
    lines = ["--help", "run --help", "list", "show pixart-sigma", "history", f"{run}steps 0"]
    heavy = {"torch", "numpy", "diffusers", "transformers", "huggingface_hub", "rich", "PIL", "gradio"}
    program = (
        "import sys; from gen import cli\n"
        f"codes = [cli.execute(line.split()) for line in {lines}]\n"
        f"print(codes, sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0, 2] []"


def test_help_reads_few_modules():
    """What its time goes into; seconds themselves would judge the machine and what else runs on it."""
    program = (
        "import sys; before = set(sys.modules); from gen import cli\n"
        "cli.execute(['--help']); print(len(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stderr) < 170


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_stopping_ends_with_130_and_leaves_nothing(number):
    arguments = ["run", "pixart-sigma", "x", "--steps", "200", "--size", "256", "--stream"]
    with process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if '"step"' in line:
                child.send_signal(number)
                break
        rest, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "error: Stopped before the end; nothing half-written was kept." in err
    assert "Traceback" not in err
    assert json.loads(rest.splitlines()[-1])["error"]["code"] == "cancelled"
    assert leftovers() == []
    assert library.search() == []


def test_a_reader_that_leaves_is_no_drama():
    reading, writing = os.pipe()
    os.close(reading)
    with process("list", stdout=writing, stderr=subprocess.PIPE, text=True) as child:
        os.close(writing)
        assert child.communicate(timeout=60)[1] == ""
    assert child.returncode == 1


def test_a_full_disk_under_stdout_is_told():
    with (
        open("/dev/full", "w") as full,
        process("list", stdout=full, stderr=subprocess.PIPE, text=True) as child,
    ):
        err = child.communicate(timeout=60)[1]
    assert child.returncode == 6
    assert err.startswith("error: Cannot write to stdout")
    assert "Traceback" not in err


def test_a_disk_that_fills_up_while_saving_ends_with_6_and_leaves_nothing(gen):
    import resource

    large = ["--steps", "1", "--size", "256"]
    _, out, _ = gen("run", "pixart-sigma", "x", *large)
    kept = leftovers()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the library's few pages, and for half of a picture.
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(out.strip()).stat().st_size // 2, before[1]))
    try:
        code = cli.execute(["run", "pixart-sigma", "y", *large])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 6
    assert leftovers() == kept
    assert len(library.search()) == 1


def test_a_training_that_is_stopped_from_within_ends_as_cancelled(monkeypatch, capsys):
    """Loops take the signal into their own hands, and click makes an Abort of what they raise."""
    from gen import train

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stopped)
    assert cli.execute(["train", "judge:toy"]) == 130
    assert "bug" not in capsys.readouterr().err
