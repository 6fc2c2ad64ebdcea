"""Teaching a model something new: it learns, it keeps the rest, it resumes, and it refuses what cannot be."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from gen import cli, cli_train_lora, train_lora
from gen.errors import GenError
from gen.train_lora import LoraTask, Plan
from pipelines import lora_training
from pipelines.dpm_solver import DPMSolver
from pipelines.lora import WEIGHTS, load_lora, merge
from pipelines.models.pixart import PixArtTransformer2DModel
from weights import registry, store

MODEL = "pixart-sigma:toy"
SMALL = Plan(rank=4, steps=12, batch=4, keep_rest=0.5)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of one colour each, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue", "yellow", "cyan", "white")):
        Image.new("RGB", (128, 128), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} prism")
    return folder


@pytest.fixture
def teach(installed, pictures: Path, tmp_path: Path, monkeypatch):
    """teach(plan) -> (folder of the adapter, what was said)."""
    monkeypatch.setenv("GEN_TRAIN_DIR", str(tmp_path / "training"))

    def teach(plan: Plan = SMALL, output: str = "prisms", **options) -> tuple[Path, list[str]]:
        said: list[str] = []
        folder = train_lora.train(
            MODEL, pictures, tmp_path / output, plan, device="cpu", report=said.append, **options
        )
        return folder, said

    return teach


def facts(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()


def test_an_adapter_comes_out_that_the_network_takes(teach, tiny_toy_folder: Path) -> None:
    folder, said = teach()
    network = PixArtTransformer2DModel.from_pretrained(tiny_toy_folder / "transformer")
    merged = merge(network, load_lora(folder))
    assert len(merged.layers) == 2 * (4 + 4 + 2) and not merged.untouched
    up = load_file(folder / WEIGHTS)["base_model.model.transformer_blocks.1.ff.net.2.lora_B.weight"]
    assert up.abs().max() > 0
    known = facts(folder)
    assert known["base_model"] == MODEL
    assert known["base_fingerprint"] == store.fingerprint(tiny_toy_folder)
    assert (known["steps"], known["images"], known["seed"]) == ("12", "48", "0")
    assert len(known["data"]) == 12
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert any("12 steps, 48 pictures seen" in line for line in said)


def test_the_second_start_encodes_and_draws_nothing_and_goes_on(teach, tmp_path: Path) -> None:
    _, first = teach()
    assert "6 pictures: 6 encoded, 0 from the last time" in first
    assert any(line.startswith("drew 24 of 24 pictures") for line in first)
    folder, second = teach(replace(SMALL, steps=20))
    assert "6 pictures: 0 encoded, 6 from the last time" in second
    assert any(line.endswith("captions: 0 encoded, 127 from the last time") for line in second)
    assert not any(line.startswith("drew") for line in second)
    assert "lora: goes on from step 12" in second
    assert facts(folder)["steps"] == "20"
    _, third = teach(replace(SMALL, steps=2), resume=False)
    assert "6 pictures: 0 encoded, 6 from the last time" in third  # what is encoded stays
    assert facts(folder)["steps"] == "2"


def test_a_run_that_is_stopped_keeps_what_it_learnt_and_goes_on(teach, tmp_path: Path, monkeypatch) -> None:
    loss, told = LoraTask.loss, []

    def killed(task: LoraTask, *arguments):
        if not told:  # once, in the midst of a step
            told.append(os.kill(os.getpid(), signal.SIGINT))
        return loss(task, *arguments)

    monkeypatch.setattr(LoraTask, "loss", killed)
    with pytest.raises(GenError, match=r"Stopped at step \d+; what was learnt") as caught:
        teach(replace(SMALL, steps=100_000))
    assert caught.value.exit_code == 130
    folder = tmp_path / "prisms"
    reached = int(facts(folder)["steps"])
    assert 0 < reached < 100
    assert load_lora(folder).pairs
    _, second = teach(replace(SMALL, steps=reached + 3))
    assert f"lora: goes on from step {reached}" in second
    assert facts(folder)["steps"] == str(reached + 3)


def test_a_file_cut_short_by_a_crash_is_made_again(teach, tmp_path: Path) -> None:
    teach()
    damaged = next((tmp_path / "training" / "lora-prisms" / "cache" / "latents").glob("*.safetensors"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    _, said = teach()
    assert "6 pictures: 1 encoded, 5 from the last time" in said
    assert damaged.read_bytes() == whole
    assert any("is damaged and is made again" in line for line in said)


def test_a_run_about_something_else_is_refused_by_what_differs(teach, pictures: Path) -> None:
    teach()
    with pytest.raises(GenError, match=r"about something else: rank 4 is 8 now") as caught:
        teach(replace(SMALL, rank=8))
    assert "--fresh" in caught.value.hint
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(GenError, match="data "):
        teach()
    folder, _ = teach(replace(SMALL, rank=8), resume=False)
    assert load_lora(folder).pairs["transformer_blocks.0.attn1.to_q"].down.shape[0] == 8


def test_chance_is_of_the_seed(teach) -> None:
    one, two, other = (
        load_file(teach(replace(SMALL, steps=4, seed=seed), output)[0] / WEIGHTS)
        for seed, output in ((1, "one"), (1, "two"), (2, "other"))
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def task(keep: float, dtype: torch.dtype = torch.float32) -> LoraTask:
    """A network of random numbers, and pictures of two sizes to learn."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=20,
        use_additional_conditions=False,
    )
    with torch.no_grad():
        network.proj_out.weight.normal_(std=0.2)
    adapters = lora_training.insert(network.to(dtype), "attn+ff", 4, 4)
    new = [(torch.randn(4, 8, 8 + 8 * (n % 2)), torch.randn(3 + n, 20)) for n in range(6)]
    rest = [(torch.randn(4, 8, 8), torch.randn(5, 20)) for _ in range(6)]
    scheduler = DPMSolver(prediction_type="v_prediction")
    options = {"empty": torch.randn(1, 20), "scheduler": scheduler, "keep": keep, "pixels": 8, "seed": 0}
    return LoraTask(network, adapters, new, rest, **options)


