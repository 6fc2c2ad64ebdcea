"""The judge learns from renders, and its verdicts follow what is seen, not what is hoped for."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from gen import evaluate
from gen.toy import world
from gen.toy.judge import (
    CELL,
    Judge,
    JudgeTask,
    Seen,
    augment,
    holds,
    load_judge,
    read,
    save_judge,
    targets,
    verdict,
)
from gen.toy.render import render
from gen.toy.words import Caption, describe
from gen.toy.world import Camera


def _seen(shape: str, colour: str, column: float, row: float = 64.0, y: float = 0.0, z: float = 0.6) -> Seen:
    return Seen(
        shape=shape, colour=colour, size="large", material="matte", spot=(column, row),
        place=((column - 64) / 36, y, z), confidence=0.9,
    )  # fmt: skip


def _caption(relation: str, *things: tuple[str, str]) -> Caption:
    said = tuple({"shape": s, "colour": c, "size": None, "material": None} for c, s in things)
    return Caption(text="", relation=relation, things=said)


PAIR = _caption("left of", ("red", "cube"), ("blue", "sphere"))


def test_a_right_picture_passes() -> None:
    v = verdict(PAIR, [_seen("sphere", "blue", 90), _seen("cube", "red", 40)])
    assert v.count and v.bound and v.placed and v.extras


@pytest.mark.parametrize(
    ("seen", "bound", "placed"),
    [
        ([_seen("cube", "blue", 40), _seen("sphere", "red", 90)], False, False),  # colours swapped
        ([_seen("cube", "red", 90), _seen("sphere", "blue", 40)], True, False),  # places swapped
        ([_seen("cube", "red", 40)], False, False),  # one is missing
        ([_seen("cube", "red", 40), _seen("sphere", "blue", 90), _seen("cone", "red", 64)], False, False),
        ([_seen("cube", "red", 40), _seen("cone", "blue", 90)], False, False),  # a wrong shape
        ([], False, False),
    ],
)
def test_a_wrong_picture_fails(seen: list[Seen], bound: bool, placed: bool) -> None:
    v = verdict(PAIR, seen)
    assert (v.bound, v.placed) == (bound, placed)


def test_size_and_material_count_only_where_said() -> None:
    seen = [_seen("cube", "red", 64)]
    said = {"shape": "cube", "colour": "red", "size": None, "material": None}
    assert verdict(Caption(text="", relation="alone", things=(said,)), seen).extras
    assert not verdict(Caption(text="", relation="alone", things=({**said, "size": "small"},)), seen).extras


def test_three_things_must_stand_from_left_to_right() -> None:
    caption = _caption("row", ("red", "cube"), ("blue", "sphere"), ("green", "cone"))
    right = [_seen("cube", "red", 20), _seen("sphere", "blue", 60), _seen("cone", "green", 100)]
    assert verdict(caption, right[::-1]).placed
    swapped = [replace(right[0], spot=(60, 64)), replace(right[1], spot=(20, 64)), right[2]]
    assert verdict(caption, swapped).bound and not verdict(caption, swapped).placed


@pytest.mark.parametrize("relation", world.RELATIONS[1:-1])
def test_relations_of_real_scenes_hold_and_their_opposites_do_not(relation: str) -> None:
    rng = random.Random(1)
    for _ in range(40):
        scene = world.sample_scene(rng, relation=relation)
        spots = Camera().project(torch.tensor([t.centre for t in scene.things]), 128)[:, :2].tolist()
        a, b = (
            replace(_seen(t.shape, t.colour, s[0]), spot=tuple(s), place=t.centre)
            for t, s in zip(scene.things, spots, strict=True)
        )  # fmt: skip
        assert holds(relation, a, b)
        assert not holds(relation, b, a)


def test_targets_lie_where_the_things_are_seen() -> None:
    scenes = list(itertools.islice(world.scenes(2, which="all"), 20))
    _, owner = render(scenes, return_owner=True)
    truth = targets(scenes)
    rows = iter(zip(truth["scene"].tolist(), truth["row"].tolist(), truth["column"].tolist(), strict=True))
    hits = total = 0
    for i, scene in enumerate(scenes):
        for k in range(len(scene.things)):
            b, row, column = next(rows)
            assert b == i
            cell = owner[i, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            hits += bool((cell == k).any())
            total += 1
    assert hits >= 0.85 * total  # a torus has a hole, and some things stand behind others


def test_the_judge_learns_to_find_and_name_things() -> None:
    scenes = list(itertools.islice(world.scenes(3, which="all"), 16))
    pictures = (render(scenes) * 255).round().to(torch.uint8)
    task = JudgeTask(pictures, scenes, seed=0)
    optimizer = task.optimizer(3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = task.loss(8, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_weights_survive_the_trip_to_disk(tmp_path) -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    save_judge(judge, tmp_path, {"steps": 1})
    x = augment(torch.rand(2, 3, 128, 128))
    again = load_judge(tmp_path)(x)
    assert (again - judge(x)).abs().max() < 0.02  # float16 on disk
    assert len(read(judge, x, threshold=0.0)) == 2


def test_prompts_are_fixed_varied_and_held_out() -> None:
    asked = evaluate.prompts(64)
    assert asked == evaluate.prompts(64) and asked[:16] == evaluate.prompts(16)
    shares = {g: sum(p.group == g for p in asked) for g in ("one", "two", "three", "held-out")}
    assert shares == {"one": 20, "two": 24, "three": 8, "held-out": 12}
    for p in asked:
        pairs = {(t["colour"], t["shape"]) for t in p.caption.things}
        assert (pairs <= world.HELD_OUT) == (p.group == "held-out")
        assert len(p.caption.things) == {"one": 1, "two": 2, "three": 3, "held-out": 1}[p.group]
    assert len({p.caption.relation for p in asked if p.group == "two"}) == 5


def test_scores_count_what_the_judge_reads() -> None:
    """By the shipped judge, renders of the very scenes that are asked for score high, shuffled ones low."""
    from weights import store

    folder = store.find("judge-toy")
    assert folder is not None, "no judge: gen train judge:toy --output weights/toy/judge"
    judge = load_judge(folder)
    scenes, asked = [], []
    for n in range(64):
        rng = random.Random(f"score:{n}")
        scene = world.sample_scene(rng, relation=("alone", "left of", "behind", "on top of")[n % 4])
        caption = describe(scene, rng)
        scenes.append(scene)
        group = "one" if n % 4 == 0 else "two"
        asked.append(evaluate.Prompt(text=caption.text, caption=caption, group=group))
    pictures = torch.cat([render(scenes[i : i + 32]) for i in (0, 32)])
    good = evaluate.score_pictures(judge, pictures, asked)
    assert good["one object"] >= 90 and good["two objects"] >= 85 and good["relation"] >= 80
    bad = evaluate.score_pictures(judge, pictures.roll(4, 0), asked)
    assert bad["one object"] <= 25 and bad["two objects"] <= 15
