"""Draw perplexity against the kept fraction from the results of `allocation.py`.

python benchmarks/plot_allocation.py wiki-llama-8m
"""

from __future__ import annotations

import argparse
import json
import statistics

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from common import RESULTS, ROOT

STYLES = {
    "bolaco, uniform": ("tab:gray", "--"),
    "bolaco, bayesian:5x1": ("tab:red", ":"),
    "bolaco, bayesian:5x4": ("tab:orange", ":"),
    "two_sided, uniform": ("tab:green", "--"),
    "two_sided, spectral": ("tab:blue", "-"),
    "two_sided, bayesian:spectral": ("black", "-"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = parser.parse_args().model
    found = json.loads((RESULTS / f"allocation-{model}.json").read_text())["figures"]
    drawn, axes = pyplot.subplots(1, len(found["dense"]), figsize=(5 * len(found["dense"]), 3.8), squeeze=False)
    for axis, (text, dense) in zip(axes[0], found["dense"].items(), strict=True):
        for row, (colour, dashes) in STYLES.items():
            runs = [f for f in found["runs"] if f["row"] == row and "perplexity" in f]
            keeps = sorted({f["keep"] for f in runs})
            values = [statistics.mean(f["perplexity"][text] for f in runs if f["keep"] == keep) for keep in keeps]
            axis.plot(keeps, values, dashes, color=colour, marker="o", markersize=3, label=row)
        axis.axhline(dense, color="black", linewidth=0.8)
        axis.annotate(f"dense {dense:.1f}", (0.02, dense), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axis.set(title=text, xlabel="fraction of linear weights kept", ylabel="perplexity", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.tick_params(which="both", labelsize=8)
    axes[0][-1].legend(fontsize=8)
    drawn.suptitle(f"{model}, equal parameters, mean of three seeds")
    drawn.tight_layout()
    target = ROOT / "docs" / "images" / f"allocation-{model}.svg"
    matplotlib.rcParams["svg.hashsalt"] = "rankwise"
    drawn.savefig(target, metadata={"Date": None})
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
