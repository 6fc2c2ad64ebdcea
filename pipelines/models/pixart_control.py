"""ControlNet-Transformer: edges steer PixArt-alpha or Sigma. PixArt-delta, arXiv:2401.05252.

The branch holds copies of the base's first n blocks. Copy j reads the control state, and what it gives is
added to the tokens before the base's block j + 1. Linear layers that start at zero stand before and after:

    edges   ── before ── + ── copy 0 ──┬── copy 1 ───┬── ... to copy n - 1
                         │           after         after
    picture ── block 0 ──┴──────────── + ─ block 1 ─ + ─ block 2 ── ... to the base's end

The copies are called with the base's text, timestep and mask. Patch embedding, positions, caption projection
and time embedding are the base's own, so only the copies and the zero layers are stored and trained.

Shapes: B batch, N image tokens, L text tokens, D width, C channels, Y X latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.models.layers import Output
from pipelines.models.network import Network
from pipelines.models.pixart import (
    Block,
    Modulation,
    PixArtConfig,
    PixArtTransformer2DModel,
    TextStates,
    text_states,
)


@dataclass(frozen=True, kw_only=True)
class PixArtControlConfig:
    """What a block needs to know of its base, in the base's words; `num_layers` counts the copies."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 13
    dropout: float = 0.0
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    qk_norm: bool = False
    kv_compress_sampling: str | None = None
    kv_compress_factor: int = 1
    kv_compress_layers: tuple[int, ...] = ()  # of the copies

    def __post_init__(self) -> None:
        _ = self.block  # refuses what the base's configuration refuses

    @property
    def block(self) -> PixArtConfig:
        """The configuration a block is built from."""
        return PixArtConfig(**asdict(self))

    @classmethod
    def of(cls, base: PixArtConfig, num_layers: int) -> PixArtControlConfig:
        """For the first `num_layers` blocks of this base."""
        shared = {field.name: getattr(base, field.name) for field in fields(cls)}
        compressed = tuple(index for index in base.kv_compress_layers if index < num_layers)
        return cls(**shared | {"num_layers": num_layers, "kv_compress_layers": compressed})


