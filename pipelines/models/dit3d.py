"""DiT-3D: DiT over the voxels of a cloud of points. Mo et al. 2023, arXiv:2307.01831.

The cloud is voxelised, the grid is cut into cubes, DiT's blocks work on their tokens, and the answer is read
from the grid at each point. Numbers are those of the official code; parts and names are those of our DiT, so
that blocks trained on pictures can be taken over: see `take_blocks`.

Blocks of `window_layers` look only at their window of the token grid, as the paper describes. The official
code never does that: its command line reads the list of blocks as characters, so no block is ever found in
it, and every published checkpoint attends globally. Given true numbers it attends globally all the same, in
window order, and then misreads the batch; `window_kind="literal"` repeats that, for comparing.

Points stay float32 whatever the weights are: bfloat16 keeps less than three digits of a coordinate.

Shapes: B batch, P points, N tokens, D width, H heads, K head width, C channels, X Y Z voxels or tokens along
the three axes, W windows, S tokens along a side of the attended cube, R rows of one table (pairs of timestep
and class), E blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.models.dit import (
    EPSILON,
    AdaLNZero,
    ClassEmbedder,
    DiTTransformer2DModel,
    Modulation,
    adaln_zero,
)
from pipelines.models.layers import (
    TIME_FEATURES,
    AdaLayerNorm,
    Attention,
    Embedder,
    FeedForward,
    Output,
    Positions,
    position_codes,
)
from pipelines.models.network import Network
from pipelines.models.voxels import devoxelize, voxel_coordinates, voxelize

WINDOW_KINDS = ("intended", "literal")


@dataclass(frozen=True, kw_only=True)
class DiT3DConfig:
    """Words of our DiT's configuration. Defaults are DiT-3D S/4 at 32 voxels for one class."""

    num_attention_heads: int = 6
    attention_head_dim: int = 64
    in_channels: int = 3  # of a point: x, y, z, and whatever else is noised with them
    out_channels: int | None = None  # twice the channels when the variance is learned; None: in_channels
    num_layers: int = 12
    dropout: float = 0.0
    attention_bias: bool = True
    sample_size: int = 32  # voxels per side
    patch_size: int = 4  # voxels per side of a token's cube
    activation_fn: str = "gelu"  # the exact one
    num_embeds_ada_norm: int = 1  # classes; labels are 0 to this, without it
    class_dropout: bool = True  # whether the table of classes has one row more, for no class at all
    window_size: int = 0  # tokens per side of a window
    window_layers: tuple[int, ...] = ()  # blocks that attend within windows; the others attend globally
    window_kind: str = "intended"  # or "literal": what the official code does when it is made to
    relative_positions: bool = False  # in the logits of every block, decomposed along the three axes

    def __post_init__(self) -> None:
        if self.activation_fn != "gelu":
            raise ValueError(f"activation_fn must be 'gelu', not {self.activation_fn!r}")
        if self.window_kind not in WINDOW_KINDS:
            raise ValueError(f"window_kind must be one of {WINDOW_KINDS}, not {self.window_kind!r}")
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
        if self.in_channels < 3:
            raise ValueError(f"in_channels must be 3 or more, for x, y and z, not {self.in_channels}")
        if self.width % 6:
            raise ValueError(f"the width {self.width} (heads x head size) must be divisible by 6")
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"{self.sample_size} voxels per side cannot be cut into patches of {self.patch_size}; "
                "sample_size must be a multiple of patch_size"
            )
        if self.window_layers:
            outside = [i for i in self.window_layers if i not in range(self.num_layers)]
            if outside:
                raise ValueError(f"window_layers names {outside}, there are {self.num_layers} layers")
            if self.window_size < 1 or self.tokens % self.window_size:
                raise ValueError(
                    f"{self.tokens} tokens per side cannot be cut into windows of {self.window_size}; "
                    "window_size must divide sample_size / patch_size"
                )
            if self.window_kind == "literal" and self.relative_positions:
                raise ValueError(
                    "relative_positions have no literal behaviour: the official code raises; "
                    "window_kind must be 'intended'"
                )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def tokens(self) -> int:
        """Per side of the grid."""
        return self.sample_size // self.patch_size

    @property
    def null_label(self) -> int | None:
        """The label that means no class, for guidance; None when the model was trained without."""
        return self.num_embeds_ada_norm if self.class_dropout else None


