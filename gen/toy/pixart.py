"""Training of `pixart-sigma:toy`: tokenizer, text encoder, autoencoder and transformer, as tasks for
`gen.train`.

What makes so small a budget enough: the text encoder first learns from text alone to say, at every token,
what stands where; the transformer predicts v rather than noise, and a linear probe in its middle must
name the shape and colour seen in each patch (a supervised cousin of representation alignment, Yu et al.
2024, arXiv:2410.06940). The probe is thrown away afterwards. Facts and measurements are in
docs/training.md.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gen.optim import MuonAdamW, split_parameters
from gen.toy import words, world
from gen.toy.denoising import (
    BETAS,
    NoiseLevels,
    WithProbe,
    draw_times,
    patch_labels,
    plain_attention,
    probe_loss,
    seeded_generator,
)
from gen.toy.words import Caption, describe
from gen.toy.world import BACKGROUNDS, COLOURS, MATERIALS, SHAPES, SIZES, Scene

# -------------------------------------------------------------------------------------------------- tokenizer


def vocabulary() -> list[tuple[str, float]]:
    """Unigram pieces and scores: every word of the grammar is one piece, anything else falls apart into
    letters."""
    tables = (
        words.SHAPE_WORDS,
        words.COLOUR_WORDS,
        words.SIZE_WORDS,
        words.MATERIAL_WORDS,
        words.BACKGROUND_WORDS,
        words.RELATION_WORDS,
    )
    text = " ".join(w for table in tables for row in table.values() for w in row)
    text += (
        " "
        + " ".join(words.OPENINGS)
        + " a an the one it that is on against background ground floor with and"
    )
    for mark in ("{a}", "{b}", "{c}", "{b2}", ","):
        text = text.replace(mark, " ")
    known = sorted(set(text.lower().split()))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + w, -3.0) for w in known]
    return pieces + [(c, -8.0) for c in ("▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/&+")]


def build_tokenizer():
    """A T5 tokenizer of the grammar's words; the empty prompt is the one token `</s>`."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=vocabulary(), extra_ids=0, model_max_length=300)


