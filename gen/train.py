"""The training loop: one for every recipe. What is trained, on what and by which loss is a `Task`.

Resumable at any moment (parameters, averages, optimizer and counters are one safetensors file, replaced
atomically), on one device or on several single-threaded CPU processes with averaged gradients: two of
those are faster and far steadier on two cores than one process with two threads, which stalls whenever
anything else runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from gen.optim import bfloat16_units

log = logging.getLogger(__name__)


def train(
    name: str,
    *,
    output: Path | None = None,
    resume: bool = True,
    device: str = "auto",
    minutes: float | None = None,
    threads: int | None = None,
    data: Path | None = None,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Run the recipe `name`, telling its progress on stderr; returns the folder of finished weights."""
    from gen import recipes

    return recipes.start(
        name,
        output=output,
        resume=resume,
        device=device,
        minutes=minutes,
        threads=threads,
        data=data,
        options=options,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    steps: int
    batch: int  # over all processes together
    lr: float
    warmup: int = 100  # steps
    cooldown: float = 0.25  # the last part of the run in which the rate falls to `floor`
    floor: float = 0.02
    ema: float = 0.999
    clip: float = 1.0
    mixed: bool = False  # products in bfloat16 where the device has units for it
    evaluate_every: float = 600  # seconds
    save_every: float = 180  # seconds


class Task(Protocol):
    """What the loop needs to know. `module` holds every trainable parameter; `steps_done` is kept by the
    loop."""

    name: str
    module: torch.nn.Module

    def seed_data(
        self, key: str
    ) -> None: ...  # new random streams: every process and every resumed run has its own
    def optimizer(self, lr: float) -> torch.optim.Optimizer: ...
    def loss(self, batch: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...
    def evaluate(self, folder: Path) -> dict[str, float]: ...


def rate(schedule: Schedule, step: int, progress: float) -> float:
    """Learning rate: linear warm-up, constant, linear cool-down over the last part."""
    warm = min(1.0, (step + 1) / schedule.warmup)
    cool = min(1.0, (1 - progress) / schedule.cooldown) if schedule.cooldown else 1.0
    return schedule.lr * warm * max(cool, schedule.floor)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one message."""
    _, world = rank_and_world()
    if world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def save_checkpoint(
    path: Path, module: torch.nn.Module, ema: dict, optimizer: torch.optim.Optimizer, facts: dict
) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    names = {id(p): n for n, p in module.named_parameters()}
    for p, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(p)]}|{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, {"facts": json.dumps(facts)})
    temporary.replace(path)


def load_checkpoint(
    path: Path, module: torch.nn.Module, ema: dict, optimizer: torch.optim.Optimizer | None
) -> dict:
    """Fill everything in place; returns the counters."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        keys = list(file.keys())
        module.load_state_dict({k[6:]: file.get_tensor(k) for k in keys if k.startswith("model.")})
        for k in ema:
            ema[k].copy_(file.get_tensor(f"ema.{k}"))
        if optimizer is not None:
            params = dict(module.named_parameters())
            for k in keys:
                if k.startswith("optimizer."):
                    name, _, part = k[len("optimizer.") :].rpartition("|")
                    optimizer.state[params[name]][part] = file.get_tensor(k).to(params[name].device)
    return facts


class Averaged:
    """Exponential moving average of a module's state; as a context manager it lends the average to the
    module."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        live = self.module.state_dict()
        floats = [k for k in self.state if self.state[k].is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floats], [live[k] for k in floats], 1 - decay)

    def __enter__(self) -> None:
        self.kept = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.state)

    def __exit__(self, *error: object) -> None:
        self.module.load_state_dict(self.kept)


def fit(
    task: Task,
    schedule: Schedule,
    folder: Path,
    *,
    resume: bool = True,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Train `task` until `schedule.steps`, or for `minutes` (over all resumed runs together), whichever
    comes first. Leaves `<name>.safetensors` (checkpoint), `<name>.log.jsonl` and what the task draws in
    `folder`; the module ends with its averaged weights. Returns the counters: step, seconds, images."""
    rank, world = rank_and_world()
    path, log_path = folder / f"{task.name}.safetensors", folder / f"{task.name}.log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = task.optimizer(schedule.lr)
    average = Averaged(task.module, schedule.ema)
    facts = {"step": 0, "seconds": 0.0, "images": 0}
    if resume and path.exists():
        facts |= load_checkpoint(path, task.module, average.state, optimizer)
        if rank == 0:
            report(f"{task.name}: goes on from step {facts['step']}")
    task.seed_data(f"{facts['step']}:{rank}")
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    device = parameters[0].device
    mixed = schedule.mixed and bfloat16_units(device)
    share = max(1, schedule.batch // world)
    limit = minutes * 60 if minutes else math.inf
    began = last_saved = last_evaluated = last_line = time.monotonic()
    seconds_before, step_began = facts["seconds"], facts["step"]
    sums: dict[str, torch.Tensor] = {}
    counted = 0
    clock = torch.zeros(2, dtype=torch.float64)
    first = facts["step"]
    stop, restore = _catch_signals(leads=rank == 0)
    while facts["step"] < schedule.steps:
        clock[:] = torch.tensor([seconds_before + time.monotonic() - began, float(stop.is_set())])
        if world > 1:  # every process must see the same clock, or they part ways
            dist.broadcast(clock, 0)
        facts["seconds"] = float(clock[0])
        if clock[1]:
            break
        progress = max(facts["step"] / schedule.steps, facts["seconds"] / limit)
        if progress >= 1:
            break
        lr = rate(schedule, facts["step"], progress)
        for group in optimizer.param_groups:
            group["lr"] = lr
        task.module.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss, parts = task.loss(share, progress)
        loss.backward()
        average_gradients(parameters)
        if schedule.clip:
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        facts["step"] += 1
        facts["images"] += share * world
        average.update(facts["step"])
        for k, v in {"loss": loss.detach(), **parts}.items():
            sums[k] = sums.get(k, 0) + v.detach()
        counted += 1
        now = time.monotonic()
        if rank == 0 and (now - last_line > 15 or facts["step"] == first + 5):
            means = {k: round(float(v) / counted, 5) for k, v in sums.items()}
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{task.name}: the loss is {means['loss']} at step {facts['step']}; try a lower rate"
                )
            pace = (facts["step"] - step_began) / (now - began)
            left = min((schedule.steps - facts["step"]) / pace, limit - facts["seconds"])
            parts_text = " ".join(f"{k} {v:.4g}" for k, v in means.items())
            speed = f"{pace * share * world:.0f} images/s"
            report(
                f"{task.name} step {facts['step']} {speed} {parts_text} lr {lr:.2g} {left / 60:.0f} min left"
            )
            with log_path.open("a") as file:
                file.write(json.dumps({**facts, "lr": lr, **means}) + "\n")
            sums, counted, last_line = {}, 0, now
        if rank == 0 and now - last_saved > schedule.save_every:
            save_checkpoint(path, task.module, average.state, optimizer, facts)
            last_saved = now
        if rank == 0 and now - last_evaluated > schedule.evaluate_every:
            _evaluate(task, average, folder, log_path, facts, report)
            last_evaluated = time.monotonic()
    if rank == 0:
        save_checkpoint(path, task.module, average.state, optimizer, facts)
    restore()
    if clock[1]:
        if rank == 0:
            report(f"{task.name}: stopped at step {facts['step']}; the same command goes on from there")
        raise KeyboardInterrupt
    average.__enter__()  # the averaged weights stay in the module
    task.module.eval()
    return facts


def _catch_signals(leads: bool) -> tuple[threading.Event, Callable[[], None]]:
    """An event that Ctrl-C and SIGTERM set, so that a step is finished and saved before a run ends, and
    what gives the signals back. Only the leading process listens; it tells the others."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return stop, lambda: None
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) for n in numbers}
    for n in numbers:
        signal.signal(n, (lambda *_: stop.set()) if leads else signal.SIG_IGN)

    def restore() -> None:
        for n, handler in before.items():
            signal.signal(n, handler)

    return stop, restore


def _evaluate(
    task: Task, average: Averaged, folder: Path, log_path: Path, facts: dict, report: Callable[[str], None]
) -> None:
    with average, torch.no_grad():
        task.module.eval()
        found = task.evaluate(folder)
    report(
        f"{task.name} step {facts['step']} evaluated: " + " ".join(f"{k} {v:.4g}" for k, v in found.items())
    )
    with log_path.open("a") as file:
        file.write(json.dumps({**facts, "evaluated": found}) + "\n")
