"""Pictures to start from, masks, growing and larger pictures, through the command line and requests."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen import artifacts, catalog, cli, engine, image_inputs, pictures
from gen.errors import GenError
from gen.request import Request

pytestmark = pytest.mark.usefixtures("installed")
RUN = ["run", "pixart-sigma:toy", "a blue cube", "--seed", "3", "--steps", "4"]


def photo(width: int = 128, height: int = 128) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), "uint8")
    return Image.fromarray(pixels)


def half(width: int = 128, height: int = 128) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


@pytest.fixture
def files(tmp_path) -> Path:
    photo().save(tmp_path / "in.png")
    half().save(tmp_path / "m.png")
    return tmp_path


def build(**values) -> Request:
    return Request.build("pixart-sigma:toy", {"prompt": "a red cube", "seed": 3, "steps": 4} | values)


def drawn(capsys, *arguments: str) -> tuple[np.ndarray, str, str]:
    assert cli.execute([*RUN, *arguments]) == 0
    said = capsys.readouterr()
    path = said.out.strip()
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), path, said.err


# ------------------------------------------------------------------------------------------ the command line


def test_a_picture_to_start_from_is_in_the_recipe_and_draws_again_when_it_is_gone(files, capsys):
    plain, *_ = drawn(capsys)
    pixels, path, _ = drawn(capsys, "--image", str(files / "in.png"), "--strength", "0.7")
    assert not np.array_equal(plain, pixels)
    inputs = artifacts.read_recipe(Path(path))["request"]["inputs"]
    assert inputs["strength"] == 0.7
    assert inputs["image"]["name"] == "in.png"
    (files / "in.png").unlink()
    assert cli.execute(["run", "--repeat", path]) == 0
    with Image.open(capsys.readouterr().out.strip()) as again:
        assert np.array_equal(pixels, np.asarray(again.convert("RGB")))


def test_what_the_mask_leaves_alone_stays_in_every_bit(files, capsys):
    pixels, path, _ = drawn(
        capsys, "--image", str(files / "in.png"), "--mask", str(files / "m.png"), "--mask-blur", "3"
    )
    before = np.asarray(photo())
    assert np.array_equal(pixels[:, 67:], before[:, 67:])
    assert not np.array_equal(pixels[:, :60], before[:, :60])
    assert cli.execute(["run", "--repeat", path]) == 0
    with Image.open(capsys.readouterr().out.strip()) as again:
        assert np.array_equal(pixels, np.asarray(again.convert("RGB")))


def test_a_picture_grows_and_a_picture_is_drawn_larger(files, capsys):
    pixels, path, _ = drawn(capsys, "--image", str(files / "in.png"), "--outpaint", "right=64")
    assert pixels.shape == (128, 192, 3)
    assert np.array_equal(pixels[:, :120], np.asarray(photo())[:, :120])
    assert artifacts.read_recipe(Path(path))["request"]["inputs"]["outpaint"] == "right=64"
    pixels, path, said = drawn(capsys, "--hires", "2")
    assert pixels.shape == (256, 256, 3)
    assert "hires" not in said.lower(), said
    entry = artifacts.read_recipe(Path(path))["request"]["inputs"]
    assert (entry["width"], entry["hires"]) == (128, 2.0)


def test_a_small_part_of_a_large_photo_is_drawn_and_the_rest_is_the_photo(tmp_path, capsys):
    large, mask = photo(900, 600), Image.new("L", (900, 600))
    mask.paste(255, (700, 300, 760, 350))
    large.save(tmp_path / "large.png")
    mask.save(tmp_path / "mask.png")
    given = ("--image", str(tmp_path / "large.png"), "--mask", str(tmp_path / "mask.png"))
    pixels, _, said = drawn(capsys, *given, "--mask-padding", "16")
    assert pixels.shape == (600, 900, 3)
    before = np.asarray(large)
    before_kept, after_kept = before.copy(), pixels.copy()
    for one in (before_kept, after_kept):
        one[296:354, 696:764] = 0
    assert np.array_equal(before_kept, after_kept)
    assert not np.array_equal(before[305:345, 705:755], pixels[305:345, 705:755])
    assert "pixels are drawn, at 128 x 128" in said


def test_a_request_without_any_of_it_is_what_it_was(capsys):
    """Old recipes name none of these inputs; they stay at what changes nothing."""
    inputs = dict(build().inputs)
    new = ("image", "mask", "mask_padding", "outpaint", "hires", "hires_steps", "hires_tile")
    assert all(inputs.pop(name) is None for name in new)
    old = build().to_json()
    old["inputs"] = {name: inputs[name] for name in ("prompt", "width", "height", "steps", "guidance")}
    assert Request.from_json(old) == build()


# -------------------------------------------------------------------------------------------------- the size


@pytest.mark.parametrize(
    ("size", "values", "found", "note"),
    [
        ((128, 96), {}, (128, 96), ""),
        ((100, 150), {}, (96, 144), "scaled to 96 x 144"),
        ((500, 300), {}, (256, 160), "scaled and cropped around its middle to 256 x 160"),
        ((500, 300), {"width": 128}, (128, 80), "to 128 x 80"),
        ((500, 300), {"width": 128, "height": 128}, (128, 128), "cropped around its middle to 128 x 128"),
    ],
    ids=str,
)
def test_without_width_and_height_the_picture_decides_and_what_is_done_to_it_is_said(
    size, values, found, note
):
    request = build(image=photo(*size), steps=2, **values)
    assert (request.inputs["width"], request.inputs["height"]) == found
    events = list(engine.run(request))
    said = " ".join(event.note for event in events if event.kind == "note")
    assert note in said and bool(note) == bool(said), said
    (result,) = events[-1].results
    assert (result.width, result.height) == found
    assert Request.from_json(json.loads(json.dumps(request.to_json())), trusted=True) == request


# --------------------------------------------------------------------------------------------------- masks


def test_a_mask_is_black_and_white_whatever_it_came_as():
    wanted = pictures.keep(half(), mask=True)
    painted = Image.new("RGBA", (128, 128))
    painted.paste((255, 255, 255, 255), (0, 0, 64, 128))
    rgb = half().convert("RGB")
    bits = half().convert("1")
    deep = Image.fromarray(np.asarray(half()).astype("uint16") * 257)
    for source in (painted, rgb, bits, deep, np.asarray(half()), np.asarray(half()) / 255):
        kept = pictures.read(pictures.keep(source, mask=True))
        assert kept.tobytes() == pictures.read(wanted).tobytes(), source
        assert pictures.changes(kept) == ("transparent parts laid on black" if source is painted else "")
    grey = Image.linear_gradient("L").resize((64, 64))
    kept = pictures.read(pictures.keep(grey, mask=True))
    assert kept.mode == "L" and set(kept.histogram()[1:255]) == {0}
    assert pictures.changes(kept) == "greys taken for black or white, whichever is nearer"
    assert pictures.changes(pictures.read(wanted)) == ""


def test_paint_becomes_a_mask_of_the_size_of_its_picture():
    layer = Image.new("RGBA", (64, 32))
    nothing = encoded(layer)
    layer.paste((255, 255, 255, 255), (0, 0, 32, 32))
    assert not pictures.is_painted(nothing) and pictures.is_painted(encoded(layer))
    image = pictures.keep(photo(128, 64))
    mask = pictures.painted_on(encoded(layer), image)
    assert mask.size == (128, 64)
    assert mask.getpixel((10, 10)) == 255 and mask.getpixel((100, 10)) == 0
    request = build(image=image, mask=mask)
    assert pictures.size(request.inputs["mask"]) == (128, 64)


def encoded(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_stranger_sends_image_and_mask_as_base64_and_never_as_paths(files):
    sent = {"model": "pixart-sigma", "weights": "toy", "seed": 1}
    image, mask = (base64.b64encode((files / name).read_bytes()).decode() for name in ("in.png", "m.png"))
    request = Request.from_json(sent | {"inputs": {"prompt": "x", "image": image, "mask": {"data": mask}}})
    assert request.inputs["mask"]["sha256"] == pictures.keep(half(), mask=True)["sha256"]
    with pytest.raises(GenError, match="not base64"):
        Request.from_json(sent | {"inputs": {"prompt": "x", "image": image, "mask": str(files / "m.png")}})


# ------------------------------------------------------------------------------------------------- refused


REFUSED = {
    "a mask alone": ({"mask": half()}, "Mask is given without an image"),
    "growing nothing": ({"outpaint": "left=16"}, "Outpaint is given without an image"),
    "another size": (
        {"image": photo(), "mask": half(64, 64)},
        "The mask is 64 x 64 pixels and the image 128 x 128",
    ),
    "a black mask": ({"image": photo(), "mask": Image.new("L", (128, 128))}, "black everywhere"),
    "one pixel": ({"image": Image.new("RGB", (1, 1))}, "1 x 1 pixels; at least 16"),
    "20,000 pixels": ({"image": Image.new("L", (20_000, 20_000))}, "at most 64 megapixels"),
    "a long strip": ({"image": Image.new("L", (20_000, 64))}, "no side may be more than 4 times the other"),
    "no step left": ({"image": photo(), "strength": 0.1}, "Strength 0.1 of 4 steps leaves none to walk"),
    "strength 0": ({"image": photo(), "strength": 0}, "Strength 0 of 4 steps"),
    "strength 2": ({"image": photo(), "strength": 2}, "Strength 2.0 is too large"),
    "sides": ({"image": photo(), "outpaint": "up=4"}, "Outpaint cannot be 'up=4'"),
    "no multiple": ({"image": photo(), "outpaint": "left=10"}, "makes the width 128 + 10 = 138"),
    "too wide": ({"image": photo(), "outpaint": "left=64,right=128"}, "makes the width 128 + 192 = 320"),
    "padding alone": ({"image": photo(), "mask_padding": 8}, "what lies around a mask, and there is none"),
    "hires 8": ({"hires": 8}, "Hires 8.0 is too large"),
    "no step to refine": ({"hires": 2, "hires_strength": 0.2}, "Hires strength 0.2 of 4 steps"),
    "a tile": ({"hires": 2, "hires_tile": 100}, "Hires tile 100 is not a multiple of 16"),
    "a mask that is none": ({"image": photo(), "mask": b"words"}, "Mask is not a picture"),
}


@pytest.mark.parametrize(("values", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_before_weights_are_loaded(values, words):
    with pytest.raises(GenError) as caught:
        build(**values)
    assert caught.value.code == "bad_input"
    assert words in caught.value.message
    assert caught.value.hint and len(caught.value.message) < 300


def test_what_changes_nothing_is_said():
    notes = [event.note for event in engine.run(build(strength=0.9, hires_strength=0.9, steps=1))]
    assert "Strength changes nothing without Image." in notes
    assert "Hires strength changes nothing without Hires." in notes
    notes = [event.note for event in engine.run(build(image=photo(), outpaint="16", strength=0.9))]
    assert "With outpaint all steps are walked: strength changes nothing." in notes


def test_models_that_take_no_picture_say_which_do():
    with pytest.raises(GenError, match="takes no option 'mask'") as caught:
        Request.build("dit", {"class_label": 0, "mask": half()})
    assert "pixart-sigma, pixart-delta" in caught.value.hint


def test_the_catalog_has_the_numbers_of_the_pipeline():
    from pipelines import image_to_image

    inputs = {one.argument: one for one in catalog.MODELS["pixart-sigma"].inputs if one.argument}
    assert set(image_to_image.ARGUMENTS) <= set(inputs)
    assert inputs["strength"].default == image_to_image.STRENGTH
    assert inputs["hires_strength"].default == image_to_image.HIRES_STRENGTH
    assert inputs["mask_blur"].default == image_to_image.MASK_BLUR
    assert inputs["mask_blur"].maximum == image_to_image.MOST_BLUR
    assert inputs["padding_mask_crop"].maximum == image_to_image.MOST_PADDING
    assert inputs["hires"].maximum == image_to_image.HIRES_MOST
    assert inputs["hires_upscale"].choices == image_to_image.UPSCALES


def test_several_pictures_from_one_are_each_that_of_its_seed():
    both = [*engine.run(build(image=photo(), mask=half(), count=2))][-1].results
    (alone,) = [*engine.run(build(image=photo(), mask=half(), seed=4))][-1].results
    with Image.open(both[1].path) as one, Image.open(alone.path) as two:
        assert one.tobytes() == two.tobytes()


def test_memory_is_planned_for_what_the_network_sees_at_once():
    def seen(**values):
        return image_inputs.seen(build(**values).inputs, 128)

    assert seen() == (128, 128)
    assert seen(hires=1.5) == (192, 192)
    assert seen(hires=2, hires_tile=128) == (128, 128)
    assert seen(hires=3) == (128, 128), "beyond twice the native size there are tiles"
    assert seen(image=photo(), outpaint="left=64") == (128, 192)
    assert image_inputs.seen({}, 256) == (256, 256), "a model without any of it"
