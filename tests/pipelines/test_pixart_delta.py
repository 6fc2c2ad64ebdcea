"""The distilled walks against diffusers' PixArtAlphaPipeline, and the control picture."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.attention import ATTENTION
from pipelines.bins import BINS
from pipelines.dpm_solver import DPMSolver
from pipelines.lcm import LCMSolver, OneStep
from pipelines.models.hed import HED
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.models.pixart_control import ControlledPixArt, PixArtControlNet
from pipelines.pixart_delta import CONTROL_KINDS, PixArtDeltaPipeline, bin_ratio
from pipelines.pixart_sigma import PixArtSigmaPipeline

LINEAR: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
LATENT: dict[str, Any] = {"output_type": "latent"}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def shaken(model: torch.nn.Module) -> Any:
    """Random everywhere, zero layers too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def alpha(folder: Path, scheduler: Any = None, **options: Any) -> PixArtDeltaPipeline:
    """Parts of the toy folder around an alpha backbone of four blocks."""
    toy = PixArtSigmaPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        sample_size=16,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=32,
        use_additional_conditions=False,
    )
    transformer = shaken(PixArtTransformer2DModel(**config | options))
    return PixArtDeltaPipeline(
        toy.tokenizer,
        toy.text_encoder,
        toy.vae,
        transformer,
        scheduler or DPMSolver(prediction_type="epsilon"),
    )


def their(folder: Path, scheduler: Any) -> Any:
    """diffusers' pipeline from the same folder."""
    from diffusers import PixArtAlphaPipeline

    loaded = PixArtAlphaPipeline.from_pretrained(folder, scheduler=scheduler)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def pipeline(tiny_toy_folder: Path) -> PixArtDeltaPipeline:
    """Without a control branch."""
    return alpha(tiny_toy_folder)


