"""Where a picture lies for drawing, and what of it stays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines import canvas, image_to_image


def photo(width: int = 128, height: int = 128) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), "uint8")
    return Image.fromarray(pixels)


def left_half(width: int = 128, height: int = 128) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


@pytest.mark.parametrize(
    ("count", "strength", "kept"),
    [(20, 0.6, 12), (20, 1.0, 20), (20, 0.0, 0), (4, 0.6, 2), (4, 0.2, 0), (3, 0.5, 1)],
)
def test_strength_is_the_part_of_the_steps_that_is_walked(count, strength, kept):
    assert canvas.kept_steps(count, strength) == kept


def test_every_least_strength_that_is_named_leaves_a_step():
    for count in range(1, 200):
        least = float(canvas.no_steps("strength", 0, count).rpartition(" ")[2])
        assert canvas.kept_steps(count, least) >= 1


@pytest.mark.parametrize(
    ("text", "grown"),
    [
        ("left=64,right=32", (64, 0, 32, 0)),
        (" right = 16 ", (0, 0, 16, 0)),
        ("64,0,32,0", (64, 0, 32, 0)),
        ("16", (16, 16, 16, 16)),
        ({"top": 8}, (0, 8, 0, 0)),
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        (None, (0, 0, 0, 0)),
    ],
)
def test_sides_are_read_in_every_form(text, grown):
    assert canvas.margins(text) == grown
    if any(grown):
        assert canvas.margins(canvas.margins_text(grown)) == grown


@pytest.mark.parametrize(
    "text",
    ["", "left", "left=", "left=x", "left=1,left=2", "up=5", "1,2", "1,2,3,4,5", "-5", "0", "left=0",
     "9999999", "1.5", {"up": 3}, (1, 2), (1.0, 0, 0, 0), (True, 0, 0, 0)],
)  # fmt: skip
def test_sides_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="outpaint"):
        canvas.margins(text)


@pytest.mark.parametrize(
    ("own", "wanted", "size"),
    [
        ((128, 96), (None, None), (128, 96)),
        ((100, 150), (None, None), (96, 144)),  # to multiples
        ((3000, 2000), (None, None), (256, 176)),  # down to the largest
        ((40, 30), (None, None), (80, 64)),  # up to the smallest
        ((3000, 2000), (128, None), (128, 80)),  # the other side as the picture has it
        ((3000, 2000), (None, 128), (192, 128)),
        ((3000, 2000), (64, 256), (64, 256)),
        ((256, 64), (None, None), (256, 64)),
    ],
)
def test_a_picture_decides_the_size_within_the_limits(own, wanted, size):
    assert canvas.fitted(own, wanted, 64, 256, 16) == size


def test_a_picture_too_long_for_any_size_is_refused_unless_a_size_is_said():
    with pytest.raises(ValueError, match="20000 x 100 pixels, and no side may be more than 4 times"):
        canvas.fitted((20_000, 100), (None, None), 64, 256, 16)
    assert canvas.fitted((20_000, 100), (128, 128), 64, 256, 16) == (128, 128)


def test_feathering_reaches_exactly_as_far_as_it_says():
    mask = left_half()
    for pixels in (1, 4, 7):
        soft = np.asarray(canvas.feathered(mask, pixels))
        assert (soft[:, : 64 - pixels] == 255).all() and (soft[:, 64 + pixels :] == 0).all()
        assert 0 < soft[5, 63] < 255 and 0 < soft[5, 64] < 255
        assert (np.diff(soft[5].astype(int)) <= 0).all()
    assert canvas.feathered(mask, 0) is mask


def test_what_the_network_draws_in_another_shape_is_the_picture_where_it_is_cut_out_again():
    """A pipeline with bins draws at 128 x 96 what is asked for at 100 x 100, resizes and crops: and back."""
    from pipelines.latent_images import _resize_and_crop

    smooth = Image.fromarray(np.linspace(0, 255, 100 * 100).reshape(100, 100).astype("uint8")).convert("RGB")
    for asked, drawn in (((100, 100), (128, 96)), ((100, 100), (96, 128)), ((64, 100), (128, 128))):
        picture = smooth.crop((0, 0, asked[1], asked[0]))
        laid_out = canvas.lay_out(picture, asked)
        there = image_to_image.pixels(laid_out.picture(drawn))
        assert there.shape[-2:] == drawn
        back = _resize_and_crop(there, *asked)
        assert (back - image_to_image.pixels(picture)).abs().mean() < 0.01


def test_the_part_around_a_mask_has_the_shape_that_is_drawn_and_lies_within():
    mask = Image.new("L", (600, 400))
    mask.paste(255, (500, 350, 580, 380))
    laid_out = canvas.lay_out(photo(600, 400), (64, 128), mask, padding=10)
    left, top, right, bottom = laid_out.box
    assert (right - left) == 2 * (bottom - top) == 100
    assert left <= 490 and right >= 590 and top <= 340 and bottom >= 390 and right <= 600 and bottom <= 400
    assert laid_out.picture((64, 128)).size == laid_out.free((64, 128)).size == (128, 64)
    tall = canvas.lay_out(photo(40, 400), (64, 64), left_half(40, 400), padding=0)
    left, _, right, _ = tall.box
    assert left < 0 and right > 40, "a picture too narrow continues its edges"
    assert tall.finish(Image.new("RGB", (64, 64), "red")).size == (40, 400)
