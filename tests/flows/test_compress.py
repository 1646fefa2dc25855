"""The flow: end to end, reuse of stages, and a kill at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import KILLED
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.errors import RunError
from rankwise.layers import substitute
from rankwise.methods import FACTORISATIONS
from rankwise.models import find_sites
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.stages import jobs, looked, measuring

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("method", FACTORISATIONS)
def test_every_method_runs_and_full_rank_changes_nothing(method: str, settings: Settings, tiny: Path) -> None:
    """At full rank factors are exact, so logits move by rounding only; at 60% they move more."""
    ids = torch.arange(3, 27)[None]
    recipe = recipe_from(settings(method=method, allocation="uniform"))
    reporter = Reporter(show=False)
    result = compress(recipe, reporter=reporter)
    assert 0.58 < result.plan.kept <= 0.6
    with torch.no_grad():
        small = result.model(input_ids=ids).logits

    loaded = load_model(str(tiny))
    with torch.no_grad():
        dense = loaded.model(input_ids=ids).logits
    folder = next(Path(result.report.run_directory).glob(f"outlooks-{method}-*"))
    for site in find_sites(loaded.model):
        basis = looked.load_outlook(folder / f"{site.name}.safetensors", "e8p").basis
        energy = basis.energy
        assert (energy >= 0).all()
        if method != "two_sided":  # Its directions come from a damped metric, its energies from the measured one.
            assert (energy[:-1] >= energy[1:] - 1e-6 * energy[0]).all()
        substitute(loaded.model, site.name, basis.truncate(basis.rank), "two_factor", torch.float32)
    with torch.no_grad():
        whole = loaded.model(input_ids=ids).logits
    scale = dense.abs().max()
    assert (whole - dense).abs().max() < 2e-3 * scale
    assert (small - dense).abs().max() > 1e-2 * scale


def test_the_bias_makes_the_mean_output_exact(settings: Settings, tiny: Path) -> None:
    """E[L R x + b'] over the calibration tokens equals E[W x + b] at the first layer, whose input is unchanged."""
    values = settings(method="afm", budget={"keep": 0.3, "rank_multiple": 1})
    small = compress(recipe_from(values)).model
    loaded = load_model(str(tiny))
    ids = load_sequences(
        parse_source(values["calibration"]["source"]), loaded.tokenizer, 2048, length=32, count=40, seed=0
    ).ids

    def mean_output(model: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _m, _a, y: seen.append(y.double()))
        with torch.no_grad():
            model(input_ids=ids)
        return seen[0].mean((0, 1))

    torch.testing.assert_close(mean_output(small), mean_output(loaded.model), atol=1e-5, rtol=1e-4)


def test_another_keep_or_method_reuses_what_is_still_valid(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    collected: list[list[str]] = []
    decomposed: list[str] = []
    real = measuring.collecting

    def counting(model: Any, sites: Any, tokens: Any, requests: Any, **options: Any) -> Any:
        collected.append([request.name for request in requests])
        return real(model, sites, tokens, requests, **options)

    monkeypatch.setattr(measuring, "collecting", counting)
    save = jobs.save_outlook
    monkeypatch.setattr(jobs, "save_outlook", lambda path, *rest: (decomposed.append(path.name), save(path, *rest)))

    def run(**changes: Any) -> None:
        compress(recipe_from(settings(**changes)), run_directory=tmp_path / "run")

    run(method="afm")
    assert (collected, len(decomposed)) == ([["moments"]], 14)
    run(method="afm", budget={"keep": 0.5, "rank_multiple": 1})
    assert (len(collected), len(decomposed)) == (1, 14)
    run(method="svd_llm")
    assert (len(collected), len(decomposed)) == (1, 28)
    run(method="two_sided")
    assert (collected[1:], len(decomposed)) == ([["curvature"]], 42)
    other_text = {**settings()["calibration"], "sequences": 39}
    run(method="afm", calibration=other_text)
    assert collected[2:] == [["moments"]]


@pytest.mark.long
def test_after_kills_the_same_command_ends_with_the_same_bytes(settings: Settings, tmp_path: Path) -> None:
    """Killed while it writes statistics, then among the outlooks, then in the checkpoint, then left to finish."""
    values = settings(method="two_sided", output=str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    whole = compress(recipe_from({**values, "output": str(tmp_path / "whole")}), run_directory=tmp_path / "other")
    run = tmp_path / "run"
    for where, after in (("save_totals", 3), ("save_outlook", 5), ("_write_weights", 0)):
        arguments = [where, str(after), str(tmp_path / "recipe.yaml"), str(run)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
        if where == "save_outlook":
            kept = next(run.glob("outlooks-*"))
            assert len(list(kept.glob("*.safetensors"))) == 5
    again = compress(recipe_from(values), run_directory=run)
    assert again.plan == whole.plan
    names = ("model.safetensors", "plan.json", "modeling_rankwise.py")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(run.glob("*.partial"))


def test_a_disk_that_fills_up_among_the_stages_is_said_and_continued(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = looked.save_file, []

    def fills_up(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(looked, "save_file", fills_up)
    with pytest.raises(RunError, match="disk is full"):
        compress(recipe_from(settings()), run_directory=tmp_path / "run")
    compress(recipe_from(settings()), run_directory=tmp_path / "run")
    assert len(calls) == 6 + 9  # five of fourteen outlooks were not done again


@pytest.mark.parametrize(("asked", "expected"), [(None, ["started"]), (False, ["started"]), (True, [])])
def test_the_process_that_reloads_begins_early_but_not_beside_what_is_timed(
    asked: bool | None,
    expected: list[str],
    settings: Settings,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    monkeypatch.setattr("rankwise.checkpoints.expect_reload", lambda: begun.append("started"))
    evaluation = {"source": f"text:{text}", "length": 32, "sequences": 4, "speed": asked}
    more = {} if asked is None else {"evaluation": evaluation}
    compress(recipe_from(settings(output=str(tmp_path / "out"), **more)))
    assert begun == expected


def test_the_report_tells_times_sizes_and_scores(settings: Settings, text: Path) -> None:
    evaluation = {"source": f"text:{text}", "length": 32, "sequences": 10}
    report = compress(recipe_from(settings(evaluation=evaluation))).report
    assert set(report.stages) >= {"load", "statistics", "plan", "fits", "evaluate dense", "checkpoint"}
    assert all(stage.seconds >= 0 and stage.peak_memory_bytes > 0 for stage in report.stages.values())
    assert report.evaluation.dense.tokens == 10 * 31
    assert (report.keep.asked, report.keep.got) == (0.6, pytest.approx(0.6, abs=0.01))
    assert len(report.sites) == 14
    assert all(0 < site.dropped_energy < 1 for site in report.sites.values() if site.rank)
