"""The task of dit-3d:toy learns, goes on after a stop, and leaves a pipeline that draws clouds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen import train
from gen.toy import dit3d as toy_dit3d
from gen.toy import models3d
from pipelines.dit3d import DiT3DPipeline
from pipelines.models.dit3d import DiT3DModel
from weights import store

TINY = toy_dit3d.transformer_config(layers=2, heads=2, head_dim=24, voxels=8, patch=4)


def tiny_task() -> toy_dit3d.CloudTask:
    torch.manual_seed(0)
    transformer = DiT3DModel(**TINY)
    toy_dit3d.initialise(transformer)
    clouds = [
        models3d.cloud(shape, 128, k)[0] for k, shape in zip(range(36), models3d.shapes(5), strict=False)
    ]
    points = torch.stack([torch.from_numpy(points) for points in clouds]).half()
    return toy_dit3d.CloudTask(transformer, points, torch.arange(36) % 6, seed=0)


def test_the_task_learns_what_a_family_looks_like() -> None:
    task = tiny_task()
    right = task.labels

    def error(labels: torch.Tensor) -> float:
        task.labels = labels
        task.seed_data("the same clouds and noise each time")
        with torch.no_grad():
            return float(task.loss(36, 0.0)[0])

    before = error(right)
    optimizer = task.optimizer(1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(16, 0.0)[0].backward()
        optimizer.step()
    # Most of the noise along a surface cannot be told from it: the error stays near 1
    assert error(right) < 0.95 * before
    assert error(right) < error((right + 1) % 6)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    first, second = tiny_task(), tiny_task()
    train.fit(first, train.Schedule(steps=4, batch=8, lr=1e-2), tmp_path, report=lambda _: None)
    facts = train.fit(second, train.Schedule(steps=4, batch=8, lr=1e-2), tmp_path, report=lambda _: None)
    assert facts["images"] == 32
    for key, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[key], value), key


def test_exported_weights_draw_a_family_in_the_units_of_the_data(tmp_path: Path) -> None:
    task = tiny_task()
    output = tmp_path / "toy" / "dit-3d"
    toy_dit3d.export(task.module.eval(), task.normalisation, output, {"recipe": "dit-3d:toy"})
    assert next(task.module.parameters()).dtype is torch.float32  # training could go on
    store.verify(output)
    pipeline = DiT3DPipeline.from_pretrained(output, torch_dtype=torch.float32)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.get_label_ids(["Chair", "mug"]) == [2, 4]
    mean, std = task.normalisation
    assert list(pipeline.mean) == pytest.approx(mean) and pipeline.std == pytest.approx(std)
    network, (again, spread) = toy_dit3d.load_shipped(output)
    assert again == pytest.approx(mean) and spread == pytest.approx(std)
    assert network.config == pipeline.transformer.config
    clouds = toy_dit3d.draw(pipeline, [2, 4, 2], [7, 8, 7], steps=2, batch=2)
    assert clouds.shape == (3, toy_dit3d.POINTS, 3) and clouds.isfinite().all()
    torch.testing.assert_close(clouds[0], clouds[2], rtol=1e-3, atol=1e-4)  # the seed decides, not the batch
    toy_dit3d.save_sheet(clouds, tmp_path / "sheet.png", columns=2)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
