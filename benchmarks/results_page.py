"""Write docs/results.md: every table of measurements that does not belong to one topic, from `benchmarks/results`.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Template

from common import RESULTS, ROOT, markdown_table

PAGE = ROOT / "docs" / "results.md"
TEXTS = ("wikitext2.test", "mix.heldout")

Record = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A table of figures of one results file.

    Attributes:
        file: in `benchmarks/results`, without its ending.
        first: head of the first column.
        rows: label -> what its records have.
        columns: head -> what its records have beside, the path of a figure, and its digits.
        part: where in the file the records are.
        bold: whether the least of a column is set in bold.
        missing: what stands where nothing was measured; rows of nothing else are left out.
    """

    file: str
    first: str
    rows: dict[str, Record]
    columns: dict[str, tuple[Record, str, int]]
    part: str = ""
    bold: bool = False
    missing: str = "no plan"

    def table(self) -> str:
        """The table in Markdown."""
        found = json.loads((RESULTS / f"{self.file}.json").read_text())["figures"]
        records = found[self.part] if self.part else found
        cells = [
            [
                _figure(records, {**row, **has}, path, digits) or self.missing
                for has, path, digits in self.columns.values()
            ]
            for row in self.rows.values()
        ]
        if self.bold:
            for i in range(len(self.columns)):
                numbers = [float(line[i]) for line in cells if line[i] != self.missing]
                for line in cells:
                    if line[i] != self.missing and float(line[i]) == min(numbers):
                        line[i] = f"**{line[i]}**"
        lines = [[label, *line] for label, line in zip(self.rows, cells, strict=True) if set(line) != {self.missing}]
        return markdown_table([self.first, *self.columns], lines)


def _figure(records: list[Record], has: Record, path: str, digits: int) -> str:
    values = []
    for record in records:
        if all(record.get(key) == value for key, value in has.items()):
            value: Any = record
            for key in path.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                values.append(value)
    return f"{mean(values):.{digits}f}" if values else ""


def _scores(*keeps: float) -> dict[str, tuple[Record, str, int]]:
    return {f"{text} {keep}": ({"keep": keep}, f"perplexity/{text}", 1) for text in TEXTS for keep in keeps}


def _named(key: str, *names: str) -> dict[str, Record]:
    return {name: {key: name} for name in names}


REPAIR = Grid(
    "repair-wiki-llama-8m",
    "storage, then repair",
    {
        "two factors": {"row": "two-factor, spectral"},
        "pivot rows": {"row": "pivoted, spectral"},
        "pivot rows, `blocks`": {"row": "1024 sequences: pivoted, spectral, blocks"},
        "pivot rows, `blocks,factors`": {"row": "1024 sequences: pivoted, spectral, blocks, factors"},
    },
    _scores(0.6, 0.4, 0.25, 0.15),
    "runs",
)
ALLOCATION = Grid(
    "allocation-wiki-llama-8m",
    "method, allocation",
    _named(
        "row",
        "bolaco, uniform",
        "bolaco, LoRD manual",
        "bolaco, bayesian:5x1",
        "bolaco, bayesian:5x4",
        "two_sided, uniform",
        "two_sided, spectral",
        "two_sided, bayesian:spectral",
    ),
    _scores(0.6, 0.4, 0.25),
    "runs",
    bold=True,
)
METHODS = Grid(
    "methods-wiki-llama-8m",
    "method",
    _named("method", "svd", "fwsvd", "asvd", "svd_llm", "afm", "bolaco", "two_sided"),
    {f"{text} {keep}": ({"keep": keep, "text": text}, "compressed", 1) for text in TEXTS for keep in (0.6, 0.4, 0.25)},
    bold=True,
)
REAL = Grid(
    "real_model",
    "method, allocation, storage",
    {
        "`bolaco`, uniform, two factors": {"row": "bolaco, uniform, two factors"},
        "`two_sided`, spectral, two factors": {"row": "two_sided, spectral, two factors"},
        "`two_sided`, spectral, `auto` (pivot rows where they are smaller)": {"row": "two_sided, spectral, auto"},
    },
    _scores(0.9, 0.8),
    bold=True,
)
STEPS = Grid(
    "caldera",
    "2 bits, unless said",
    {
        "rounded to the nearest, evenly spaced levels": {"label": "2 bits, to the nearest, uniform"},
        "and errors fed back (LDLQ)": {"label": "2 bits, LDLQ, uniform"},
        "and rotated, E8P lattice": {"label": "2 bits, LDLQ, Hadamard, E8P"},
        "and L R of rank 8 at 4 bits (`caldera`)": {"label": "2 bits, rank 8 at 4 bits"},
        "rank 16": {"label": "2 bits, rank 16 at 4 bits"},
        "rank 32": {"label": "2 bits, rank 32 at 4 bits"},
        "rank 64": {"label": "2 bits, rank 64 at 4 bits"},
        "without L R, 3 bits": {"label": "3 bits, LDLQ, Hadamard, E8P"},
        "without L R, 4 bits": {"label": "4 bits, LDLQ, Hadamard, E8P"},
    },
    {"bits a weight": ({}, "bits", 2), **{text: ({}, f"perplexity/{text}", 1) for text in TEXTS}},
)
MIXED = Grid(
    "mixed",
    "spread by estimated loss",
    {
        "Q alone, LDLQ": {"row": "Q alone, LDLQ"},
        "Q alone, two sides (`quantize`)": {"row": "Q alone"},
        "Q + L R, LDLQ (`caldera`)": {"row": "Q + L R"},
        "any form, LDLQ": {"row": "mixed, LDLQ"},
        "any form, two sides (`mixed`)": {"row": "mixed"},
    },
    {f"{text} {bits}": ({"asked": bits}, f"kl/{text}", 4) for text in TEXTS for bits in (2.1, 2.5, 3.0, 4.0)},
    "wiki-llama-8m",
    bold=True,
    missing="-",
)


def _last_table(name: str) -> str:
    """The table that a results file ends with."""
    return (RESULTS / f"{name}.md").read_text().rstrip().rpartition("\n\n")[2]


def page() -> str:
    """The page's text."""
    everything = json.loads((RESULTS / "compare.json").read_text())
    rows = (RESULTS / "compare.md").read_text().partition("\n\n")[2].partition("\n\n")[2]
    tables = {
        "real": REAL,
        "repair": REPAIR,
        "allocation": ALLOCATION,
        "methods": METHODS,
        "steps": STEPS,
        "mixed": MIXED,
    }
    on_gpu = {name: _last_table(f"{name}-gpu") for name in ("runs", "trials")}
    text = (Path(__file__).resolve().parent / "results_page.md.j2").read_text()
    return Template(text, keep_trailing_newline=True).render(
        compare=rows.strip(), date=everything["date"], **on_gpu, **{name: grid.table() for name, grid in tables.items()}
    )


if __name__ == "__main__":
    PAGE.write_text(page())
