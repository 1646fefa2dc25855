"""Losses of Q alone, expected without rounding anything, beside those of rounding.

python benchmarks/estimates.py

Needs the shared models, and `make real-model`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import markdown_table, shared_directory, write_result
from mixed import LENGTH, MODELS, path_of
from rankwise import stages
from rankwise.checkpoints import load_model
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.runs import Run

EVERY = {"wiki-llama-8m": 1, "smollm2-135m": 9}
"""Of the sites of a model, which are looked at."""

CHOICES = (2, 3, 4)


def compare(model: str, shared: Path) -> dict[str, Any]:
    """Ratios of estimated to measured losses by bits, and seconds of both."""
    settings = MODELS[model]
    calibration = {
        "source": f"text:{shared}/data/mix.calibration.txt",
        "sequences": settings["calibration"],
        "length": LENGTH,
        "batch_size": settings["batch"],
        "bos": "never",
    }
    source = str(path_of(model, shared))
    recipe = recipe_from(
        {"model": source, "calibration": calibration, "method": "quantize", "budget": {"bits": 3.0}}
        | {"allocation": "spectral"}
    )
    reporter = Reporter(show=False)
    loaded = load_model(recipe.model)
    ratios: dict[int, list[float]] = {bits: [] for bits in CHOICES}
    seconds = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        texts = stages.read_texts(recipe, loaded, reporter, validate=False)
        work = stages.begin(recipe, Run(Path(folder)), loaded, texts, reporter)
        store = stages.collect_statistics(work)
        for site in work.sites[:: EVERY[model]]:
            weight, seen = stages.weight_and_statistics(work, store, site)
            started = time.perf_counter()
            estimates = recipe.method.estimates(weight, seen, CHOICES, stages.draw_for(work, site))
            seconds[0] += time.perf_counter() - started
            for bits in CHOICES:
                started = time.perf_counter()
                made = recipe.method.outlook(weight, seen, bits, stages.draw_for(work, site))
                seconds[1] += time.perf_counter() - started
                ratios[bits].append(float(estimates[bits] / made.basis.energy.sum()))
    return {"ratios": ratios, "seconds": seconds}


def main() -> None:
    shared = shared_directory()
    figures, rows = {}, []
    for model in EVERY:
        found = figures[model] = compare(model, shared)
        for bits, ratios in found["ratios"].items():
            off = [abs(ratio - 1) for ratio in ratios]
            rows.append(
                [
                    model,
                    str(bits),
                    str(len(ratios)),
                    f"{sum(ratios) / len(ratios):.3f}",
                    f"{sum(off) / len(off):.1%}",
                    f"{max(off):.1%}",
                ]
            )
        estimated, made = found["seconds"]
        rows.append([model, "all", "", "", "", f"{estimated / made:.2f} of the time"])
    body = "Estimated over measured loss of Q alone, by site; every ninth site of SmolLM2-135M.\n\n"
    body += markdown_table(["model", "bits", "sites", "mean ratio", "mean distance from 1", "largest"], rows)
    write_result(
        "estimates", "Losses of codes estimated without rounding", "python benchmarks/estimates.py", body, figures
    )


if __name__ == "__main__":
    main()