class ControlBlock(nn.Module):
    """One copy. The first also has the layer through which the control picture enters."""

    def __init__(self, config: PixArtConfig, index: int) -> None:
        super().__init__()
        self.transformer_block = Block(config, index in config.kv_compress_layers)
        self.before_proj = _zero_linear(config.width) if index == 0 else None
        self.after_proj = _zero_linear(config.width)

    def forward(
        self, state_BND: Tensor, table_B6D: Tensor, text: TextStates, index: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The control state after this copy, and what the base's tokens gain: two of (B, N, D)."""
        state_BND = self.transformer_block.attend_image(state_BND, table_B6D, grid)
        state_BND = self.transformer_block.attend_text(state_BND, text, index)
        state_BND = self.transformer_block.feed_forward(state_BND, table_B6D)
        return state_BND, self.after_proj(state_BND)


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PixArtControlNet(Network):
    """The trainable branch. It runs inside its base: see `ControlledPixArt`."""

    config: PixArtControlConfig
    config_class = PixArtControlConfig
    header: ClassVar[Mapping[str, Any]] = {"_class_name": "PixArtControlNet"}
    required = ("num_attention_heads", "attention_head_dim", "num_layers", "cross_attention_dim")

    def __init__(self, config: PixArtControlConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        block = self.config.block
        self.controlnet_blocks = nn.ModuleList(
            ControlBlock(block, index) for index in range(block.num_layers)
        )

    @classmethod
    def from_transformer(cls, base: PixArtTransformer2DModel, num_layers: int = 13) -> PixArtControlNet:
        """A branch to be trained: copies of the base's first blocks, which change nothing yet.

        Raises ValueError unless some, but not all, blocks of the base are asked for.
        """
        depth = len(base.transformer_blocks)
        if not 0 < num_layers < depth:
            raise ValueError(f"{num_layers} blocks cannot be copied from {depth}: 1 to {depth - 1} can")
        control = cls(PixArtControlConfig.of(base.config, num_layers)).to(base.device, base.dtype)
        for copy, block in zip(control.controlnet_blocks, base.transformer_blocks, strict=False):
            copy.transformer_block.load_state_dict(block.state_dict())
        return control

    def check_base(self, base: PixArtTransformer2DModel) -> None:
        """Raises ValueError when this branch cannot have been copied from such a base."""
        depth, count = len(base.transformer_blocks), self.config.num_layers
        if count >= depth:
            raise ValueError(f"this control has {count} blocks, its base must have more, not {depth}")
        wanted = PixArtControlConfig.of(base.config, count)
        for field in fields(wanted):
            ours, theirs = getattr(self.config, field.name), getattr(wanted, field.name)
            if ours != theirs and field.name != "dropout":
                raise ValueError(f"this control wants a base with {field.name} {ours!r}, not {theirs!r}")

    def text_states(
        self,
        base: PixArtTransformer2DModel,
        encoder_hidden_states: Tensor,  # (B, L, caption_channels)
        mask: Tensor | None = None,  # (B, L), True or 1 for real tokens; None: all are
        *,
        trim: bool = True,
    ) -> TextStates:
        """Cross-attention keys and values of the copies, as `PixArtTransformer2DModel.text_states`."""
        layers = [copy.transformer_block.attn2 for copy in self.controlnet_blocks]
        return text_states(base.caption_projection, layers, encoder_hidden_states, mask, trim=trim)

    def between(
        self,
        base: PixArtTransformer2DModel,
        control_BND: Tensor,
        text: TextStates,
        grid: tuple[int, int],
        conditioning_scale: float = 1.0,
    ) -> Callable[[int, Tensor, Modulation], Tensor]:
        """The function that the base calls before each block. It serves one forward: it holds the state.

        `control_BND` is the embedded control picture, for the whole batch or one for all.
        """
        state_BND = control_BND

        def add(index: int, x_BND: Tensor, modulation: Modulation) -> Tensor:
            nonlocal state_BND
            if index > len(self.controlnet_blocks):
                return x_BND
            j = index - 1
            copy: ControlBlock = self.controlnet_blocks[j]
            if copy.before_proj is not None:
                state_BND = x_BND + copy.before_proj(state_BND)
            # The table holds the base's own offsets on top of what all blocks share; the copy has others.
            own_6D = copy.transformer_block.scale_shift_table - base.transformer_blocks[j].scale_shift_table
            table_B6D = modulation.blocks_ES6D[j] + own_6D
            state_BND, gain_BND = copy(state_BND, table_B6D, text, j, grid)
            return torch.add(x_BND, gain_BND, alpha=conditioning_scale)

        return add


@dataclass(frozen=True)
class ControlText(TextStates):
    """The base's states of a batch of captions, and those of the copies."""

    copies: TextStates


class ControlledPixArt:
    """A base and its control branch, called like the base alone.

    It is no module: the two have their own folders, devices and optimizers, and here they only meet. Without
    a control branch, without a control picture or at scale 0 the base is called as it is.

    Raises ValueError when the two do not fit.
    """

    def __init__(self, base: PixArtTransformer2DModel, control: PixArtControlNet | None = None) -> None:
        if control is not None:
            control.check_base(base)
        self.base, self.control = base, control
        self.config, self.out_channels = base.config, base.out_channels
        self.modulation = base.modulation  # the copies' tables follow from the base's

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def text_states(
        self, encoder_hidden_states: Tensor, mask: Tensor | None = None, *, trim: bool = True
    ) -> TextStates:
        """What no step changes of a batch of captions, for base and copies; once per picture."""
        text = self.base.text_states(encoder_hidden_states, mask, trim=trim)
        if self.control is None:
            return text
        copies = self.control.text_states(self.base, encoder_hidden_states, mask, trim=trim)
        return ControlText(text.runs, text.batch, copies)

    def __call__(
        self,
        hidden_states: Tensor,  # (B, C, Y, X) latents
        encoder_hidden_states: Tensor | None = None,  # (B, L, caption_channels), unless `text` is given
        timestep: Tensor | None = None,  # (B,) or one number, unless `modulation` is given
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        encoder_attention_mask: Tensor | None = None,  # (B, L), True or 1 for real tokens
        return_dict: bool = True,
        *,
        text: TextStates | None = None,  # of `text_states` of this object
        modulation: Modulation | None = None,
        control_latents: Tensor | None = None,  # (1 or B, C, Y, X), encoded and scaled like latents
        conditioning_scale: float = 1.0,
    ) -> Output:
        """(B, out_channels, Y, X), as the base's forward; one control picture serves the whole batch.

        Raises ValueError for a control picture of another size or number than the latents.
        """
        base, control, extra = self.base, self.control, {}
        if control is not None and control_latents is not None and conditioning_scale != 0:
            if text is None:
                if encoder_hidden_states is None:
                    raise ValueError("give encoder_hidden_states or text")
                text = self.text_states(encoder_hidden_states, encoder_attention_mask, trim=False)
            if not isinstance(text, ControlText):
                raise ValueError("the text is the base's alone; take ControlledPixArt.text_states")
            batch = hidden_states.shape[0]
            if control_latents.shape[1:] != hidden_states.shape[1:]:
                raise ValueError(
                    f"control latents are {tuple(control_latents.shape[1:])}, "
                    f"the latents are {tuple(hidden_states.shape[1:])}"
                )
            if len(control_latents) not in (1, batch, text.batch):
                raise ValueError(f"{len(control_latents)} control pictures do not fit {batch} latents")
            control_BND, grid = self._embed(control_latents)
            if len(control_BND) == batch != 1:
                control_BND = control_BND.repeat(text.batch // batch, 1, 1)  # as the base repeats latents
            extra["between"] = control.between(base, control_BND, text.copies, grid, conditioning_scale)
        return base(
            hidden_states,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs,
            encoder_attention_mask,
            return_dict,
            text=text,
            modulation=modulation,
            **extra,
        )

    def _embed(self, latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, N, D) through the base's own patches and positions, and the rows and columns of tokens."""
        base, patch = self.base, self.base.config.patch_size
        grid = (latents.shape[2] // patch, latents.shape[3] // patch)
        x_BND = base.pos_embed(latents)
        return x_BND + base.positions(*grid, x_BND.dtype, x_BND.device), grid
