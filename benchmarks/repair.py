"""What storage and repair give at equal size, alone and together, on the two real models.

python benchmarks/repair.py stories260k
python benchmarks/repair.py wiki-llama-8m

Texts and validation samples are those of `allocation.py`. Give --run-dir to keep what is finished: the same command
then goes on after a stop.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from allocation import Kept, score, validation
from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import BudgetError
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

KEEPS = {"stories260k": (0.9, 0.8, 0.7), "wiki-llama-8m": (0.6, 0.4, 0.25, 0.15)}
SEARCH = "bayesian:spectral"

LOW_DAMPING = {"name": "two_sided", "damping": 0.01}
REFIT_BOTH = {"refit": {"factors": "both"}}
# Four times the text: as many steps a block, twice as many for all factors.
MORE_TEXT = {"calibration": {"sequences": 1024}, "repair": {"blocks": {"epochs": 2}, "factors": {"epochs": 2}}}

# Name of the row, method, allocation, storage, steps of the repair, further keys of the recipe.
Row = tuple[str, Any, str, str, str, dict[str, Any]]


def rows(model: str) -> list[Row]:
    """Every combination that is measured on a model."""
    two_sided = "two_sided"
    plain: list[Row] = [
        ("two-factor, spectral", two_sided, "spectral", "two_factor", "", {}),
        ("two-factor, search", two_sided, SEARCH, "two_factor", "", {}),
        ("pivoted, spectral", two_sided, "spectral", "pivoted", "", {}),
        ("pivoted, search", two_sided, SEARCH, "pivoted", "", {}),
    ]
    repaired: list[Row] = [
        ("pivoted, spectral, refit", two_sided, "spectral", "pivoted", "refit", {}),
        ("pivoted, spectral, refit of both factors", two_sided, "spectral", "pivoted", "refit", {"repair": REFIT_BOTH}),
        ("pivoted, spectral, subspace", two_sided, "spectral", "pivoted", "subspace", {}),
        ("pivoted, spectral, blocks", two_sided, "spectral", "pivoted", "blocks", {}),
        ("pivoted, spectral, factors", two_sided, "spectral", "pivoted", "factors", {}),
        ("pivoted, spectral, blocks, factors", two_sided, "spectral", "pivoted", "blocks,factors", {}),
        ("pivoted, search, blocks, factors", two_sided, SEARCH, "pivoted", "blocks,factors", {}),
    ]
    if model == "stories260k":
        longer = {"repair": {"factors": {"epochs": 8}}}
        return [
            *plain,
            ("pivoted, spectral (damping 0.01)", LOW_DAMPING, "spectral", "pivoted", "", {}),
            ("pivoted, search (damping 0.01)", LOW_DAMPING, SEARCH, "pivoted", "", {}),
            *repaired,
            (
                "pivoted, spectral, refit of both factors, blocks, factors",
                two_sided,
                "spectral",
                "pivoted",
                "refit,blocks,factors",
                {"repair": REFIT_BOTH},
            ),
            ("pivoted, spectral, factors, 8 epochs", two_sided, "spectral", "pivoted", "factors", longer),
            ("pivoted, search, blocks", two_sided, SEARCH, "pivoted", "blocks", {}),
            ("pivoted, search, factors", two_sided, SEARCH, "pivoted", "factors", {}),
        ]
    return [
        *plain,
        *repaired,
        ("1024 sequences: pivoted, spectral", two_sided, "spectral", "pivoted", "", MORE_TEXT),
        ("1024 sequences: pivoted, spectral, blocks", two_sided, "spectral", "pivoted", "blocks", MORE_TEXT),
        (
            "1024 sequences: pivoted, spectral, blocks, factors",
            two_sided,
            "spectral",
            "pivoted",
            "blocks,factors",
            MORE_TEXT,
        ),
    ]


def measure(model: str, shared: Path, run_directory: Path, row: Row, keep: float) -> dict[str, Any]:
    """Compress once and score on every text; only `infeasible` when nothing fits."""
    _, method, allocation, storage, steps, changes = row
    calibration, texts = protocols(model, shared)
    recipe = recipe_from(
        {
            "model": str(shared / "models" / model),
            "method": method,
            "allocation": allocation,
            "budget": {"keep": keep, "rank_multiple": 1, "storage": storage},
            "calibration": {**calibration, **changes.get("calibration", {})},
            "validation": validation(model, shared),
            "repair": {"steps": steps, **changes.get("repair", {})},
        }
    )
    started = time.monotonic()
    try:
        result = compress(recipe, run_directory=run_directory, reporter=Reporter(show=False))
    except BudgetError as problem:
        return {"infeasible": problem.problem}
    repair, sites = result.report.repair, result.report.sites.values()
    entries = [site.largest_pivot_entry for site in sites if site.largest_pivot_entry is not None]
    return {
        "kept": result.plan.kept,
        "perplexity": {text: score(result.model.float(), recipe.model, at) for text, at in texts.items()},
        "seconds": time.monotonic() - started,
        "repair": [step.model_dump(mode="json", exclude={"history", "blocks"}) for step in repair],
        "repair_seconds": sum(step.seconds for step in repair),
        "largest_pivot_entry": max(entries, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(KEEPS))
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument(
        "--only", default="", help="measure only rows that match this regular expression, and write no table"
    )
    parser.add_argument("--keeps", type=float, nargs="*", help="measure only these fractions")
    parser.add_argument("--write", action="store_true", help="only write the table of what is finished in --run-dir")
    arguments = parser.parse_args()
    model, shared = arguments.model, shared_directory()
    folder = arguments.run_dir or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / f"repair-{model}.json")
    table = rows(model)
    for row in [] if arguments.write else table:
        for keep in arguments.keeps or KEEPS[model] if re.search(arguments.only, row[0]) else ():
            label = {"row": row[0], "keep": keep}
            if kept.get(label) is None:
                kept.add({**label, **measure(model, shared, folder / "run", row, keep)})
                print(label, kept.figures[-1].get("perplexity", "infeasible"), flush=True)
    if arguments.only and not arguments.write:
        return
    _, texts = protocols(model, shared)
    source = str(shared / "models" / model)
    dense = {text: score(load_model(source).model, source, settings) for text, settings in texts.items()}
    header = ["storage, ranks, repair", *(f"keep {keep}" for keep in KEEPS[model])]
    parts = []
    for text in texts:
        parts.append(f"{text}, dense {dense[text]:.2f}:\n")
        cells = [[row[0], *(cell(kept, row[0], keep, text) for keep in KEEPS[model])] for row in table]
        parts.append(markdown_table(header, cells) + "\n")
    parts.append("Seconds of the repair alone:\n")
    timed = [row for row in table if row[4]]
    cells = [[row[0], *(seconds(kept, row[0], keep) for keep in KEEPS[model])] for row in timed]
    parts.append(markdown_table(header, cells) + "\n")
    parts.append("One seed. Rank multiple 1, 50 trials a search. A repair learns from the calibration sequences alone:")
    parts[-1] += " 192." if model == "stories260k" else " 256, unless the row says more. A dash was not measured."
    title = f"Storage and repair, {model}"
    command = f"python benchmarks/repair.py {model}"
    write_result(f"repair-{model}", title, command, "\n".join(parts), {"dense": dense, "runs": kept.figures})


def cell(kept: Kept, row: str, keep: float, text: str) -> str:
    """Perplexity, or why there is none."""
    found = kept.get({"row": row, "keep": keep})
    return "-" if found is None else "infeasible" if "infeasible" in found else f"{found['perplexity'][text]:.2f}"


def seconds(kept: Kept, row: str, keep: float) -> str:
    """Seconds of the repair."""
    found = kept.get({"row": row, "keep": keep})
    return "-" if found is None or "infeasible" in found else f"{found['repair_seconds']:.0f}"


if __name__ == "__main__":
    main()
