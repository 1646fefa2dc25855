"""A weight that is zero, is never activated, or is never felt by the loss, under every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_metric import METHODS, OneWeight, sequences
from torch import Tensor

from rankwise.factors import Fit
from rankwise.methods import METHODS as ALL
from rankwise.methods import Method
from rankwise.methods.caldera import Caldera
from rankwise.methods.mixed import Mixed
from rankwise.methods.quantize import Quantize
from rankwise.models import Site
from rankwise.sizes import Cut
from rankwise.statistics import SiteStatistics, Statistic, Store, collect, save_totals

SHAPES = [(40, 24), (24, 40)]
ZEROS = ("weight", "inputs", "gradient")
CASES: list[tuple[Method, Cut]] = [
    *((method, Cut(8)) for method in METHODS.values()),
    (Quantize(), Cut(0, 2)),
    (Caldera(outer=2, inner=2), Cut(4, 2, 4)),
    (Caldera(outer=2, codebook="uniform"), Cut(4, 3, 16)),
    (Mixed(outer=2, inner=2), Cut(8)),
    (Mixed(outer=2, inner=2), Cut(4, 0, 4)),
    (Mixed(outer=2, inner=2), Cut(4, 2, 4)),
]
LOOKS_AT = {
    "svd": {"weight"},
    "fwsvd": {"weight", "inputs", "gradient"},
    "two_sided": {"weight", "inputs", "gradient"},
}
"""By method, what may not be zero; `weight` and `inputs` where it is not named."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[int, int]], Any]:
    """The weight, and what is collected of it, with one thing zero."""
    found = {}
    for zero in ZEROS:
        for m, n in SHAPES:
            model = OneWeight(m, n)
            parts = {"weight": model.layer, "inputs": model.embedding, "gradient": model.head}
            with torch.no_grad():
                parts[zero].weight.zero_()
            site = Site("layer", "layer", 0, m, n, False, True, "layer")
            asked: list[Statistic] = list(dict.fromkeys(each for method, _ in CASES for each in method.requests()))
            asked += [each for each in Quantize().plan_requests() if each not in asked]
            collected = collect(model, [site], sequences(), asked, batch_size=8)
            folder = tmp_path_factory.mktemp("statistics")
            folders: dict[Statistic, Path] = {}
            for statistic, by_stream in collected.items():
                folders[statistic] = folder / str(len(folders))
                for key, totals in by_stream.items():
                    save_totals(folders[statistic] / f"{key}.safetensors", totals)
            weight, bias = model.layer.weight.detach().double(), model.layer.bias.detach()
            found[zero, (m, n)] = weight, SiteStatistics(site, weight, bias, Store(folders, [site]))
    return lambda zero, shape: found[zero, shape]


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def fitted(method: Method, weight: Tensor, statistics: SiteStatistics, cut: Cut) -> tuple[Tensor, Fit]:
    outlook = method.outlook(weight, statistics, cut.q_bits, drawn())
    for part in (outlook.basis.left, outlook.basis.right, outlook.basis.energy):
        assert torch.isfinite(part).all()
    factors, fit = method.fit(weight, statistics, cut, drawn(), lambda _q_bits: outlook)
    fit.check_finite("layer")
    assert factors.bias is None or torch.isfinite(factors.bias).all()
    return factors.reconstruct(), fit


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize(("method", "cut"), CASES, ids=lambda each: str(getattr(each, "name", each)))
def test_what_is_zero_is_said_and_never_fatal(
    method: Method, cut: Cut, zero: str, shape: tuple[int, int], seen: Any
) -> None:
    weight, statistics = seen(zero, shape)
    product, fit = fitted(method, weight, statistics, cut)
    name = "two_sided" if method.name == "mixed" and not cut.coded else method.name
    assert fit.facts().get("fallback", False) == (zero in LOOKS_AT.get(name, {"weight", "inputs"}))
    missed = (product - weight).norm()
    if zero == "weight":
        assert missed < 1e-20
    elif not cut.coded and name != "two_sided" and zero in LOOKS_AT.get(name, {"inputs"}):
        tail = torch.linalg.svdvals(weight)[cut.rank :].norm()
        assert float(missed) == pytest.approx(float(tail), rel=1e-6)
    else:
        assert missed < weight.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_gradient_the_inputs_alone_decide(shape: tuple[int, int], seen: Any) -> None:
    at = seen("gradient", shape)
    for method in (METHODS["two_sided"], Mixed()):
        torch.testing.assert_close(fitted(method, *at, Cut(8))[0], fitted(METHODS["afm"], *at, Cut(8))[0])


def test_every_method_is_tried() -> None:
    assert {method.name for method, _ in CASES} == {name for name, method in ALL.items() if not method.prunes}
