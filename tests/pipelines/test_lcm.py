"""Schedules of distilled models against diffusers'. The published numbers are in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.lcm import LCMSolver, OneStep

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


# ---------------------------------------------------------------------------------------- diffusers


def theirs(**options: object):
    from diffusers import LCMScheduler

    return LCMScheduler(**LINEAR | options)


def walk(scheduler, latents: Tensor, generator: object = None, **chosen: object) -> list[Tensor]:
    scheduler.set_timesteps(**chosen)
    torch.manual_seed(1)
    mix = torch.randn(4, 4)
    generator = generator or torch.Generator().manual_seed(2)
    seen = []
    for timestep in scheduler.timesteps:
        prediction = torch.einsum("bcyx,dc->bdyx", latents, mix).tanh() * (0.5 + timestep / 1000)
        latents, denoised = scheduler.step(
            prediction, timestep, latents, generator=generator, return_dict=False
        )
        seen += [latents, denoised]
    return seen


@pytest.mark.parametrize("origin", [50, 40])
def test_the_other_spacing_is_diffusers(origin: int) -> None:
    ours, other = (
        LCMSolver(timestep_spacing="diffusers", original_inference_steps=origin),
        theirs(original_inference_steps=origin),
    )
    for steps in range(1, origin + 1):
        ours.set_timesteps(steps)
        other.set_timesteps(steps)
        assert ours.timesteps.tolist() == other.timesteps.tolist()


def test_four_steps_tell_the_spacings_apart() -> None:
    for spacing, expected in (("official", [999, 759, 519, 279]), ("diffusers", [999, 759, 499, 259])):
        solver = LCMSolver(timestep_spacing=spacing)
        solver.set_timesteps(4)
        assert solver.timesteps.tolist() == expected


@pytest.mark.parametrize("chosen", [{"num_inference_steps": 4}, {"timesteps": [999, 700, 350, 3]}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"timestep_scaling": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ],
    ids=str,
)
def test_every_step_equals_diffusers(options: dict, chosen: dict) -> None:
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = walk(theirs(**options), latents, **chosen)
    found = walk(LCMSolver(timestep_spacing="diffusers", **options), latents, **chosen)
    for one, other in zip(found, expected, strict=True):
        # float64 weights against float32 ones: the difference is theirs
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * other.abs().max().item())


def test_a_list_of_generators_draws_for_each_picture_alone() -> None:
    latents = torch.randn(3, 4, 6, 6)
    together = walk(
        LCMSolver(),
        latents,
        [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        num_inference_steps=3,
    )[-1]
    for row, seed in enumerate((5, 6, 7)):
        generator = torch.Generator().manual_seed(seed)
        alone = walk(LCMSolver(), latents[row : row + 1], generator, num_inference_steps=3)[-1]
        # the first step divides rounding by 0.006
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_settings_survive_a_round_trip_through_diffusers(tmp_path: Path) -> None:
    from diffusers import LCMScheduler

    theirs(prediction_type="v_prediction").save_pretrained(tmp_path / "theirs")
    entries = json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    assert LCMSolver.supports(entries)
    ours = LCMSolver.from_pretrained(tmp_path / "theirs")
    assert ours.config.timestep_spacing == "diffusers"
    ours.save_pretrained(tmp_path / "ours")
    assert LCMSolver.from_pretrained(tmp_path / "ours").config == ours.config
    again = LCMScheduler.from_pretrained(tmp_path / "ours").config
    assert (again.prediction_type, again.beta_schedule, again.beta_end) == ("v_prediction", "linear", 0.02)

    LCMSolver().save_pretrained(tmp_path / "official")
    assert LCMSolver.from_pretrained(tmp_path / "official").config == LCMSolver().config


def test_what_a_file_leaves_out_means_what_diffusers_means(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    config = LCMSolver.from_pretrained(tmp_path).config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert config.timestep_spacing == "diffusers"


def test_options_that_change_the_numbers_are_not_supported(tmp_path: Path) -> None:
    for entries in (
        {"clip_sample": True},
        {"thresholding": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1]},
        {"rescale_betas_zero_snr": True},
        {"something_new": 1},
    ):
        assert not LCMSolver.supports(entries)
    (tmp_path / "scheduler_config.json").write_text('{"clip_sample": true}')
    with pytest.raises(ValueError, match="asks for options that LCMSolver does not have"):
        LCMSolver.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"prediction_type": "flow"}, {"timestep_spacing": "leading"}, {"original_inference_steps": 0}],
    ids=str,
)
def test_unknown_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LCMSolver(**options)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "give num_inference_steps or timesteps"),
        ({"num_inference_steps": 2, "timesteps": [3]}, "give num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "cannot take 0 steps"),
        ({"num_inference_steps": 51}, "distilled on 50 timesteps and cannot take 51"),
        ({"timesteps": [3, 4]}, "must fall"),
        ({"timesteps": [1000, 4]}, "between 999 and 0"),
        ({"timesteps": []}, "must fall"),
    ],
)
def test_impossible_schedules_are_refused(chosen: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCMSolver().set_timesteps(**chosen)


def test_steps_out_of_turn_are_refused() -> None:
    solver, latents = LCMSolver(), torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        solver.step(latents, 999, latents)
    solver.set_timesteps(2)
    with pytest.raises(ValueError, match="the noise is"):
        solver.step(latents, 999, latents, variance_noise=latents[:1])
    solver.set_timesteps(2)
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        solver.step(latents, 999, latents, generator=[torch.Generator()])
    solver.set_timesteps(1)
    solver.step(latents, 999, latents)
    with pytest.raises(ValueError, match="once per timestep"):
        solver.step(latents, 999, latents)


def test_half_precision_keeps_its_type_and_loses_little() -> None:
    latents, prediction = torch.randn(2, 1, 4, 6, 6).bfloat16().unbind()
    solver = LCMSolver()
    solver.set_timesteps(1)
    found, _ = solver.step(prediction, 999, latents)
    assert found.dtype == torch.bfloat16
    solver.set_timesteps(1)
    expected, _ = solver.step(prediction.float(), 999, latents.float())
    # one rounding, of the result
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)


# ----------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_is_what_diffusers_expects_of_a_ddpm(prediction_type: str) -> None:
    from diffusers import DDPMScheduler

    options = LINEAR | {"prediction_type": prediction_type}
    other, ours = DDPMScheduler(**options, clip_sample=False), OneStep(**options)
    latents, prediction = torch.randn(2, 1, 4, 6, 6).unbind()
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [400]
    other.set_timesteps(timesteps=[400])
    expected = other.step(prediction, 400, latents).pred_original_sample
    found, denoised = ours.step(prediction, ours.timesteps[0], latents)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(found, denoised)
    assert torch.equal(found, ours.denoised)


def test_one_step_takes_another_timestep_but_not_two() -> None:
    solver = OneStep()
    solver.set_timesteps(timesteps=[300])
    assert solver.timesteps.tolist() == [300]
    for chosen in ({"num_inference_steps": 4}, {"timesteps": [400, 200]}):
        with pytest.raises(ValueError, match="draws in one step"):
            solver.set_timesteps(**chosen)


def test_a_file_of_many_steps_is_not_taken_for_one_step(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    DDPMScheduler(clip_sample=False).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="OneStep"):
        OneStep.from_pretrained(tmp_path / "theirs")
    OneStep(timestep=300).save_pretrained(tmp_path / "ours")
    assert OneStep.from_pretrained(tmp_path / "ours").config == OneStep(timestep=300).config
    assert DDPMScheduler.from_pretrained(tmp_path / "ours").config.beta_end == 0.02
