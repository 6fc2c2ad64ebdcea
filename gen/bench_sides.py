"""Both sides of `gen bench`, on the same numbers: the networks, their inputs, and a step as each pipeline
does it.

diffusers' step is written out as its pipelines have it: captions padded to 300 tokens with a mask, latents
repeated for both halves, the timestep expanded, guidance, the learned variance dropped. Ours is the
pipeline's own prepared function.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gen import bench, catalog, doctor, flops, gemm, loader
from gen.bench import BASELINES, SIDES, Case, Line, Options, Side, Step
from gen.doctor import gib
from gen.errors import GenError
from gen.request import Settings

STEPS = 20
JUDGED = (0, 7, 13)  # steps whose predictions are compared: the largest of few rounding errors is luck
PADDED = 300  # tokens, by diffusers
CLASS = 207
GUIDANCE = 4.5
PROMPT = "a red cube"
EXACT_32 = 1e-5  # relative, float32: rounding of different orders of the same sums
EXACT_16 = 1.05  # times the error of diffusers in bfloat16, in the mean square
HEAD = 72  # of all DiT and PixArt XL
FULL_SCORES = 2**31  # bytes of scores that `math` attention may hold


@dataclass(kw_only=True)
class Made:
    """One side, ready: a network or pipeline, and how it begins a picture."""

    side: Side
    model: Any
    networks: list[nn.Module]
    done: tuple[str, ...]
    precision: str  # of float32 products through oneDNN, as the treatment left it

    def call(self, step: Step) -> Step:
        """The step under the switches of this side, so that sides do not disturb each other."""

        def guarded(index: int) -> Any:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode() if self.side.whose == "ours" else torch.no_grad())
                stack.enter_context(gemm.float32_products(self.precision))
                return step(index)

        return guarded


class Unsuited(Exception):
    """A side that cannot be had of this network; the message says why."""


# --- treatments --------------------------------------------------------------------------------------


def _as_loaded(theirs: Any) -> list[str]:
    return []


def _plain(pipeline: Any) -> list[str]:
    """Every operation at every step, as published."""
    pipeline.set_attention("sdpa")
    pipeline.prepare("plain")
    return ["plain"]


def _compiled(theirs: Any) -> list[str]:
    """Each block by itself, since diffusers' `compile_repeated_blocks` refuses these families."""
    blocks = getattr(theirs, "transformer", theirs).transformer_blocks
    for block in blocks:
        block.compile()
    return [f"{len(blocks)} compiled blocks"]


def _lean(pipeline: Any) -> list[str]:
    """As the loader readies a pipeline for drawing."""
    pipeline.set_attention("auto")
    pipeline.prepare("lean")
    return ["lean"]


