"""SmolLM2-135M made smaller in every way, ours, the papers' and llama.cpp's, under one protocol.

python benchmarks/compare.py low-rank
python benchmarks/compare.py bits
python benchmarks/compare.py peers LIBRARY          # pip install --no-deps --target LIBRARY xllamacpp
python benchmarks/compare.py write

Needs `make real-model` and the shared texts. The first two are runs of `rankwise compare` and go on after a stop, as do
the peers; `write` makes the result files and the picture of README. --sizes and --methods measure some of the cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import ROOT, shared_directory
from rankwise.flows.compare import compare
from rankwise.progress import Reporter
from rankwise.recipes import Comparison, comparison_from, read_sizes, read_ways

MODEL = ROOT / "real-models" / "smollm2-135m"
TEXTS = ("wikitext2.test", "mix.heldout")
LENGTH, SCORED, CALIBRATION, LIMIT = 256, 32, 48, 50
SIZES = {"keep": "0.8,0.9,0.6", "bits": "2.5,3,4"}
METHODS = {
    "keep": "svd,fwsvd,asvd,svd_llm,afm,bolaco,two_sided",
    "bits": "quantize,caldera,mixed",
}


def protocol(shared: Path, folder: Path, spelling: str, sizes: str, methods: str) -> Comparison:
    """The comparison of one spelling: texts, tasks and calibration are the same for both."""
    return comparison_from(
        {
            "model": str(MODEL),
            "output": str(folder / spelling),
            "spelling": spelling,
            "sizes": read_sizes(sizes, spelling),  # type: ignore[arg-type]
            "ways": read_ways(methods, spelling),  # type: ignore[arg-type]
            "texts": [
                {
                    "source": f"text:{shared}/data/{text}.txt",
                    "sequences": SCORED,
                    "length": LENGTH,
                    "sample": "random",
                    "seed": 1,
                    "batch_size": 4,
                    "bos": "never",
                }
                for text in TEXTS
            ],
            "tasks": ["local_next_sentence", "local_cloze", "local_order", "local_arithmetic"],
            "limit": LIMIT,
            "task_text": f"text:{shared}/data/mix.heldout.txt",
            "settings": {
                "calibration": {
                    "source": f"text:{shared}/data/mix.calibration.txt",
                    "sequences": CALIBRATION,
                    "length": LENGTH,
                    "batch_size": 2,
                    "bos": "never",
                },
                "budget": {"rank_multiple": 8},
                "methods": {"caldera": {"outer": 5}, "mixed": {"outer": 5}},
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["low-rank", "bits"])
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "compare")
    parser.add_argument("--sizes")
    parser.add_argument("--methods")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    spelling = {"low-rank": "keep", "bits": "bits"}[arguments.what]
    asked = protocol(
        shared_directory(),
        arguments.run_dir,
        spelling,
        arguments.sizes or SIZES[spelling],
        arguments.methods or METHODS[spelling],
    )
    compare(asked, run_directory=arguments.run_dir / "run", reporter=Reporter(lines=True))


if __name__ == "__main__":
    main()
