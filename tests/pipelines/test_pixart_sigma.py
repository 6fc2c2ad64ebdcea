"""The pipeline against diffusers', and what it promises on top."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import Step
from pipelines.learned_range import LearnedRangeScheduler
from pipelines.pixart_sigma import PixArtSigmaPipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def pipeline(tiny_toy_folder: Path) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)


@pytest.fixture(scope="module")
def theirs(tiny_toy_folder: Path):
    """diffusers' pipeline from the same folder."""
    from diffusers import PixArtSigmaPipeline as Theirs

    loaded = Theirs.from_pretrained(tiny_toy_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def binned(tiny_toy_folder: Path, tmp_path: Path) -> PixArtSigmaPipeline:
    """The same, of native size 256 and therefore with bins."""
    folder = tmp_path / "binned"
    shutil.copytree(tiny_toy_folder, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 32}))
    return PixArtSigmaPipeline.from_pretrained(folder)


CASES: dict[str, dict[str, Any]] = {
    "one prompt": {"prompt": "A red Cube "},
    "negative prompt": {"prompt": "a red cube", "negative_prompt": "blue metal sphere"},
    "several prompts": {"prompt": ["a red cube", "a small shiny sphere behind a cone", ""]},
    "negative prompts": {"prompt": ["a cube", "two cones"], "negative_prompt": ["red", "a big blue ring"]},
    "several pictures": {
        "prompt": ["a red cube", "cone"],
        "num_images_per_prompt": 2,
        "negative_prompt": "metal",
    },
    "no guidance": {"prompt": ["a red cube", "a"], "guidance_scale": 1.0},
    "not square": {"prompt": "a red cube", "height": 96, "width": 160},
    "a long prompt": {"prompt": "a red cube and " * 90},
    "chosen timesteps": {"prompt": "a cube", "timesteps": [999, 600, 300, 40]},
}


