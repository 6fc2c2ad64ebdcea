"""The encoder of T5 1.1: words to vectors. Raffel et al. 2019, arXiv:1910.10683.

Keys and configuration are those of transformers' `T5EncoderModel`, and the numbers agree with it. It is here
because importing transformers takes longer than drawing with the small weights; `supports` says which
configurations it covers, and the pipeline takes transformers' class for the others.

Shapes: B batch, L tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.models.network import Network

ACTIVATIONS = {"relu": functional.relu, "gated-gelu": lambda x: functional.gelu(x, approximate="tanh")}


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Names and defaults of transformers."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.0  # this class is for inference
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    pad_token_id: int = 0
    eos_token_id: int = 1
    is_encoder_decoder: bool = False
    use_cache: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in ACTIVATIONS:
            raise ValueError(f"feed_forward_proj must be one of {', '.join(ACTIVATIONS)}")


class Encoded(NamedTuple):
    last_hidden_state: Tensor  # (B, L, D)


class RmsNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BLD: Tensor) -> Tensor:
        variance = x_BLD.float().pow(2).mean(-1, keepdim=True)  # float32 even for half precision
        return self.weight * (x_BLD * torch.rsqrt(variance + self.epsilon)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """No scaling by the head size, and a learned bias per distance instead of positions."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:  # the first block's serves all
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(self, x_BLD: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y_BHLK = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y_BHLK.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_bias)
        self.layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x_BLD: Tensor, bias: Tensor) -> Tensor:
        return x_BLD + self.SelfAttention(self.layer_norm(x_BLD), bias)


class Dense(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.feed_forward_proj]
        self.is_gated = config.feed_forward_proj.startswith("gated")
        for name in ("wi_0", "wi_1") if self.is_gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        hidden = self.act(self.wi_0(x_BLD)) * self.wi_1(x_BLD) if self.is_gated else self.act(self.wi(x_BLD))
        return self.wo(hidden.to(self.wo.weight.dtype))


class DenseLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = Dense(config)
        self.layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.DenseReluDense(self.layer_norm(x_BLD))


class Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, has_bias), DenseLayer(config)])

    def forward(self, x_BLD: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x_BLD, bias))


class Encoder(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, has_bias=index == 0) for index in range(config.num_layers))
        self.final_layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)


class T5EncoderModel(Network):
    """Token ids to vectors."""

    config: T5Config
    config_class = T5Config
    weights_name = "model.safetensors"
    header: ClassVar[Mapping[str, Any]] = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    takes_unknown_keys = True  # transformers writes many that concern decoding

    def __init__(self, config: T5Config | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.shared = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.encoder = Encoder(self.config)

    @classmethod
    def supports(cls, entries: Mapping[str, Any]) -> bool:
        """Whether a config.json describes what this class computes."""
        # transformers keeps the activation beside feed_forward_proj, and believes the former.
        expected = {"gated-gelu": "gelu_new", "relu": "relu"}.get(entries.get("feed_forward_proj", ""))
        return (
            entries.get("model_type") == "t5"
            and expected is not None
            and entries.get("dense_act_fn", expected) == expected
            and "quantization_config" not in entries
        )

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some files hold the word vectors under the encoder's name, or under both."""
        words = state.pop("encoder.embed_tokens.weight", None)
        if words is not None:
            state.setdefault("shared.weight", words)
        return state

    def cast(
        self, key: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Tensor:
        """float16 is too small for the sums of this one layer, as transformers knows too."""
        if dtype == torch.float16 and key.endswith("wo.weight"):
            dtype = torch.float32
        return super().cast(key, tensor, dtype, device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """(B, L) ids, and a mask that is 1 for real tokens, to (B, L, D)."""
        bias = self._bias(input_ids.shape[1])
        if attention_mask is not None and not attention_mask.bool().all():
            real = attention_mask[:, None, None].bool()
            bias = torch.where(real, bias, torch.finfo(bias.dtype).min)
        x_BLD = self.shared(input_ids)
        for block in self.encoder.block:
            x_BLD = block(x_BLD, bias.to(x_BLD.dtype))
        return Encoded(self.encoder.final_layer_norm(x_BLD))

    def _bias(self, length: int) -> Tensor:
        """(1, H, L, L): near distances have a bucket each, far ones share in logarithmic steps."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        position = torch.arange(length, device=table.weight.device)
        distance = position[None] - position[:, None]
        half = self.config.relative_attention_num_buckets // 2
        near = half // 2
        ratio = math.log(self.config.relative_attention_max_distance / near)
        far = near + (torch.log(distance.abs().float() / near) / ratio * (half - near)).to(torch.long)
        bucket = torch.where(distance.abs() < near, distance.abs(), far.clamp(max=half - 1))
        return table(bucket + half * (distance > 0)).permute(2, 0, 1)[None]
