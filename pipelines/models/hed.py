"""Edges of a picture, which is what the control branch of PixArt-delta is shown.

`HED` is the network it was trained with: holistically-nested edge detection, Xie & Tu 2015, arXiv:1504.06375,
in the version of five blocks whose projections are averaged. Where its weights are absent, `EDGES` has
extractors without any: `soft` draws lines as HED does, `canny` draws hard ones.

Shapes: B batch, C channels, Y X rows and columns. Edges are 0..1, one for certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipelines.models.network import Network, read_tensors

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of each block
SMALLEST = 16  # pixels per side: four halvings leave one


@dataclass(frozen=True)
class HEDConfig:
    """There is one size only."""


class HEDBlock(nn.Module):
    """Convolutions at one resolution, and what this resolution says about edges."""

    def __init__(self, channels: int, width: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if index == 0 else width, width, 3, padding=1) for index in range(count)
        )
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x_BCYX = functional.relu(conv(x_BCYX))
        return x_BCYX, self.projection(x_BCYX)


class HED(Network):
    """A picture to the probability of an edge at each pixel. State-dict keys are the published ones."""

    config: HEDConfig
    config_class = HEDConfig
    header: ClassVar[Mapping[str, Any]] = {"_class_name": "HED"}

    def __init__(self, config: HEDConfig | None = None) -> None:
        super().__init__(config)
        self.register_buffer("norm", torch.zeros(1, 3, 1, 1))  # mean colour, of 0..255
        channels = 3
        for index, (width, count) in enumerate(BLOCKS, start=1):
            self.add_module(f"block{index}", HEDBlock(channels, width, count))
            channels = width

    def projections(self, image: Tensor) -> list[Tensor]:
        """Five logits (B, 1, Y / 2^k, X / 2^k) of an RGB image (B, 3, Y, X) in 0..1.

        Raises ValueError for other shapes, a side under 16 pixels or values outside 0..1.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < SMALLEST:
            raise ValueError(
                f"HED takes (B, 3, Y, X) of at least {SMALLEST} pixels per side, not {tuple(image.shape)}"
            )
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"HED takes values in 0..1, not {low:.4g}..{high:.4g}")
        x_BCYX, found = 255 * image - self.norm, []
        for index in range(1, len(BLOCKS) + 1):
            if index > 1:
                x_BCYX = functional.max_pool2d(x_BCYX, 2)
            x_BCYX, logit = getattr(self, f"block{index}")(x_BCYX)
            found.append(logit)
        return found

    def logits(self, image: Tensor) -> Tensor:
        """(B, 1, Y, X): the mean of the projections, each brought to the size of the picture."""
        size = image.shape[2:]
        resized = [
            functional.interpolate(logit, size, mode="bilinear", align_corners=False)
            for logit in self.projections(image)
        ]
        return torch.stack(resized).mean(0)

    def forward(self, image: Tensor) -> Tensor:
        """RGB (B, 3, Y, X) in 0..1 to edge probabilities (B, 1, Y, X)."""
        return self.logits(image).sigmoid()