def _int8(pipeline: Any) -> list[str]:
    """As the loader does it: projections joined first, and what is not quantised packed."""
    pipeline.set_attention("auto")
    pipeline.prepare("lean", int8=True)
    return ["int8"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to a side once it has its weights."""

    apply: Callable[[Any], list[str]]
    module: str = ""  # that it needs
    fewer: bool = False  # whether it leaves out what need not be computed
    copies: bool = False  # whether it holds weights of its own afterwards
    bytes: float | None = None  # per weight of such a copy; None: those of its type


TREATMENTS = {
    "as loaded": Treatment(apply=_as_loaded),
    "compiled": Treatment(apply=_compiled),
    "plain": Treatment(apply=_plain),
    "lean": Treatment(apply=_lean, fewer=True, copies=True),
    "int8": Treatment(apply=_int8, module="pipelines.int8", fewer=True, copies=True, bytes=1),
}


def missing(side: Side, device: str) -> str | None:
    """Why this side cannot run here, or None."""
    needed = TREATMENTS[side.treatment].module
    if needed and importlib.util.find_spec(needed) is None:
        return f"this version has no {needed}"
    if side.treatment == "compiled" and device == "cpu":
        return doctor.compiler_missing()
    return None


# --- subjects ----------------------------------------------------------------------------------------


class Networks:
    """A network of random numbers, held once per type and shared by the sides of that type."""

    def __init__(self, case: Case, options: Options, device: str) -> None:
        self.case, self.device = case, device
        more = {} if options.layers is None else {"num_layers": options.layers}
        self.config = {**case.config, **more}
        self.size = options.size or case.size
        self.side = self.size // 8  # latent rows and columns
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
        shape = (1, self.config["in_channels"], self.side, self.side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def timesteps(self) -> Tensor:
        from pipelines.dpm_solver import DPMSolver

        walk = DPMSolver()
        walk.set_timesteps(STEPS, device=self.device)
        return walk.timesteps

    def networks(self, model: Any) -> list[nn.Module]:
        return [getattr(model, "transformer", model)]

    def facts(self, tokens: int | None) -> dict[str, Any]:
        return {"layers": self.config["num_layers"], "size": self.size, "tokens": tokens}


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
        """(2, length, D) with something behind the real tokens, which nobody must look at, and the mask."""
        draw = torch.Generator().manual_seed(2)
        both = torch.randn(2, PADDED, self.config["caption_channels"], generator=draw)[:, :length]
        real = torch.arange(length) < torch.tensor([[1], [tokens]])
        return both.to(self.device), real.to(self.device)

    def begin(self, made: Made, tokens: int | None) -> Step:
        assert tokens is not None
        latents, timesteps, model = self.latents(), self.timesteps(), made.model
        kind = getattr(torch, made.side.dtype)
        if made.side.whose == "ours":
            captions, mask = self.captions(tokens, tokens)
            predict = model._prepare(captions.to(kind), mask, timesteps, (self.size, self.size), GUIDANCE)
            return lambda index: predict(latents, index % STEPS, timesteps[index % STEPS])
        captions, mask = self.captions(tokens, PADDED)
        captions, whole = captions.to(kind), mask.to(torch.int64)
        given, channels = latents.to(kind), latents.shape[1]

        def step(index: int) -> Tensor:
            predicted = model(
                torch.cat([given] * 2),
                encoder_hidden_states=captions,
                encoder_attention_mask=whole,
                timestep=timesteps[index % STEPS][None].expand(2),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            without, with_text = predicted.chunk(2)
            guided = without + GUIDANCE * (with_text - without)
            return guided.chunk(2, dim=1)[0] if guided.shape[1] // 2 == channels else guided

        return step

    def flops(self, tokens: int | None) -> dict[str, int]:
        assert tokens is not None
        return {
            "plain": 2 * flops.pixart(self.config, self.side, PADDED),
            "lean": flops.pixart_pair(self.config, self.side, (1, tokens)),
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

    def begin(self, made: Made, tokens: int | None) -> Step:
        latents, timesteps, model = self.latents(), self.timesteps(), made.model
        channels = latents.shape[1]
        label = min(CLASS, self.config["num_embeds_ada_norm"] - 1)
        if made.side.whose == "ours":
            predict = model.predictor([label], timesteps, GUIDANCE)
            return lambda index: predict(latents, index % STEPS, timesteps[index % STEPS])[:, :channels]
        given = latents.to(getattr(torch, made.side.dtype))
        labels = torch.tensor([label, self.config["num_embeds_ada_norm"]], device=self.device)

        def step(index: int) -> Tensor:
            predicted = model(
                torch.cat([given] * 2),
                timestep=timesteps[index % STEPS][None].expand(2),
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
            "plain": 2 * flops.dit(self.config, self.side),
            "lean": flops.dit_pair(self.config, self.side),
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

    def begin(self, made: Made, tokens: int | None) -> Step:
        config, model = made.model.transformer.config, made.model
        side = self.size // 8
        noise = torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(1))
        latents = noise.to(self.device, getattr(torch, made.side.dtype))
        if made.side.whose == "ours":
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


# --- measuring ---------------------------------------------------------------------------------------


def measure(cases: Sequence[Case], options: Options, report: bench.Report) -> dict[str, Any]:
    """All cases that run in this process, and what they are held against."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, _ = loader.choose_device(Settings(device=options.device))
    # Before and after: a peak that another program disturbed would flatter every percentage
    before = _products(options, device, report)
    results = {case.name: list(_case(case, options, device, report)) for case in cases}
    products = _best(before, _products(options, device, report))
    for case in cases:
        for found in results[case.name]:
            _hold_against(products, found["lines"])
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "products": [rate.to_json() for rate in products],
        "cases": results,
        "attention": list(_attention(cases, options, device, report)) if options.attention else [],
    }


