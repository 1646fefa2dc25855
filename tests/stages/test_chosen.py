"""Sites that a run leaves out: by pattern, whole, counted, and without a mark on the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Run, failed, make_site
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import BudgetError, RecipeError
from rankwise.flows.sensitivity import sensitivity
from rankwise.models import find_sites
from rankwise.recipes import recipe_from
from rankwise.sizes import DENSE
from rankwise.stages.chosen import left_out, watched

Settings = Callable[..., dict[str, Any]]

SITES = [
    make_site(f"model.layers.{block}.{leaf}", 8, 8)
    for block in range(12)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]


def names(*patterns: str) -> set[str]:
    """Of `SITES`, those left out by excluding these."""
    return set(left_out(SITES, (), patterns))


def test_patterns_say_what_is_taken() -> None:
    assert names("*.q_proj") == {f"model.layers.{block}.self_attn.q_proj" for block in range(12)}
    # One block, and not the eleventh with it.
    assert names("*.layers.1.*") == {site.name for site in SITES if ".1." in site.name}
    assert len(names("*.layers.1[01].mlp.*")) == 2
    taken = {site.name for site in SITES} - left_out(SITES, ("*.mlp.*", "*.0.*"), ("*.k_proj", "*.5.*"))
    assert taken == {f"model.layers.{b}.mlp.up_proj" for b in range(12) if b != 5} | {"model.layers.0.self_attn.q_proj"}
    assert not left_out(SITES, (), ())


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.q_prj", "*.q_proj"),
        ("model.layers.3.self_atn.k_proj", "model.layers.3.self_attn.k_proj"),
        ("layers.*.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("[", "*.up_proj"),
        ("*" * 400 + "z", "*.up_proj"),
        ("mlp", "*.up_proj"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(option: str, pattern: str, near: str) -> None:
    patterns = {"include": (), "exclude": (), option: ("*.mlp.*", pattern)}
    with pytest.raises(RecipeError, match="matches no linear weight") as refused:
        left_out(SITES, **patterns)
    assert refused.value.where == option
    assert near in (refused.value.remedy or "")


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="leave none of the model's 36"):
        left_out(SITES, ("*.mlp.*",), ("*.up_proj",))


def test_statistics_are_collected_where_a_site_that_is_taken_needs_them() -> None:
    q, k = make_site("a.0.q", 8, 8), make_site("a.0.k", 8, 8)
    shared = [q, type(k)(**{**vars(k), "group": q.name})]
    assert watched(shared, frozenset({q.name})) == shared
    experts = [
        type(q)(f"a.experts.{e}.{leaf}", leaf, 0, 8, 8, False, False, f"a.experts.{e}.gate", f"a.experts.*.{leaf}")
        for e in range(3)
        for leaf in ("gate", "up")
    ]
    # What peers saw is mixed into what an expert saw, and what they saw is kept under the name of their group.
    alone = frozenset(site.name for site in experts) - {"a.experts.1.up"}
    assert watched([*experts, *shared], alone | {q.name, k.name}) == experts


def kept(model: Any, source: dict[str, Tensor]) -> set[str]:
    """Names of the sites that are the original's to the last bit."""
    state = model.state_dict()
    return {
        name.removesuffix(".weight")
        for name, values in source.items()
        if name in state and torch.equal(state[name], values)
    }


