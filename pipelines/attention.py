"""Attention functions: the table, and how a model is given one.

A function takes queries (B, H, N, K), keys and values (B, H, L, K) and a mask that broadcasts to (B, H, N,
L), True where a query may look, or None. It returns (B, H, N, K). `math` is the twin the others are tested
against. The choice is stored on the modules, so that no environment variable and no global decides about a
picture.

`auto` is `sdpa`, except where the table has rivals for the device and the type, and there is so much to
compute that a choice can pay: there a short trial decides, see `pipelines.attention_trial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.attention_kernels import (
    cudnn_attention,
    flash2_attention,
    flash3_attention,
    heads_attention,
    math_attention,
    needs_gradient,
    sage_attention,
    sdpa_attention,
    torch_flash_attention,
    xformers_attention,
)
from pipelines.attention_trial import BROKEN, Attend, Given, decide, relative_error, remember

__all__ = [
    "ATTENTION",
    "Attend",
    "Backend",
    "Row",
    "chosen",
    "math_attention",
    "remember",
    "sdpa_attention",
    "set_attention",
    "survey",
    "usable",
]

WORTH = 2**19  # scores, B H N L: with fewer a trial of `auto` cannot pay


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """A row of the table. Where nothing else is said, the function takes anything."""

    attend: Attend
    summary: str
    package: str | None = None  # to import
    install: str = ""  # how to get it
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    masks: bool = True
    widest: int | None = None  # head
    error: float = 0.02  # relative, that a first small call may have: it tells broken from working
    rivals: Mapping[str, tuple[torch.dtype, ...]] | None = None  # devices and types where `auto` tries it

    def missing(self, device: str | None = None) -> str | None:
        """Why it cannot run here on the device (by default the fastest there is), or None.

        Optional packages are imported for that and called once.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        reasons = []
        if self.devices is not None and device not in self.devices:
            reasons.append(f"it runs on {' or '.join(self.devices)}, not on {device}")
        if self.package is not None and find_spec(self.package) is None:
            reasons.append(f"{self.package} is not installed ({self.install})")
        if not reasons and self.devices is not None:
            return _broken(self, device)
        return "; ".join(reasons) or None

    def refuses(self, device: str, dtype: torch.dtype, width: int = 0, masked: bool = False) -> str | None:
        """Why it cannot take such arguments, or None."""
        if self.devices is not None and device not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {_words(self.dtypes)}, not {_words([dtype])}"
        if masked and not self.masks:
            return "it takes no mask"
        if self.widest is not None and width > self.widest:
            return f"it takes heads up to {self.widest} wide, not {width}"
        return None

    @property
    def limits(self) -> str:
        """Where it can run, in words."""
        return ", ".join(
            (
                " or ".join(self.devices or ("any device",)),
                _words(self.dtypes) if self.dtypes else "any type",
                "masks" if self.masks else "no masks",
                f"heads up to {self.widest} wide" if self.widest else "heads of any width",
            )
        )


def _checked(name: str, attend: Attend, **columns: Any) -> Backend:
    """A row whose function says what it does not take, before a package fails at it."""

    def checked(q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
        masked = mask is not None
        reason = row.refuses(q_BHNK.device.type, q_BHNK.dtype, q_BHNK.shape[-1], masked)
        if reason is not None:
            raise ValueError(f"attention '{name}' cannot compute this: {reason}; choose 'auto' or 'sdpa'")
        return attend(q_BHNK, k_BHLK, v_BHLK, mask)

    row = Backend(attend=checked, **columns)
    return row


_HALVES = (torch.bfloat16, torch.float16)
_GPU: dict[str, Any] = {"devices": ("cuda",), "dtypes": _HALVES, "widest": 256, "rivals": {"cuda": _HALVES}}

ATTENTION = {
    "sdpa": Backend(attend=sdpa_attention, summary="torch's fused scaled dot product attention"),
    "math": Backend(attend=math_attention, summary="plain matrix products and softmax, for comparing"),
    "heads": _checked(
        "heads",
        heads_attention,
        summary="few heads at a time in blocks that stay in a CPU's cache",
        devices=("cpu",),
        dtypes=(torch.bfloat16, torch.float32),
        rivals={"cpu": (torch.bfloat16,)},  # in float32 it is slower than `sdpa` at every size measured
    ),
    "cudnn": _checked("cudnn", cudnn_attention, summary="the kernel of cuDNN, by way of torch", **_GPU),
    "torch-flash": _checked(
        "torch-flash",
        torch_flash_attention,
        summary="FlashAttention-2 as it comes with torch",
        masks=False,
        **_GPU,
    ),
    "flash2": _checked(
        "flash2",
        flash2_attention,
        summary="FlashAttention-2 from its authors' package",
        package="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        masks=False,
        **_GPU,
    ),
    "flash3": _checked(
        "flash3",
        flash3_attention,
        summary="FlashAttention-3, for Hopper GPUs",
        package="flash_attn_interface",
        install="build it in the folder hopper of github.com/Dao-AILab/flash-attention",
        masks=False,
        **_GPU,
    ),
    "xformers": _checked(
        "xformers",
        xformers_attention,
        summary="memory-efficient attention of xformers",
        package="xformers",
        install="pip install xformers",
        masks=False,
        **_GPU,
    ),
    "sage": _checked(
        "sage",
        sage_attention,
        summary="SageAttention: scores of 8 bits, less exact and never chosen by auto",
        package="sageattention",
        install="pip install sageattention",
        masks=False,
        error=0.1,
        **_GPU | {"widest": 128, "rivals": None},
    ),
}


# What diffusers' `set_attention_backend` calls them
DIFFUSERS_NAMES = {
    "native": "sdpa",
    "_native_math": "math",
    "_native_cudnn": "cudnn",
    "_native_flash": "torch-flash",
    "flash": "flash2",
    "_flash_3": "flash3",
    "xformers": "xformers",
    "sage": "sage",
}


class Row(NamedTuple):
    """Of the table, for people."""

    name: str
    summary: str
    limits: str
    missing: str | None  # why it cannot run here, or None


def survey(device: str | None = None) -> list[Row]:
    """The table, and what of it runs here on the device (by default the fastest there is).

    Takes seconds where a GPU is present: optional packages are imported then.
    """
    return [Row(name, row.summary, row.limits, row.missing(device)) for name, row in ATTENTION.items()]


def usable(device: str | None = None) -> list[str]:
    """Names of the functions that run on the device."""
    return [name for name, row in ATTENTION.items() if row.missing(device) is None]


def set_attention(model: nn.Module, name: str = "auto") -> str:
    """Give every attention layer of the model this function. The model should be on its device already.

    Returns the name; what `auto` means shows when it computes, see `chosen`. Raises ValueError for an
    unknown name, one that cannot run here or with this model, or a model that has no attention to set.
    """
    if name != "auto" and name not in ATTENTION:
        raise ValueError(f"no attention called '{name}'; there are auto, {', '.join(ATTENTION)}")
    reason = None if name == "auto" else _unfit(ATTENTION[name], model)
    if reason is not None:
        raise ValueError(f"attention '{name}' cannot run here: {reason}")
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "attend")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layers that could be set")
    attend = Auto() if name == "auto" else ATTENTION[name].attend
    for layer in layers:
        layer.attend = attend
    return name