def _case(case: Case, options: Options, device: str, report: bench.Report) -> Iterator[dict[str, Any]]:
    subject = SUBJECTS[case.subject](case, options, device)
    sides = bench.chosen(options)
    why = {side.name: missing(side, device) for side in sides}
    runnable = [side for side in sides if why[side.name] is None]
    _check_memory(subject, runnable, device)
    lengths: Sequence[int | None] = (options.tokens or bench.TOKENS) if "tokens" in case.takes else (None,)
    report(f"{case.name}: making weights")
    all_made = []
    for side in runnable:
        try:
            all_made.append(make(side, subject))
        except Unsuited as unsuited:
            why[side.name] = str(unsuited)
    expected = _references(subject, all_made, lengths)
    subject.forget()
    first: set[str] = set()
    for tokens in lengths:
        report(f"{case.name}" + (f", {tokens} tokens" if tokens else ""))
        lines = {
            side.name: Line(side=side.name, summary=side.summary, missing=why[side.name]) for side in sides
        }
        steps = {}
        for made in all_made:
            report(f"  {made.side.name}")
            steps[made.side.name] = _begin(
                made, subject, tokens, lines[made.side.name], expected[tokens], first
            )
        report(f"  {options.rounds} rounds")
        taken = bench.in_turns(steps, options.rounds, lambda: gemm.synchronise(device))
        counted = subject.flops(tokens)
        for name, seconds in taken.items():
            lines[name].seconds = seconds
            if counted:
                _fill_in_rates(lines[name], SIDES[name], counted)
        bench.compare([*lines.values()])
        _name_equal_time(lines)
        yield bench.entry(
            case,
            [*lines.values()],
            {
                **subject.facts(tokens),
                "flops": counted,
                "baselines": [name for name in BASELINES if lines.get(name) and lines[name].seconds],
            },
        )


def make(side: Side, subject: Any) -> Made:
    """The side with its weights, treated. Raises Unsuited."""
    with gemm.float32_products(gemm.float32_precision()):  # what a treatment sets is its own
        model = subject.ours(side.dtype) if side.whose == "ours" else subject.theirs(side.dtype)
        try:
            done = TREATMENTS[side.treatment].apply(model)
        except ValueError as error:  # a network that has nothing to pack, quantise or attend with
            raise Unsuited(str(error)) from error
        precision = gemm.float32_precision()
    networks = subject.networks(model)
    return Made(side=side, model=model, networks=networks, done=tuple(done), precision=precision)


def _references(
    subject: Any, all_made: Sequence[Made], lengths: Sequence[int | None]
) -> dict[int | None, dict[str, Tensor]]:
    """Answers of diffusers for every length, by type: in float32, and where bfloat16 is to be judged in that
    too. A side that is not measured is made for it, and dropped."""
    answers: dict[int | None, dict[str, Tensor]] = {tokens: {} for tokens in lengths}
    there = {made.side.name: made for made in all_made}
    judged = any(made.side.dtype == "bfloat16" for made in all_made)
    for name in BASELINES if judged else BASELINES[:1]:
        made = there.get(name) or make(SIDES[name], subject)
        for tokens in lengths:
            step = made.call(subject.begin(made, tokens))
            answers[tokens][SIDES[name].dtype] = _answers(step, subject.case)
    return answers


def _begin(
    made: Made, subject: Any, tokens: int | None, line: Line, expected: Mapping[str, Tensor], first: set[str]
) -> Step:
    """Begin a picture and do its first step: what it answers, what it takes, what it holds."""
    device = subject.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

    def begin_and_step() -> tuple[Step, float]:
        gemm.synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode(made.side.whose == "ours"):
            step = made.call(subject.begin(made, tokens))
        step(0)
        gemm.synchronise(device)
        return step, time.perf_counter() - start

    step, seconds = begin_and_step()
    if made.side.name not in first:
        line.first_call = seconds
        first.add(made.side.name)
        step, seconds = begin_and_step()
    line.first_step = seconds
    line.quality = judge(made.side, _answers(step, subject.case), expected, subject.case.pictures)
    line.weights_bytes = sum(_bytes(network) for network in made.networks)
    line.done = (*made.done, *_attention_chosen(made))
    if device == "cuda":
        line.peak_bytes = torch.cuda.max_memory_allocated() - held
    return step


