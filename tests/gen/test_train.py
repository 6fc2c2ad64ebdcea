"""The training loop and its tasks: they learn, they resume, and two processes are as good as one."""

import itertools
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gen import recipes, train
from gen.errors import GenError
from gen.optim import MuonAdamW, orthogonalise, split_parameters
from gen.toy import pixart as toy_pixart
from gen.toy import world
from gen.toy.render import render
from gen.toy.words import describe
from pipelines.models.pixart import PixArtTransformer2DModel


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return list(itertools.islice(world.scenes(1), 24))


@pytest.fixture(scope="module")
def pictures(scenes: list[world.Scene]) -> torch.Tensor:
    return (render(scenes) * 255).round().to(torch.uint8)


class Line:
    """The smallest real task: a line through points."""

    name = "line"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(16, 16)
        self.keys: list[str] = []

    def seed_data(self, key: str) -> None:
        self.keys.append(key)
        self.rng = toy_pixart.seeded_generator(key)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return MuonAdamW(*split_parameters(self.module, ("weight",)), lr=lr)

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = torch.randn(batch, 16, generator=self.rng)
        return (self.module(x) - 2 * x.flip(-1)).square().mean(), {}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return {}


SCHEDULE = train.Schedule(steps=60, batch=32, lr=0.05, warmup=5, ema=0.9)


def test_training_lowers_the_loss_and_leaves_a_log(tmp_path: Path) -> None:
    task = Line()
    before = task_loss(task)
    facts = train.fit(task, SCHEDULE, tmp_path)
    assert facts["step"] == 60 and facts["images"] == 60 * 32
    assert task_loss(task) < 0.5 * before
    line = json.loads((tmp_path / "line.log.jsonl").read_text().splitlines()[0])
    assert line["step"] == 5 and line["loss"] > 0


def task_loss(task: Line) -> float:
    task.seed_data("test")
    with torch.no_grad():
        return float(task.loss(256, 0)[0])


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Line()
    train.fit(first, train.Schedule(steps=30, batch=32, lr=0.05, warmup=5, cooldown=0.0, ema=0.9), tmp_path)
    with safe_open(tmp_path / "line.safetensors", "pt") as file:
        live, momentum = file.get_tensor("model.weight"), file.get_tensor("optimizer.weight|momentum")
        assert json.loads(file.metadata()["facts"])["step"] == 30
    second = Line()
    optimizer = second.optimizer(0.05)
    average = train.Averaged(second.module, 0.9)
    facts = train.load_checkpoint(tmp_path / "line.safetensors", second.module, average.state, optimizer)
    assert facts["step"] == 30
    assert torch.equal(second.module.weight, live)
    assert torch.equal(optimizer.state[second.module.weight]["momentum"], momentum)
    third = Line()
    facts = train.fit(third, SCHEDULE, tmp_path)
    assert facts["step"] == 60
    assert third.keys[-1] == "30:0"  # new random numbers, not those of the first 30 steps again
    assert task_loss(third) < task_loss(first)


def test_minutes_bound_a_run_and_the_rate_cools_down(tmp_path: Path) -> None:
    schedule = train.Schedule(steps=10**9, batch=8, lr=0.01, warmup=5)
    facts = train.fit(Line(), schedule, tmp_path, minutes=0.02)
    assert 0 < facts["step"] < 10**9 and facts["seconds"] < 10
    assert train.rate(schedule, 100, 0.5) == pytest.approx(0.01)
    assert train.rate(schedule, 100, 0.99) < 0.001
    assert train.rate(schedule, 0, 0.0) == pytest.approx(0.002)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    task = Line()
    with torch.no_grad():
        task.module.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="line: the loss is nan at step 5"):
        train.fit(task, SCHEDULE, tmp_path)


def test_ctrl_c_and_sigterm_finish_the_step_and_keep_the_work(tmp_path: Path) -> None:
    class Told(Line):
        def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch, progress)

    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train.fit(Told(), train.Schedule(steps=10**6, batch=8, lr=0.01), tmp_path, report=said.append)
    assert "stopped at step" in said[-1]
    with safe_open(tmp_path / "line.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"])["step"] == 7
    assert signal.getsignal(signal.SIGTERM) == before


def _pair(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    task = Line()
    train.fit(task, SCHEDULE, Path(folder))
    torch.save({"weight": task.module.weight.detach()}, f"{folder}/weight{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_stay_equal_and_learn(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    mp.start_processes(_pair, (str(tmp_path),), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"weight{r}.pt", weights_only=True)["weight"] for r in (0, 1))
    assert torch.equal(one, two)
    wanted = 2 * torch.eye(16).flip(0)
    assert (one - wanted).norm() < 0.5 * wanted.norm()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 96), (2, 96, 24)])
def test_muon_updates_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    # those near zero need more than five iterations; the bulk must be there
    assert values.quantile(0.1) > 0.5 and values.max() < 1.3


