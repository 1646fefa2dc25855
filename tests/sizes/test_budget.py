"""Budgets: the paper's arithmetic, and that every plan is exactly on budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import LLAMA_2_7B, make_problem, make_site
from rankwise.allocation import Evidence, Manual, allocation_from, fill
from rankwise.errors import BudgetError, RecipeError
from rankwise.evaluation import measure_cost
from rankwise.factors import Factors
from rankwise.layers import LowRankLinear
from rankwise.models import find_sites
from rankwise.recipes import read_recipe, recipe_from
from rankwise.sizes import DENSE, Allowance, Budget, Cut, Form, Plan, Storage

shapes = st.lists(st.tuples(st.integers(8, 300), st.integers(8, 300)), min_size=1, max_size=12)


storages = st.sampled_from(["two_factor", "pivoted", "auto"])


@given(
    shapes=shapes, keep=st.floats(0.05, 1.0), multiple=st.sampled_from([1, 2, 8, 16]), storage=storages, data=st.data()
)
@settings(max_examples=150, deadline=None)
def test_a_filled_budget_is_never_exceeded_and_leaves_less_than_one_step(
    shapes: list[tuple[int, int]], keep: float, multiple: int, storage: Storage, data: st.DataObject
) -> None:
    sites = [make_site(str(i), m, n) for i, (m, n) in enumerate(shapes)]
    fractions = {s.name: data.draw(st.one_of(st.none(), st.floats(0.1, 1.0))) for s in sites}
    problem = make_problem(sites, keep=keep, rank_multiple=multiple, storage=storage)
    total = 16 * sum(s.parameters for s in sites)
    try:
        cuts = fill(problem, fractions)
    except BudgetError:
        smallest = sum(
            16 * s.parameters if fractions[s.name] is None else problem.candidates[s.name].smallest for s in sites
        )
        assert smallest > keep * total - 16
        return
    spent = problem.spent(cuts)
    assert spent <= keep * total + 1e-4
    for site in sites:
        cut, table = cuts[site.name], problem.candidates[site.name]
        if cut.dense:
            continue
        assert fractions[site.name] is not None
        assert cut.rank % multiple == 0
        assert cut.rank > 0
        assert problem.cost(site, cut) < 16 * site.parameters
        above = table.cuts[table.cuts.index(cut) + 1]
        assert spent + problem.cost(site, above) - problem.cost(site, cut) > keep * total - 16


@given(m=st.integers(1, 400), n=st.integers(1, 400), fraction=st.floats(0.01, 1.0), storage=storages)
def test_the_rank_at_a_fraction_costs_that_fraction(m: int, n: int, fraction: float, storage: Storage) -> None:
    form = Form(storage=storage)
    rank = form.rank_of_numbers((m, n), fraction * m * n)
    below, above = math.floor(rank), math.ceil(rank)
    assert -1e-9 <= rank <= min(m, n) + 1e-9
    assert (0 if below == 0 else form.numbers((m, n), below)) <= fraction * m * n + 1e-6
    if 1 <= above <= min(m, n):
        assert form.numbers((m, n), above) >= fraction * m * n - 1e-6


@given(m=st.integers(1, 400), n=st.integers(1, 400), data=st.data())
def test_no_storage_costs_more_than_it_must(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    two, pivoted, smaller = (Form(storage=s).numbers((m, n), rank) for s in ("two_factor", "pivoted", "auto"))
    assert two - pivoted == rank * rank
    assert pivoted <= m * n
    # auto pays for the m integers of an order, and takes what is then the smaller.
    assert smaller == min(two, pivoted + m)
    assert Form(storage="auto").pivots((m, n), rank) == (pivoted + m < two)


@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    q_bits=st.sampled_from([0, 2, 3, 4]),
    lr_bits=st.sampled_from([2, 4, 8, 16]),
    data=st.data(),
)
def test_more_of_anything_takes_more_bits(m: int, n: int, q_bits: int, lr_bits: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0 if q_bits else 1, min(m, n)))
    cut, form = Cut(rank, q_bits, lr_bits), Form()
    bits = form.bits((m, n), cut)
    assert bits >= q_bits * m * n + rank * lr_bits * (m + n)
    if rank < min(m, n):
        assert form.bits((m, n), Cut(rank + 1, q_bits, lr_bits)) > bits
    if 0 < q_bits < 4:
        assert form.bits((m, n), Cut(rank, q_bits + 1, lr_bits)) > bits
    assert form.bits((m, n), DENSE) == 16 * m * n


def test_a_cut_is_a_value() -> None:
    assert Cut(16, 2, 4) == Cut(16, 2, 4) != Cut(16, 3, 4)
    assert len({Cut(16), Cut(16, 2, 4), DENSE, Cut()}) == 3
    # There is one way to say that nothing stands beside Q.
    assert Cut(0, 2, 4) == Cut(0, 2)
    adapter = TypeAdapter(Cut)
    for cut in (DENSE, Cut(16), Cut(0, 2), Cut(16, 2, 4), Cut(8, 0, 8)):
        assert adapter.validate_json(adapter.dump_json(cut)) == cut
    assert [str(cut) for cut in (DENSE, Cut(16), Cut(0, 2), Cut(16, 2, 4), Cut(8, 0, 8))] == [
        "dense",
        "16",
        "2 bits",
        "2 bits + 16 at 4 bits",
        "8 at 8 bits",
    ]
    for bad in ({"q_bits": 2}, {"rank": 0}, {"rank": -1}, {"rank": 4, "q_bits": 2}):
        with pytest.raises(ValueError, match=r"rank|bits"):
            Cut(**bad)


def test_uniform_ranks_stay_in_proportion() -> None:
    sites = [make_site("a", 4096, 4096), make_site("b", 11008, 4096)]
    problem = make_problem(sites, keep=0.8, rank_multiple=8)
    cuts = fill(problem, {"a": 1.0, "b": 1.0})
    for site in sites:
        wanted = problem.form.rank_of_numbers((site.m, site.n), 0.8 * site.parameters)
        assert abs(cuts[site.name].rank - wanted) < 16


def test_what_stays_dense_is_paid_for_by_the_others() -> None:
    sites = [make_site("a", 64, 64), make_site("v", 64, 64, "v")]
    cuts = fill(make_problem(sites, keep=0.75, rank_multiple=1), {"a": 1.0, "v": None})
    assert cuts == {"a": Cut(16), "v": DENSE}


def test_keep_one_leaves_everything_dense() -> None:
    assert fill(make_problem([make_site("a", 64, 64)], keep=1), {"a": 1.0}) == {"a": DENSE}


def test_a_budget_below_the_smallest_ranks_says_what_is_possible() -> None:
    sites = [make_site("a", 16, 16), make_site("b", 32, 16)]
    problem = make_problem(sites, keep=0.3, rank_multiple=8)
    with pytest.raises(BudgetError, match=r"take a fraction of 0\.8") as caught:
        fill(problem, {"a": 1.0, "b": 1.0})
    assert "--keep to 0.83" in str(caught.value)
    assert "rank_multiple (8 now)" in str(caught.value)


def test_three_spellings_of_one_size_choose_the_same() -> None:
    """16 numbers a weight, so keep 0.5 is 8 bits; with nothing else in the files, half the bytes."""
    sites = [make_site("a", 64, 64), make_site("b", 128, 64)]
    half = sum(s.parameters for s in sites)
    spelled = [{"keep": 0.5}, {"bits": 8}, {"size": half}, {"size": f"{half} B"}]
    found = [fill(make_problem(sites, rank_multiple=1, **each), {"a": 1.0, "b": 1.0}) for each in spelled]
    assert found[0] == found[1] == found[2] == found[3]
    assert not found[0]["a"].dense


def test_sizes_are_read_as_people_write_them() -> None:
    for text, count in (("90MB", 90_000_000), ("1.5 gb", 1_500_000_000), ("2KiB", 2048), ("700", 700)):
        assert Budget(size=text).size == count
    for bad in ("90 pounds", "MB", "-3MB", ""):
        with pytest.raises(ValidationError, match="is no size"):
            Budget(size=bad)


def test_a_budget_has_one_spelling() -> None:
    for both in ({"keep": 0.5, "bits": 4}, {"bits": 4, "size": "9MB"}, {"keep": 0.5, "size": 9}):
        with pytest.raises(ValidationError, match="give one of them"):
            Budget(**both)
    with pytest.raises(ValidationError, match="use auto, which counts them"):
        Budget(bits=8, storage="pivoted")


def test_a_size_below_the_rest_of_the_model_names_the_least() -> None:
    site = make_site("a", 64, 64)
    problem = make_problem([site], size=5000)
    allowance = Allowance(problem.allowance.budget, site.parameters, 16, rest_bytes=4900)
    with pytest.raises(BudgetError, match=r"embeddings, head") as caught:
        fill(replace(problem, allowance=allowance), {"a": 1.0})
    least = 4900 + problem.candidates["a"].smallest / 8
    assert f"{least / 1000:.2f} KB in all" in str(caught.value)


def llama_2_7b() -> Any:
    config = LlamaConfig(**LLAMA_2_7B)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("row", "billions"), [("7b 20% 5x1", 5.44), ("7b 30% 5x1", 4.79), ("7b 30% 5x4", 4.80)])
def test_published_plans_have_the_published_size(row: str, billions: float, shared: Path) -> None:
    """Table 7 and 8 of the Bolaco paper: v dense, one bias for each factored site."""
    tables = json.loads((shared / "reference/bolaco_tables.json").read_text())
    order = ["q/k", "o", "gate", "up", "down"]
    assert tables["table8_rank_order"] == order
    quarters = tables["table8"][row]
    model = llama_2_7b()
    sites = find_sites(model)
    assert len(sites) == 32 * 7
    dense = sum(p.numel() for p in model.parameters())
    assert round(dense / 1e9, 2) == 6.74
    column = {"q": 0, "k": 0, "o": 1, "gate": 2, "up": 3, "down": 4}
    expected = dense
    for site in sites:
        ranks = quarters[site.block * len(quarters) // 32]
        rank = None if site.role == "v" else ranks[column[site.role]]
        if rank is not None:
            with torch.device("meta"):
                model.set_submodule(site.name, LowRankLinear(site.n, site.m, rank, bias=True))
            expected += rank * (site.m + site.n) + site.m - site.parameters
    counted = measure_cost(model, sites, {})
    assert counted.parameters == expected
    # The paper cuts 4.7902 to 4.80 in its 5x4 row; half a percent tells the plans apart.
    assert counted.parameters / 1e9 == pytest.approx(billions, rel=0.0025)
    exact = {"7b 20% 5x1": 5.435, "7b 30% 5x1": 4.792, "7b 30% 5x4": 4.790}
    assert round(counted.parameters / 1e9, 3) == exact[row]


@pytest.mark.parametrize(("name", "kept"), [("lord-20", 0.8), ("lord-30", 0.7)])
def test_lords_published_settings_remove_what_they_say(name: str, kept: float) -> None:
    recipe = recipe_from({"model": "any", **read_recipe(name)})
    sites = find_sites(llama_2_7b())
    problem = make_problem(sites, **recipe.budget.model_dump())
    cuts = recipe.allocation.choose(problem, Evidence()).cuts
    assert all(cuts[s.name].dense for s in sites if s.role == "v")
    plan = Plan.make(sites, cuts, problem.form, problem.allowance, architecture="L", method="afm", allocation="manual")
    assert plan.kept == pytest.approx(kept, abs=0.003)


def test_manual_reads_the_command_line_form_and_names_bad_parts() -> None:
    manual = allocation_from("manual:q=0.7,v=dense")
    assert isinstance(manual, Manual)
    assert manual.roles == {"q": 0.7, "v": "dense"}
    for bad, found in (
        ("manual:q", "no fraction"),
        ("manual:q=two", "'two'"),
        ("manual:q=1.5", "outside"),
        ("unifrom", "uniform"),
    ):
        with pytest.raises(RecipeError, match=found):
            allocation_from(bad)
    with pytest.raises(RecipeError, match="no role 'qq'"):
        Manual(roles={"qq": 0.5}).choose(make_problem([make_site("a", 8, 8)], keep=0.8), Evidence())


def test_a_plan_above_its_budget_cannot_be_made_and_files_round_trip(tmp_path: Path) -> None:
    problem = make_problem([make_site("a", 64, 64)], keep=0.5)
    parts, facts = (problem.form, problem.allowance), {"architecture": "L", "method": "svd", "allocation": "uniform"}
    with pytest.raises(BudgetError, match="more than"):
        Plan.make(problem.sites, {"a": Cut(30)}, *parts, **facts)
    with pytest.raises(BudgetError, match="no cut"):
        Plan.make(problem.sites, {}, *parts, **facts)
    plan = Plan.make(problem.sites, {"a": Cut(16)}, *parts, **facts)
    assert plan.kept == 0.5
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    for bad, says in (("{}", "cannot be read"), ('{"format": "rankwise-plan/9"}', "written by another version")):
        (tmp_path / "plan.json").write_text(bad)
        with pytest.raises(BudgetError, match=says):
            Plan.load(tmp_path / "plan.json")


def test_factors_count_themselves() -> None:
    factors = Factors(torch.ones(5, 2), torch.ones(2, 7))
    assert factors.parameters == Form(storage="two_factor").numbers((5, 7), 2) == 24
    assert factors.rank == 2
    assert torch.equal(factors.reconstruct(), torch.full((5, 7), 2.0))
