"""Draw perplexity against the kept fraction, from the paper's plans to repaired ones.

python benchmarks/plot_repair.py wiki-llama-8m
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from common import RESULTS, ROOT

# Which result, its row, what the line is called, its colour and dashes.
LINES = [
    ("allocation", "bolaco, uniform", "uniform (bolaco)", "tab:gray", "--"),
    ("allocation", "bolaco, bayesian:5x4", "Bolaco's search, 5x4", "tab:orange", ":"),
    ("repair", "two-factor, spectral", "estimated loss (default)", "tab:blue", "--"),
    ("repair", "pivoted, spectral", "and pivoted storage", "tab:blue", "-"),
    ("repair", "1024 sequences: pivoted, spectral, blocks, factors", "and repair", "black", "-"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = parser.parse_args().model
    results: dict[str, Any] = {
        name: json.loads((RESULTS / f"{name}-{model}.json").read_text())["figures"] for name in ("allocation", "repair")
    }
    dense = results["repair"]["dense"]
    drawn, axes = pyplot.subplots(1, len(dense), figsize=(5 * len(dense), 3.8), squeeze=False)
    for axis, (text, least) in zip(axes[0], dense.items(), strict=True):
        for name, row, label, colour, dashes in LINES:
            runs = [f for f in results[name]["runs"] if f["row"] == row and "perplexity" in f]
            keeps = sorted({f["keep"] for f in runs})
            values = [statistics.mean(f["perplexity"][text] for f in runs if f["keep"] == keep) for keep in keeps]
            axis.plot(keeps, values, dashes, color=colour, marker="o", markersize=3, label=label)
        axis.axhline(least, color="black", linewidth=0.8)
        axis.annotate(f"dense {least:.1f}", (0.02, least), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axis.set(title=text, xlabel="fraction of linear weights kept", ylabel="perplexity", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.tick_params(which="both", labelsize=8)
    axes[0][-1].legend(fontsize=8)
    drawn.suptitle(f"{model}, equal parameters")
    drawn.tight_layout()
    target = ROOT / "docs" / "images" / f"repair-{model}.svg"
    matplotlib.rcParams["svg.hashsalt"] = "rankwise"
    drawn.savefig(target, metadata={"Date": None})
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