def test_autoencoder_task_learns_and_latents_are_normalised(pictures: torch.Tensor) -> None:
    owners = torch.zeros(len(pictures), 8, 8, dtype=torch.int8)
    task = toy_pixart.AutoencoderTask(pictures, owners, seed=0, held=4)
    optimizer = task.optimizer(4e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss, parts = task.loss(8, 0.9 if step == 11 else 0.0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        assert torch.isfinite(parts["psnr"])
    assert losses[10] < 0.8 * losses[0]
    before = task.module.decode(task.module.encode(pictures[:4].float() / 127.5 - 1).latent_dist.mean).sample
    toy_pixart.normalise_latents(task.module, pictures)
    latents = toy_pixart.encode_pictures(task.module, pictures).float()
    assert latents.mean((0, 2, 3)).abs().max() < 0.02
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.02
    after = task.module.decode(latents[:4]).sample
    assert (after - before).abs().max() < 0.02  # float16 latents


def test_a_decoder_is_trained_for_latents_that_stay(pictures: torch.Tensor) -> None:
    torch.manual_seed(1)
    owners = torch.zeros(len(pictures), 8, 8, dtype=torch.int8)
    start = toy_pixart.build_autoencoder()
    latents = toy_pixart.encode_pictures(start, pictures[:2])
    task = toy_pixart.AutoencoderTask(pictures, owners, seed=0, held=4, decoder_of=start)
    assert task.name == "decoder"
    optimizer = task.optimizer(4e-3)
    before = task.module.decoder.conv_out.weight.clone()
    loss, _ = task.loss(4, 0.0)
    loss.backward()
    optimizer.step()
    assert not torch.equal(task.module.decoder.conv_out.weight, before)
    after = toy_pixart.encode_pictures(task.module, pictures[:2])
    assert (after - latents).abs().max() < 1e-3  # another memory format rounds otherwise


def test_a_run_remembers_what_it_started_from(tmp_path: Path) -> None:
    shipped, work = tmp_path / "shipped", tmp_path / "work"
    shipped.mkdir()
    work.mkdir()
    (shipped / "toy.json").write_text('{"steps": 5}')
    assert recipes.read_facts(recipes._starting_point(work, shipped)) == {"steps": 5}
    (shipped / "toy.json").write_text('{"steps": 9}')
    assert recipes.read_facts(recipes._starting_point(work, shipped)) == {"steps": 5}
    other = tmp_path / "fresh"
    other.mkdir()
    assert recipes._starting_point(other, None) is None
    assert recipes._starting_point(other, shipped) is None  # it began from nothing, and stays so


def test_text_task_learns_and_labels_are_right() -> None:
    scene = world.sample_scene(random.Random(2), relation="right of")
    caption = describe(scene, random.Random(2))
    labels = toy_pixart.caption_labels([caption])[0]
    shape_of_right = labels[toy_pixart.ROLES.index("right")]
    assert world.SHAPES[shape_of_right - 1] == scene.things[0].shape
    colour_of_left = labels[len(toy_pixart.ROLES) + toy_pixart.ROLES.index("left")]
    assert world.COLOURS[colour_of_left - 1] == scene.things[1].colour

    task = toy_pixart.TextTask(toy_pixart.build_tokenizer(), seed=0)
    optimizer = task.optimizer(2e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = task.loss(16, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_tokenizer_knows_every_word_of_the_grammar() -> None:
    tokenizer = toy_pixart.build_tokenizer()
    assert tokenizer("").input_ids == [1]
    letters = {tokenizer.convert_tokens_to_ids(c) for c in "abcdefghijklmnopqrstuvwxyz"}
    for n, scene in enumerate(itertools.islice(world.scenes(4, which="all"), 200)):
        text = describe(scene, random.Random(n)).text
        assert not letters & set(tokenizer(text).input_ids), text
    unknown = tokenizer("zebra").input_ids
    assert tokenizer.unk_token_id not in unknown and len(unknown) > 3


def test_transformer_task_learns_with_its_probe(scenes: list[world.Scene]) -> None:
    torch.manual_seed(0)
    config = toy_pixart.transformer_config(2, 2, 16, 192)
    transformer = PixArtTransformer2DModel(**config)
    toy_pixart.initialise(transformer)
    tokenizer = toy_pixart.build_tokenizer()
    reader = toy_pixart.TextReader(len(tokenizer), layers=1)
    owners = torch.zeros(len(scenes), 8, 8, dtype=torch.int8)
    owners[:, :4] = -1
    latents = torch.randn(len(scenes), 4, 16, 16).half()
    task = toy_pixart.TransformerTask(
        transformer, reader.encoder, tokenizer, latents, owners, scenes, seed=0, probe_block=0
    )
    assert task.patches.shape == (len(scenes), 64, 2)
    assert (task.patches[:, :32, 0] == len(world.SHAPES)).all()  # ground
    assert task.patches[3, 40, 0] == world.SHAPES.index(scenes[3].things[0].shape)
    optimizer = task.optimizer(1e-2)
    losses = []
    for _ in range(90):
        optimizer.zero_grad()
        task.module.train()
        loss, parts = task.loss(16, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(parts) == {"v", "probe"}
    assert all(p.grad is None for p in reader.encoder.parameters())


def test_unknown_recipes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="no recipe 'pixart'"):
        recipes.start("pixart", output=tmp_path)
