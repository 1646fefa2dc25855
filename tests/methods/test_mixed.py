"""One budget for every form: dense, low rank, codes, and both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Run, failed, make_problem, make_site
from rankwise import compress
from rankwise.allocation import MultipleChoice
from rankwise.checkpoints import REPORT_FILE, load_model
from rankwise.layers import kind_of
from rankwise.methods import estimated_losses, method_named
from rankwise.recipes import recipe_from
from rankwise.reports import Report
from rankwise.sizes import DENSE, Cut, Form

Settings = Callable[..., dict[str, Any]]

FAST = {"name": "mixed", "outer": 1, "inner": 1}


def test_candidates_are_those_of_both_methods_and_more() -> None:
    form = method_named("mixed").form(make_problem([make_site("a", 64, 48)], keep=0.5).allowance.budget, 16)
    mixed = method_named("mixed").candidates((64, 48), form, 8, True)
    for name in ("two_sided", "quantize", "caldera"):
        theirs = method_named(name).candidates((64, 48), form, 8, True)
        assert set(theirs.cuts) <= set(mixed.cuts)
    assert Cut(8, 0, 4) in mixed.cuts
    assert Cut(8, 0, 8) in mixed.cuts
    assert len(set(mixed.cuts)) == len(mixed.cuts)
    assert mixed.cuts[-1] == DENSE
    climbed = [mixed.cuts[row] for row in mixed.rungs.tolist()]
    assert climbed[0] == Cut(0, 2)
    assert climbed[-1] == DENSE
    assert (mixed.bits[mixed.rungs].diff() > 0).all()
    for cut, bits in zip(mixed.cuts, mixed.bits.tolist(), strict=True):
        assert bits == form.bits((64, 48), cut)


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.5, 9.0])
def test_a_mixed_plan_loses_no_more_than_a_plan_of_one_form(bits: float) -> None:
    """By estimated loss, which is what it minimises: its candidates hold those of every other method."""
    sites = [make_site(f"b.{i}", 64, 48 + 16 * (i % 3)) for i in range(6)]
    source = torch.Generator().manual_seed(0)

    def energies(site: Any, q_bits: int) -> torch.Tensor:
        k = torch.arange(min(site.m, site.n), dtype=torch.float64)
        rate = 2 + 30 * torch.rand(1, generator=source, dtype=torch.float64)
        return torch.exp(-k / rate) if not q_bits else 4.0 ** (1 - q_bits) * (1 + torch.exp(-k / 4))

    seen = {(s.name, q): energies(s, q) for s in sites for q in (0, 2, 3, 4)}
    lost = {}
    for name in ("mixed", "two_sided", "quantize", "caldera"):
        problem = make_problem(sites, name, bits=bits, storage="auto", rank_multiple=1)
        losses = {}
        for site in sites:
            table = problem.candidates[site.name]
            of_site = {q: seen[site.name, q] for q in table.choices}
            losses[site.name] = table.with_losses(
                estimated_losses(table, of_site, {q: {4: 0.02, 8: 0.001} if not q else {} for q in of_site})
            )
        chosen = MultipleChoice(type(problem)(sites, losses, problem.form, problem.allowance)).plan()
        assert problem.spent(chosen) <= bits * sum(s.parameters for s in sites)
        lost[name] = sum(float(losses[s.name].losses[losses[s.name].cuts.index(chosen[s.name])]) for s in sites)
    assert all(lost["mixed"] <= other + 1e-9 for name, other in lost.items() if name != "mixed")


def test_a_mixed_plan_is_fitted_stored_and_read_back(settings: Settings, tmp_path: Path) -> None:
    """Every kind of cut at once, by a plan written by hand; the checkpoint gives the logits of the model in memory."""
    result = compress(recipe_from(settings(method=FAST, budget={"bits": 12})), run_directory=tmp_path / "run")
    kinds = [DENSE, Cut(8), Cut(8, 0, 8), Cut(8, 0, 4), Cut(0, 2), Cut(0, 3), Cut(8, 4, 4)]
    names = list(result.plan.cuts)
    cuts = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    plan = result.plan.model_copy(update={"cuts": cuts, "bits": None})
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    values = settings(method=FAST, allocation=f"plan:{tmp_path / 'plan.json'}", output=str(tmp_path / "out"))
    del values["budget"]
    made = compress(recipe_from(values), run_directory=tmp_path / "run")
    assert made.plan.cuts == cuts
    found = {name: site.storage or "dense" for name, site in made.report.sites.items()}
    assert {name: site.cut for name, site in Report.load(tmp_path / "out" / REPORT_FILE).sites.items()} == cuts
    form = made.plan.form
    assert found == {name: form.kind(made.plan.shapes[name], cut) for name, cut in cuts.items()}
    ids = torch.arange(3, 27)[None]
    again = load_model(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, made.model(input_ids=ids).logits)
    # No pivoted layer shares an order with another here, so every site takes what the arithmetic says, to the bit.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        own = [x.nbytes for key, x in tensors.items() if key.startswith(f"{name}.") and not key.endswith("bias")]
        assert 8 * sum(own) == made.plan.site_bits(name)


def test_a_search_may_mix_too(settings: Settings, text: Path, tmp_path: Path) -> None:
    values = settings(
        method=FAST,
        budget={"bits": 3},
        allocation={"name": "bayesian", "space": "spectral", "trials": 3},
        validation={"source": f"text:{text}", "sequences": 4, "length": 32},
    )
    result = compress(recipe_from(values), run_directory=tmp_path)
    assert result.report.search.trials == 3
    assert 2.9 < result.plan.bits_a_weight <= 3
    assert all(kind_of(result.model.get_submodule(name)).replaced for name in result.plan.cuts)


@pytest.mark.parametrize(("method", "storage"), [("mixed", None), ("two_sided", "auto"), ("quantize", None)])
def test_a_size_is_what_the_files_take_at_most(
    method: str, storage: str | None, settings: Settings, tmp_path: Path
) -> None:
    wanted = 590_000
    budget = {"size": f"{wanted} B", "rank_multiple": 1}
    named = {"name": method, "outer": 1, "inner": 1} if method == "mixed" else method
    output = tmp_path / "out"
    result = compress(recipe_from(settings(method=named, budget=budget, output=str(output))))
    size = (output / "model.safetensors").stat().st_size
    assert size == result.report.bytes_on_disk <= wanted
    if method != "quantize":  # Whose codes end at 4 bits.
        assert size > 0.97 * wanted
    assert result.plan.size == wanted


def test_what_is_too_small_is_said_before_anything_slow(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    common = ["compress", tiny, "-o", tmp_path / "out", "--calibration", f"text:{text}", "--length", 32]
    failed(rankwise(*common, "--size", "50KB"), "embeddings, head", "raise --size to")
    failed(rankwise(*common, "--method", "mixed", "--bits", "1.5"), "Nothing fits 1.5 bits", "raise --bits to 1.")
    failed(rankwise(*common, "--method", "mixed"), "mixed needs a size")
    failed(rankwise(*common, "--bits", 3, "--size", "1MB"), "give one of them")
    assert not list((tmp_path / "out").parent.glob("out"))


def test_noise_is_part_of_a_loss() -> None:
    form = Form()
    table = method_named("mixed").candidates((64, 64), form, 8, True)
    energies = {q: torch.ones(64, dtype=torch.float64) for q in table.choices}
    losses = estimated_losses(table, energies, {0: {4: 0.5, 8: 0.25}, 2: {}, 3: {}, 4: {}})
    by_cut = dict(zip(table.cuts, losses.tolist(), strict=True))
    assert by_cut[Cut(16)] == 48
    assert by_cut[Cut(16, 0, 4)] == 48 + 0.5 * 16
    assert by_cut[Cut(16, 0, 8)] == 48 + 0.25 * 16
    assert by_cut[Cut(8, 2, 4)] == 56
    assert by_cut[DENSE] == 0
    assert Counter(cut.dense for cut in table.cuts)[True] == 1


@pytest.mark.parametrize(("two_sided", "turns"), [(True, 1), (False, 15)])
def test_turns_follow_from_how_q_is_rounded(two_sided: bool, turns: int, settings: Settings, tmp_path: Path) -> None:
    """What was seen in the weights serves any number of them."""
    method = {"name": "mixed", "inner": 1, "output_feedback": two_sided}

    def report(**changes: Any) -> Report:
        values = settings(method={**method, **changes}, budget={"bits": 4.5, "rank_multiple": 1})
        return compress(recipe_from(values), run_directory=tmp_path / "run").report

    found = report()
    both = [site for site in found.sites.values() if site.q_bits and site.rank]
    assert both
    assert {len(site.errors or ()) for site in both} == {turns}
    assert {len(site.errors or ()) for site in report(outer=2).sites.values() if site.q_bits and site.rank} == {2}
    assert len(list((tmp_path / "run").glob("outlooks-*"))) == 1
