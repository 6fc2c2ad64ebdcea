"""What all our schedulers promise: files, refusals, and the noise schedule they hand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.dpm_solver import DPMSolver
from pipelines.lcm import LCMSolver, OneStep
from pipelines.learned_range import LearnedRangeScheduler
from pipelines.scheduler_base import Scheduler, index_entry, noise_schedule, standard_noise

NOISE: dict[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
FILES: dict[type[Scheduler], dict[str, Any]] = {
    DPMSolver: {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "timestep_spacing": "linspace",
    },
    LCMSolver: {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "timestep_spacing": "official",
    },
    OneStep: {"_class_name": "DDPMScheduler", "clip_sample": False, "timestep": 400},
    LearnedRangeScheduler: {"_class_name": "LearnedRangeScheduler"},
}
every = pytest.mark.parametrize("scheduler", FILES, ids=lambda one: one.__name__)


@every
def test_the_file_names_every_option_and_reads_back(scheduler: type[Scheduler], tmp_path: Path) -> None:
    scheduler().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written == NOISE | FILES[scheduler]
    assert list(written) == sorted(written) and scheduler.supports(written)
    assert scheduler.from_pretrained(tmp_path).config == scheduler().config


@every
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "flow"}, "does not have: prediction_type 'flow'"),
        ({"beta_schedule": "cosine", "tomorrow": [1] * 99}, r"beta_schedule 'cosine', tomorrow \[1, 1"),
        ({"num_train_timesteps": 1}, "num_train_timesteps must be an integer of 2 or more"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps must be an integer"),
        ({"beta_end": 2}, "betas must rise within"),
        ({"beta_start": float("nan")}, "betas must rise within"),
        ({"beta_start": "low"}, "scheduler_config.json: '<' not supported"),
    ],
    ids=str,
)
def test_what_makes_no_schedule_is_refused(
    scheduler: type[Scheduler], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    scheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message) as raised:
        scheduler.from_pretrained(tmp_path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < len(str(path)) + 150


@every
def test_options_of_no_use_are_refused_by_name(scheduler: type[Scheduler]) -> None:
    with pytest.raises(ValueError, match="beta_schedule must be 'linear'"):
        scheduler(beta_schedule="cosine")
    with pytest.raises(TypeError, match="tomorrow"):
        scheduler(tomorrow=1)


@every
def test_the_noise_schedule_is_handed_on(scheduler: type[Scheduler]) -> None:
    assert noise_schedule(scheduler(beta_end=0.03)) == NOISE | {"beta_end": 0.03}


def test_the_noise_schedule_of_diffusers_is_understood_or_refused() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    assert noise_schedule(EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012)) == NOISE | {
        "beta_schedule": "scaled_linear",
        "beta_end": 0.012,
    }
    for options in ({"trained_betas": [0.1] * 1000}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}, which no other scheduler takes over"):
            noise_schedule(DDIMScheduler(**options))


def test_model_index_names_the_class_that_reads_the_file() -> None:
    from diffusers import DDIMScheduler

    found = [index_entry(one()) for one in FILES] + [index_entry(DDIMScheduler())]
    assert found == [
        ("diffusers", "DPMSolverMultistepScheduler"),
        ("diffusers", "LCMScheduler"),
        ("diffusers", "DDPMScheduler"),
        ("pipelines", "LearnedRangeScheduler"),
        ("diffusers", "DDIMScheduler"),
    ]


def test_a_row_of_noise_is_what_its_generator_gives_alone() -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = standard_noise((2, 4, 3), seeded(1, 2))
    assert torch.equal(both[1:], standard_noise((1, 4, 3), seeded(2)[0]))
    assert torch.equal(standard_noise((2, 4, 3), seeded(5)[0]), torch.randn(2, 4, 3, generator=seeded(5)[0]))
    assert both.dtype == torch.float32 and standard_noise((2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="there are 2 generators for 3 pictures"):
        standard_noise((3, 4), seeded(1, 2))
