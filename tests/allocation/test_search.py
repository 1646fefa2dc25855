"""Searches end to end: trials, kills, plans that travel, sensitivity, and what is said about bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from conftest import tiny_llama
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.cli import main
from rankwise.errors import BudgetError, DataError, MissingPackageError, RecipeError, RunError
from rankwise.evaluation import perplexity
from rankwise.flows.sensitivity import sensitivity
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.reports import draw_plan
from rankwise.sizes import Plan

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def searching(settings: Settings) -> Settings:
    """A recipe with a search on the tiny model."""

    def make(**changes: Any) -> dict[str, Any]:
        allocation = {"name": "bayesian", "space": "spectral", "trials": 14, **changes.pop("allocation", {})}
        validation = {"sequences": 6, "length": 32, "batch_size": 3, **changes.pop("validation", {})}
        return settings(**{"method": "two_sided", "allocation": allocation, "validation": validation, **changes})

    return make


def trials_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_search_is_never_worse_than_its_first_trial_and_is_written_down(searching: Settings, tmp_path: Path) -> None:
    result = compress(recipe_from(searching(output=str(tmp_path / "out"))))
    trials = trials_of(tmp_path / "out")
    assert [t["trial"] for t in trials] == list(range(14))
    assert (trials[0]["origin"], trials[-1]["origin"]) == ("spectral", "proposed")
    search = result.report.search
    assert search.objective.value == min(t["objective"] for t in trials) <= trials[0]["objective"]
    assert search.validation.sequences == 6
    assert search.seconds.bare_forward > 0
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan == result.plan
    assert plan.fingerprint == result.report.model_fingerprint
    assert plan.space == "spectral"
    assert set(plan.coordinates) == {"q", "k", "v", "o", "gate", "up", "down", "slope"}
    assert plan.objective is not None
    assert 0.57 < plan.kept <= 0.6
    for name in ("plan.svg", "trials.svg"):
        assert (tmp_path / "out" / name).read_text().startswith("<?xml")


def test_the_searchs_perplexity_is_that_of_the_checkpoint(searching: Settings, text: Path, tmp_path: Path) -> None:
    values = searching(
        output=str(tmp_path / "out"),
        validation={"source": f"text:{text}", "sample": "first"},
        allocation={"space": "rolesx1", "trials": 6},
    )
    result = compress(recipe_from(values))
    assert any("calibration sequences too" in note for note in result.report.notes)
    from rankwise.data import load_sequences, parse_source

    loaded = load_model(str(tmp_path / "out"))
    source = parse_source(f"text:{text}")
    ids = load_sequences(source, loaded.tokenizer, loaded.vocabulary, length=32, count=6, seed=None).ids
    measured = perplexity(loaded.model, ids, batch_size=3).perplexity
    assert measured == pytest.approx(result.report.search.objective.perplexity, rel=1e-4)


_KILLED = """
import os, signal, sys, yaml
from rankwise import compress
from rankwise.recipes import recipe_from
from rankwise.reports import draw_plan
from rankwise.allocation.trials import TrialLog
after, recipe, run_directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
real = TrialLog.append
def dying(self, record):
    if record["trial"] == after:
        with self.path.open("a") as file:
            file.write('{"trial": 1')
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, record)
TrialLog.append = dying
compress(recipe_from(yaml.safe_load(open(recipe))), run_directory=run_directory)
"""


@pytest.mark.long
def test_a_search_killed_in_trial_17_ends_with_the_same_plan(searching: Settings, tmp_path: Path) -> None:
    values = searching(allocation={"trials": 20})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    whole = compress(recipe_from({**values, "output": str(tmp_path / "whole")}), run_directory=tmp_path / "other")
    arguments = ["17", str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = next((tmp_path / "run").glob("search-*/trials.jsonl"))
    assert len(log.read_bytes().splitlines()) == 1 + 17 + 1
    reporter = Reporter(show=False)
    recipe = recipe_from({**values, "output": str(tmp_path / "again")})
    again = compress(recipe, run_directory=tmp_path / "run", reporter=reporter)
    assert any("not whole" in note for note in reporter.notes)
    assert again.plan == whole.plan
    for name in ("model.safetensors", "plan.json", "plan.svg"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [t["point"] for t in trials_of(tmp_path / "again")] == [t["point"] for t in trials_of(tmp_path / "whole")]


@pytest.mark.long
def test_more_trials_continue_and_other_settings_do_not(searching: Settings, tmp_path: Path) -> None:
    def run(name: str, run: str, **changes: Any) -> list[list[float]]:
        values = searching(output=str(tmp_path / name), **changes)
        compress(recipe_from(values), run_directory=tmp_path / run)
        return [t["point"] for t in trials_of(tmp_path / name)]

    few = run("few", "run", allocation={"trials": 11})
    more = run("more", "run", allocation={"trials": 14})
    assert more[:11] == few
    assert more == run("at once", "other", allocation={"trials": 14})
    assert len(list((tmp_path / "run").glob("search-*"))) == 1
    run("seeded", "run", allocation={"trials": 11}, seed=1)
    run("weighted", "run", allocation={"trials": 11}, objective={"kl_weight": 1.0})
    folders = sorted((tmp_path / "run").glob("search-*"))
    assert len(folders) == 3
    logs = [(folder / "trials.jsonl").read_bytes() for folder in folders]
    for folder, log in zip(folders, [*logs[1:], logs[0]], strict=True):
        (folder / "trials.jsonl").write_bytes(log)
    with pytest.raises(RunError, match="another recipe"):
        run("swapped", "run", allocation={"trials": 11})


@pytest.mark.parametrize("select", ["random", "top", "bottom"])
def test_validation_samples_are_selected_and_kept(searching: Settings, select: str, tmp_path: Path) -> None:
    chosen = {"sequences": 8, "select": select, "count": 3, "plans": 4}
    values = searching(validation=chosen, allocation={"space": "rolesx2", "trials": 3})
    result = compress(recipe_from(values), run_directory=tmp_path / "run")
    assert result.report.search.validation.sequences == 3
    folders = list((tmp_path / "run").glob("selection-*"))
    assert len(folders) == (select != "random")
    if folders:
        table = json.loads((folders[0] / "perplexities.json").read_text())
        assert (len(table), len(table[0])) == (4, 8)
    with pytest.raises(DataError, match="9 samples are to be selected and 8 were read"):
        compress(recipe_from(searching(validation={**chosen, "count": 9})))


def fine_tuned(tiny: Path, folder: Path) -> Path:
    model = tiny_llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def rankwise(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, in this process: starting Python anew takes seconds."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["rankwise", *arguments])
            with pytest.raises(SystemExit) as left:
                main()
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, int(left.value.code or 0), out.getvalue(), err.getvalue())


def test_plans_travel_to_a_fine_tune_and_are_refused_elsewhere(
    searching: Settings, tiny: Path, text: Path, tmp_path: Path
) -> None:
    first = compress(recipe_from(searching(output=str(tmp_path / "first"))))
    tuned = fine_tuned(tiny, tmp_path / "tuned")
    plan = str(tmp_path / "first" / "plan.json")
    common = ["--calibration", f"text:{text}", "--sequences", "40", "--length", "32", "--plan", plan]
    small = ["--set", "validation.sequences=6"]
    as_it_is = rankwise("compress", str(tuned), "-o", "zero", *common, cwd=tmp_path)
    assert as_it_is.returncode == 0, as_it_is.stderr
    assert "same architecture with other weights" in as_it_is.stderr
    moved = Plan.load(tmp_path / "zero" / "plan.json")
    assert moved.cuts == first.plan.cuts
    assert moved.method == "two_sided"
    warm = rankwise("compress", str(tuned), "-o", "warm", *common, *small, "--trials", "4", "-q", cwd=tmp_path)
    assert warm.returncode == 0, warm.stderr
    trials = trials_of(tmp_path / "warm")
    assert [t["origin"] for t in trials[:2]] == ["spectral", "plan"]
    assert len(trials) == 4
    assert trials[1]["point"] == pytest.approx(list(first.plan.coordinates.values()), abs=1e-9)
    scaled = rankwise("compress", str(tuned), "-o", "scaled", *common, "--keep", "0.5", cwd=tmp_path)
    assert scaled.returncode == 0, scaled.stderr
    assert 0.47 < Plan.load(tmp_path / "scaled" / "plan.json").kept <= 0.5
    same = rankwise("plan", "diff", plan, "zero/plan.json", cwd=tmp_path)
    assert (same.returncode, same.stdout.strip()) == (0, "the plans are the same")
    other = rankwise("plan", "diff", plan, "scaled/plan.json", cwd=tmp_path)
    assert other.returncode == 1
    assert "sites differ" in other.stdout
    shown = rankwise("plan", "show", plan, "--picture", "picture.png", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "bayesian:spectral" in shown.stdout
    assert "kept by group" in shown.stdout
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"

    wider = tiny_llama(intermediate_size=96)
    wider.save_pretrained(tmp_path / "wider")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "wider")
    refused = rankwise("compress", str(tmp_path / "wider"), "-o", "no", *common, cwd=tmp_path)
    assert refused.returncode == 2
    assert "model.layers.0.mlp.gate_proj is [96, 32], and the plan has [80, 32]" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "5"], "nothing is searched"),
        (["--allocation", "bayesian:7x7"], "no search space"),
        (["--plan", "absent.json"], "cannot be read"),
        (["--allocation", "bayesian:5x9"], "more than the model's 2 blocks"),
        (["--allocation", "bayesian:5x1", "--keep", "0.15"], "v stays dense"),
        (["--allocation", "spectral:3"], "takes no settings"),
        (["--allocation", "bayesian:spectral", "--set", "validation.sequences=100000"], "does not use"),
        (["--allocation", "bayesian:spectral", "--validation", "text:short.txt"], "fewer than one sequence"),
        (["--allocation", "plan"], "needs a file"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_explained(arguments: list[str], message: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words")
    common = ["--calibration", f"text:{text}", "--sequences", "20", "--length", "32"]
    done = rankwise("compress", str(tiny), "-o", "out", *common, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_optional_packages_the_rest_works(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No BoTorch: said before anything slow. No matplotlib: no pictures, and an error only where one is asked for."""
    monkeypatch.setitem(sys.modules, "botorch", None)
    monkeypatch.setattr("rankwise.reports.pictures.can_draw", lambda: False)
    monkeypatch.setattr("rankwise.stages.finish.can_draw", lambda: False)
    values = settings(allocation="bayesian:rolesx1", validation={"sequences": 4, "length": 32})
    with pytest.raises(MissingPackageError, match=r"rankwise\[search\]"):
        compress(recipe_from(values), run_directory=tmp_path / "run")
    assert not list((tmp_path / "run").glob("statistics*"))
    result = compress(recipe_from(settings(output=str(tmp_path / "out"))), run_directory=tmp_path / "run")
    assert not (tmp_path / "out" / "plan.svg").exists()
    with pytest.raises(MissingPackageError, match=r"rankwise\[plots\]"):
        draw_plan(tmp_path / "plan.svg", result.plan)


