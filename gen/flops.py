"""How many operations a forward takes: two for each multiplication of a matrix product, all else left out.

`pixart` and `dit` count what the published network needs for one picture without guidance, `pixart_pair` and
`dit_pair` what ours computes in a step for both halves of guidance.

N image tokens, L text tokens, D width, E blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TIME_FEATURES = 256
Config = Mapping[str, Any]  # in diffusers' words


def pixart(config: Config, side: int, tokens: int) -> int:
    """One row of a batch: `side` latent rows and columns, a caption of `tokens`, padding included."""
    N, D, E = _image(config, side), _width(config), config["num_layers"]
    captions = 2 * tokens * (config["caption_channels"] * D + D * D)
    keys_and_values = 2 * tokens * 2 * D * D
    block = _self_attention(N, D) + keys_and_values + _cross_attention(N, tokens, D) + _feed_forward(N, D)
    return captions + E * block + _ends(config, N) + _time(D) + 2 * D * 6 * D


def pixart_pair(config: Config, side: int, tokens: Sequence[int]) -> int:
    """A step of ours for captions of these lengths, one for each half.

    Captions, their keys and values and the modulation are computed once per picture, the first
    self-attention once for both halves, and a caption of one token needs no attention.
    """
    N, D, E, rows = _image(config, side), _width(config), config["num_layers"], len(tokens)
    texts = sum(_cross_attention(N, count, D) for count in tokens if count > 1)
    attention = _self_attention(N, D) * (1 + rows * (E - 1))
    return attention + E * (texts + rows * _feed_forward(N, D)) + _ends(config, N, rows)


def dit(config: Config, side: int) -> int:
    """One row of a batch, its modulation included."""
    N, D, E = _image(config, side), _width(config), config["num_layers"]
    block = _self_attention(N, D) + _feed_forward(N, D) + 2 * D * 6 * D
    return E * block + _ends(config, N) + _time(D) + 2 * D * 2 * D


def dit_pair(config: Config, side: int, rows: int = 2) -> int:
    """A step of ours for so many rows; their modulation is computed once per picture."""
    N, D, E = _image(config, side), _width(config), config["num_layers"]
    return rows * E * (_self_attention(N, D) + _feed_forward(N, D)) + _ends(config, N, rows)


def _width(config: Config) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _image(config: Config, side: int) -> int:
    return int(side // config["patch_size"]) ** 2


def _self_attention(N: int, D: int) -> int:
    return 2 * N * 4 * D * D + 2 * 2 * N * N * D


def _cross_attention(N: int, L: int, D: int) -> int:
    """Of image to text, whose keys and values are there already."""
    return 2 * N * 2 * D * D + 2 * 2 * N * L * D


def _feed_forward(N: int, D: int) -> int:
    return 2 * N * 2 * D * 4 * D


def _ends(config: Config, N: int, rows: int = 1) -> int:
    """Patches to tokens, once for all rows, and back."""
    patch = config["patch_size"] ** 2 * _width(config)
    return int(2 * N * patch * (config["in_channels"] + rows * config["out_channels"]))


def _time(D: int) -> int:
    return 2 * (TIME_FEATURES * D + D * D)
