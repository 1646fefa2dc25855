"""What collecting statistics costs on top of the bare forward pass, and what the released code's way costs.

    python benchmarks/calibration.py

Three passes over the same tokens in the same batches, in turn: the decoder alone; ours for method bolaco; and a hook on
every linear output that calls `torch.cov` for each sequence, which is how the paper's released code does it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import markdown_table, shared_directory, write_result
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.methods import Bolaco
from rankwise.models import Site, find_sites, share_inputs
from rankwise.statistics import collect

BATCH, ROUNDS = 8, 7


@torch.no_grad()
def bare_forward(model: Any, tokens: Tensor) -> None:
    for batch in tokens.split(BATCH):
        model.base_model(input_ids=batch, use_cache=False)


@torch.no_grad()
def covariance_of_every_output(model: Any, sites: list[Site], tokens: Tensor) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def watch(site: Site) -> Any:
        def hook(_module: Any, _arguments: Any, output: Tensor) -> None:
            for sequence in output:
                covariance = torch.cov(sequence.T)
                sums[site.name] = sums[site.name] + covariance if site.name in sums else covariance

        return site.module(model).register_forward_hook(hook)

    handles = [watch(site) for site in sites]
    bare_forward(model, tokens)
    for handle in handles:
        handle.remove()
    return sums


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    shared = shared_directory()
    loaded = load_model(str(shared / "models/wiki-llama-8m"))
    source = parse_source(f"text:{shared}/data/mix.calibration.txt")
    tokens = load_sequences(source, loaded.tokenizer, loaded.vocabulary, length=256, count=256, seed=0).ids
    sites = share_inputs(loaded.model, find_sites(loaded.model), tokens[:1])
    requests = Bolaco().requests()
    ways: dict[str, Callable[[], Any]] = {
        "bare forward of the decoder": lambda: bare_forward(loaded.model, tokens),
        "ours, method bolaco": lambda: collect(loaded.model, sites, tokens, requests, batch_size=BATCH),
        "torch.cov of every output": lambda: covariance_of_every_output(loaded.model, sites, tokens),
    }
    bare_forward(loaded.model, tokens[:32])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            times[name].append(seconds(work))
    bare = times["bare forward of the decoder"]
    rows, figures = [], {}
    for name, taken in times.items():
        ratios = [mine / its for mine, its in zip(taken, bare, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([name, f"{statistics.median(taken):.2f}", f"{statistics.median(ratios):.2f}", spread])
        figures[name] = {"seconds": taken, "ratios": ratios}
    body = (
        f"wiki-llama-8m, float32, {tokens.numel():,} tokens in batches of {BATCH} x {tokens.shape[1]}, {ROUNDS} rounds "
        "in turn; ratios to the bare forward of the same round.\n\n"
        + markdown_table(["pass", "median seconds", "median ratio", "range of ratios"], rows)
    )
    write_result("calibration", "Cost of calibration", "python benchmarks/calibration.py", body, figures)


if __name__ == "__main__":
    main()
