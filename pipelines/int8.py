"""Linear layers in int8, weights and activations (W8A8), quantised from weights of any kind at load time.

A layer computes y = x W^T + b. Each row of W (an output channel) and each row of x (a token) is divided by a
scale of its own and rounded to integers of -127 to 127. The products of integers are summed exactly, in
int32, and multiplied by the two scales. Scales of x are found anew in each call, so nothing is calibrated.

This changes pictures: it is for those who know it. What is quantised, and what is left, are the tables at the
end of this file.

Shapes: N tokens (all leading dimensions together), D features in, O features out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.layers import Gelu

log = logging.getLogger(__name__)

TOP = 127  # the largest code; -128 is not used, so that both signs reach equally far
SMALLEST = 1e-30  # amax of a row of zeros, whose codes are zeros whatever it is divided by
PATCH = 2**19  # numbers of x that are quantised at a time on a CPU: intermediate results stay in its cache
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def row_peaks(x_ND: Tensor) -> Tensor:
    """(N, 1) largest absolute values. A row with a NaN has NaN, one with an infinity that or NaN."""
    bits = _BITS.get(x_ND.dtype)
    if bits is None or x_ND.device.type != "cpu":
        return x_ND.abs().amax(-1, keepdim=True)
    # Without their sign, floating-point numbers are in the order of the integers of the same bits; torch's
    # maximum of integers is several times as fast.
    return (x_ND.view(bits) & torch.iinfo(bits).max).amax(-1, keepdim=True).view(x_ND.dtype)


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (N, D), and scales (N, 1), bfloat16 for bfloat16 and float32 for others.

    codes * scales differs from x by half a scale at most. A scale rounded to bfloat16 is off by 1 / 256 at
    most, so that the largest code stays below 127.5.
    """
    kind = torch.bfloat16 if x_ND.dtype == torch.bfloat16 else torch.float32
    scales_N1 = row_peaks(x_ND).float().clamp_(min=SMALLEST).div_(TOP).to(kind)
    factors_N1 = scales_N1.float().reciprocal()
    codes_ND = torch.empty(x_ND.shape, dtype=torch.int8, device=x_ND.device)
    rows = max(PATCH // x_ND.shape[1], 1) if x_ND.device.type == "cpu" else len(x_ND)
    for start in range(0, len(x_ND), rows or 1):
        part = slice(start, start + rows)
        codes_ND[part].copy_((x_ND[part] * factors_N1[part]).round_())
    return codes_ND, scales_N1


# Products: codes of x (N, D) times packed codes of W, times the scales of W: (N, O) of the type asked for


def _onednn_product(codes_ND: Tensor, packed: Tensor, scales_O: Tensor, kind: torch.dtype) -> Tensor:
    # oneDNN has fast kernels for unsigned x only: with signed codes it takes its reference code, a thousand
    # times slower. Turning the highest bit adds 128, which is the zero point then.
    unsigned_ND = codes_ND.view(torch.uint8).bitwise_xor_(128)
    zeros_O = torch.zeros_like(scales_O, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned_ND, 1.0, 128, packed, scales_O, zeros_O, None, 1.0, 0, kind, "none", [], ""
    )


def _cuda_product(codes_ND: Tensor, packed: Tensor, scales_O: Tensor, kind: torch.dtype) -> Tensor:
    rows = len(codes_ND)
    if rows < 32:  # older releases of torch refuse up to 16; rows of zeros cost nothing there
        codes_ND = torch.cat([codes_ND, codes_ND.new_zeros(32 - rows, codes_ND.shape[1])])
    sums_NO = torch._int_mm(codes_ND, packed.t())[:rows]
    return (sums_NO * scales_O).to(kind)


def _plain_product(codes_ND: Tensor, packed: Tensor, scales_O: Tensor, kind: torch.dtype) -> Tensor:
    # Sums in float32, exact up to 2**24 and rounded beyond that
    return ((codes_ND.float() @ packed.float().t()) * scales_O).to(kind)


def _onednn_missing(device: torch.device, features: int, outputs: int) -> str | None:
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        # Not only slower: older instructions add pairs in 16 bits, which overflow
        return "this processor has no int8 instructions (avx512_vnni)"
    return None


def _cuda_missing(device: torch.device, features: int, outputs: int) -> str | None:
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if features % 8 or outputs % 8:
        return f"CUDA multiplies int8 matrices of sides that are multiples of 8, not {outputs} x {features}"
    return None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A row of the table."""

    multiply: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    pack: Callable[[Tensor], Tensor]  # (O, D) codes to what `multiply` takes
    unpack: Callable[[Tensor], Tensor]
    missing: Callable[[torch.device, int, int], str | None]  # why not there, for so many features and outputs
    summary: str
    fast: bool = True


def _same(codes_OD: Tensor) -> Tensor:
    return codes_OD


# Best first
PRODUCTS: Mapping[str, Product] = {
    "onednn": Product(
        multiply=_onednn_product,
        pack=lambda codes_OD: torch.ops.onednn.qlinear_prepack(codes_OD, None),
        unpack=lambda packed: packed.to_dense().t().contiguous(),
        missing=_onednn_missing,
        summary="oneDNN with the int8 instructions of the processor",
    ),
    "cuda": Product(
        multiply=_cuda_product, pack=_same, unpack=_same, missing=_cuda_missing, summary="cuBLAS in int8"
    ),
    "plain": Product(
        multiply=_plain_product,
        pack=_same,
        unpack=_same,
        missing=lambda *_: None,
        summary="float32 products of the int8 codes, slower than unquantised layers",
        fast=False,
    ),
}


def choose_product(device: torch.device, features: int, outputs: int) -> tuple[str, str]:
    """The name of the first product that can run there, and why those before it cannot, in words."""
    reasons = []
    for name, row in PRODUCTS.items():
        reason = row.missing(device, features, outputs)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(reason)
    raise AssertionError("the last product can run anywhere")


class Int8Linear(nn.Module):
    """`nn.Linear` in int8, for inference. What comes out has the type of what goes in."""

    codes: Tensor | None
    scales_O: Tensor

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OD = linear.weight.detach().float()
        peaks_O1 = weight_OD.abs().amax(1, keepdim=True).clamp_(min=SMALLEST)
        # While they are packed, there is only that copy of the codes
        self.register_buffer("codes", (weight_OD / (peaks_O1 / TOP)).round_().to(torch.int8))
        self.register_buffer("scales_O", peaks_O1[:, 0] / TOP)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.product = ""
        self._packed: Tensor | None = None
        self._pack()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "int8 layers pass no gradients; train the network as it was before quantize_linears"
            )
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if self._packed is None:  # a copy, or read from a pickle
            self._pack()
        codes_ND, scales_N1 = quantize_rows(x.reshape(-1, self.in_features))
        kind = scales_N1.dtype
        y_NO = PRODUCTS[self.product].multiply(codes_ND, self._packed, self.scales_O, kind)
        if self.bias is None:
            y_NO.mul_(scales_N1)
        else:
            torch.addcmul(self.bias.to(kind), y_NO, scales_N1, out=y_NO)
        return y_NO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def weight_OD(self) -> Tensor:
        """The weights that are computed with, in float32."""
        codes_OD = self.codes if self._packed is None else PRODUCTS[self.product].unpack(self._packed)
        return codes_OD.float() * self.scales_O[:, None]

    def _pack(self) -> None:
        codes_OD = self.codes
        if codes_OD is None or codes_OD.is_meta:
            return
        self.product, _ = choose_product(codes_OD.device, self.in_features, self.out_features)
        self._packed, self.codes = PRODUCTS[self.product].pack(codes_OD), None

    def _unpack(self) -> None:
        if self._packed is not None:
            self.codes, self._packed = PRODUCTS[self.product].unpack(self._packed), None

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """`to` and its like. The scales stay float32 in every type of network."""
        self._unpack()
        scales_O = self.scales_O
        super()._apply(fn, recurse)
        self.scales_O = scales_O.to(self.scales_O.device)
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: packed weights can be neither copied nor pickled."""
        state = self.__dict__.copy()
        if self._packed is not None:
            codes_OD = PRODUCTS[self.product].unpack(self._packed)
            state |= {"_packed": None, "_buffers": {**self._buffers, "codes": codes_OD}}
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise ValueError(
            f"{prefix.rstrip('.') or 'this layer'} is quantised to int8: its weights are no longer those it "
            "was loaded with, and a file of them would pass for the original; save before quantize_linears"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        raise ValueError(
            f"{prefix.rstrip('.') or 'this layer'} is quantised to int8; load into a network that is not"
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.product}"


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize_linears` did."""

    layers: tuple[str, ...]  # by their names in the model
    kept: Mapping[str, str]  # linear layers left as they were, and why
    product: str  # how they are multiplied: a key of PRODUCTS, several joined by +
    bytes_before: int  # of the weights of the replaced layers
    bytes_after: int


@torch.no_grad()
def quantize_linears(model: nn.Module, *, smallest: int | None = None) -> Quantized:
    """Replace the linear layers of the model's transformer blocks by int8 ones, in place.

    `smallest`: layers with fewer features than that, in or out, are left; None takes LEAST_FEATURES. The
    model can afterwards be moved and converted, but not saved, trained or merged with an adapter. Adapters
    are merged, and projections joined, before.

    Raises ValueError, and changes nothing, for a model that has nothing to replace.
    """
    smallest = LEAST_FEATURES if smallest is None else smallest
    name = type(model).__name__
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(f"this {name} is quantised to int8 already")
    chosen: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        reason = _kept(path, module, smallest)
        if reason is None:
            chosen[path] = module
        else:
            kept[path] = reason
    if not chosen:
        why = "; ".join(sorted(set(kept.values()))) or "it has no linear layers that are not packed"
        raise ValueError(f"this {name} has no layers that could be int8: {why}")
    before = sum(layer.weight.nbytes for layer in chosen.values())
    parameters = sum(layer.weight.numel() for layer in chosen.values())
    products: dict[str, str] = {}
    for path, layer in chosen.items():
        device = layer.weight.device
        product, reasons = choose_product(device, layer.in_features, layer.out_features)
        if product not in products and not PRODUCTS[product].fast:
            log.warning("int8 layers on %s: %s (%s)", device.type, PRODUCTS[product].summary, reasons)
        products[product] = reasons
        name_of_parent, _, own = path.rpartition(".")
        parent = model.get_submodule(name_of_parent)
        setattr(parent, own, Int8Linear(layer))
        if isinstance(parent, Gelu):
            # In bfloat16 on a CPU torch's exact GELU takes a quarter of the time of its approximation by
            # tanh. The two differ by 5e-4 at most; codes of what follows are tens of times as far apart.
            parent.approximate = "none"
    done = Quantized(
        layers=tuple(chosen),
        kept=kept,
        product="+".join(products),
        bytes_before=before,
        bytes_after=parameters + 4 * sum(layer.out_features for layer in chosen.values()),
    )
    log.info("%s: %d linear layers in int8 (%s), %d left", name, len(chosen), done.product, len(kept))
    return done


def _kept(path: str, layer: nn.Linear, smallest: int) -> str | None:
    if not BLOCKS.search(path):
        return "outside the blocks: runs once, or its errors show directly"
    for pattern, reason in KEPT.items():
        if re.search(pattern, path):
            return reason
    if min(layer.in_features, layer.out_features) < smallest:
        return f"fewer than {smallest} features: nothing to gain"
    return None


# Where repeated blocks are, by the names of the modules that hold them
BLOCKS = re.compile(r"(^|\.)(transformer_blocks|controlnet_blocks)\.\d+\.")
# Layers of blocks that stay, by their names
KEPT: Mapping[str, str] = {
    r"\.norm\d?\.linear$": "adaLN: scales and shifts every token, and runs once for all steps",
    r"\.attn2\.to_[kv]$": "keys and values of the text: run once per picture",
    r"\.(before|after)_proj$": "joins a control branch to its base: errors go into every token",
}
# With fewer, rounding and scaling take longer than the product gains (512 tokens, bfloat16, AVX-512 VNNI)
LEAST_FEATURES = 384
