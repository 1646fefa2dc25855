"""Tables and pictures of the rows that compare.py makes; rows of before stay where no newer ones are.

python benchmarks/compare_results.py
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, markdown_table, write_result
from compare import CONTROL, FOLDER, LENGTH, LIMIT, LORD, SCORED
from rankwise.reports import COMPARISON_FILE, ComparedRow
from rankwise.reports.compared import mean_accuracy

WITH_RANKS = (
    "svd",
    "fwsvd",
    "asvd",
    "svd_llm",
    "afm",
    "bolaco",
    "two_sided",
    "flap",
    "llm_pruner",
    "slicegpt",
    "pruned",
)
LINES = {
    "two_sided": ("ours, low rank", "C3", "o"),
    "pruned": ("ours, units and ranks", "C3", "X"),
    "two_sided+subspace": ("ours, low rank, trained", "C3", "*"),
    "two_sided/bayesian:spectral": ("ours, low rank, searched", "C3", "d"),
    "quantize": ("ours, codes alone", "C3", "s"),
    "mixed": ("ours, mixed", "C3", "D"),
    "mixed, LDLQ": ("ours, mixed, LDLQ", "C1", "D"),
    "quantize, LDLQ": ("ours, codes alone, LDLQ", "C1", "s"),
    "caldera": ("ours, Q + L R", "C1", "^"),
    "svd/uniform": ("SVD", "C7", "v"),
    "fwsvd/uniform": ("FWSVD", "C7", "<"),
    "asvd/uniform": ("ASVD", "C7", ">"),
    "svd_llm/uniform": ("SVD-LLM", "C7", "x"),
    "afm/manual": ("LoRD", "C7", "+"),
    "bolaco/uniform": ("Bolaco, uniform", "C9", "P"),
    "bolaco/bayesian:5x1": ("Bolaco, searched", "C9", "X"),
    "bolaco/bayesian:5x1+subspace": ("Bolaco, searched, trained", "C9", "*"),
    "flap": ("FLAP", "C5", "<"),
    "llm_pruner": ("LLM-Pruner", "C5", ">"),
    "llm_pruner+lora": ("LLM-Pruner, trained", "C5", "*"),
    "slicegpt": ("SliceGPT", "C5", "P"),
    "llama.cpp": ("llama.cpp", "C0", "o"),
    "HQQ": ("HQQ", "C2", "o"),
    "torchao": ("torchao", "C4", "o"),
    "GPTQ": ("GPTQ", "C6", "o"),
}
"""A row's name, or its first word -> how the picture calls and draws it."""

Figure = dict[str, Any]


def read(folder: Path) -> list[Figure]:
    """Figures of all finished rows below a folder, that of the original among them."""
    found: list[Figure] = []
    for file in sorted(folder.rglob("rows.jsonl")):
        whole = file.with_name(COMPARISON_FILE)
        if not whole.exists():
            # No row but the original's.
            continue
        made = json.loads(whole.read_text())
        facts = {
            "calibration": made["recipe"]["settings"]["calibration"]["sequences"],
            "device": made["machine"]["device"],
        }
        for line in file.read_text().splitlines():
            values = json.loads(line)
            row = ComparedRow(**{key: value for key, value in values.items() if key in ComparedRow.model_fields})
            found.append(figure_of(row) | facts)
    return found


def figure_of(row: ComparedRow) -> Figure:
    """What the results keep of a row."""
    scores = {figure.task: figure for figure in row.tasks if figure.metric == "acc"}
    return {
        "way": row.way.replace(LORD, "manual"),
        "asked": row.asked,
        "bits": row.bits,
        "keep": row.keep,
        "bytes": row.bytes,
        "megabytes": (row.bytes or 0) / 1e6,
        "perplexity": {text.rpartition("/")[2].removesuffix(".txt"): value for text, value in row.perplexity.items()},
        "accuracy": {task: score.score for task, score in scores.items()},
        "difference_error": {task: score.difference_error for task, score in scores.items()},
        "mean_accuracy": mean_accuracy(row),
        "seconds": row.seconds,
        "problem": row.problem,
    }


