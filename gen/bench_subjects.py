"""What `gen bench` draws: networks of random numbers and the embedded pipeline, and how a picture begins on
either side.

diffusers' step is written out as its pipelines have it: captions padded to 300 tokens with a mask, latents
repeated for both halves, the timestep expanded, guidance, the learned variance dropped. Ours is the
pipeline's own prepared function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen import catalog, flops
from gen.bench import Case, Options, Side, Step
from gen.errors import GenError

STEPS = 20
PADDED = 300  # tokens, by diffusers
CLASS = 207
GUIDANCE = 4.5
PROMPT = "a red cube"


class Networks:
    """A network of random numbers, held once per type and shared by the sides of that type."""

    def __init__(self, case: Case, options: Options, device: str) -> None:
        self.case, self.device = case, device
        more = {} if options.layers is None else {"num_layers": options.layers}
        self.config = {**case.config, **more}
        self.size = options.size or case.size
        self.side = self.size // 8  # latent rows and columns
        self.batch = options.batch or 1  # pictures
        self.rows = 2 if case.guided else 1  # of the network's batch, for each picture
        self._states: dict[str, dict[str, Tensor]] = {}

    def network(self) -> Any:
        """Ours, without numbers. Subclasses name the class."""
        raise NotImplementedError

    def parameters(self) -> int:
        return sum(one.numel() for one in self.network().parameters())

    def state(self, dtype: str) -> dict[str, Tensor]:
        """Random weights that keep the size of what passes through them; the same in every type."""
        if dtype not in self._states and dtype == "float32":
            draw = torch.Generator().manual_seed(0)
            self._states[dtype] = {
                key: torch.empty(one.shape).normal_(std=_deviation(one), generator=draw).to(self.device)
                for key, one in self.network().state_dict().items()
            }
        elif dtype not in self._states:
            kind = getattr(torch, dtype)
            self._states[dtype] = {key: one.to(kind) for key, one in self.state("float32").items()}
        return self._states[dtype]

    def forget(self) -> None:
        """Let go of the weights; sides keep those they hold."""
        self._states.clear()

    def ours(self, dtype: str) -> Any:
        network = self.network()
        network.load_state_dict(self.state(dtype), strict=True, assign=True)
        return self.pipeline(network.eval().requires_grad_(False), _small_vae(self.config["in_channels"]))

    def pipeline(self, network: Any, vae: Any) -> Any:
        raise NotImplementedError

    def their_network(self, name: str, dtype: str, state: Mapping[str, Tensor]) -> Any:
        import accelerate
        import diffusers

        with accelerate.init_empty_weights(include_buffers=False):
            network = getattr(diffusers, name)(**self.config)
        network.load_state_dict(state, strict=True, assign=True)
        # Their own `to` warns of modules to keep in float32, of which there are none
        return nn.Module.to(network, self.device, getattr(torch, dtype)).eval().requires_grad_(False)

    def latents(self) -> Tensor:
        shape = (self.batch, self.config["in_channels"], self.side, self.side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def timesteps(self) -> Tensor:
        from pipelines.dpm_solver import DPMSolver

        walk = DPMSolver()
        walk.set_timesteps(STEPS, device=self.device)
        return walk.timesteps

    def networks(self, model: Any) -> list[nn.Module]:
        return [getattr(model, "transformer", model)]

    def facts(self, tokens: int | None) -> dict[str, Any]:
        facts = {"layers": self.config["num_layers"], "size": self.size, "tokens": tokens}
        return facts | ({"batch": self.batch} if self.batch > 1 else {})


class PixArt(Networks):
    """Captions of random numbers; the negative prompt is one token, as the empty prompt is."""

    def network(self) -> Any:
        from pipelines.models.pixart import PixArtConfig, PixArtTransformer2DModel

        return PixArtTransformer2DModel.empty(PixArtConfig(**self.config))

    def pipeline(self, network: Any, vae: Any) -> Any:
        from pipelines.dpm_solver import DPMSolver
        from pipelines.pixart_sigma import PixArtSigmaPipeline

        return PixArtSigmaPipeline(None, None, vae, network, DPMSolver())

    def theirs(self, dtype: str) -> Any:
        return self.their_network("PixArtTransformer2DModel", dtype, self.state(dtype))

    def captions(self, tokens: int, length: int) -> tuple[Tensor, Tensor]:
        """(rows, length, D) with something behind the real tokens, which nobody must look at, and the mask;
        the unconditional half first."""
        draw = torch.Generator().manual_seed(2)
        both = torch.randn(2, PADDED, self.config["caption_channels"], generator=draw)[-self.rows :, :length]
        real = torch.arange(length) < torch.tensor([[1], [tokens]])[-self.rows :]
        each = (one.repeat_interleave(self.batch, 0).to(self.device) for one in (both, real))
        captions, mask = each
        return captions, mask

    def begin(self, side: Side, model: Any, tokens: int | None) -> Step:
        assert tokens is not None
        latents, timesteps = self.latents(), self.timesteps()
        kind = getattr(torch, side.dtype)
        if side.whose == "ours":
            captions, mask = self.captions(tokens, tokens)
            guidance = GUIDANCE if self.rows == 2 else 1.0
            predict = model._prepare(captions.to(kind), mask, timesteps, (self.size, self.size), guidance)
            return lambda index: predict(latents, index % STEPS, timesteps[index % STEPS])
        captions, mask = self.captions(tokens, PADDED)
        captions, whole = captions.to(kind), mask.to(torch.int64)
        given, channels, rows = latents.to(kind), latents.shape[1], len(captions)
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.config["use_additional_conditions"]:
            told["resolution"] = torch.full((rows, 2), float(self.size), device=self.device, dtype=kind)
            told["aspect_ratio"] = torch.ones(rows, 1, device=self.device, dtype=kind)

        def step(index: int) -> Tensor:
            predicted = model(
                torch.cat([given] * self.rows),
                encoder_hidden_states=captions,
                encoder_attention_mask=whole,
                timestep=timesteps[index % STEPS][None].expand(rows),
                added_cond_kwargs=told,
                return_dict=False,
            )[0]
            if self.rows == 1:
                return predicted.chunk(2, dim=1)[0] if predicted.shape[1] // 2 == channels else predicted
            without, with_text = predicted.chunk(2)
            guided = without + GUIDANCE * (with_text - without)
            return guided.chunk(2, dim=1)[0] if guided.shape[1] // 2 == channels else guided

        return step

    def flops(self, tokens: int | None) -> dict[str, int]:
        assert tokens is not None
        return {
            "plain": self.batch * self.rows * flops.pixart(self.config, self.side, PADDED),
            "lean": self.batch * flops.pixart_pair(self.config, self.side, (1, tokens)[-self.rows :]),
        }


class DiT(Networks):
    """One class and no class."""

    def network(self) -> Any:
        from pipelines.models.dit import DiTConfig, DiTTransformer2DModel

        return DiTTransformer2DModel.empty(DiTConfig(**self.config))

    def pipeline(self, network: Any, vae: Any) -> Any:
        from pipelines.dit import DiTPipeline
        from pipelines.dpm_solver import DPMSolver

        return DiTPipeline(vae, network, DPMSolver())

    def theirs(self, dtype: str) -> Any:
        """Its embedders stand in every block, here as the same tensors. Its two slips, which ours does not
        have, are mended; that costs nothing."""
        state = {}
        for key, tensor in self.state(dtype).items():
            if key.startswith(("timestep_embedder.", "class_embedder.")):
                for block in range(self.config["num_layers"]):
                    state[f"transformer_blocks.{block}.norm1.emb.{key}"] = tensor
            else:
                state[key] = tensor
        network = self.their_network("DiTTransformer2DModel", dtype, state)
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        return network

    def begin(self, side: Side, model: Any, tokens: int | None) -> Step:
        latents, timesteps = self.latents(), self.timesteps()
        channels = latents.shape[1]
        label = min(CLASS, self.config["num_embeds_ada_norm"] - 1)
        if side.whose == "ours":
            predict = model.predictor([label] * self.batch, timesteps, GUIDANCE)
            return lambda index: predict(latents, index % STEPS, timesteps[index % STEPS])[:, :channels]
        given = latents.to(getattr(torch, side.dtype))
        none = self.config["num_embeds_ada_norm"]
        labels = torch.tensor([label, none], device=self.device).repeat_interleave(self.batch)

        def step(index: int) -> Tensor:
            predicted = model(
                torch.cat([given] * 2),
                timestep=timesteps[index % STEPS][None].expand(len(labels)),
                class_labels=labels,
            ).sample
            noise, rest = predicted[:, :channels], predicted[:, channels:]
            of_class, of_none = noise.chunk(2)
            guided = of_none + GUIDANCE * (of_class - of_none)
            whole = torch.cat([torch.cat([guided, guided]), rest], dim=1)
            return whole.chunk(2)[0][:, :channels]

        return step

    def flops(self, tokens: int | None) -> dict[str, int]:
        return {
            "plain": self.batch * 2 * flops.dit(self.config, self.side),
            "lean": self.batch * flops.dit_pair(self.config, self.side),
        }


class Toy:
    """The embedded pipeline, words to picture, each side with its own classes for every part."""

    def __init__(self, case: Case, options: Options, device: str) -> None:
        self.case, self.device = case, device
        self.size = options.size or case.size
        _, facts, self.folder = catalog.choose(catalog.MODELS["pixart-sigma"], "toy")
        if not facts.smallest <= self.size <= facts.largest:
            raise GenError(
                f"{case.name} cannot be drawn at {self.size} pixels.",
                f"Give --size from {facts.smallest} to {facts.largest}.",
                "bad_input",
            )

    def parameters(self) -> int:
        from weights import store

        return store.parameters(self.folder)

    def forget(self) -> None:
        """There is nothing beside the sides."""

    def ours(self, dtype: str) -> Any:
        from pipelines.pixart_sigma import PixArtSigmaPipeline

        return PixArtSigmaPipeline.from_pretrained(
            self.folder, torch_dtype=getattr(torch, dtype), device=self.device
        )

    def theirs(self, dtype: str) -> Any:
        from diffusers import PixArtSigmaPipeline
        from diffusers.utils import logging as their_logging
        from transformers.utils import logging as more_logging

        their_logging.disable_progress_bar()  # a bar for every part that is loaded
        more_logging.disable_progress_bar()
        pipeline = PixArtSigmaPipeline.from_pretrained(self.folder, torch_dtype=getattr(torch, dtype))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def begin(self, side: Side, model: Any, tokens: int | None) -> Step:
        config = model.transformer.config
        rows = self.size // 8
        noise = torch.randn(1, config.in_channels, rows, rows, generator=torch.Generator().manual_seed(1))
        latents = noise.to(self.device, getattr(torch, side.dtype))
        if side.whose == "ours":
            latents = latents.float()  # ours keeps them in float32

        def draw(index: int) -> Tensor:
            images = model(
                PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=self.size,
                width=self.size,
                latents=latents.clone(),
                use_resolution_binning=False,
                clean_caption=False,
                output_type="np",
            ).images
            return torch.from_numpy(images)

        return draw

    def networks(self, model: Any) -> list[nn.Module]:
        return [model.text_encoder, model.vae, model.transformer]

    def flops(self, tokens: int | None) -> None:
        """Text encoder and autoencoder are not counted, so nothing is claimed."""

    def facts(self, tokens: int | None) -> dict[str, Any]:
        return {"size": self.size}


SUBJECTS: dict[str, Any] = {"pixart": PixArt, "dit": DiT, "toy": Toy}


def _deviation(weight: Tensor) -> float:
    """Of random weights: sums keep the size of what is summed; biases are small."""
    return weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02


def _small_vae(channels: int) -> Any:
    """A pipeline wants an autoencoder; a step does not touch it. Like the published ones it halves thrice."""
    from pipelines.models.autoencoder import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
    ).eval()
