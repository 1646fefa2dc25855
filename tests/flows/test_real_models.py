"""Real pretrained models, with figures of an independent prototype to hold ours against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise import compress
from rankwise.recipes import recipe_from


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stories")


def scores(
    shared: Path,
    run_directory: Path,
    method: Any,
    keep: float,
    allocation: Any = "uniform",
    storage: str = "two_factor",
    repair: Any = (),
) -> tuple[float, float, float]:
    tokens = f"tokens:{shared}/data/stories260k.tokens.safetensors"
    values: dict[str, Any] = {
        "model": str(shared / "models/stories260k"),
        "method": method,
        "allocation": allocation,
        "validation": {"source": tokens, "skip": 192, "sequences": 32, "sample": "first"},
        "budget": {"keep": keep, "rank_multiple": 1, "storage": storage},
        "repair": dict(repair),
        "calibration": {"source": tokens, "sequences": 192, "sample": "first"},
        "evaluation": {"source": tokens, "skip": 224},
    }
    result = compress(recipe_from(values), run_directory=run_directory)
    found = result.report.evaluation
    assert found.dense.windows == 96
    return found.dense.perplexity, found.compressed.perplexity, result.plan.kept


PROTOTYPE = {"svd_llm": (15.3, 27.2, 55.6), "afm": (14.2, 24.2, 50.2)}


@pytest.mark.long
@pytest.mark.parametrize("method", PROTOTYPE)
def test_stories260k_agrees_with_the_prototype(method: str, shared: Path, run_directory: Path) -> None:
    for keep, expected in zip((0.879, 0.791, 0.684), PROTOTYPE[method], strict=True):
        dense, small, _ = scores(shared, run_directory, method, keep)
        assert dense == pytest.approx(3.57, abs=0.005)
        assert small == pytest.approx(expected, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("method", PROTOTYPE)
def test_a_filled_budget_does_better_than_floored_ranks(method: str, shared: Path, run_directory: Path) -> None:
    for keep, floored in zip((0.9, 0.8, 0.7), PROTOTYPE[method], strict=True):
        _, small, kept = scores(shared, run_directory, method, keep)
        assert keep - 0.001 < kept <= keep
        assert small < floored


@pytest.mark.long
def test_weighing_by_data_and_by_loss_each_pay(shared: Path, run_directory: Path) -> None:
    plain, outputs, both = (scores(shared, run_directory, m, 0.8)[1] for m in ("svd", "bolaco", "two_sided"))
    assert both < outputs < 0.5 * plain


@pytest.mark.long
def test_a_plan_by_estimated_loss_does_what_the_prototype_did(shared: Path, run_directory: Path) -> None:
    method = {"name": "two_sided", "damping": 0.1}
    for keep, expected in zip((0.9, 0.8, 0.7), (4.1, 15.5, 80), strict=True):
        _, small, kept = scores(shared, run_directory, method, keep, "spectral")
        assert small < expected
        assert keep - 0.002 < kept <= keep


def test_pivoted_storage_does_what_the_prototype_did(shared: Path, run_directory: Path) -> None:
    method = {"name": "two_sided", "damping": 0.01}
    for keep, expected in zip((0.9, 0.8, 0.7), (3.85, 5.5, 16.5), strict=True):
        _, small, kept = scores(shared, run_directory, method, keep, "spectral", "pivoted")
        assert small < expected
        assert keep - 0.002 < kept <= keep


@pytest.mark.long
@pytest.mark.parametrize(("factors", "most"), [("left", 12), ("both", 9)])
def test_a_refit_takes_back_a_good_part_of_the_loss(
    factors: str, most: float, shared: Path, run_directory: Path
) -> None:
    repair = {"steps": "refit", "refit": {"factors": factors}}
    _, small, _ = scores(shared, run_directory, "two_sided", 0.7, "spectral", "pivoted", repair)
    assert 3.57 < small < most


@pytest.mark.slow
def test_refined_blocks_do_what_the_prototypes_did(shared: Path, run_directory: Path) -> None:
    for keep, expected in ((0.8, 4.25), (0.7, 5.6)):
        repair = {"steps": "blocks"}
        _, small, kept = scores(shared, run_directory, "two_sided", keep, "spectral", "pivoted", repair)
        assert 3.57 < small < expected
        assert kept <= keep


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "allocation", "most"),
    [("bolaco", "bayesian:5x1", 9.9), ("two_sided", "bayesian:spectral", 8.0)],
)
def test_searches_find_what_the_prototype_found(
    method: str, allocation: str, most: float, shared: Path, run_directory: Path
) -> None:
    assert scores(shared, run_directory, method, 0.8, allocation)[1] < most