def load_hed(path: Path | str, *, device: torch.device | str | None = None) -> HED:
    """HED from a safetensors file, or from a folder with one, frozen and ready for inference.

    Raises ValueError: no such file, several to choose from, tensors that do not fit.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{path} must hold one safetensors file, it holds {len(found)}")
        path = found[0]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file; published .pth files must be converted first")
    model = HED()
    state = read_tensors(path.parent, path.name)
    model.check_state(state, path)
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def control_picture(edges: Tensor | np.ndarray, strength: float = 1.0) -> Tensor:
    """Edges (Y, X) or (B, 1, Y, X) to the picture an autoencoder takes: (B, 3, Y, X) in -1..1."""
    edges_B1YX = torch.as_tensor(edges)
    if edges_B1YX.ndim == 2:
        edges_B1YX = edges_B1YX[None, None]
    if edges_B1YX.ndim != 4 or edges_B1YX.shape[1] != 1:
        raise ValueError(f"edges are (Y, X) or (B, 1, Y, X), not {tuple(edges_B1YX.shape)}")
    return ((edges_B1YX * strength - 0.5) / 0.5).repeat(1, 3, 1, 1)


# --- extractors: an RGB picture (Y, X, 3), float32 in 0..1, to edges (Y, X), float32 in 0..1


def hed_edges(image_YXC: np.ndarray, *, network: HED | None = None) -> np.ndarray:
    if network is None:
        raise ValueError("edges of kind 'hed' need network=load_hed(folder)")
    image = torch.from_numpy(image_YXC).permute(2, 0, 1)[None].to(network.device, network.dtype)
    with torch.inference_mode():
        return network(image)[0, 0].float().cpu().numpy()


def canny_edges(
    image_YXC: np.ndarray, *, sigma: float = 1.4, low: float = 0.1, high: float = 0.2
) -> np.ndarray:
    """Canny 1986: lines of one pixel, 0 or 1. `sigma` in pixels, thresholds of the gradient of grey."""
    from skimage.feature import canny

    grey_YX = image_YXC @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return canny(grey_YX, sigma=sigma, low_threshold=low, high_threshold=high).astype(np.float32)


def soft_edges(image_YXC: np.ndarray, *, contrast: float = 0.1) -> np.ndarray:
    """Lines in three widths, averaged, as HED's five depths are: the boundaries of large shapes come out
    strongest.

    `contrast` is the step between two flat regions, of 0..1, that counts half.
    """
    x_BCYX = _median(torch.from_numpy(image_YXC).permute(2, 0, 1)[None])  # noise goes, corners stay
    unit = max(1.0, min(x_BCYX.shape[2:]) / 512)  # widths grow with the picture
    lines = []
    for sigma in (unit, 2 * unit, 4 * unit):
        step, normal = _steps(_blur(x_BCYX, sigma), sigma)
        response = 1 / (1 + (contrast / step.clamp(min=1e-6)) ** 4)
        thin = response * _ridge(step, normal)
        width = 0.5 + 0.25 * sigma
        lines.append((_blur(thin, width) * width * math.sqrt(2 * math.pi)).clamp(max=1))
    return torch.stack(lines).mean(0)[0, 0].numpy()


def _median(x_BCYX: Tensor) -> Tensor:
    """Over 3 x 3 pixels."""
    rows, columns = x_BCYX.shape[2:]
    padded = functional.pad(x_BCYX, (1, 1, 1, 1), mode="replicate")
    shifted = [padded[:, :, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    return torch.stack(shifted).median(0).values


def _blur(x_BCYX: Tensor, sigma: float) -> Tensor:
    """Gaussian, the border continued."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x_BCYX.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel, channels = kernel / kernel.sum(), x_BCYX.shape[1]
    for axis, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        weight = kernel.view(shape).repeat(channels, 1, 1, 1)
        x_BCYX = functional.conv2d(functional.pad(x_BCYX, pad, mode="replicate"), weight, groups=channels)
    return x_BCYX