def position_table_3d(side: int, width: int) -> Tensor:
    """(side^3, width) float32 sine-cosine table: a third of the width each for X, Y and Z, Z fastest."""
    codes_SD = position_codes(torch.arange(side), width // 3)
    axes = (codes_SD[:, None, None], codes_SD[None, :, None], codes_SD[None, None])
    return torch.cat([axis.expand(side, side, side, -1) for axis in axes], dim=-1).flatten(0, 2)


def to_windows(x_BND: Tensor, side: int, window: int) -> Tensor:
    """(B * W, N / W, D): the tokens of a grid of `side`, in windows ordered X, Y, Z."""
    x = x_BND.unflatten(1, (side // window, window) * 3)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def from_windows(x_BND: Tensor, side: int, window: int) -> Tensor:
    """(B, N, D): `to_windows` undone, for B * W rows.

    Of fewer rows it makes what the official code makes of them: the batch is counted as rows / W rounded
    down, and what is left over is read as channels.
    """
    count = side // window
    batch = x_BND.shape[0] // count**3
    x = x_BND.reshape(batch, count, count, count, window, window, window, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, side**3, -1)


class CubeAttention(Attention):
    """Of the tokens of a cube, with relative positions in the logits where asked for.

    Decomposed as in Li et al. 2022, arXiv:2112.01526, section 4.1, with one axis more: a logit gains the
    product of the unscaled query with an embedding of each of the three distances. Such a product depends on
    the key's place along one axis only. So there are no N x N tables of logits: queries are made longer by
    their products with all places along the axes, keys by a 1 at their own, and any attention function will
    do.
    """

    def __init__(self, config: DiT3DConfig, side: int) -> None:
        width = config.width
        super().__init__(width, width, config.num_attention_heads, config.attention_bias, config.dropout)
        self.side = side  # S
        self.relative = config.relative_positions
        if self.relative:
            shape = (2 * side - 1, config.attention_head_dim)
            for axis in "xyz":
                self.register_parameter(f"rel_pos_{axis}", nn.Parameter(nn.init.zeros_(torch.empty(shape))))

    def lengthen(self, q_BHNK: Tensor, k_BHNK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of 3 S more channels, whose scaled products are the logits wanted."""
        side, head = self.side, q_BHNK.shape[-1]
        places_S = torch.arange(side, device=q_BHNK.device)
        apart_SS = places_S[:, None] - places_S + side - 1
        q_BHXYZK = q_BHNK.unflatten(2, (side, side, side))
        products = [
            torch.einsum(f"bhxyzk,{axis}sk->bhxyzs", q_BHXYZK, getattr(self, f"rel_pos_{axis}")[apart_SS])
            for axis in "xyz"
        ]
        longer = head + 3 * side
        # The attention function scales by the longer width: undone here, so that keys stay 0 and 1.
        parts = [q_BHXYZK * head**-0.5, *products]
        q_BHNK = torch.cat(parts, dim=-1).flatten(2, 4) * longer**0.5
        ones_SS = torch.eye(side, dtype=k_BHNK.dtype, device=k_BHNK.device)
        axes = (ones_SS[:, None, None], ones_SS[None, :, None], ones_SS[None, None])
        at_NK = torch.cat([axis.expand(side, side, side, -1) for axis in axes], dim=-1).flatten(0, 2)
        return q_BHNK, torch.cat([k_BHNK, at_NK.expand(*k_BHNK.shape[:2], -1, -1)], dim=-1)

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BHNK, k_BHNK, v_BHNK = (self.split(part) for part in self.project(x_BND))
        if self.relative:
            q_BHNK, k_BHNK = self.lengthen(q_BHNK, k_BHNK)
        return self.mix(q_BHNK, k_BHNK, v_BHNK)


class Block(nn.Module):
    def __init__(self, config: DiT3DConfig, windowed: bool) -> None:
        super().__init__()
        width = config.width
        self.side, self.window = config.tokens, config.window_size if windowed else 0
        self.literal = windowed and config.window_kind == "literal"
        self.norm1 = AdaLNZero(width)
        self.attn1 = CubeAttention(config, self.window or self.side)
        self.ff = FeedForward(width, config.dropout, approximate="none")
        self.norm = AdaLayerNorm(width, eps=EPSILON, elementwise_affine=False)  # twice: it has no weights

    def look_around(self, y_BND: Tensor) -> Tensor:
        if not self.window:
            return self.attn1(y_BND)
        windows = to_windows(y_BND, self.side, self.window)
        if not self.literal:
            return from_windows(self.attn1(windows), self.side, self.window)
        count = (self.side // self.window) ** 3
        if len(y_BND) < count:
            raise ValueError(
                f"{len(y_BND)} clouds are fewer than the {count} windows, and the official code fails; "
                f"give {count} or more, or make it window_kind 'intended'"
            )
        y = self.attn1(windows.reshape(y_BND.shape))
        return from_windows(y, self.side, self.window).reshape(y_BND.shape)

    def forward(self, x_BND: Tensor, table_B6D: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = table_B6D[:, :, None].unbind(1)
        y_BND = self.norm.modulate(x_BND, shift1, scale1)
        x_BND = torch.addcmul(x_BND, gate1, self.look_around(y_BND))
        y_BND = self.norm.modulate(x_BND, shift2, scale2)
        return torch.addcmul(x_BND, gate2, self.ff(y_BND))


class CubeEmbed(nn.Module):
    """Cubes of voxels to tokens, Z fastest."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, grid_BCXYZ: Tensor) -> Tensor:
        return self.proj(grid_BCXYZ).flatten(2).transpose(1, 2)


def from_cubes(x_BND: Tensor, side: int, patch: int) -> Tensor:
    """(B, side^3, patch^3 * C) tokens, laid out x, y, z, channel, to (B, C, X, Y, Z)."""
    x = x_BND.unflatten(1, (side,) * 3).unflatten(-1, (patch, patch, patch, -1))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class DiT3DModel(Network):
    """Noisy clouds, timesteps and classes to a prediction for each point: the noise.

    In training it does not drop labels by itself: whoever trains hands in the null label.
    """

    config: DiT3DConfig
    config_class = DiT3DConfig
    header: ClassVar[Mapping[str, Any]] = {"_class_name": "DiT3DModel"}
    required = (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "num_layers",
        "sample_size",
        "patch_size",
        "num_embeds_ada_norm",
    )

    def __init__(self, config: DiT3DConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        width = config.width
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = CubeEmbed(config.in_channels, width, config.patch_size)
        self.timestep_embedder = Embedder(TIME_FEATURES, width)
        self.class_embedder = ClassEmbedder(config.num_embeds_ada_norm + config.class_dropout, width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, index in config.window_layers) for index in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.patch_size**3 * self.out_channels)
        self._positions = Positions()

    @torch.no_grad()
    def take_blocks(self, dit: DiTTransformer2DModel) -> None:
        """Start from a DiT trained on pictures: its blocks, as the paper does; the rest keeps its numbers.

        Raises ValueError for a DiT whose blocks have another size or number.
        """
        for key in ("num_layers", "num_attention_heads", "attention_head_dim", "attention_bias"):
            ours, theirs = getattr(self.config, key), getattr(dit.config, key)
            if ours != theirs:
                raise ValueError(f"the blocks of a DiT with {key} {theirs!r} do not fit one with {ours!r}")
        state = self.transformer_blocks.state_dict()
        for key, tensor in dit.transformer_blocks.state_dict().items():
            state[key].copy_(tensor)  # all of them: relative positions are the only ones it has not

    def check_labels(self, class_labels: Tensor | int) -> None:
        """Raises ValueError for a label that is not one of the classes, nor that of no class."""
        known = range(self.class_embedder.embedding_table.num_embeddings)
        wrong = [label for label in torch.as_tensor(class_labels).flatten().tolist() if label not in known]
        if wrong:
            last, null = self.config.num_embeds_ada_norm - 1, self.config.null_label
            also = "" if null is None else f", or {null} for no class"
            raise ValueError(f"there is no class {wrong[0]}: this model has 0 to {last}{also}")

    # What no step changes

    def modulation(self, timestep: Tensor | float, class_labels: Tensor | int) -> Modulation:
        """adaLN tables of R pairs; a single timestep serves all classes, a single class all timesteps.

        `timestep` (R,) may be fractional, `class_labels` (R,) are integers. Raises ValueError when their
        numbers do not fit.
        """
        return adaln_zero(self, timestep, class_labels)

    def positions(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, N, D) position table, computed once."""
        side, width = self.config.tokens, self.config.width
        return self._positions.get((side,) * 3, dtype, device, lambda: position_table_3d(side, width))

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, P) noisy points, x, y and z first
        timestep: Tensor | float | None = None,  # (B,) or one number, unless `modulation` is given
        class_labels: Tensor | int | None = None,  # (B,) or one number, unless `modulation` is given
        return_dict: bool = True,  # either way the result is a tuple whose first entry is `sample`
        *,
        modulation: Modulation | None = None,  # one row, or one per row of the batch
    ) -> Output:
        """(B, out_channels, P) float32.

        There may be r times as many classes, or rows of `modulation`, as clouds: the clouds are then taken r
        times over, as guidance does with its two halves.

        Raises ValueError for clouds of another form, and for numbers that do not fit.
        """
        config = self.config
        if hidden_states.ndim != 3 or hidden_states.shape[1] != config.in_channels:
            raise ValueError(
                f"clouds are {tuple(hidden_states.shape)}; "
                f"they must be (clouds, {config.in_channels}, points)"
            )
        batch = hidden_states.shape[0]
        if modulation is None:
            if timestep is None or class_labels is None:
                raise ValueError("give timestep and class_labels, or modulation")
            modulation = self.modulation(timestep, class_labels)
        given = modulation.final_R2D.shape[0]
        if given != 1 and given % batch:
            raise ValueError(f"{given} timesteps and class labels do not fit {batch} clouds")
        times = max(given // batch, 1)

        points_BCP = hidden_states.float()
        coordinates_B3P = voxel_coordinates(points_BCP[:, :3], config.sample_size)
        grid_BCXYZ = voxelize(points_BCP, coordinates_B3P, config.sample_size)
        x_BND = self.pos_embed(grid_BCXYZ.to(self.dtype))
        x_BND = x_BND + self.positions(self.dtype, x_BND.device)
        if times > 1:
            x_BND, coordinates_B3P = x_BND.repeat(times, 1, 1), coordinates_B3P.repeat(times, 1, 1)
        for index, block in enumerate(self.transformer_blocks):
            x_BND = block(x_BND, modulation.blocks_ER6D[index])
        shift, scale = modulation.final_R2D[:, :, None].unbind(1)
        x_BND = self.proj_out_2(torch.addcmul(shift, self.norm_out(x_BND), scale))
        grid_BCXYZ = from_cubes(x_BND.float(), config.tokens, config.patch_size)
        return Output(devoxelize(grid_BCXYZ, coordinates_B3P))


# Of the official code, where L is as wide as XL, unlike in two dimensions. None learns the variance.
_FAMILY = (("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1152, 16), ("XL", 28, 1152, 16))
SIZES: Mapping[str, Mapping[str, int]] = {
    f"{name}/{patch}": {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch,
    }
    for name, depth, width, heads in _FAMILY
    for patch in (2, 4, 8)
}
VOXELS = (16, 32, 64)  # sample_size: the sides the paper trains
# Windows as the published scripts ask for them, of 4 tokens per side: every third block, not quite to the end
WINDOWS: Mapping[str, Mapping[str, Any]] = {
    name: {"window_size": 4, "window_layers": tuple(range(0, stop, 3))}
    for name, stop in (("S", 12), ("B", 12), ("L", 21), ("XL", 27))
}