def tokenize(
    tokenizer, texts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts -> ids and mask (B, L), padded to the longest."""
    batch = tokenizer([t.lower().strip() for t in texts], padding=True, truncation=True, max_length=300)
    return (
        torch.tensor(batch["input_ids"], device=device),
        torch.tensor(batch["attention_mask"], device=device),
    )


# ----------------------------------------------------------------------------------------------- text encoder

# Where the things of a scene stand, in words that do not depend on which is named first.
ROLES = ("alone", "left", "middle", "right", "front", "back", "top", "bottom")
_ROLES_OF = {
    "alone": ("alone",),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "in front of": ("front", "back"),
    "behind": ("back", "front"),
    "on top of": ("top", "bottom"),
    "row": ("left", "middle", "right"),
}
# (attribute, its values); value 0 is "not there, or not said"
_HEADS = (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("material", MATERIALS))
_WIDTHS = [len(ROLES) * (1 + len(values)) for _, values in _HEADS] + [1 + len(BACKGROUNDS)]


def caption_labels(captions: Sequence[Caption]) -> torch.Tensor:
    """(B, roles * 4 + 1) int64: for each attribute and role its value, 0 where open; last the background."""
    rows = []
    for caption in captions:
        role_of = dict(zip(_ROLES_OF[caption.relation], caption.things, strict=True))
        row = [
            1 + values.index(role_of[role][attribute]) if role in role_of and role_of[role][attribute] else 0
            for attribute, values in _HEADS
            for role in ROLES
        ]
        rows.append([*row, 1 + BACKGROUNDS.index(caption.background) if caption.background else 0])
    return torch.tensor(rows)


@torch.no_grad()
def _look_both_ways(bias_BH: torch.Tensor) -> None:
    """Start T5's relative position biases (32 buckets, heads) as a near look left, a near look right, a
    far look left and no preference, in turn. From T5's own start, near zero, order
    was not told apart after 700 steps of 64 captions; from this one it was after 450.
    """
    distance = torch.arange(16.0)
    left, right = torch.cat([distance, distance + 8]), torch.cat([distance + 8, distance])
    far_left = torch.cat([torch.zeros(16), torch.full((16,), 4.0)])
    starts = (-0.7 * left, -0.7 * right, -far_left, torch.zeros(32))
    for head in range(bias_BH.shape[1]):
        bias_BH[:, head] += starts[head % 4]


class TextReader(nn.Module):
    """A T5 encoder and a linear probe that must tell the whole scene from each single token."""

    def __init__(self, vocabulary_size: int, width: int = 192, layers: int = 3) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary_size,
                d_model=width,
                d_kv=48,
                num_heads=width // 48,
                d_ff=2 * width,
                num_layers=layers,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        _look_both_ways(self.encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        self.probe = nn.Linear(width, sum(_WIDTHS))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.probe(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state)

    @staticmethod
    def logits(answers: torch.Tensor) -> list[torch.Tensor]:
        """(..., sum of widths) -> one (..., roles or 1, values) for each head."""
        parts = answers.split(_WIDTHS, dim=-1)
        shaped = [p.unflatten(-1, (len(ROLES), -1)) for p in parts[:-1]]
        return [*shaped, parts[-1].unsqueeze(-2)]


class TextTask:
    """Text alone: predict every slot's attributes from every token."""

    name = "text"

    def __init__(self, tokenizer, *, seed: int, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.device = tokenizer, device
        self.module = TextReader(len(tokenizer)).to(device)
        self.seed = seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.random = random.Random(f"text:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("encoder.encoder.block",))
        # T5's queries start small (its logits are not divided by the root of the width), its embeddings large
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01, others_lr=4.0)

    def _captions(self, rng: random.Random, n: int, which: str) -> list[Caption]:
        pairs = world.colour_shape_pairs(which)
        return [
            describe(world.sample_scene(rng, pairs=pairs, weights=(1, 1, 1, 1, 1, 1.2, 1.5)), rng)
            for _ in range(n)
        ]

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        captions = self._captions(self.random, batch, "all")
        texts = [_with_noise(c.text, self.random) for c in captions]
        ids, mask = tokenize(self.tokenizer, texts, self.device)
        labels = caption_labels(captions).to(self.device)
        rows = mask.bool()
        answers = self.module(ids, mask)[rows]
        labels = labels[:, None].expand(-1, mask.shape[1], -1)[rows]
        total = answers.new_zeros(())
        start = 0
        for logits in TextReader.logits(answers):
            roles = logits.shape[-2]
            truth = labels[:, start : start + roles]
            start += roles
            total = total + F.cross_entropy(logits.flatten(0, -2), truth.flatten()) * roles
        return total, {}

    @torch.no_grad()
    def evaluate(self, folder: Path, which: str = "seen", n: int = 1000) -> dict[str, float]:
        """Share of captions never trained on of which the last token tells every slot (shape, colour and
        role of all things together), and everything (size, material, background too)."""
        captions = self._captions(random.Random(f"held:{which}"), n, which)
        ids, mask = tokenize(self.tokenizer, [c.text for c in captions], self.device)
        answers = self.module(ids, mask)
        last = answers[torch.arange(n, device=ids.device), mask.sum(1) - 1]
        labels = caption_labels(captions).to(self.device)
        guesses = torch.cat([x.argmax(-1) for x in TextReader.logits(last)], dim=-1)
        right = guesses == labels
        return {
            "slots": right[:, : 2 * len(ROLES)].all(1).float().mean().item(),
            "all": right.all(1).float().mean().item(),
        }


def _with_noise(text: str, rng: random.Random) -> str:
    """Now and then a word that means nothing, so that an unknown word does not upset the reading."""
    words = text.split()
    while rng.random() < 0.12:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 8)))
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words) + ("." if rng.random() < 0.1 else "")


# ------------------------------------------------------------------------------------------------ autoencoder


def build_autoencoder():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
        scaling_factor=1.0,
    )