def _steps(x_BCYX: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Height of the step at each pixel of a blurred picture (B, 1, Y, X), its direction x, y (B, Y, X, 2).

    Colours count together: Di Zenzo 1986, the largest eigenvalue of the mean of their gradients' products.
    """
    padded = functional.pad(x_BCYX, (1, 1, 1, 1), mode="replicate")
    # A step of height 1, blurred, has slope 1 / (sigma sqrt(2 pi)).
    scale = 0.5 * sigma * math.sqrt(2 * math.pi)
    gx_BCYX = scale * (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2])
    gy_BCYX = scale * (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1])
    xx, yy, xy = (g.mean(1) for g in (gx_BCYX**2, gy_BCYX**2, gx_BCYX * gy_BCYX))
    largest = (xx + yy) / 2 + torch.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    angle = 0.5 * torch.atan2(2 * xy, xx - yy)
    return largest.clamp(min=0).sqrt()[:, None], torch.stack([angle.cos(), angle.sin()], dim=-1)


def _ridge(step_B1YX: Tensor, normal_BYX2: Tensor) -> Tensor:
    """1 where no neighbour across the edge is stronger, else 0."""
    rows, columns = step_B1YX.shape[2:]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    here_YX2, extent = torch.stack([x, y], dim=-1), torch.tensor([columns - 1, rows - 1])

    def at(offset_BYX2: Tensor) -> Tensor:
        places = (here_YX2 + offset_BYX2) * 2 / extent - 1
        return functional.grid_sample(step_B1YX, places, padding_mode="border", align_corners=True)

    # As good as equal counts as equal: an edge between two pixels keeps both, wherever rounding leans.
    return (step_B1YX * 1.0001 >= torch.maximum(at(normal_BYX2), at(-normal_BYX2))).to(step_B1YX)


def _no_skimage() -> str | None:
    return None if find_spec("skimage") else "it needs scikit-image: pip install scikit-image"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A row of the table."""

    find: Callable[..., np.ndarray]
    summary: str
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here, or None


EDGES = {
    "hed": Extractor(find=hed_edges, summary="HED, the network the control branch was trained with"),
    "soft": Extractor(find=soft_edges, summary="soft lines in three widths, without weights"),
    "canny": Extractor(
        find=canny_edges, summary="hard lines of one pixel, without weights", missing=_no_skimage
    ),
}


def edges(image: Image.Image | np.ndarray, kind: str = "soft", **options: Any) -> np.ndarray:
    """Edges (Y, X) of a picture, float32 in 0..1. Options are those of the kind's function.

    Raises ValueError for an unknown kind, one that cannot run here and pictures that are refused by name:
    with transparent pixels, in colours other than grey or RGB, of numbers without a known white, under 16
    pixels.
    """
    if kind not in EDGES:
        raise ValueError(f"no edges called '{kind}'; there are {', '.join(EDGES)}")
    reason = EDGES[kind].missing()
    if reason is not None:
        raise ValueError(f"edges '{kind}' cannot run here: {reason}")
    return EDGES[kind].find(rgb(image), **options)


DRAWN_EDGES = "edges"  # the picture shows edges already
CONTROL_KINDS = (*EDGES, DRAWN_EDGES)


def edges_at(
    image: Image.Image | np.ndarray, kind: str, height: int, width: int, network: HED | None = None
) -> np.ndarray:
    """Edges (height, width) that steer a picture of this size, float32 in 0..1; a kind of `CONTROL_KINDS`.

    The picture is cut and resized first, as published. Raises ValueError as `edges` does.
    """
    fitted_YXC = fit(rgb(image), height, width)
    if kind == DRAWN_EDGES:
        return fitted_YXC.mean(axis=2)
    return edges(fitted_YXC, kind, **({"network": network} if kind == "hed" else {}))


def fit(image_YXC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized until both sides are covered, cut from the centre: (height, width, C), float32 in 0..1."""
    rows, columns, channels = image_YXC.shape
    ratio = max(height / rows, width / columns)
    # Cut first, at fractions of a pixel: a long strip is not made large before most of it is dropped.
    top, left = (rows - height / ratio) / 2, (columns - width / ratio) / 2
    box = (max(left, 0), max(top, 0), min(columns - left, columns), min(rows - top, rows))
    resized = [
        Image.fromarray(np.ascontiguousarray(image_YXC[..., index])).resize(
            (width, height), resample=Image.Resampling.BILINEAR, box=box
        )
        for index in range(channels)
    ]
    return np.stack([np.asarray(one) for one in resized], axis=2).clip(0, 1)


GREYS_16 = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16 bits, white is 65535
ALPHA = ("RGBA", "LA", "PA")


def rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """(Y, X, 3), float32 in 0..1. Raises ValueError as `edges` does."""
    if isinstance(image, Image.Image):
        image = _pixels(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a picture is a PIL image or an array, not {type(image).__name__}")
    shape = image.shape
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"a picture is (Y, X), (Y, X, 3) or (Y, X, 4), not {shape}")
    if min(image.shape[:2]) < SMALLEST:
        raise ValueError(
            f"the picture is {shape[0]} x {shape[1]}, edges need at least {SMALLEST} pixels per side"
        )
    if image.dtype == np.bool_ or image.dtype in (np.uint8, np.uint16):
        white = 1 if image.dtype == np.bool_ else np.iinfo(image.dtype).max
        image = image.astype(np.float32) / np.float32(white)
    elif not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an array of {image.dtype} has no known white; give uint8, uint16 or floats")
    if not (image.min() >= 0 and image.max() <= 1):  # also false for NaN
        raise ValueError("an array of floats must be in 0..1")
    if image.shape[2] == 4:
        if image[..., 3].min() < 1:
            raise ValueError("the picture has transparent pixels; lay it on a background first")
        image = image[..., :3]
    return np.array(np.broadcast_to(image, (*image.shape[:2], 3)), dtype=np.float32, order="C")


def _pixels(image: Image.Image) -> np.ndarray:
    """An array that means the same. Conversions here lose nothing."""
    if image.mode in GREYS_16:
        return np.asarray(image).astype(np.uint16)
    if image.mode in ALPHA or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("RGB", "RGBX", "L", "1", "P"):
        return np.asarray(image.convert("RGB"))
    raise ValueError(f"a picture of mode {image.mode} is not taken; convert it to RGB first")
