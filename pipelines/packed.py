"""Linear layers whose weights lie in the order in which oneDNN's CPU kernels read them.

torch brings the weight of an `nn.Linear` into that order again at each call. Done once, a product in float32
takes a quarter less time than MKL's at the same error; in bfloat16 little is won by it, but a following GELU
then costs nothing, and that is much: see benchmarks/README.md.

Packed weights are for inference on a CPU. `state_dict` gives the plain ones, so a packed network is saved as
ever; loading into it or merging an adapter into it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.layers import linear_of

DTYPES = (torch.float32, torch.bfloat16)


def missing(dtype: torch.dtype) -> str | None:
    """Why weights of this type cannot be packed here, or None."""
    if dtype not in DTYPES:
        return f"there are no packed weights in {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no instructions for bfloat16"
    return None


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight, and with GELU behind it where `gelu` names its form."""

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        """Raises ValueError where weights cannot be packed, and for those that are not on the CPU."""
        super().__init__()
        weight = linear.weight.detach()
        reason = missing(weight.dtype)
        if weight.device.type != "cpu":
            reason = f"weights on {weight.device} cannot be packed, only those on the CPU"
        if reason:
            raise ValueError(reason)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = gelu
        # Not buffers: they can be neither moved nor converted, and have another order than their names say
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._after = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, *self._after)

    def plain(self) -> nn.Linear:
        """The layer as it was, without the GELU."""
        return linear_of(self._packed.to_dense(), self._bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._packed.to_dense()
        if self._bias is not None:
            destination[f"{prefix}bias"] = self._bias

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        raise ValueError(f"{prefix.rstrip('.')} is packed for inference; load into an unpacked network")

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """`to` and its like: allowed when they change nothing."""
        probe = torch.empty(0, dtype=self.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise ValueError(
                f"a network packed for inference on the CPU in {self.dtype} cannot become {moved.dtype} on "
                f"{moved.device}; load it anew, or call pipelines.lean.restore first"
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self._packed.dtype

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}, gelu={self.gelu}"