def fitted(keep: float, steps: int = 60) -> dict[str, float]:
    one = task(keep)
    optimizer = one.optimizer(5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        one.loss(8, 0.0)[0].backward()
        optimizer.step()
    return one.evaluate(Path())


def test_keeping_the_rest_makes_it_drift_less_while_the_new_is_learnt() -> None:
    free, held = fitted(0.0), fitted(0.5)
    assert free["new"] < 0.95 * free["new before"]
    assert held["new"] < 0.95 * held["new before"]
    assert held["drift"] < 0.7 * free["drift"]


def test_what_is_kept_is_shown_under_its_own_words_under_none_and_under_others() -> None:
    one = task(0.5)
    one.said = [torch.randn(2, 20) for _ in range(3)]
    told = [0] * 5
    for _ in range(60):
        latents, own = one._pick(one.kept, 8, one.rng)
        for mine, words in zip(own, one._varied(latents, own)[1], strict=True):
            told[next(n for n, other in enumerate([mine, one.empty, *one.said]) if words is other)] += 1
    assert told[0] / sum(told) == pytest.approx(1 - train_lora.EMPTY - train_lora.OTHER, abs=0.08)
    assert told[1] / sum(told) == pytest.approx(train_lora.EMPTY, abs=0.05)
    assert all(told[2:])


def test_the_first_prompts_of_the_rest_are_drawn_and_more_are_said(
    teach, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(train_lora, "MOST_SAID", 40)
    (tmp_path / "rest.txt").write_text("\n".join(f"a red cube number {n}" for n in range(50)))
    _, said = teach(replace(SMALL, steps=1), keep_prompts=tmp_path / "rest.txt")
    assert any(line.startswith("drew 24 of 24 pictures") for line in said)  # four for each of six
    assert "note: of the 50 prompts to keep the first 40 are used" in said
    assert any(line.startswith("47 captions: ") for line in said)  # forty, six, and none


def test_a_network_in_bfloat16_is_taught_by_halves_in_float32() -> None:
    one = task(0.5, torch.bfloat16)
    lora_training.save_memory(one.transformer)  # as large ones are
    optimizer = one.optimizer(5e-3)
    before = one.evaluate(Path())["new"]
    for _ in range(20):
        optimizer.zero_grad()
        one.loss(8, 0.0)[0].backward()
        optimizer.step()
    assert one.evaluate(Path())["new"] < before
    assert {half.dtype for half in one.module.parameters()} == {torch.float32}
    assert one.transformer.dtype == torch.bfloat16


def test_before_it_learns_an_adapter_drifts_not_at_all() -> None:
    marks = task(0.5).evaluate(Path())
    assert marks["drift"] == 0 and marks["new"] == marks["new before"] > 0


@pytest.mark.parametrize("answer", ["epsilon", "v_prediction", "sample"])
def test_the_right_answer_leads_back_to_the_picture(answer: str) -> None:
    solver = DPMSolver(prediction_type=answer)
    noise = train_lora.Noise(solver, "cpu")
    x, e, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([5, 400, 900])
    noisy, wanted = noise.add(x, e, t)
    for row in range(3):
        alpha, sigma = float(noise.alpha[t[row]]), float(noise.sigma[t[row]])
        assert (solver.expected(noisy[row], wanted[row], alpha, sigma) - x[row]).abs().max() < 1e-4


def test_pictures_are_cut_from_the_middle() -> None:
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    pixels = train_lora.fitted(wide, 64, 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels[:, :, 2:-2].min() > 0.99 and pixels.max() <= 1


def test_what_cannot_be_taught_is_refused_before_weights_are_read(
    teach, installed_delta, pictures: Path, tmp_path: Path
) -> None:
    for model, words in (("dit", "dit cannot be taught"), ("pixart-delta:toy", "It draws in few steps")):
        with pytest.raises(GenError, match=words) as caught:
            train_lora.train(model, pictures, tmp_path / "out")
        assert "pixart-sigma:toy" in caught.value.hint
    with pytest.raises(GenError, match="holds no pictures"):
        (tmp_path / "none").mkdir()
        train_lora.train(MODEL, tmp_path / "none", tmp_path / "out")
    with pytest.raises(GenError, match="is a file"):
        train_lora.train(MODEL, pictures, pictures / "0.png")
    with pytest.raises(GenError, match="other files than an adapter's"):
        train_lora.train(MODEL, pictures, pictures)
    with pytest.raises(GenError) as caught:
        train_lora.train(MODEL, pictures, pictures / "0.png" / "below")
    assert caught.value.code == "output_not_writable"
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(GenError, match="holds no prompts"):
        teach(keep_prompts=tmp_path / "blank.txt")
    assert not (tmp_path / "training").exists()


def test_published_weights_need_prompts_to_keep_the_rest() -> None:
    with pytest.raises(GenError, match="no prompts whose pictures are to stay"):
        train_lora._filled(Plan(keep_rest=0.5), registry.XL_1024, None)
    plan = train_lora._filled(Plan(rank=8), registry.XL_1024, None)
    assert (plan.keep_rest, plan.batch, plan.learning_rate, plan.alpha) == (0.0, 1, 1e-4, 8)
    assert train_lora._filled(Plan(), registry.XL_1024, Path("prompts.txt")).keep_rest == 0.5


def test_the_rest_may_be_named_in_a_file(teach, tmp_path: Path) -> None:
    (tmp_path / "rest.txt").write_text("a red cube\n\na blue ball\n")
    folder, said = teach(keep_prompts=tmp_path / "rest.txt")
    assert any(line.startswith("drew 2 of 2 pictures") for line in said)
    assert facts(folder)["keep_rest"] == "0.5"
    _, said = teach(replace(SMALL, keep_rest=0.0), output="free")
    assert any("nothing holds on to the rest" in line for line in said)
    assert not any(line.startswith("drew") for line in said)


def test_few_and_small_pictures_are_remarked(teach, pictures: Path) -> None:
    for path in sorted(pictures.glob("*.png"))[1:]:
        path.unlink()
    Image.new("RGB", (64, 90)).save(pictures / "0.png")
    _, said = teach(replace(SMALL, steps=1))
    assert any("learnt by heart" in line for line in said)
    assert any("1 of 1 pictures are smaller than 128 pixels" in line for line in said)


def test_the_command_prints_the_folder_alone(teach, pictures: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "out"
    code = cli.execute(["train-lora", MODEL, str(pictures), "-o", str(output), "--steps", "2", "--rank", "2"])
    out, err = capfd.readouterr()
    assert code == 0 and out == f"{output}\n"
    assert "6 pictures: 6 encoded" in err
    code = cli.execute(["train-lora", MODEL, str(tmp_path / "nowhere"), "-o", str(output), "--json"])
    out, err = capfd.readouterr()
    assert code == 2 and json.loads(out)["error"]["code"] == "bad_input"


def test_the_flags_know_the_choices_of_layers() -> None:
    assert tuple(lora_training.LAYERS) == cli_train_lora.LAYERS