@pytest.mark.parametrize(
    ("case", "prediction"),
    [*((case, "v_prediction") for case in CASES), ("negative prompt", "epsilon"), ("not square", "epsilon")],
)
def test_latents_equal_diffusers_over_twenty_steps(
    pipeline: PixArtSigmaPipeline, theirs, case: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prediction == "epsilon":
        from pipelines.dpm_solver import DPMSolver

        monkeypatch.setattr(pipeline, "scheduler", DPMSolver(prediction_type="epsilon"))
        changed = type(theirs.scheduler).from_config(theirs.scheduler.config, prediction_type="epsilon")
        monkeypatch.setattr(theirs, "scheduler", changed)
    given = {"output_type": "latent", **CASES[case]}
    if "timesteps" not in given:
        given["num_inference_steps"] = 20
    expected = theirs(
        **given, generator=seeded(7)[0], use_resolution_binning=False, clean_caption=False
    ).images
    found = pipeline(**given, generator=seeded(7)[0]).images
    assert found.shape == expected.shape
    assert relative(found, expected) <= 1e-4  # float32 over twenty steps


def test_the_prompt_matters(pipeline: PixArtSigmaPipeline) -> None:
    """Or else the twins above would agree about nothing."""
    given: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
    drawn = [pipeline(text, generator=seeded(7)[0], **given).images for text in ("a red cube", "a blue cone")]
    assert relative(drawn[0], drawn[1]) > 1e-2


def test_pictures_equal_diffusers(pipeline: PixArtSigmaPipeline, theirs) -> None:
    given: dict[str, Any] = {"prompt": "a red cube", "num_inference_steps": 4}
    expected = theirs(**given, generator=seeded(1)[0], use_resolution_binning=False).images[0]
    found = pipeline(**given, generator=seeded(1)[0]).images[0]
    assert found.size == expected.size == (128, 128)
    difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1  # a rounding to 8 bits may fall on either side


@pytest.mark.parametrize(
    "prompt", ["A red cube, left of a blue ball.", "two small cones!", "one shiny torus"]
)
def test_plain_prompts_are_not_changed_by_the_cleaning_that_diffusers_does(theirs, prompt: str) -> None:
    cleaned = theirs._text_preprocessing(prompt, clean_caption=True)
    assert cleaned == theirs._text_preprocessing(prompt, clean_caption=False)


def test_cleaning_on_demand_is_that_of_diffusers(pipeline: PixArtSigmaPipeline, theirs) -> None:
    prompt = "(A red cube) &amp; see www.example.com/cube.png #123"
    cleaned = theirs._text_preprocessing(prompt, clean_caption=True)
    assert cleaned != theirs._text_preprocessing(prompt, clean_caption=False)
    assert torch.equal(pipeline.encode([prompt], clean_caption=True)[0], pipeline.encode(cleaned)[0])
    mask = torch.ones(1, 30)  # the null caption too, in both ways of reading it
    null = pipeline.encode_null(prompt, mask, clean_caption=True)[0]
    assert torch.equal(null, pipeline.encode_null(cleaned, mask)[0])
    assert not torch.equal(null, pipeline.encode_null(prompt, mask)[0])


def test_library_parts_and_ours_draw_the_same(pipeline: PixArtSigmaPipeline, tiny_toy_folder: Path) -> None:
    library = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, own_parts=False)
    for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
        assert not type(getattr(library, name)).__module__.startswith("pipelines"), name
    expected = library("a red cube", num_inference_steps=4, generator=seeded(1)[0], output_type="pt").images
    found = pipeline("a red cube", num_inference_steps=4, generator=seeded(1)[0], output_type="pt").images
    assert relative(found, expected) <= 1e-4
    shown, wanted = (
        one.preview(torch.randn(1, 4, 16, 16, generator=seeded(2)[0])) for one in (pipeline, library)
    )
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(wanted).astype(int)).max() <= 2


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_other_schedulers_of_diffusers_work(
    pipeline: PixArtSigmaPipeline, theirs, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They scale the noise and the input, take eta or draw noise of their own."""
    import diffusers

    chosen = getattr(diffusers, scheduler)(prediction_type="v_prediction")
    monkeypatch.setattr(pipeline, "scheduler", chosen)
    monkeypatch.setattr(theirs, "scheduler", chosen)
    given = {"prompt": "a red cube", "num_inference_steps": 5, "output_type": "latent"}
    found = pipeline(**given, generator=seeded(3)[0]).images
    expected = theirs(
        **given, generator=seeded(3)[0], use_resolution_binning=False, clean_caption=False
    ).images
    assert relative(found, expected) <= 1e-4


def test_picture_n_of_a_batch_equals_the_single_picture_of_its_seed(pipeline: PixArtSigmaPipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 6, "output_type": "latent"}
    batch = pipeline("a red cube", num_images_per_prompt=3, generator=seeded(5, 6, 7), **given).images
    for index, seed in enumerate((5, 6, 7)):
        alone = pipeline("a red cube", generator=seeded(seed), **given).images
        assert relative(batch[index], alone[0]) <= 1e-5
    prompts = ["a red cube", "a small blue cone behind a ring"]
    mixed = pipeline(prompts, generator=seeded(5, 6), **given).images
    alone = pipeline(prompts[1], generator=seeded(6), **given).images
    assert relative(mixed[1], alone[0]) <= 1e-5


def test_the_same_seed_gives_the_same_bits_and_runs_leave_nothing_behind(
    pipeline: PixArtSigmaPipeline,
) -> None:
    first = pipeline("a red cube", num_inference_steps=5, generator=seeded(1)).images[0]
    interrupted = pipeline.denoise("a blue cone", num_inference_steps=9, guidance_scale=2.0)
    next(interrupted)
    again = pipeline("a red cube", num_inference_steps=5, generator=seeded(1)).images[0]
    assert np.array_equal(np.asarray(first), np.asarray(again))
    other = pipeline("a red cube", num_inference_steps=5, generator=seeded(2)).images[0]
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_steps_count_and_end_where_the_call_does(pipeline: PixArtSigmaPipeline) -> None:
    steps = list(pipeline.denoise("a red cube", num_inference_steps=4, generator=seeded(1)[0]))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.count for step in steps} == {4}
    assert all(isinstance(step, Step) and step.latents.shape == (1, 4, 16, 16) for step in steps)
    assert [int(step.timestep) for step in steps] == sorted(
        (int(step.timestep) for step in steps), reverse=True
    )
    torch.testing.assert_close(steps[-1].denoised, steps[-1].latents)
    called = pipeline(
        "a red cube", num_inference_steps=4, generator=seeded(1)[0], output_type="latent"
    ).images
    assert torch.equal(called, steps[-1].latents)


def test_closing_the_generator_cancels_before_the_next_step(
    pipeline: PixArtSigmaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    forward = pipeline.transformer.forward

    def counted(*args: Any, **options: Any):
        next(calls)
        return forward(*args, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", counted)
    steps = pipeline.denoise("a red cube", num_inference_steps=20)
    next(steps)
    next(steps)
    steps.close()
    assert next(calls) == 2
    with pytest.raises(StopIteration):
        next(steps)
    assert not torch.is_inference_mode_enabled()


def test_a_callback_sees_every_step_may_change_latents_and_may_stop(pipeline: PixArtSigmaPipeline) -> None:
    seen = []

    def watch(pipe: PixArtSigmaPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]):
        seen.append((index, int(timestep), sorted(tensors)))
        if index == 2:
            pipe.interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    given: dict[str, Any] = {"num_inference_steps": 20, "output_type": "latent", "generator": seeded(1)[0]}
    result = pipeline("a red cube", callback_on_step_end=watch, **given).images
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert seen[0][2] == ["latents"]
    assert torch.count_nonzero(result) == 0
    assert len(list(pipeline.denoise("a red cube", num_inference_steps=4))) == 4  # the flag does not stick


def test_own_latents_and_embeddings_are_used(pipeline: PixArtSigmaPipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipeline("a red cube", generator=seeded(1)[0], **given).images
    noise = pipeline.noise(1, 128, 128, seeded(1)[0])
    embeds, mask = pipeline.encode(["a red cube"])
    padded = torch.cat([embeds, torch.randn(1, 5, 32)], dim=1)
    mask = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)], dim=1)
    empty, empty_mask = pipeline.encode([""])
    found = pipeline(
        latents=noise,
        prompt_embeds=padded,
        prompt_attention_mask=mask.long(),
        negative_prompt_embeds=empty,
        negative_prompt_attention_mask=empty_mask,
        **given,
    ).images
    assert relative(found, expected) <= 1e-5


def test_embeddings_of_several_prompts_pair_up_with_their_negatives(pipeline: PixArtSigmaPipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": 2}
    prompts, negatives = ["a red cube", "two cones"], ["blue", "a big ring"]
    expected = pipeline(prompts, negative_prompt=negatives, generator=seeded(1, 2, 3, 4), **given).images
    embeds, mask = pipeline.encode(prompts)
    negative_embeds, negative_mask = pipeline.encode(negatives)
    found = pipeline(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_attention_mask=negative_mask,
        generator=seeded(1, 2, 3, 4),
        **given,
    ).images
    assert found.shape == (4, 4, 16, 16)
    assert relative(found, expected) <= 1e-5


def test_texts_are_encoded_at_their_own_length_whatever_their_neighbours(
    pipeline: PixArtSigmaPipeline,
) -> None:
    prompts = ["", "a red cube", "a small shiny blue cone"]
    embeds, mask = pipeline.encode(prompts)
    assert mask.sum(dim=1).tolist() == [1, 4, 6] == [pipeline.count_tokens(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        assert torch.equal(pipeline.encode([prompt])[0][0], embeds[row, : mask[row].sum()])


def test_a_prompt_that_is_cut_off_is_logged(
    pipeline: PixArtSigmaPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    # by its name: the command line, which another test may have started, quiets the pipelines
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        assert pipeline.encode(["a red cube"], max_sequence_length=4)[0].shape[1] == 4
        assert not caplog.records
        assert pipeline.encode(["a red cube and"], max_sequence_length=4)[0].shape[1] == 4
    assert "cut off" in caplog.text


def test_sizes_with_bins_are_drawn_in_the_bin_and_cropped(binned: PixArtSigmaPipeline) -> None:
    assert binned.native_size == 256
    assert binned.drawn_size(200, 350, use_resolution_binning=True) == (192, 336)
    given: dict[str, Any] = {"num_inference_steps": 1, "generator": seeded(1)[0]}
    assert binned("a cube", height=200, width=350, **given).images[0].size == (350, 200)
    assert binned("a cube", height=200, width=350, output_type="latent", **given).images.shape == (
        1,
        4,
        24,
        42,
    )
    drawn = binned("a cube", height=208, width=352, use_resolution_binning=False, **given)
    assert drawn.images[0].size == (352, 208)


def test_binning_equals_diffusers(binned: PixArtSigmaPipeline, tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline as Theirs

    theirs = Theirs.from_pretrained(tmp_path / "binned")
    theirs.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"prompt": "a cube", "height": 200, "width": 350, "num_inference_steps": 2}
    expected = theirs(**given, generator=seeded(1)[0], output_type="pt").images
    assert relative(binned(**given, generator=seeded(1)[0], output_type="pt").images, expected) <= 1e-4


@pytest.mark.parametrize("size", [(256, 256), (1, 900), (900, 1088), (333, 777)])
def test_every_size_comes_out_exactly(pipeline: PixArtSigmaPipeline, size: tuple[int, int]) -> None:
    drawn = torch.rand(1, 4, 8, 12)
    assert pipeline.decode(drawn, "pt", size=size).shape == (1, 3, *size)


def test_output_types_hold_the_same_picture(pipeline: PixArtSigmaPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8)
    tensor, array, images = (pipeline.decode(latents, kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (2, 3, 64, 64) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal((array[1] * 255).round().astype("uint8"), np.asarray(images[1]))
    assert torch.equal(pipeline.decode(latents[1:], "pt")[0], tensor[1])  # whatever the neighbours


def test_return_dict_false_gives_a_tuple(pipeline: PixArtSigmaPipeline) -> None:
    (images,) = pipeline("a cube", num_inference_steps=1, return_dict=False)
    assert isinstance(images[0], Image.Image)


def test_previews_are_as_large_as_the_picture_and_follow_its_colours(pipeline: PixArtSigmaPipeline) -> None:
    generator = seeded(1)[0]
    picture = (
        torch.rand(1, 3, 4, 4, generator=generator).repeat_interleave(32, 2).repeat_interleave(32, 3) * 2 - 1
    )
    with torch.inference_mode():
        latents = pipeline.vae.encode(picture)[0].mean * pipeline.vae.config.scaling_factor
    shown = pipeline.preview(latents)
    assert shown.size == (128, 128)
    centres = np.asarray(shown)[16::32, 16::32].reshape(-1).astype(float)
    wanted = picture[0, :, 16::32, 16::32].permute(1, 2, 0).reshape(-1).numpy()
    assert np.corrcoef(centres, wanted)[0, 1] > 0.3  # even with random weights; 0 without a fit
    assert pipeline.preview(torch.full((1, 4, 8, 12), torch.nan)).size == (96, 64)  # a glance, not a judge


def test_saving_and_loading_draws_the_same(pipeline: PixArtSigmaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    again = PixArtSigmaPipeline.from_pretrained(tmp_path / "again")
    pictures = [
        one("a red cube", num_inference_steps=2, generator=seeded(1)[0]).images[0]
        for one in (pipeline, again)
    ]
    assert np.array_equal(*(np.asarray(picture) for picture in pictures))


def test_diffusers_loads_what_we_save_with_its_own_parts_too(theirs, tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline as Theirs

    transformer = PixArtSigmaPipeline.from_pretrained(theirs.config._name_or_path).transformer
    mixed = PixArtSigmaPipeline(
        theirs.tokenizer, theirs.text_encoder, theirs.vae, transformer, theirs.scheduler
    )
    mixed.save_pretrained(tmp_path / "mixed")
    again = Theirs.from_pretrained(tmp_path / "mixed")
    again.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "num_inference_steps": 2,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    expected = theirs("a red cube", generator=seeded(1)[0], **given).images
    assert torch.equal(again("a red cube", generator=seeded(1)[0], **given).images, expected)


def test_half_precision_stays_close_and_starts_from_the_same_noise(tiny_toy_folder: Path) -> None:
    half = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder, torch_dtype=torch.bfloat16)
    full = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    found = half("a red cube", generator=seeded(1)[0], **given).images
    assert found.dtype == torch.float32
    assert (found - full("a red cube", generator=seeded(1)[0], **given).images).abs().mean() < 0.02


def test_every_attention_draws_the_same(tiny_toy_folder: Path) -> None:
    drawn = []
    for name in ("sdpa", "math"):
        pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
        assert pipeline.set_attention(name) == name
        drawn.append(
            pipeline("a red cube", num_inference_steps=4, generator=seeded(1)[0], output_type="pt").images
        )
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 2, 32)}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "a text or a list of texts"),
        ({"prompt": 3}, "a text or a list of texts"),
        ({"prompt": ["a", None]}, "a text or a list of texts"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 32)}, "need a prompt_attention_mask"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 32)}, r"must be \(prompts, tokens, width\)"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(1, 2, 32),
                "prompt_attention_mask": torch.zeros(1, 2),
            },
            "without any token",
        ),
        ({"height": 0}, "height must be an integer from 64 to 256, not 0"),
        ({"width": -128}, "width must be an integer from 64 to 256"),
        ({"width": 272}, "width must be an integer from 64 to 256"),
        ({"height": 100}, "height must be a multiple of 16, not 100"),
        ({"height": 128.0}, "height must be an integer"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000"),
        ({"num_inference_steps": 10**6}, "num_inference_steps must be an integer from 1 to 1000"),
        ({"num_inference_steps": True}, "num_inference_steps must be an integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be \(1, 4, 16, 16\)"),
        ({"timesteps": [10, 20]}, "timesteps must be descending"),
        ({"timesteps": []}, "timesteps must be descending"),
        ({"timesteps": [1500, 20]}, "descending integers from 999 to 0, not"),
        ({"timesteps": [500, -4]}, "descending integers from 999 to 0, not"),
        ({"timesteps": [999.5, 3]}, "descending integers from 999 to 0, not"),
        ({"timesteps": [900, 3], "scheduler": "ddim"}, "DDIMScheduler cannot be told its timesteps"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"max_sequence_length": 0}, "max_sequence_length must be"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "not noise"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    pipeline: PixArtSigmaPipeline, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encode", None)
    given = {"prompt": "a red cube", **given}
    with pytest.raises(ValueError, match=message):
        pipeline.check(**given)
    with pytest.raises(ValueError, match=message):
        pipeline(**given)


def test_a_binned_model_takes_any_size_in_its_range(binned: PixArtSigmaPipeline) -> None:
    binned.check(prompt="a", height=65, width=511)
    with pytest.raises(ValueError, match="height must be an integer from 64 to 512"):
        binned.check(prompt="a", height=513)
    with pytest.raises(ValueError, match="multiple of 16"):
        binned.check(prompt="a", height=200, use_resolution_binning=False)


def test_a_schedule_that_cannot_be_walked_here_is_refused(tiny_toy_folder: Path) -> None:
    from diffusers import DDIMScheduler

    pipeline = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    pipeline.scheduler = LearnedRangeScheduler()
    with pytest.raises(ValueError, match="needs the learned variance, which this pipeline leaves"):
        pipeline.check("a cube")
    pipeline.check("a cube", scheduler="dpm++")
    pipeline.scheduler = DDIMScheduler(trained_betas=[0.1] * 1000)
    pipeline.check("a cube")
    with pytest.raises(ValueError, match="trained_betas, which no other scheduler takes over"):
        pipeline.check("a cube", scheduler="dpm++")


def test_an_unknown_argument_is_an_error(pipeline: PixArtSigmaPipeline) -> None:
    with pytest.raises(TypeError, match="sigmas"):
        pipeline("a red cube", sigmas=[1.0])


# The published null caption, and decoding in tiles


def test_the_published_null_caption_is_read_over_as_many_tokens_as_the_prompt(
    pipeline: PixArtSigmaPipeline, theirs
) -> None:
    """As in the published code: the padded null caption, with the prompt's mask."""
    ids = theirs.tokenizer(
        ["a red cube", "a small shiny sphere"], padding="max_length", max_length=12, return_tensors="pt"
    )
    empty = theirs.tokenizer([""], padding="max_length", max_length=12, return_tensors="pt")
    with torch.inference_mode():
        states = theirs.text_encoder(**empty)[0]
    captions, mask = pipeline.encode_null("", ids.attention_mask)
    assert torch.equal(mask, ids.attention_mask.bool()[:, : mask.shape[1]])
    for row, count in enumerate(mask.sum(1).tolist()):
        assert relative(captions[row, :count], states[0, :count]) < 1e-5


def test_the_null_caption_can_be_chosen(pipeline: PixArtSigmaPipeline) -> None:
    def draw(**options: Any) -> Tensor:
        return pipeline(
            "a red cube", num_inference_steps=2, generator=seeded(2)[0], output_type="latent", **options
        ).images

    assert torch.equal(draw(), draw(null_caption="own"))
    assert not torch.allclose(draw(), draw(null_caption="prompt"))
    with pytest.raises(ValueError, match="null_caption must be one of own, prompt"):
        next(pipeline.denoise("a cube", null_caption="other"))


def test_tiled_decoding_is_near_decoding_at_once(pipeline: PixArtSigmaPipeline) -> None:
    latents = torch.randn(1, 4, 80, 72, generator=seeded(4)[0]) * 0.5
    whole = pipeline.decode(latents, "pt", tiled=False)
    tiled = pipeline.decode(latents, "pt", tiled=True)
    assert tiled.shape == whole.shape == (1, 3, 640, 576)
    assert (tiled - whole).abs().mean() < 0.05  # group norms see a tile rather than the whole
    assert not torch.equal(tiled, whole)


class Scarce:
    """Memory for 64 latents per side, and not more."""

    def __init__(self, decoder: torch.nn.Module, error: Exception) -> None:
        self.error, self.sizes = error, []
        self.handle = decoder.register_forward_pre_hook(self)

    def __call__(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.sizes.append(max(inputs[0].shape[-2:]))
        if self.sizes[-1] > 64:
            raise self.error

    def __enter__(self) -> Scarce:
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def test_a_picture_that_does_not_fit_into_memory_is_decoded_in_tiles(
    pipeline: PixArtSigmaPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(2, 4, 80, 72, generator=torch.Generator().manual_seed(1))
    expected = pipeline.decode(latents, "pt", tiled=True)
    assert pipeline.decoded_in_tiles
    with Scarce(pipeline.vae.decoder, torch.OutOfMemoryError("CUDA out of memory")) as scarce:
        assert torch.equal(pipeline.decode(latents, "pt"), expected)
    assert pipeline.decoded_in_tiles and "decoding in tiles" in caplog.text
    assert scarce.sizes.count(80) == 1  # the second picture does not try again
    pipeline.decode(latents[..., :16, :16], "pt")
    assert not pipeline.decoded_in_tiles


def test_other_errors_of_the_decoder_are_not_taken_for_it(pipeline: PixArtSigmaPipeline) -> None:
    latents = torch.randn(1, 4, 80, 72)
    with (
        Scarce(pipeline.vae.decoder, RuntimeError("shapes do not fit")),
        pytest.raises(RuntimeError, match="fit"),
    ):
        pipeline.decode(latents, "pt")
    scarce = Scarce(pipeline.vae.decoder, MemoryError())
    with scarce, pytest.raises(MemoryError):
        pipeline.decode(latents, "pt", tiled=False)


def test_words_that_can_only_be_spelled_are_named_once(pipeline: PixArtSigmaPipeline) -> None:
    assert pipeline.unknown_words("a red Gryphon, on a (small) cube; gryphon x 7up") == ["gryphon", "7up"]
    assert pipeline.unknown_words("") == []
