"""The findings: all there, true of this machine, and a cure beside every problem."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gen import cli, doctor, gemm, loader
from gen.catalog import MODELS
from gen.request import Settings

KEYS = {
    "versions": dict,
    "machine": dict,
    "choice": list,
    "products": list,
    "attention": list,
    "packages": list,
    "weights": list,
    "disk": dict,
    "video": dict,
    "problems": list,
}
ROWS = {
    "choice": {"device", "auto", "dtype", "dtype_small", "why"},
    "products": {"device", "dtype", "way", "tflops", "error"},
    "attention": {"device", "name", "summary", "limits", "missing"},
    "packages": {"name", "version", "gives", "get"},
    "weights": {"name", "installed", "damaged", "whole", "parameters", "dtype", "bytes", "fits", "plan"},
}


@pytest.fixture
def gen(capfd):
    def gen(*arguments: str) -> tuple[int, str, str]:
        code = cli.execute([*map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return gen


@pytest.fixture
def quick_products(monkeypatch):
    """Products small enough for a test."""
    monkeypatch.setitem(gemm.SHAPES, "cpu", ((16, 64, 128),))


@pytest.mark.usefixtures("installed", "quick_products")
def test_json_holds_every_section_in_its_form(gen):
    code, out, _ = gen("doctor", "--json")
    answer = json.loads(out.splitlines()[-1])
    assert code == 0 and answer["ok"]
    data = answer["data"]
    assert {key: type(value) for key, value in data.items()} == KEYS
    for section, keys in ROWS.items():
        assert data[section], section
        assert all(row.keys() == keys for row in data[section]), section
    assert data["versions"]["torch"] == importlib.metadata.version("torch")
    assert data["machine"]["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert {row["name"] for row in data["weights"]} == {
        f"{row.name}:{tag}" for row in MODELS.values() for tag in row.weights
    }


@pytest.mark.usefixtures("installed")
def test_text_names_what_people_look_for(gen):
    code, out, _ = gen("doctor", "--quick")
    assert code == 0
    for words in ("torch", "GEN_HOME", "What auto takes", "Attention", "sdpa", "pixart-sigma:toy", "PyAV"):
        assert words in out
    assert "Matrix products" not in out  # they take seconds


def test_the_choice_is_the_loaders_own():
    rows = {row["device"]: row for row in doctor.choice()}
    for device, row in rows.items():
        assert row["dtype"] == loader.choose_device(Settings(device=device))[1]
    (taken,) = (device for device, row in rows.items() if row["auto"])
    assert taken == loader.choose_device(Settings())[0]
    assert all(row["why"] for row in rows.values())


def test_instruction_sets_are_those_that_torch_sees():
    found = set(doctor.cpu()["instructions"])
    seen = torch.cpu.get_capabilities()
    for name in ("avx2", "avx512_bf16", "avx512_vnni"):
        assert (name in found) == bool(seen.get(name)), name


@pytest.mark.usefixtures("installed")
def test_installed_weights_are_counted_and_held_against_the_memory(monkeypatch):
    (toy,) = (row for row in doctor.weights() if row["name"] == "pixart-sigma:toy")
    assert toy["installed"] and toy["whole"] and toy["fits"]
    assert toy["bytes"] == toy["parameters"] * getattr(torch, toy["dtype"]).itemsize
    assert toy["plan"]["peak_bytes"] > toy["bytes"] == sum(toy["plan"]["weights_bytes"].values())
    monkeypatch.setattr(doctor, "available_memory", lambda device: toy["bytes"] - 1)
    found = doctor.examine(probe=False)
    assert any("pixart-sigma:toy" in one and "smaller weights" in one for one in found["problems"])


def test_damaged_weights_are_a_problem_and_not_the_end(tiny_toy_folder, tmp_path, monkeypatch):
    folder = tmp_path / "toy" / "pixart-sigma"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").symlink_to(tiny_toy_folder / "model_index.json")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no header")
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path))
    found = doctor.examine(probe=False)
    assert any("pixart-sigma:toy are damaged" in one for one in found["problems"])


def test_a_home_that_does_not_exist_yet_is_judged_by_what_is_above_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GEN_HOME", str(tmp_path / "not" / "yet"))
    space = doctor.disk()
    assert space["writable"] and not space["exists"] and space["free"] > 0
    assert not (tmp_path / "not").exists()


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "SPARE", 2**62)
    found = {"disk": doctor.disk(), "weights": [], "video": {"PyAV": "1"}}
    assert any("make room" in one for one in doctor.problems(found))


def test_without_torch_the_doctor_says_so_and_goes_on(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\nfrom gen import cli\nsys.exit(cli.execute(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"GEN_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert "Problem: PyTorch is not installed: pip install" in done.stdout
    assert "Optional packages" in done.stdout


# Matrix products


@pytest.mark.usefixtures("quick_products")
def test_every_way_to_multiply_gives_the_product():
    for dtype, most in (("float32", 1e-4), ("bfloat16", 2e-2), ("int8", 1e-6)):
        rates = gemm.rates(dtype, "cpu", seconds=0.01)
        assert rates, dtype
        assert [rate.flops for rate in rates] == sorted((rate.flops for rate in rates), reverse=True)
        for rate in rates:
            assert rate.flops > 0 and rate.error <= most, rate


def test_the_switch_for_float32_products_is_put_back():
    before = gemm.float32_precision()
    with pytest.raises(KeyError), gemm.float32_products("bf16"):
        assert gemm.float32_precision() == "bf16" != before
        raise KeyError
    assert gemm.float32_precision() == before


def products(error: float) -> list[dict]:
    ways = (("linear", 0.2, 4e-7), ("linear through oneDNN", 0.4, error))
    return [
        {"device": "cpu", "dtype": "float32", "way": way, "tflops": tflops, "error": one}
        for way, tflops, one in ways
    ]


def test_advice_tells_float32_from_bfloat16_in_disguise():
    (exact,) = doctor.advice(products(1e-6))
    assert "2.00 times as fast" in exact and "as exact as float32" in exact
    (rounded,) = doctor.advice(products(3e-3))
    assert "bfloat16 in disguise" in rounded
    assert doctor.advice([]) == []
