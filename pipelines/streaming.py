"""Networks larger than memory: every large layer is read when it is called, and forgotten afterwards.

For networks that run once per picture, as a text encoder does. The file stays mapped; what is in memory at a
time is one layer's weight in the wanted dtype, wherever the layer is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.network import Network, finite

LARGE = 1 << 16  # numbers in a layer, from which on it is not kept


def stream(
    network: Network,  # on the meta device
    state: Mapping[str, Tensor],  # as read from the file, names as the network's
    dtype: torch.dtype | None,  # None: as in the file
    device: torch.device | str | None,  # where to compute
    source: Any,  # what an error names
) -> None:
    """Fill the network: small tensors at once, the weights of large layers at each call.

    Its results are those of the network loaded as a whole. It cannot be saved, moved or trained.
    """
    device = torch.device("cpu" if device is None else device)
    network.streamed_on = device
    kept = dict(state)
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding) or layer.weight.numel() < LARGE:
            continue
        key = f"{name}.weight"
        _on_call(network, layer, key, kept.pop(key), dtype, device, source)
    for key, tensor in kept.items():
        finite(key, tensor, source)
    ready = {key: network.cast(key, tensor, dtype, device) for key, tensor in kept.items()}
    network.load_state_dict(ready, strict=False, assign=True)


def _on_call(
    network: Network,
    layer: nn.Module,
    key: str,
    stored: Tensor,
    dtype: torch.dtype | None,
    device: torch.device,
    source: Any,
) -> None:
    absent = nn.Parameter(network.cast(key, stored.to("meta"), dtype, None), requires_grad=False)
    layer.weight = absent

    def read(*_: Any) -> None:
        finite(key, stored, source)
        layer.weight = nn.Parameter(network.cast(key, stored, dtype, device), requires_grad=False)

    def forget(*_: Any) -> None:
        layer.weight = absent

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(forget, always_call=True)
