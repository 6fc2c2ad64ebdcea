"""PixArt-alpha and PixArt-Sigma: a diffusion transformer for text. arXiv:2310.00426, arXiv:2403.04692.

State-dict keys and configuration are those of diffusers' `PixArtTransformer2DModel`, so that its checkpoints
load unchanged, and the numbers agree with it. What does not change between the steps of one picture can be
computed once and handed in: `text_states` (caption projection, keys and values of every block's
cross-attention), `modulation` (the adaLN tables of all steps) and the position table, which the model keeps
per size.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width, C channels, Y X latent rows
and columns, S timesteps in one table, E blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.models.layers import (
    TIME_FEATURES,
    AdaLayerNorm,
    Attention,
    Embedder,
    FeedForward,
    Output,
    PatchEmbed,
    Positions,
    position_table,
    time_features,
    unpatch,
)
from pipelines.models.network import Network

KV_SAMPLING = ("conv", "uniform", "ave", "uniform_every")


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Names and defaults of diffusers. Defaults are PixArt XL/2 at 1024 pixels."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8  # twice the latent channels when the variance is learned; None: in_channels
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32  # unused, kept for the round trip
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    sample_size: int = 128  # latent rows and columns of the native picture
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000  # unused, kept for the round trip
    upcast_attention: bool = False
    norm_type: str = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None  # of positions; None: sample_size // 64, at least 1
    use_additional_conditions: bool | None = None  # size and aspect ratio; None: yes when sample_size is 128
    caption_channels: int | None = None  # width of the text encoder; None: captions already fit
    attention_type: str | None = "default"
    # What diffusers does not have: section 3.2 of the second paper, and the checkpoints' normalised queries.
    qk_norm: bool = False
    kv_compress_sampling: str | None = None  # conv, uniform, ave or uniform_every
    kv_compress_factor: int = 1  # per side for all but uniform_every
    kv_compress_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, only in (
            ("activation_fn", "gelu-approximate"),
            ("norm_type", "ada_norm_single"),
            ("attention_type", "default"),
            ("upcast_attention", False),
        ):
            if getattr(self, name) != only:
                raise ValueError(f"{name} must be {only!r}, not {getattr(self, name)!r}")
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "patch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if self.width % 4:
            raise ValueError(f"the width {self.width} (heads x head size) must be divisible by 4")
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise ValueError(
                f"cross_attention_dim is {self.cross_attention_dim}, captions are projected to {self.width}"
            )
        if self.kv_compress_layers:
            if self.kv_compress_sampling not in KV_SAMPLING:
                raise ValueError(
                    f"kv_compress_sampling must be one of {', '.join(KV_SAMPLING)}, "
                    f"not {self.kv_compress_sampling!r}"
                )
            if self.kv_compress_factor < 2:
                raise ValueError(f"kv_compress_factor must be 2 or more, not {self.kv_compress_factor!r}")
            outside = [i for i in self.kv_compress_layers if not 0 <= i < self.num_layers]
            if outside:
                raise ValueError(f"kv_compress_layers names {outside}, there are {self.num_layers} layers")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def scale(self) -> float:
        return (
            max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale
        )

    @property
    def micro_conditions(self) -> bool:
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions


@dataclass(frozen=True)
class TextRun:
    """Neighbouring rows of a batch whose captions are handled alike, and what each block needs of them."""

    rows: slice
    keys: tuple[Tensor, ...] = ()  # per block (B, H, L, K)
    values: tuple[Tensor, ...] = ()
    mask_B11L: Tensor | None = None  # True for real tokens; None when all are
    constants: tuple[Tensor, ...] = ()  # per block (B, 1, D), instead of keys and values: see `text_states`


@dataclass(frozen=True)
class TextStates:
    """Everything of a batch of captions that no step changes."""

    runs: tuple[TextRun, ...]
    batch: int


@dataclass(frozen=True)
class Modulation:
    """adaLN tables of S timesteps: per block shift, 1 + scale and gate, for attention and feed-forward."""

    blocks_ES6D: Tensor
    final_S2D: Tensor

    def at(self, step: int) -> Modulation:
        """The table of one step, valid for any batch."""
        return Modulation(self.blocks_ES6D[:, step : step + 1], self.final_S2D[step : step + 1])

    def repeat(self, times: int) -> Modulation:
        """For a batch that is repeated; one row serves any batch as it is."""
        if self.final_S2D.shape[0] == 1:
            return self
        return Modulation(self.blocks_ES6D.repeat(1, times, 1, 1), self.final_S2D.repeat(times, 1, 1))


# Index of a block, tokens about to enter it, modulation of all blocks -> tokens. For control branches.
Between = Callable[[int, Tensor, Modulation], Tensor]


class SelfAttention(Attention):
    """Of image tokens, with two options: normalised queries and keys, and fewer keys and values than
    tokens."""

    def __init__(self, config: PixArtConfig, compressed: bool) -> None:
        width = config.width
        super().__init__(width, width, config.num_attention_heads, config.attention_bias, config.dropout)
        self.q_norm = nn.LayerNorm(width) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(width) if config.qk_norm else None
        self.sampling = config.kv_compress_sampling if compressed else None
        self.factor = factor = config.kv_compress_factor
        if self.sampling == "conv":  # keys and values share it; it starts as a mean over its window
            self.sr = nn.Conv2d(width, width, factor, factor, groups=width)
            nn.init.constant_(self.sr.weight, 1 / factor**2)
            nn.init.zeros_(self.sr.bias)
            self.norm = nn.LayerNorm(width)

    def over_grid(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Self-attention over grid = rows, columns, of which compression leaves fewer keys and values."""
        q_BND, k_BND, v_BND = self.project(x_BND)
        if self.q_norm is not None and self.k_norm is not None:
            q_BND, k_BND = self.q_norm(q_BND), self.k_norm(k_BND)
        k_BND, v_BND = self._compress(k_BND, grid), self._compress(v_BND, grid)
        return self.mix(self.split(q_BND), self.split(k_BND), self.split(v_BND))

    def _compress(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        factor = self.factor
        if self.sampling is None:
            return x_BND
        if self.sampling == "conv":
            x_BDYX = self.sr(x_BND.transpose(1, 2).unflatten(2, grid))
            return self.norm(x_BDYX.flatten(2).transpose(1, 2))
        if self.sampling == "uniform_every":
            if x_BND.shape[1] % factor:
                raise ValueError(f"{x_BND.shape[1]} tokens cannot be thinned by {factor}")
            return x_BND[:, ::factor]
        rows, columns = (side // factor * factor for side in grid)
        if self.sampling == "uniform" and (rows, columns) != grid:
            raise ValueError(f"{grid[0]} x {grid[1]} tokens cannot be thinned by {factor} per side")
        # `ave` is published as a resize to the nearest neighbour, which keeps the same tokens
        return x_BND.unflatten(1, grid)[:, :rows:factor, :columns:factor].flatten(1, 2)


class Block(nn.Module):
    """adaLN-single (section 2.3 of the first paper): one modulation for all blocks, plus own offsets."""

    def __init__(self, config: PixArtConfig, compressed: bool = False) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.num_attention_heads, config.dropout
        context = config.cross_attention_dim or width
        affine = config.norm_elementwise_affine
        self.norm1 = AdaLayerNorm(width, eps=config.norm_eps, elementwise_affine=affine)
        self.attn1 = SelfAttention(config, compressed)
        self.attn2 = Attention(width, context, heads, config.attention_bias, dropout)
        self.norm2 = AdaLayerNorm(width, eps=config.norm_eps, elementwise_affine=affine)
        self.ff = FeedForward(width, dropout)
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(6, width), std=width**-0.5))

    def attend_image(self, x_BND: Tensor, table_B6D: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale, gate = table_B6D[:, :3, None].unbind(1)
        y_BND = self.norm1.modulate(x_BND, shift, scale)
        return torch.addcmul(x_BND, gate, self.attn1.over_grid(y_BND, grid))

    def attend_text(self, x_BND: Tensor, text: TextStates, block: int) -> Tensor:
        parts = [self._attend_run(x_BND[run.rows], run, block) for run in text.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_run(self, x_BND: Tensor, run: TextRun, block: int) -> Tensor:
        if run.constants:
            return x_BND + run.constants[block]
        return x_BND + self.attn2(x_BND, run.keys[block], run.values[block], run.mask_B11L)

    def feed_forward(self, x_BND: Tensor, table_B6D: Tensor) -> Tensor:
        shift, scale, gate = table_B6D[:, 3:, None].unbind(1)
        y_BND = self.norm2.modulate(x_BND, shift, scale)
        return torch.addcmul(x_BND, gate, self.ff(y_BND))


class Conditions(nn.Module):
    """Timestep, and where asked for picture size and aspect ratio, to one vector."""

    def __init__(self, width: int, micro_conditions: bool) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(TIME_FEATURES, width)
        self.micro_conditions = micro_conditions
        if micro_conditions:
            self.resolution_embedder = Embedder(TIME_FEATURES, width // 3)
            self.aspect_ratio_embedder = Embedder(TIME_FEATURES, width // 3)

    def forward(self, timesteps_S: Tensor, added: Mapping[str, Tensor | None]) -> Tensor:
        dtype = self.timestep_embedder.linear_1.weight.dtype
        vector_SD = self.timestep_embedder(time_features(timesteps_S).to(dtype))
        if not self.micro_conditions:
            return vector_SD
        resolution, aspect_ratio = added.get("resolution"), added.get("aspect_ratio")
        if resolution is None or aspect_ratio is None:
            raise ValueError(
                "this model needs added_cond_kwargs with resolution (B, 2) and aspect_ratio (B, 1)"
            )
        rows = resolution.shape[0]
        size = self.resolution_embedder(time_features(resolution.flatten()).to(dtype)).reshape(rows, -1)
        ratio = self.aspect_ratio_embedder(time_features(aspect_ratio.flatten()).to(dtype)).reshape(rows, -1)
        return vector_SD + torch.cat([size, ratio], dim=1)


class AdaLNSingle(nn.Module):
    def __init__(self, width: int, micro_conditions: bool) -> None:
        super().__init__()
        self.emb = Conditions(width, micro_conditions)
        self.linear = nn.Linear(width, 6 * width)


class CaptionProjection(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, captions_BLD: Tensor) -> Tensor:
        return self.linear_2(functional.gelu(self.linear_1(captions_BLD), approximate="tanh"))


def text_states(
    projection: CaptionProjection | None,
    layers: Sequence[Attention],  # the cross-attention of each block
    captions_BLD: Tensor,
    mask: Tensor | None = None,  # (B, L)
    *,
    trim: bool = True,
) -> TextStates:
    """See `PixArtTransformer2DModel.text_states`; control branches have blocks of their own."""

    def run(rows: slice, captions_BLD: Tensor, mask_B11L: Tensor | None, constant: bool = False) -> TextRun:
        if projection is not None:
            captions_BLD = projection(captions_BLD)
        if constant:
            return TextRun(rows, constants=tuple(layer.out(layer.to_v(captions_BLD)) for layer in layers))
        pairs = [layer.keys_and_values(captions_BLD) for layer in layers]
        return TextRun(rows, tuple(k for k, _ in pairs), tuple(v for _, v in pairs), mask_B11L)

    batch, length = captions_BLD.shape[:2]
    if mask is not None:
        if mask.shape != (batch, length):
            raise ValueError(f"the mask is {tuple(mask.shape)}, the captions are {(batch, length)}")
        mask = mask.to(captions_BLD.device).bool()
    if not trim:
        mask_B11L = None if mask is None else mask[:, None, None]
        return TextStates((run(slice(0, batch), captions_BLD, mask_B11L),), batch)
    kept = [list(range(length))] * batch
    if mask is not None:
        kept = [[index for index, real in enumerate(row) if real] for row in mask.tolist()]
    if not all(kept):
        raise ValueError("a caption has no real token; the empty prompt still has its end token")
    runs = []
    for alone, group in groupby(range(batch), key=lambda row: len(kept[row]) == 1):
        rows = list(group)
        longest = max(len(kept[row]) for row in rows)
        trimmed = captions_BLD.new_zeros(len(rows), longest, captions_BLD.shape[-1])
        real = torch.zeros(len(rows), longest, dtype=torch.bool, device=captions_BLD.device)
        for index, row in enumerate(rows):
            count = len(kept[row])
            trimmed[index, :count] = captions_BLD[row, kept[row]]
            real[index, :count] = True
        mask_B11L = None if all(len(kept[row]) == longest for row in rows) else real[:, None, None]
        runs.append(run(slice(rows[0], rows[-1] + 1), trimmed, mask_B11L, constant=alone))
    return TextStates(tuple(runs), batch)


class PixArtTransformer2DModel(Network):
    """Latents, timesteps and captions to a prediction (noise, velocity or picture: the scheduler knows)."""

    config: PixArtConfig
    config_class = PixArtConfig
    header: ClassVar[Mapping[str, Any]] = {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": "0.42.1",
    }
    required = (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "num_layers",
        "sample_size",
        "patch_size",
        "caption_channels",
    )
    beyond = ("qk_norm", "kv_compress_sampling", "kv_compress_factor", "kv_compress_layers")
    # Checkpoints published as Transformer2DModel carry options of other families, switched off.
    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "double_self_attention": (False,),
        "only_cross_attention": (False,),
        "num_vector_embeds": (None, False),
        "use_linear_projection": (False,),
    }

    def __init__(self, config: PixArtConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        width = config.width
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config.in_channels, width, config.patch_size)
        self.transformer_blocks = nn.ModuleList(
            Block(config, index in config.kv_compress_layers) for index in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(2, width), std=width**-0.5))
        self.proj_out = nn.Linear(width, config.patch_size**2 * self.out_channels)
        self.adaln_single = AdaLNSingle(width, config.micro_conditions)
        self.caption_projection = (
            None if config.caption_channels is None else CaptionProjection(config.caption_channels, width)
        )
        self._positions = Positions()

    def text_states(
        self,
        encoder_hidden_states: Tensor,  # (B, L, caption_channels)
        mask: Tensor | None = None,  # (B, L), True or 1 for real tokens; None: all are
        *,
        trim: bool = True,
    ) -> TextStates:
        """Caption projection and every block's cross-attention keys and values: once per picture.

        `trim` cuts padding off, which weighs exactly nothing. Rows with one token, the empty prompt above
        all, become constants: the softmax over one key is 1, so the output is that token's value, whatever
        the query. Trimming looks at the mask's numbers; without it nothing leaves the device, and every row
        needs a token.

        Raises ValueError for a mask of another shape or, when trimming, a row without a real token.
        """
        return text_states(
            self.caption_projection,
            [block.attn2 for block in self.transformer_blocks],
            encoder_hidden_states,
            mask,
            trim=trim,
        )

    def modulation(
        self,
        timesteps: Tensor,  # (S,): a batch's timesteps, or all steps of a schedule
        added_cond_kwargs: Mapping[str, Tensor | None]
        | None = None,  # resolution (1 or S, 2), aspect_ratio (.., 1)
    ) -> Modulation:
        """The adaLN tables of these timesteps; `at(i)` is the one of step i."""
        vector_SD = self.adaln_single.emb(timesteps, added_cond_kwargs or {})
        shared_S6D = self.adaln_single.linear(functional.silu(vector_SD)).unflatten(-1, (6, -1))
        own_E6D = torch.stack([block.scale_shift_table for block in self.transformer_blocks])
        one_6 = shared_S6D.new_tensor([0, 1, 0, 0, 1, 0])  # scales multiply as 1 + scale
        blocks_ES6D = own_E6D[:, None] + shared_S6D + one_6[:, None]
        final_S2D = self.scale_shift_table + vector_SD[:, None] + one_6[:2, None]
        return Modulation(blocks_ES6D, final_S2D)

    def positions(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, rows * columns, D) position table, computed once per size."""

        def compute() -> Tensor:
            base = self.config.sample_size // self.config.patch_size
            return position_table(rows, columns, self.config.width, base, self.config.scale)

        return self._positions.get((rows, columns), dtype, device, compute)

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, Y, X) latents
        encoder_hidden_states: Tensor | None = None,  # (B, L, caption_channels), unless `text` is given
        timestep: Tensor | None = None,  # (B,) or one number, unless `modulation` is given
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        encoder_attention_mask: Tensor | None = None,  # (B, L), True or 1 for real tokens
        return_dict: bool = True,  # either way the result is a tuple whose first entry is `sample`
        *,
        text: TextStates | None = None,
        modulation: Modulation | None = None,  # one row, or one per row of the batch
        between: Between | None = None,  # changes the tokens before each block but the first
        attend: Callable[..., Tensor] | None = None,  # instead of `Block.attend_text`
        around: Callable[..., Tensor] | None = None,  # given the run through all blocks, and the tokens
    ) -> Output:
        """(B, out_channels, Y, X).

        `text` may hold r times as many rows as there are latents: the latents are then taken r times over, as
        guidance does with its two halves. What comes before the first text is computed once for all of them.
        """
        batch, _, rows, columns = hidden_states.shape
        patch = self.config.patch_size
        if rows % patch or columns % patch:
            raise ValueError(f"latents of {rows} x {columns} cannot be cut into patches of {patch}")
        if text is None:
            if encoder_hidden_states is None:
                raise ValueError("give encoder_hidden_states or text")
            text = self.text_states(encoder_hidden_states, encoder_attention_mask, trim=False)
        if modulation is None:
            if timestep is None:
                raise ValueError("give timestep or modulation")
            modulation = self.modulation(timestep.reshape(-1), added_cond_kwargs)
        times, remainder = divmod(text.batch, batch)
        if remainder or not times:
            raise ValueError(f"{text.batch} captions do not fit {batch} latents")

        x_BND = self.pos_embed(hidden_states)
        grid = (rows // patch, columns // patch)
        x_BND = x_BND + self.positions(*grid, x_BND.dtype, x_BND.device)
        once, modulation = modulation, modulation.repeat(times) if times > 1 else modulation

        def blocks(x_BND: Tensor) -> Tensor:
            for index, block in enumerate(self.transformer_blocks):
                if index and between is not None:
                    x_BND = between(index, x_BND, modulation)
                table_B6D = modulation.blocks_ES6D[index]
                x_BND = block.attend_image(x_BND, table_B6D if index else once.blocks_ES6D[0], grid)
                if index == 0 and times > 1:
                    x_BND = x_BND.repeat(times, 1, 1)
                if attend is None:
                    x_BND = block.attend_text(x_BND, text, index)
                else:
                    x_BND = attend(block, x_BND, text, index)
                x_BND = block.feed_forward(x_BND, table_B6D)
            return x_BND

        x_BND = blocks(x_BND) if around is None else around(blocks, x_BND)

        shift, scale = modulation.final_S2D[:, :, None].unbind(1)
        x_BND = self.proj_out(torch.addcmul(shift, self.norm_out(x_BND), scale))
        return Output(unpatch(x_BND, *grid, patch))
