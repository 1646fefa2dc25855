"""What turns over Q and L R bring, on wiki-llama-8m: `mixed` by two-sided rounding, `caldera` along inputs alone.

python benchmarks/turns.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import markdown_table, shared_directory, write_result
from mixed import LENGTH, TEXTS, path_of, scored, texts_of
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

MODEL = "wiki-llama-8m"
METHODS, TURNS, BITS = ("mixed", "caldera"), (1, 2, 5, 15), (2.1, 2.5, 3.0)


def measure() -> list[dict[str, Any]]:
    """A record for every method, number of turns and number of bits."""
    shared = shared_directory()
    texts, dense = texts_of(MODEL, shared), load_model(str(path_of(MODEL, shared))).model
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method, bits, turns in [(m, b, t) for m in METHODS for b in BITS for t in TURNS]:
            values = {
                "model": str(path_of(MODEL, shared)),
                "calibration": {
                    "source": f"text:{shared}/data/mix.calibration.txt",
                    "sequences": 256,
                    "length": LENGTH,
                    "bos": "never",
                },
                "method": {"name": method, "outer": turns},
                "budget": {"bits": bits},
            }
            started = time.monotonic()
            result = compress(recipe_from(values), run_directory=Path(folder), reporter=Reporter(show=False))
            seconds = time.monotonic() - started
            figures.append(
                {
                    "method": method,
                    "bits": bits,
                    "outer": turns,
                    "seconds": round(seconds, 1),
                    **scored(dense, result, texts),
                }
            )
            print(figures[-1], flush=True)
    return figures


def write(figures: list[dict[str, Any]]) -> None:
    """Put the records into the result files, a table for every method."""
    parts = []
    for method in METHODS:
        rows = [
            [str(turns)]
            + [
                f"{f['perplexity'][text]:.2f} ({f['kl'][text]:.5f})"
                for text in TEXTS
                for bits in BITS
                for f in figures
                if (f["method"], f["outer"], f["bits"]) == (method, turns, bits)
            ]
            for turns in TURNS
        ]
        for row, turns in zip(rows, TURNS, strict=True):
            row += [
                f"{f['seconds']:.0f}"
                for bits in BITS[1:]
                for f in figures
                if (f["method"], f["outer"], f["bits"]) == (method, turns, bits)
            ]
        header = [f"{method}, outer", *(f"{text}, {bits:g} bits" for text in TEXTS for bits in BITS)]
        header += [f"s, {bits:g} bits" for bits in BITS[1:]]
        parts.append(markdown_table(header, rows))
    body = (
        "Perplexity (KL to the original in nats a token), stored as codes; calibration 256 x 256 tokens, 100 x 256 "
        "tokens of each text scored, rank multiple 8, one seed. Of all turns the best is kept. Seconds are of "
        "whole runs that take over what runs of the first number of bits have seen in the weights.\n\n"
        + "\n\n".join(parts)
    )
    write_result("turns", "Turns over Q and L R", "python benchmarks/turns.py", body, figures)


if __name__ == "__main__":
    write(measure())
