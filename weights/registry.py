"""The table of checkpoints: where each comes from, what it may be used for, which sizes of picture it
knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of weights: embedded or one's own, then `folder` is set, or published: `repo_id`."""

    key: str
    summary: str
    licence: str
    native_size: int  # pixels per side of the pictures it was trained on
    size_multiple: int  # pixels; width and height must be multiples of it
    smallest: int  # pixels per side
    largest: int  # pixels per side
    folder: str = ""  # relative to weights/ or GEN_WEIGHTS_DIR
    repo_id: str = ""
    is_toy: bool = False  # trained in hours on procedural pictures: said wherever its pictures appear
    recipe: str = ""  # name for `gen train`; empty when the weights are not ours to make
    files: tuple[str, ...] = ()  # what to fetch of a repository, if not all of it
    family: str = ""  # for `gen convert --as`, when the files are in the official layout, or may be
    pipeline: str = ""  # class in model_index.json
    companions: tuple[str, ...] = ()  # repositories with the parts that this one may lack; one of them does
    walk: str = ""  # the one it was distilled for: "lcm" or "one-step"; empty for any that take many steps
    adapts: str = ""  # the checkpoint that these low-rank changes are made for
    max_tokens: int = 0  # of a prompt; what goes beyond is cut, and said. 0: reads no text
    network: str = ""  # class of the network that denoises
    config: Mapping[str, Any] = field(default_factory=dict)  # its configuration, where it is no default
    parameters: int = 0  # of that network, tables of positions not counted
    beside: int = 0  # parameters of all else that a picture needs: text encoder, autoencoder
    revision: str = ""  # commit or tag of the repository that `gen pull` takes; empty: main, as it is then

    @property
    def bytes(self) -> int:
        """Of the network in float32, as it is published."""
        return 4 * self.parameters

    def __post_init__(self) -> None:
        assert bool(self.folder) != bool(self.repo_id), f"{self.key}: give a folder or a repo_id"


TOY = Checkpoint(
    key="pixart-sigma-toy",
    summary="Embedded: coloured shapes on a ground, trained from scratch in hours",
    licence="Apache-2.0",
    native_size=128,
    size_multiple=16,
    smallest=64,
    largest=256,
    folder="toy/pixart-sigma",
    is_toy=True,
    recipe="pixart-sigma:toy",
    pipeline="PixArtSigmaPipeline",
    max_tokens=300,
)
DELTA_TOY = replace(
    TOY,
    key="pixart-delta-toy",
    summary="Embedded: coloured shapes on a ground in 4 steps, with a control branch for edges",
    folder="toy/pixart-delta",
    recipe="pixart-delta:toy",
    walk="lcm",
)

JUDGE = replace(
    TOY,
    key="judge-toy",
    summary="Embedded: reads shape, colour, size, material and position back from toy pictures",
    folder="toy/judge",
    recipe="judge:toy",
    pipeline="",
    max_tokens=0,
)

DIT_TOY = replace(
    TOY,
    key="dit-toy",
    summary="Embedded: one coloured shape on a ground, 88 classes, trained in minutes",
    smallest=128,
    largest=128,
    folder="toy/dit",
    recipe="dit:toy",
    pipeline="DiTPipeline",
    max_tokens=0,
)

DIT3D_TOY = replace(
    DIT_TOY,
    key="dit-3d-toy",
    summary="Embedded: clouds of points of six families of shapes, trained within the hour",
    folder="toy/dit-3d",
    recipe="dit-3d:toy",
    pipeline="DiT3DPipeline",
)

# No repository holds these weights: one converts the authors' file, or trains one's own.
DIT3D = replace(
    DIT3D_TOY,
    key="dit-3d",
    summary="Your own clouds of points: trained on a folder, or converted from an official checkpoint",
    licence="that of its training data",
    folder="dit-3d",
    is_toy=False,
    recipe="dit-3d",
    family="dit-3d",
)

CLOUD_JUDGE = replace(
    DIT3D_TOY,
    key="cloud-judge-toy",
    summary="Embedded: reads the family and the parts of clouds of points",
    folder="toy/cloud-judge",
    recipe="cloud-judge:toy",
    pipeline="",
)

_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
}
_SIGMA_PARAMETERS = 610_856_096
_MICRO_PARAMETERS = 493_056  # of the embedders of size and aspect ratio
_CONTROL_PARAMETERS = 294_917_760
T5_XXL = 4_762_310_656  # the encoder of T5 v1.1 XXL, which all PixArt models read prompts with
VAE = 83_653_863  # Stable Diffusion's autoencoder, which all of these models decode with


def _pixart(size: int, *, scale: float, micro: bool = False, **more: Any) -> Mapping[str, Any]:
    """Configuration of the XL/2 network for pictures of this size."""
    return {
        **_PIXART,
        "sample_size": size // 8,
        "interpolation_scale": scale,
        "use_additional_conditions": micro,
        **more,
    }


