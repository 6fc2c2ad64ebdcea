"""DPM-Solver++ against diffusers', with a network that answers something that depends on everything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.dpm_solver import DPMSolver

OPTIONS = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "solver_order": 1},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"lower_order_final": False},
    {"euler_at_final": True},
]


def walk(scheduler, latents: Tensor, **chosen) -> list[Tensor]:
    scheduler.set_timesteps(**chosen)
    torch.manual_seed(1)
    mix = torch.randn(4, 4)
    seen = []
    for timestep in scheduler.timesteps:
        prediction = torch.einsum("bcyx,dc->bdyx", latents, mix).tanh() * (0.5 + timestep / 1000)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        seen.append(latents)
    return seen


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 47])
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "plain"
)
def test_every_step_equals_diffusers(options: dict, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs, ours = DPMSolverMultistepScheduler(**options), DPMSolver(**options)
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 6, 6)
    expected = walk(theirs, latents, num_inference_steps=steps)
    found = walk(ours, latents, num_inference_steps=steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for one, other in zip(found, expected, strict=True):
        # float64 weights against float32 ones: the difference is theirs
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * other.abs().max().item())


def test_chosen_timesteps_equal_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    torch.manual_seed(0)
    latents = torch.randn(1, 4, 4, 4)
    chosen = {"timesteps": [999, 700, 350, 120, 3]}
    expected = walk(DPMSolverMultistepScheduler(), latents, **chosen)[-1]
    torch.testing.assert_close(walk(DPMSolver(), latents, **chosen)[-1], expected, rtol=2e-5, atol=2e-5)


def test_the_last_step_lands_on_what_the_network_expected() -> None:
    solver = DPMSolver(prediction_type="sample")
    latents = walk(solver, torch.randn(1, 4, 4, 4), num_inference_steps=3)[-1]
    torch.testing.assert_close(latents, solver.denoised)


def test_starting_over_forgets_the_last_walk() -> None:
    solver, latents = DPMSolver(), torch.ones(1, 4, 4, 4)
    first = walk(solver, latents, num_inference_steps=4)[-1]
    assert torch.equal(walk(solver, latents, num_inference_steps=4)[-1], first)


def test_settings_survive_a_round_trip_through_diffusers(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    DPMSolver(prediction_type="v_prediction", solver_order=1).save_pretrained(tmp_path / "ours")
    theirs = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "ours")
    assert theirs.config.prediction_type == "v_prediction" and theirs.config.solver_order == 1
    theirs.save_pretrained(tmp_path / "theirs")
    assert DPMSolver.supports(json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text()))
    assert (
        DPMSolver.from_pretrained(tmp_path / "theirs").config
        == DPMSolver.from_pretrained(tmp_path / "ours").config
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"thresholding": True},
        {"an_option_of_next_year": 1},
    ],
)
def test_settings_it_cannot_compute_are_left_to_diffusers(options: dict, tmp_path: Path) -> None:
    assert not DPMSolver.supports(options)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="does not have"):
        DPMSolver.from_pretrained(tmp_path)


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
def test_late_steps_start_and_end_with_the_schedule_and_become_shorter(steps: int) -> None:
    solver = DPMSolver(timestep_spacing="late")
    solver.set_timesteps(steps)
    times = solver.timesteps.tolist()
    assert len(times) == steps and times[0] == 999
    lengths = [before - after for before, after in itertools.pairwise([*times, 0])]
    assert all(length > 0 for length in lengths)
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(lengths))  # they are rounded
    if steps == 50:
        assert times[-1] == 3


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "continuous", "late"])
def test_as_many_steps_as_timesteps_are_walked(spacing: str) -> None:
    """Rounding puts one timestep of `linspace` twice, and diffusers divides by their distance."""
    solver = DPMSolver(timestep_spacing=spacing, prediction_type="sample")
    picture = torch.randn(1, 4, 2, 2)
    solver.set_timesteps(1000)
    latents = torch.randn(1, 4, 2, 2)
    for timestep in solver.timesteps:
        (latents,) = solver.step(picture, timestep, latents)
    torch.testing.assert_close(latents, picture, rtol=0.02, atol=0.02)  # `continuous` leaves some noise


def test_walks_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match="'leading' takes 1 to 999 steps, not 1000"):
        DPMSolver(timestep_spacing="leading").set_timesteps(1000)
    solver, latents = DPMSolver(), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        solver.step(latents, 999, latents)
    solver.set_timesteps(1)
    solver.step(latents, 999, latents)
    with pytest.raises(ValueError, match="once per timestep"):
        solver.step(latents, 999, latents)
