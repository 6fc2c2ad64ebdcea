"""`gen train-lora`: a low-rank adapter that teaches a text-to-image model one new thing or style.

What the autoencoder and the text encoder make of pictures and captions is computed once and kept; only the
small adapter learns (`pipelines.lora_training`), in the loop of `gen.train`, which can be stopped and started
at any moment. So that the rest is not forgotten, a share of every batch is about other prompts: latents that
the model drew itself, at any noise, for which the adapted network must answer what the plain one answers.
This is prior preservation (Ruiz et al. 2022, arXiv:2208.12242) with the plain network's answer in the place
of the noise: what was drawn with guidance would teach the guidance as well, an answer does not. And since an
answer can be had for any latents and any words, they need not belong together: many more prompts are said
than drawn.

A run lives in `.train/lora-NAME` (or under GEN_TRAIN_DIR), NAME being that of the output: `cache` with what
was encoded and drawn, `run.json` with what it is about, the checkpoint `lora.safetensors`, and the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gen import captioned, catalog, library, loader
from gen.errors import GenError
from gen.optim import MuonAdamW, bfloat16_units
from gen.request import Settings
from gen.texts import read_text
from gen.train import Schedule, fit
from pipelines import lora_training
from pipelines.attention import set_attention
from pipelines.bins import BINS, nearest_bin
from pipelines.lora import CONFIG, WEIGHTS, save_lora
from pipelines.models.pixart import PixArtTransformer2DModel
from pipelines.pixart_sigma import PixArtSigmaPipeline
from pipelines.scheduler_base import NoiseConfig, noise_schedule, settings
from weights import registry, store

TRAINABLE = ("pixart-sigma",)
FEW = 2  # pictures; with fewer there is a warning
# Of the rows that keep the rest: with the empty caption, which guidance leans on, and with any other
EMPTY, OTHER = 0.1, 0.4
HOLD = 4.0  # weight of drift: a fraction of the error that is learnt away, and guidance multiplies it
KEPT_STEPS = 20  # in which pictures to keep are drawn
MOST_KEPT, MOST_SAID = 200, 1000  # prompts that are drawn, and that are said
PER_PICTURE = 4, 20  # at most so many of both for each picture to learn
MOST_PROMPTS = 2**24  # bytes of prompts for them
CHECKPOINT = "lora"  # the task's name, and its file's


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes the result. None: a sensible value for the weights."""

    rank: int = 16
    alpha: float | None = None  # None: the rank, which means a strength of 1
    layers: str = "attn+ff"  # a key of pipelines.lora_training.LAYERS
    steps: int = 1200
    batch: int | None = None
    learning_rate: float | None = None
    keep_rest: float | None = None  # share of each batch that keeps the rest as it is
    seed: int = 0


Said = Callable[[str], None]
Row = tuple[Tensor, Tensor]  # latents (C, Y, X) and text states (L, D), float32 and as the encoder gives them