def test_validation_that_nothing_uses_is_said(settings: Settings, text: Path) -> None:
    result = compress(recipe_from(settings(validation={"source": f"text:{text}"})))
    assert any("validation text is not used" in note for note in result.report.notes)


def test_an_impossible_budget_is_said_before_anything_is_measured(searching: Settings, tmp_path: Path) -> None:
    values = searching(allocation={"space": "5x1"}, budget={"keep": 0.2, "rank_multiple": 1})
    with pytest.raises(BudgetError, match="no group may take less than"):
        compress(recipe_from(values), run_directory=tmp_path / "run")
    assert not list((tmp_path / "run").glob("statistics*"))


def test_sensitivity_is_measured_once_and_drawn(settings: Settings, tmp_path: Path) -> None:
    values = settings(validation={"sequences": 4, "length": 32})
    recipe = recipe_from(values)
    found = sensitivity(recipe, tmp_path / "out", fractions=(0.3, 0.7), run_directory=tmp_path / "run")
    roles = [p for p in found["points"] if p["kind"] == "role"]
    single = [p for p in found["points"] if p["kind"] == "site"]
    assert (len(roles), len(single)) == (14, 14)
    assert all(abs(p["kept"] - p["keep"]) < 0.06 for p in found["points"])
    for role in ("down", "o"):
        less, more = (next(p for p in roles if (p["role"], p["keep"]) == (role, keep)) for keep in (0.3, 0.7))
        assert less["kl"] > more["kl"] > 0
    with (tmp_path / "out" / "sensitivity.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 28
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == found
    for name in ("roles.svg", "sites.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    log = next((tmp_path / "run").glob("sensitivity-*/points.jsonl"))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:12]))
    assert sensitivity(recipe, tmp_path / "out", fractions=(0.3, 0.7), run_directory=tmp_path / "run") == found
    assert len(log.read_text().splitlines()) == len(lines)
    with pytest.raises(RecipeError, match="not between"):
        sensitivity(recipe, tmp_path / "out", fractions=(1.5,))


def test_sensitivity_on_the_command_line(tiny: Path, text: Path, tmp_path: Path) -> None:
    common = ["--calibration", f"text:{text}", "--sequences", "20", "--length", "32"]
    small = ["--set", "validation.sequences=4", "--set", "budget.rank_multiple=1", "--fractions", "0.5"]
    done = rankwise("sensitivity", str(tiny), "-o", "out", *common, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity of the original" in done.stdout
    bad = rankwise("sensitivity", str(tiny), "-o", "out", *common, "--fractions", "a,b", cwd=tmp_path)
    assert bad.returncode == 2
    assert "no number" in bad.stderr
