"""Published repositories that hold the transformer alone, put together with the parts of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gen import catalog, engine, loader
from gen.errors import GenError
from gen.request import Request, Settings
from weights import registry, store

SIGMA, SHARED = "pixart-sigma-xl-512", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
LCM, DMD = "pixart-delta-xl-1024", "pixart-alpha-dmd-512"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """publish(repository, *parts, of=folder) -> its snapshot in a Hugging Face cache: links to blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "none"))

    def publish(repo_id: str, *parts: str, of: Path, index: bool = False) -> Path:
        repo = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / "0123abcd"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text("0123abcd")
        (repo / "blobs").mkdir(exist_ok=True)
        files = [path for part in parts for path in (of / part).iterdir()]
        for path in [*files, *([of / "model_index.json"] if index else [])]:
            place = snapshot / path.relative_to(of)
            place.parent.mkdir(parents=True, exist_ok=True)
            blob = repo / "blobs" / f"{place.parent.name}-{path.name}"
            shutil.copyfile(path, blob)
            place.symlink_to(blob)
        if index:  # what is not published is not promised
            rewrite(snapshot / "model_index.json", controlnet=None)
        return snapshot

    yield publish
    loader.forget()


def rewrite(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def test_a_transformer_alone_is_joined_with_the_parts_that_all_share(hub, tiny_toy_folder):
    hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    assert store.find(SIGMA) is None
    assert store.lacking(SIGMA) == ["tokenizer", "text_encoder", "vae"]
    hub(SHARED, "tokenizer", "text_encoder", "vae", "scheduler", of=tiny_toy_folder, index=True)
    promised = store.find(SIGMA)
    assert promised is not None and not promised.exists(), "looking creates nothing"
    folder = store.prepare(SIGMA)
    assert folder == promised == store.find(SIGMA)
    assert folder.is_relative_to(store.home() / "assembled")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_symlink()
    store.verify(folder)
    assert store.fingerprint(folder) == store.fingerprint(tiny_toy_folder)
    assert store.parameters(folder) == store.parameters(tiny_toy_folder)
    before = folder.stat().st_mtime_ns
    assert store.prepare(SIGMA) == folder
    assert folder.stat().st_mtime_ns == before, "made once"


def test_what_is_put_together_draws(hub, tiny_toy_folder):
    hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    hub(SHARED, "tokenizer", "text_encoder", "vae", of=tiny_toy_folder)
    row = catalog.MODELS["pixart-sigma"]
    tag, _, folder = catalog.choose(row, "512")
    assert tag == "512" and catalog.installed(row)[:1] == ["512"]
    loaded = loader.load(row, folder, Settings(device="cpu"))
    assert type(loaded.pipeline.scheduler).__name__ == "DPMSolver", (
        "the published one, where none was fetched"
    )
    for step in loaded.pipeline.denoise("a red cube", num_inference_steps=2):
        assert step.latents.isfinite().all()
    # These stand-ins draw 128 pixels: the request passes all checks, and the pipeline has the last word.
    with pytest.raises(GenError, match="The model refuses this"):
        [*engine.run(Request.build("pixart-sigma:512", {"prompt": "a red cube", "steps": 1}))]


def test_sigma_is_told_that_it_reads_no_size_when_its_file_does_not_say(hub, tiny_toy_folder):
    parts = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    snapshot = hub(registry.XL_1024.repo_id, *parts, of=tiny_toy_folder, index=True)
    assert store.find(registry.XL_1024.key) == snapshot, "complete, and says so: taken as it is"
    config = snapshot / "transformer" / "config.json"
    rewrite(config, use_additional_conditions=None)
    folder = store.prepare(registry.XL_1024.key)
    assert folder != snapshot
    assert (
        json.loads((folder / "transformer" / "config.json").read_text())["use_additional_conditions"] is False
    )
    assert "use_additional_conditions" not in json.loads(config.read_text()), (
        "the cache is not ours to change"
    )
    store.verify(folder)


def test_a_complete_lcm_is_taken_as_it_is_and_a_lone_transformer_is_completed(hub, tiny_delta_folder):
    parts = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    snapshot = hub(registry.LCM_1024.repo_id, *parts, of=tiny_delta_folder, index=True)
    assert store.find(LCM) == snapshot
    for name in ("text_encoder", "scheduler"):
        shutil.rmtree(snapshot / name)
    assert store.find(LCM) is None
    hub(registry.ALPHA_1024.repo_id, "text_encoder", "vae", "tokenizer", of=tiny_delta_folder)
    folder = store.prepare(LCM)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    loaded = loader.load(catalog.MODELS["pixart-delta"], folder, Settings(device="cpu"))
    assert loaded.pipeline.distilled().steps == 4
    assert loaded.pipeline.scheduler.config.beta_schedule == "linear"


@pytest.mark.parametrize("complete", [True, False])
def test_the_one_step_model_takes_one_step_whatever_its_repository_says(hub, tiny_delta_folder, complete):
    parts = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    own = parts if complete else ("transformer",)
    snapshot = hub(registry.DMD_512.repo_id, *own, of=tiny_delta_folder, index=complete)
    if complete:
        rewrite(snapshot / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    else:
        hub(registry.LCM_1024.repo_id, *parts, of=tiny_delta_folder, index=True)
    folder = store.prepare(DMD)
    loaded = loader.load(catalog.MODELS["pixart-delta"], folder, Settings(device="cpu"))
    walk = loaded.pipeline.distilled()
    assert (walk.steps, loaded.pipeline.scheduler.config.timestep) == (1, 400)
    steps = [*loaded.pipeline.denoise("a red cube")]
    assert [int(step.timestep) for step in steps] == [400]


def test_a_control_branch_comes_along(hub, tiny_delta_folder, tmp_path, monkeypatch):
    key = registry.CONTROL_1024.key
    hub(registry.LCM_1024.repo_id, "tokenizer", "text_encoder", "vae", of=tiny_delta_folder)
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    for part in ("transformer", "controlnet"):  # what `gen convert` writes
        shutil.copytree(tiny_delta_folder / part, tmp_path / "mine" / key / part)
    loaded = loader.load(catalog.MODELS["pixart-delta"], store.prepare(key), Settings(device="cpu"))
    assert loaded.pipeline.controlnet is not None
    assert loaded.pipeline.distilled() is None


def test_a_newer_download_makes_a_new_folder(hub, tiny_toy_folder):
    snapshot = hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    hub(SHARED, "tokenizer", "text_encoder", "vae", of=tiny_toy_folder)
    first = store.prepare(SIGMA)
    newer = snapshot.with_name("ffff0000")
    snapshot.rename(newer)
    (newer.parents[1] / "refs" / "main").write_text("ffff0000")
    second = store.prepare(SIGMA)
    assert second != first
    store.verify(second)


def test_a_missing_companion_is_named_with_the_way_to_get_it(hub, tiny_toy_folder):
    hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    with pytest.raises(GenError, match="without their tokenizer, text_encoder and vae") as caught:
        catalog.choose(catalog.MODELS["pixart-sigma"], "512")
    assert caught.value.code == "not_installed"
    assert "gen pull pixart-sigma:512" in caught.value.hint


def test_companions_may_lie_beside_the_weights(hub, tiny_toy_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    shutil.copytree(tiny_toy_folder / "transformer", tmp_path / "mine" / SIGMA / "transformer")
    shutil.copytree(tiny_toy_folder, tmp_path / "mine" / SHARED.rpartition("/")[2])
    store.verify(store.prepare(SIGMA))


def test_a_damaged_settings_file_is_named_and_not_hidden(hub, tiny_toy_folder):
    snapshot = hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    hub(SHARED, "tokenizer", "text_encoder", "vae", of=tiny_toy_folder)
    (snapshot / "transformer" / "config.json").write_text("{")
    row = catalog.MODELS["pixart-sigma"]
    assert "512" in catalog.installed(row)
    with pytest.raises(GenError, match=r"transformer/config\.json: not valid JSON") as caught:
        catalog.choose(row, "512")
    assert caught.value.code == "corrupt_weights"


def test_a_home_that_cannot_be_written_to_is_told(hub, tiny_toy_folder, tmp_path, monkeypatch):
    hub(registry.CHECKPOINTS[SIGMA].repo_id, "transformer", of=tiny_toy_folder)
    hub(SHARED, "tokenizer", "text_encoder", "vae", of=tiny_toy_folder)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GEN_HOME", str(tmp_path / "file"))
    assert catalog.installed(catalog.MODELS["pixart-sigma"])[:1] == ["512"]
    with pytest.raises(GenError) as caught:
        catalog.choose(catalog.MODELS["pixart-sigma"], "512")
    assert caught.value.code == "output_not_writable"


@pytest.mark.parametrize("row", registry.CHECKPOINTS.values(), ids=registry.CHECKPOINTS)
def test_every_row_knows_how_its_parts_are_put_together(row):
    assert row.walk in store.SCHEDULERS
    assert not row.companions or row.pipeline in store.PARTS
    assert not row.adapts or row.adapts in registry.CHECKPOINTS
