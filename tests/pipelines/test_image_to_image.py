"""Pictures to start from, masks, growing, larger second passes: the methods on real classes of tiny size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import image_to_image, schedulers, tiling
from pipelines.dpm_solver import DPMSolver
from pipelines.lcm import LCMSolver
from pipelines.pixart_delta import PixArtDeltaPipeline
from pipelines.pixart_sigma import PixArtSigmaPipeline

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def pipeline(tiny_toy_folder):
    return PixArtSigmaPipeline.from_pretrained(tiny_toy_folder).prepare()


@pytest.fixture(scope="module")
def delta(tiny_delta_folder):
    return PixArtDeltaPipeline.from_pretrained(tiny_delta_folder).prepare()


def seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def photo(width: int = 128, height: int = 128) -> Image.Image:
    """Noise, so that a shift by a pixel is seen."""
    pixels = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4, 3), "uint8")
    return Image.fromarray(pixels.repeat(4, 0).repeat(4, 1))


def left_half(width: int = 128, height: int = 128) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def draw(pipeline, **options) -> Image.Image:
    options = {"num_inference_steps": 4, "generator": seed()} | options
    return pipeline(PROMPT, **options).images[0]


def steps(pipeline, **options) -> list:
    options = {"num_inference_steps": 4, "generator": seed()} | options
    return list(pipeline.denoise(PROMPT, **options))


# ------------------------------------------------------------------------------------------- the mathematics


WALKS = {
    "dpm++": lambda: DPMSolver(),
    "dpm++ v": lambda: DPMSolver(prediction_type="v_prediction"),
    "continuous": lambda: DPMSolver(timestep_spacing="continuous"),
    "lcm": lambda: LCMSolver(),
    "ddim": lambda: schedulers.make("ddim", DPMSolver()),
    "euler": lambda: schedulers.make("euler", DPMSolver()),
    "unipc": lambda: schedulers.make("unipc", DPMSolver()),
}


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_from_the_middle_of_a_schedule_the_true_noise_leads_back_to_the_picture(name, strength):
    walk = WALKS[name]()
    walk.set_timesteps(10)
    timesteps = image_to_image.last_part(walk, strength)
    assert len(timesteps) == int(10 * strength)
    picture, noise = torch.randn(2, 1, 4, 6, 6, generator=seed()).unbind()
    latents = image_to_image.noised(walk, picture, noise, timesteps[:1])
    assert not torch.allclose(latents, picture, atol=0.1)
    for timestep in timesteps:
        answer = noise
        if name == "dpm++ v":  # alpha noise - sigma picture
            index = walk.timesteps.tolist().index(timestep.item())
            alpha, sigma = walk._level(index)
            answer = alpha * noise - sigma * picture
        if name == "lcm":  # whose steps draw noise of their own: what is expected is the picture all the same
            alpha, sigma = walk._level(walk.timesteps.tolist().index(timestep.item()))
            answer = (latents - alpha * picture) / sigma
        seen = walk.scale_model_input(latents, timestep)
        latents = walk.step(answer, timestep, latents, return_dict=False)[0]
        assert seen.shape == latents.shape
    # Two end at timestep 0, not at no noise; LCM's boundary takes a little of the latents
    tolerance = {"continuous": 0.05, "ddim": 0.05, "lcm": 0.02}.get(name, 2e-3)
    torch.testing.assert_close(latents, picture, atol=tolerance, rtol=0)


def test_our_solver_starts_in_the_middle_as_the_library_does():
    from diffusers import DPMSolverMultistepScheduler

    ours, theirs = DPMSolver(), DPMSolverMultistepScheduler(beta_end=0.02, beta_start=0.0001)
    for walk in (ours, theirs):
        walk.set_timesteps(8)
        walk.set_begin_index(3)
    noise, latents = torch.randn(2, 1, 4, 6, 6, generator=seed()).unbind()
    one = two = ours.add_noise(latents, noise, ours.timesteps[3:4])
    torch.testing.assert_close(one, theirs.add_noise(latents, noise, theirs.timesteps[3:4]))
    for timestep in ours.timesteps[3:]:
        answer = torch.sin(3 * one) + one
        one = ours.step(answer, timestep, one)[0]
        two = theirs.step(answer, timestep, two, return_dict=False)[0]
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_a_walk_starts_over_when_its_steps_are_chosen_anew():
    walk, plain = DPMSolver(), DPMSolver()
    walk.set_timesteps(6)
    walk.set_begin_index(4)
    for one in (walk, plain):
        one.set_timesteps(5)
    latents = torch.randn(1, 4, 4, 4, generator=seed())
    for timestep in plain.timesteps:
        torch.testing.assert_close(
            walk.step(latents, timestep, latents)[0], plain.step(latents, timestep, latents)[0]
        )
    for index in (-1, 5):
        with pytest.raises(ValueError, match="timesteps"):
            walk.set_begin_index(index)


def test_one_tile_predicts_what_the_whole_does_and_several_mix():
    def predict(latents, index, timestep):
        return latents * 2 + latents.mean(dim=(-2, -1), keepdim=True)

    latents = torch.randn(2, 4, 16, 24, generator=seed())
    arguments = (latents, 0, torch.tensor(5))
    assert torch.equal(image_to_image.in_tiles(predict, 24)(*arguments), predict(*arguments))
    tiled = image_to_image.in_tiles(lambda x, *_: x * 3, 8)(*arguments)
    torch.testing.assert_close(tiled, latents * 3)
    assert not torch.equal(image_to_image.in_tiles(predict, 16)(*arguments), predict(*arguments))


def test_encoding_in_tiles_is_encoding_at_once_where_a_tile_suffices(pipeline):
    images = torch.rand(1, 3, 96, 128, generator=seed())

    def encode(piece):
        return pipeline.vae.encode(piece * 2 - 1)[0].mean

    with torch.inference_mode():
        whole = encode(images)
        assert torch.equal(image_to_image.encode_in_tiles(encode, images, factor=8), whole)
        pieces = image_to_image.encode_in_tiles(encode, images, factor=8, tile=8, overlap=4)
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().mean() < whole.abs().mean()


# --------------------------------------------------------------------------------------------- image to image


def test_strength_1_is_the_picture_of_the_seed_alone(pipeline):
    assert np.array_equal(draw(pipeline), draw(pipeline, image=photo(), strength=1.0))


def test_less_strength_stays_nearer_to_the_picture(pipeline):
    encoded = pipeline.encode_pictures(image_to_image.pixels(photo()))
    options = {"image": photo(), "num_inference_steps": 10}
    away = [
        (steps(pipeline, strength=strength, **options)[-1].latents - encoded).abs().mean()
        for strength in (0.1, 0.5, 0.9)
    ]
    assert away[0] < away[1] < away[2]


def test_progress_counts_the_steps_that_are_walked_and_the_same_seed_is_the_same_picture(pipeline):
    found = steps(pipeline, image=photo(), strength=0.6, num_inference_steps=10)
    assert [step.index for step in found] == list(range(6))
    assert {step.count for step in found} == {6}
    again = steps(pipeline, image=photo(), strength=0.6, num_inference_steps=10)
    assert torch.equal(found[-1].latents, again[-1].latents)
    other = steps(pipeline, image=photo(), strength=0.6, num_inference_steps=10, generator=seed(4))
    assert not torch.equal(found[-1].latents, other[-1].latents)


def test_fast_and_plain_agree_from_a_picture_too(tiny_toy_folder, pipeline):
    plain = PixArtSigmaPipeline.from_pretrained(tiny_toy_folder).prepare("plain")
    options = {"image": photo(), "strength": 0.5, "mask_image": left_half(), "hires": 1.5}
    one, two = (steps(which, **options)[-1].latents for which in (pipeline, plain))
    torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


def test_a_batch_starts_from_one_picture_and_each_is_as_if_alone(pipeline):
    options = {"image": photo(), "mask_image": left_half(), "strength": 0.5, "num_inference_steps": 4}
    both = pipeline(PROMPT, num_images_per_prompt=2, generator=[seed(1), seed(2)], **options).images
    alone = pipeline(PROMPT, generator=seed(2), **options).images[0]
    difference = np.abs(np.asarray(both[1], float) - np.asarray(alone, float))
    assert difference.max() <= 2  # rounding of matrices of another height
    assert np.abs(np.asarray(both[0], float) - np.asarray(alone, float)).max() > 2


@pytest.mark.parametrize("name", ["default", "dpm++-official", "ddim", "ddpm", "euler", "unipc", "sa"])
def test_every_schedule_starts_from_a_picture_and_keeps_what_a_mask_leaves(pipeline, name):
    encoded = pipeline.encode_pictures(image_to_image.pixels(photo()))
    for strength in (0.5, 1.0):
        last = steps(
            pipeline,
            image=photo(),
            mask_image=left_half(),
            mask_blur=0,
            strength=strength,
            scheduler=name,
            num_inference_steps=6,
        )[-1].latents
        assert torch.isfinite(last).all()
        assert torch.equal(last[..., 8:], encoded[..., 8:])
        assert not torch.equal(last[..., :8], encoded[..., :8])


def test_without_a_size_the_picture_has_its_own(pipeline):
    assert draw(pipeline, image=photo(160, 96)).size == (160, 96)
    assert draw(pipeline, image=photo(1600, 960)).size == (256, 160)
    assert draw(pipeline, image=photo(160, 96), height=128, width=64).size == (64, 128)


# ----------------------------------------------------------------------------------------------- under a mask


def test_outside_the_mask_the_latents_follow_the_noised_picture_at_every_step(pipeline):
    noise = pipeline.noise(1, 128, 128, seed())
    encoded = pipeline.encode_pictures(image_to_image.pixels(photo()))
    walk = pipeline._laid_out("default", 5, None)
    found = steps(
        pipeline, image=photo(), mask_image=left_half(), mask_blur=0, strength=1.0, num_inference_steps=5
    )
    for step, coming in zip(found, [*walk.timesteps[1:], None], strict=True):
        wanted = encoded if coming is None else walk.add_noise(encoded, noise, coming)
        assert torch.equal(step.latents[..., 8:], wanted[..., 8:])
        assert torch.equal(step.denoised[..., 8:], encoded[..., 8:]), "a look on the way shows it clear"


@pytest.mark.parametrize("blur", [0, 5])
@pytest.mark.parametrize("more", [{}, {"padding_mask_crop": 6}, {"strength": 0.5}], ids=str)
def test_what_a_mask_leaves_alone_is_equal_in_every_bit(pipeline, blur, more):
    picture, mask = photo(), Image.new("L", (128, 128))
    mask.paste(255, (20, 30, 60, 70))
    drawn = draw(pipeline, image=picture, mask_image=mask, mask_blur=blur, **{"strength": 1.0} | more)
    before, after = np.asarray(picture), np.asarray(drawn)
    stays = np.ones((128, 128), bool)
    stays[30 - blur : 70 + blur, 20 - blur : 60 + blur] = False
    assert np.array_equal(before[stays], after[stays])
    assert (before[~stays] != after[~stays]).mean() > 0.5


def test_only_the_part_around_the_mask_is_drawn_and_a_large_picture_keeps_its_size(pipeline):
    picture, mask = photo(700, 500), Image.new("L", (700, 500))
    mask.paste(255, (300, 200, 350, 260))
    found = steps(pipeline, image=picture, mask_image=mask, padding_mask_crop=20, strength=0.5)
    assert found[-1].latents.shape[-2:] == (16, 16)
    drawn = draw(pipeline, image=picture, mask_image=mask, padding_mask_crop=20, strength=0.5)
    assert drawn.size == (700, 500)
    differs = (np.asarray(drawn) != np.asarray(picture)).any(axis=2)
    rows, columns = np.nonzero(differs)
    assert rows.min() >= 196 and rows.max() < 264 and columns.min() >= 296 and columns.max() < 354
    assert differs[200:260, 300:350].mean() > 0.9


def test_a_canvas_grows_and_the_picture_stays_in_its_place(pipeline):
    picture = photo()
    drawn = draw(pipeline, image=picture, outpaint="left=32,top=16")
    assert drawn.size == (160, 144)
    inside = np.asarray(drawn)[16:, 32:]
    assert np.array_equal(inside[8:, 8:], np.asarray(picture)[8:, 8:]), "beyond twice the blur"
    full = steps(pipeline, image=picture, outpaint="left=32", strength=0.5)
    assert full[-1].count == 4, "what is new has nothing to start from"


def test_masks_and_growing_give_arrays_and_tensors_too(pipeline):
    options = {"image": photo(), "mask_image": left_half(), "strength": 0.5}
    drawn = np.asarray(draw(pipeline, **options), float) / 255
    array = draw(pipeline, output_type="np", **options)
    tensor = draw(pipeline, output_type="pt", **options)
    np.testing.assert_allclose(array, drawn, atol=1e-6)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), drawn, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- larger


def test_hires_walks_a_second_time_at_the_larger_size(pipeline):
    found = steps(pipeline, hires=1.5, hires_steps=8, hires_strength=0.5)
    assert [step.index for step in found] == list(range(8))
    assert {step.count for step in found} == {8}
    assert [step.latents.shape[-1] for step in found] == [16] * 4 + [24] * 4
    assert torch.equal(found[3].latents, steps(pipeline)[-1].latents), "the first pass is the picture"
    assert draw(pipeline, hires=1.5).size == (192, 192)
    assert draw(pipeline, hires=2, height=64, width=96, hires_upscale="latents").size == (192, 128)


def test_refining_in_one_tile_is_refining_at_once_and_smaller_tiles_are_not(pipeline):
    whole, one, many = (steps(pipeline, hires=2, hires_tile=tile)[-1].latents for tile in (None, 256, 128))
    assert torch.equal(whole, one)
    assert torch.isfinite(many).all() and not torch.equal(whole, many)


def test_beyond_twice_the_native_size_tiles_are_taken_unasked(pipeline):
    passes = pipeline._passes(
        None,
        scheduler="default",
        num_inference_steps=4,
        timesteps=None,
        strength=1.0,
        height=None,
        width=None,
        hires=3.0,
        hires_strength=0.5,
        hires_steps=None,
        hires_tile=None,
        use_resolution_binning=True,
    )
    assert passes[1].size == (384, 384) and passes[1].seen == (128, 128)


def test_a_picture_is_enlarged_and_refined_without_drawing_it_anew(pipeline):
    found = steps(pipeline, image=photo(), strength=0.0, hires=2, hires_strength=0.25)
    assert [step.latents.shape[-1] for step in found] == [32]
    encoded = pipeline.encode_pictures(image_to_image.pixels(photo().resize((256, 256), 1)))
    other = pipeline.encode_pictures(torch.rand(1, 3, 256, 256, generator=seed()))
    last = found[-1].latents
    assert (last - encoded).abs().mean() < (last - other).abs().mean()


def test_hires_keeps_what_a_mask_leaves_as_the_enlarged_picture_has_it(pipeline):
    drawn = draw(pipeline, image=photo(), mask_image=left_half(), mask_blur=0, hires=2)
    wanted = photo().resize((256, 256), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(drawn)[:, 132:], np.asarray(wanted)[:, 132:])


def test_leaving_the_loop_in_the_second_pass_cancels(pipeline):
    walk = pipeline.denoise(PROMPT, num_inference_steps=4, hires=2, generator=seed())
    for step in walk:
        if step.index == 5:
            break
    walk.close()
    assert step.latents.shape[-1] == 32
    assert np.array_equal(draw(pipeline), draw(pipeline)), "the next run knows nothing of it"


def test_a_few_steps_start_from_pictures_too(delta):
    assert len(steps(delta, image=photo(), strength=0.5, num_inference_steps=None)) == 2
    assert np.array_equal(draw(delta), draw(delta, image=photo(), strength=1.0))
    drawn = draw(delta, image=photo(), mask_image=left_half(), mask_blur=0, hires=1.5)
    assert drawn.size == (192, 192)
    controlled = draw(delta, control_image=photo(), image=photo(), strength=0.5, hires=1.5)
    assert controlled.size == (192, 192)


# --------------------------------------------------------------------------------------------------- refused


REFUSED = {
    "no image for the mask": ({"mask_image": left_half()}, "mask_image needs an image"),
    "no image to grow": ({"outpaint": "left=64"}, "outpaint needs an image"),
    "a mask of another size": (
        {"image": photo(), "mask_image": left_half(64, 128)},
        "mask_image is 64 x 128 pixels and the image 128 x 128",
    ),
    "a black mask": ({"image": photo(), "mask_image": Image.new("L", (128, 128))}, "black everywhere"),
    "a number for an image": ({"image": 3}, "image must be a PIL image"),
    "floats": ({"image": np.zeros((128, 128, 3))}, "image must be a PIL image or an array"),
    "strength beyond 1": ({"image": photo(), "strength": 1.2}, "strength must be a number from 0 to 1"),
    "no number": ({"image": photo(), "strength": float("nan")}, "strength must be a number"),
    "no step left": ({"image": photo(), "strength": 0.2}, "strength 0.2 of 4 steps leaves none"),
    "strength 0 alone": ({"image": photo(), "strength": 0.0}, "the least is 0.25"),
    "padding without mask": ({"image": photo(), "padding_mask_crop": 4}, "there is none"),
    "a negative blur": ({"image": photo(), "mask_blur": -1}, "mask_blur must be an integer"),
    "a canvas no multiple": ({"image": photo(), "outpaint": "left=10"}, "width of the canvas must be a mult"),
    "a canvas too large": ({"image": photo(), "outpaint": "left=512"}, "width of the canvas must be an"),
    "too long": ({"image": photo(2000, 100)}, "no side may be more than 4 times"),
    "hires beyond 4": ({"hires": 5}, "hires must be a number from 1 to 4"),
    "no step to refine": ({"hires": 2, "hires_strength": 0.1}, "hires_strength 0.1 of 4 steps"),
    "an odd tile": ({"hires": 2, "hires_tile": 100}, "hires_tile must be a multiple of 16"),
    "a tiny tile": ({"hires": 2, "hires_tile": 16}, "hires_tile must be an integer from 64"),
    "another upscale": ({"hires": 2, "hires_upscale": "magic"}, "hires_upscale must be one of"),
    "savers in tiles": ({"hires": 3, "savers": "taylor=2", "num_inference_steps": 20}, "of each has a past"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn_is_refused_before_any_work(pipeline, options, words):
    words = words.replace("of each has", "of which each has")
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        pipeline.check(PROMPT, **{"num_inference_steps": 4} | options)


def test_control_does_not_go_with_tiles_and_one_step_has_no_middle(delta):
    with pytest.raises(ValueError, match="control_image steers a picture as a whole"):
        delta.check(PROMPT, control_image=photo(), hires=3)
    delta.check(PROMPT, control_image=photo(), hires=2)
    with pytest.raises(ValueError, match="of 1 steps leaves none"):
        delta.check(PROMPT, scheduler="one-step", image=photo())
    delta.check(PROMPT, scheduler="one-step", image=photo(), strength=1.0)


def test_tiles_cover_everything_evenly():
    assert tiling.starts(32, 16, 4) == [0, 8, 16]