def merged(old: list[Figure], new: list[Figure]) -> list[Figure]:
    """The original first, then every row once: the newest, but none for one that has more: accuracies, or a plan."""
    known: dict[tuple[str, Any], Figure] = {}
    for figure in [*old, *new]:
        place = figure["way"], figure["asked"]
        before = known.get(place)
        if before is None or figure["accuracy"] or not (before["accuracy"] or figure["problem"]):
            known[place] = figure
    rest = sorted(
        (figure for figure in known.values() if figure["way"] != "dense"), key=lambda figure: -(figure["bytes"] or 0)
    )
    return [known["dense", None], *rest]


def has_ranks(figure: Figure) -> bool:
    """Whether a row is of a fraction kept, in numbers."""
    return str(figure["way"]).split("/")[0].split("+")[0] in WITH_RANKS


def has_codes(figure: Figure) -> bool:
    """Whether a row is of a number of bits, in codes."""
    return not has_ranks(figure) and figure["way"] not in ("dense", CONTROL)


def draw(figures: list[Figure], text: str, path: Path) -> None:
    """Perplexity against the bytes of all weights."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 5.2), layout="constrained")
    axes = drawing.subplots()
    dense, *rows = figures
    best = dense["perplexity"][text]
    top, bottom, above = 8 * best, best, []
    for name, (label, colour, marker) in LINES.items():
        points = sorted(
            (row["megabytes"], row["perplexity"][text])
            for row in rows
            if name in (row["way"], row["way"].split(" ")[0]) and row["perplexity"].get(text)
        )
        if points and min(value for _, value in points) > top:
            above.append(label)
        elif points:
            line = "none" if name in ("llama.cpp", "HQQ", "torchao", "GPTQ") else "-"
            bottom = min(bottom, *(value for _, value in points))
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, ms=5, lw=1, label=label)
    axes.axhline(best, color="black", linewidth=0.8)
    axes.annotate(f"dense, {dense['megabytes']:.0f} MB", (0.01, best), xycoords=("axes fraction", "data"), va="top")
    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.95, top)
    if above:
        axes.annotate(f"above this scale: {', '.join(above)}", (0.99, 0.97), xycoords="axes fraction", ha="right")
    ticks = [best * factor for factor in (1, 1.25, 1.5, 2, 3, 4, 6, 8)]
    axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of all weights, MB")
    axes.set_ylabel(f"perplexity on {text}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    drawing.savefig(path, metadata={"Date": None})


NOTES = f"""SmolLM2-135M-Instruct. Calibrated on sequences of {LENGTH} tokens of mix.calibration; {SCORED} x {LENGTH}
of each text scored; one seed. Embeddings stay at 16 bits in every row. Ranks, heads, channels and width: {{many}}
sequences, {{learned}} where a repair learns from them too; no search and no repair but where a row says so; low rank
is stored as `auto`, so that the papers' methods take pivot rows where those are smaller. `manual` are LoRD's
proportions for 20%, scaled to the size. {{control}}Codes: as many sequences as a row says; LDLQ is with
`output_feedback=false`, errors fed back along inputs alone, as in `caldera`; that and `mixed` with it take 5 turns.
Peers are the weights that their own code makes, and what pads a row there is not counted; GPTQ's scales are of the
extremes of each group and its Hessians of the original model. The weights were rounded to 4 bits once before (Q4_1),
which favours formats of 4 bits in small groups. What has no line or cell, or `-`, was not measured. What was made on a
GPU was made many rows at once.

