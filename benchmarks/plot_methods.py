"""Draw perplexity against the kept fraction from the results of `methods.py`.

python benchmarks/plot_methods.py wiki-llama-8m
"""

from __future__ import annotations

import argparse
import json

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from common import RESULTS, ROOT

DASHES = {"svd": ":", "fwsvd": ":", "asvd": ":", "afm": "--", "svd_llm": "--"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = parser.parse_args().model
    figures = json.loads((RESULTS / f"methods-{model}.json").read_text())["figures"]
    texts = list(dict.fromkeys(f["text"] for f in figures))
    methods = list(dict.fromkeys(f["method"] for f in figures))
    drawn, axes = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 3.8), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for method in methods:
            points = sorted((f["kept"], f["compressed"]) for f in figures if (f["method"], f["text"]) == (method, text))
            axis.plot(*zip(*points, strict=True), DASHES.get(method, "-"), marker="o", markersize=3, label=method)
        dense = next(f["dense"] for f in figures if f["text"] == text)
        axis.axhline(dense, color="black", linewidth=0.8)
        axis.annotate(f"dense {dense:.1f}", (0.02, dense), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axis.set(title=text, xlabel="fraction of linear weights kept", ylabel="perplexity", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.tick_params(which="both", labelsize=8)
    axes[0][-1].legend(fontsize=8)
    drawn.suptitle(f"{model}, uniform allocation, equal parameters")
    drawn.tight_layout()
    target = ROOT / "docs" / "images" / f"methods-{model}.svg"
    target.parent.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "rankwise"
    drawn.savefig(target, metadata={"Date": None})
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
