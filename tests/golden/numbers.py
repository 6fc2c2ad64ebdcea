"""Golden sets: folders with a meta.json and arrays measured on the official implementations.

Weights and inputs are not stored. Both are made from names, by the rules that meta.json states; so a set is
small, and another set differs by its salt, its sizes and its configurations.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(os.environ.get("GEN_GOLDEN_DIR") or Path(__file__).parent / "data")
FORWARD, SAMPLING = 2e-5, 2e-4  # of max |difference| / max(1, max |reference|)


@functools.cache
def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def folders() -> list[Path]:
    """Every folder of the set that holds a meta.json; the root itself may be one."""
    return sorted(path.parent for path in ROOT.rglob("meta.json"))


@dataclass
class Case:
    folder: Path
    name: str
    entry: dict[str, Any]
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        return self.entry["model"]

    @property
    def inputs(self) -> dict[str, Any]:
        return self.entry.get("inputs", {})

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / self.entry["file"]) as file:
            return {name: file[name] for name in file.files}

    def z(self, name: str, shape: Any) -> torch.Tensor:
        """The standard normal numbers of this name."""
        salt = read_meta(self.folder).get("salt", "")
        seed = zlib.crc32((salt + name).encode("utf-8"))
        drawn = np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
        return torch.from_numpy(drawn)

    def named(self, key: str, shape: Any, index: int | None = None) -> torch.Tensor:
        """The input `key`: its description says which name its numbers have."""
        name = re.search(r"z\('([^']+)'", self.inputs[key])[1]
        if index is not None:
            name = re.sub(r"\.k$", f".{index}", name)
        return self.z(name, shape)

    def number(self, pattern: str, *keys: str) -> float:
        """The number that `pattern` finds in the descriptions of these inputs."""
        text = " ".join(str(self.inputs.get(key, "")) for key in keys)
        return float(re.search(pattern, text)[1])

    def shapes(self) -> dict[str, list[int]] | None:
        """Official names and shapes, where the case lists them."""
        listed = self.entry.get("state_dict")
        if isinstance(listed, str):
            try:
                listed = ast.literal_eval(listed)
            except (SyntaxError, ValueError):  # "as <case>"
                other = read_meta(self.folder)["cases"].get(listed.split()[-1], {})
                listed = other.get("state_dict")
        return listed

    def fill(self, shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A state dict of these names and shapes."""
        return {name: self._tensor(name, shape) for name, shape in shapes.items()}

    def _tensor(self, name: str, shape: Any) -> torch.Tensor:
        last = name.rpartition(".")[2]
        if name.endswith("pos_embed"):
            return torch.zeros(tuple(shape))  # a table that every network computes
        z = self.z(name, shape)
        ends = ("embedding_table.weight", "y_embedding", "scale_shift_table")
        if name.endswith(ends) or last.startswith("rel_pos_"):
            return 0.5 * z
        if len(shape) == 1 and re.search(r"(^|[.])[a-z_]*norm[.]weight$", name):
            return 1 + 0.1 * z
        if len(shape) == 1:
            return 0.1 * z
        return z * torch.tensor(1 / math.sqrt(math.prod(shape[1:])), dtype=torch.float32)

    def check(self, key: str, found: Any, tolerance: float = FORWARD) -> None:
        """Compare with the stored array `key`."""
        wanted = np.asarray(self.arrays[key], dtype=np.float64)
        got = np.asarray(torch.as_tensor(found).detach().cpu(), dtype=np.float64)
        assert got.shape == wanted.shape, f"{key}: {got.shape}, not {wanted.shape}"
        if not wanted.size:
            return
        error = np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max())
        assert error <= tolerance, f"{key}: relative error {error:.2g}, allowed {tolerance:.2g}"

    def check_any(self, found: dict[str, Any], tolerance: float = FORWARD) -> None:
        """Compare every stored array; one that nothing was computed for is a failure."""
        unknown = self.arrays.keys() - found.keys()
        assert not unknown, f"nothing computes {sorted(unknown)}"
        for key in self.arrays:
            self.check(key, found[key], tolerance)


def cases() -> list[Case]:
    """Every case of every folder. A meta.json without a table of cases has one entry for each file."""
    made = []
    for folder in folders():
        meta = read_meta(folder)
        entries = meta.get("cases") or {k: v for k, v in meta.items() if (folder / f"{k}.npz").exists()}
        made += [Case(folder, name, entry) for name, entry in entries.items()]
    return made


def listed(value: Any) -> list[int]:
    """The first list of numbers in a description such as "first [12, 5] tokens of each row are 1"."""
    return ast.literal_eval(re.search(r"\[[^\]]*\]", value)[0]) if isinstance(value, str) else list(value)
