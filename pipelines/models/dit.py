"""DiT: a diffusion transformer for class labels. Peebles & Xie 2022, arXiv:2212.09748.

Configuration is that of diffusers' `DiTTransformer2DModel`, and its checkpoints load. The numbers are those
of the official code, which differ from diffusers' in two places: the frequencies of the time features, and
the epsilon of one normalisation. Published files hold the small embedders of timestep and class once per
block, all equal; here they are held once, see `rename` and `published_state`.

What depends on timestep and class only, the adaLN tables of all blocks, can be computed for all steps at once
and handed in: see `modulation`.

Shapes: B batch, N image tokens, D width, H heads, K head width, C channels, Y X latent rows and columns,
R rows of one table (pairs of timestep and class), E blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

# The official value. Published configurations say 1e-5: that is diffusers' default, which nobody chose, and
# which diffusers applies to the second normalisation of a block only. So `norm_eps` is read and not used.
EPSILON = 1e-6

# Where published files hold their copies of the embedders, and where one of them belongs.
_COPY = re.compile(r"^transformer_blocks\.\d+\.norm1\.emb\.(?=timestep_embedder\.|class_embedder\.)")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Names and defaults of diffusers. Defaults are DiT XL/2 at 256 pixels, without learned variance."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = (
        None  # twice the latent channels when the variance is learned; None: in_channels
    )
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32  # unused, kept for the round trip
    attention_bias: bool = True
    sample_size: int = 32  # latent rows and columns of the native picture
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000  # classes; labels are 0 to this, without it
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5  # unused, kept for the round trip: see EPSILON
    # diffusers does not know this one. Whether the table of classes has one row more, for no class at all.
    class_dropout: bool = True

    def __post_init__(self) -> None:
        for name, only in (
            ("activation_fn", "gelu-approximate"),
            ("norm_type", "ada_norm_zero"),
            ("norm_elementwise_affine", False),
            ("upcast_attention", False),
        ):
            if getattr(self, name) != only:
                raise ValueError(f"{name} must be {only!r}, not {getattr(self, name)!r}")
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "num_layers",
            "sample_size",
            "patch_size",
            "num_embeds_ada_norm",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if self.width % 4:
            raise ValueError(f"the width {self.width} (heads x head size) must be divisible by 4")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def null_label(self) -> int | None:
        """The label that means no class, for guidance; None when the model was trained without."""
        return self.num_embeds_ada_norm if self.class_dropout else None


@dataclass(frozen=True)
class Modulation:
    """adaLN tables of R pairs of timestep and class: per block shift, 1 + scale and gate, for attention and
    feed-forward; for the end shift and 1 + scale."""

    blocks_ER6D: Tensor
    final_R2D: Tensor

    def at(self, rows: Tensor | slice) -> Modulation:
        """Some of the rows, in any order and as often as wanted."""
        return Modulation(self.blocks_ER6D[:, rows], self.final_R2D[rows])


class AdaLNZero(nn.Module):
    """One block's modulation (section 3.2), out of the activated sum of timestep and class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, activated_RD: Tensor) -> Tensor:
        """(R, 6, D): shift, scale and gate of attention, then of feed-forward."""
        return self.linear(activated_RD).unflatten(-1, (6, -1))


class ClassEmbedder(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels_R: Tensor) -> Tensor:
        return self.embedding_table(labels_R)