def _answers(step: Step, case: Case) -> Tensor:
    """What is compared: a picture, or the predictions of several steps."""
    return torch.cat([step(index).float().cpu() for index in (JUDGED[:1] if case.pictures else JUDGED)])


def judge(side: Side, found: Tensor, expected: Mapping[str, Tensor], pictures: bool) -> dict[str, Any]:
    """How far an answer is from diffusers' in float32: its class, the number, and both in words."""
    exact = expected["float32"]
    if torch.equal(found, exact):
        words = "the reference" if side.name == "diffusers-fp32" else "bit-equal"
        return {"class": "A", "error": 0.0, "words": words}
    if not torch.isfinite(found).all():
        raise GenError(
            f"{side.name} answers numbers that are not finite.",
            "Measure the other sides with --sides, and report this as a bug.",
            "failed",
        )
    if pictures:
        return bench.picture_quality(found, exact) | {"class": "C" if side.promise == "C" else "-"}
    error = _relative(found, exact)
    psnr = 20 * math.log10(float(exact.max() - exact.min()) / _distance(found, exact))
    quality: dict[str, Any] = {"class": side.promise, "error": error, "psnr": psnr}
    if side.promise == "C":
        return quality | {"words": f"{psnr:.1f} dB of the prediction, error {error:.1e}"}
    if side.dtype == "float32":
        kept, words = error <= EXACT_32, f"error {error:.1e}"
    else:
        ratio = error / _relative(expected["bfloat16"], exact)
        # By the mean square: the largest of some thousand rounding errors is luck, a tenth off either way
        mean = _distance(found, exact) / _distance(expected["bfloat16"], exact)
        quality |= {"of_diffusers_error": ratio, "of_diffusers_mean_error": mean}
        words = (
            f"error {error:.1e}; of diffusers' in bfloat16 {mean:.2f} in the mean square, {ratio:.2f} at most"
        )
        kept = mean <= EXACT_16
    quality["class"] = "B" if kept else "none"
    return quality | {"words": words if kept else f"{words}: more than class B allows"}


