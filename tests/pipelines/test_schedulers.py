"""Every scheduler of the table walks the toy's schedule, and the libraries' ones as they do in diffusers."""

import pytest
import torch

from pipelines import schedulers
from pipelines.pixart_sigma import PixArtSigmaPipeline


@pytest.fixture(scope="module")
def pipeline(tiny_toy_folder) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)


def draw(pipeline, name: str, steps: int = 4) -> torch.Tensor:
    return pipeline(
        "a red cube",
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3),
        scheduler=name,
        output_type="latent",
    ).images


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_scheduler_walks_and_repeats_itself(pipeline, name):
    found = draw(pipeline, name)
    assert found.isfinite().all()
    assert torch.equal(found, draw(pipeline, name))


def test_the_schedulers_differ(pipeline):
    drawn = [draw(pipeline, name) for name in schedulers.SCHEDULERS]
    assert all(not torch.allclose(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_stored_one_is_the_default(pipeline):
    assert torch.equal(draw(pipeline, "default"), draw(pipeline, "dpm++"))


@pytest.mark.parametrize("name", ["ddim", "euler", "unipc"])
def test_a_scheduler_of_diffusers_draws_what_its_pipeline_draws(pipeline, tiny_toy_folder, name):
    from diffusers import PixArtSigmaPipeline as Theirs

    theirs = Theirs.from_pretrained(tiny_toy_folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = schedulers.make(name, pipeline.scheduler)
    expected = theirs(
        "a red cube",
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
        use_resolution_binning=False,
        output_type="latent",
    ).images
    assert (draw(pipeline, name, 6) - expected).abs().max() / expected.abs().max() < 1e-4


def test_the_noise_schedule_is_that_of_the_weights(pipeline):
    made = schedulers.make("ddim", pipeline.scheduler)
    assert made.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert made.config.beta_end == pipeline.scheduler.config.beta_end
    again = schedulers.make("dpm++", made)  # from a library's configuration as well
    assert again.config.prediction_type == pipeline.scheduler.config.prediction_type


def test_an_unknown_name_is_refused_before_any_work(pipeline):
    with pytest.raises(ValueError, match=r"scheduler must be one of default, dpm\+\+"):
        next(pipeline.denoise("a cube", scheduler="dopri"))
