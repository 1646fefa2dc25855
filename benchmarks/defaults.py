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
from rankwise.recipe import recipe_from

MODEL = "wiki-llama-8m"
KEEPS = (0.6, 0.4, 0.25)
VARIANTS: dict[str, dict[str, Any]] = {
    "two_sided, damping 1e-6": {"method": {"name": "two_sided", "damping": 1e-6}},
    "two_sided, damping 1e-4": {"method": {"name": "two_sided", "damping": 1e-4}},
    "two_sided, damping 1e-2": {"method": {"name": "two_sided", "damping": 1e-2}},
    "two_sided, damping 0.1": {"method": {"name": "two_sided", "damping": 0.1}},
    "two_sided, damping 1": {"method": {"name": "two_sided", "damping": 1.0}},
    "two_sided, text labels, damping 0.1": {"method": {"name": "two_sided", "damping": 0.1, "labels": "text"}},
    "two_sided, diagonal curvature, damping 0.1": {
        "method": {"name": "two_sided", "damping": 0.1, "curvature_gb": 1e-6}
    },
    "two_sided, damping 0.1, 64 sequences": {"method": {"name": "two_sided", "damping": 0.1}, "sequences": 64},
    "two_sided, damping 0.1, 1024 sequences": {"method": {"name": "two_sided", "damping": 0.1}, "sequences": 1024},
    "two_sided, damping 0.1, no bias": {"method": {"name": "two_sided", "damping": 0.1, "bias": False}},
    "two_sided, damping 0.1, rank multiple 8": {
        "method": {"name": "two_sided", "damping": 0.1},
        "rank_multiple": 8,
    },
    "bolaco, 32 groups": {"method": {"name": "bolaco"}},
    "bolaco, 1 group": {"method": {"name": "bolaco", "groups": 1}},
    "bolaco, 256 groups": {"method": {"name": "bolaco", "groups": 256}},
    "bolaco, no bias": {"method": {"name": "bolaco", "bias": False}},
    "bolaco, 64 sequences": {"method": {"name": "bolaco"}, "sequences": 64},
    "bolaco, 1024 sequences": {"method": {"name": "bolaco"}, "sequences": 1024},
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
                            "method": variant["method"],
                            "budget": {"keep": keep, "rank_multiple": variant.get("rank_multiple", 1)},
                            "calibration": {**calibration, "sequences": variant.get("sequences", 256)},
                            "evaluation": evaluation,
                        }
                    )
                    result = compress(recipe, run_directory=run_directory, reporter=Reporter())
                    score = result.report["evaluation"]["compressed"]["perplexity"]
                    figures.append({"variant": name, "text": text, "keep": keep, "perplexity": score})
            row = [f"{f['perplexity']:.2f}" for f in figures if f["variant"] == name]
            print(name, *row, flush=True)
    header = ["setting", *(f"{text} {keep}" for text in texts for keep in KEEPS)]
    rows = [[name, *(f"{f['perplexity']:.2f}" for f in figures if f["variant"] == name)] for name in VARIANTS]
    body = (
        "Perplexity at the kept fraction that heads the column; 160 sequences of 256 tokens of each text, calibration "
        "on 256 sequences of 256 tokens of mix.calibration unless the row says otherwise, rank multiple 1 likewise.\n\n"
        + markdown_table(header, rows)
    )
    write_result(
        "defaults", "Default settings against their alternatives", "python benchmarks/defaults.py", body, figures
    )


if __name__ == "__main__":
    main()
