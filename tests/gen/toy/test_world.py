"""The toy world: scenes are what their labels say, from any side, and the same for everybody."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from gen.toy import words, world
from gen.toy.render import render
from gen.toy.solids import SOLIDS
from gen.toy.words import describe
from gen.toy.world import Camera, Scene, Thing


def _scenes(count: int, seed: int = 11, which: str = "all") -> list[Scene]:
    return list(itertools.islice(world.scenes(seed, which=which), count))


def _alone(**changes: object) -> Scene:
    thing = Thing(shape="sphere", colour="red", size="large", material="matte", position=(0.0, 0.0, 0.0))
    return Scene(things=(replace(thing, **changes),), relation="alone", background="grey")


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(world.SHAPES) >= 8
    assert len(world.COLOURS) >= 10
    assert len(world.SIZES) == 3
    assert len(world.MATERIALS) == 2
    assert len(world.BACKGROUNDS) >= 6
    assert {"left of", "right of", "in front of", "behind", "on top of"} <= set(world.RELATIONS)
    assert {len(s.things) for s in _scenes(200)} == {1, 2, 3}


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    again = list(itertools.islice(world.scenes(11, start=3, which="all"), 4))
    assert again == _scenes(7)[3:]
    assert _scenes(3, seed=12) != _scenes(3)


def test_rendering_is_deterministic_and_does_not_depend_on_the_batch() -> None:
    scenes = _scenes(6)
    together = render(scenes)
    assert torch.equal(together, render(scenes))
    alone = torch.cat([render([s]) for s in scenes])
    assert (together - alone).abs().max() < 2e-3  # windows are shared, sums are ordered differently
    assert together.min() >= 0 and together.max() <= 1


@pytest.mark.parametrize("which", ["seen", "held_out"])
def test_held_out_pairs_stay_apart(which: str) -> None:
    pairs = {(t.colour, t.shape) for s in _scenes(300, which=which) for t in s.things}
    assert (pairs <= world.HELD_OUT) == (which == "held_out")
    assert bool(pairs & world.HELD_OUT) == (which == "held_out")
    # every colour and every shape is still seen in training
    colours, shapes = zip(*world.colour_shape_pairs("seen"), strict=True)
    assert set(colours) == set(world.COLOURS) and set(shapes) == set(world.SHAPES)


@pytest.mark.parametrize("relation", world.RELATIONS[1:-1])
def test_positions_make_the_relation_true(relation: str) -> None:
    rng = random.Random(3)
    for _ in range(50):
        first, second = world.sample_scene(rng, relation=relation).things
        (ax, ay, az), (bx, by, bz) = first.centre, second.centre
        assert {
            "left of": ax < bx - 0.5, "right of": ax > bx + 0.5, "in front of": ay < by - 0.5,
            "behind": ay > by + 0.5, "on top of": az > bz + 0.3 and abs(ax - bx) < 0.1,
        }[relation]  # fmt: skip


@pytest.mark.parametrize("colour", world.COLOURS)
def test_a_thing_shows_its_colour(colour: str) -> None:
    picture, owner = render([_alone(colour=colour)], return_owner=True)
    seen = picture[0][:, owner[0] == 0].mean(1)
    paints = torch.tensor([world.PAINT[c] for c in world.COLOURS])
    if colour in ("brown", "black", "white"):  # told apart by brightness
        distance = (paints - seen).norm(dim=1)
    else:  # by hue: the direction from grey
        hues = paints[:-2] - paints[:-2].mean(1, keepdim=True)
        distance = 1 - torch.cosine_similarity(hues, (seen - seen.mean())[None], dim=1)
    nearest = world.COLOURS[int(distance.argmin())]
    assert nearest == colour or {nearest, colour} in ({"orange", "brown"}, {"red", "brown"}, {"pink", "red"})


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_stands_on_the_ground_and_fits_its_bounds(shape: str) -> None:
    solid = SOLIDS[shape]
    axis = torch.linspace(-1.6, 1.6, 81)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = solid.distance(x, y, z) <= 0
    points = torch.stack([x[inside], y[inside], z[inside]], dim=-1)
    assert points.norm(dim=1).max() <= solid.bound + 0.02
    bottom = -solid.height * solid.centre
    assert points[:, 2].min() == pytest.approx(bottom, abs=0.06)
    assert points[:, 2].max() == pytest.approx(bottom + solid.height, abs=0.06)


def test_size_and_material_show() -> None:
    areas = []
    for size in world.SIZES:
        _, owner = render([_alone(size=size)], return_owner=True)
        areas.append(int((owner == 0).sum()))
    assert areas[0] < 0.75 * areas[1] and areas[1] < 0.75 * areas[2]
    matte, shiny = render([_alone(material=m) for m in world.MATERIALS])
    assert shiny.max() > matte.max() - 0.05 and (shiny - matte).abs().mean() > 0.003


def test_the_same_scene_can_be_seen_from_any_side() -> None:
    rng = random.Random(0)
    scene = world.sample_scene(rng, relation="left of")
    counts = []
    for azimuth in (0, 90, 180, 270):
        camera = Camera(azimuth=azimuth)
        _, owner = render([scene], camera=camera, return_owner=True)
        for k, thing in enumerate(scene.things):
            column, row, _ = camera.project(torch.tensor(thing.centre), 128).tolist()
            ys, xs = (owner[0] == k).nonzero(as_tuple=True)
            if len(xs) > 150:  # not hidden by the other
                counts.append(len(xs))
                assert abs(xs.float().mean() - column) < 12 and abs(ys.float().mean() - row) < 12
    assert len(counts) >= 5
    left = [Camera(azimuth=a).project(torch.tensor(scene.things[0].centre), 128)[0] for a in (0, 180)]
    right = [Camera(azimuth=a).project(torch.tensor(scene.things[1].centre), 128)[0] for a in (0, 180)]
    assert left[0] < right[0] and left[1] > right[1]


def test_things_cast_soft_shadows() -> None:
    scene = _alone()
    shaded = render([scene])[0].mean(0)
    empty = render([Scene(things=(), relation="alone", background="grey")])[0].mean(0)
    _, owner = render([scene], return_owner=True)
    drop = (empty - shaded)[owner[0] < 0]
    assert drop.max() > 0.1  # there is a shadow
    assert ((drop > 0.02) & (drop < 0.08)).sum() > 100  # with a soft edge


def test_captions_tell_the_truth_in_many_ways() -> None:
    scene = world.sample_scene(random.Random(5), relation="behind")
    captions = [describe(scene, random.Random(n)) for n in range(200)]
    assert len({c.text for c in captions}) > 120
    for caption in captions:
        assert caption.relation == "behind"
        for thing, said in zip(scene.things, caption.things, strict=True):
            assert said["shape"] == thing.shape and said["colour"] == thing.colour
            assert said["size"] in (None, thing.size) and said["material"] in (None, thing.material)
            assert any(word in caption.text for word in words.SHAPE_WORDS[thing.shape])
    assert captions[0] == describe(scene, random.Random(0))
    articles = [c.text for c in captions]
    assert not any(f" a {vowel}range" in t for t in articles for vowel in "o")
