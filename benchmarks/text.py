"""Which calibration text, how much of it, and gradients at how much of that: the default method on a real model.

python benchmarks/text.py
python benchmarks/text.py --write                   # what is finished

Needs `make real-model` and the shared texts. Finished rows stay in --run-dir; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from allocation import Kept
from common import ROOT, markdown_table, shared_directory, write_result
from mixed import LENGTH, MODELS, TEXTS, texts_of
from real_model import MODEL, scored

KEEP = 0.8
SOURCES = {"mix.calibration": "text:{}/data/mix.calibration.txt", "wikitext2.valid": "text:{}/data/wikitext2.valid.txt"}
SOURCES["bundled"] = "bundled"
COUNTS = (16, 32, 64, 128)
FEW = ((48, 12), (48, 16), (48, 8), (64, 16))
"""Sequences, and at how many of them gradients are taken; the first has the tokens of a CPU where nothing is said."""

CELLS: list[tuple[str, int, int]] = [
    *((source, *FEW[0]) for source in SOURCES),
    *(("mix.calibration", *few) for few in FEW[1:]),
    *(("mix.calibration", count, count) for count in COUNTS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "text")
    parser.add_argument("--write", action="store_true", help="measure nothing more")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.run_dir / "text.jsonl")
    if not arguments.write:
        measure(kept, arguments.run_dir)
    write(kept)


def measure(kept: Kept, folder: Path) -> None:
    """Every cell that is not there yet."""
    shared = shared_directory()
    texts = texts_of(MODEL, shared)
    for source, count, gradients in CELLS:
        label = {"source": source, "sequences": count, "gradient_sequences": gradients}
        if kept.get({**label, "first": None}) is None:
            text = SOURCES[source].format(shared)
            found = scored(shared, folder / "run", text, count, texts, gradients, budget={"keep": KEEP})
            kept.add({**label, **found})
            print(kept.get(label), flush=True)


def write(kept: Kept) -> None:
    """The result files, of the cells that are there."""
    rows = []
    for figure in sorted(kept.figures, key=lambda each: (each["source"] != "mix.calibration", each["sequences"])):
        cells = [f"{figure['perplexity'][text]:.2f} ({figure['kl'][text]:.3f})" for text in TEXTS]
        tokens = [f"{figure[key] * LENGTH:,}" for key in ("sequences", "gradient_sequences")]
        tokens[1] += " (the first)" if figure.get("first") else ""
        rows.append([figure["source"], *tokens, *cells])
    header = ["calibration text", "tokens", "gradients at", *(f"{text}" for text in TEXTS)]
    body = (
        f"SmolLM2-135M-Instruct (`make real-model`), two_sided, spectral, keep {KEEP}, stored as `auto`, sequences of "
        f"{LENGTH} tokens; perplexity (KL to the original) on {MODELS[MODEL]['scored']} x {LENGTH} tokens of each "
        "text. One seed. `bundled` is the documentation of Python, wikitext2.valid articles of an encyclopedia, "
        "mix.calibration prose of many kinds. Gradients are taken at sequences that lie evenly over those that are "
        "read, but where the table says that they were the first of the text.\n\n" + markdown_table(header, rows)
    )
    write_result("text", "Calibration text", "python benchmarks/text.py", body, kept.figures)


if __name__ == "__main__":
    main()
