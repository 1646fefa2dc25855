"""docs/results.md and docs/architectures.md are what their commands make of the results on disk."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, results


def test_the_page_of_results_is_made_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results_page

    assert results_page.PAGE.read_text() == results_page.page(), "run python benchmarks/results_page.py"
    for image in ("compare-wikitext2-test", "compare-mix-heldout"):
        assert (ROOT / f"docs/images/{image}.svg").is_file()
    for name in ("results_page", "common"):
        sys.modules.pop(name, None)


def test_the_page_of_architectures_is_made_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import families

    record = results("families")
    version = re.search(r"transformers ([\d.]+)\.", (ROOT / "benchmarks/results/families.md").read_text())
    assert version is not None
    assert families.PAGE.read_text() == families.page(record, version[1]), "run python benchmarks/families.py"
    for name in ("families", "small_configs", "common"):
        sys.modules.pop(name, None)


def test_a_family_that_is_not_tried_keeps_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import families

    monkeypatch.setattr(families, "RESULTS", tmp_path)
    assert families.before() == {}
    rows = {name: {"outcome": "fine", "sites": 1, "covered": 1.0} for name in ("llama", "no_longer_known")}
    (tmp_path / "families.json").write_text(json.dumps({"figures": rows}))
    assert families.before() == {"llama": rows["llama"]}
    for name in ("families", "small_configs", "common"):
        sys.modules.pop(name, None)


def test_the_least_of_a_column_is_bold_and_what_was_not_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results_page

    shown = results_page.ALLOCATION.table()
    assert "| no plan |" in shown
    assert shown.splitlines()[-1].startswith("| two_sided, bayesian:spectral | **50.5** |")
    assert "**" not in shown.splitlines()[2]
    for name in ("results_page", "common"):
        sys.modules.pop(name, None)
