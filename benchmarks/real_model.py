"""Low rank on a real language model: what storage is worth, beside the published method.

python benchmarks/real_model.py

Needs `make real-model` and the shared texts. Finished rows stay in --run-dir; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from allocation import Kept
from common import ROOT, markdown_table, shared_directory, write_result
from mixed import LENGTH, MODELS, TEXTS, compare, path_of, texts_of
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

MODEL = "smollm2-135m"
KEEPS = (0.9, 0.8)
ROWS: dict[str, dict[str, Any]] = {
    "bolaco, uniform, two factors": {"method": "bolaco", "allocation": "uniform", "storage": "two_factor"},
    "two_sided, spectral, two factors": {"method": "two_sided", "allocation": "spectral", "storage": "two_factor"},
    "two_sided, spectral, auto": {"method": "two_sided", "allocation": "spectral", "storage": "auto"},
}


def measure(shared: Path, folder: Path, row: str, keep: float, texts: dict[str, Any]) -> dict[str, Any]:
    """One cell: perplexity, and KL to the original in nats a token."""
    settings = dict(ROWS[row])
    budget = {"keep": keep, "storage": settings.pop("storage")}
    text = f"text:{shared}/data/mix.calibration.txt"
    return scored(shared, folder / f"run-{MODEL}", text, MODELS[MODEL]["calibration"], texts, budget=budget, **settings)


def scored(
    shared: Path, run: Path, text: str, count: int, texts: dict[str, Any], gradients: int | None = None, **keys: Any
) -> dict[str, Any]:
    """Compress the model once, with so many sequences of a text and these keys of the recipe, and score it.

    Gradients are taken at so many of the sequences, at all where it is not said.
    """
    source = str(path_of(MODEL, shared))
    calibration: dict[str, Any] = {"source": text, "sequences": count, "gradient_sequences": gradients}
    calibration |= {"length": LENGTH, "batch_size": MODELS[MODEL]["batch"]}
    recipe = recipe_from({"model": source, "calibration": calibration, **keys})
    result = compress(recipe, run_directory=run, reporter=Reporter(show=False))
    dense, small = load_model(source).model, result.model.float()
    scores = {name: compare(dense, small, ids) for name, ids in texts.items()}
    return {
        "kept": result.plan.kept,
        "perplexity": {name: score[0] for name, score in scores.items()},
        "kl": {name: score[1] for name, score in scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "real")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    shared = shared_directory()
    kept = Kept(arguments.run_dir / "real-model.jsonl")
    texts = texts_of(MODEL, shared)
    if kept.get({"row": "dense"}) is None:
        dense = load_model(str(path_of(MODEL, shared))).model
        kept.add({"row": "dense", "perplexity": {name: compare(dense, dense, ids)[0] for name, ids in texts.items()}})
    for keep in KEEPS:
        for row in ROWS:
            label = {"row": row, "keep": keep}
            if kept.get(label) is None:
                kept.add({**label, **measure(shared, arguments.run_dir, row, keep, texts)})
                print(kept.get(label), flush=True)
    dense = kept.get({"row": "dense"})
    assert dense is not None
    rows = [["dense", *(f"{dense['perplexity'][text]:.2f}" for text in TEXTS for _ in KEEPS)]]
    for row in ROWS:
        cells = [kept.get({"row": row, "keep": keep}) or {} for keep in KEEPS]
        rows.append([row, *(f"{c['perplexity'][text]:.2f} ({c['kl'][text]:.3f})" for text in TEXTS for c in cells)])
    header = ["perplexity (KL to the original)", *(f"{text} {keep}" for text in TEXTS for keep in KEEPS)]
    body = (
        f"SmolLM2-135M-Instruct (`make real-model`), calibration {MODELS[MODEL]['calibration']} x {LENGTH} tokens of "
        f"mix.calibration, {MODELS[MODEL]['scored']} x {LENGTH} tokens of each text scored, rank multiple 8. The "
        "column says the text and the fraction kept.\n\n" + markdown_table(header, rows)
    )
    command = "python benchmarks/real_model.py"
    write_result("real_model", "Low rank on a real language model", command, body, kept.figures)


if __name__ == "__main__":
    main()
