"""A search of units end to end: never worse than the plan without it, resumed as it would have gone, and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import compress
from rankwise.allocation.trials import TrialLog
from rankwise.checkpoints import load_model
from rankwise.errors import RecipeError
from rankwise.flows.compress import Compressed
from rankwise.recipes import recipe_from
from rankwise.sizes import Plan

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def searching(settings: Settings) -> Settings:
    """A recipe with a search of units on the tiny model."""

    def make(space: str = "5x1", trials: int = 7, keep: float = 0.5, **changes: Any) -> dict[str, Any]:
        base = {
            "method": {"name": "pruned", "multiple": 4},
            "allocation": {"name": "bayesian", "space": space, "trials": trials},
            "budget": {"keep": keep, "rank_multiple": 1},
            "validation": {"sequences": 6, "length": 32},
        }
        return settings(**{**base, **changes})

    return make


def searched(values: dict[str, Any], run: Path) -> Compressed:
    return compress(recipe_from(values), run_directory=run)


def trials_in(run: Path) -> list[dict[str, Any]]:
    (log,) = run.glob("search-*/trials.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()[1:]]


@pytest.mark.long
@pytest.mark.parametrize("space", ["5x1", "spectral"])
def test_a_search_of_units_is_never_worse_than_the_plan_without_it(
    space: str, searching: Settings, tmp_path: Path
) -> None:
    values = searching(space, output=str(tmp_path / "out"))
    result = searched(values, tmp_path / "run")
    plain = searched({**values, "allocation": "spectral", "output": None}, tmp_path / "plain")
    trials = trials_in(tmp_path / "run")
    assert [trials[0]["origin"], trials[-1]["origin"]] == ["spectral", "proposed"]
    assert not any(trial["failed"] for trial in trials)
    search, plan = result.report.search, result.plan
    assert search is not None
    assert search.objective.value == min(trial["objective"] for trial in trials)
    assert 0.48 < plan.kept <= 0.5
    assert plan.space == space
    assert plan.objective is not None
    assert plan == Plan.load(tmp_path / "out" / "plan.json")
    assert (tmp_path / "out" / "trials.jsonl").read_text().count("\n") == 7
    # A search of one trial is the plan without a search, to the last unit and rank.
    one = searched({**searching(space, trials=1), "output": None}, tmp_path / "run")
    assert (one.plan.stays, one.plan.cuts) == (plain.plan.stays, plain.plan.cuts)
    # Whatever was found can be had again.
    again = searched({**values, "allocation": f"plan:{tmp_path / 'out' / 'plan.json'}", "output": None}, tmp_path / "a")
    assert (again.plan.stays, again.plan.cuts) == (plan.stays, plan.cuts)
    assert not list((tmp_path / "run").glob(".work-*"))


def test_what_a_trial_scores_is_what_its_model_scores(searching: Settings, tmp_path: Path) -> None:
    values = searching(trials=3, output=str(tmp_path / "out"))
    found = searched(values, tmp_path / "run").report.search
    assert found is not None
    dense, small = load_model(values["model"]), load_model(str(tmp_path / "out"))
    from rankwise.evaluation import Objective, ObjectiveSettings
    from rankwise.progress import Reporter
    from rankwise.runs import Run
    from rankwise.stages import read_texts

    recipe = recipe_from(values)
    Run(tmp_path / "other")
    texts = read_texts(recipe, dense, Reporter(show=False), validate=True)
    assert texts.validation is not None
    judge = Objective(dense.model, texts.validation.ids, ObjectiveSettings(), lambda _cuts: None)
    value, perplexity, kl = judge.of(small.model)({})
    assert kl > 0
    assert (value, perplexity, kl) == pytest.approx(
        (found.objective.value, found.objective.perplexity, found.objective.kl), rel=1e-3
    )
    # By itself a model is as far from the original as it says; the original is not at all.
    assert judge.of(dense.model)({})[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.long
def test_a_search_of_units_that_was_stopped_goes_on_as_it_would_have(
    searching: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = searching()
    whole = searched(values, tmp_path / "whole")
    real = TrialLog.append

    def stopping(self: TrialLog, record: dict[str, Any]) -> None:
        if record["trial"] == 5:
            raise KeyboardInterrupt
        real(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(TrialLog, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            searched(values, tmp_path / "run")
    assert len(trials_in(tmp_path / "run")) == 5
    again = searched(values, tmp_path / "run")
    assert again.plan == whole.plan
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    points = [[trial["point"] for trial in trials_in(tmp_path / run)] for run in ("whole", "run")]
    assert points[0] == points[1]
    # More trials begin with those that there are; another seed has a log of its own.
    searched(searching(trials=8), tmp_path / "run")
    assert [trial["point"] for trial in trials_in(tmp_path / "run")][:7] == points[0]


def test_units_are_searched_for_few_bits_too(searching: Settings, tmp_path: Path) -> None:
    values = searching(trials=3, method={"name": "pruned", "multiple": 8}, budget={"bits": 2.5})
    values["calibration"] = {**values["calibration"], "sequences": 12}
    result = searched(values, tmp_path / "run")
    assert result.plan.bits_a_weight <= 2.5
    trials = trials_in(tmp_path / "run")
    assert len(trials) == 3
    assert all(cut.coded for cut in result.plan.cuts.values() if not cut.dense)
    assert result.report.search is not None
    assert result.report.search.objective.value == min(trial["objective"] for trial in trials)


def test_what_cannot_be_searched_is_said(searching: Settings) -> None:
    for method in ("flap", "llm_pruner"):
        with pytest.raises(RecipeError, match="makes it another: give uniform"):
            recipe_from(searching(method=method))
    with pytest.raises(RecipeError, match="in one process: leave executor away"):
        recipe_from(searching(executor="ray"))
    with pytest.raises(RecipeError, match="tries plans of one model"):
        recipe_from(searching(validation={"select": "top"}))
    with pytest.raises(RecipeError, match="5 depth groups are more than the model's 2 blocks"):
        compress(recipe_from(searching("5x5")))
    with pytest.raises(RecipeError, match="No layer has more units than have to stay"):
        compress(recipe_from(searching(method={"name": "pruned", "multiple": 4000}, exclude=["*self_attn*"])))