@pytest.mark.parametrize(
    ("method", "budget"),
    [("svd", {"keep": 0.7}), ("two_sided", {"keep": 0.7}), ("quantize", {"bits": 13}), ("mixed", {"bits": 14})],
)
def test_what_is_left_out_is_the_originals_and_counted(
    method: str, budget: dict[str, float], settings: Settings, tiny: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    made: Any = {"name": "mixed", "outer": 1, "inner": 1} if method == "mixed" else method
    values = settings(method=made, budget={**budget, "rank_multiple": 1}, exclude=["*.down_proj", "*.0.*.q_proj"])
    found = compress(recipe_from(values), run_directory=tmp_path / "run")
    sites = {site.name: site for site in find_sites(load_model(str(tiny)).model)}
    out = {name for name in sites if name.endswith("down_proj") or name == "model.layers.0.self_attn.q_proj"}
    assert {name for name, cut in found.plan.cuts.items() if cut == DENSE} >= out
    assert kept(found.model, load_file(tiny / "model.safetensors")) >= out
    assert len(set(found.plan.cuts.values()) - {DENSE}) > 0
    # Those left out take all their bits of what all sites may take.
    assert found.plan.weights == sum(site.parameters for site in sites.values())
    whole, asked = 32 * sum(sites[name].parameters for name in out), next(iter(budget.values()))
    allowed = asked * found.plan.weights * (32 if "keep" in budget else 1)
    others = sum(found.plan.site_bits(name) for name in set(sites) - out)
    assert others + whole == found.plan.kept_bits <= allowed
    share = sum(sites[name].parameters for name in out) / found.plan.weights
    assert any(f"{share:.1%} of the parameters" in note for note in found.report.notes)
    assert found.report.recipe.model_dump()["exclude"] == ["*.down_proj", "*.0.*.q_proj"]


def test_a_site_is_fitted_as_if_nothing_were_left_out(settings: Settings, tmp_path: Path) -> None:
    """By hand, so that the cuts are the same: then the factors are, and stages of the one do not serve the other."""
    roles = {"name": "manual", "roles": dict.fromkeys(["q", "k", "v", "o", "gate", "up", "down"], 0.5)}
    plain = settings(method="two_sided", allocation=roles, budget={"keep": None, "rank_multiple": 1})
    whole = compress(recipe_from(plain), run_directory=tmp_path / "run")
    partly = compress(recipe_from({**plain, "include": "*.k_proj"}), run_directory=tmp_path / "run")
    fresh = compress(recipe_from({**plain, "include": "*.k_proj"}), run_directory=tmp_path / "fresh")
    states = [each.model.state_dict() for each in (whole, partly, fresh)]
    factored = [name for name in states[1] if "k_proj" in name]
    assert factored
    assert all(torch.equal(states[0][name], states[1][name]) for name in factored)
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])


def test_too_much_left_out_says_what_can_be_kept(settings: Settings, tmp_path: Path) -> None:
    values = settings(method="svd", budget={"keep": 0.3, "rank_multiple": 1}, include=["*.q_proj"])
    with pytest.raises(BudgetError, match="what has to stay dense") as refused:
        compress(recipe_from(values), run_directory=tmp_path)
    least = float((refused.value.remedy or "").split("raise --keep to ")[1].split()[0])
    compress(recipe_from({**values, "budget": {"keep": least, "rank_multiple": 1}}), run_directory=tmp_path)
    with pytest.raises(BudgetError):
        compress(recipe_from({**values, "budget": {"keep": least - 0.001, "rank_multiple": 1}}), run_directory=tmp_path)


def test_a_plan_that_compresses_what_is_left_out_is_refused(settings: Settings, tmp_path: Path) -> None:
    first = compress(recipe_from(settings(method="svd", exclude=["*.up_proj"])), run_directory=tmp_path)
    file = tmp_path / "plan.json"
    file.write_text(first.plan.model_dump_json())
    again = settings(method="svd", allocation=f"plan:{file}")
    # The plan alone says it; a pattern that it agrees with may be there.
    for same in (again, {**again, "exclude": ["*.up_proj"]}):
        assert compress(recipe_from(same), run_directory=tmp_path).plan.cuts == first.plan.cuts
    with pytest.raises(BudgetError, match=r"compresses .*down_proj .*left out"):
        compress(recipe_from({**again, "exclude": ["*.down_proj"]}), run_directory=tmp_path)


