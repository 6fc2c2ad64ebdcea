"""`gen verify` and `gen rm` on weights that a hub of our own has given."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from gen import added as add
from gen import catalog, installed
from gen.errors import GenError
from tests.hub_server import connected, pixart, safetensors
from weights import added, registry, store

SIGMA = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
SIGMA_512 = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
SHARED = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
ALL = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path) as server:
        monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "none"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
        server.publish(SIGMA, pixart(*ALL, seed=1))
        server.publish(SIGMA_512, pixart("transformer", seed=2))
        server.publish(SHARED, pixart("tokenizer", "text_encoder", "vae", "scheduler", seed=4))
        yield server


@pytest.fixture
def pulled(server, gen):
    """pixart-sigma:512, with what it takes of another repository."""
    assert gen("pull", "pixart-sigma:512")[0] == 0
    server.seen.clear()
    return server


class Terminal(io.StringIO):
    """Somebody who answers."""

    def isatty(self) -> bool:
        return True


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def remove_blob(path: Path) -> None:
    path.resolve().unlink()


def remove_link(path: Path) -> None:
    path.unlink()


# Checking


def test_whole_weights_are_said_to_be_whole(pulled, gen):
    code, out, _ = gen("verify", "pixart-sigma:512")
    assert code == 0
    assert out.startswith("pixart-sigma:512: whole, 9 files") and "without a sum" not in out
    assert pulled.seen == [], "checking needs no network"


@pytest.mark.parametrize(
    ("repo", "name", "damage"),
    [
        *((SIGMA_512, NETWORK, damage) for damage in (flip, cut, remove_blob, remove_link)),
        (SHARED, ENCODER, flip),
        (SHARED, "vae/config.json", cut),
        (SHARED, "vae/config.json", remove_blob),
        (SHARED, "vae/config.json", remove_link),
        (SHARED, "tokenizer/spiece.model", flip),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_damage_is_named_and_mended_by_pulling_the_one_file(pulled, gen, damage, repo, name):
    path = store.snapshot(repo) / name
    before = path.read_bytes()
    damage(path)
    code, out, err = gen("verify", "pixart-sigma:512")
    if code == 3:  # without its mark, a companion's part does not count: a pull completes it
        assert damage in (remove_blob, remove_link) and "gen pull pixart-sigma:512" in err
        assert gen("pull", "pixart-sigma:512")[0] == 0
    else:
        assert code == 4, (out, err)
        assert str(path) in err and str(path) in out and out.count("\n  ") == 1
        assert "gen verify pixart-sigma:512 --repair" in err
        assert pulled.asked() == []
        code, out, err = gen("verify", "pixart-sigma:512", "--repair", "--json")
        assert code == 0, err
        assert json.loads(out)["data"]["repaired"] == [str(path)]
    linked = code == 3 and damage is remove_link  # its bytes were still there
    assert pulled.asked() == ([] if linked else [name]), "the one file"
    assert path.read_bytes() == before
    assert gen("verify")[0] == 0


def test_files_that_others_pulled_are_checked_by_their_names(pulled, gen):
    shutil.rmtree(store.home())  # no record: as after `hf download`
    assert gen("verify", "pixart-sigma:512")[0] == 0
    flip(store.snapshot(SHARED) / ENCODER)
    flip(store.snapshot(SHARED) / "vae" / "config.json")
    check = installed.verify("pixart-sigma:512")
    assert {one.name for one in check.damages} == {ENCODER, "vae/config.json"}


def test_bytes_that_two_repositories_share_are_mended_in_both(server, gen):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    same = server.repositories[SIGMA]
    other = registry.LCM_1024.repo_id
    server.publish(other, {**same.revisions[same.main], NETWORK: safetensors(77)})
    assert gen("pull", "pixart-delta:1024")[0] == 0
    flip((store.snapshot(SIGMA) / ENCODER).resolve())
    assert len(installed.verify("pixart-delta:1024").damages) == 1
    assert gen("verify", "pixart-sigma:1024", "--repair")[0] == 0
    assert (store.snapshot(SIGMA) / ENCODER).samefile(store.snapshot(other) / ENCODER)
    assert not installed.verify("pixart-delta:1024").damages


def test_a_mend_is_of_the_same_revision(pulled, gen):
    first = store.snapshot(SIGMA_512)
    pulled.publish(SIGMA_512, pixart("transformer", seed=9))
    flip(first / NETWORK)
    assert gen("verify", "pixart-sigma:512", "--repair")[0] == 0
    assert store.snapshot(SIGMA_512) == first


def test_embedded_weights_are_compared_with_their_own_sums(gen, tmp_path, monkeypatch):
    embedded = store.find("cloud-judge-toy")
    copy = tmp_path / "mine" / "toy" / "cloud-judge"
    shutil.copytree(embedded, copy)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    code, out, _ = gen("verify", "cloud-judge-toy")
    assert code == 0 and "whole" in out
    [weights] = copy.rglob("*.safetensors")
    flip(weights)
    code, _, err = gen("verify", "cloud-judge-toy", "--repair")
    assert code == 4
    assert str(weights) in err and "came from no hub" in err


def test_what_is_not_here_cannot_be_checked(server, gen):
    code, _, err = gen("verify", "pixart-sigma:512")
    assert code == 3 and "gen pull pixart-sigma:512" in err


# Removing


def blobs(repo: str) -> int:
    return sum(path.stat().st_size for path in store.repository(repo).glob("blobs/*"))


def test_removed_weights_free_what_nobody_else_uses(server, gen):
    assert gen("pull", "pixart-sigma:512")[0] == 0
    server.publish("PixArt-alpha/PixArt-Sigma-XL-2-256x256", pixart("transformer", seed=3))
    assert gen("pull", "pixart-sigma:256")[0] == 0
    store.prepare("pixart-sigma-xl-512")
    size = blobs(SIGMA_512)
    code, out, err = gen("rm", "pixart-sigma:512", "--yes", "--json")
    assert code == 0
    removed = json.loads(out)["data"]["removed"]
    assert removed["freed_bytes"] == size
    assert removed["kept"][f"{SHARED}/text_encoder"] == ["pixart-sigma:256"]
    assert f"{SHARED}/vae stays, for pixart-sigma:256" in err
    assert not store.repository(SIGMA_512).exists() and store.record(SIGMA_512) == {}
    assert not (store.home() / "assembled" / "pixart-sigma-xl-512").exists()
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[0] == "256"
    assert gen("verify", "pixart-sigma:256")[0] == 0
    # The last one takes the shared parts with it
    assert gen("rm", "pixart-sigma:256", "-y")[0] == 0
    assert not store.repository(SHARED).exists()
    assert gen("rm", "pixart-sigma:256", "-y")[0] == 3


def test_a_repository_that_completes_others_keeps_what_they_need(server, gen):
    assert gen("pull", "pixart-sigma:1024")[0] == 0
    assert gen("pull", "pixart-sigma:512")[0] == 0
    assert gen("rm", "pixart-sigma:1024", "-y")[0] == 0
    assert not (store.snapshot(SIGMA) / NETWORK).exists()
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[0] == "512"
    assert gen("verify", "pixart-sigma:512")[0] == 0


def test_blobs_that_another_revision_names_stay(pulled, gen):
    blob = (store.snapshot(SIGMA_512) / NETWORK).resolve()
    older = store.repository(SIGMA_512) / "snapshots" / ("0" * 40) / "transformer"
    older.mkdir(parents=True)
    (older / "old.safetensors").symlink_to(blob)
    assert gen("rm", "pixart-sigma:512", "-y")[0] == 0
    assert (older / "old.safetensors").exists() and blob.exists()
    assert store.snapshot(SIGMA_512) is None, "its own names are gone"


def test_a_question_comes_first(pulled, gen, monkeypatch):
    code, out, err = gen("rm", "pixart-sigma:512", "--dry-run")
    assert code == 0 and "files go" in out
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    code, _, err = gen("rm", "pixart-sigma:512")
    assert code == 2 and "gen rm pixart-sigma:512 --yes" in err and "are freed" in err
    assert gen("verify", "pixart-sigma:512")[0] == 0
    for answer in ("n\n", ""):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        code, _, err = gen("rm", "pixart-sigma:512")
        assert code == 130 and "pixart-sigma:512 stays" in err
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert gen("rm", "pixart-sigma:512")[0] == 0
    assert store.find("pixart-sigma-xl-512") is None


def test_what_a_broken_pull_left_can_be_removed(server, gen):
    server.misbehave("model.safetensors", cut=1000, times=1)
    server.misbehave("model.safetensors", cut=0)
    assert gen("pull", "pixart-sigma:1024")[0] == 1
    assert [*store.repository(SIGMA).glob("blobs/*.incomplete")]
    code, _, err = gen("rm", "pixart-sigma:1024", "-y")
    assert code == 0, err
    assert not store.repository(SIGMA).exists() and store.record(SIGMA) == {}


@pytest.mark.parametrize(
    ("name", "words"), [("pixart-sigma:toy", "embedded"), ("dit-3d:own", "folder of your own")]
)
def test_what_is_not_ours_to_remove_stays(name, words, tmp_path, monkeypatch):
    (tmp_path / "mine" / "dit-3d").mkdir(parents=True)
    (tmp_path / "mine" / "dit-3d" / "model_index.json").write_text("{}")
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    with pytest.raises(GenError, match=words) as caught:
        installed.removal(name)
    assert caught.value.code == "bad_input"


def test_weights_in_a_folder_of_ones_own_stay_though_the_rest_is_in_the_cache(pulled, tmp_path, monkeypatch):
    mine = tmp_path / "mine" / "pixart-sigma-xl-256"
    shutil.copytree(store.snapshot(SIGMA_512) / "transformer", mine / "transformer")
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    assert "256" in catalog.installed(catalog.MODELS["pixart-sigma"])
    with pytest.raises(GenError, match="folder of your own"):
        installed.removal("pixart-sigma:256")
    kept = installed.removal("pixart-sigma:512").kept
    assert kept[f"{SHARED}/text_encoder"] == ("pixart-sigma:256",)


# Weights that `gen add` added


def test_added_weights_are_forgotten_and_their_files_stay(server, gen, tiny_toy_folder):
    add.add(tiny_toy_folder, "pixart-sigma:mine")
    code, out, err = gen("verify", "pixart-sigma:mine")
    assert code == 0 and "whole" in out, err
    assert gen("rm", "pixart-sigma:mine", "--dry-run")[0] == 0
    assert "mine" in catalog.MODELS["pixart-sigma"].weights
    code, out, _ = gen("rm", "pixart-sigma:mine")
    assert code == 0 and f"{tiny_toy_folder} stays where it is" in out
    assert "mine" not in catalog.MODELS["pixart-sigma"].weights
    assert (tiny_toy_folder / "model_index.json").is_file()
    assert gen("pull", "pixart-sigma:mine")[0] == 2


def test_added_weights_keep_the_parts_that_they_borrow(pulled, tmp_path):
    file = tmp_path / "tuned.safetensors"
    file.write_bytes(safetensors(5))
    row = added.Added(
        model="pixart-sigma", tag="tuned", path=file, base="pixart-sigma-xl-512", facts={}, stamps={}
    )
    added.put(row)
    work = installed.removal("pixart-sigma:512")
    assert work.kept[f"{SHARED}/text_encoder"] == ("pixart-sigma:tuned",)
    assert {path.parent.name for path in work.links} == {"transformer"}
