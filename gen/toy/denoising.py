"""What the trainings of networks that draw latents share: the noise, the times, and the probe.

The latents are those of the toy autoencoder, (N, 4, 16, 16), of which a patch of 2 x 2 is a token: 64 of
them, each 16 pixels wide. The networks predict v (Salimans and Ho 2022, arXiv:2202.00512, appendix D):
with alpha^2 + sigma^2 = 1, x_t = alpha x + sigma noise and v = alpha noise - sigma x.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen.toy.world import COLOURS, SHAPES, Scene
from pipelines.attention import set_attention

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def seeded_generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(key).getrandbits(63))


class NoiseLevels:
    """alpha and sigma of the 1000 timesteps, as columns that broadcast over latents."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        betas = torch.linspace(BETAS["beta_start"], BETAS["beta_end"], 1000, dtype=torch.float64)
        signal = torch.cumprod(1 - betas, 0)
        self.alpha, self.sigma = (x.sqrt().float().to(device) for x in (signal, 1 - signal))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, both (B, 1, 1, 1), of timesteps (B,)."""
        return self.alpha[t, None, None, None], self.sigma[t, None, None, None]

    def add(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t)
        return alpha * x + sigma * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t)
        return alpha * noise - sigma * x

    def split(self, noisy: Tensor, velocity: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The picture and the noise that `velocity` says are in `noisy`."""
        alpha, sigma = self.at(t)
        return alpha * noisy - sigma * velocity, alpha * velocity + sigma * noisy


def draw_times(count: int, rng: torch.Generator) -> Tensor:
    """Timesteps (count,): half of them uniform, half where signal and noise are about as strong. There
    shapes are decided, the slowest thing to learn; layout and colour are decided earlier, and learned
    soon."""
    middle = (torch.randn(count, generator=rng) - 0.8).sigmoid()
    anywhere = torch.rand(count, generator=rng)
    times = torch.where(torch.rand(count, generator=rng) < 0.5, middle, anywhere)
    return (times * 1000).long().clamp(0, 999)


class WithProbe(nn.Module):
    """A transformer, and a probe on the tokens after one of its blocks that names shape and colour per
    patch."""

    def __init__(self, transformer: nn.Module, block: int) -> None:
        super().__init__()
        self.transformer = transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SHAPES) + 1 + len(COLOURS) + 1))
        self.tokens: Tensor | None = None
        self._listen(transformer.transformer_blocks[block + 1])

    def _listen(self, block: nn.Module) -> None:
        """Where tokens can be overheard differs: a PixArt's blocks are not called as modules, their norms
        are; a DiT's norms see the condition, its blocks the tokens."""
        for module in (block, block.norm1):
            module.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.training and inputs[0].ndim == 3:
            self.tokens = inputs[0]


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of shape and colour per patch, (B, N, shapes + 1 + colours + 1) against (B, N, 2); ground
    counts a fifth."""
    shapes, colours = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
    weight = torch.where(labels[..., 0] < len(SHAPES), 1.0, 0.2).flatten()
    total = sum(
        F.cross_entropy(part.flatten(0, 1), truth.flatten(), reduction="none")
        for part, truth in zip((shapes, colours), labels.unbind(-1), strict=True)
    )
    return (total * weight).sum() / weight.sum()


def patch_labels(owners: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """(N, 8, 8) owners -> (N, 64, 2) int64: shape and colour seen in each patch, one past the last for
    ground."""
    table = torch.full((len(owners), 4, 2), 0)
    table[:, 3] = torch.tensor([len(SHAPES), len(COLOURS)])  # owner -1 reads the last row
    for i, scene in enumerate(scenes[: len(owners)]):
        for k, thing in enumerate(scene.things):
            table[i, k] = torch.tensor([SHAPES.index(thing.shape), COLOURS.index(thing.colour)])
    index = owners.long().flatten(1) % 4
    return table.gather(1, index[..., None].expand(-1, -1, 2))


def plain_attention(device: torch.device | str, *networks: nn.Module) -> None:
    """For training on a CPU: in bfloat16 the fused attention's backward takes six times as long there as the
    plain one's."""
    if torch.device(device).type == "cpu":
        for network in networks:
            set_attention(network, "math")