@pytest.mark.long
def test_units_stay_where_a_weight_of_theirs_is_left_out(settings: Settings, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = load_file(tiny / "model.safetensors")
    base = settings(method={"name": "flap", "multiple": 1}, budget={"keep": 0.7})
    found = compress(recipe_from({**base, "exclude": ["*.0.mlp.up_proj"]}), run_directory=tmp_path)
    assert {f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")} <= kept(found.model, source)
    assert found.plan.kept <= 0.7
    assert any("go through weights that are left out" in note for note in found.report.notes)
    for patterns, says in ((["*.up_proj", "*.o_proj"], "units out of all weights"), (["*.mlp.*"], "the fewest units")):
        with pytest.raises((RecipeError, BudgetError), match=says):
            compress(recipe_from({**base, "budget": {"keep": 0.4}, "exclude": patterns}), run_directory=tmp_path)
    equal = {**base, "method": {"name": "flap", "structure": "UL-UM", "equal": True}}
    with pytest.raises(RecipeError, match="1 of 2 blocks"):
        compress(recipe_from({**equal, "exclude": ["*.0.mlp.up_proj"]}), run_directory=tmp_path)
    rest = {**base, "method": {"name": "pruned", "multiple": 1}, "exclude": ["*.0.mlp.up_proj"]}
    made = compress(recipe_from(rest), run_directory=tmp_path)
    assert made.plan.cuts["model.layers.0.mlp.up_proj"] == DENSE
    assert made.plan.shapes["model.layers.0.mlp.up_proj"] == (80, 32)
    assert 0.6 < made.plan.kept <= 0.7


def test_slicing_leaves_nothing_out(settings: Settings) -> None:
    with pytest.raises(RecipeError, match="residual stream, which all linear weights"):
        recipe_from(settings(method="slicegpt", exclude=["*.q_proj"]))


def test_a_search_and_a_sensitivity_pass_over_what_is_left_out(settings: Settings, tmp_path: Path) -> None:
    values = settings(
        method="svd",
        exclude=["*.down_proj"],
        budget={"keep": 0.7, "rank_multiple": 1},
        validation={"sequences": 4, "length": 16},
    )
    for space in ("rolesx1", "5x1", "spectral"):
        asked = {"name": "bayesian", "space": space, "trials": 2}
        found = compress(recipe_from({**values, "allocation": asked}), run_directory=tmp_path / "run")
        assert found.plan.coordinates
        assert "down" not in found.plan.coordinates
        assert all(cut == DENSE for name, cut in found.plan.cuts.items() if "down" in name)
    only_v = {**values, "exclude": [], "include": "*.v_proj", "budget": {"keep": 0.99}}
    with pytest.raises(RecipeError, match="nothing to vary"):
        compress(
            recipe_from({**only_v, "allocation": {"name": "bayesian", "space": "5x1", "trials": 2}}),
            run_directory=tmp_path / "run",
        )
    points = sensitivity(
        recipe_from(values), tmp_path / "out", fractions=[0.5], run_directory=tmp_path / "run", overwrite=True
    )["points"]
    assert {point["role"] for point in points} == {"q", "k", "v", "o", "gate", "up"}


def test_on_the_command_line(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = [
        "compress",
        tiny,
        "-o",
        tmp_path / "out",
        "--method",
        "svd",
        "--calibration",
        f"text:{text}",
        "--sequences",
        4,
    ]
    words += ["--length", 32, "--quiet", "--json"]
    failed(rankwise(*words, "--exclude", "*.q_prj"), "*.q_prj", "*.q_proj")
    failed(rankwise(*words, "--include", ""), "include")
    few = ["--keep", 0.05, "--include", "*.mlp.*", "--include", "*.q_proj", "--exclude", "*.0.*"]
    # Of the second block alone the feed-forward layer and q are taken: the rest, 0.60 of all, stays.
    failed(rankwise(*words, *few), "what has to stay dense take a fraction of 0.74")