class AutoencoderTask:
    """AutoencoderKL on rendered pictures (N, 3, 128, 128) uint8 with owners (N, 8, 8): crops around
    things first, whole pictures in the last third (the statistics of its group norms differ on crops)."""

    name = "autoencoder"

    def __init__(
        self,
        pictures: torch.Tensor,
        owners: torch.Tensor,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        held: int = 256,
        crop: int = 48,
        whole_from: float = 0.65,
        decoder_of: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.pictures, self.owners, self.held, self.device = pictures, owners, held, device
        self.crop, self.whole_from = crop, whole_from
        self.module = (decoder_of or build_autoencoder()).to(device).to(memory_format=torch.channels_last)
        if decoder_of is not None:  # its latents stay what they are
            self.name = "decoder"
            self.module.encoder.requires_grad_(False)
            self.module.quant_conv.requires_grad_(False)
        self.seed = seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = seeded_generator(f"autoencoder:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("encoder.", "decoder."))
        return MuonAdamW(matrices, others, lr=lr)

    def _batch(self, batch: int, progress: float) -> torch.Tensor:
        """(B, 3, Y, X) uint8, about as many pixels in whole pictures as in crops."""
        rng, crop = self.rng, self.crop
        if progress >= self.whole_from:
            batch = max(1, batch * crop * crop // 128**2)
            return self.pictures[torch.randint(self.held, len(self.pictures), (batch,), generator=rng)]
        crops = []
        for i in torch.randint(self.held, len(self.pictures), (batch,), generator=rng).tolist():
            # a patch in which there is a thing, anywhere in the crop
            patches = (self.owners[i].flatten() >= 0).nonzero().flatten()
            pick = int(patches[torch.randint(len(patches), (), generator=rng)])
            shift = torch.randint(crop, (2,), generator=rng).tolist()
            y, x = (
                min(max(at * 16 + 8 - s, 0), 128 - crop) // 8 * 8
                for at, s in zip(divmod(pick, 8), shift, strict=True)
            )
            crops.append(self.pictures[i, :, y : y + crop, x : x + crop])
        return torch.stack(crops)

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = self._batch(batch, progress)
        if torch.rand((), generator=self.rng) < 0.5:
            x = x.flip(-1)
        x = (x.to(self.device).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.name == "autoencoder"):
            posterior = self.module.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=self.rng).to(
            x.device
        )
        y = self.module.decode(z).sample
        error = y - x
        edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (
            error[..., 1:] - error[..., :-1]
        ).abs().mean()
        square = error.square().mean()
        kl = posterior.kl().mean() / z[0].numel()
        total = error.abs().mean() + 0.5 * edges + 2 * square + 2e-4 * kl
        return total, {"psnr": -10 * torch.log10(square.detach() / 4), "kl": kl.detach()}

    @torch.no_grad()
    def evaluate(self, folder: Path) -> dict[str, float]:
        return {"psnr": reconstruction_psnr(self.module, self.pictures[: self.held], self.device)}


@torch.no_grad()
def reconstruction_psnr(
    autoencoder: nn.Module, pictures: torch.Tensor, device: torch.device | str = "cpu"
) -> float:
    """Mean over pictures (uint8) of the PSNR in dB of decode(mean of encode), rounded to 8 bits as people
    see it."""
    values = []
    for x in pictures.split(16):
        truth = x.to(device).float()
        y = autoencoder.decode(autoencoder.encode(truth / 127.5 - 1).latent_dist.mean).sample
        error = ((y.clamp(-1, 1) + 1) * 127.5).round() - truth
        values.append(-10 * torch.log10(error.square().mean((1, 2, 3)) / 255**2))
    return torch.cat(values).mean().item()


@torch.no_grad()
def normalise_latents(
    autoencoder: nn.Module, pictures: torch.Tensor, device: torch.device | str = "cpu"
) -> None:
    """Fold each latent channel's mean and spread over `pictures` into quant_conv and post_quant_conv, so
    that latents have mean 0 and spread 1 and one scaling factor of 1 fits every pipeline. Decoding is
    unchanged."""
    z = torch.cat(
        [autoencoder.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean for x in pictures.split(32)]
    )
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    quant, post = autoencoder.quant_conv, autoencoder.post_quant_conv
    c = len(mean)
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()  # log variances
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_pictures(
    autoencoder: nn.Module, pictures: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(N, 3, 128, 128) uint8 -> latents (N, 4, 16, 16) float16."""
    autoencoder.to(memory_format=torch.channels_last)
    latents = []
    for part in pictures.split(32):
        x = (part.to(device).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        latents.append(autoencoder.encode(x).latent_dist.mean.half().cpu().contiguous())
    return torch.cat(latents)


# ------------------------------------------------------------------------------------------------ transformer


def transformer_config(layers: int, heads: int, head_dim: int, caption_channels: int) -> dict:
    """PixArt over 16 x 16 latents, patch 2: 64 tokens."""
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "caption_channels": caption_channels,
        "use_additional_conditions": False,
        "interpolation_scale": 1,
    }


@torch.no_grad()
def initialise(transformer: nn.Module) -> None:
    """PixArt's start: Xavier matrices, silent cross-attention and output, small modulation."""
    for name, p in transformer.named_parameters():
        if name.endswith("scale_shift_table") or name.endswith("bias"):
            p.zero_()
        elif name.startswith("adaln_single"):
            p.normal_(std=0.02)
        elif name == "proj_out.weight" or name.endswith("attn2.to_out.0.weight"):
            p.zero_()
        else:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    for name, p in transformer.named_parameters():
        if name.endswith("transformer_blocks.0.scale_shift_table") or ".scale_shift_table" in name:
            p[2].fill_(0.3)  # gates: let the branches speak from the start
            p[5].fill_(0.3)


class Captions:
    """What the frozen text encoder makes of captions of scenes: a fresh one each time, some of them empty."""

    def __init__(
        self,
        text_encoder: nn.Module,
        tokenizer,
        scenes: Sequence[Scene],
        *,
        empty: float,  # share of captions
        device: torch.device | str = "cpu",
    ) -> None:
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)
        self.tokenizer, self.scenes, self.empty, self.device = tokenizer, scenes, empty, device
        self.seed("")

    def seed(self, key: str) -> None:
        self.random = random.Random(key)

    def draw(self, picks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, L, D) and mask (B, L) for scenes `picks`."""
        return self.encode(
            [
                "" if self.random.random() < self.empty else describe(self.scenes[i], self.random).text
                for i in picks
            ]
        )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = tokenize(self.tokenizer, texts, self.device)
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def predict(
    transformer: Callable[..., tuple[torch.Tensor]],
    noisy: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    mask: torch.Tensor,
    **more: torch.Tensor,
) -> torch.Tensor:
    """The velocity (B, 4, Y, X) that a PixArt sees in `noisy`; its other four channels mean nothing."""
    return transformer(
        noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
        **more,
    )[0][:, :4]


class TransformerTask:
    """v-prediction on latents (N, 4, 16, 16) of scenes with fresh captions each time; one caption in ten
    is empty."""

    name = "transformer"

    def __init__(
        self,
        transformer: nn.Module,
        text_encoder: nn.Module,
        tokenizer,
        latents: torch.Tensor,
        owners: torch.Tensor,
        scenes: Sequence[Scene],
        *,
        seed: int,
        probe_block: int,
        device: torch.device | str = "cpu",
        judged: Callable[[nn.Module, Path], dict[str, float]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.captions = Captions(text_encoder, tokenizer, scenes, empty=0.1, device=device)
        self.module = WithProbe(transformer, probe_block).to(device)
        plain_attention(device, transformer)
        self.latents = latents.to(device)
        self.patches = patch_labels(owners, scenes).to(device)
        self.levels = NoiseLevels(device)
        self.judged, self.seed = judged, seed
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.captions.seed(f"transformer:{self.seed}:{key}")
        self.rng = seeded_generator(f"transformer:{self.seed}:{key}")

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        matrices, others = split_parameters(self.module, ("transformer.transformer_blocks",))
        return MuonAdamW(matrices, others, lr=lr, weight_decay=0.01, others_lr=0.5)

    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng = self.rng
        picks = torch.randint(len(self.latents), (batch,), generator=rng)
        states, mask = self.captions.draw(picks.tolist())
        picks = picks.to(self.device)
        x = self.latents[picks].float()
        t = draw_times(batch, rng).to(self.device)
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        out = predict(self.module.transformer, self.levels.add(x, noise, t), t, states, mask)
        error = (out - self.levels.velocity(x, noise, t)).square().mean()
        probe = probe_loss(self.module.probe(self.module.tokens), self.patches[picks])
        return error + 0.15 * (1 - 0.8 * progress) * probe, {"v": error.detach(), "probe": probe.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        return self.judged(self.module.transformer, folder) if self.judged else {}


class Sampler:
    """What the transformer draws while it is trained: a sheet of fixed prompts, and their marks when
    there is a judge. `build` makes a pipeline of the transformer and the run's other parts."""

    def __init__(
        self,
        work: Path,
        count: int = 64,
        *,
        build: Callable[[nn.Module, Path], Any] | None = None,
        steps: int = 20,
        guidance: float = 4.5,
    ) -> None:
        from weights import store

        self.work, self.count, self.build = work, count, build or assemble
        self.options = {"steps": steps, "guidance": guidance}
        self.judge_folder = store.find("judge-toy")

    def __call__(self, transformer: nn.Module, folder: Path) -> dict[str, float]:
        from gen import evaluate
        from gen.toy.judge import load_judge

        pipeline = self.build(transformer, self.work)
        asked = evaluate.prompts(self.count)
        texts = [p.text for p in asked]
        pictures = evaluate.draw(pipeline, texts, range(self.count), batch=32, **self.options)
        evaluate.save_grid(pictures[:32], folder / "samples.png", columns=8)
        if self.judge_folder is None:
            return {}
        return evaluate.score_pictures(load_judge(self.judge_folder), pictures, asked)


def assemble(transformer: nn.Module, work: Path):
    """The pipeline of a run's parts."""
    from transformers import T5EncoderModel, T5Tokenizer

    from pipelines.pixart_sigma import PixArtSigmaPipeline

    device = next(transformer.parameters()).device
    return PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(work / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder", torch_dtype=torch.float32)
        .to(device)
        .eval(),
        vae=load_autoencoder(work / "vae").to(device),
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def build_scheduler():
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**BETAS, num_train_timesteps=1000, prediction_type="v_prediction")


def load_autoencoder(folder: Path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


TEXT_PROBE = "text_probe.safetensors"  # beside the pipeline's parts: it measures the text encoder


def save_text(reader: TextReader, tokenizer, work: Path) -> None:
    tokenizer.save_pretrained(work / "tokenizer")
    reader.encoder.save_pretrained(work / "text_encoder")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in reader.probe.state_dict().items()}, work / TEXT_PROBE
    )


def text_slots(folder: Path, device: torch.device | str = "cpu") -> float:
    """Share of unseen captions of which the text encoder in `folder` tells every slot, read by its own
    probe."""
    from transformers import T5EncoderModel, T5Tokenizer

    task = TextTask(T5Tokenizer.from_pretrained(folder / "tokenizer"), seed=0, device=device)
    task.module.encoder = (
        T5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).to(device).eval()
    )
    task.module.probe.load_state_dict({k: v.float() for k, v in load_file(folder / TEXT_PROBE).items()})
    return task.evaluate(folder)["slots"]


