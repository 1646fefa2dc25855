"""Draw what benchmarks/caldera.py measured: perplexity against bits a weight, by how the bits are spent.

python benchmarks/plot_caldera.py
"""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from caldera import SIZES, STUDY, TEXTS
from common import RESULTS, ROOT

_STYLES = {
    "low rank, 16 bits": ("C7", "-", "o"),
    "low rank, 4 bits": ("C7", "--", "o"),
    "Q alone, uniform": ("C0", "--", "s"),
    "Q alone, spectral": ("C0", "-", "s"),
    "Q + L R, uniform": ("C1", "--", "^"),
    "Q + L R, spectral": ("C1", "-", "^"),
}


def main() -> None:
    cells = json.loads((RESULTS / "caldera-study.json").read_text())["figures"]
    steps = json.loads((RESULTS / "caldera.json").read_text())["figures"]
    dense = next(f["perplexity"] for f in steps if f["label"] == "dense")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(TEXTS)), TEXTS, strict=True):
        top, above = dense[text] * 1.08, []
        for label in STUDY:
            colour, line, marker = _STYLES[label]
            points = sorted((f["bits"], f["perplexity"][text]) for f in cells if f["label"] == label)
            if min(perplexity for _, perplexity in points) > top:
                above.append(f"{label}: {points[0][1]:.0f} to {points[-1][1]:.0f}, above this scale")
                continue
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker, ms=4, label=label)
        axes.axhline(dense[text], color="black", linewidth=0.8)
        axes.annotate(
            "dense, 16 bits", (max(SIZES), dense[text]), xytext=(0, -11), textcoords="offset points", ha="right"
        )
        axes.annotate("\n".join(above), (1, 0.6), xycoords="axes fraction", ha="right", fontsize=9)
        axes.set_ylim(dense[text] * 0.99, top)
        axes.set_xticks(SIZES, [f"{size:g}" for size in SIZES])
        axes.set_title(text)
        axes.set_xlabel("bits a weight")
        axes.set_ylabel("perplexity")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "caldera-study.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
