"""The settings that are defaults, against their alternatives, on wiki-llama-8m, uniform allocation.

python benchmarks/defaults.py
"""

from __future__ import annotations

import tempfile
from typing import Any

from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import compress
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

MODEL = "wiki-llama-8m"
KEEPS = (0.4, 0.25)
VARIANTS: dict[str, dict[str, Any]] = {
    "two_sided, as is: damping 1, sampled labels, full curvature": {"name": "two_sided"},
    "two_sided, damping 3": {"name": "two_sided", "damping": 3.0},
    "two_sided, damping 0.3": {"name": "two_sided", "damping": 0.3},
    "two_sided, damping 1e-6": {"name": "two_sided", "damping": 1e-6},
    "two_sided, labels from the text": {"name": "two_sided", "labels": "text"},
    "two_sided, diagonal curvature": {"name": "two_sided", "curvature_gb": 1e-6},
    "bolaco, as is: 32 groups": {"name": "bolaco"},
    "bolaco, 1 group": {"name": "bolaco", "groups": 1},
    "bolaco, 256 groups": {"name": "bolaco", "groups": 256},
    "bolaco, no bias": {"name": "bolaco", "bias": False},
}


def main() -> None:
    shared = shared_directory()
    calibration, texts = protocols(MODEL, shared)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as run_directory:
        for name, variant in VARIANTS.items():
            for text, evaluation in texts.items():
                for keep in KEEPS:
                    recipe = recipe_from(
                        {
                            "model": str(shared / "models" / MODEL),
                            "method": variant,
                            "allocation": "uniform",
                            "budget": {"keep": keep, "rank_multiple": 1, "storage": "two_factor"},
                            "calibration": calibration,
                            "evaluation": evaluation,
                        }
                    )
                    result = compress(recipe, run_directory=run_directory, reporter=Reporter())
                    scores = result.report.evaluation
                    assert scores is not None
                    score = scores.compressed.perplexity
                    figures.append({"variant": name, "text": text, "keep": keep, "perplexity": score})
            row = [f"{f['perplexity']:.2f}" for f in figures if f["variant"] == name]
            print(name, *row, flush=True)
    header = ["setting", *(f"{text} {keep}" for text in texts for keep in KEEPS)]
    rows = [[name, *(f"{f['perplexity']:.2f}" for f in figures if f["variant"] == name)] for name in VARIANTS]
    body = (
        "Perplexity at the kept fraction that heads the column; 160 sequences of 256 tokens of each text, calibration "
        "on 256 sequences of 256 tokens of mix.calibration, rank multiple 1, two factors.\n\n"
        + markdown_table(header, rows)
    )
    write_result(
        "defaults", "Default settings against their alternatives", "python benchmarks/defaults.py", body, figures
    )


if __name__ == "__main__":
    main()
