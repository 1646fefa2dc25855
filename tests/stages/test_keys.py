"""Finished stages are reused for what they are alone: a used run directory gives what a fresh one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_site
from rankwise import compress
from rankwise.recipes import recipe_from
from rankwise.sizes import Cut, Plan
from rankwise.stages.at_site import draw_for

Settings = Callable[..., dict[str, Any]]

MIXED = {"name": "mixed", "outer": 1, "inner": 1}


def weights(values: dict[str, Any], run: Path) -> dict[str, Tensor]:
    return compress(recipe_from(values), run_directory=run).model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("two_sided", {"seed": 1}),
        ("two_sided", {"batch_size": 5}),
        ("two_sided", {"sequences": 39}),
        ("two_sided", {"gradient_sequences": 39}),
        ("two_sided", {"method": {"name": "two_sided", "labels": "text"}}),
        ("two_sided", {"method": {"name": "two_sided", "damping": 0.1}}),
        ("bolaco", {"method": {"name": "bolaco", "groups": 5}}),
        ("quantize", {"method": {"name": "quantize", "damping": 0.1}}),
        ("quantize", {"seed": 1}),
    ],
    ids=str,
)
def test_nothing_is_reused_that_a_setting_would_change(
    method: str, changes: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """The same sequences in every run, so that a seed changes only what is drawn while they are run."""

    def with_changes(seed: int = 0, method: Any = method, **calibration: Any) -> dict[str, Any]:
        first = {**settings()["calibration"], "sample": "first", **calibration}
        return settings(method=method, allocation="uniform", seed=seed, calibration=first)

    before = weights(with_changes(), tmp_path / "used")
    after = weights(with_changes(**changes), tmp_path / "used")
    assert same(after, weights(with_changes(**changes), tmp_path / "fresh"))
    assert not same(after, before)


def test_nothing_is_reused_that_sites_which_are_left_out_would_change(settings: Settings, tmp_path: Path) -> None:
    """What fits the memory for curvature decides how much of it is kept at every site."""
    pattern = "*.q_proj"

    def with_sites(memory: float, **changes: Any) -> dict[str, Any]:
        method, budget = {"name": "two_sided", "curvature_gb": memory}, {"keep": 0.95, "rank_multiple": 1}
        return settings(method=method, budget=budget, allocation="uniform", **changes)

    shapes = compress(recipe_from(with_sites(8.0)), run_directory=tmp_path / "whole").plan.shapes
    memory = 1.01e-9 * 12 * sum(shape[0] ** 2 for name, shape in shapes.items() if name.endswith("q_proj"))
    weights(with_sites(memory), tmp_path / "used")
    after = weights(with_sites(memory, include=(pattern,)), tmp_path / "used")
    assert same(after, weights(with_sites(memory, include=(pattern,)), tmp_path / "fresh"))


def test_a_fit_is_reused_for_its_own_cut_alone(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    first = compress(recipe_from(settings(method=MIXED, budget={"bits": 12})), run_directory=tmp_path / "run")
    values = settings(method=MIXED, allocation=f"plan:{file}")
    del values["budget"]

    def of_cut(cut: Cut, run: Path) -> dict[str, Tensor]:
        plan: Plan = first.plan.model_copy(update={"cuts": dict.fromkeys(first.plan.cuts, cut), "bits": None})
        file.write_text(plan.model_dump_json())
        return weights(values, run)

    cuts = [Cut(8, 0, 4), Cut(8, 0, 8), Cut(4, 0, 8), Cut(4, 2, 4), Cut(4, 3, 4)]
    found = [of_cut(cut, tmp_path / "run") for cut in cuts]
    for number, cut in enumerate(cuts[1:], 1):
        assert same(found[number], of_cut(cut, tmp_path / f"fresh-{number}")), str(cut)


def test_what_a_site_draws_depends_on_the_seed_and_its_name_alone() -> None:
    def drawn(seed: int, name: str) -> list[float]:
        work: Any = SimpleNamespace(recipe=SimpleNamespace(seed=seed))
        return torch.rand(4, generator=draw_for(work, make_site(name, 8, 8))).tolist()

    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, name)) for seed in (0, 1, 2) for name in ("a", "b", "1:a")}) == 9
