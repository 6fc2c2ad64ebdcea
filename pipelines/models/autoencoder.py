"""AutoencoderKL: pictures to latents and back. Rombach et al. 2021, arXiv:2112.10752.

Keys and configuration are those of diffusers' `AutoencoderKL`, and the numbers agree with it. It is here
because importing diffusers' takes longer than drawing with the small weights; `supports` says which
configurations it covers (all published PixArt, DiT and SDXL ones), and the pipeline takes diffusers' class
for the others.

Shapes: B batch, C channels, Y X rows and columns, N = Y * X.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.attention import Attend, sdpa_attention
from pipelines.models.network import Network

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Names and defaults of diffusers."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if self.act_fn != "silu":
            raise ValueError(f"act_fn must be 'silu', not {self.act_fn!r}")
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if tuple(getattr(self, name)) != (kind,) * len(self.block_out_channels):
                raise ValueError(f"{name} must be {kind} for each of block_out_channels")


class Gaussian(NamedTuple):
    """The distribution of latents the encoder found for a picture."""

    mean: Tensor  # (B, C, Y, X)
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Noise comes from the generator's device, so that a CPU seed means the same everywhere."""
        source = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=source, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class Posterior(NamedTuple):
    latent_dist: Gaussian


class Decoded(NamedTuple):
    sample: Tensor  # (B, 3, Y, X) in -1..1


class Resnet(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=EPSILON)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x_BCYX: Tensor) -> Tensor:
        y_BCYX = self.conv1(functional.silu(self.norm1(x_BCYX)))
        y_BCYX = self.conv2(functional.silu(self.norm2(y_BCYX)))
        return y_BCYX + (x_BCYX if self.conv_shortcut is None else self.conv_shortcut(x_BCYX))


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.attend: Attend = sdpa_attention

    def forward(self, x_BCYX: Tensor) -> Tensor:
        y_BNC = self.group_norm(x_BCYX).flatten(2).transpose(1, 2)
        q, k, v = (layer(y_BNC)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        y_BNC = self.to_out[0](self.attend(q, k, v, None)[:, 0])
        return x_BCYX + y_BNC.transpose(1, 2).reshape(x_BCYX.shape)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if has_attention else [])
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.resnets[0](x_BCYX)
        for attention in self.attentions:
            x_BCYX = attention(x_BCYX)
        return self.resnets[1](x_BCYX)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(functional.pad(x_BCYX, (0, 1, 0, 1)))  # padded on the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BCYX, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual layers at one resolution, then the step to the next."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(channels if index == 0 else out_channels, out_channels, groups) for index in range(layers)
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        for resnet in self.resnets:
            x_BCYX = resnet(x_BCYX)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x_BCYX = getattr(self, name)[0](x_BCYX)
        return x_BCYX


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            stage = Stage(widths[max(index - 1, 0)], width, config.layers_per_block, groups)
            if index < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(stage)
        self.mid_block = Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.conv_in(x_BCYX)
        for stage in self.down_blocks:
            x_BCYX = stage(x_BCYX)
        return self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x_BCYX))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            stage = Stage(widths[max(index - 1, 0)], width, config.layers_per_block + 1, groups)
            if index < len(widths) - 1:
                stage.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.mid_block(self.conv_in(x_BCYX))
        for stage in self.up_blocks:
            x_BCYX = stage(x_BCYX)
        return self.conv_out(functional.silu(self.conv_norm_out(x_BCYX)))


class AutoencoderKL(Network):
    """`decode` and `encode` take and return what diffusers' do."""

    config: AutoencoderConfig
    config_class = AutoencoderConfig
    header: ClassVar[Mapping[str, Any]] = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}
    required = (
        "block_out_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "scaling_factor",
    )

    def __init__(self, config: AutoencoderConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latent = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @classmethod
    def supports(cls, entries: Mapping[str, Any]) -> bool:
        """Whether a config.json describes what this class computes."""
        widths = entries.get("block_out_channels", ())
        return (
            entries.get("act_fn", "silu") == "silu"
            and set(entries.get("down_block_types", ())) == {"DownEncoderBlock2D"}
            and set(entries.get("up_block_types", ())) == {"UpDecoderBlock2D"}
            and len(entries["down_block_types"]) == len(entries["up_block_types"]) == len(widths)
            and "quantization_config" not in entries
        )

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attention layers of older files."""
        old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
        for key in [key for key in state if ".attentions." in key]:
            for before, after in old.items():
                if before in key:
                    tensor = state.pop(key)
                    state[key.replace(before, after)] = tensor.flatten(1) if tensor.ndim == 4 else tensor
        return state

    def encode(self, x: Tensor, return_dict: bool = True) -> Posterior:
        """(B, 3, Y, X) in -1..1 to a distribution over (B, latent_channels, Y / f, X / f)."""
        moments = self.encoder(x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(Gaussian(mean, logvar.clamp(-30.0, 20.0)))

    def decode(self, z: Tensor, return_dict: bool = True) -> Decoded:
        """(B, latent_channels, Y, X), not scaled, to (B, 3, f * Y, f * X) in about -1..1."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return Decoded(self.decoder(z))

    def forward(self, sample: Tensor, sample_posterior: bool = False) -> Decoded:
        """There and back again."""
        distribution = self.encode(sample).latent_dist
        return self.decode(distribution.sample() if sample_posterior else distribution.mode())