def _attention_chosen(made: Made) -> list[str]:
    """What `auto` took for this side, which shows only once it has computed."""
    if made.side.whose != "ours":
        return []
    from pipelines.attention import chosen

    sizes: dict[str, list[str]] = {}
    for size, name in chosen(made.model.transformer).items():
        sizes.setdefault(name, []).append(size)
    return [f"attention {name} ({', '.join(found)})" for name, found in sizes.items()]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def _distance(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square."""
    return float((found - exact).square().mean().sqrt())


def _bytes(network: nn.Module) -> int:
    """Of all tensors that the network holds: parameters, buffers, and packed weights, which are neither."""
    held: dict[int, int] = {}
    for module in network.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own += [value for value in vars(module).values() if isinstance(value, Tensor)]
        held |= {id(one): one.numel() * one.itemsize for one in own}
    return sum(held.values())


def _fill_in_rates(line: Line, side: Side, counted: Mapping[str, int]) -> None:
    seconds = bench.spread(line.seconds)["median"]
    computed = counted["lean" if TREATMENTS[side.treatment].fewer else "plain"]
    line.plain_tflops, line.tflops = counted["plain"] / seconds / 1e12, computed / seconds / 1e12


def _products(options: Options, device: str, report: bench.Report) -> list[gemm.Rate]:
    """Every way to multiply in the types of the sides."""
    found = []
    for dtype in dict.fromkeys(side.products or side.dtype for side in bench.chosen(options)):
        report(f"matrix products in {dtype}")
        found += gemm.rates(dtype, device, seconds=0.2)
    return found


def _best(*measured: Sequence[gemm.Rate]) -> list[gemm.Rate]:
    """The best of several measurements of each way, the fastest way of a type first."""
    best: dict[tuple[str, str], gemm.Rate] = {}
    for rate in (rate for rates in measured for rate in rates):
        key = (rate.dtype, rate.way)
        best[key] = max(best.get(key, rate), rate, key=lambda one: one.flops)
    order = [*dict.fromkeys(dtype for dtype, _ in best)]
    return sorted(best.values(), key=lambda rate: (order.index(rate.dtype), -rate.flops))


def _hold_against(products: Sequence[gemm.Rate], lines: Sequence[dict[str, Any]]) -> None:
    """Fill in which share of the fastest matrix product a line reaches."""
    for line in lines:
        side = SIDES[line["side"]]
        rates = [rate.flops for rate in products if rate.dtype == (side.products or side.dtype)]
        if line["tflops"] and rates:
            line["peak_percent"] = 100 * 1e12 * line["tflops"] / max(rates)


def _name_equal_time(lines: Mapping[str, Line]) -> None:
    """Drift is told beside what the exact side could do in the same time: fewer steps."""
    exact = lines.get("ours-bf16")
    for line in lines.values():
        if SIDES[line.side].promise == "C" and line.seconds and exact and exact.seconds:
            steps = STEPS * bench.spread(line.seconds)["median"] / bench.spread(exact.seconds)["median"]
            line.quality["words"] += f"; {STEPS} steps take as long as {steps:.1f} of {exact.side}"


def _check_memory(subject: Any, sides: Sequence[Side], device: str) -> None:
    """Refuse before an hour is spent swapping. Raises out_of_memory."""
    count = subject.parameters()
    sizes = {"float32": 4, "bfloat16": 2}
    needed = 4.0 * count  # the numbers themselves and the reference
    needed += 2.0 * count if any(side.dtype == "bfloat16" for side in sides) else 0.0
    for side in sides:
        treatment = TREATMENTS[side.treatment]
        if treatment.copies:
            needed += count * (sizes[side.dtype] if treatment.bytes is None else treatment.bytes)
    available = doctor.available_memory(device)
    if needed > available:
        raise GenError(
            f"{subject.case.name} needs {gib(int(needed))} for the weights of "
            f"{', '.join(side.name for side in sides)}, and {gib(available)} are free.",
            "Take fewer with --sides, or fewer blocks with --layers.",
            "out_of_memory",
        )


def _attention(
    cases: Sequence[Case], options: Options, device: str, report: bench.Report
) -> Iterator[dict[str, Any]]:
    """Every attention function at the head size of the large networks, for the tokens of these cases."""
    from pipelines.attention import survey

    sizes = {options.size or case.size for case in cases if case.subject in ("pixart", "dit")}
    types = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    for tokens in sorted((size // 16) ** 2 for size in sizes):
        for dtype in types:
            report(f"attention over {tokens} tokens in {dtype}")
            for row in survey(device):
                yield _attention_row(row.name, row.missing, tokens, dtype, device)


def _attention_row(name: str, missing: str | None, tokens: int, dtype: str, device: str) -> dict[str, Any]:
    from pipelines.attention import ATTENTION

    shape = (2, 16, tokens, HEAD)
    kind = getattr(torch, dtype)
    why = missing or ATTENTION[name].refuses(device, kind, HEAD)
    scores = math.prod(shape[:3]) * tokens * kind.itemsize
    if why is None and name == "math" and scores > FULL_SCORES:
        why = f"its scores would take {gib(scores)}"
    about = {"name": name, "tokens": tokens, "dtype": dtype, "missing": why}
    if why:
        return about | {"seconds": None, "error": None}
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw).to(device, kind) for _ in range(3))
    attend = ATTENTION[name].attend
    with torch.inference_mode():
        found = attend(q, k, v, None)[:1, :1].float()
        first = [one[:1, :1].float() for one in (q, k, v)]
        exact = functional.scaled_dot_product_attention(first[0], first[1], first[2])
        seconds = []
        for _ in range(5):
            gemm.synchronise(device)
            start = time.perf_counter()
            attend(q, k, v, None)
            gemm.synchronise(device)
            seconds.append(time.perf_counter() - start)
    error = float((found - exact).abs().max() / exact.abs().max())
    return about | {"seconds": min(seconds), "error": error}