@pytest.fixture(scope="module")
def saved(pipeline: PixArtDeltaPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alpha") / "folder"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def steered(tiny_toy_folder: Path) -> PixArtDeltaPipeline:
    """With a control branch that does something."""
    made = alpha(tiny_toy_folder)
    return made.attach(shaken(PixArtControlNet.from_transformer(made.transformer, 2)))


def photo(height: int = 90, width: int = 200) -> Image.Image:
    """A disc and a bar, coloured."""
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    pixels[(y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 4) ** 2] = (220, 30, 60)
    pixels[:, width // 8 : width // 5] = (20, 200, 90)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------- distilled walks


@pytest.mark.parametrize(
    "given",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": 1},
        {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "blue"},
        {"timesteps": [999, 600, 200]},
    ],
    ids=str,
)
def test_lcm_equals_diffusers_at_its_timesteps(
    pipeline: PixArtDeltaPipeline, saved: Path, given: dict[str, Any]
) -> None:
    from diffusers import LCMScheduler

    prompts = ["a red cube", "two small cones"]
    theirs = their(saved, LCMScheduler(**LINEAR))
    expected = theirs(
        prompts,
        generator=seeded(7, 8),
        use_resolution_binning=False,
        clean_caption=False,
        **{"guidance_scale": 0.0} | given,
        **LATENT,
    ).images
    found = pipeline(prompts, scheduler="lcm-diffusers", generator=seeded(7, 8), **given, **LATENT).images
    print("lcm", given, relative(found, expected))
    assert relative(found, expected) <= 1e-4  # float32; the first step divides rounding by 0.006


def test_one_step_equals_diffusers(pipeline: PixArtDeltaPipeline, saved: Path) -> None:
    from diffusers import DDPMScheduler

    theirs = their(saved, DDPMScheduler(**LINEAR, clip_sample=False))
    expected = theirs(
        "a red cube",
        timesteps=[400],
        guidance_scale=1.0,
        generator=seeded(7)[0],
        use_resolution_binning=False,
        clean_caption=False,
        **LATENT,
    ).images
    found = pipeline("a red cube", scheduler="one-step", generator=seeded(7)[0], **LATENT).images
    print("one-step", relative(found, expected))
    assert relative(found, expected) <= 1e-5


def test_ordinary_walks_and_micro_conditions_equal_diffusers(tiny_toy_folder: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    ours = alpha(tiny_toy_folder, sample_size=128, use_additional_conditions=True, num_layers=2)
    ours.save_pretrained(tmp_path / "alpha")
    theirs = their(tmp_path / "alpha", DPMSolverMultistepScheduler(**LINEAR))
    given: dict[str, Any] = {"height": 512, "width": 704, "num_inference_steps": 2, **LATENT}
    expected = theirs(
        "a cube", generator=seeded(1)[0], use_resolution_binning=False, clean_caption=False, **given
    ).images
    given["use_resolution_binning"] = False
    found = ours("a cube", generator=seeded(1)[0], **given).images
    print("micro", relative(found, expected))
    assert relative(found, expected) <= 1e-4
    published = ours("a cube", generator=seeded(1)[0], micro_ratio="bin", **given).images
    assert 0 < relative(published, found) < 0.1  # 512 / 704 is 0.727, the bin says 0.72


def test_the_ratio_of_a_bin_is_its_own_key() -> None:
    for native, bins in BINS.items():
        for key, size in bins.items():
            assert bin_ratio(*size, native) == float(key)


def test_the_schedulers_of_a_published_folder_are_walked_at_the_official_timesteps(
    tiny_toy_folder: Path, tmp_path: Path
) -> None:
    from diffusers import LCMScheduler

    alpha(tiny_toy_folder).save_pretrained(tmp_path / "lcm")
    LCMScheduler(**LINEAR).save_pretrained(tmp_path / "lcm" / "scheduler")
    path = tmp_path / "lcm" / "model_index.json"
    index = json.loads(path.read_text()) | {"scheduler": ["diffusers", "LCMScheduler"]}
    path.write_text(json.dumps(index))
    for own in (True, False):
        loaded = PixArtDeltaPipeline.from_pretrained(tmp_path / "lcm", own_parts=own)
        assert type(loaded.scheduler).__name__ == ("LCMSolver" if own else "LCMScheduler")
        steps = list(loaded.denoise("a cube", generator=seeded(1)[0]))
        assert [int(step.timestep) for step in steps] == [999, 759, 519, 279]  # and 4 of them by default
        steps = list(loaded.denoise("a cube", scheduler="lcm-diffusers"))
        assert [int(step.timestep) for step in steps] == [999, 759, 499, 259]
        assert len(list(loaded.denoise("a cube", scheduler="dpm++", num_inference_steps=2))) == 2
    loaded = PixArtDeltaPipeline.from_pretrained(tmp_path / "lcm")
    loaded.save_pretrained(tmp_path / "again")
    assert isinstance(PixArtDeltaPipeline.from_pretrained(tmp_path / "again").scheduler, LCMSolver)


def test_a_one_step_folder_survives_the_round_trip(tiny_toy_folder: Path, tmp_path: Path) -> None:
    alpha(tiny_toy_folder, OneStep(timestep=321)).save_pretrained(tmp_path / "one")
    loaded = PixArtDeltaPipeline.from_pretrained(tmp_path / "one")
    assert isinstance(loaded.scheduler, OneStep)
    assert [int(step.timestep) for step in loaded.denoise("a cube")] == [321]


def test_guidance_is_off_where_it_is_distilled_in(
    pipeline: PixArtDeltaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    encode = pipeline.encode
    monkeypatch.setattr(
        pipeline, "encode", lambda texts, *a, **o: read.append((texts, a, o)) or encode(texts)
    )
    list(pipeline.denoise("a cube", scheduler="lcm"))
    assert [texts for texts, _, _ in read] == [["a cube"]]
    assert read[0][2]["max_sequence_length"] == 120
    given: dict[str, Any] = {"num_inference_steps": 2, "generator": seeded(3)[0], **LATENT}
    assert torch.equal(
        pipeline("a cube", **given).images,
        pipeline("a cube", guidance_scale=4.5, **given | {"generator": seeded(3)[0]}).images,
    )


@pytest.mark.parametrize("scheduler", ["lcm", "one-step", "ddpm"])
def test_picture_n_of_a_batch_equals_the_single_picture_of_its_seed(
    pipeline: PixArtDeltaPipeline, scheduler: str
) -> None:
    """Also where noise is added on the way."""
    steps = {"ddpm": {"num_inference_steps": 3}}.get(scheduler, {})
    given: dict[str, Any] = {"scheduler": scheduler, **steps, **LATENT}
    batch = pipeline("a red cube", num_images_per_prompt=3, generator=seeded(5, 6, 7), **given).images
    for row, seed in enumerate((5, 6, 7)):
        alone = pipeline("a red cube", generator=seeded(seed)[0], **given).images
        assert relative(batch[row], alone[0]) <= 1e-4  # the first step divides rounding by 0.006


def test_closing_the_generator_cancels_before_the_next_step(
    steered: PixArtDeltaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = itertools.count(), steered.transformer.forward
    monkeypatch.setattr(
        steered.transformer, "forward", lambda *args, **options: (next(calls), forward(*args, **options))[1]
    )
    steps = steered.denoise("a red cube", scheduler="lcm", control_image=photo())
    next(steps)
    next(steps)
    steps.close()
    assert next(calls) == 2
    assert not torch.is_inference_mode_enabled()


# -------------------------------------------------------------------------------------- the control picture


def test_without_control_or_at_scale_zero_it_is_the_base_pipeline(
    steered: PixArtDeltaPipeline, pipeline: PixArtDeltaPipeline
) -> None:
    base = PixArtSigmaPipeline(*(getattr(steered, name) for name in PixArtSigmaPipeline.parts))
    expected = base("a cube", num_inference_steps=3, generator=seeded(4)[0], **LATENT).images
    given: dict[str, Any] = {"num_inference_steps": 3, **LATENT}
    assert torch.equal(steered("a cube", generator=seeded(4)[0], **given).images, expected)
    given |= {"control_image": photo(), "controlnet_conditioning_scale": 0.0}
    assert torch.equal(steered("a cube", generator=seeded(4)[0], **given).images, expected)
    given["controlnet_conditioning_scale"] = 1.0
    assert relative(steered("a cube", generator=seeded(4)[0], **given).images, expected) > 1e-2


def test_a_branch_that_has_learned_nothing_changes_nothing(tiny_toy_folder: Path) -> None:
    made = alpha(tiny_toy_folder)
    given: dict[str, Any] = {"num_inference_steps": 2, **LATENT}
    expected = made("a cube", generator=seeded(4)[0], **given).images
    made.attach(PixArtControlNet.from_transformer(made.transformer, 3))
    assert torch.equal(
        made("a cube", control_image=photo(), generator=seeded(4)[0], **given).images, expected
    )


@pytest.mark.parametrize(
    ("window", "expected"),
    [((0, 1), [0, 1, 2, 3]), ((0, 0.5), [0, 1]), ((0.5, 1), [2, 3]), ((0.25, 0.75), [1, 2]), ((0, 0.3), [0])],
)
def test_control_works_in_the_steps_between_start_and_end(
    steered: PixArtDeltaPipeline,
    window: tuple[float, float],
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, between = [], steered.controlnet.between
    monkeypatch.setattr(steered.controlnet, "between", lambda *a, **o: seen.append(now) or between(*a, **o))
    now = 0
    start, end = window
    for step in steered.denoise(
        "a cube",
        num_inference_steps=4,
        control_image=photo(),
        control_guidance_start=start,
        control_guidance_end=end,
    ):
        now = step.index + 1
    assert seen == expected


@pytest.mark.parametrize("scheduler", ["default", "lcm"])
def test_picture_n_of_a_controlled_batch_equals_the_single_picture(
    steered: PixArtDeltaPipeline, scheduler: str
) -> None:
    given: dict[str, Any] = {
        "num_inference_steps": 3,
        "control_image": photo(),
        "scheduler": scheduler,
        **LATENT,
    }
    prompts = ["a red cube", "two small blue cones"]
    batch = steered(prompts, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **given).images
    for row, seed in enumerate((1, 2, 3, 4)):
        alone = steered(prompts[row // 2], generator=seeded(seed)[0], **given).images
        assert relative(batch[row], alone[0]) <= 1e-4  # lcm's first step divides rounding by 0.006


@pytest.mark.parametrize("controls", [1, 2])
@torch.inference_mode()
def test_guidance_and_control_equal_one_pass_for_each_half_and_picture(
    steered: PixArtDeltaPipeline, controls: int
) -> None:
    """One control for all, and one for each, while guidance doubles the latents."""
    torch.manual_seed(3)
    latents, pictures = torch.randn(2, 4, 16, 16), torch.randn(controls, 4, 16, 16)
    prompts, timestep = ["a red cube", "two small blue cones"], torch.tensor([500])
    network = ControlledPixArt(steered.transformer, steered.controlnet)
    captions = [steered.encode([text]) for text in ("", *prompts)]

    def alone(row: int, caption: int) -> Tensor:
        states, mask = captions[caption]
        given = {"encoder_attention_mask": mask, "control_latents": pictures[row : row + 1]}
        if controls == 1:
            given["control_latents"] = pictures
        return network(latents[row : row + 1], states, timestep, **given).sample[:, :4]

    halves = steered.encode(["", "", *prompts])
    text, modulation = network.text_states(*halves), network.modulation(timestep)
    predict = steered.predictor(text, modulation, 3.0, functools.partial(network, control_latents=pictures))
    found = predict(latents, 0, timestep)
    for row in range(2):
        without, with_text = alone(row, 0), alone(row, 1 + row)
        assert relative(found[row], (without + 3.0 * (with_text - without))[0]) <= 1e-4


@pytest.mark.parametrize("null_caption", ["own", "prompt"])
def test_control_leaves_the_null_caption_to_each_picture(
    steered: PixArtDeltaPipeline, null_caption: str
) -> None:
    """Negative prompts of other lengths than the prompts, read in both ways."""
    given: dict[str, Any] = {"num_inference_steps": 3, "null_caption": null_caption, **LATENT}
    given["control_image"] = photo()
    prompts, negative = ["a red cube", "two small cones behind a matte sphere"], ["blue", "a big red torus"]
    batch = steered(prompts, negative, generator=seeded(1, 2), **given).images
    for row, seed in enumerate((1, 2)):
        alone = steered(prompts[row], negative[row], generator=seeded(seed)[0], **given).images
        assert relative(batch[row], alone[0]) <= 1e-4


def test_the_sample_of_the_control_follows_the_seed_and_does_not_move_the_noise(
    steered: PixArtDeltaPipeline,
) -> None:
    size = (128, 128)

    def sample(generator: Any) -> Tensor:
        with torch.inference_mode():
            return steered._control_latents(photo(), "soft", size, generator)

    one, state = seeded(5)[0], seeded(5)[0].get_state()
    first = sample(one)
    assert torch.equal(one.get_state(), state)
    torch.randn(7, generator=one)
    assert torch.equal(sample(one), first)
    assert torch.equal(sample(seeded(5, 6))[:1], first)
    assert not torch.equal(sample(seeded(6)[0]), first)
    assert first.shape == (1, 4, 16, 16)
    assert not torch.equal(sample(None), sample(None))
    with torch.inference_mode():
        mean = steered.vae.encode(_as_vae_input(steered.control_preview(photo())))[0].mean[0]
    many = sample(seeded(*range(200)))
    assert relative(many.mean(0) / steered.vae.config.scaling_factor, mean) < 0.5  # a sample, around the mean


def _as_vae_input(preview: Image.Image) -> Tensor:
    edges = torch.from_numpy(np.asarray(preview, dtype=np.float32) / 255)
    return (edges * 2 - 1)[None, None].repeat(1, 3, 1, 1)


def test_the_preview_is_the_edges_as_drawn(steered: PixArtDeltaPipeline) -> None:
    shown = {kind: steered.control_preview(photo(), kind) for kind in ("soft", "canny", "edges")}
    assert {(one.mode, one.size) for one in shown.values()} == {("L", (128, 128))}
    assert set(np.unique(np.asarray(shown["canny"]))) == {0, 255}
    assert steered.control_preview(photo(), "canny", height=96, width=160).size == (160, 96)
    lines = np.asarray(shown["soft"]).astype(int)
    # 200 x 90 cut to its middle: the disc of radius 22 of 90 becomes one of 32 of 128
    assert lines[64, 64 + 32 - 4 : 64 + 32 + 5].max() > 100 > 10 > lines[64, 64]
    edges = np.random.default_rng(0).random((128, 128)).astype(np.float32)
    assert np.array_equal(
        np.asarray(steered.control_preview(edges, "edges")), (edges * 255).round().astype("uint8")
    )


def test_pictures_and_arrays_mean_the_same(steered: PixArtDeltaPipeline) -> None:
    pixels = np.asarray(photo())
    expected = np.asarray(steered.control_preview(photo()))
    for same in (pixels, pixels.astype(np.float32) / 255, pixels.astype(np.float64) / 255):
        assert np.abs(np.asarray(steered.control_preview(same)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(128, 128), (16, 5000), (5000, 16), (97, 131), (1000, 700)])
def test_control_pictures_of_any_size_cover_the_drawn_one(
    steered: PixArtDeltaPipeline, size: tuple[int, int]
) -> None:
    white = np.ones((*size, 3), dtype=np.float32)
    assert np.asarray(steered.control_preview(white, "edges")).min() == 255  # no border of nothing


def test_hed_finds_the_edges_where_its_weights_are(tiny_toy_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = alpha(tiny_toy_folder)
    made.attach(PixArtControlNet.from_transformer(made.transformer, 2), HED())
    assert made.control_preview(photo(), "hed").size == (128, 128)
    made.save_pretrained(tmp_path / "hed")
    again = PixArtDeltaPipeline.from_pretrained(tmp_path / "hed", torch_dtype=torch.bfloat16)
    assert again.hed is not None and again.hed.dtype == torch.float32
    assert again.controlnet is not None and again.controlnet.dtype == torch.bfloat16
    assert np.array_equal(*(np.asarray(one.control_preview(photo(), "hed")) for one in (made, again)))
    drawn = again("a cube", num_inference_steps=1, control_image=photo(), control_kind="hed", **LATENT).images
    assert torch.isfinite(drawn).all()


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": "lmc"}, "scheduler must be one of default, .*lcm, lcm-diffusers, one-step"),
        ({"scheduler": "lcm", "num_inference_steps": 51}, "distilled on 50 timesteps"),
        ({"scheduler": "one-step", "num_inference_steps": 2}, "draws in one step, not 2"),
        ({"scheduler": "one-step", "timesteps": [400, 100]}, "draws in one step"),
        ({"scheduler": "lcm", "timesteps": [1000]}, "timesteps must be descending integers from 999 to 0"),
        ({"scheduler": "sa", "timesteps": [999, 3]}, "SASolverScheduler cannot be told its timesteps"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number"),
        ({"micro_ratio": "nearest"}, "micro_ratio must be one of exact, bin"),
        (
            {"controlnet_conditioning_scale": -0.1},
            "controlnet_conditioning_scale must be a number of 0 or more",
        ),
        ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale must be"),
        ({"control_guidance_start": True}, "control_guidance_start must be a number from 0 to 1"),
        ({"control_guidance_end": 1.5}, "control_guidance_end must be a number from 0 to 1"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "must be below control_guidance_end"),
        ({"control_guidance_end": 0.04}, "none of 20 steps lies between"),
        ({"control_kind": "sketch"}, "control_kind must be one of hed, soft, canny, edges"),
        ({"control_kind": "hed"}, "needs the weights of HED, .* without any: soft, canny, edges"),
        ({"control_image": Image.new("RGBA", (64, 64))}, "control_image: .*transparent"),
        ({"control_image": Image.new("CMYK", (64, 64))}, "control_image: .*mode CMYK"),
        ({"control_image": np.full((64, 64), np.nan)}, r"control_image: .*in 0\.\.1"),
        ({"control_image": np.full((64, 64), 2.0)}, r"control_image: .*in 0\.\.1"),
        ({"control_image": np.zeros((64, 64), dtype=np.int64)}, "control_image: .*int64"),
        ({"control_image": np.zeros((64, 8, 3))}, "control_image: .*at least 16"),
        ({"control_image": [photo()]}, "control_image: .*not list"),
        ({"control_image": "photo.png"}, "control_image: .*not str"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    steered: PixArtDeltaPipeline, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steered, "encode", None)
    given = {"prompt": "a red cube", "control_image": photo(), **given}
    with pytest.raises(ValueError, match=message):
        steered.check(**given)
    with pytest.raises(ValueError, match=message):
        steered(**given)


def test_a_control_picture_needs_a_branch_of_this_base(pipeline: PixArtDeltaPipeline) -> None:
    with pytest.raises(ValueError, match="needs a control branch, and these weights have none"):
        pipeline.check("a cube", control_image=photo())
    foreign = PixArtTransformer2DModel(
        sample_size=16, num_layers=4, num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96
    )
    with pytest.raises(ValueError, match="wants a base with num_attention_heads 4, not 2"):
        pipeline.attach(PixArtControlNet.from_transformer(foreign, 2))
    assert pipeline.controlnet is None
    assert pipeline.control_preview(photo()).size == (128, 128)  # this needs none
    with pytest.raises(TypeError, match="sigmas"):
        pipeline("a red cube", sigmas=[1.0])


def test_the_ratio_of_a_bin_needs_bins(tiny_toy_folder: Path) -> None:
    with pytest.raises(ValueError, match="there are none for 128 pixels"):
        alpha(tiny_toy_folder, use_additional_conditions=True).check("a cube", micro_ratio="bin")


# --------------------------------------------------------------------------------------- folders and devices


def test_saving_and_loading_keeps_the_control_branch(steered: PixArtDeltaPipeline, tmp_path: Path) -> None:
    steered.save_pretrained(tmp_path / "control")
    again = PixArtDeltaPipeline.from_pretrained(tmp_path / "control")
    given: dict[str, Any] = {"num_inference_steps": 2, "control_image": photo(), **LATENT}
    drawn = [one("a cube", generator=seeded(1)[0], **given).images for one in (steered, again)]
    assert torch.equal(*drawn)
    shutil.rmtree(tmp_path / "control" / "controlnet")
    with pytest.raises(ValueError, match="controlnet is missing"):
        PixArtDeltaPipeline.from_pretrained(tmp_path / "control")


def test_diffusers_reads_our_folder_with_a_control_branch(
    steered: PixArtDeltaPipeline, tmp_path: Path
) -> None:
    steered.save_pretrained(tmp_path / "control")
    theirs = their(tmp_path / "control", None)
    assert not hasattr(theirs, "controlnet")


def test_sigma_folders_stay_sigma(tiny_toy_folder: Path, tmp_path: Path) -> None:
    loaded = PixArtDeltaPipeline.from_pretrained(tiny_toy_folder)
    sigma = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder)
    long, given = "a red cube and " * 60, {"num_inference_steps": 2, **LATENT}
    found, expected = (one(long, generator=seeded(1)[0], **given).images for one in (loaded, sigma))
    assert torch.equal(found, expected)  # 300 tokens, not 120
    control = PixArtControlNet.from_transformer(loaded.transformer, 1)
    control.save_pretrained(tmp_path / "apart")
    loaded.save_pretrained(tmp_path / "again")
    shutil.move(tmp_path / "apart", tmp_path / "again" / "controlnet")  # as the converter leaves it
    again = PixArtDeltaPipeline.from_pretrained(tmp_path / "again")
    assert again.controlnet is not None
    assert PixArtSigmaPipeline.from_pretrained(tmp_path / "again") is not None


@pytest.mark.parametrize("entry", [None, [None, None], "none", ["pipelines", "PixArtControlNet"]])
def test_the_index_says_whether_there_is_a_control_branch(saved: Path, tmp_path: Path, entry: Any) -> None:
    shutil.copytree(saved, tmp_path / "alpha")
    path = tmp_path / "alpha" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"controlnet": entry}))
    if entry in (None, [None, None]):
        assert PixArtDeltaPipeline.from_pretrained(tmp_path / "alpha").controlnet is None
    else:
        with pytest.raises(ValueError, match="controlnet is missing"):
            PixArtDeltaPipeline.from_pretrained(tmp_path / "alpha")


@pytest.mark.parametrize("options", [{"trained_betas": [0.1] * 1000}, {"rescale_betas_zero_snr": True}])
def test_a_distilled_walk_does_not_pass_over_what_the_stored_schedule_has(
    pipeline: PixArtDeltaPipeline, options: dict[str, Any]
) -> None:
    from diffusers import LCMScheduler

    parts = [getattr(pipeline, name) for name in PixArtDeltaPipeline.parts[:-1]]
    other = PixArtDeltaPipeline(*parts, LCMScheduler(**LINEAR | options))
    other.check("a cube")  # the stored one has it
    with pytest.raises(ValueError, match=f"{next(iter(options))}, which no other scheduler takes over"):
        other.check("a cube", scheduler="lcm")


def test_other_families_are_refused(tiny_toy_folder: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a PixArtAlphaPipeline, not a PixArtSigmaPipeline"):
        PixArtSigmaPipeline.from_pretrained(saved)
    shutil.copytree(saved, tmp_path / "flux")
    index = tmp_path / "flux" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    message = "holds a FluxPipeline, not a PixArtAlphaPipeline or PixArtSigmaPipeline"
    with pytest.raises(ValueError, match=message):
        PixArtDeltaPipeline.from_pretrained(tmp_path / "flux")


def test_attention_and_dtype_reach_the_branch(tiny_toy_folder: Path) -> None:
    made = alpha(tiny_toy_folder)
    made.attach(shaken(PixArtControlNet.from_transformer(made.transformer, 2)))
    given: dict[str, Any] = {"num_inference_steps": 2, "control_image": photo(), **LATENT}
    expected = made("a cube", generator=seeded(1)[0], **given).images
    assert made.set_attention("math") == "math"
    layers = [module for module in made.controlnet.modules() if hasattr(module, "attend")]
    assert {layer.attend for layer in layers} == {ATTENTION["math"].attend}
    assert relative(made("a cube", generator=seeded(1)[0], **given).images, expected) <= 1e-4
    made.to(dtype=torch.bfloat16)
    assert made.controlnet.dtype == torch.bfloat16
    drawn = made("a cube", generator=seeded(1)[0], **given).images
    assert drawn.dtype == torch.float32 and torch.isfinite(drawn).all()


def test_every_kind_of_edges_is_offered() -> None:
    assert CONTROL_KINDS == ("hed", "soft", "canny", "edges")
