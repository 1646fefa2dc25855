"""Dampings of H and of the curvature under codes, beside feedback along inputs alone, on wiki-llama-8m.

python benchmarks/defaults_codes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import markdown_table, shared_directory, write_result
from mixed import LENGTH, TEXTS, path_of, scored, texts_of
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

MODEL = "wiki-llama-8m"
DAMPINGS: dict[str, tuple[Any, ...]] = {
    "damping": (0.0001, 0.001, 0.01, 0.03, 0.1),
    "output_damping": (0.2, 0.5, 1.0),
    "output_feedback": (False,),
}
"""Setting -> what is tried, with all others at their defaults; `damping` where errors go along inputs alone."""
BITS = (2, 3)


def measure() -> list[dict[str, Any]]:
    """A record for every setting, value and number of bits."""
    shared = shared_directory()
    texts, dense = texts_of(MODEL, shared), load_model(str(path_of(MODEL, shared))).model
    calibration = {
        "source": f"text:{shared}/data/mix.calibration.txt",
        "sequences": 256,
        "length": LENGTH,
        "bos": "never",
    }
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for setting, value in [(setting, value) for setting, values in DAMPINGS.items() for value in values]:
            for bits in BITS:
                method = {"name": "quantize", "q_bits": bits, setting: value}
                if setting == "damping":
                    method["output_feedback"] = False
                values = {"model": str(path_of(MODEL, shared)), "calibration": calibration, "method": method}
                result = compress(recipe_from(values), run_directory=Path(folder), reporter=Reporter(show=False))
                figures.append(
                    {
                        "setting": setting,
                        "value": value,
                        "q_bits": bits,
                        **scored(dense, result, texts),
                    }
                )
                print(figures[-1], flush=True)
    return figures


def write(figures: list[dict[str, Any]]) -> None:
    """Put the records into the result files, a table for every setting."""
    parts = []
    for setting, tried in DAMPINGS.items():
        rows = [
            [str(value).lower() if value is False else f"{value:g}"]
            + [
                f"{f['perplexity'][text]:.2f} ({f['kl'][text]:.5f})"
                for bits in BITS
                for text in TEXTS
                for f in figures
                if (f["setting"], f["value"], f["q_bits"]) == (setting, value, bits)
            ]
            for value in tried
        ]
        parts.append(markdown_table([setting, *(f"{bits} bits, {text}" for bits in BITS for text in TEXTS)], rows))
    body = (
        "quantize, E8P, perplexity (KL to the original in nats a token), stored as codes; calibration 256 x 256 "
        "tokens, 100 x 256 tokens of each text scored, one seed. All settings but one at their defaults; "
        "`damping` with `output_feedback=false`, measured 2026-11-25 on another machine.\n\n" + "\n\n".join(parts)
    )
    command = "python benchmarks/defaults_codes.py"
    write_result("defaults_codes", "Damping of H and of the curvature under codes", command, body, figures)


if __name__ == "__main__":
    write(measure())
