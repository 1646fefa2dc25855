"""Where rank is spent, at equal size: every allocation, three seeds, on the two real models.

python benchmarks/allocation.py stories260k
python benchmarks/allocation.py wiki-llama-8m

A seed draws the calibration text (wiki-llama-8m), the labels of the curvature, the validation samples and the search.
Give --run-dir to keep what is finished: the same command then goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import BudgetError
from rankwise.evaluation import perplexity
from rankwise.progress import Reporter
from rankwise.recipes import Evaluation, recipe_from
from rankwise.stages import read_sequences

KEEPS = {"stories260k": (0.9, 0.8, 0.7), "wiki-llama-8m": (0.6, 0.4, 0.25)}
SEEDS = (0, 1, 2)
LORD = {
    "name": "manual",
    "roles": {"q": 0.7, "k": 0.7, "v": "dense", "o": 0.8, "gate": 0.8, "up": 0.8, "down": 0.8},
}
LOW_DAMPING = {"name": "two_sided", "damping": 0.1}
ROWS: dict[str, list[tuple[str, Any, Any]]] = {
    "stories260k": [
        ("bolaco, uniform", "bolaco", "uniform"),
        ("bolaco, LoRD manual", "bolaco", LORD),
        ("bolaco, bayesian:5x1", "bolaco", "bayesian:5x1"),
        ("two_sided, uniform", "two_sided", "uniform"),
        ("two_sided, spectral", "two_sided", "spectral"),
        ("two_sided, bayesian:spectral", "two_sided", "bayesian:spectral"),
        ("two_sided (damping 0.1), spectral", LOW_DAMPING, "spectral"),
        ("two_sided (damping 0.1), bayesian:spectral", LOW_DAMPING, "bayesian:spectral"),
    ],
    "wiki-llama-8m": [
        ("bolaco, uniform", "bolaco", "uniform"),
        ("bolaco, LoRD manual", "bolaco", LORD),
        ("two_sided, uniform", "two_sided", "uniform"),
        ("two_sided, spectral", "two_sided", "spectral"),
        ("two_sided, bayesian:spectral", "two_sided", "bayesian:spectral"),
        ("bolaco, bayesian:5x1", "bolaco", "bayesian:5x1"),
        ("bolaco, bayesian:5x4", "bolaco", "bayesian:5x4"),
    ],
}


def validation(model: str, shared: Path) -> dict[str, Any]:
    """Validation samples: 32 sequences of 256 tokens that neither calibration nor evaluation uses."""
    if model == "stories260k":
        tokens = f"tokens:{shared}/data/stories260k.tokens.safetensors"
        return {"source": tokens, "skip": 192, "sequences": 32, "sample": "first"}
    return {"source": f"text:{shared}/data/wikitext2.valid.txt", "sequences": 32, "length": 256, "bos": "never"}


def measure(model: str, shared: Path, run_directory: Path, **changes: Any) -> dict[str, Any]:
    """Compress once and score on every text; `changes` are keys of the recipe.

    Returns:
        Perplexity by text, seconds, and the report's account of the search. Only `infeasible` when nothing fits.
    """
    calibration, texts = protocols(model, shared)
    recipe = recipe_from(
        {
            "model": str(shared / "models" / model),
            "calibration": calibration,
            "validation": validation(model, shared),
            **changes,
        }
    )
    started = time.monotonic()
    try:
        result = compress(recipe, run_directory=run_directory, reporter=Reporter(show=False))
    except BudgetError as problem:
        return {"infeasible": problem.problem}
    seconds = time.monotonic() - started
    search = result.report.search
    return {
        "kept": result.plan.kept,
        "perplexity": {text: score(result.model.float(), recipe.model, settings) for text, settings in texts.items()},
        "seconds": seconds,
        "search": None if search is None else search.model_dump(mode="json"),
    }


_TEXTS: dict[str, Any] = {}


def score(model: Any, source: str, settings: dict[str, Any]) -> float:
    """Perplexity of a model in memory on one text, tokenized once."""
    key = json.dumps([source, settings], sort_keys=True)
    if key not in _TEXTS:
        evaluation = Evaluation(**settings)
        _TEXTS[key] = read_sequences(evaluation, load_model(source), evaluation.seed, evaluation.skip).ids
    return perplexity(model, _TEXTS[key], batch_size=16).perplexity


class Kept:
    """Figures that are finished, in a file, so that a stopped benchmark goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def get(self, label: dict[str, Any]) -> dict[str, Any] | None:
        return next((f for f in self.figures if all(f.get(k) == v for k, v in label.items())), None)

    def add(self, figure: dict[str, Any]) -> None:
        self.figures.append(figure)
        self.path.write_text(json.dumps(self.figures))


def cell(figures: list[dict[str, Any]], text: str) -> str:
    """Mean and half the range over seeds; says when not all seeds are finished."""
    if not figures:
        return "-"
    if any("infeasible" in f for f in figures):
        return "infeasible"
    values = [f["perplexity"][text] for f in figures]
    fewer = "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
    return f"{statistics.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}{fewer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(KEEPS))
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--write", action="store_true", help="only write the table of what is finished in --run-dir")
    arguments = parser.parse_args()
    model, shared = arguments.model, shared_directory()
    folder = arguments.run_dir or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / f"allocation-{model}.json")
    for seed in () if arguments.write else SEEDS:
        for row, method, allocation in ROWS[model]:
            for keep in KEEPS[model]:
                label = {"row": row, "keep": keep, "seed": seed}
                if kept.get(label) is None:
                    budget = {"keep": keep, "rank_multiple": 1, "storage": "two_factor"}
                    found = measure(
                        model, shared, folder / "run", method=method, allocation=allocation, budget=budget, seed=seed
                    )
                    kept.add({**label, **found})
                    print(label, found.get("perplexity", "infeasible"), flush=True)
    _, texts = protocols(model, shared)
    source = str(shared / "models" / model)
    parts = []
    dense = {text: score(load_model(source).model, source, settings) for text, settings in texts.items()}
    for text in texts:
        parts.append(f"{text}, dense {dense[text]:.2f}:\n")
        rows = [
            [row]
            + [cell([f for f in kept.figures if (f["row"], f["keep"]) == (row, keep)], text) for keep in KEEPS[model]]
            for row, _, _ in ROWS[model]
        ]
        parts.append(markdown_table(["method, allocation", *(f"keep {keep}" for keep in KEEPS[model])], rows) + "\n")
    infeasible = {f["infeasible"] for f in kept.figures if "infeasible" in f}
    parts += [f"Infeasible: {problem}\n" for problem in sorted(infeasible)]
    parts.append("Mean over three seeds, ± half the range. Two-factor storage, rank multiple 1, 50 trials a search.")
    title = f"Perplexity by allocation, {model}"
    command = f"python benchmarks/allocation.py {model}"
    write_result(f"allocation-{model}", title, command, "\n".join(parts), {"dense": dense, "runs": kept.figures})


if __name__ == "__main__":
    main()
