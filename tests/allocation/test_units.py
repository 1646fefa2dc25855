"""Spaces of numbers of units: every point is on the budget, and the plan by estimated loss is one of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from rankwise.allocation import Counts, Units, unit_space_named
from rankwise.allocation.units import UnitShares, UnitSpace
from rankwise.errors import RecipeError

PLANNED = {"0.heads": 3, "0.mlp": 48, "1.heads": 4, "1.mlp": 83, "2.heads": 2, "2.mlp": 8, "3.heads": 4, "3.mlp": 64}
"""83 is all of the second layer, and no multiple of 8."""


def units() -> list[Units]:
    found = []
    for name, planned in PLANNED.items():
        block, kind = int(name[0]), "heads" if name.endswith("heads") else "channels"
        whole, least, step, share = (4, 1, 1, 0.06) if kind == "heads" else (83, 8, 8, 0.15)
        found.append(Units(name, kind, block, whole, least, step, planned, share))
    return found


def planned(weights: Mapping[str, float]) -> Counts:
    """More stay where the weight is higher."""
    return {each.name: each.nearest(each.planned * weights.get(each.name, 1.0)) for each in units()}


def space_of(name: str, kept: float = 0.6) -> UnitSpace:
    return unit_space_named(name, units(), kept, planned)


def kept_by(counts: Counts) -> float:
    """The share of the linear weights that stays in units, of all of them."""
    return sum(each.share * counts[each.name] / each.whole for each in units())


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("5x1", ["heads", "channels", "rest"]),
        ("rolesx1", ["heads", "channels", "rest"]),
        ("1x1", ["units", "rest"]),
        ("5x2", ["heads@1/2", "channels@1/2", "heads@2/2", "channels@2/2", "rest"]),
        ("1xlayers", [*(f"units@{block}/4" for block in range(1, 5)), "rest"]),
    ],
)
def test_points_are_on_the_budget_and_one_is_the_plan(name: str, labels: list[str]) -> None:
    space = space_of(name)
    assert space.labels == labels
    starts = dict(space.starts({}))
    assert space.decided(starts["spectral"]) == PLANNED
    assert space.decided(starts["ranks"]) == {each.name: each.whole for each in units()}
    assert float(starts["ranks"][-1]) == pytest.approx(0.6)
    # What units save and what ranks save together is what the budget asks.
    for point in [*starts.values(), *space.draw(40, torch.Generator().manual_seed(1))]:
        assert ((point >= space.lower - 1e-9) & (point <= space.upper + 1e-9)).all()
        assert float((space.weights * point).sum()) == pytest.approx(space.total)
        counts = space.decided(point)
        assert all(each.least <= counts[each.name] <= each.whole for each in units())
        assert all(counts[e.name] % e.step == 0 or counts[e.name] == e.whole for e in units())
        saved = sum(each.share for each in units()) - kept_by(counts)
        # A chunk of channels a layer is what rounding may change.
        assert 1 - saved - (1 - float(point[-1])) == pytest.approx(0.6, abs=4 * 0.15 * 4 / 83 + 4 * 0.06 / 8)
    units_alone = space.decided(starts["units"])
    assert kept_by(units_alone) < kept_by(PLANNED)


def test_more_of_a_share_is_more_units_in_each_layer() -> None:
    space = space_of("5x1")
    before = dict.fromkeys(PLANNED, 0)
    for share in torch.linspace(float(space.lower[1]), 1, 30).tolist():
        counts = space.decided(torch.tensor([1.0, share, 0.6]).double())
        assert all(counts[name] >= before[name] for name in counts)
        before = counts
    assert before == {each.name: each.whole for each in units()}


def test_multipliers_are_of_kinds_and_depth() -> None:
    space = space_of("spectral")
    assert space.labels == ["heads", "channels", "rest", "slope"]
    assert space.decided(space.planned) == PLANNED
    more = space.decided(torch.tensor([1.0, -0.5, -0.5, 0.0]).double())
    assert all(more[name] >= PLANNED[name] for name in PLANNED if name.endswith("heads"))
    assert all(more[name] == PLANNED[name] for name in PLANNED if name.endswith("mlp"))
    late = space.decided(torch.tensor([0.0, 0.0, 0.0, 1.0]).double())
    assert late["0.mlp"] < PLANNED["0.mlp"]
    assert late["3.mlp"] > PLANNED["3.mlp"]


def test_a_given_point_is_a_start_and_a_plan_within_the_budget_is_not_moved() -> None:
    space = space_of("5x1")
    known = dict(zip(space.labels, space.draw(1, torch.Generator().manual_seed(3))[0].tolist(), strict=True))
    (_, _), (name, point), *_ = space.starts(known)
    assert (name, point.tolist()) == ("plan", pytest.approx(list(known.values())))
    # Of a plan of another space its numbers of units are known: the shares of each group are theirs.
    near = dict(space.starts({}, {"0.mlp": 40, "2.heads": 1}))["plan"]
    assert float((space.weights * near).sum()) == pytest.approx(space.total)
    assert near[:2].tolist() == pytest.approx([13 / 16, (40 + 3 * 83) / (4 * 83)])
    assert "plan" not in dict(space_of("spectral").starts({"5": 1.0}, {"0.mlp": 40}))
    # Units alone save more than was asked, so that what is left is whole.
    loose = UnitShares(units(), "5", 1, 0.95)
    assert loose.planned[-1] > 1
    assert loose.decided(loose.project(loose.planned)) == PLANNED


def test_too_many_groups_of_blocks_are_said() -> None:
    with pytest.raises(RecipeError, match="5 depth groups are more than the model's 4 blocks"):
        space_of("5x5")
