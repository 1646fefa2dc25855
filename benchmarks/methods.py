"""Perplexity of every method at equal size, uniform allocation, on the two real models.

python benchmarks/methods.py stories260k
python benchmarks/methods.py wiki-llama-8m
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import markdown_table, shared_directory, write_result
from rankwise import compress
from rankwise.methods import FACTORISATIONS
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

KEEPS = {"stories260k": (0.879, 0.791, 0.684, 0.9, 0.8, 0.7), "wiki-llama-8m": (0.6, 0.4, 0.25)}


def protocols(model: str, shared: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Calibration settings, and evaluation settings by the name of the text."""
    if model == "stories260k":
        tokens = f"tokens:{shared}/data/stories260k.tokens.safetensors"
        return {"source": tokens, "sequences": 192, "sample": "first"}, {
            "sampled stories": {"source": tokens, "skip": 224}
        }
    scored = {"sequences": 160, "sample": "random", "seed": 1, "length": 256, "batch_size": 16, "bos": "never"}
    texts = {name: {"source": f"text:{shared}/data/{name}.txt", **scored} for name in ("wikitext2.test", "mix.heldout")}
    return {"source": f"text:{shared}/data/mix.calibration.txt", "sequences": 256, "length": 256, "bos": "never"}, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(KEEPS))
    model = parser.parse_args().model
    shared = shared_directory()
    calibration, texts = protocols(model, shared)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as run_directory:
        for method in FACTORISATIONS:
            for keep in KEEPS[model]:
                for text, evaluation in texts.items():
                    recipe = recipe_from(
                        {
                            "model": str(shared / "models" / model),
                            "method": method,
                            "allocation": "uniform",
                            "budget": {"keep": keep, "rank_multiple": 1, "storage": "two_factor"},
                            "calibration": calibration,
                            "evaluation": evaluation,
                        }
                    )
                    result = compress(recipe, run_directory=run_directory, reporter=Reporter())
                    scores = result.report.evaluation
                    assert scores is not None
                    figures.append(
                        {
                            "method": method,
                            "keep": keep,
                            "kept": result.plan.kept,
                            "text": text,
                            "dense": scores.dense.perplexity,
                            "compressed": scores.compressed.perplexity,
                            "tokens": scores.dense.tokens,
                        }
                    )
                    print(method, keep, text, round(scores.compressed.perplexity, 2), flush=True)
    parts = []
    for text in texts:
        chosen = [f for f in figures if f["text"] == text]
        rows = [
            [
                method,
                *(
                    f"{f['compressed']:.2f}"
                    for keep in KEEPS[model]
                    for f in chosen
                    if (f["method"], f["keep"]) == (method, keep)
                ),
            ]
            for method in FACTORISATIONS
        ]
        parts.append(f"{text}: dense {chosen[0]['dense']:.2f}, {chosen[0]['tokens']:,} scored tokens\n")
        parts.append(markdown_table(["method", *(f"keep {keep}" for keep in KEEPS[model])], rows) + "\n")
    parts.append("Stored as two factors.")
    title = f"Perplexity by method, {model}, uniform allocation, rank multiple 1"
    write_result(f"methods-{model}", title, f"python benchmarks/methods.py {model}", "\n".join(parts), figures)


if __name__ == "__main__":
    main()
