"""The tasks of pixart-delta:toy: what the student is told, that both learn, and what they leave behind."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from gen import train
from gen.toy import delta as toy_delta
from gen.toy import pixart as toy_pixart
from gen.toy import world
from gen.toy.denoising import BETAS
from gen.toy.render import render
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import PixArtControlNet
from pipelines.pixart_delta import SIGMA, PixArtDeltaPipeline
from weights import store


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return list(itertools.islice(world.scenes(1), 24))


@pytest.fixture
def captions(scenes: list[world.Scene]) -> toy_pixart.Captions:
    torch.manual_seed(1)
    tokenizer = toy_pixart.build_tokenizer()
    reader = toy_pixart.TextReader(len(tokenizer), layers=1)
    return toy_pixart.Captions(reader.encoder, tokenizer, scenes, empty=0.0)


def tiny_network(layers: int = 2) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(**toy_pixart.transformer_config(layers, 2, 16, 192))
    toy_pixart.initialise(transformer)
    with torch.no_grad():  # it starts silent: then all its pictures are the noise
        transformer.proj_out.weight.normal_(std=0.1)
        for block in transformer.transformer_blocks:
            block.attn2.to_out[0].weight.normal_(std=0.1)
    return transformer


def distilling(captions: toy_pixart.Captions, **options) -> toy_delta.DistillTask:
    torch.manual_seed(2)
    latents = torch.randn(24, 4, 16, 16).half()
    return toy_delta.DistillTask(tiny_network(), captions, latents, seed=0, **options)


def test_the_teachers_step_is_diffusers_ddim_with_guidance(captions: toy_pixart.Captions) -> None:
    task = distilling(captions)
    states, mask = captions.draw(range(4))
    null, null_mask = captions.encode([""])
    noisy, at = torch.randn(4, 4, 16, 16), 519
    nearer, then = task.teach(noisy, torch.full((4,), at), states, mask)
    assert then.tolist() == [at - toy_delta.STRIDE] * 4

    def velocity(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return toy_pixart.predict(task.teacher, noisy, torch.full((4,), at), states, mask)

    with torch.no_grad():
        nothing = velocity(null.repeat(4, 1, 1), null_mask.repeat(4, 1))
        guided = nothing + toy_delta.GUIDANCE * (velocity(states, mask) - nothing)
    ddim = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)
    ddim.set_timesteps(1000 // toy_delta.STRIDE)
    expected = ddim.step(guided, at, noisy).prev_sample
    torch.testing.assert_close(nearer, expected, rtol=1e-4, atol=1e-4)


def test_at_the_end_of_the_path_a_picture_stays_what_it_is(captions: toy_pixart.Captions) -> None:
    task = distilling(captions)
    states, mask = captions.draw(range(4))
    x = torch.randn(4, 4, 16, 16)
    student = task.module["student"]
    assert torch.equal(task.expected(student, x, torch.zeros(4, dtype=torch.int64), states, mask), x)
    late = task.expected(student, x, torch.full((4,), 999), states, mask)
    assert (late - x).abs().mean() > 0.1


@pytest.mark.parametrize("seed", [5, 6])
def test_the_student_meets_its_own_pictures_as_the_pipeline_does(
    captions: toy_pixart.Captions, seed: int
) -> None:
    """After all but the last step of a walk its noisy pictures are those the pipeline would go on with."""
    task = distilling(captions)
    states, mask = captions.draw(range(2))
    task.rng = torch.Generator().manual_seed(seed)
    noisy, t = task.draw_along(states, mask)
    rng = torch.Generator().manual_seed(seed)
    steps = (2, 3, 4, 4, 4, 8)[int(torch.randint(6, (), generator=rng))]
    taken = int(torch.randint(steps, (), generator=rng))
    solver = toy_delta.build_scheduler()
    solver.set_timesteps(steps)
    x = torch.randn((2, 4, 16, 16), generator=rng)
    for now in solver.timesteps[:taken]:
        with torch.no_grad():
            velocity = toy_pixart.predict(task.module["student"], x, now.repeat(2), states, mask)
        x = solver.step(velocity, now, x, generator=rng)[0]
    assert taken > 0 and t.tolist() == [int(solver.timesteps[taken])] * 2
    torch.testing.assert_close(noisy, x, rtol=1e-4, atol=1e-4)


def test_the_student_learns_to_jump_and_its_average_follows(captions: toy_pixart.Captions) -> None:
    task = distilling(captions)
    teacher = {k: v.clone() for k, v in task.teacher.state_dict().items()}
    optimizer = task.optimizer(5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, parts = task.loss(16, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert set(parts) == {"own", "scenes"}
    for key, value in task.teacher.state_dict().items():
        assert torch.equal(value, teacher[key]), key
    average, student = (task.module[k].proj_out.weight for k in ("average", "student"))
    before = teacher["proj_out.weight"]
    assert 0 < (average - student).norm() < (before - student).norm()


def test_a_stopped_distillation_goes_on_with_student_and_average(
    captions: toy_pixart.Captions, tmp_path: Path
) -> None:
    first, second = distilling(captions), distilling(captions)
    train.fit(first, train.Schedule(steps=4, batch=8, lr=1e-2), tmp_path)
    facts = train.fit(second, train.Schedule(steps=4, batch=8, lr=1e-2), tmp_path, report=lambda _: None)
    assert facts["images"] == 32
    for key, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[key], value), key


def test_the_control_branch_learns_what_edges_say_and_its_base_stays(captions: toy_pixart.Captions) -> None:
    torch.manual_seed(3)
    base = tiny_network(3)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    drawn = torch.randn(24, 4, 1, 1).expand(-1, -1, 16, 16)
    told = torch.cat([drawn, torch.full_like(drawn, 1e-3)], dim=1)
    control = PixArtControlNet.from_transformer(base, 2)
    task = toy_delta.ControlTask(base, control, captions, drawn.half(), told.half(), seed=0)
    optimizer = task.optimizer(1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(16, 0.0)[0].backward()
        optimizer.step()

    def error(edges: torch.Tensor) -> float:
        task.edge_latents = edges
        task.seed_data("the same pictures and noise each time")
        with torch.no_grad():
            return float(task.loss(24, 0.0)[1]["v"])

    assert error(told) < 0.8 * error(told.roll(1, 0))  # another picture's edges
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_edges_are_encoded_as_the_pipeline_encodes_them(
    scenes: list[world.Scene], tiny_toy_folder: Path
) -> None:
    vae = toy_pixart.load_autoencoder(tiny_toy_folder / "vae")
    pictures = (render(scenes[:3]) * 255).round().to(torch.uint8)
    found = toy_delta.encode_edges(vae, pictures)
    assert found.shape == (3, 2 * vae.config.latent_channels, *found.shape[2:])
    assert found.dtype is torch.float16
    assert [toy_delta.edge_kind(i) for i in range(3)] == ["soft", "soft", "canny"]
    line = toy_delta.edges(pictures[2].permute(1, 2, 0).numpy(), "canny")
    with torch.no_grad():
        expected = vae.encode(toy_delta.control_picture(line)).latent_dist.mean
    torch.testing.assert_close(
        found[2:, : vae.config.latent_channels].float(), expected, rtol=2e-3, atol=2e-3
    )


def test_agreement_of_edges_is_one_for_the_same_picture_and_falls_with_distance() -> None:
    square = np.zeros((64, 64, 3), np.float32)
    square[20:44, 20:44] = 1
    assert toy_delta.edge_f1(square, square) == 1
    assert toy_delta.edge_f1(np.roll(square, 1, 1), square) > 0.9  # within the tolerance
    far = toy_delta.edge_f1(np.roll(square, 12, (0, 1)), square)
    assert far < 0.4
    blank = np.zeros_like(square)
    assert toy_delta.edge_f1(blank, blank) == 1 and toy_delta.edge_f1(square, blank) == 0
    both = torch.from_numpy(np.stack([square, np.roll(square, 12, (0, 1))])).permute(0, 3, 1, 2)
    wanted = torch.from_numpy(np.stack([square] * 2)).permute(0, 3, 1, 2)
    assert toy_delta.mean_edge_f1(both, wanted) == pytest.approx((1 + far) / 2)


def test_exported_weights_draw_in_four_steps_and_follow_edges(
    scenes: list[world.Scene], tmp_path: Path, tiny_toy_folder: Path
) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_toy_folder / part, tmp_path / part)
    base = PixArtTransformer2DModel.from_pretrained(
        tiny_toy_folder / "transformer", torch_dtype=torch.float32
    )
    control = PixArtControlNet.from_transformer(base, 1)
    with torch.no_grad():  # what starts silent would follow nothing
        for p in control.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    output = tmp_path / "out"
    toy_delta.export(base, control, tmp_path, output, {"recipe": "pixart-delta:toy"})
    store.verify(output)
    pipeline = PixArtDeltaPipeline.from_pretrained(output, torch_dtype=torch.float32)
    assert pipeline.family == SIGMA and pipeline.distilled() is not None
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    picture = render(scenes[:1])
    steered = toy_delta.draw_controlled(pipeline, ["a red cube"], picture)
    free = toy_delta.draw_controlled(pipeline, ["a red cube"], None)
    assert steered.shape == free.shape and not torch.equal(steered, free)
    toy_delta.save_control_sheet(tmp_path / "sheet.png", picture, steered, ["a red cube"])
    assert (tmp_path / "sheet.png").stat().st_size > 1000
