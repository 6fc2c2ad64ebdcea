"""The task of dit:toy: its classes, what it learns from, and what it leaves behind."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from gen import train
from gen.toy import dit as toy_dit
from gen.toy import words, world
from gen.toy.render import render
from pipelines.dit import DiTPipeline
from pipelines.models.dit import DiTTransformer2DModel
from pipelines.models.pixart import PixArtTransformer2DModel
from weights import store

WEIGHTS = Path(store.__file__).parent
TINY = toy_dit.transformer_config(layers=2, heads=2, head_dim=16)


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return list(itertools.islice(toy_dit.scenes(1), 64))


def tiny_task(scenes: list[world.Scene], spread: float = 0.5) -> toy_dit.ClassTask:
    """Two layers of width 32, and latents that are nearly constant and tell the colour by their channels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**TINY)
    toy_dit.initialise(transformer)
    code = torch.randn(len(world.COLOURS), 4)
    colours = torch.tensor([world.COLOURS.index(scene.things[0].colour) for scene in scenes])
    latents = code[colours][:, :, None, None] + 0.2 * torch.randn(len(scenes), 4, 16, 16)
    owners = torch.full((len(scenes), 8, 8), -1, dtype=torch.int8)
    owners[:, 4:] = 0
    return toy_dit.ClassTask(
        transformer, latents.half(), owners, scenes, seed=0, probe_block=0, spread=spread
    )


def test_every_pair_is_a_class_and_no_name_belongs_to_two() -> None:
    names = toy_dit.id2label()
    assert list(names) == list(range(88)) and toy_dit.NULL == 88
    assert names[1] == "red cube, red box, red block, " + ", ".join(
        f"{colour} {shape}" for colour in ("crimson", "scarlet") for shape in ("cube", "box", "block")
    )
    each = [name for text in names.values() for name in text.split(", ")]
    assert len(each) == len(set(each))
    for number, (colour, shape) in enumerate(toy_dit.CLASSES):
        assert names[number].split(", ")[0] == f"{colour} {shape}"
        spoken = {f"{c} {s}" for c in words.COLOUR_WORDS[colour] for s in words.SHAPE_WORDS[shape]}
        assert spoken <= set(names[number].split(", "))


def test_scenes_show_one_thing_and_follow_from_seed_and_number() -> None:
    first = list(itertools.islice(toy_dit.scenes(3), 600))
    assert list(itertools.islice(toy_dit.scenes(3, start=500), 100)) == first[500:]
    assert next(toy_dit.scenes(4)) != first[0]
    assert {(len(s.things), s.relation) for s in first} == {(1, "alone")}
    shown = {toy_dit.class_of(s.things[0]) for s in first}
    assert len(shown) > 80 and {toy_dit.CLASSES[n] for n in shown} & world.HELD_OUT


def test_a_class_starts_as_the_sum_of_its_colour_and_shape(scenes: list[world.Scene]) -> None:
    embedding = tiny_task(scenes).module.transformer.class_embedder.embedding_table
    parts = embedding.parametrizations.weight[0]
    for number, (colour, shape) in enumerate(toy_dit.CLASSES):
        expected = parts.colour[world.COLOURS.index(colour)] + parts.shape[world.SHAPES.index(shape)]
        assert torch.equal(embedding.weight[number], expected)
    assert not embedding.weight[toy_dit.NULL].any()


def test_the_task_learns_what_a_class_looks_like(scenes: list[world.Scene]) -> None:
    task = tiny_task(scenes)
    optimizer = task.optimizer(1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        task.module.train()
        loss, parts = task.loss(16, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert set(parts) == {"v", "probe"}
    assert task.patches[3, 40].tolist() == [
        world.SHAPES.index(scenes[3].things[0].shape),
        world.COLOURS.index(scenes[3].things[0].colour),
    ]

    def error(labels: torch.Tensor) -> float:
        task.labels = labels
        task.seed_data("the same pictures and noise each time")
        with torch.no_grad():
            return float(task.loss(64, 0.0)[1]["v"])

    right = task.labels
    assert error(right) < 0.9 * error((right + 8) % 88)  # the next colour instead


def test_products_in_bfloat16_hardly_change_the_loss_and_its_gradients(scenes: list[world.Scene]) -> None:
    found = []
    for mixed in (False, True):
        task = tiny_task(scenes)
        task.module.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss, _ = task.loss(32, 0.0)
        loss.backward()
        slopes = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
        assert loss.dtype == slopes.dtype == torch.float32
        found.append((loss.item(), slopes))
    (plain, exact), (rounded, near) = found
    assert abs(plain - rounded) < 0.01 * plain
    assert torch.cosine_similarity(exact, near, dim=0) > 0.99


def test_a_tenth_of_the_labels_is_that_of_no_class_and_trains_its_row(scenes: list[world.Scene]) -> None:
    task = tiny_task(scenes)
    picks = torch.arange(64).repeat(64)
    labels = task.draw_labels(picks)
    none = labels == toy_dit.NULL
    assert 0.08 < none.float().mean() < 0.12
    assert torch.equal(labels[~none], task.labels[picks][~none])
    optimizer = task.optimizer(1e-2)
    for _ in range(4):  # modulation is silent at the start, so that classes have no say in the first steps
        optimizer.zero_grad()
        task.module.train()
        task.loss(64, 0.0)[0].backward()
        optimizer.step()
    embedding = task.module.transformer.class_embedder.embedding_table
    assert embedding.weight[toy_dit.NULL].any()


def test_it_starts_as_pixart_without_its_text() -> None:
    torch.manual_seed(0)
    size = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 16}
    pixart = PixArtTransformer2DModel(
        **size, out_channels=8, cross_attention_dim=32, caption_channels=8, use_additional_conditions=False
    ).eval()
    for block in pixart.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    transformer = DiTTransformer2DModel(**TINY).eval()
    toy_dit.initialise_from(transformer, pixart)
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([3, 200, 600, 990])
    with torch.no_grad():
        theirs = pixart(x, torch.randn(4, 5, 8), t).sample[:, :4]
        ours = transformer(x, t, torch.tensor([0, 50, 87, toy_dit.NULL])).sample
    # the modulation behind the last block is fitted; all else is exact
    assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()
    deeper = DiTTransformer2DModel(**{**TINY, "num_layers": 3})
    with pytest.raises(ValueError, match="a PixArt with num_layers 2 is no start for a DiT with 3"):
        toy_dit.initialise_from(deeper, pixart)


def test_a_stopped_run_goes_on_with_its_colours_and_shapes(scenes: list[world.Scene], tmp_path: Path) -> None:
    first, second = tiny_task(scenes), tiny_task(scenes, spread=0.0)
    train.fit(first, train.Schedule(steps=6, batch=8, lr=1e-2), tmp_path)
    said: list[str] = []
    facts = train.fit(second, train.Schedule(steps=6, batch=8, lr=1e-2), tmp_path, report=said.append)
    assert said == ["dit: goes on from step 6"] and facts["images"] == 48
    for key, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[key], value), key
    more = train.fit(second, train.Schedule(steps=8, batch=8, lr=1e-2), tmp_path, report=said.append)
    assert more["step"] == 8