"""


def ranks_tables(figures: list[Figure], texts: list[str]) -> str:
    """A table for each text and one for accuracies: a line for each way in numbers, a column for each fraction kept."""
    whole = [row for row in figures if row["way"] in ("dense", CONTROL)]
    rows = [row for row in figures if has_ranks(row)]
    keeps = sorted({row["asked"] for row in rows}, reverse=True)
    cells = {(row["way"], row["asked"]): row for row in rows}
    ways = sorted({row["way"] for row in rows}, key=lambda way: (WITH_RANKS.index(re.split(r"[/+]", way)[0]), way))
    shown: dict[str, Callable[[Figure], str]] = {f"perplexity, {text}": partial(_perplexity, text) for text in texts}
    shown["mean accuracy"] = _accuracy
    tables = []
    for title, of in shown.items():
        lines = [[row["way"], *[of(row)] * len(keeps)] for row in whole if of(row) != "-"]
        lines += [[way, *(of(cells[way, keep]) if (way, keep) in cells else "-" for keep in keeps)] for way in ways]
        tables.append(markdown_table([title, *map(str, keeps)], lines))
    return "\n\n".join(tables)


def _accuracy(row: Figure) -> str:
    return "-" if row["mean_accuracy"] is None else f"{row['mean_accuracy']:.3f}"


def _perplexity(text: str, row: Figure) -> str:
    return "no plan" if row["problem"] else _figure(row["perplexity"].get(text))


def _figure(perplexity: float | None) -> str:
    """A perplexity, in fewer digits where it is of no model any more."""
    if perplexity is None:
        return "not finite"
    return f"{perplexity:.1f}" if perplexity < 10_000 else f"{perplexity:.0e}"


def bits_table(figures: list[Figure], texts: list[str]) -> str:
    """A line for each row of codes, by size."""
    rows = [figures[0], *(row for row in figures if has_codes(row))]
    header = ["row", "MB in all", "bits a linear weight", "sequences", *texts, "mean accuracy"]
    return markdown_table(
        header,
        [
            [row["way"], *(["no plan"] * (4 + len(texts)))]
            if row["problem"]
            else [row["way"], f"{row['megabytes']:.1f}", f"{row['bits']:.2f}"]
            + [str(row["calibration"]) if _reads_text(row) else ""]
            + [_figure(row["perplexity"].get(text)) for text in texts]
            + [_accuracy(row)]
            for row in rows
        ],
    )


def _reads_text(row: Figure) -> bool:
    return not str(row["way"]).startswith(("dense", "HQQ", "torchao"))


def sizes_table(figures: list[Figure]) -> str:
    """Bytes of all weights by fraction kept, of what keeps it exactly and of what does not."""
    rows = [row for row in figures[1:] if has_ranks(row) and row["bytes"]]
    keeps = sorted({row["asked"] for row in rows}, reverse=True)
    lines = []
    for name, narrow in (("all others", False), ("slicegpt, whose embeddings shrink and whose adapters count", True)):
        own = {
            k: [r["megabytes"] for r in rows if r["asked"] == k and (r["way"] == "slicegpt") is narrow] for k in keeps
        }
        spans = [
            f"{min(v):.1f}" + (f" to {max(v):.1f}" if max(v) - min(v) > 0.05 else "") if v else "-"
            for v in own.values()
        ]
        lines.append([name, *spans])
    return markdown_table(["MB in all", *(f"keep {keep}" for keep in keeps)], lines)


def write(folder: Path) -> None:
    file = RESULTS / "compare.json"
    old = json.loads(file.read_text())["figures"] if file.exists() else []
    figures = merged(old, read(folder))
    texts = list(figures[0]["perplexity"])

    def counts(rows: list[Figure]) -> str:
        return " or ".join(str(count) for count in sorted({row["calibration"] for row in rows})) or "no"

    ranked = [row for row in figures[1:] if not has_codes(row)]
    coded = [row for row in figures[1:] if has_codes(row)]
    body = NOTES.format(
        many=counts([row for row in ranked if "+" not in row["way"]]),
        learned=counts([row for row in ranked if "+" in row["way"] and row["way"] != CONTROL]),
        control="".join(
            f"`{CONTROL}` is the original trained as `llm_pruner+lora` is, on {row['calibration']} sequences.\n"
            for row in figures
            if row["way"] == CONTROL
        ),
    )
    kinds = [("ranks" if row not in coded else f"codes of {row['calibration']} sequences", row) for row in figures[1:]]
    devices = {kind: sorted({row["device"] for each, row in kinds if each == kind}) for kind, _ in kinds}
    made_on = "; ".join(f"{kind}: {' and '.join(names)}" for kind, names in sorted(devices.items()))
    body += f"Made on: {made_on}.\n\n"
    body += "### Ranks, heads, channels, width\n\n"
    body += (
        "By fraction of the linear weights kept; accuracy is the mean of four local tasks made from mix.heldout, "
        f"{LIMIT} examples of each, with an error of 0.03.\n\n"
    )
    body += (
        ranks_tables(figures, texts) + "\n\n" + sizes_table(figures) + "\n\n### Codes\n\n" + bits_table(figures, texts)
    )
    write_result(
        "compare",
        "SmolLM2-135M, made smaller in every way",
        "python benchmarks/compare.py",
        body,
        figures,
    )
    for text in texts:
        draw(figures, text, ROOT / "docs" / "images" / f"compare-{text.replace('.', '-')}.svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, default=FOLDER)
    write(parser.parse_args().run_dir)


if __name__ == "__main__":
    main()
