"""The official sampler of DiT against its own tables, and step by step against plain formulas."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.learned_range import LearnedRangeScheduler

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "dit_family" / "dit_sampling.npz"


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def started(steps: int, **options: Any) -> LearnedRangeScheduler:
    scheduler = LearnedRangeScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    ("steps", "timesteps", "betas"),
    [(10, "timestep_map", "betas_respaced"), (250, "timestep_map_250", "betas_250")],
)
def test_the_short_chain_is_the_official_one(steps: int, timesteps: str, betas: str) -> None:
    golden, scheduler = np.load(GOLDEN), started(steps)
    assert scheduler.timesteps.tolist() == golden[timesteps].tolist()[::-1]
    assert scheduler.betas.dtype == torch.float64
    np.testing.assert_allclose(scheduler.betas.numpy(), golden[betas], rtol=1e-10)
    if steps == 10:
        found = scheduler.posterior_log_variance_clipped.numpy()
        np.testing.assert_allclose(found, golden["posterior_log_variance_clipped"], rtol=1e-9)


def test_the_whole_chain_is_there_before_and_when_all_steps_are_asked_for() -> None:
    whole = LearnedRangeScheduler()
    assert whole.timesteps.tolist() == list(range(999, -1, -1)) == started(1000).timesteps.tolist()
    torch.testing.assert_close(whole.betas, torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64))


@pytest.mark.parametrize("timestep", [999, 444, 111, 0])
def test_a_step_is_the_posterior_of_the_expected_picture(timestep: int) -> None:
    """Equations 7 of arXiv:2006.11239 and 15 of arXiv:2102.09672, written out in float64."""
    scheduler = started(10)
    torch.manual_seed(0)
    sample, noise, drawn = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64)
    between = torch.rand_like(sample) * 2 - 1
    answer = torch.cat([noise, between], dim=1)
    (found,) = scheduler.step(answer, timestep, sample, variance_noise=drawn)

    place = [0, 111, 222, 333, 444, 555, 666, 777, 888, 999].index(timestep)
    signals = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))[::111]
    signal, before = signals[place], signals[place - 1] if place else 1.0
    beta = 1 - signal / before
    expected = (sample - (1 - signal) ** 0.5 * noise) / signal**0.5
    mean = (before**0.5 * beta * expected + (1 - beta) ** 0.5 * (1 - before) * sample) / (1 - signal)
    if place:
        least = np.log(beta * (1 - before) / (1 - signal))
        log_variance = (between + 1) / 2 * np.log(beta) + (1 - between) / 2 * least
        mean = mean + (log_variance / 2).exp() * drawn
    torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scheduler.denoised, expected, rtol=1e-9, atol=1e-9)


def test_on_the_whole_chain_a_step_equals_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    torch.manual_seed(0)
    sample, answer = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6)
    expected = theirs.step(answer, 500, sample, generator=seeded(3)[0], return_dict=False)[0]
    found = LearnedRangeScheduler().step(answer, 500, sample, generator=seeded(3)[0])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_last_step_draws_nothing() -> None:
    scheduler, generator = started(10), seeded(1)[0]
    before = generator.get_state()
    sample, answer = torch.randn(1, 4, 2, 2), torch.randn(1, 8, 2, 2)
    scheduler.step(answer, 0, sample, generator=generator)
    assert torch.equal(generator.get_state(), before)
    scheduler.step(answer, 111, sample, generator=generator)
    assert not torch.equal(generator.get_state(), before)


def test_every_row_may_have_its_own_generator() -> None:
    scheduler = started(10)
    sample, answer = torch.randn(2, 4, 2, 2), torch.randn(2, 8, 2, 2)
    both = scheduler.step(answer, 999, sample, generator=seeded(1, 2))[0]
    second = scheduler.step(answer[1:], 999, sample[1:], generator=seeded(2)[0])[0]
    assert torch.equal(both[1:], second)
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        scheduler.step(answer, 999, sample, generator=seeded(1))


def test_settings_survive_saving_and_loading(tmp_path: Path) -> None:
    scheduler = LearnedRangeScheduler(num_train_timesteps=100, beta_end=0.03)
    scheduler.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert entries["_class_name"] == "LearnedRangeScheduler"
    again = LearnedRangeScheduler.from_pretrained(tmp_path)
    assert again.config == scheduler.config
    assert torch.equal(copy.deepcopy(again).betas, scheduler.betas)


def test_it_takes_over_the_noise_schedule_of_others() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_end=0.03, num_train_timesteps=100)
    assert (
        LearnedRangeScheduler.like(theirs).config == started(5, beta_end=0.03, num_train_timesteps=100).config
    )
    with pytest.raises(ValueError, match="beta_schedule must be 'linear', not 'scaled_linear'"):
        LearnedRangeScheduler.like(DDIMScheduler(beta_schedule="scaled_linear"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"beta_schedule": "scaled_linear"}, "does not have: beta_schedule 'scaled_linear'"),
        ({"prediction_type": "v_prediction"}, "does not have: prediction_type 'v_prediction'"),
    ],
)
def test_settings_it_cannot_follow_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    LearnedRangeScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        LearnedRangeScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 1001, 2.0, True])
def test_numbers_of_steps_that_make_no_chain_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="from 2 to 1000"):
        LearnedRangeScheduler().set_timesteps(steps)


def test_steps_that_do_not_fit_are_refused() -> None:
    scheduler, sample = started(10), torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="timestep 5 is not in this chain"):
        scheduler.step(torch.randn(1, 8, 2, 2), 5, sample)
    with pytest.raises(ValueError, match="4 channels for 4"):
        scheduler.step(sample, 999, sample)
