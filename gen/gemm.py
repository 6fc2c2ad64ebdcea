"""How fast this machine multiplies matrices: what the speed of a network is held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Rows, inputs and outputs: the two products of a feed-forward at 512 tokens, and a large one
SHAPES = {
    "cpu": ((512, 1152, 4608), (512, 4608, 1152), (2048, 2048, 2048)),
    "cuda": ((8192, 1152, 4608), (8192, 8192, 8192), (16384, 4096, 16384)),
}
SHAPES["mps"] = SHAPES["cpu"]

Product = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one way of multiplying reaches, in the shape that suits it best."""

    dtype: str
    way: str
    flops: float  # a second
    error: float  # largest difference from float64 over the largest number; of the first shape

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "way": self.way, "tflops": self.flops / 1e12, "error": self.error}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """torch's switch for float32 products through oneDNN, for a while.

    "bf16" permits oneDNN to round the factors: it does so only where that is faster, on CPUs with AMX.
    Elsewhere it computes in float32, and faster than the default.
    """
    before = float32_precision()
    _set_float32_precision(precision)
    try:
        yield
    finally:
        _set_float32_precision(before)


def float32_precision() -> str:
    """How that switch stands."""
    import torch

    backend: Any = torch.backends.mkldnn
    return str(backend.matmul.fp32_precision)


def _set_float32_precision(precision: str) -> None:
    import torch

    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = precision


def rates(dtype: str, device: str, seconds: float = 0.4) -> list[Rate]:
    """Every way to multiply in this type here, the fastest first; `seconds` for each way and shape."""
    found = []
    for way, make in _ways(dtype, device).items():
        best, error = 0.0, 0.0
        for number, shape in enumerate(SHAPES[device]):
            product, exact = make(shape)
            if number == 0:
                answer = product().double().cpu()
                error = float((answer - exact()).abs().max() / exact().abs().max())
            best = max(best, 2 * math.prod(shape) / _fastest(product, device, seconds))
        found.append(Rate(dtype=dtype, way=way, flops=best, error=error))
    return sorted(found, key=lambda rate: -rate.flops)


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _fastest(product: Product, device: str, seconds: float) -> float:
    product()
    synchronise(device)
    best, began = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        product()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def _ways(dtype: str, device: str) -> dict[str, Callable[[tuple[int, int, int]], tuple[Product, Product]]]:
    """Name of a way -> shape to (its product, the same product in float64)."""
    import torch
    from torch.nn import functional

    from pipelines import packed

    kind = getattr(torch, dtype)

    def factors(shape: tuple[int, int, int]) -> tuple[Any, Any]:
        rows, inputs, outputs = shape
        draw = torch.Generator().manual_seed(0)
        if dtype == "int8":
            x = torch.randint(-127, 128, (rows, inputs), generator=draw, dtype=kind)
            return x.to(device), torch.randint(-127, 128, (outputs, inputs), generator=draw, dtype=kind).to(
                device
            )
        x = torch.randn(rows, inputs, generator=draw).to(device, kind)
        return x, torch.randn(outputs, inputs, generator=draw).to(device, kind)

    def way(multiply: Callable[[Any, Any], Product]) -> Callable[[Any], tuple[Product, Product]]:
        def make(shape: tuple[int, int, int]) -> tuple[Product, Product]:
            x, weight = factors(shape)
            return multiply(x, weight), lambda: x.double().cpu() @ weight.double().cpu().T

        return make

    def plain(x: Any, weight: Any) -> Product:
        return lambda: functional.linear(x, weight)

    def through_onednn(x: Any, weight: Any) -> Product:
        def product() -> Any:
            with float32_products("bf16"):
                return functional.linear(x, weight)

        return product

    def pre_packed(x: Any, weight: Any) -> Product:
        with torch.device("meta"):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        ready = packed.PackedLinear(layer)
        return lambda: ready(x)

    def integers(x: Any, weight: Any) -> Product:
        return lambda: torch._int_mm(x, weight.T)

    def packed_integers(x: Any, weight: Any) -> Product:
        # Unsigned: oneDNN has no fast kernels for signed factors. 128 is added, and named as the zero point.
        unsigned, outputs = x.view(torch.uint8).bitwise_xor(128), len(weight)
        ready = torch.ops.onednn.qlinear_prepack(weight, None)
        scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)
        after: Any = (None, 1.0, 0, torch.float32, "none", [], "")
        return lambda: torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, 128, ready, scales, zeros, *after)

    if dtype == "int8":
        ways = {"torch._int_mm": way(integers)} if device != "mps" else {}
        if device == "cpu" and torch.backends.mkldnn.is_available():
            ways["oneDNN, packed"] = way(packed_integers)
        return ways
    ways = {"linear": way(plain)}
    if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        ways["linear through oneDNN"] = way(through_onednn)
    if device == "cpu" and packed.missing(kind) is None:
        ways["linear, packed"] = way(pre_packed)
    return ways