# Sizes between half and double the native one; the pipeline picks the nearest trained aspect ratio and crops.
XL_1024 = Checkpoint(
    key="pixart-sigma-xl-1024",
    summary="PixArt-Sigma XL/2, 611 M parameters with T5-XXL, 1024 pixels",
    licence="CreativeML Open RAIL++-M",
    native_size=1024,
    size_multiple=8,
    smallest=512,
    largest=2048,
    repo_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    pipeline="PixArtSigmaPipeline",
    companions=("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    max_tokens=300,
    network="PixArtTransformer2DModel",
    config=_pixart(1024, scale=2),
    parameters=_SIGMA_PARAMETERS,
    beside=T5_XXL + VAE,
)


def _sigma(key: str, repo: str, size: int) -> Checkpoint:
    return replace(
        XL_1024,
        key=key,
        summary=f"PixArt-Sigma XL/2, 611 M parameters with T5-XXL, {size} pixels",
        native_size=size,
        smallest=size // 2,
        largest=size * 2,
        repo_id=f"PixArt-alpha/PixArt-Sigma-XL-2-{repo}",
        config=_pixart(size, scale=size / 512),
    )


def _official_sigma(repo: str, size: int) -> Checkpoint:
    """The same weights as the authors' own files."""
    return replace(
        _sigma(f"pixart-sigma-xl-{size}-official", repo, size),
        summary=f"PixArt-Sigma XL/2 at {size} pixels in the authors' own layout: for `gen convert`",
        repo_id="PixArt-alpha/PixArt-Sigma",
        files=(f"PixArt-Sigma-XL-2-{repo}.pth",),
        family="pixart-sigma",
    )


# All alpha models have the same text encoder and autoencoder, so that any complete one completes the others.
_ALPHA = ("PixArt-alpha/PixArt-LCM-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-1024-MS")
LCM_1024 = replace(
    XL_1024,
    key="pixart-delta-xl-1024",
    summary="PixArt-delta XL/2, distilled to 4 steps (LCM), 1024 pixels",
    repo_id="PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
    pipeline="PixArtAlphaPipeline",
    companions=_ALPHA,
    walk="lcm",
    max_tokens=120,
    config=_pixart(1024, scale=2, micro=True),
    parameters=_SIGMA_PARAMETERS + _MICRO_PARAMETERS,
)
ALPHA_1024 = replace(
    LCM_1024,
    key="pixart-alpha-xl-1024",
    summary="PixArt-alpha XL/2, which the distilled ones and LCM-LoRA start from, 1024 pixels",
    repo_id="PixArt-alpha/PixArt-XL-2-1024-MS",
    walk="",
)
LCM_LORA = replace(
    LCM_1024,
    key="pixart-delta-xl-1024-lora",
    summary="LCM-LoRA of rank 32 for PixArt-alpha XL/2 at 1024 pixels",
    repo_id="PixArt-alpha/PixArt-LCM-LoRA-XL-2-1024-MS",
    adapts=ALPHA_1024.key,
    pipeline="",
    companions=(),
    network="",
    config={},
    parameters=0,
    beside=0,
)
DMD_512 = replace(
    LCM_1024,
    key="pixart-alpha-dmd-512",
    summary="PixArt-alpha XL/2, distilled to one step (DMD), 512 pixels",
    native_size=512,
    smallest=256,
    largest=1024,
    repo_id="PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
    walk="one-step",
    config=_pixart(512, scale=1),
    parameters=_SIGMA_PARAMETERS,
)
CONTROL_1024 = replace(
    LCM_1024,
    key="pixart-delta-control-1024",
    summary="PixArt-delta's ControlNet-Transformer for edges, 1024 pixels, with its base",
    repo_id="PixArt-alpha/PixArt-ControlNet",
    files=("PixArt-XL-2-1024-ControlNet.pth",),
    family="pixart-control",
    walk="",
    network="PixArtControlNet",
    config={key: _PIXART[key] for key in ("num_attention_heads", "attention_head_dim", "cross_attention_dim")}
    | {"num_layers": 13},
    parameters=_CONTROL_PARAMETERS,
    beside=_SIGMA_PARAMETERS + T5_XXL + VAE,
)
HED = replace(
    LCM_LORA,
    key="hed",
    summary="HED: edges of a picture, for control images",
    repo_id="PixArt-alpha/PixArt-alpha",
    files=("ControlNetHED.pth",),
    family="hed",
    adapts="",
    walk="",
    max_tokens=0,
)


def _dit(size: int) -> Checkpoint:
    return Checkpoint(
        key=f"dit-xl-{size}",
        summary=f"DiT XL/2, 675 M parameters, the 1000 classes of ImageNet, {size} pixels",
        licence="CC-BY-NC-4.0",
        native_size=size,
        size_multiple=16,
        smallest=size,
        largest=size,
        repo_id=f"facebook/DiT-XL-2-{size}",
        pipeline="DiTPipeline",
        network="DiTTransformer2DModel",
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_layers": 28,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": size // 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        parameters=674_834_720,
        beside=VAE,
    )


def index(*rows: Checkpoint) -> dict[str, Checkpoint]:
    """By key; a key that stands twice is a mistake in the table."""
    table = {row.key: row for row in rows}
    assert len(table) == len(rows), "two checkpoints have the same key"
    return table


_SIGMA_SIZES = (("2K-MS", 2048), ("512-MS", 512), ("256x256", 256))
CHECKPOINTS = index(
    XL_1024,
    *(_sigma(f"pixart-sigma-xl-{'2k' if size == 2048 else size}", repo, size) for repo, size in _SIGMA_SIZES),
    _official_sigma("1024-MS", 1024),
    *(_official_sigma(repo, size) for repo, size in _SIGMA_SIZES),
    LCM_1024,
    ALPHA_1024,
    LCM_LORA,
    DMD_512,
    CONTROL_1024,
    HED,
    _dit(256),
    _dit(512),
    TOY,
    DELTA_TOY,
    DIT_TOY,
    DIT3D,
    DIT3D_TOY,
    JUDGE,
    CLOUD_JUDGE,
)
