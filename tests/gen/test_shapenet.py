"""Training on a folder in the published form: what is read, what is left out, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gen import cli, recipes, shapenet
from gen.errors import GenError
from gen.toy import models3d
from pipelines.dit3d import DiT3DPipeline
from pipelines.models.dit3d import SIZES
from pipelines.point_diffusion import PointDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chairs and mugs of the toy world as the published files have them, and some that are broken."""
    root = tmp_path_factory.mktemp("data") / "ShapeNetCore.v2.PC15k"
    shapes = models3d.shapes(3)
    for number, shape in zip(range(30), shapes, strict=False):
        if shape.family not in ("chair", "mug"):
            continue
        place = root / shapenet.CATEGORIES[shape.family] / ("val" if number >= 18 else "train")
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number:03d}.npy", models3d.cloud(shape, 15_000, number)[0])
    train = root / shapenet.CATEGORIES["chair"] / "train"
    whole = np.load(next(train.glob("*.npy")))
    bad = whole.copy()
    bad[7, 1] = np.nan
    np.save(train / "nan.npy", bad)
    np.save(train / "flat.npy", np.zeros((15_000, 3), np.float32))
    np.save(train / "few.npy", whole[:900])
    np.save(train / "wide.npy", whole.reshape(-1, 9))
    np.save(train / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (train / "cut.npy").write_bytes((train / "nan.npy").read_bytes()[:5000])
    (train / "empty.npy").write_bytes(b"")
    return root


def test_the_table_has_every_category_once() -> None:
    assert len(shapenet.CATEGORIES) == 55 and len(set(shapenet.CATEGORIES.values())) == 55
    assert shapenet.CATEGORIES["chair"] == "03001627" and shapenet.CATEGORIES["bookshelf"] == "02871439"


def test_broken_files_are_named_skipped_and_counted(folder: Path) -> None:
    found = shapenet.read(folder, ("chair", "mug"), "train")
    assert found.points.shape == (6, 10_000, 3) and found.points.dtype is torch.float32
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    reasons = dict(line.split(": ", 1) for line in found.broken)
    assert {Path(name).name for name in reasons} == {
        "nan.npy",
        "flat.npy",
        "few.npy",
        "wide.npy",
        "objects.npy",
        "cut.npy",
        "empty.npy",
    }
    by_name = {Path(name).stem: reason for name, reason in reasons.items()}
    assert "not finite" in by_name["nan"] and "one place" in by_name["flat"]
    assert "900 points" in by_name["few"] and "(5000, 9)" in by_name["wide"]


def test_training_and_testing_see_other_points_of_a_shape(folder: Path) -> None:
    train = shapenet.read(folder, ("mug",), "train")
    test = shapenet.read(folder, ("mug",), "train", test_points=True)
    whole = np.load(sorted((folder / shapenet.CATEGORIES["mug"] / "train").glob("*.npy"))[0])
    assert np.array_equal(train.points[0], whole[:10_000]) and np.array_equal(test.points[0], whole[10_000:])


def test_normalisation_is_one_mean_and_one_spread(folder: Path) -> None:
    points = shapenet.read(folder, ("chair", "mug"), "train").points
    mean, std = shapenet.statistics(points)
    assert mean == pytest.approx(points.reshape(-1, 3).mean(0).tolist(), abs=1e-5)
    assert std == pytest.approx(float(np.std(points.numpy().reshape(-1))), rel=1e-4)


def test_categories_are_found_and_wrong_ones_refused(folder: Path, tmp_path: Path) -> None:
    assert shapenet.find_categories(folder) == ("chair", "mug")
    assert shapenet.find_categories(folder, ["mug", "chair"]) == ("mug", "chair")
    for names, message in (
        (["chiar"], "no category 'chiar'"),
        (["lamp"], "has no lamp: its folder would be 03636649"),
    ):
        with pytest.raises(GenError, match=message):
            shapenet.find_categories(folder, names)
    with pytest.raises(GenError, match="no shapes in the form of"):
        shapenet.find_categories(tmp_path)
    with pytest.raises(GenError, match="has no shapes"):
        shapenet.read(folder, ("chair",), "test")


def test_airplanes_alone_get_their_own_noise() -> None:
    assert shapenet.build_scheduler(["airplane"]).config.beta_schedule == "warm0.1"
    assert shapenet.build_scheduler(["airplane", "car"]).config.beta_schedule == "linear"


def test_the_command_trains_stops_goes_on_and_leaves_a_pipeline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("GEN_TRAIN_DIR", str(tmp_path / "train"))
    tiny = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "patch_size": 4}
    monkeypatch.setitem(SIZES, "S/4", tiny)  # the real thing takes a minute a step
    command = ["train", "dit-3d", "--data", str(folder), "--set", "voxels=16", "--threads", "1"]
    for schedule in ({"steps": 3}, {"steps": 5, "evaluate_every": 0.0}):
        monkeypatch.setattr(recipes, "DIT3D_PUBLISHED", {**recipes.DIT3D_PUBLISHED, "batch": 4, **schedule})
        assert cli.execute(command) == 0
    said = capsys.readouterr()
    assert "train: 6 shapes, 7 files left out" in said.err and "goes on from step 3" in said.err
    output = Path(said.out.split()[-1])
    facts = json.loads((output / "toy.json").read_text())
    assert facts["steps"] == 5 and facts["categories"] == ["chair", "mug"] and len(facts["left_out"]) == 7
    pipeline = DiT3DPipeline.from_pretrained(output)
    assert isinstance(pipeline.scheduler, PointDiffusion) and pipeline.get_label_ids("mug") == [1]
    assert list(pipeline.mean) == pytest.approx(
        shapenet.statistics(shapenet.read(folder, ("chair", "mug"), "train").points)[0]
    )


def test_scores_are_measured_on_validation_shapes(folder: Path, tmp_path: Path) -> None:
    from pipelines.models.dit3d import DiT3DModel

    torch.manual_seed(0)
    network = DiT3DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=2,
    )
    categories = ("chair", "mug")
    validation = shapenet.read(folder, categories, "val", test_points=True)
    scheduler = shapenet.build_scheduler(categories)
    normalisation = shapenet.statistics(shapenet.read(folder, categories, "train").points)
    judged = shapenet.Sampler(validation, categories, normalisation, scheduler, count=4, steps=2)
    scores = judged(network.eval(), tmp_path)
    assert scores["CD_1nn_acc"] == 1.0  # noise is easily told from shapes
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dit-3d"], "learns from a folder"),
        (["dit-3d", "--data", "nowhere"], "no folder nowhere"),
        (["dit:toy", "--data", "."], "makes its own data"),
        (["dit-3d", "--set", "colour=red", "--data", "."], "no option 'colour'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.execute(["train", *arguments]) != 0
    assert message in capsys.readouterr().err
