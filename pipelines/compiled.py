"""Networks that repeat themselves made faster by torch's compiler, or by replaying what a GPU did before.

`compile_blocks` compiles the parts of a transformer block, once for all its copies: the whole network would
take as many times longer as it has blocks. Each size of picture is compiled anew when it first comes.

`Replayed` is for small networks on a GPU, which takes less time for them than Python does to ask: it records
the kernels of a forward and plays them again.

Both are for inference only, and keep the results to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# What of a block is compiled, by its class: methods that take tensors whose sizes only the picture
# decides. Not so the attention to text: its sizes change with every prompt.
REGIONS: Mapping[str, tuple[str, ...]] = {
    "pipelines.models.dit:Block": ("forward",),
    "pipelines.models.dit3d:Block": ("forward",),
    "pipelines.models.pixart:Block": ("attend_image", "feed_forward"),
}


def missing(device: torch.device | str = "cpu") -> str | None:
    """Why torch cannot compile for this device here, or None."""
    kind = torch.device(device).type
    if kind == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler ({compiler}); install one, or name yours in CXX"
        return None
    if kind == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    return f"compiling for {kind} is not supported; it is for cpu and cuda"


def compile_blocks(model: nn.Module, cache: Path | str | None = None) -> int:
    """Compile the repeated blocks of `model` in place; returns how many there are.

    `cache` is a folder that keeps what was compiled, so that other processes need not do it again; None is
    torch's own. There is one in a process: the first named stays. Nothing is compiled before the first
    forward, which takes long. Afterwards gradients are refused.

    Raises ValueError, and changes nothing: no compiler, a model that trains, has no blocks of REGIONS, holds
    packed layers, is compiled already, or a second cache folder.
    """
    name = type(model).__name__
    blocks = [(block, REGIONS[_class(block)]) for block in model.modules() if _class(block) in REGIONS]
    if not blocks:
        raise ValueError(
            f"this {name} has no blocks that are known to repeat: see pipelines.compiled.REGIONS"
        )
    if any("_regions" in vars(block) for block, _ in blocks):
        raise ValueError(f"this {name} is compiled already")
    if getattr(model, "streamed_on", None) is not None:
        raise ValueError(f"this {name} leaves its weights elsewhere, and cannot be compiled")
    reason = missing(next(model.parameters()).device)
    if reason:
        raise ValueError(f"this {name} cannot be compiled: {reason}")
    if model.training:
        raise ValueError(
            f"this {name} is in training, and compiled blocks give no gradients; call eval() first"
        )
    packed = [path for path, module in model.named_modules() if _holds_packed(module)]
    if packed:
        raise ValueError(
            f"this {name} has {len(packed)} layers with weights packed for oneDNN, such as {packed[0]}, "
            "and the two have not been made to work together; compile the network as it was loaded"
        )
    if cache is not None:
        _keep_in(Path(cache))
    for block, methods in blocks:
        for method in methods:
            setattr(block, method, _inference_only(getattr(block, method)))
        block._regions = methods
    return len(blocks)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__name__}"


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) and value.is_mkldnn for value in vars(module).values())


def _keep_in(folder: Path) -> None:
    """torch reads the place of its cache from the environment, at each compilation."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    wanted = str(folder.absolute())
    if chosen not in (None, wanted):
        raise ValueError(f"this process keeps what it compiles in {chosen} already, not in {wanted}")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = wanted


def _inference_only(method: Callable[..., Any]) -> Callable[..., Any]:
    # The whole graph or an error: torch would otherwise go on uncompiled without a word
    compiled = torch.compile(method, dynamic=False, fullgraph=True)

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compiled blocks give no gradients; call them in torch.inference_mode() or no_grad()"
            )
        try:
            return compiled(*args, **options)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "too many sizes of picture for compiled blocks: torch keeps "
                f"{torch._dynamo.config.recompile_limit} forms of each part; "
                "draw fewer sizes in one process, or without compiling"
            ) from error

    return call


# Inputs of a network: tensors in tuples, lists, dictionaries and data classes


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of the value, in order."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value).values():
        yield from tensors_in(part)


def form_of(value: Any) -> str:
    """What two values have in common that differ in the numbers of their tensors only."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {value.device}"
    parts = _parts(value)
    if not parts:
        return repr(value)
    return f"{type(value).__name__}({', '.join(f'{key}={form_of(part)}' for key, part in parts.items())})"


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    parts = {key: with_tensors(part, change) for key, part in _parts(value).items()}
    if not parts:
        return value
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **parts)
    if isinstance(value, Mapping):
        return parts
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(**parts)
    return type(value)(parts.values())


def _parts(value: Any) -> dict[Any, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):
        return value._asdict()
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    return {}


class Buffers:
    """Tensors that stay where they are, and take the numbers of others of their form."""

    def __init__(self, value: Any) -> None:
        self.value = with_tensors(value, lambda tensor: tensor.detach().clone())
        self._tensors = list(tensors_in(self.value))

    def fill(self, value: Any) -> None:
        """Copy the numbers of a value of the same form."""
        for own, other in zip(self._tensors, tensors_in(value), strict=True):
            own.copy_(other)


class Replayed:
    """A network on a CUDA device whose forwards are recorded once per form of inputs, and then replayed.

    It is called like the network and has its attributes. Results are copies: a caller may keep them. More
    than `most` forms are not recorded but computed as ever, with a warning. Weights must stay where they are:
    call `forget` after moving the network or merging an adapter.

    Raises ValueError for a network that is not on a CUDA device.
    """

    def __init__(self, network: nn.Module, most: int = 8) -> None:
        device = next(network.parameters()).device
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs replay what a CUDA device did; this network is on {device}. Call it as it is"
            )
        self.network, self.most = network, most
        self._recorded: dict[str, tuple[torch.cuda.CUDAGraph, Buffers, Any]] = {}
        self._refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def forget(self) -> None:
        """Record everything anew."""
        self._recorded.clear()

    def __call__(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("replayed forwards give no gradients; call them in torch.inference_mode()")
        inputs = (args, options)
        form = form_of(inputs)
        if form not in self._recorded:
            if len(self._recorded) >= self.most:
                self._refused += 1
                if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th: loud, not endless
                    log.warning(
                        "%d forwards not replayed: their sizes come after the %d that are recorded; "
                        "inputs that change their size all the time are slower this way",
                        self._refused,
                        self.most,
                    )
                return self.network(*args, **options)
            self._recorded[form] = self._record(inputs)
        graph, buffers, result = self._recorded[form]
        buffers.fill(inputs)
        graph.replay()
        return with_tensors(result, Tensor.clone)

    def _record(self, inputs: Any) -> tuple[torch.cuda.CUDAGraph, Buffers, Any]:
        started = time.monotonic()
        buffers = Buffers(inputs)
        args, options = buffers.value
        # On a stream of its own first: libraries reserve memory and caches fill, which may not be recorded
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.network(*args, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.network(*args, **options)
        log.debug("recorded a forward in %.2f s", time.monotonic() - started)
        return graph, buffers, result
