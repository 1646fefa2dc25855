"""Weights rounded side by side: the same codes as of each alone, and failures that still name their site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from conftest import make_site
from rankwise import compress
from rankwise.methods import AtSite
from rankwise.methods.quantize import Quantize
from rankwise.quantizers import Hessian, Target, codebook_named, ldlq, ldlq_together
from rankwise.recipes import recipe_from
from rankwise.sizes import Cut
from rankwise.stages import at_once, jobs
from rankwise.stages.fitting import _together
from rankwise.statistics.curvature import Curvature

Settings = Callable[..., dict[str, Any]]
ALONG_INPUTS = Quantize(output_feedback=False)
"""What is fitted in groups."""


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=drawn(seed))


def moment(n: int, seed: int) -> Tensor:
    root = matrix(n, n + 9, seed)
    return root @ root.T / (n + 9)


def seen(n: int, seed: int, m: int = 0) -> Any:
    """Stands in for a site's statistics; without m nothing is felt of its outputs."""

    def of(statistic: Any) -> Any:
        if isinstance(statistic, Curvature):
            return moment(m, seed + 1)[None] if m else torch.zeros(1, 1, 1)
        return SimpleNamespace(second_moment=lambda: moment(n, seed))

    return SimpleNamespace(bias=None, of=of)


@pytest.mark.parametrize(("group", "by_row"), [(0, False), (0, True), (16, True)])
@pytest.mark.parametrize("n", [37, 150])
@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p", 3), ("e8p", 4), ("uniform", 3), ("nf", 2)])
def test_weights_are_rounded_together_as_each_alone(name: str, bits: int, n: int, group: int, by_row: bool) -> None:
    codebook = codebook_named(name, bits, group, by_row)
    targets = []
    for seed, rows in enumerate((5, 1, 12)):
        weight = matrix(rows, n, seed)
        feedback = Hessian.of(moment(n, seed), 0.01).feedback(codebook.tile[1])
        targets.append(Target(weight, feedback, codebook.scales(weight, feedback=True)))
    for found, target in zip(ldlq_together(targets, codebook), targets, strict=True):
        alone = ldlq(target.weight, target.feedback, codebook, target.scale)
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.dense(), alone.dense())
        # No view of what was made for all, which would be written whole.
        assert found.codes.untyped_storage().nbytes() == found.codes.nbytes


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"output_feedback": False},
        {"passes": 1},
        {"feedback": False},
        {"output_feedback": False, "hadamard": False, "group": 8},
    ],
)
def test_a_site_is_fitted_together_with_others_as_alone(choices: dict[str, Any]) -> None:
    method, given = Quantize(**choices), []
    for seed, rows in enumerate((9, 16, 4)):
        weight = matrix(rows, 24, seed) * (seed != 1)
        # Of the second nothing is felt: it goes a way of its own.
        given.append(AtSite(weight, seen(24, seed, rows * (seed != 1)), Cut(0, 3), drawn(seed), lambda _: None))
    found = method.fit_together(given)
    for seed, (at, (factors, fit)) in enumerate(zip(given, found, strict=True)):
        alone, of_alone = method.fit(at.weight, at.statistics, at.cut, drawn(seed), at.looking)
        assert torch.equal(factors.reconstruct(), alone.reconstruct())
        assert fit == of_alone
    assert [fit.fallback for _, fit in found] == [False, True, False]


def test_groups_are_of_one_width_and_bits_and_no_larger_than_memory_allows(monkeypatch: Any) -> None:
    work = cast(Any, SimpleNamespace(recipe=SimpleNamespace(method=ALONG_INPUTS)))
    monkeypatch.setattr(at_once, "_GROUPS", 1)
    sites = [make_site(f"layers.{number}.q_proj", 64, 32 + 32 * (number % 2)) for number in range(9)]
    wanted = [(site, Cut(0, 3 if number < 2 else 4)) for number, site in enumerate(sites)]
    groups = _together(work, wanted, 1)
    assert [len(group) for group in groups] == [1, 1, 4, 3]
    assert sorted(each[0].name for group in groups for each in group) == sorted(site.name for site in sites)
    assert all(len({(site.n, cut.q_bits) for site, cut in group}) == 1 for group in groups)
    large = [(make_site(f"layers.{number}.q_proj", 4096, 4096), Cut(0, 4)) for number in range(3)]
    assert [len(group) for group in _together(work, large, 1)] == [1, 1, 1]
    # Nobody waits for one who has all.
    assert len(_together(work, wanted, 4)) >= 4


class Halved(Quantize):
    """A method of one's own, made of `quantize`."""

    def fit(self, weight: Tensor, *given: Any) -> Any:
        return super().fit(weight / 2, *given)


def test_a_method_that_fits_in_its_own_way_is_asked_for_every_site() -> None:
    method = Halved(output_feedback=False)
    assert ALONG_INPUTS.together
    assert not Quantize().together
    assert not method.together
    given = [AtSite(matrix(4, 16, seed), seen(16, seed), Cut(0, 4), drawn(seed), lambda _: None) for seed in range(2)]
    for seed, (at, (factors, _)) in enumerate(zip(given, method.fit_together(given), strict=True)):
        plain, _ = ALONG_INPUTS.fit(at.weight / 2, at.statistics, at.cut, drawn(seed), at.looking)
        assert torch.equal(factors.reconstruct(), plain.reconstruct())


def test_codes_are_those_of_fits_one_by_one(settings: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    values = settings(method=ALONG_INPUTS.model_dump(), budget={"bits": 3})
    groups: list[int] = []
    fit_together = Quantize.fit_together

    def counting(method: Any, given: Any) -> Any:
        groups.append(len(given))
        return fit_together(method, given)

    monkeypatch.setattr(Quantize, "fit_together", counting)
    compress(recipe_from({**values, "output": str(tmp_path / "together")}), run_directory=tmp_path / "run")
    assert max(groups) > 1
    groups.clear()
    monkeypatch.setattr(Quantize, "together", property(lambda _: False))
    compress(recipe_from({**values, "output": str(tmp_path / "alone")}), run_directory=tmp_path / "other run")
    assert not groups
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("together", "alone"))
    assert one == other
    sites = [
        json.loads((tmp_path / name / "rankwise_report.json").read_text())["sites"] for name in ("together", "alone")
    ]
    assert sites[0] == sites[1]


def test_where_a_group_fails_each_is_tried_alone(settings: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    """A GPU without memory for all has it for one, and what fails by itself is named by its own fit."""
    tried: list[str] = []
    fit_site, together = jobs.fit_site, Quantize.fit_together

    def alone(hand: Any, place: Any, cut: Any) -> Any:
        tried.append(place.name)
        return fit_site(hand, place, cut)

    def no_memory_for_all(method: Any, given: Any) -> Any:
        if len(given) > 1:
            raise torch.OutOfMemoryError("no memory")
        return together(method, given)

    values = settings(method=ALONG_INPUTS.model_dump(), budget={"bits": 3})
    expected = compress(recipe_from(values), run_directory=tmp_path / "run")
    monkeypatch.setattr(Quantize, "fit_together", no_memory_for_all)
    monkeypatch.setattr(jobs, "fit_site", alone)
    found = compress(recipe_from(values), run_directory=tmp_path / "other run")
    assert sorted(tried) == sorted(found.plan.cuts)
    assert found.report.sites == expected.report.sites
