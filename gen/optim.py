"""Muon for matrices, AdamW for the rest, in one optimizer whose state is plain tensors.

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest semi-orthogonal matrix, found by a
quintic Newton-Schulz iteration; the update is scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's
learning rate and weight decay carry over (Liu et al. 2025, arXiv:2502.16982, equation 4). It is written
here rather than taken from torch because torch's always iterates in bfloat16, which is slow on CPUs without
units for it, and cannot share the work between processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def bfloat16_units(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if torch.device(device).type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(n, rows, columns) -> the same shape, singular values pushed to about 1 by `steps` of Newton-Schulz.

    The iteration forgives rounding: bfloat16 in, bfloat16 throughout."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """`matrices` are stepped by Muon, `others` by AdamW with `lr * others_lr`. With torch.distributed
    initialised every process holds equal gradients and orthogonalises its share of the matrices."""

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        others_lr: float = 1.0,
    ) -> None:
        groups = [
            {"params": list(matrices), "muon": True, "scale": 1.0},
            {"params": list(others), "muon": False, "scale": others_lr},
        ]
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "momentum": momentum}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group, group["lr"] * group["scale"])

    def _muon(self, group: dict, lr: float) -> None:
        shares = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        dtype = torch.bfloat16 if bfloat16_units(group["params"][0].device) else torch.float32
        updates: dict[torch.nn.Parameter, torch.Tensor] = {}
        flat = None
        if shares > 1:
            total = sum(p.numel() for ps in by_shape.values() for p in ps)
            flat = torch.zeros(total, device=group["params"][0].device)
        offset = 0
        for params in by_shape.values():
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, [p.grad for p in params], 1 - group["momentum"])
            mine = list(range(rank, len(params), shares))
            if mine:
                # Nesterov: look one step ahead
                ahead = torch.stack(
                    [params[i].grad.lerp(buffers[i], group["momentum"]).flatten(1) for i in mine]
                )
                done = dict(zip(mine, orthogonalise(ahead.to(dtype)), strict=True))
            else:
                done = {}
            for i, p in enumerate(params):
                if flat is None:
                    updates[p] = done[i].view_as(p)
                else:
                    view = flat[offset : offset + p.numel()].view_as(p)
                    if i in done:
                        view.copy_(done[i].view_as(p))
                    updates[p] = view
                    offset += p.numel()
        if flat is not None:
            dist.all_reduce(flat)
        for p, update in updates.items():
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update.to(p.dtype), alpha=-lr * 0.2 * max(len(p), p[0].numel()) ** 0.5)

    def _adamw(self, group: dict, lr: float) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "mean" not in self.state[p]:
                self.state[p].update(
                    mean=torch.zeros_like(p),
                    square=torch.zeros_like(p),
                    count=torch.zeros((), device=p.device),
                )
        if not params:
            return
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params]
        means = [self.state[p]["mean"] for p in params]
        squares = [self.state[p]["square"] for p in params]
        counts = [self.state[p]["count"] for p in params]
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        count = counts[0]  # tensors all the way, so that a captured CUDA graph stays right
        denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**count))
        torch._foreach_add_(denominators, 1e-8)
        steps = torch._foreach_div(torch._foreach_div(means, 1 - beta1**count), denominators)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, steps, alpha=-lr)


def split_parameters(module: torch.nn.Module, inside: Iterable[str]) -> tuple[list, list]:
    """Matrices (and convolutions, as matrices of one row per output) whose names start with one of
    `inside`, and every other trainable parameter."""
    matrices, others = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (
                matrices
                if p.ndim in (2, 4) and name.startswith(tuple(inside)) and min(p.flatten(1).shape) > 8
                else others
            ).append(p)
    return matrices, others