def train(
    model: str,
    folder: Path,
    output: Path,
    plan: Plan | None = None,
    *,
    trigger: str = "",
    keep_prompts: Path | None = None,  # what to keep, one prompt a line
    minutes: float | None = None,
    resume: bool = True,
    threads: int | None = None,
    device: str = "auto",
    report: Said = print,
) -> Path:
    """Teach `model` ("pixart-sigma:toy") the pictures of `folder`; returns the folder of the adapter.

    Raises GenError for a model that cannot be taught, pictures and captions that do not serve (see
    `gen.captioned`), an output that cannot be written, a run in the same place that was about something else,
    and when it was stopped by a signal: what was learnt so far is then in `output` too.
    """
    plan = plan or Plan()
    row, tag, facts, weights = _weights(model)
    plan = _filled(plan, facts, keep_prompts)
    found = captioned.read_folder(folder, trigger, smallest=max(16, facts.native_size // 4))
    kept = _kept_prompts(facts, keep_prompts, plan, len(found))
    work = _work(output)
    _check_output(output)
    about = {
        "model": f"{row.name}:{tag}",
        "fingerprint": store.fingerprint(weights),
        "output": str(output.absolute()),
        "rank": plan.rank,
        "alpha": plan.alpha,
        "layers": plan.layers,
        "seed": plan.seed,
        "data": captioned.digest(found),
        "keep": _digest(kept) if plan.keep_rest else "",
    }
    _claim(work, about, resume)
    for note in _notes(found, facts, plan, kept):
        report(f"note: {note}")
    if threads:
        torch.set_num_threads(threads)
    chosen, dtype = loader.choose_device(Settings(device=device), store.parameters(weights))
    kept = kept[:MOST_SAID]
    cache = Cache(work / "cache", f"{about['fingerprint']}:{dtype}", report)
    with _taught(work):
        task = _prepare(weights, chosen, dtype, found, kept, plan, cache, report)
        schedule = Schedule(
            steps=plan.steps,
            batch=plan.batch or 1,
            lr=plan.learning_rate or 0.0,
            warmup=max(1, min(50, plan.steps // 10)),
            cooldown=0.4,
            ema=0.99,
            mixed=True,
            evaluate_every=300,
            save_every=30,
        )
        try:
            done = fit(task, schedule, work, resume=True, minutes=minutes, report=report)
        except KeyboardInterrupt:
            done = _from_checkpoint(task, work)
            _write(task, plan, about, done, output)
            raise GenError(
                f"Stopped at step {done['step']}; what was learnt until then is in {output}.",
                "The same command goes on from there.",
                "cancelled",
            ) from None
        with torch.no_grad():
            marks = task.evaluate(work)
    _write(task, plan, about, done, output)
    report(
        f"{done['step']} steps, {done['images']} pictures seen, {done['seconds'] / 60:.1f} min; error "
        f"on the pictures {marks['new']:.4f}, before {marks['new before']:.4f}; drift of the rest "
        f"{marks['drift']:.5f}"
    )
    return output


# ------------------------------------------------------------------------------------------ what is asked for


def _weights(model: str) -> tuple[catalog.Model, str, registry.Checkpoint, Path]:
    row, tag = catalog.find(model)
    if row.name not in TRAINABLE:
        known = ", ".join(f"{name}:{one}" for name in TRAINABLE for one in catalog.MODELS[name].weights)
        why = (
            " It draws in few steps, which learning from pictures would undo."
            if row.name == "pixart-delta"
            else ""
        )
        raise GenError(
            f"{row.name} cannot be taught by gen train-lora.{why}", f"What can: {known}.", "bad_input"
        )
    tag, facts, folder = catalog.choose(row, tag)
    return row, tag, facts, folder


def _filled(plan: Plan, facts: registry.Checkpoint, keep_prompts: Path | None) -> Plan:
    """With a value in the place of every None."""
    from dataclasses import replace

    able = facts.is_toy or keep_prompts is not None
    if plan.keep_rest and not able:
        raise GenError(
            "There are no prompts whose pictures are to stay as they are.",
            "Name a file of them, one a line, with --keep-prompts, or give --keep-rest 0.",
            "bad_input",
        )
    return replace(
        plan,
        alpha=plan.rank if plan.alpha is None else plan.alpha,
        batch=plan.batch or (32 if facts.is_toy else 1),
        learning_rate=plan.learning_rate or (2e-3 if facts.is_toy else 1e-4),
        keep_rest=(0.5 if able else 0.0) if plan.keep_rest is None else plan.keep_rest,
    )


def _kept_prompts(facts: registry.Checkpoint, file: Path | None, plan: Plan, pictures: int) -> list[str]:
    """What the rest is: the lines of the file; for the embedded weights, captions of their own world. The
    first of them are drawn."""
    if not plan.keep_rest:
        return []
    if file is None:
        from gen.toy.words import describe
        from gen.toy.world import scenes

        rng = random.Random(f"keep:{plan.seed}")
        stream = scenes(plan.seed, start=10**6)  # far from those that other trainings see
        return [describe(next(stream), rng).text for _ in range(min(MOST_SAID, PER_PICTURE[1] * pictures))]
    lines = [line.strip() for line in read_text(file, MOST_PROMPTS, "Check --keep-prompts.").splitlines()]
    if not any(lines):
        raise GenError(f"{file} holds no prompts.", "Write one into each line.", "bad_input")
    return [line for line in lines if line]


def _notes(
    found: Sequence[captioned.Captioned], facts: registry.Checkpoint, plan: Plan, kept: Sequence[str]
) -> list[str]:
    notes = []
    if len(found) < FEW:
        notes.append(
            "one picture is learnt by heart: give some dozens that differ in all but what is to be learnt"
        )
    if small := [one for one in found if min(one.width, one.height) < facts.native_size]:
        notes.append(
            f"{len(small)} of {len(found)} pictures are smaller than {facts.native_size} pixels, and are "
            "enlarged"
        )
    if len(kept) > MOST_SAID:
        notes.append(f"of the {len(kept)} prompts to keep the first {MOST_SAID} are used")
    if not plan.keep_rest:
        notes.append("nothing holds on to the rest of what the model draws; --keep-prompts FILE would")
    return notes


def _work(output: Path) -> Path:
    root = Path(os.environ["GEN_TRAIN_DIR"]) if "GEN_TRAIN_DIR" in os.environ else Path.cwd() / ".train"
    return root / f"lora-{output.absolute().name}"


def _check_output(output: Path) -> None:
    """Refuse a place where an adapter cannot be written, or where something else lies."""
    if output.exists() and not output.is_dir():
        raise GenError(f"{output} is a file.", "Name a folder with --output.", "bad_input")
    try:
        if output.is_dir() and any(output.iterdir()) and not (output / WEIGHTS).is_file():
            raise GenError(
                f"{output} holds other files than an adapter's.",
                "Name another folder with --output.",
                "bad_input",
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = (output if output.is_dir() else output.parent) / f".gen-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise library.disk_error(error, output) from error


def _claim(work: Path, about: Mapping[str, Any], resume: bool) -> None:
    """Begin a run in its folder, or go on with the one that is there if it is about the same."""
    path = work / "run.json"
    try:
        if not resume:
            for old in (work / f"{CHECKPOINT}.safetensors", work / f"{CHECKPOINT}.log.jsonl", path):
                old.unlink(missing_ok=True)  # what was encoded and drawn is no result: it stays
        if path.is_file():
            before = json.loads(path.read_text())
            words = {
                name: (before.get(name), value) for name, value in about.items() if before.get(name) != value
            }
            if words:
                changes = ", ".join(f"{name} {was!r} is {now!r} now" for name, (was, now) in words.items())
                raise GenError(
                    f"The training in {work} was about something else: {changes}.",
                    "Give what it began with, or --fresh to begin anew, or another name with --output.",
                    "bad_input",
                )
        work.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(about, indent=1).encode() + b"\n")
    except OSError as error:
        raise library.disk_error(error, work) from error
    except ValueError:
        raise GenError(f"{path} is damaged.", "Begin anew with --fresh.", "bad_input") from None


@contextlib.contextmanager
def _taught(work: Path) -> Any:
    """What is expected to go wrong in the middle, as GenError."""
    from pipelines.tiling import out_of_memory

    try:
        yield
    except OSError as error:
        raise library.disk_error(error, work) from error
    except FloatingPointError as error:
        raise GenError(
            f"The training has left all bounds: {error}.",
            "Give a lower --learning-rate, and --fresh.",
            "failed",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise GenError(
            "The memory did not suffice.", "Give a smaller --batch, --rank or --layers.", "out_of_memory"
        ) from error


# ------------------------------------------------------------------------- what is computed once, and is kept


class Cache:
    """Tensors by what they were made of, each a file that is there whole or not at all."""

    def __init__(self, folder: Path, origin: str, report: Said = print) -> None:
        """`origin`: what made them, weights and dtype."""
        self.folder, self.origin, self.report = folder, origin, report

    def path(self, kind: str, key: str) -> Path:
        name = hashlib.sha256(f"{self.origin}\0{key}".encode()).hexdigest()[:32]
        return self.folder / kind / f"{name}.safetensors"

    def holds(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def get(self, kind: str, key: str) -> Tensor | None:
        """What was kept; None when it was not, or its file is damaged."""
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            return load_file(path)["tensor"]
        except (SafetensorError, KeyError):
            self.report(f"note: {path} is damaged and is made again")
            return None

    def put(self, kind: str, key: str, tensor: Tensor) -> Tensor:
        """Keep a tensor; returns it, on the CPU."""
        tensor = tensor.detach().cpu().contiguous()
        path = self.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"tensor": tensor}, building)
        building.replace(path)
        return tensor


def _prepare(
    weights: Path,
    device: str,
    dtype: str,
    found: Sequence[captioned.Captioned],
    kept: Sequence[str],
    plan: Plan,
    cache: Cache,
    report: Said,
) -> LoraTask:
    """Load, encode, draw what is to be kept, and put adapters into the transformer."""
    texts = [*dict.fromkeys(["", *(one.caption for one in found), *kept])]
    encoded = all(cache.holds("texts", text) for text in texts)
    pipeline = _load(weights, device, dtype, encoded)
    small = sum(one.numel() for one in pipeline.transformer.parameters()) < loader.SMALL
    with torch.no_grad():
        states = _encode_texts(pipeline, texts, cache, report)
        samples = [
            (latents, states[one.caption])
            for one, latents in zip(found, _encode_pictures(pipeline, found, cache, report), strict=True)
        ]
        asked = kept[: min(MOST_KEPT, PER_PICTURE[0] * len(found))]
        seeds = [plan.seed + number for number in range(len(asked))]
        drawn = _draw_kept(pipeline, asked, seeds, states, cache, 16 if small else 1, report)
    pipeline.text_encoder = pipeline.vae = None  # neither is needed any more, and they may be large
    transformer = pipeline.transformer
    torch.manual_seed(plan.seed)
    adapters = lora_training.insert(transformer, plan.layers, plan.rank, plan.alpha or plan.rank)
    # On a CPU the fused attention's way back takes six times as long in bfloat16 as the plain one's
    set_attention(transformer, "math" if device == "cpu" else "sdpa")
    if not small:
        lora_training.save_memory(transformer)
    return LoraTask(
        transformer,
        adapters,
        samples,
        [(latents, states[text]) for text, latents in zip(asked, drawn, strict=True)],
        said=[states[text] for text in kept],
        empty=states[""],
        scheduler=pipeline.scheduler,
        keep=plan.keep_rest or 0.0,
        pixels=pipeline.vae_scale_factor,
        seed=plan.seed,
        device=device,
    )


def _load(weights: Path, device: str, dtype: str, encoded: bool) -> PixArtSigmaPipeline:
    offload = loader.offloads(weights, device, dtype)
    if encoded and store.parameters(weights / "text_encoder") >= loader.SMALL:
        offload = {**offload, "text_encoder": "file"}  # it is never asked, so never read
    with loader.explained(weights):
        store.verify(weights)
        try:
            return PixArtSigmaPipeline.from_pretrained(
                weights, torch_dtype=getattr(torch, dtype), device=device, offload=offload
            )
        except ValueError as error:  # whole files, and yet they do not fit together
            raise store.CorruptWeights(str(error)) from error


def _encode_texts(
    pipeline: PixArtSigmaPipeline, texts: Sequence[str], cache: Cache, report: Said
) -> dict[str, Tensor]:
    """Text -> states (L, D)."""
    states: dict[str, Tensor] = {}
    fresh = 0
    for text in texts:
        kept = cache.get("texts", text)
        if kept is None:
            kept = cache.put("texts", text, pipeline.encode([text])[0][0])
            fresh += 1
        states[text] = kept
    report(f"{len(texts)} captions: {fresh} encoded, {len(texts) - fresh} from the last time")
    return states


def _encode_pictures(
    pipeline: PixArtSigmaPipeline, found: Sequence[captioned.Captioned], cache: Cache, report: Said
) -> list[Tensor]:
    """Latents (C, Y, X) float32 of each picture, at the size at which the model draws its shape."""
    latents = []
    fresh = 0
    for number, one in enumerate(found, 1):
        height, width = _drawn_size(pipeline, one)
        key = f"{one.sha256}:{height}x{width}"
        kept = cache.get("latents", key)
        if kept is None:
            x = fitted(one.read(), height, width).to(pipeline.device, pipeline.vae.dtype)
            mean = pipeline.vae.encode(x[None])[0].mean[0]
            kept = cache.put("latents", key, mean.float() * pipeline.vae.config.scaling_factor)
            fresh += 1
            if fresh % 100 == 0:
                report(f"encoded {number} of {len(found)} pictures")
        latents.append(kept)
    report(f"{len(found)} pictures: {fresh} encoded, {len(found) - fresh} from the last time")
    return latents


def _drawn_size(pipeline: PixArtSigmaPipeline, one: captioned.Captioned) -> tuple[int, int]:
    native = pipeline.native_size
    return nearest_bin(one.height, one.width, native) if native in BINS else (native, native)


def fitted(picture: Any, height: int, width: int) -> Tensor:
    """A PIL picture as (3, height, width) in -1..1: resized until both sides are covered, cut from the
    middle."""
    import numpy
    from PIL import ImageOps

    pixels = numpy.asarray(ImageOps.fit(picture, (width, height), method=3))  # bicubic
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _draw_kept(
    pipeline: PixArtSigmaPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    states: Mapping[str, Tensor],
    cache: Cache,
    batch: int,
    report: Said,
) -> list[Tensor]:
    """Latents (C, Y, X) that the model draws for these prompts."""
    keys = [f"{text}\0{seed}\0{KEPT_STEPS}" for text, seed in zip(prompts, seeds, strict=True)]
    todo = [number for number, key in enumerate(keys) if not cache.holds("drawn", key)]
    for start in range(0, len(todo), batch):
        some = todo[start : start + batch]
        captions, mask = padded([states[prompts[number]] for number in some])
        empty, empty_mask = padded([states[""]] * len(some))
        step = None
        for step in pipeline.denoise(  # noqa: B007 - the last step is what we are after
            num_inference_steps=KEPT_STEPS,
            prompt_embeds=captions,
            prompt_attention_mask=mask,
            negative_prompt_embeds=empty,
            negative_prompt_attention_mask=empty_mask,
            generator=[torch.Generator().manual_seed(seeds[number]) for number in some],
            output_type="latent",
        ):
            pass
        assert step is not None
        for number, latents in zip(some, step.latents, strict=True):
            cache.put("drawn", keys[number], latents.float())
        report(f"drew {start + len(some)} of {len(todo)} pictures that are to stay as they are")
    drawn = []
    for key in keys:
        latents = cache.get("drawn", key)
        if latents is None:
            raise GenError("What was drawn to be kept is damaged.", "Start again.", "failed")
        drawn.append(latents)
    return drawn


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States (L, D) of several texts as (B, longest, D), and the mask of what is real (B, longest)."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    captions = torch.stack([functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    return captions, torch.arange(longest) < lengths[:, None]


# ------------------------------------------------------------------------------------------------- the task


class Noise:
    """How a network was trained to see noise, and what it answers."""

    def __init__(self, scheduler: Any, device: torch.device | str) -> None:
        config = NoiseConfig(**noise_schedule(scheduler))
        signal = config.signal(torch.float64)
        self.alpha, self.sigma = (part.sqrt().float().to(device) for part in (signal, 1 - signal))
        self.answer = settings(scheduler)["prediction_type"]
        self.steps = config.num_train_timesteps

    def times(self, count: int, rng: torch.Generator) -> Tensor:
        """Timesteps (count,), half of them anywhere, half where signal and noise are about as strong: there
        shapes are decided, the slowest thing to learn."""
        middle = (torch.randn(count, generator=rng) - 0.8).sigmoid()
        anywhere = torch.rand(count, generator=rng)
        share = torch.where(torch.rand(count, generator=rng) < 0.5, middle, anywhere)
        return (share * self.steps).long().clamp(0, self.steps - 1)

    def add(self, x_BCYX: Tensor, noise_BCYX: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and the right answer to them."""
        alpha, sigma = self.alpha[t_B, None, None, None], self.sigma[t_B, None, None, None]
        answers = {
            "epsilon": noise_BCYX,
            "v_prediction": alpha * noise_BCYX - sigma * x_BCYX,
            "sample": x_BCYX,
        }
        return alpha * x_BCYX + sigma * noise_BCYX, answers[self.answer]


class LoraTask:
    """The adapter's training, as `gen.train.fit` wants it. `module` holds A and B of every layer and
    nothing of the network."""

    name = CHECKPOINT

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        adapters: Mapping[str, lora_training.LowRank],
        samples: Sequence[Row],  # to be learnt
        kept: Sequence[Row],  # to stay as they are
        *,
        said: Sequence[Tensor] = (),  # states of more captions, whose meaning is to stay
        empty: Tensor,  # states of the empty caption
        scheduler: Any,
        keep: float,
        pixels: int,  # per latent, for networks that read sizes
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transformer, self.adapters, self.device = transformer.eval(), adapters, torch.device(device)
        self.module: nn.Module = nn.ParameterDict(
            {
                f"{name.replace('.', '/')}/{half}": getattr(adapter, half)
                for name, adapter in adapters.items()
                for half in ("down", "up")
            }
        )
        self.noise = Noise(scheduler, device)
        self.samples, self.kept = _alike(samples), _alike(kept)
        self.said = said or [states for _, states in kept]
        self.empty, self.keep, self.pixels, self.seed = empty, keep if kept else 0.0, pixels, seed
        self.before: dict[str, float] | None = None
        self.seed_data("")

    def seed_data(self, key: str) -> None:
        self.rng = torch.Generator().manual_seed(random.Random(f"lora:{self.seed}:{key}").getrandbits(63))

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return MuonAdamW([], self.module.parameters(), lr=lr)

    def loss(self, batch: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the rows: squared error on the pictures to learn, squared drift on what is to stay."""
        share = batch * self.keep
        kept = int(share + float(torch.rand((), generator=self.rng)))  # on average the share
        kept = min(max(kept, 1), batch - 1) if batch > 1 and self.keep else kept
        new, drift = (torch.zeros((), device=self.device) for _ in range(2))
        if kept < batch:
            new = self._error(*self._pick(self.samples, batch - kept, self.rng), self.rng)
        if kept:
            drift = self._drift(*self._varied(*self._pick(self.kept, kept, self.rng)), self.rng)
        loss = (new * (batch - kept) + HOLD * drift * kept) / batch
        return loss, {"new": new.detach(), "drift": drift.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Error on the pictures and drift of the rest at fixed noise, with the adapter and without."""
        marks = self._marks()
        if self.before is None:
            with lora_training.inactive(self.adapters):
                self.before = self._marks()
        return {**marks, "new before": self.before["new"]}

    @torch.no_grad()
    def _marks(self, rounds: int = 8, rows: int = 8) -> dict[str, float]:
        rng = torch.Generator().manual_seed(self.seed)
        found: dict[str, list[float]] = {"new": [], "drift": []}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16_units(self.device)):
            for _ in range(rounds):
                found["new"].append(float(self._error(*self._pick(self.samples, rows, rng), rng)))
                if self.kept:
                    found["drift"].append(float(self._drift(*self._pick(self.kept, rows, rng), rng)))
        return {name: sum(values) / max(1, len(values)) for name, values in found.items()}

    def _pick(
        self, groups: Sequence[list[Row]], count: int, rng: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """Latents (count, C, Y, X) of one size, and their captions' states."""
        sizes = torch.tensor([float(len(group)) for group in groups])
        group = groups[int(torch.multinomial(sizes, 1, generator=rng))]
        picks = torch.randint(len(group), (count,), generator=rng).tolist()
        return torch.stack([group[pick][0] for pick in picks]), [group[pick][1] for pick in picks]

    def _varied(self, latents: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Some captions emptied, and some exchanged for any other."""
        chance = torch.rand(len(states), generator=self.rng).tolist()
        others = torch.randint(len(self.said), (len(states),), generator=self.rng).tolist()
        return latents, [
            self.empty if one < EMPTY else self.said[other] if one < EMPTY + OTHER else own
            for one, other, own in zip(chance, others, states, strict=True)
        ]

    def _noisy(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        t = self.noise.times(len(x), rng).to(self.device)
        noise = torch.randn(x.shape, generator=rng).to(self.device)
        return (*self.noise.add(x.to(self.device), noise, t), t)

    def _error(self, x: Tensor, states: list[Tensor], rng: torch.Generator) -> Tensor:
        noisy, wanted, t = self._noisy(x, rng)
        return (self._answer(noisy, t, *padded(states)) - wanted).square().mean()

    def _drift(self, x: Tensor, states: list[Tensor], rng: torch.Generator) -> Tensor:
        noisy, _, t = self._noisy(x, rng)
        captions, mask = padded(states)
        with torch.no_grad(), lora_training.inactive(self.adapters):
            wanted = self._answer(noisy, t, captions, mask)
        return (self._answer(noisy, t, captions, mask) - wanted).square().mean()

    def _answer(self, noisy: Tensor, t: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        """float32, without the learned variance that published networks answer as well."""
        network = self.transformer
        rows, channels, height, width = noisy.shape
        size = torch.tensor([[height, width]], dtype=torch.float32, device=self.device) * self.pixels
        answer = network(
            noisy.to(network.dtype),
            captions.to(self.device, network.dtype),
            t,
            {
                "resolution": size.expand(rows, -1),
                "aspect_ratio": (size[:, :1] / size[:, 1:]).expand(rows, -1),
            },
            mask.to(self.device),
        ).sample
        return answer[:, :channels].float()


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose latents have one size, together: only they fit into one batch."""
    groups: dict[torch.Size, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0].shape, []).append(row)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------- results


def _from_checkpoint(task: LoraTask, work: Path) -> dict[str, Any]:
    """Put the averaged weights of the checkpoint into the task; returns its counters."""
    with safe_open(work / f"{CHECKPOINT}.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("ema.")]  # noqa: SIM118 - it is no mapping
        task.module.load_state_dict({name.removeprefix("ema."): file.get_tensor(name) for name in names})
        return json.loads(file.metadata()["facts"])


def _write(
    task: LoraTask, plan: Plan, about: Mapping[str, Any], done: Mapping[str, Any], output: Path
) -> None:
    """The adapter's folder, in float16; a file that was there is replaced whole."""
    pairs = {}
    for name, adapter in task.adapters.items():
        down, up = adapter.halves()
        pairs[name] = (down.half(), up.half())
    ends = lora_training.LAYERS[plan.layers] or tuple(task.adapters)
    words = {
        "base_model": about["model"],
        "base_fingerprint": about["fingerprint"],
        "steps": str(done["step"]),
        "images": str(done["images"]),
        "seed": str(plan.seed),
        "data": about["data"],
        "keep_rest": f"{plan.keep_rest:g}",
        "learning_rate": f"{plan.learning_rate:g}",
        "recipe": "gen train-lora",
    }
    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        save_lora(building, pairs, plan.rank, plan.alpha or plan.rank, ends, words)
        if output.is_dir():
            for name in (CONFIG, WEIGHTS):
                (building / name).replace(output / name)
            building.rmdir()
        else:
            building.rename(output)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise library.disk_error(error, output) from error


def _write_whole(path: Path, content: bytes) -> None:
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_bytes(content)
    building.replace(path)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
