"""A comparison as one HTML file."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import yaml

from rankwise.reports.compared import ComparedModels
from rankwise.reports.drawn import chart_with_numbers, render, versions_of
from rankwise.reports.escaping import printable
from rankwise.runs import write_atomically

_AXES = {"keep": "fraction kept", "bits": "bits a linear weight", "size": "bytes of all weights"}


def comparison_page(found: ComparedModels) -> str:
    """The page of a comparison."""
    curves = []
    for text in found.texts:
        series: dict[str, list[tuple[float, float]]] = {}
        for way in found.ways:
            for size in found.sizes:
                values = [v for row in found.cell(way, size) if (v := row.perplexity.get(text)) is not None]
                if values:
                    series.setdefault(way, []).append((size, mean(values)))
        dense = found.dense.perplexity[text]
        curves.append(
            chart_with_numbers(
                f"Perplexity on {text}",
                series,
                _AXES.get(str(getattr(found.recipe, "spelling", "keep")), "size"),
                "perplexity",
                log=True,
                level=None if dense is None else ("dense", dense),
            )
        )
    generations = [
        {"prompt": prompt, "texts": [(found.named(r), r.generations[prompt]) for r in found.rows if r.generations]}
        for prompt in found.dense.generations
    ]
    return render(
        "comparison.html.j2",
        title=f"{printable(getattr(found.recipe, 'model', 'a model'))}: ways to make it smaller",
        architecture=found.architecture,
        curves=[each for each in curves if each["lines"]],
        tables=found.tables(),
        problems=[f"{found.named(row)}: {row.problem}" for row in found.rows if row.problem],
        published=list({row.way: row.published for row in found.rows if row.published}.items()),
        generations=generations,
        recipe=yaml.safe_dump(found.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        versions=versions_of(found.machine),
    )


def write_comparison_page(folder: Path, found: ComparedModels) -> Path:
    """Write `comparison.html`; returns the file."""
    write_atomically(folder / "comparison.html", comparison_page(found))
    return folder / "comparison.html"
