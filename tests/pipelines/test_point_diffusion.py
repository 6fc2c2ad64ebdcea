"""The sampler of clouds against diffusers' DDPM where they agree, its schedules, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.point_diffusion import AIRPLANE, PointDiffusion

TOLERANCE = 1e-3  # diffusers' tables are float32 from the start, which tells at the clean end


def clouds(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("timestep", [999, 500, 100, 0])
def test_a_step_is_that_of_diffusers(timestep: int) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    theirs.set_timesteps(1000)
    generator = torch.Generator().manual_seed(5)
    wanted = theirs.step(clouds(0), timestep, clouds(1), generator=generator)
    ours = PointDiffusion()
    (found,) = ours.step(clouds(0), timestep, clouds(1), torch.Generator().manual_seed(5))
    for mine, other in ((found, wanted.prev_sample), (ours.denoised, wanted.pred_original_sample)):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_noise_is_added_as_diffusers_adds_it() -> None:
    from diffusers import DDPMScheduler

    timesteps = torch.tensor([3, 700])
    wanted = DDPMScheduler().add_noise(clouds(0), clouds(1), timesteps)
    found = PointDiffusion().add_noise(clouds(0), clouds(1), timesteps)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_airplanes_warm_up_over_a_tenth_of_the_chain() -> None:
    betas = PointDiffusion(**AIRPLANE).betas
    assert betas[0] == pytest.approx(1e-5) and betas[50] < betas[98] < betas[99] == pytest.approx(0.008)
    assert len(betas[99:].unique()) == 1
    for schedule, warm in (("warm0.2", 200), ("warm0.5", 500), ("linear", 1000)):
        assert (PointDiffusion(beta_schedule=schedule).betas < 0.02).sum() == warm - 1


def test_the_true_noise_leads_to_the_cloud_it_was_added_to() -> None:
    """Whatever the number of steps: a network that knows the answer draws it."""
    original = clouds(3)
    for steps in (1000, 25, 2):
        walk = PointDiffusion()
        walk.set_timesteps(steps)
        assert len(walk.timesteps) == steps and walk.timesteps[0] == 999 and walk.timesteps[-1] == 0
        points, generator = clouds(4), torch.Generator().manual_seed(0)
        for timestep in walk.timesteps:
            signal = walk.alphas_cumprod[walk.timesteps.flip(0) == timestep].double()
            noise = (points - signal.sqrt() * original) / (1 - signal).sqrt()
            (points,) = walk.step(noise.float(), timestep, points, generator)
            torch.testing.assert_close(walk.denoised, original, rtol=0, atol=0.05)
        torch.testing.assert_close(points, original, rtol=0, atol=2e-3)


def test_a_shortened_chain_keeps_the_noise_of_its_timesteps() -> None:
    whole, short = PointDiffusion(), PointDiffusion()
    short.set_timesteps(50)
    kept = short.timesteps.flip(0)
    assert torch.equal(short.alphas_cumprod, whole.alphas_cumprod[kept])
    assert torch.cumprod(1 - short.betas.double(), 0)[-1] == pytest.approx(
        whole.alphas_cumprod[-1].item(), rel=1e-3
    )
    found = short.add_noise(clouds(0), clouds(1), kept[[7, 49]])
    assert torch.equal(found, whole.add_noise(clouds(0), clouds(1), kept[[7, 49]]))


def test_a_prediction_of_v_or_of_the_cloud_walks_as_that_of_the_noise() -> None:
    found = []
    for kind in ("epsilon", "v_prediction", "sample"):
        walk = PointDiffusion(prediction_type=kind)
        alpha, sigma = walk.alphas_cumprod[500].sqrt(), (1 - walk.alphas_cumprod[500]).sqrt()
        original, noise = clouds(0), clouds(1)
        answers = {"epsilon": noise, "v_prediction": alpha * noise - sigma * original, "sample": original}
        noisy = alpha * original + sigma * noise
        found += walk.step(answers[kind], 500, noisy, variance_noise=clouds(2))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)


def test_clipping_bounds_what_is_expected() -> None:
    walk = PointDiffusion(clip_sample=True)
    walk.step(clouds(0), 999, clouds(1), variance_noise=clouds(2))
    assert walk.denoised is not None and walk.denoised.abs().max() == 0.5


def test_each_cloud_may_have_its_own_generator() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    walk = PointDiffusion()
    (together,) = walk.step(clouds(0), 500, clouds(1), generators())
    for row, generator in enumerate(generators()):
        one = slice(row, row + 1)
        assert torch.equal(walk.step(clouds(0)[one], 500, clouds(1)[one], [generator])[0], together[one])
    with pytest.raises(ValueError, match="2 generators for 1 "):
        walk.step(clouds(0)[:1], 500, clouds(1)[:1], generators())


def test_the_last_step_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    PointDiffusion().step(clouds(0), 0, clouds(1), generator)
    assert torch.equal(generator.get_state(), before)


def test_it_comes_back_from_its_folder(tmp_path: Path) -> None:
    PointDiffusion(**AIRPLANE).save_pretrained(tmp_path)
    loaded = PointDiffusion.from_pretrained(tmp_path)
    assert loaded.config == PointDiffusion(**AIRPLANE).config
    path = tmp_path / PointDiffusion.config_name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": True}))
    with pytest.raises(
        ValueError,
        match=r"scheduler_config\.json asks for options that PointDiffusion does not have: use_karras_sigmas",
    ):
        PointDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule must be 'linear' or 'warm0.1'"),
        ({"prediction_type": "score"}, "prediction_type must be 'epsilon'"),
        ({"variance_type": "learned"}, "variance_type must be 'fixed_small'"),
        ({"num_train_timesteps": 1}, "an integer of 2 or more"),
        ({"beta_end": 1.5}, r"betas must rise within 0\.\.1"),
    ],
)
def test_other_schedules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointDiffusion(**options)


def test_what_does_not_fit_the_chain_is_refused() -> None:
    walk = PointDiffusion()
    for steps in (1, 1001, True, 2.5):
        with pytest.raises(ValueError, match="must be an integer from 2 to 1000"):
            walk.set_timesteps(steps)  # type: ignore[arg-type]
    walk.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 5 is not in this chain"):
        walk.step(clouds(0), 5, clouds(1))
    with pytest.raises(ValueError, match=r"answers \(2, 6, 16\) for clouds of \(2, 3, 16\)"):
        walk.step(torch.zeros(2, 6, 16), 999, clouds(1))
