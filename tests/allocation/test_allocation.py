"""Ranks: the spectral plan, the spaces a search moves in, the log of trials and the surrogate."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_problem
from rankwise.allocation import (
    Cuts,
    MultipleChoice,
    Problem,
    TrialLog,
    allocation_from,
    by_variance,
    fill,
    random_plans,
)
from rankwise.allocation.base import Outcome
from rankwise.allocation.search import search
from rankwise.allocation.spaces import GroupSpace, MultiplierSpace, Space, space_named
from rankwise.allocation.surrogate import propose
from rankwise.errors import BudgetError, NotFiniteError, RecipeError, RunError
from rankwise.methods import estimated_losses
from rankwise.models import Site, places_of
from rankwise.progress import Reporter
from rankwise.sizes import DENSE, Cut, Form, Plan

ROLES = {
    "q": (64, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 64),
    "gate": (160, 64),
    "up": (160, 64),
    "down": (64, 160),
}
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def llama_sites(blocks: int = 4, scale: int = 1) -> list[Site]:
    sites = []
    for block in range(blocks):
        for role, (m, n) in ROLES.items():
            name = f"model.layers.{block}.{NAMES.get(role, role + '_proj')}"
            sites.append(Site(name, role, block, scale * m, scale * n, False, False, name))
    return sites


def decaying(sites: list[Site], seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    energies = {}
    for site in sites:
        rate = 2 + 30 * torch.rand(1, generator=source, dtype=torch.float64)
        size = torch.rand(1, generator=source, dtype=torch.float64) * 10
        energies[site.name] = size * torch.exp(-torch.arange(min(site.m, site.n), dtype=torch.float64) / rate)
    return energies


def seen(sites: list[Site], energies: dict[str, torch.Tensor], **budget: Any) -> Problem:
    """A problem whose losses are what the energies say."""
    problem = make_problem(sites, "two_sided", **budget)
    candidates = {
        name: table.with_losses(estimated_losses(table, {0: energies[name]}, {0: {}}))
        for name, table in problem.candidates.items()
    }
    return replace(problem, candidates=candidates)


def planned(sites: list[Site], energies: dict[str, torch.Tensor], **budget: Any) -> Cuts:
    return MultipleChoice(seen(sites, energies, **budget)).plan()


def kept(sites: list[Site], cuts: Cuts) -> float:
    form = Form(storage="two_factor")
    return sum(form.bits((s.m, s.n), cuts[s.name]) for s in sites) / sum(16 * s.parameters for s in sites)


def dropped(sites: list[Site], energies: dict[str, torch.Tensor], cuts: Cuts) -> float:
    return sum(0.0 if (r := cuts[s.name].rank) is None else float(energies[s.name][r:].sum()) for s in sites)


@given(seed=st.integers(0, 10_000), keep=st.floats(0.3, 0.95), wild=st.booleans())
def test_the_spectral_plan_is_near_the_best_of_all_plans(seed: int, keep: float, wild: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    shapes = [(6, 5), (4, 7), (5, 5)]
    sites = [Site(f"b.{i}", "x", i, m, n, False, False, f"b.{i}") for i, (m, n) in enumerate(shapes)]
    energies = {}
    for site in sites:
        energy = torch.rand(min(site.m, site.n), generator=source, dtype=torch.float64) ** 4
        energies[site.name] = energy if wild else energy.sort(descending=True).values
    problem = make_problem(sites, keep=keep, rank_multiple=1)
    choices = [problem.candidates[site.name].cuts for site in sites]
    plans = [dict(zip([s.name for s in sites], cuts, strict=True)) for cuts in itertools.product(*choices)]
    fitting = [dropped(sites, energies, p) for p in plans if kept(sites, p) <= keep + 1e-12]
    if not fitting:
        with pytest.raises(BudgetError):
            planned(sites, energies, keep=keep, rank_multiple=1)
        return
    ranks = planned(sites, energies, keep=keep, rank_multiple=1)
    assert kept(sites, ranks) <= keep + 1e-9
    everything = sum(float(e.sum()) for e in energies.values())
    # Three sites of a few ranks are the worst case for a multiplier: one step is a large part of the budget.
    step = max(float(e.max()) for e in energies.values())
    assert dropped(sites, energies, ranks) <= min(fitting) + 1.5 * step
    assert dropped(sites, energies, ranks) <= everything


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8, 0.95])
def test_the_spectral_plan_beats_uniform_and_small_changes(keep: float) -> None:
    sites = llama_sites()
    energies = decaying(sites)
    problem = make_problem(sites, keep=keep, rank_multiple=1)
    ranks = planned(sites, energies, keep=keep, rank_multiple=1)
    assert keep - 0.005 < kept(sites, ranks) <= keep
    found = dropped(sites, energies, ranks)
    assert found < dropped(sites, energies, fill(problem, {s.name: 1.0 for s in sites}))
    for first, second in itertools.permutations(sites, 2):
        # One rank less here, one more there: better only by what rounding leaves.
        a, b = ranks[first.name].rank, ranks[second.name].rank
        if a is None or b is None or a < 2 or b + 1 > problem.candidates[second.name].largest_rank:
            continue
        changed = {**ranks, first.name: Cut(a - 1), second.name: Cut(b + 1)}
        if kept(sites, changed) <= keep:
            assert dropped(sites, energies, changed) >= (1 - 2e-3) * found


def test_weights_move_rank_and_rounding_holds() -> None:
    sites = llama_sites(scale=4)
    energies = decaying(sites)
    tails = MultipleChoice(seen(sites, energies, keep=0.5, rank_multiple=8))
    plain = tails.plan()
    heavy = tails.plan(torch.tensor([50.0 if s.role == "down" else 1.0 for s in sites]))
    assert all(cut.dense or cut.rank % 8 == 0 for plan in (plain, heavy) for cut in plan.values())

    def of_down(plan: Cuts) -> float:
        down = [s for s in sites if s.role == "down"]
        return kept(down, plan)

    assert of_down(heavy) > of_down(plain)
    assert tails.plan(torch.ones(len(sites))) == plain


def test_spectral_edges() -> None:
    sites = llama_sites(blocks=1)
    energies = decaying(sites)
    assert set(planned(sites, energies, keep=1.0).values()) == {DENSE}
    with pytest.raises(BudgetError, match="Nothing fits"):
        planned(sites, energies, keep=0.001, rank_multiple=1)
    flat = {name: torch.zeros_like(energy) for name, energy in energies.items()}
    assert kept(sites, planned(sites, flat, keep=0.5, rank_multiple=1)) <= 0.5
    with pytest.raises(NotFiniteError, match=sites[2].name):
        planned(sites, {**energies, sites[2].name: torch.full((32,), torch.nan)}, keep=0.8)


SPACES = ("5x1", "5x4", "5xlayers", "rolesx1", "rolesx2", "1x4", "spectral")


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_every_point_is_on_the_budget(name: str, keep: float) -> None:
    sites = llama_sites()
    space = space_named(name, seen(sites, decaying(sites), keep=keep, rank_multiple=1), 0.2)
    points = torch.cat(
        [space.draw(20, torch.Generator().manual_seed(3)), torch.stack([p for _, p in space.starts(None, {})])]
    )
    assert points.shape[1] == space.dimensions == len(space.lower) == len(space.attention)
    assert (points >= space.lower - 1e-12).all()
    assert (points <= space.upper + 1e-12).all()
    torch.testing.assert_close(points @ space.weights, torch.full((len(points),), space.total).double())
    torch.testing.assert_close(space.project(points), points)
    for point in points:
        cuts = space.cuts(point)
        assert keep - 0.004 < kept(sites, cuts) <= keep + 1e-12
        assert space.cuts(point) == cuts


def test_the_papers_groups() -> None:
    sites = llama_sites()
    problem = make_problem(sites, keep=0.8, rank_multiple=1)
    space = GroupSpace(problem, "5", 1, 0.2)
    assert space.labels == ["q+k", "o", "gate", "up", "down"]
    assert space.attention == [True, True, False, False, False]
    cuts = space.cuts(space.project(torch.full((5,), 0.5).double()))
    assert all(cuts[site.name].dense == (site.role == "v") for site in sites)
    point = space.project(torch.tensor([0.3, 0.5, 0.8, 0.8, 1.0]).double())
    assert point[4] == 1
    assert all(space.cuts(point)[s.name].dense for s in sites if s.role == "down")
    deep = GroupSpace(problem, "5", 4, 0.2)
    assert deep.dimensions == 20
    assert deep.labels[0] == "q+k@1/4"
    with pytest.raises(RecipeError, match="more than the model's 4 blocks"):
        GroupSpace(problem, "5", 5, 0.2)


def test_a_budget_no_plan_can_meet_is_said_with_the_least_it_needs() -> None:
    with pytest.raises(BudgetError, match=r"v stays dense .* at least a fraction of 0\.238") as caught:
        GroupSpace(make_problem(llama_sites(), keep=0.23, rank_multiple=1), "5", 1, 0.2)
    assert "bayesian:spectral" in str(caught.value)


def test_multipliers_start_at_the_spectral_plan() -> None:
    sites = llama_sites()
    problem = seen(sites, decaying(sites), keep=0.6, rank_multiple=1)
    space = MultiplierSpace(problem)
    (name, zero), *_ = space.starts(None, {})
    assert name == "spectral"
    assert space.labels[-1] == "slope"
    assert space.cuts(zero) == MultipleChoice(problem).plan()
    slope = torch.zeros(space.dimensions).double()
    slope[-1] = 2.0

    def late(cuts: Cuts) -> float:
        return kept([s for s in sites if s.block >= 2], cuts)

    assert late(space.cuts(slope)) > late(space.cuts(zero))


@pytest.mark.parametrize("bad", ["3x1", "5x0", "5", "5x", "rolesxmany", "x"])
def test_bad_spaces_are_explained(bad: str) -> None:
    with pytest.raises(RecipeError, match="no search space") as caught:
        allocation_from(f"bayesian:{bad}")
    assert "bayesian:5x1" in str(caught.value)


class Bowl(Space):
    """Coordinates that sum to one, as ranks of a million."""

    def __init__(self, d: int) -> None:
        self.name, self.labels = "bowl", [str(i) for i in range(d)]
        self.lower, self.upper = torch.full((d,), 0.2).double(), torch.ones(d).double()
        self.weights, self.total, self.attention = torch.full((d,), 1 / d).double(), 0.6, [i < 2 for i in range(d)]

    def cuts(self, point: torch.Tensor) -> Cuts:
        return {str(i): Cut(round(float(x) * 1e6)) for i, x in enumerate(point)}

    def starts(self, plan: Any, coordinates: Any) -> list[tuple[str, torch.Tensor]]:
        return [("uniform", self.project(torch.full((len(self.labels),), 0.5).double()))]

    def labels_of_sites(self) -> dict[str, str]:
        return {}


def bowl(cuts: Cuts) -> Outcome:
    x = torch.tensor([float(cut.rank or 0) for cut in cuts.values()]).double() / 1e6
    target = torch.linspace(0.25, 0.95, len(x)).double()
    value = 5 * math.exp(8 * float((x - target).square().sum()))
    return Outcome(value, value, 0.0)


def run_bowl(
    log: TrialLog, trials: int, objective: Any = bowl, d: int = 4, ahead: int = 1, **options: Any
) -> dict[str, Any]:
    space = Bowl(d)

    def proposer(seen: Any, trial: int, is_new: Any) -> torch.Tensor:
        assert len(seen.points) + len(seen.pending) == trial
        assert len(seen.pending) == ahead - 1
        return propose(space, seen.points, seen.values, trial, 0, is_new=is_new, pending=seen.pending, **options)

    def judge(plans: Any) -> Any:
        """As workers do: so many plans are taken before the first outcome is given."""
        waiting: list[Any] = []
        for cuts in plans:
            waiting.append(objective(cuts))
            if len(waiting) == ahead:
                yield waiting.pop(0)
        yield from waiting

    return search(space, space.starts(None, {}), judge, proposer, log, trials, 0, Reporter(show=False), ahead)


@pytest.mark.parametrize("options", [{}, {"scales": "paper"}, {"acquisition": "qlog_nei"}, {"ahead": 3}], ids=str)
def test_the_search_finds_the_bottom_of_a_bowl(options: dict[str, Any]) -> None:
    best = run_bowl(TrialLog(None, "", Reporter(show=False)), 22, **options)
    start = bowl(Bowl(4).cuts(Bowl(4).starts(None, {})[0][1])).value
    assert best["objective"] < 5 + 0.1 * (start - 5)
    assert sum(best["point"]) / 4 == pytest.approx(0.6)


def test_a_surrogate_that_cannot_be_fitted_still_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("not positive definite")

    import botorch.optim.fit

    monkeypatch.setattr(botorch.optim.fit, "fit_gpytorch_mll_scipy", singular)
    best = run_bowl(TrialLog(None, "", Reporter(show=False)), 20)
    assert best["origin"] == "proposed"


@pytest.mark.parametrize("ahead", [1, 3])
def test_an_interrupted_search_goes_on_as_it_would_have(ahead: int, tmp_path: Path) -> None:
    reporter = Reporter(show=False)
    run_bowl(TrialLog(tmp_path / "whole.jsonl", "k", reporter), 14, ahead=ahead)
    run_bowl(TrialLog(tmp_path / "parts.jsonl", "k", reporter), 9, ahead=ahead)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"trial": 9, "origin": "prop')
    run_bowl(TrialLog(tmp_path / "parts.jsonl", "k", reporter), 14, ahead=ahead)
    assert any("last line" in note for note in reporter.notes)

    def points(name: str) -> list[Any]:
        lines = (tmp_path / name).read_text().splitlines()[1:]
        return [(r["point"], r["objective"]) for r in map(json.loads, lines)]

    assert points("parts.jsonl") == points("whole.jsonl")
    # Fewer trials are a prefix: nothing is run, nothing is lost.
    few = run_bowl(TrialLog(tmp_path / "whole.jsonl", "k", reporter), 5, objective=None)
    assert few["trial"] < 5


def test_failed_trials_are_recorded_and_the_search_goes_on() -> None:
    reporter = Reporter(show=False)
    log = TrialLog(None, "", reporter)
    calls = []

    def sometimes(cuts: Any) -> Outcome:
        calls.append(1)
        return Outcome(math.nan, math.inf, 1.0) if len(calls) % 3 == 0 else bowl(cuts)

    best = run_bowl(log, 12, objective=sometimes)
    assert [r["failed"] for r in log.records] == [i % 3 == 2 for i in range(12)]
    assert best["objective"] == min(r["objective"] for r in log.records if not r["failed"])
    with pytest.raises(BudgetError, match="Every trial"):
        run_bowl(TrialLog(None, "", reporter), 4, objective=lambda _cuts: Outcome(math.nan, math.nan, 0.0))


def test_a_log_of_other_settings_is_refused(tmp_path: Path) -> None:
    reporter = Reporter(show=False)
    path = tmp_path / "trials.jsonl"
    TrialLog(path, "one", reporter).append({"trial": 0})
    assert TrialLog(path, "one", reporter).records == [{"trial": 0}]
    with pytest.raises(RunError, match="another recipe"):
        TrialLog(path, "two", reporter)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        TrialLog(tmp_path / "folder", "one", reporter)


@pytest.mark.parametrize("harm", ["edited", "dropped", "added", "swapped", "emptied"])
def test_a_log_is_taken_over_up_to_where_it_was_harmed(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    whole = TrialLog(path, "key", Reporter(show=False))
    for trial in range(4):
        whole.append({"trial": trial, "objective": 0.1 * trial})
    lines = path.read_text().splitlines(keepends=True)
    if harm == "edited":
        lines[3] = lines[3].replace("0.2", "0.02")
    elif harm == "dropped":
        del lines[3]
    elif harm == "added":
        lines.insert(3, lines[2])
    elif harm == "swapped":
        lines[3:5] = lines[4], lines[3]
    else:
        lines = []
    path.write_text("".join(lines))
    reporter = Reporter(show=False)
    log = TrialLog(path, "key", reporter)
    assert log.records == ([] if harm == "emptied" else whole.records[:2])
    if harm != "emptied":
        assert "was damaged (line 4 is not as it was written): 2 are kept" in reporter.notes[0]
        assert path.with_name("trials.jsonl.damaged").read_text() == "".join(lines[3:])
    log.append({"trial": 5})
    again = TrialLog(path, "key", silent := Reporter(show=False))
    assert again.records == log.records
    assert silent.notes == []


def test_samples_that_vary_most_are_taken() -> None:
    table = torch.tensor([[1.0, 5.0, 2.0, 3.0], [1.0, 9.0, 2.5, math.inf], [1.0, 1.0, 2.2, 3.0]]).double()
    assert by_variance(table, 2, largest=True).tolist() == [1, 3]
    assert by_variance(table, 2, largest=False).tolist() == [0, 2]
    sites = llama_sites()
    plans = random_plans("5x1", make_problem(sites, keep=0.7, rank_multiple=1), 0.2, 20, 0)
    assert len({tuple(p.values()) for p in plans}) == 20
    assert random_plans("spectral", make_problem(sites, keep=0.15, rank_multiple=1), 0.2, 3, 0)


def test_plans_remember_what_they_were_made_for(tmp_path: Path) -> None:
    sites = llama_sites()
    problem = seen(sites, decaying(sites), keep=0.5, rank_multiple=1)
    cuts = MultipleChoice(problem).plan()
    facts = {"architecture": "L", "method": "two_sided", "allocation": "spectral"}
    parts = (problem.form, problem.allowance)
    plan = Plan.make(sites, cuts, *parts, **facts, fingerprint="f", groups={"q": 0.5})
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    again = Plan.load(path)
    assert again == plan
    assert again.fitting(sites, "plan.json") == cuts
    wider = [*sites[:3], Site(sites[3].name, "o", 0, 65, 64, False, False, "x"), *sites[4:]]
    with pytest.raises(BudgetError, match=r"o_proj is \[65, 64\], and the plan has \[64, 64\]"):
        plan.fitting(wider, "plan.json")
    with pytest.raises(BudgetError, match="not among"):
        plan.fitting(sites[:-1], "plan.json")
    with pytest.raises(BudgetError, match="no such site"):
        plan.fitting([*sites, Site("z", "q", 9, 4, 4, False, False, "z")], "plan.json")


def test_the_role_of_a_site_is_read_off_its_name_and_those_beside_it() -> None:
    names = {
        "model.layers.3.self_attn.q_proj": (3, "q"),
        "model.layers.3.self_attn.out_proj": (3, "o"),
        "model.layers.3.self_attn.gate_proj": (3, "gate_proj"),
        "model.layers.3.mlp.gate_proj": (3, "gate"),
        "model.layers.3.mlp.input_linear.0": (3, "input_linear"),
        "model.layers.3.mlp.input_linear.1": (3, "input_linear"),
        "model.layers.3.compressor.kv_proj": (3, "kv_proj"),
        "model.layers.3.compressor.gate_proj": (3, "gate_proj"),
        # A sequence of layers, others without weights between them.
        "model.layers.4.ffn.0": (4, "0"),
        "model.layers.4.ffn.2": (4, "2"),
        "model.layers.4.mixer.in_proj": (4, "in_proj"),
        "model.layers.4.mixer.out_proj": (4, "out_proj"),
        "transformer.h.11.mlp.c_fc": (11, "c_fc"),
    }
    assert places_of(names) == names
