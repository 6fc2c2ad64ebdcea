"""dit-3d:toy with its 50 steps against the published walk of 1000: does the short one lose anything?

Same classes and seeds, the same held-out shapes. Slow: 1000 steps of 96 clouds take minutes on a CPU.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from gen.point_metrics import compare_sets
from gen.toy import dit3d
from gen.toy.cloud_judge import load_judge, read
from gen.toy.models3d import NAMES, cloud, shapes
from pipelines.dit3d import PUBLISHED, DiT3DPipeline
from pipelines.schedulers import STORED
from weights import store

FAMILIES = ("airplane", "car", "chair")
WALKS = {STORED: 50, PUBLISHED: 1000}  # scheduler -> steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="clouds of each family")
    count = parser.parse_args().count
    pipeline = DiT3DPipeline.from_pretrained(store.find("dit-3d-toy"), torch_dtype=torch.float32).prepare()
    judge = load_judge(store.find("cloud-judge-toy"))
    labels = [NAMES.index(name) for name in FAMILIES for _ in range(count)]
    held_out = [
        torch.from_numpy(np.stack([_held_out(NAMES.index(name), index) for index in range(count)]))
        for name in FAMILIES
    ]
    print(
        "| walk | seconds a cloud | class | 1-NNA-CD | mean | COV-CD | mean |\n|---|---|---|---|---|---|---|"
    )
    for name, steps in WALKS.items():
        began = time.perf_counter()
        made = dit3d.draw(pipeline, labels, range(len(labels)), steps=steps, scheduler=name)
        seconds = (time.perf_counter() - began) / len(labels)
        right = (read(judge, made)[0] == torch.tensor(labels)).float().mean().item()
        scores = [compare_sets(own, truth) for own, truth in zip(made.split(count), held_out, strict=True)]
        row = [f"{name}, {steps} steps", f"{seconds:.2f}", f"{right:.1%}"]
        for key in ("CD_1nn_acc", "CD_cov"):
            values = [100 * one[key] for one in scores]
            row += [" / ".join(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f} %"]
        print("| " + " | ".join(row) + " |", flush=True)


def _held_out(family: int, index: int) -> np.ndarray:
    shape = next(shapes("steps", start=family + index * len(NAMES)))
    return cloud(shape, dit3d.POINTS, 900_000 + index)[0]


if __name__ == "__main__":
    main()