def adaln_zero(model: Any, timestep: Tensor | float, class_labels: Tensor | int) -> Modulation:
    """The adaLN tables of a `model` that has DiT's parts, in two dimensions or three: see `modulation`."""
    device = model.device
    timesteps_R = torch.as_tensor(timestep, device=device).reshape(-1)
    labels_R = torch.as_tensor(class_labels, device=device).reshape(-1)
    if len(timesteps_R) != len(labels_R) and 1 not in (len(timesteps_R), len(labels_R)):
        raise ValueError(f"{len(timesteps_R)} timesteps do not fit {len(labels_R)} class labels")
    vector_RD = model.timestep_embedder(time_features(timesteps_R).to(model.dtype))
    activated_RD = functional.silu(vector_RD + model.class_embedder(labels_R))
    tables = [block.norm1(activated_RD) for block in model.transformer_blocks]
    one_6 = activated_RD.new_tensor([0, 1, 0, 0, 1, 0])  # scales multiply as 1 + scale
    final_R2D = model.proj_out_1(activated_RD).unflatten(-1, (2, -1))
    return Modulation(torch.stack(tables) + one_6[:, None], final_R2D + one_6[:2, None])


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.norm1 = AdaLNZero(width)
        self.attn1 = Attention(width, width, config.num_attention_heads, config.attention_bias, dropout)
        self.ff = FeedForward(width, dropout)
        self.norm = AdaLayerNorm(width, eps=EPSILON, elementwise_affine=False)  # twice: it has no weights

    def forward(self, x_BND: Tensor, table_B6D: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = table_B6D[:, :, None].unbind(1)
        y_BND = self.norm.modulate(x_BND, shift1, scale1)
        x_BND = torch.addcmul(x_BND, gate1, self.attn1.to_itself(y_BND))
        y_BND = self.norm.modulate(x_BND, shift2, scale2)
        return torch.addcmul(x_BND, gate2, self.ff(y_BND))


class DiTTransformer2DModel(Network):
    """Latents, timesteps and classes to a prediction: the noise, and behind it the variance where learned.

    In training it does not drop labels by itself, unlike diffusers': whoever trains hands in the null label.
    """

    config: DiTConfig
    config_class = DiTConfig
    header: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DiTTransformer2DModel",
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
        "num_embeds_ada_norm",
    )
    beyond = ("class_dropout",)
    # Checkpoints published as Transformer2DModel carry options of other families, switched off.
    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_type": ("default",),
        "caption_channels": (None,),
        "cross_attention_dim": (None,),
        "double_self_attention": (False,),
        "interpolation_scale": (None,),
        "num_vector_embeds": (None, False),
        "only_cross_attention": (False,),
        "use_additional_conditions": (None, False),
        "use_linear_projection": (False,),
    }

    def __init__(self, config: DiTConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        width = config.width
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config.in_channels, width, config.patch_size)
        self.timestep_embedder = Embedder(TIME_FEATURES, width)
        self.class_embedder = ClassEmbedder(config.num_embeds_ada_norm + config.class_dropout, width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.patch_size**2 * self.out_channels)
        self._positions = Positions()

    # Files

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout, or the published one, to ours.

        Raises ValueError when the copies that blocks of the published layout hold are not all equal.
        """
        renamed: dict[str, Tensor] = {}
        origins: dict[str, str] = {}
        for key in sorted(state):
            name = _COPY.sub("", key)
            if name in renamed:
                if not torch.equal(state[key], renamed[name]):
                    raise ValueError(
                        f"{key} differs from {origins[name]}; this model has one embedder for all blocks"
                    )
                continue
            renamed[name], origins[name] = state[key], key
        return renamed

    def stored_state(self, *, published: bool = True) -> dict[str, Tensor]:
        """The weights as `save_pretrained` writes them, which takes `published` too.

        `published` repeats the embedders in every block, as diffusers needs it. Without, the file is smaller
        (by a tenth for XL, by much more for a small model with many classes) and only we can read it.
        """
        return published_state(self) if published else super().stored_state()

    # What no step changes

    def modulation(self, timestep: Tensor | float, class_labels: Tensor | int) -> Modulation:
        """adaLN tables of R pairs; a single timestep serves all classes, a single class all timesteps.

        `timestep` (R,) may be fractional, `class_labels` (R,) are integers. Raises ValueError when their
        numbers do not fit.
        """
        return adaln_zero(self, timestep, class_labels)

    def positions(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, rows * columns, D) position table, computed once per size. Its first half codes the column."""

        def compute() -> Tensor:
            # Positions are plain integers at every size, for the official model interpolates nothing: cut
            # out of the table of a square that is its own native size.
            side = max(rows, columns)
            square_YXD = position_table(side, side, self.config.width, side, 1.0).unflatten(0, (side, side))
            return square_YXD[:rows, :columns].reshape(rows * columns, -1)

        return self._positions.get((rows, columns), dtype, device, compute)

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, Y, X) latents
        timestep: Tensor | float | None = None,  # (B,) or one number, unless `modulation` is given
        class_labels: Tensor | int | None = None,  # (B,) or one number, unless `modulation` is given
        return_dict: bool = True,  # either way the result is a tuple whose first entry is `sample`
        *,
        modulation: Modulation | None = None,  # one row, or one per row of the batch
        around: Callable[..., Tensor] | None = None,  # given the run through all blocks, and the tokens
    ) -> Output:
        """(B, out_channels, Y, X).

        There may be r times as many classes, or rows of `modulation`, as latents: the latents are then taken
        r times over, as guidance does with its two halves.

        Raises ValueError for latents that cannot be cut into patches, and for numbers that do not fit.
        """
        batch, _, rows, columns = hidden_states.shape
        patch = self.config.patch_size
        if rows % patch or columns % patch:
            raise ValueError(f"latents of {rows} x {columns} cannot be cut into patches of {patch}")
        if modulation is None:
            if timestep is None or class_labels is None:
                raise ValueError("give timestep and class_labels, or modulation")
            modulation = self.modulation(timestep, class_labels)
        given = modulation.final_R2D.shape[0]
        if given != 1 and given % batch:
            raise ValueError(f"{given} timesteps and class labels do not fit {batch} latents")

        x_BND = self.pos_embed(hidden_states)
        x_BND = x_BND + self.positions(rows // patch, columns // patch, x_BND.dtype, x_BND.device)
        if given > batch:
            x_BND = x_BND.repeat(given // batch, 1, 1)

        def blocks(x_BND: Tensor) -> Tensor:
            for index, block in enumerate(self.transformer_blocks):
                x_BND = block(x_BND, modulation.blocks_ER6D[index])
            return x_BND

        x_BND = blocks(x_BND) if around is None else around(blocks, x_BND)
        shift, scale = modulation.final_R2D[:, :, None].unbind(1)
        x_BND = self.proj_out_2(torch.addcmul(shift, self.norm_out(x_BND), scale))
        return Output(unpatch(x_BND, rows // patch, columns // patch, patch))


def published_state(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """The weights in diffusers' layout: every block holds a copy of the embedders of timestep and class.

    Copies are real ones, since safetensors refuses tensors that share memory.
    """
    state = {}
    for key, tensor in model.state_dict().items():
        tensor = tensor.detach().contiguous()
        if key.startswith(("timestep_embedder.", "class_embedder.")):
            for block in range(model.config.num_layers):
                state[f"transformer_blocks.{block}.norm1.emb.{key}"] = tensor.clone()
        else:
            state[key] = tensor
    return state


# Table 1 of the paper; the width is heads x head size. All of them learn the variance.
SIZES: Mapping[str, Mapping[str, int]] = {
    f"{name}/{patch}": {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch,
        "out_channels": 8,
    }
    for name, depth, width, heads in (
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("XL", 28, 1152, 16),
    )
    for patch in (2, 4, 8)
}
