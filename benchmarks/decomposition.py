"""Seconds to decompose one weight of each Llama-2-7B shape, random weights and random covariances.

python benchmarks/decomposition.py
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from common import markdown_table, write_result
from rankwise.linalg import InputMetric, OutputMetric, decompose

D, F = 4096, 11008
SHAPES = {"q, k, v, o": (D, D), "gate, up": (F, D), "down": (D, F)}


def covariance(d: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(d, d, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.01, d, dtype=torch.float64)
    return root @ root.T / d


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = covariance(D, generator), covariance(D, generator)
    rows, figures = [], []
    for roles, (m, n) in SHAPES.items():
        weight = torch.randn(m, n, dtype=torch.float64, generator=generator) / n**0.5
        for name in ("bolaco", "two_sided"):
            metric_seconds = 0.0
            metric = None
            if name == "two_sided":
                curvature = outputs if m == D else torch.block_diag(outputs, outputs, outputs[:2816, :2816])
                started = time.perf_counter()
                metric = OutputMetric.of(curvature[None], 0.1)
                metric_seconds = time.perf_counter() - started
                del curvature
            started = time.perf_counter()
            if n > D:
                found = decompose(weight, outputs=outputs, metric=metric)
            else:
                # A fresh metric each time: its root is part of the cost, though siblings share it in a run.
                found = decompose(weight, inputs=InputMetric(inputs), metric=metric)
            seconds = time.perf_counter() - started + metric_seconds
            del metric
            error = (found.left[:64] @ found.right - weight[:64]).abs().max().item()
            row = [roles, f"{m} x {n}", name, min(m, n), f"{seconds:.1f}", f"{error:.0e}"]
            rows.append(row)
            figures.append(
                dict(zip(("roles", "shape", "method", "eigenproblem", "seconds", "error"), row, strict=True))
            )
            print(*row, flush=True)
    body = (
        "float64. Bolaco and two_sided take the input covariance where inputs are fewer (attention, gate, up) and the "
        "output covariance for down. Error: largest deviation of the first 64 rows of L R from W at full rank.\n\n"
        + markdown_table(["roles", "shape", "method", "eigenproblem", "seconds", "error"], rows)
    )
    write_result(
        "decomposition", "Decomposition at Llama-2-7B shapes", "python benchmarks/decomposition.py", body, figures
    )


if __name__ == "__main__":
    main()