def export(transformer: nn.Module, work: Path, output: Path, facts: dict) -> None:
    """The run's parts as one diffusers folder in fp16, with its record (toy.json) and checksums."""
    building = start_folder(output)
    pipeline = assemble(transformer, work)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(building)
    probe = {k: v.half() for k, v in load_file(work / TEXT_PROBE).items()}
    save_file(probe, building / TEXT_PROBE)
    finish_folder(building, output, facts)


def start_folder(output: Path) -> Path:
    """Where to build what becomes `output` when it is whole."""
    building = output.with_name(f".{output.name}.building")
    if building.exists():
        shutil.rmtree(building)
    return building


def finish_folder(building: Path, output: Path, facts: dict) -> None:
    """Add the record (toy.json) and checksums to a saved pipeline, and put it in its place."""
    from weights import store

    # diffusers notes where it read a part: a path of this machine
    if (building / "vae").is_dir():
        _change_json(building / "vae" / "config.json", _name_or_path=None)
    # Where no dtype is asked for, transformers takes the stored one and diffusers float32; they must agree
    if (building / "text_encoder").is_dir():
        _change_json(building / "text_encoder" / "config.json", dtype="float32")
    (building / "toy.json").write_text(json.dumps(facts, indent=1) + "\n")
    store.write_sums(building)
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    building.rename(output)


def _change_json(path: Path, **changes: str | None) -> None:
    """Set entries of a JSON file; None takes one out."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}, indent=2) + "\n")
