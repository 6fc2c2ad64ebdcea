"""Networks larger than the memory they compute in: large layers are brought when they are called, and
forgotten afterwards.

`stream` leaves them in their file, one layer at a time: for networks that run once per picture, as a text
encoder does, and for any other where nothing else fits. `carry` keeps them in the computer's own memory and
brings whole blocks to a GPU, the next one while the present one computes.

Results are those of the network loaded as a whole. It cannot be saved, moved, trained or given an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.network import Network, finite

LARGE = 1 << 16  # numbers in a layer, from which on it is not kept
BLOCK = re.compile(r"(.*?\.\d+)\.")  # the block that a layer belongs to, by its name


def stream(
    network: Network,  # on the meta device
    state: Mapping[str, Tensor],  # as read from the file, names as the network's
    dtype: torch.dtype | None,  # None: as in the file
    device: torch.device | str | None,  # where to compute
    source: Any,  # what an error names
) -> None:
    """Fill the network: small tensors at once, the weights of large layers at each call.

    The file stays mapped; what is in memory at a time is one layer's weight in the wanted dtype.
    """
    device = torch.device("cpu" if device is None else device)
    kept = dict(state)
    for key, layer in _large(network).items():
        _on_call(network, layer, key, kept.pop(key), dtype, device, source)
    _keep(network, kept, dtype, device, source)


def carry(
    network: Network,  # on the meta device
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    source: Any,
) -> None:
    """Fill the network: small tensors where it computes, the large layers of a block only while it runs.

    Two blocks are there at a time. On a CUDA device the second is copied from pinned memory beside the
    computation of the first, on a stream of its own.
    """
    device = torch.device("cpu" if device is None else device)
    kept = dict(state)
    blocks: dict[str, dict[str, nn.Module]] = {}
    for key, layer in _large(network).items():
        found = BLOCK.match(key)
        blocks.setdefault(found.group(1) if found else key, {})[key] = layer
    groups = []
    for layers in blocks.values():
        group = []
        for key, layer in layers.items():
            stored = kept.pop(key)
            finite(key, stored, source)
            host = network.cast(key, stored, dtype, torch.device("cpu"))
            group.append((layer, host.pin_memory() if device.type == "cuda" else host))
        groups.append(group)
    Carousel(groups, device)
    _keep(network, kept, dtype, device, source)


class Carousel:
    """Groups of layers that take turns on the device, in a fixed order that repeats."""

    def __init__(self, groups: list[list[tuple[nn.Module, Tensor]]], device: torch.device) -> None:
        self.groups, self.device = groups, device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrived: dict[int, Any] = {}  # group that is there, or on its way -> when its copies are done
        for number, group in enumerate(groups):
            for layer, _ in group:
                layer.weight = _absent(layer.weight)
                layer.register_forward_pre_hook(lambda *_, number=number: self.enter(number))

    def enter(self, number: int) -> None:
        """Have this group there, the next on its way, and all others gone."""
        following = (number + 1) % len(self.groups)
        for other in self.arrived.keys() - {number, following}:
            self._leave(other)
        self._bring(number)
        self._wait(number)
        self._bring(following)

    def _bring(self, number: int) -> None:
        if number in self.arrived:
            return
        event = None
        if self.side is None:
            self._copy(number)
        else:
            # What the freed memory was used for must be over before it is written to
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                self._copy(number)
                event = self.side.record_event()
        self.arrived[number] = event

    def _copy(self, number: int) -> None:
        for layer, host in self.groups[number]:
            there = host.to(self.device, non_blocking=True, copy=True)
            layer.weight = nn.Parameter(there, requires_grad=False)

    def _wait(self, number: int) -> None:
        event = self.arrived[number]
        if event is None:
            return
        present = torch.cuda.current_stream(self.device)
        present.wait_event(event)
        for layer, _ in self.groups[number]:
            layer.weight.data.record_stream(present)
        self.arrived[number] = None

    def _leave(self, number: int) -> None:
        for layer, _ in self.groups[number]:
            layer.weight = _absent(layer.weight)
        del self.arrived[number]


def _large(network: Network) -> dict[str, nn.Module]:
    """Names of the weights that are not kept, and their layers."""
    return {
        f"{name}.weight": layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Embedding) and layer.weight.numel() >= LARGE
    }


def _keep(
    network: Network,
    kept: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    source: Any,
) -> None:
    for key, tensor in kept.items():
        finite(key, tensor, source)
    ready = {key: network.cast(key, tensor, dtype, device) for key, tensor in kept.items()}
    network.load_state_dict(ready, strict=False, assign=True)
    network.streamed_on = device


def _absent(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to("meta"), requires_grad=False)


def _on_call(
    network: Network,
    layer: nn.Module,
    key: str,
    stored: Tensor,
    dtype: torch.dtype | None,
    device: torch.device,
    source: Any,
) -> None:
    absent = _absent(network.cast(key, stored.to("meta"), dtype, None))
    layer.weight = absent

    def read(*_: Any) -> None:
        finite(key, stored, source)
        layer.weight = nn.Parameter(network.cast(key, stored, dtype, device), requires_grad=False)

    def forget(*_: Any) -> None:
        layer.weight = absent

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(forget, always_call=True)


OFFLOAD: Mapping[str, Any] = {"file": stream, "host": carry}  # where large layers stay -> how
