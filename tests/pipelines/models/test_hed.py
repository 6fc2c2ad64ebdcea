"""HED (its published numbers are in tests/golden), and edges of pictures where they are known."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipelines.models.hed import EDGES, HED, control_picture, edges, load_hed

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "dit_family"


def drawn(name: str, shape: list[int]) -> Tensor:
    """The golden files' numbers for a name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    shapes = json.loads((GOLDEN / "meta.json").read_text())["cases"]["delta_hed"]["state_dict"]
    return {
        name: drawn(name, shape)
        * (0.1 if len(shape) == 1 else float(np.float32(1 / np.sqrt(np.prod(shape[1:])))))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def network(published: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> HED:
    folder = tmp_path_factory.mktemp("hed")
    save_file(published, folder / "ControlNetHED.safetensors")
    return load_hed(folder)


def disc(size: int = 96, inside: tuple[float, ...] = (0.9, 0.3, 0.2), outside: float = 0.35) -> np.ndarray:
    """A disc of a third of the side."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    cover = np.clip(size / 3 - np.hypot(y, x) + 0.5, 0, 1)[..., None]
    return (outside + cover * (np.array(inside) - outside)).astype(np.float32)


def from_rim(size: int = 96) -> np.ndarray:
    """Distance of each pixel to the disc's rim."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.abs(np.hypot(y, x) - size / 3)


def test_its_keys_are_the_published_ones(published: dict[str, Tensor]) -> None:
    assert {name: tensor.shape for name, tensor in HED().state_dict().items()} == {
        name: tensor.shape for name, tensor in published.items()
    }


def test_it_is_frozen(network: HED) -> None:
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_it_is_read_from_a_file_and_from_a_folder_of_ours(network: HED, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    for found in (
        load_hed(tmp_path),
        load_hed(tmp_path / HED.weights_name),
        HED.from_pretrained(tmp_path),
    ):
        assert torch.equal(found.block5.projection.weight, network.block5.projection.weight)


def test_wrong_files_are_refused(published: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold one safetensors file, it holds 0"):
        load_hed(tmp_path)
    with pytest.raises(ValueError, match="must be converted first"):
        load_hed(tmp_path / "ControlNetHED.pth")
    with pytest.raises(ValueError, match="is missing"):
        load_hed(tmp_path / "ControlNetHED.safetensors")
    save_file({"norm": published["norm"]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no 36 tensors"):
        load_hed(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 15, 40), "at least 16 pixels"),
        (torch.zeros(1, 1, 40, 40), r"not \(1, 1, 40, 40\)"),
        (torch.full((1, 3, 40, 40), 200.0), "not 200..200"),
        (torch.full((1, 3, 40, 40), torch.nan), "in 0..1"),
    ],
)
def test_what_the_network_cannot_read_is_refused(network: HED, image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(image)


def test_the_control_picture_is_grey_and_as_strong_as_asked() -> None:
    found = control_picture(np.full((16, 20), 0.5, dtype=np.float32), strength=0.5)
    assert found.shape == (1, 3, 16, 20)
    assert torch.equal(found, torch.full((1, 3, 16, 20), -0.5))
    with pytest.raises(ValueError, match=r"not \(1, 3, 16, 16\)"):
        control_picture(torch.zeros(1, 3, 16, 16))


# ----------------------------------------------------------------------------------------- extractors


def kinds() -> list[str]:
    return [name for name, row in EDGES.items() if name != "hed" and row.missing() is None]


@pytest.mark.parametrize("kind", kinds())
def test_the_rim_of_a_disc_is_found_and_nothing_else(kind: str) -> None:
    found, distance = edges(disc(), kind), from_rim()
    assert found.shape == (96, 96)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    rim = [(47.5 + 32 * np.sin(angle)).round().astype(int), (47.5 + 32 * np.cos(angle)).round().astype(int)]
    nearby = np.max([np.roll(found, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
    assert (nearby[rim[0], rim[1]] > 0.7).mean() >= 0.95
    assert found[distance > 10].max() < 0.02
    assert (found > 0.5).sum() < 5 * 2 * np.pi * 32  # a line, not a band


@pytest.mark.parametrize("kind", kinds())
def test_noise_is_no_edge(kind: str) -> None:
    noisy = disc() + np.random.default_rng(0).normal(0, 0.04, (96, 96, 3)).astype(np.float32)
    found = edges(noisy.clip(0, 1), kind)
    assert found[from_rim() > 10].mean() < 0.03
    assert found[from_rim() < 1].mean() > 0.4


@pytest.mark.parametrize("kind", kinds())
def test_a_flat_picture_has_no_edges(kind: str) -> None:
    assert edges(np.full((40, 30), 0.5), kind).max() < 1e-3


def test_soft_edges_are_stronger_where_contrast_is() -> None:
    weak, strong = (edges(disc(inside=(0.35 + step,) * 3)) for step in (0.08, 0.5))
    rim = from_rim() < 1
    assert 0.05 < weak[rim].mean() < 0.7 * strong[rim].mean()


def test_soft_edges_see_colours_of_one_brightness() -> None:
    found = edges(disc(inside=(0.65, 0.35, 0.05), outside=0.35))
    assert found[from_rim() < 1].mean() > 0.5


def test_soft_edges_turn_with_the_picture() -> None:
    image = disc(inside=(0.8, 0.1, 0.4))
    image[20:40, 10:70] = 0.05
    for turn in (np.fliplr, np.flipud, lambda a: np.swapaxes(a, 0, 1)):
        found = edges(np.ascontiguousarray(turn(image)))
        assert np.abs(found - turn(edges(image))).mean() < 2e-3


def test_hed_is_a_row_that_needs_its_network(network: HED) -> None:
    image = disc(32)
    with pytest.raises(ValueError, match="need network=load_hed"):
        edges(image, "hed")
    found = edges(image, "hed", network=network)
    expected = network(torch.from_numpy(image).permute(2, 0, 1)[None])[0, 0]
    assert np.array_equal(found, expected.numpy())


def test_unknown_kinds_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no edges called 'sobel'; there are hed, soft, canny"):
        edges(disc(), "sobel")
    monkeypatch.setattr("pipelines.models.hed.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        edges(disc(), "canny")


# ------------------------------------------------------------------------------------ kinds of pictures

BYTES = (disc(32) * 255).round().astype(np.uint8)
RGB = Image.fromarray(BYTES)
GREY = RGB.convert("L")


@pytest.mark.parametrize(
    ("image", "same"),
    [
        (RGB, BYTES),
        (RGB.convert("RGBA"), BYTES),  # opaque
        (RGB.quantize(256), np.asarray(RGB.quantize(256).convert("RGB"))),
        (GREY, np.asarray(GREY)),
        (GREY.convert("LA"), np.asarray(GREY)),
        (GREY.convert("1"), np.asarray(GREY.convert("1"))),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), np.asarray(GREY)),
        (BYTES.astype(np.uint16) * 257, BYTES),
        (BYTES / 255, BYTES),
        (np.asarray(GREY)[..., None], np.asarray(GREY)),
    ],
)
def test_the_same_picture_in_another_form_has_the_same_edges(
    image: Image.Image | np.ndarray, same: np.ndarray
) -> None:
    np.testing.assert_allclose(edges(image), edges(same), atol=1e-4)


GLASS = RGB.convert("RGBA")
GLASS.putpixel((3, 3), (0, 0, 0, 128))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GLASS, "transparent pixels"),
        (np.asarray(GLASS), "transparent pixels"),
        (RGB.convert("CMYK"), "mode CMYK is not taken"),
        (GREY.convert("I"), "mode I is not taken"),
        (GREY.convert("F"), "mode F is not taken"),
        (RGB.convert("HSV"), "mode HSV is not taken"),
        (RGB.resize((15, 300)), "300 x 15, edges need at least 16"),
        (np.zeros((32, 32, 2)), r"not \(32, 32, 2\)"),
        (np.zeros(32), r"not \(32,\)"),
        (np.zeros((32, 32), dtype=np.int64), "int64 has no known white"),
        (np.full((32, 32), 255.0), "must be in 0..1"),
        (np.full((32, 32), np.nan), "must be in 0..1"),
        ("picture.png", "not str"),
    ],
)
def test_other_pictures_are_refused_by_name(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edges(image)  # type: ignore[arg-type]