def _unfit(row: Backend, model: nn.Module) -> str | None:
    first = next(model.parameters(), None)
    if first is None or first.is_meta:
        return row.missing()
    reason = row.missing(first.device.type)
    if reason is None and first.is_floating_point():
        reason = row.refuses(first.device.type, first.dtype)
    return reason


def chosen(model: nn.Module) -> dict[str, str]:
    """What the model's attention is computed with: numbers of tokens, looking and looked at, to names.

    With `auto` these are the sizes met so far, as in {"1024x1024": "heads", "1024x20": "sdpa"}; with any
    other function the one key is "all".
    """
    names = {row.attend: name for name, row in ATTENTION.items()}
    found: dict[str, set[str]] = {}
    for module in model.modules():
        attend: Any = getattr(module, "attend", None)
        if isinstance(attend, Auto):
            for size, name in attend.used():
                found.setdefault(size, set()).add(name)
        elif attend is not None:
            found.setdefault("all", set()).add(names.get(attend, "another function"))
    return {size: ", ".join(sorted(used)) for size, used in found.items()}


class Auto:
    """The function called `auto`, of one model."""

    def __init__(self) -> None:
        self._names: dict[tuple[Any, ...], str] = {}  # by form of the arguments

    def __call__(self, q_BHNK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():  # nothing can be measured there, and torch looks inside `sdpa`
            return sdpa_attention(q_BHNK, k_BHLK, v_BHLK, mask)
        trained = needs_gradient(q_BHNK, k_BHLK, v_BHLK)
        form = (*q_BHNK.shape, k_BHLK.shape[2], q_BHNK.dtype, q_BHNK.device, mask is not None, trained)
        name = self._names.get(form)
        if name is None:
            given = (q_BHNK, k_BHLK, v_BHLK, mask)
            name = self._names[form] = "sdpa" if trained else _fastest(given)
        return ATTENTION[name].attend(q_BHNK, k_BHLK, v_BHLK, mask)

    def used(self) -> list[tuple[str, str]]:
        """Sizes met so far, and names."""
        return [(f"{form[2]}x{form[4]}", name) for form, name in list(self._names.items())]


def _fastest(given: Given) -> str:
    q_BHNK, k_BHLK, _, mask = given
    if q_BHNK.shape[:3].numel() * k_BHLK.shape[2] < WORTH:
        return "sdpa"
    rivals = _rivals(q_BHNK.device.type, q_BHNK.dtype, q_BHNK.shape[-1], mask is not None)
    if not rivals:
        return "sdpa"
    return decide({name: ATTENTION[name].attend for name in ("sdpa", *rivals)}, given)


@cache
def _rivals(device: str, dtype: torch.dtype, width: int, masked: bool) -> tuple[str, ...]:
    """Names of the functions that `auto` compares with `sdpa`."""
    return tuple(
        name
        for name, row in ATTENTION.items()
        if row.rivals is not None
        and dtype in row.rivals.get(device, ())
        and row.refuses(device, dtype, width, masked) is None
        and row.missing(device) is None
    )


@cache
def _broken(row: Backend, device: str) -> str | None:
    """Why a small call fails, or None."""
    dtype = row.dtypes[0] if row.dtypes else torch.float32
    generator = torch.Generator().manual_seed(0)  # its own: a probe must not change anybody's noise
    q, k, v = torch.randn(3, 1, 2, 64, 64, generator=generator).to(device, dtype).unbind()
    try:
        error = relative_error(row.attend(q, k, v, None), (q, k, v, None))
    except BROKEN as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return f"it does not run on this {device}: {first}"
    return None if error <= row.error else f"what it computes on this {device} is wrong by {error:.1%}"


def _words(dtypes: Any) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