def test_exported_weights_draw_a_class_by_its_name(
    scenes: list[world.Scene], tmp_path: Path, tiny_toy_folder: Path
) -> None:
    shutil.copytree(tiny_toy_folder / "vae", tmp_path / "vae")
    task = tiny_task(scenes)
    with torch.no_grad():  # silent weights would draw all classes alike
        for p in task.module.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    trained = task.module.transformer.eval()
    x, labels = torch.randn(2, 4, 16, 16), torch.tensor([5, toy_dit.NULL])
    with torch.no_grad():
        expected = trained(x, 400, labels).sample
        found = toy_dit.plain(trained)(x, 400, labels).sample
    torch.testing.assert_close(found, expected)  # not equal: training attends by another function
    output = tmp_path / "toy" / "dit"
    toy_dit.export(trained, tmp_path, output, {"recipe": "dit:toy"})
    assert next(trained.parameters()).dtype is torch.float32  # training could go on
    store.verify(output)
    for path in output.rglob("*.safetensors"):
        header = store.read_header(path)
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}
    pipeline = DiTPipeline.from_pretrained(output, torch_dtype=torch.float32)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.transformer.config.null_label == toy_dit.NULL
    assert pipeline.get_label_ids(["crimson box", "Red Cube", "ebony gem"]) == [1, 1, 87]

    def drawn(label: int | str) -> torch.Tensor:
        return toy_dit.draw(pipeline, [label], [7], steps=3)

    by_name = drawn("crimson box")
    assert by_name.shape == (1, 3, 128, 128) and torch.equal(by_name, drawn(1))
    assert not torch.equal(by_name, drawn(2))


def test_the_network_of_the_recipe_is_small_enough_to_ship() -> None:
    """Of 20 MB in float16, beside 5.5 MB of autoencoder."""
    with torch.device("meta"):
        network = DiTTransformer2DModel(**toy_dit.transformer_config(layers=6, heads=6, head_dim=32))
    assert 2 * sum(p.numel() for p in network.parameters()) < 14_000_000


def test_marks_tell_right_pictures_from_wrong_ones(scenes: list[world.Scene]) -> None:
    from gen.toy.judge import load_judge

    judge = load_judge(WEIGHTS / "toy" / "judge")
    pictures = render(scenes[:32])
    labels = [toy_dit.class_of(scene.things[0]) for scene in scenes[:32]]
    marks = toy_dit.mark(judge, pictures, labels)
    assert min(marks.right, marks.shape, marks.colour) >= 90
    assert set(marks.by_class) == {" ".join(toy_dit.CLASSES[n]) for n in labels}
    other_colour = toy_dit.mark(judge, pictures, [(n + 8) % 88 for n in labels])
    assert other_colour.right <= 10 and other_colour.shape == marks.shape and other_colour.colour <= 10
    labels = toy_dit.even_labels(512)
    assert {labels.count(n) for n in range(88)} == {5, 6}


def test_the_sampler_leaves_a_sheet_and_what_came_out_wrong(
    scenes: list[world.Scene], tmp_path: Path, tiny_toy_folder: Path
) -> None:
    shutil.copytree(tiny_toy_folder / "vae", tmp_path / "vae")
    task = tiny_task(scenes)
    task.judged = toy_dit.Sampler(tmp_path, count=3, steps=2)
    task.module.eval()
    found = task.evaluate(tmp_path)
    assert set(found) == {"class", "shape", "colour"}
    assert {"samples.png", "wrong.json"} <= {path.name for path in tmp_path.iterdir()}
