"""`gen pull` from a hub of our own, which speaks the real protocol to the real client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from gen import catalog, pull
from gen.errors import GenError
from tests.hub_server import connected, pixart, safetensors
from weights import hub, registry, store

SIGMA = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
SIGMA_512 = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
SIGMA_256 = "PixArt-alpha/PixArt-Sigma-XL-2-256x256"
SHARED = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
ALL = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
SUPERFLUOUS = {
    "transformer/diffusion_pytorch_model.bin": b"\x80" * 5000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": safetensors(99),
    "text_encoder/pytorch_model.bin.index.json": b"{}",
    "asset/picture.png": b"\x89PNG" * 500,
    "flax_model.msgpack": b"x" * 3000,
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path) as server:
        monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "none"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
        server.publish(SIGMA, pixart(*ALL, seed=1, more=SUPERFLUOUS))
        server.publish(SIGMA_512, pixart("transformer", seed=2))
        server.publish(SIGMA_256, pixart("transformer", seed=3))
        server.publish(SHARED, pixart("tokenizer", "text_encoder", "vae", "scheduler", seed=4))
        yield server


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "gen.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_weights_are_pulled_with_a_plan_and_found(server, gen):
    code, out, err = gen("pull", "pixart-sigma:1024")
    assert code == 0, err
    folder = Path(out.strip())
    assert folder == store.find("pixart-sigma-xl-1024")
    store.verify(folder)
    assert "pixart-sigma:1024: 10 files" in err and "licence CreativeML Open RAIL++-M" in err
    commit = server.repositories[SIGMA].main
    assert f"weights from {SIGMA}, revision {commit[:12]} (main), licence openrail++" in err
    assert "to fetch" in err and "free disk" in err
    needed = set(pixart(*ALL)) - {"README.md", ".gitattributes"}
    assert set(server.asked()) == needed and len(server.asked()) == len(needed), "nothing else, each once"
    record = store.record(SIGMA)
    assert (record["revision"], record["asked"], set(record["files"])) == (commit, "main", needed)
    listed = {line.split()[0]: line.split()[1] for line in gen("list")[1].splitlines()}
    assert listed["pixart-sigma:1024"] == "yes" and listed["pixart-sigma:512"] == "-"
    assert f"pixart-sigma:1024 is revision {commit}" in gen("show", "pixart-sigma")[1]


def test_what_is_here_is_not_asked_for(server, gen, monkeypatch):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    before = len(server.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = gen("pull", "pixart-sigma")
    assert code == 0 and "is here already" in err and Path(out.strip()).is_dir()
    assert len(server.seen) == before


def test_a_dry_run_fetches_nothing_and_leaves_nothing(server, gen, tmp_path):
    code, out, err = gen("pull", "pixart-sigma:512", "--dry-run")
    assert (code, err) == (0, "")
    assert f"weights from {SIGMA_512}" in out
    assert f"tokenizer, text_encoder, vae, scheduler from {SHARED}" in out
    assert "transformer/diffusion_pytorch_model.safetensors" in out
    assert server.asked() == [] and not (tmp_path / "hub").exists() and not store.home().exists()
    plan = json.loads(gen("pull", "pixart-sigma:512", "--dry-run", "--json")[1])["data"]["plan"]
    assert (
        plan["bytes"]
        == plan["missing_bytes"]
        == sum(one["bytes"] for repo in plan["repositories"] for one in repo["files"])
    )
    assert plan["free_bytes"] > 0 and plan["installed"] is None
    assert [repo["revision"] for repo in plan["repositories"]] == [
        server.repositories[SIGMA_512].main,
        server.repositories[SHARED].main,
    ]


def test_what_several_share_is_stored_once(server, gen):
    assert gen("pull", "pixart-sigma:512")[0] == 0
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[0] == "512"
    sent = server.sent
    server.seen.clear()
    code, _, err = gen("pull", "pixart-sigma:256")
    assert code == 0
    assert f"text_encoder is shared with what is here: {SHARED}" in err
    assert {one.partition("/")[0] for one in server.asked()} == {"transformer"}
    assert server.sent - sent < 5000
    # The complete repository has a text encoder of its own: the registry says that it is the same.
    server.seen.clear()
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    assert {one.partition("/")[0] for one in server.asked()} == {
        "transformer",
        "scheduler",
        "model_index.json",
    }
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[:3] == ["1024", "512", "256"]


def test_a_complete_repository_completes_the_others(server, gen):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    server.seen.clear()
    assert gen("pull", "pixart-sigma:512")[0] == 0
    assert {one.partition("/")[0] for one in server.asked()} == {"transformer"}
    assert not store.repository(SHARED).exists()


def test_equal_files_of_other_repositories_are_linked(server, gen):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    lcm, same = registry.LCM_1024.repo_id, server.repositories[SIGMA]
    files = dict(same.revisions[same.main])
    files["transformer/diffusion_pytorch_model.safetensors"] = safetensors(77)
    files["scheduler/scheduler_config.json"] = b'{"_class_name": "LCMScheduler"}'
    server.publish(lcm, files)
    sent = server.sent
    assert gen("pull", "pixart-delta:1024")[0] == 0
    assert server.sent - sent < 8000, "the text encoder and the autoencoder are those of Sigma"
    name = "text_encoder/model.safetensors"
    assert (store.snapshot(lcm) / name).samefile(store.snapshot(SIGMA) / name)


def test_sharded_weights_come_in_their_pieces(server, gen):
    files = pixart(*ALL, seed=1)
    name = "text_encoder/model"
    pieces = [f"{name}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": pieces[0].rpartition("/")[2], "b": pieces[1].rpartition("/")[2]}}
    files |= {one: safetensors(n) for n, one in enumerate(pieces)}
    files |= {f"{name}.safetensors.index.json": json.dumps(index).encode()}
    files |= {f"{name}.fp16-00001-of-00001.safetensors": safetensors(7)}
    server.publish(SIGMA, files)
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    asked = {one for one in server.asked() if one.startswith("text_encoder/")}
    assert asked == {*pieces, f"{name}.safetensors.index.json", "text_encoder/config.json"}


def test_pickles_alone_are_told_and_not_fetched(server, gen):
    files = pixart("transformer", seed=2)
    files["transformer/diffusion_pytorch_model.bin"] = files.pop(
        "transformer/diffusion_pytorch_model.safetensors"
    )
    server.publish(SIGMA_512, files)
    code, _, err = gen("pull", "pixart-sigma:512")
    assert code == 3
    assert "diffusion_pytorch_model.bin" in err and "gen convert FILE --as pixart-sigma" in err
    assert server.asked() == []


def test_files_in_the_authors_layout_are_pulled_alone_with_what_to_do(server, gen):
    files = {"PixArt-Sigma-XL-2-512-MS.pth": b"\x80" * 3000, "PixArt-Sigma-XL-2-256x256.pth": b"\x80" * 4000}
    server.publish("PixArt-alpha/PixArt-Sigma", files)
    code, out, err = gen("pull", "pixart-sigma-xl-512-official")
    assert code == 0, err
    path = Path(out.strip()) / "PixArt-Sigma-XL-2-512-MS.pth"
    assert path.read_bytes() == b"\x80" * 3000
    assert f"gen convert {path} --as pixart-sigma" in err
    assert server.asked() == ["PixArt-Sigma-XL-2-512-MS.pth"]


def test_what_a_conversion_needs_beside_it_comes_along(server, gen):
    facts = registry.CONTROL_1024
    server.publish(facts.repo_id, {facts.files[0]: b"\x80" * 3000, "other.pth": b"\x80" * 3000})
    server.publish(registry.LCM_1024.repo_id, pixart(*ALL, seed=6))
    code, out, err = gen("pull", "pixart-delta:control")
    assert code == 0, err
    assert {one.partition("/")[0] for one in server.asked()} == {
        facts.files[0],
        "tokenizer",
        "text_encoder",
        "vae",
    }
    assert f"--as pixart-control --output $GEN_WEIGHTS_DIR/{facts.key}" in err
    assert pull.whole(facts.key) == Path(out.strip())


def test_an_adapter_is_pulled_by_its_key(server, gen):
    facts = registry.LCM_LORA
    server.publish(
        facts.repo_id,
        {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors(5), "x.bin": b"x"},
    )
    code, out, _ = gen("pull", facts.key)
    assert code == 0
    store.verify_adapter(Path(out.strip()))
    assert set(server.asked()) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(server, gen, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    code, _, err = gen("pull", "pixart-sigma:1024")
    assert code == 6
    assert "0.0 MiB are free" in err and "gen rm" in err
    assert server.asked() == []


def test_the_revision_is_pinned_until_another_is_asked_for(server, gen):
    assert gen("pull", "pixart-sigma:512")[0] == 0
    first = server.repositories[SIGMA_512].main
    second = server.publish(SIGMA_512, pixart("transformer", seed=8))
    weights = store.snapshot(SIGMA_512) / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.resolve().unlink()
    assert gen("pull", "pixart-sigma:512")[0] == 0
    assert store.snapshot(SIGMA_512).name == first, "what was damaged is completed, not replaced"
    assert gen("pull", "pixart-sigma:512", "--update")[0] == 0
    assert store.snapshot(SIGMA_512).name == second
    assert gen("pull", "pixart-sigma:512", "--revision", first)[0] == 0
    assert store.snapshot(SIGMA_512).name == first
    code, _, err = gen("pull", "pixart-sigma:512", "--revision", "v9")
    assert code == 2 and "no revision 'v9'" in err
    assert gen("pull", "pixart-sigma:512", "--revision", first, "--update")[0] == 2


def test_an_update_keeps_what_others_took_of_the_repository(server, gen):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    assert gen("pull", "pixart-sigma:512")[0] == 0  # with the text encoder of the former
    files = pixart(*ALL, seed=1)
    files["transformer/diffusion_pytorch_model.safetensors"] = safetensors(55)
    second = server.publish(SIGMA, files)
    assert gen("pull", "pixart-sigma:1024", "--update")[0] == 0
    assert store.snapshot(SIGMA).name == second
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[:2] == ["1024", "512"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(404, 2, "has no"), (403, 1, "HF_TOKEN"), (429, 1, "asked too often"), (500, 1, "answers 500")],
)
def test_refusals_are_explained(server, gen, status, code, words):
    server.misbehave("", status=status)
    got, _, err = gen("pull", "pixart-sigma:1024")
    assert got == code and words in err, err
    assert "Traceback" not in err and server.address in err


def test_gated_weights_are_explained_and_a_token_opens_them(server, gen, monkeypatch):
    server.repositories[SIGMA].gated, server.repositories[SIGMA].token = True, "hf_good"
    code, _, err = gen("pull", "pixart-sigma:1024", "--json")
    assert code == 1
    assert "gated: its terms must be accepted" in err
    assert f"{server.address}/{SIGMA}" in err and "HF_TOKEN" in err
    assert not catalog.installed(catalog.MODELS["pixart-sigma"])[:-1]
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert gen("pull", "pixart-sigma:1024")[0] == 0


def test_offline_is_told(server, gen, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = gen("pull", "pixart-sigma:1024", "--json")
    assert code == 1 and "HF_HUB_OFFLINE is set" in err
    assert json.loads(out)["error"]["code"] == "network"


def test_corrupt_bytes_are_never_installed(server, gen):
    server.misbehave("text_encoder/model.safetensors", flip=True)
    code, _, err = gen("pull", "pixart-sigma:1024")
    assert code == 4 and "other bytes than the hub published" in err
    assert store.find("pixart-sigma-xl-1024") is None
    server.faults.clear()
    server.seen.clear()
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    assert "transformer/diffusion_pytorch_model.safetensors" in server.asked()
    assert "tokenizer/spiece.model" not in server.asked(), "what had come before is kept"


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        ("pixart-sigma:toy", "bad_input", "come with the program"),
        ("dit-3d:own", "bad_input", "gen convert"),
        ("pixart-sigmo", "unknown_model", "pixart-sigma"),
        ("zzz", "unknown_model", "hed"),
        ("pixart-sigma:zzz", "unknown_model", "1024"),
    ],
)
def test_what_cannot_be_pulled_is_said(server, name, code, hint):
    with pytest.raises(GenError) as caught:
        pull.plan(name)
    assert caught.value.code == code and hint in caught.value.hint
    assert server.seen == []


def test_weights_that_are_missing_say_how_to_pull_them():
    with pytest.raises(GenError) as caught:
        catalog.choose(catalog.MODELS["pixart-delta"], "control")
    assert "gen pull pixart-delta:control, then gen convert FILE --as pixart-control" in caught.value.hint


# Processes of their own: 4 MiB at 64 KiB every 15 ms take a second


@pytest.fixture
def slow(server):
    server.publish(SIGMA, pixart(*ALL, seed=1, size=4 * 2**20))
    server.misbehave("transformer/diffusion", slow=0.015)
    server.misbehave("text_encoder/model", slow=0.015)
    return server


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def partial_bytes() -> int:
    return sum(path.stat().st_size for path in store.repository(SIGMA).glob("blobs/*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_pull_that_is_killed_goes_on_where_it_was(slow, gen, number):
    with start("pull", "pixart-sigma:1024") as child:
        until(lambda: partial_bytes() > 2**20)
        os.kill(child.pid, number)
        _, err = child.communicate(timeout=30)
    if number == signal.SIGINT:
        assert child.returncode == 130 and "To go on: gen pull pixart-sigma:1024" in err
    kept = partial_bytes()
    assert kept > 2**20
    assert store.find("pixart-sigma-xl-1024") is None, "half of it is not taken for installed"
    slow.faults.clear()
    slow.seen.clear()
    before = slow.sent
    code, out, err = gen("pull", "pixart-sigma:1024")
    assert code == 0, err
    assert "from a pull that was cut off" in err
    whole = sum(
        hub.blob(SIGMA, file).stat().st_size for file in hub.look(SIGMA).files if hub.here(SIGMA, file)
    )
    assert slow.sent - before <= whole - kept + 2**18, "what was kept did not come twice"
    assert any(asked for _, _, asked in slow.seen), "a range was asked for"
    store.verify(Path(out.strip()))
    assert not [*store.repository(SIGMA).glob("blobs/*.incomplete")]


def test_two_pulls_at_once_fetch_once(slow):
    with start("pull", "pixart-sigma:1024") as first:
        until(lambda: partial_bytes() > 2**18)
        with start("pull", "pixart-sigma:1024", "--json") as second:
            out, err = second.communicate(timeout=60)
        _, progress = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err
    assert f"another process pulls or removes {SIGMA}: waiting for it" in err
    assert len(slow.asked()) == len(set(slow.asked())), "every file once"
    assert Path(json.loads(out)["data"]["folder"]) == store.find("pixart-sigma-xl-1024")
    assert "MiB of " in progress and "transformer/diffusion_pytorch_model.safetensors" in progress
    assert "\r" not in progress, "this is no terminal"
