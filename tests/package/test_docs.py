"""Pages that name code stay true: every function named with its file exists there, every test and link too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT

PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def test_the_trace_names_functions_that_are_where_it_says() -> None:
    page = " ".join((ROOT / "docs/trace-one-weight.md").read_text().split())
    named = re.findall(r"`([A-Za-z_.]+)`(?:, `[^`]+`)? (?:[a-z]+ )?\(`([\w/]+\.py)`\)", page)
    assert len(named) > 25
    for name, file in named:
        text = (ROOT / "src/rankwise" / file).read_text()
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", text), f"{name} is not in {file}"


@pytest.mark.long
def test_the_trace_has_the_numbers_of_the_run() -> None:
    from rankwise.flows.compress import compress
    from rankwise.quickstart import MODEL
    from rankwise.recipes import Calibration, Recipe
    from rankwise.sizes import DENSE, Cut, Form

    recipe = Recipe(model=str(MODEL), calibration=Calibration(source="bundled:train", sequences=128, length=256))
    result = compress(recipe)
    name = "model.layers.2.mlp.up_proj"
    (m, n), rank = result.plan.shapes[name], result.plan.cuts[name].rank or 0
    page = (ROOT / "docs/trace-one-weight.md").read_text()
    for number in (
        f"[{m}, {n}]",
        f"{m * n:,}",
        f"{16 * m * n:,}",
        f"[{rank}, {n}]",
        f"rank {rank}",
        f"{rank * (m + n):,}",
        f"{rank} ({m} + {n} - {rank}) = {rank * (m + n - rank):,}",
        f"{m - rank}",
        f"all {len(result.plan.cuts)} sites",
    ):
        assert number in page, number
    assert result.report.sites[name].storage == "pivoted"
    assert result.model.get_submodule(name).place is None
    assert result.plan.cuts["model.layers.2.mlp.down_proj"] == DENSE
    form, codes = Form(), Cut(16, 2, 4)
    whole = form.bits((m, n), codes)
    for number in (2 * m * n, 16 * m, 16 * form.rank_bits((m, n), 4), m + n):
        assert f"{number:,}" in page, number
    assert whole == 2 * m * n + 16 * m + 16 * form.rank_bits((m, n), 4) + m + n
    assert f"{whole / (m * n):.2f} bits a weight" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:benchmarks|docs|examples|tests)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), target
