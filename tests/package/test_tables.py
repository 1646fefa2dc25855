"""Tables in README and docs show the numbers of `benchmarks/results`, and say which of them and of what storage.

The text above a table of measurements names its results file, and `TABLES` says which figure a row and a column show.
`DESCRIPTIONS` lists the tables without measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from conftest import ROOT, figures

PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
PAGES.pop("docs/results.md", None)  # made from the results; see test_results_page.py
PAGES.pop("docs/architectures.md", None)  # the same
TEXTS = ("wikitext2.test", "mix.heldout")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
RESULTS = re.compile(r"`benchmarks/results/([\w-]+)\.md`")
STORAGE = re.compile(r"two factors|pivot rows|pivoted|codes")

Record = dict[str, Any]

DESCRIPTIONS = {
    ("README.md", "option"),
    ("docs/allocation.md", "`--allocation`"),
    ("docs/architecture.md", "noun"),
    ("docs/methods/README.md", "method"),
    ("docs/methods/mixed.md", "cut"),
    ("docs/methods/caldera.md", "setting"),
    ("docs/papers.md", "in Bolaco"),
    ("docs/papers.md", "in CALDERA"),
    ("docs/pruning.md", "`--allocation`"),
    ("docs/quantisation.md", "`--allocation`"),
    ("docs/reliability.md", "exit status"),
    ("docs/memory.md", "`--memory`"),
    ("docs/repair.md", "step"),
    ("docs/scaling.md", "part of the run"),
    ("docs/storage.md", "`--storage`"),
    ("docs/vision.md", "part"),
}
"""Tables without measurements: page, head of the first column."""


@dataclass(frozen=True)
class Shown:
    """What a table shows of a results file.

    Attributes:
        rows: label of a row -> what its records have.
        columns: head of a column -> what its records have, then the names of the figures in a cell.
        part: where in the file the records are.
    """

    rows: dict[str, Record]
    columns: dict[str, tuple[Record, list[str]]]
    part: str = ""


def scores(*keeps: float) -> dict[str, tuple[Record, list[str]]]:
    return {f"{text} {keep}": ({"keep": keep}, [f"perplexity/{text}"]) for text in TEXTS for keep in keeps}


def rows(key: str, names: dict[str, str]) -> dict[str, Record]:
    return {label: {key: name} for label, name in names.items()}


def named(key: str, *names: str) -> dict[str, Record]:
    return {name: {key: name} for name in names}


SPEEDS: dict[str, tuple[Record, list[str]]] = {
    mode: ({"mode": mode}, ["ratio", "operations_ratio"])
    for mode in ("prefill 1 x 512", "prefill 8 x 512", "decode, batch 1", "decode, batch 8")
}

TABLES = {
    ("README.md", "compare"): Shown(
        {
            "the original": {"way": "dense"},
            "ours, low rank, trained, 0.8 of the weights": {"way": "two_sided+subspace", "asked": 0.8},
            "ours, low rank, searched": {"way": "two_sided/bayesian:spectral", "asked": 0.8},
            "ours, low rank, as it comes": {"way": "two_sided", "asked": 0.8},
            "LLM-Pruner, trained (LoRA)": {"way": "llm_pruner+lora", "asked": 0.8},
            "Bolaco, ranks searched": {"way": "bolaco/bayesian:5x1", "asked": 0.8},
            "Bolaco, ranks searched, then trained": {"way": "bolaco/bayesian:5x1+subspace", "asked": 0.8},
            "LoRD": {"way": "afm/manual", "asked": 0.8},
            "SVD-LLM (W)": {"way": "svd_llm/uniform", "asked": 0.8},
            "Bolaco, uniform ranks": {"way": "bolaco/uniform", "asked": 0.8},
            "FLAP": {"way": "flap", "asked": 0.8},
            "LLM-Pruner, not recovered": {"way": "llm_pruner", "asked": 0.8},
            "SliceGPT": {"way": "slicegpt", "asked": 0.8},
            "ASVD": {"way": "asvd/uniform", "asked": 0.8},
            "ours, low rank, trained, 0.6 of the weights": {"way": "two_sided+subspace", "asked": 0.6},
            "ours, heads, channels and ranks (`pruned`), 0.6": {"way": "pruned", "asked": 0.6},
            "Bolaco, ranks searched, then trained, 0.6": {"way": "bolaco/bayesian:5x1+subspace", "asked": 0.6},
            "LLM-Pruner, trained (LoRA), 0.6": {"way": "llm_pruner+lora", "asked": 0.6},
            "ours, low rank, searched, 0.6": {"way": "two_sided/bayesian:spectral", "asked": 0.6},
            "ours, codes alone, 3 bits": {"way": "quantize", "asked": 3.0},
            "llama.cpp Q3_K": {"way": "llama.cpp Q3_K"},
            "llama.cpp IQ3_XXS": {"way": "llama.cpp IQ3_XXS"},
            "GPTQ, 3 bits": {"way": "GPTQ 3 bits, groups of 64"},
            "GPTQ, 4 bits": {"way": "GPTQ 4 bits, groups of 64"},
            "HQQ, 3 bits": {"way": "HQQ 3 bits, groups of 64"},
            "ours, codes alone, 2.5 bits": {"way": "quantize", "asked": 2.5},
            "llama.cpp Q2_K": {"way": "llama.cpp Q2_K"},
            "ours, codes and low rank (`mixed`), 4 bits": {"way": "mixed", "asked": 4.0},
            "ours, codes alone, 4 bits": {"way": "quantize", "asked": 4.0},
            "llama.cpp Q4_K": {"way": "llama.cpp Q4_K"},
        },
        {
            "MB in all": ({}, ["megabytes"]),
            "bits a linear weight": ({}, ["bits"]),
            **{text: ({}, [f"perplexity/{text}"]) for text in TEXTS},
        },
    ),
    ("docs/pruning.md", "pruning"): Shown(
        named(
            "row",
            *("FLAP", "FLAP, linear", "SliceGPT", "SliceGPT, one rotation", "LLM-Pruner", "LLM-Pruner, linear"),
            *("LLM-Pruner + LoRA", "Bolaco, uniform", "Bolaco, 5x1", "two_sided", "pruned", "pruned, searched"),
        ),
        {
            f"{model} {keep}": ({"model": model, "asked": keep}, ["perplexity"])
            for model in ("stories260k", "wiki-llama-8m")
            for keep in (0.8, 0.6, 0.4)
        },
    ),
    ("docs/methods/mixed.md", "mixed"): Shown(
        named("row", "Q alone, LDLQ", "Q alone", "Q + L R", "mixed, LDLQ", "mixed"),
        {f"{t} {bits}": ({"asked": bits}, [f"perplexity/{t}"]) for t in TEXTS for bits in (2.1, 2.5, 3.0, 4.0)},
        "wiki-llama-8m",
    ),
    ("docs/quantisation.md", "mixed"): Shown(
        named("row", "Q alone, LDLQ", "Q alone", "Q + L R", "mixed, LDLQ", "mixed"),
        {f"{t} {bits}": ({"asked": bits}, [f"perplexity/{t}"]) for t in TEXTS for bits in (2.1, 2.5, 3.0, 4.0)},
        "smollm2-135m",
    ),
    ("docs/repair.md", "repair-stories260k"): Shown(
        rows(
            "row",
            {
                "none": "pivoted, spectral",
                "a search of 50 trials in place of repair": "pivoted, search",
                "`refit`": "pivoted, spectral, refit",
                "`refit`, both factors": "pivoted, spectral, refit of both factors",
                "`subspace`": "pivoted, spectral, subspace",
                "`blocks`": "pivoted, spectral, blocks",
                "`factors`": "pivoted, spectral, factors",
                "`blocks,factors`": "pivoted, spectral, blocks, factors",
                "`refit` (both), `blocks`, `factors`": "pivoted, spectral, refit of both factors, blocks, factors",
                "a search, then `blocks,factors`": "pivoted, search, blocks, factors",
            },
        ),
        {
            **{f"keep {keep}": ({"keep": keep}, ["perplexity/sampled stories"]) for keep in (0.9, 0.8, 0.7)},
            "seconds": ({}, ["repair_seconds"]),
        },
        "runs",
    ),
    ("docs/repair.md", "repair-wiki-llama-8m"): Shown(
        rows(
            "row",
            {
                "none": "pivoted, spectral",
                "a search of 50 trials in place of repair": "pivoted, search",
                "`refit`": "pivoted, spectral, refit",
                "`refit`, both factors": "pivoted, spectral, refit of both factors",
                "`subspace`": "pivoted, spectral, subspace",
                "`blocks`": "pivoted, spectral, blocks",
                "`factors`": "pivoted, spectral, factors",
                "`blocks,factors`": "pivoted, spectral, blocks, factors",
                "`blocks,factors` on 1,024 x 256 tokens": "1024 sequences: pivoted, spectral, blocks, factors",
                "a search, then `blocks,factors`": "pivoted, search, blocks, factors",
            },
        ),
        {**scores(0.4, 0.25), "seconds 0.4": ({"keep": 0.4}, ["repair_seconds"])},
        "runs",
    ),
    ("docs/reliability.md", "reliability"): Shown(
        named(
            "what",
            "kill -9 at a random moment, the same command again",
            "a disk that fills up, room made, the same command again",
            "a finished stage with one damaged file, the same command again",
            "two runs with one output",
            "one of two Ray workers killed in a job of each kind",
        ),
        {each: ({}, [each]) for each in ("times", "right", "lost", "silently wrong", "foreign")},
    ),
    ("docs/storage.md", "head"): Shown(
        {str(fraction): {"fraction": fraction} for fraction in (0.8, 0.6, 0.4)},
        {
            "SVD of W": ({"way": "the matrix alone (SVD)"}, list(TEXTS)),
            "inputs": ({"way": "inputs"}, list(TEXTS)),
            "inputs and rows (as it is)": ({"way": "inputs, and rows damped by 1 (as it is)"}, list(TEXTS)),
        },
    ),
    ("docs/memory.md", "memory_modes"): Shown(
        {
            "SmolLM2-135M, `whole`": {"case": "smollm2", "mode": "whole"},
            "SmolLM2-135M, `blocks`": {"case": "smollm2", "mode": "blocks"},
            "SmolLM2-135M, `disk`": {"case": "smollm2", "mode": "disk"},
            "shapes of Llama-3.2-1B, `disk`": {"case": "llama-1b", "mode": "disk"},
            "four blocks of these, `disk`": {"case": "llama-1b-4", "mode": "disk"},
            "two blocks of 7B, `disk`": {"case": "llama-7b-2", "mode": "disk"},
        },
        {
            "GB": ({}, ["gb"]),
            "GB expected": ({}, ["expected_gb"]),
            **{
                f"GB, {stage}": ({}, [f"stages/{stage}/gb"])
                for stage in ("evaluate dense", "statistics", "outlooks", "storage")
            },
        },
    ),
    ("docs/memory.md", "memory_modes-gpu"): Shown(
        {
            "SmolLM2-135M, `whole`": {"case": "smollm2", "mode": "whole"},
            "four blocks of Llama-3.2-1B, `whole`": {"case": "llama-1b-4", "mode": "whole"},
            "four blocks of Llama-3.2-1B, `blocks`": {"case": "llama-1b-4", "mode": "blocks"},
        },
        {
            "GB of the GPU": ({}, ["gpu_gb"]),
            "GB expected": ({}, ["expected_gpu_gb"]),
            "GB of the host": ({}, ["gb"]),
            "GB expected, host": ({}, ["expected_gb"]),
            "GB of the GPU, statistics": ({}, ["stages/statistics/gpu_gb"]),
            "GB of the GPU, outlooks": ({}, ["stages/outlooks/gpu_gb"]),
        },
    ),
    ("docs/storage.md", "speed-cpu"): Shown(
        {
            "two factors, keep 0.8": {"variant": "two factors", "keep": 0.8},
            "pivoted, keep 0.8": {"variant": "pivoted", "keep": 0.8},
            "pivoted, the ranks of the first row": {"variant": "pivoted, ranks of two factors", "keep": 0.8},
            "two factors, keep 0.5": {"variant": "two factors", "keep": 0.5},
            "pivoted, keep 0.5": {"variant": "pivoted", "keep": 0.5},
            "pivoted, the ranks of the fourth row": {"variant": "pivoted, ranks of two factors", "keep": 0.5},
        },
        SPEEDS,
        "models",
    ),
    ("docs/storage.md", "speed-gpu"): Shown(
        {
            "two factors, keep 0.8": {"variant": "two factors", "keep": 0.8},
            "pivoted, keep 0.8": {"variant": "pivoted", "keep": 0.8},
            "two factors, keep 0.5": {"variant": "two factors", "keep": 0.5},
            "pivoted, keep 0.5": {"variant": "pivoted", "keep": 0.5},
        },
        SPEEDS,
        "models",
    ),
}
"""Tables of measurements: page, results file."""


@dataclass(frozen=True)
class Table:
    """A table of a page, and the paragraph above it."""

    page: str
    above: str
    head: list[str]
    body: list[list[str]]

    @property
    def key(self) -> tuple[str, str]:
        """As in `TABLES` where a results file is named, as in `DESCRIPTIONS` elsewhere."""
        results = RESULTS.findall(self.above)
        assert len(results) <= 1, f"{self}: two results files"
        return self.page, (results or self.head)[0]

    def __str__(self) -> str:
        return f"{self.page}, table headed {' | '.join(self.head)}"


def tables(page: str) -> Iterator[Table]:
    """The tables of a page, in order."""
    above = ""
    for block in re.split(r"\n\n+", re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.M | re.S)):
        text, mark, table = f"\n{block}".partition("\n|")
        above = text if text.strip() else above
        if mark:
            cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[:-1]] for line in table.split("\n|")]
            yield Table(page, above, cells[0], cells[2:])


def check(table: Table, shown: Shown, label: str, column: str, cell: str) -> None:
    """A cell has the figures of its records, rounded to its digits; nothing where none was measured."""
    has, names = shown.columns[column]
    what = {**shown.rows[label], **has}
    expected = [figures(table.key[1], name, shown.part, **what) for name in names]
    numbers = NUMBER.findall(cell)
    if not numbers:
        assert not any(map(any, expected)), f"{table}: {label}, {column} was measured"
        return
    assert all(expected), f"{table}: {label}, {column} was not measured"
    digits = [len(number.partition(".")[2]) for number in numbers]
    right = [f"{mean(values):.{places}f}" for values, places in zip(expected, digits, strict=True)]
    assert numbers == right, f"{table}: {label}, {column}"


@pytest.mark.parametrize("page", PAGES)
def test_tables_show_the_figures_of_the_results_they_name(page: str) -> None:
    for table in tables(page):
        if table.key in DESCRIPTIONS:
            continue
        assert table.key in TABLES, f"{table}: neither in TABLES, by the results file named above it, nor a description"
        shown = TABLES[table.key]
        assert {row[0] for row in table.body} == set(shown.rows), table
        assert set(table.head[1:]) == set(shown.columns), table
        for label, *cells in table.body:
            for column, cell in zip(table.head[1:], cells, strict=True):
                check(table, shown, label, column, cell)


def test_every_table_is_found_and_says_what_storage_it_is_of() -> None:
    found = [table for page in PAGES for table in tables(page)]
    assert sorted(table.key for table in found) == sorted({*TABLES, *DESCRIPTIONS})
    for table in found:
        if table.key in TABLES:
            labels = [row[0] for row in table.body]
            assert STORAGE.search(" ".join([table.above, *table.head, *labels])), table


@pytest.mark.parametrize("page", PAGES)
def test_bold_is_the_least_of_a_column(page: str) -> None:
    for table in tables(page):
        columns = list(zip(*table.body, strict=True))[1:]
        if any("**" in cell for column in columns for cell in column):
            for head, column in zip(table.head[1:], columns, strict=True):
                numbers = {cell: float(NUMBER.findall(cell)[0]) for cell in column if NUMBER.search(cell)}
                least = {cell for cell, number in numbers.items() if number == min(numbers.values())}
                assert {cell for cell in column if "**" in cell} == least, f"{table}: {head}"


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = PAGES["docs/storage.md"].read_text()
    changed = tmp_path / "page.md"
    monkeypatch.setitem(PAGES, "docs/storage.md", changed)
    for right, wrong in (
        ("0.79 (0.80)", "0.78 (0.80)"),
        ("0.79 (0.80)", "0.79"),
        ("0.79 (0.80)", ""),
        ("two factors, keep 0.8", "two factors, keep 0.9"),
        ("`benchmarks/results/speed-cpu.md`", ""),
    ):
        assert right in text
        changed.write_text(text.replace(right, wrong, 1))
        with pytest.raises((AssertionError, ValueError)):
            test_tables_show_the_figures_of_the_results_they_name("docs/storage.md")
