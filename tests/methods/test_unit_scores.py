"""Which units go: the scores of FLAP and LLM-Pruner, their published numbers, and the order and price of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import LLAMA_2_7B
from rankwise.methods import Part
from rankwise.methods.flap import FLAP
from rankwise.methods.llm_pruner import LLMPruner
from rankwise.methods.pruned import Pruned
from rankwise.methods.pruning import alike, by_score
from rankwise.models import Coupling, Section, Site
from rankwise.sizes import Form
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.input_spread import InputSpread, SpreadSums
from rankwise.statistics.moment_sums import MomentTotals
from rankwise.statistics.weight_gradient import WeightGradient

FORM = Form()


class Seen:
    """Statistics that a test gives."""

    def __init__(self, values: dict[Any, Any], bias: Tensor | None = None) -> None:
        self._values, self.bias = values, bias

    def of(self, statistic: Any) -> Any:
        return self._values[statistic]


def site(name: str, m: int, n: int, block: int = 0) -> Site:
    return Site(name, name.rpartition(".")[2], block, m, n, False, False, name)


Found = list[tuple[Coupling, dict[str, Site]]]


def llama(block: int, d: int, inner: int, groups: int, width: int, gamma: int) -> Found:
    """The two couplings of a block of Llama shapes."""
    where = f"layers.{block}"
    q, k, v, o, gate, up, down = (f"{where}.{leaf}" for leaf in ("q", "k", "v", "o", "gate", "up", "down"))
    sites = {
        q: site(q, groups * gamma * width, d, block),
        k: site(k, groups * width, d, block),
        v: site(v, groups * width, d, block),
        o: site(o, d, groups * gamma * width, block),
        gate: site(gate, inner, d, block),
        up: site(up, inner, d, block),
        down: site(down, d, inner, block),
    }
    rows = (Section(q, 0, gamma * width), Section(k, 0, width), Section(v, 0, width))
    heads = Coupling(f"{where}.attn", "heads", block, groups, rows, Section(o, 0, gamma * width), ())
    channels = Coupling(
        f"{where}.mlp", "channels", block, inner, (Section(gate, 0, 1), Section(up, 0, 1)), Section(down, 0, 1), ()
    )
    return [(heads, sites), (channels, sites)]


def parts_of(blocks: int, **shape: int) -> list[Part]:
    def nothing(name: str) -> Any:
        raise KeyError(name)

    return [Part(coupling, sites, nothing) for b in range(blocks) for coupling, sites in llama(b, **shape)]


def seven_b() -> list[Part]:
    layers, d = LLAMA_2_7B["num_hidden_layers"], LLAMA_2_7B["hidden_size"]
    return parts_of(layers, d=d, inner=LLAMA_2_7B["intermediate_size"], groups=32, width=128, gamma=1)


def whole(parts: list[Part]) -> int:
    return sum(part.numbers * part.coupling.units for part in parts)


def spent(parts: list[Part], stays: dict[str, Tensor]) -> int:
    return sum(part.numbers * len(stays[part.coupling.name]) for part in parts)


def scores_of(parts: list[Part], seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {part.coupling.name: torch.rand(part.coupling.units, generator=source) for part in parts}


def test_published_counts_of_llm_pruner_on_llama_2_7b() -> None:
    """Layers 4 to 29 without a quarter of their units: .797 of the linears, 5.42 B of parameters in all."""
    parts = seven_b()
    method = LLMPruner()
    assert whole(parts) == 6_476_005_376

    def without_a_quarter(protected: list[str]) -> int:
        kept = {True: 4, False: 3}
        return sum(part.numbers * (part.coupling.units * kept[part.coupling.name in protected] // 4) for part in parts)

    quarter = without_a_quarter(method.protected(parts))
    found = method.stays(parts, scores_of(parts), quarter * 16, FORM)
    assert {len(found[f"layers.{b}.attn"]) for b in range(4, 30)} == {24}
    assert {len(found[f"layers.{b}.mlp"]) for b in range(4, 30)} == {8256}
    assert {len(found[f"layers.{b}.mlp"]) for b in (0, 3, 30, 31)} == {11008}
    assert spent(parts, found) == quarter
    assert quarter / whole(parts) == pytest.approx(0.797, abs=5e-4)
    rest = 2 * LLAMA_2_7B["vocab_size"] * 4096 + 65 * 4096
    assert (quarter + rest) / 1e9 == pytest.approx(5.42, abs=5e-3)
    other = LLMPruner(first=3, last=1)
    assert without_a_quarter(other.protected(parts)) / whole(parts) == pytest.approx(0.781, abs=5e-4)


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM", "UL-MM", "AL-MM"])
def test_flap_keeps_what_is_asked_within_a_unit(structure: Any) -> None:
    parts = seven_b()[:8]
    allowed = int(0.8 * whole(parts))
    found = FLAP(structure=structure).stays(parts, scores_of(parts), allowed * 16, FORM)
    assert 0 <= allowed - spent(parts, found) < 2 * 4 * 128 * 4096
    if structure.startswith("UL"):
        assert len({len(found[f"layers.{b}.mlp"]) for b in range(4)}) <= 2


@given(st.integers(0, 10_000), st.floats(0.15, 1.0), st.sampled_from([1, 4]), st.booleans())
def test_a_choice_meets_its_size_everywhere(seed: int, share: float, multiple: int, by: bool) -> None:
    parts = parts_of(3, d=8, inner=20, groups=3, width=2, gamma=2)
    allowed = int(share * whole(parts))
    scores = scores_of(parts, seed)
    choose: Callable[..., dict[str, Tensor]] = by_score if by else alike
    found = choose(parts, scores, allowed, multiple)
    least = sum(part.numbers * part.chunk(multiple) for part in parts)
    assert spent(parts, found) <= max(allowed, least)
    for part in parts:
        units = found[part.coupling.name]
        assert len(units) >= part.chunk(multiple)
        assert units.tolist() == sorted(set(units.tolist()))
        if part.coupling.kind == "channels":
            assert len(units) % multiple == 0
        # Those that stay are the best of their layer.
        score = scores[part.coupling.name]
        gone = [i for i in range(part.coupling.units) if i not in units.tolist()]
        if multiple == 1 and gone:
            assert float(score[units].min()) >= float(score[gone].max())
    # Less than the cheapest step is left, unless nothing more can be added.
    if share < 0.9 and multiple == 1:
        assert allowed - spent(parts, found) < max(part.numbers for part in parts)


def test_equal_layers_are_equal() -> None:
    parts = parts_of(3, d=8, inner=20, groups=3, width=2, gamma=2)
    found = alike(parts, scores_of(parts), int(0.71 * whole(parts)), 1, equal=True)
    assert len({len(found[f"layers.{b}.mlp"]) for b in range(3)}) == 1
    assert len({len(found[f"layers.{b}.attn"]) for b in range(3)}) == 1
    with pytest.raises(ValueError, match="UL-UM"):
        FLAP(equal=True)
    with pytest.raises(ValueError, match="first 0 and last 0"):
        LLMPruner(equal=True)


def one(kind: str, seed: int = 0) -> tuple[Coupling, dict[str, Site], dict[str, Tensor], Tensor]:
    """A coupling of small shapes, its weights, and inputs of the consumer, shape `[tokens, n]`."""
    heads, channels = llama(0, d=6, inner=8, groups=3, width=2, gamma=2)
    coupling, sites = heads if kind == "heads" else channels
    source = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(s.m, s.n, generator=source, dtype=torch.float64) for name, s in sites.items()}
    n = sites[coupling.columns.site].n
    x = torch.randn(300, n, generator=source, dtype=torch.float64) * torch.rand(n, generator=source) + 1
    return coupling, sites, weights, x


def spread_of(x: Tensor) -> Any:
    sums = SpreadSums(x.shape[1], torch.device("cpu"))
    for part in x.split(37):
        sums.add(part)
    return sums.take()


def test_spread_is_mean_and_variance_whatever_the_batches() -> None:
    x = torch.randn(301, 5, dtype=torch.float64) + 1e3
    found = spread_of(x)
    assert torch.allclose(found.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(found.variance(), x.var(0), rtol=1e-9)
    assert torch.allclose(found.mean_square(), x.square().mean(0), rtol=1e-12)


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_flap_scores_are_those_of_the_paper(kind: str) -> None:
    coupling, sites, weights, x = one(kind)
    weight = weights[coupling.columns.site]
    part = Part(coupling, sites, lambda name: (weights[name], Seen({InputSpread(): spread_of(x)})))
    size = coupling.columns.size
    wifv = x.var(0) * weight.square().sum(0)
    z = ((wifv - wifv.mean()) / wifv.std()).reshape(-1, size).mean(1)
    assert torch.allclose(FLAP().scores(part), z)
    assert torch.allclose(FLAP(structure="UL-UM").scores(part), wifv.reshape(-1, size).sum(1))
    norms = weight.abs().mean(0) * x.norm(dim=0)
    assert torch.allclose(FLAP(metric="WIFN", structure="UL-UM").scores(part), norms.reshape(-1, size).sum(1))
    ifv = FLAP(metric="IFV", structure="UL-UM").scores(part)
    assert torch.allclose(ifv, x.var(0).reshape(-1, size).sum(1))
    squared = FLAP(structure="UL-UM", squared_attention=True).scores(part)
    assert torch.allclose(squared, (wifv**2 if kind == "heads" else wifv).reshape(-1, size).sum(1))


@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("compensation", ["bias", "linear"])
def test_a_compensation_keeps_the_mean_output_and_the_linear_one_most(kind: str, compensation: Any) -> None:
    coupling, sites, weights, x = one(kind)
    bias = torch.ones(6, dtype=torch.float64)
    seen = Seen({InputSpread(): spread_of(x), InputMoments(): MomentTotals.of(x)}, bias)
    part = Part(coupling, sites, lambda name: (weights[name], seen))
    units = torch.tensor([0, 2])
    method = FLAP(compensation=compensation, damping=1e-9)
    found = method.consumer(part, units)
    assert found is not None
    made, added = found
    assert added is not None
    kept = x[:, coupling.columns.of(units)]
    before, after = x @ weights[coupling.columns.site].T + bias, kept @ made.T + added
    assert torch.allclose(before.mean(0), after.mean(0), rtol=1e-9)
    cut = kept @ weights[coupling.columns.site][:, coupling.columns.of(units)].T
    residual = (before - after).var(0).sum()
    alone = (before - cut).var(0).sum()
    assert residual <= alone * (1 + 1e-9)
    if compensation == "linear":
        # Least squares: what is left is uncorrelated with what stays.
        centred = kept - kept.mean(0)
        assert ((before - after).T @ centred).abs().max() < 1e-6 * len(x)
    assert FLAP(compensation="none").consumer(part, units) is None


def test_a_constant_input_has_the_lowest_score() -> None:
    coupling, sites, weights, x = one("channels")
    x[:, 5] = 7.0
    part = Part(coupling, sites, lambda name: (weights[name], Seen({InputSpread(): spread_of(x)})))
    for metric in ("WIFV", "IFV"):
        assert int(FLAP(metric=metric).scores(part).argmin()) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["vectorize", "first", "second", "mixed"])
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_taylor_importance_is_that_of_the_paper(kind: str, importance: Any) -> None:
    coupling, sites, weights, _ = one(kind)
    source = torch.Generator().manual_seed(1)
    method = LLMPruner(importance=importance)
    squares = importance in ("second", "mixed")
    gradients = {
        name: torch.randn(2 if squares else 1, *weight.shape, generator=source, dtype=torch.float64)
        for name, weight in weights.items()
    }
    part = Part(coupling, sites, lambda name: (weights[name], Seen({WeightGradient(squares=squares): gradients[name]})))

    def of(name: str, side: int) -> Tensor:
        w, g = weights[name], gradients[name][0]
        a = gradients[name][1] if squares else g
        return {
            "vectorize": (w * g).sum(side).abs(),
            "first": (w * g).abs().sum(side),
            "second": (w * w * a).abs().sum(side),
            "mixed": (w * g - w * w * a / 2).abs().sum(side),
        }[importance]

    expected = torch.zeros(coupling.units, dtype=torch.float64)
    for unit in range(coupling.units):
        for section in coupling.rows:
            expected[unit] += of(section.site, 1)[section.of(torch.tensor([unit]))].sum()
        expected[unit] += of(coupling.columns.site, 0)[coupling.columns.of(torch.tensor([unit]))].sum()
    assert torch.allclose(method.scores(part), expected)


def test_protecting_more_layers_than_there_are_protects_all() -> None:
    parts = parts_of(3, d=8, inner=20, groups=3, width=2, gamma=2)
    assert len(LLMPruner(first=0, last=5).protected(parts)) == len(parts)
    assert LLMPruner(first=0, last=0).protected(parts) == []


def test_members_of_a_unit_come_together_as_asked() -> None:
    coupling, sites, weights, _ = one("channels")
    gradients = {name: torch.ones(1, *weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    part = Part(coupling, sites, lambda name: (weights[name], Seen({WeightGradient(): gradients[name]})))
    sides = {"gate": 1, "up": 1, "down": 0}
    members = torch.stack([weights[f"layers.0.{leaf}"].abs().sum(side) for leaf, side in sides.items()])
    expected = {
        "sum": members.sum(0),
        "mean": members.mean(0),
        "max": members.amax(0),
        "product": members.prod(0),
        "first": members[0],
    }
    for reduction, values in expected.items():
        assert torch.allclose(LLMPruner(reduction=reduction).scores(part), values)  # type: ignore[arg-type]


def ours(kind: str, x: Tensor, gradients: Tensor | None = None) -> tuple[Part, Pruned]:
    coupling, sites, weights, _ = one(kind)
    method = Pruned(multiple=1)
    source = torch.Generator().manual_seed(2)

    def seen(name: str) -> Any:
        m, n = weights[name].shape
        inputs = x if name == coupling.columns.site else torch.randn(200, n, generator=source, dtype=torch.float64)
        g = torch.randn(200, m, generator=source, dtype=torch.float64) if gradients is None else gradients[:, :m]
        blocks = (g.T @ g / len(g))[None]
        return weights[name], Seen({InputMoments(): MomentTotals.of(inputs), Curvature(labels="sampled"): blocks})

    return Part(coupling, sites, seen), method


def test_the_order_of_ours_feels_the_gradient() -> None:
    """A channel that is written where no loss is felt goes first, however large it is."""
    _, _, weights, x = one("channels")
    gradients = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients[:, 0] = 0
    part, method = ours("channels", x, gradients)
    down = weights["layers.0.down"]

    def seen(name: str) -> Any:
        weight, found = part.seen(name)
        if name == "layers.0.down":
            weight = weight.clone()
            weight[:, 4] = 0
            weight[0, 4] = 100.0
        return weight, found

    felt = method.scores(Part(part.coupling, part.sites, seen))
    assert int(felt.argmin()) == 4
    assert down.shape == (6, 8)


def test_ours_prunes_where_room_is_scarce_and_keeps_all_where_it_is_not() -> None:
    _, _, _, x = one("channels")
    part, method = ours("channels", x)
    scores = {part.coupling.name: method.scores(part)}
    dense = 16 * part.numbers * part.coupling.units
    all_of_it = method.stays([part], scores, dense, FORM)[part.coupling.name]
    assert len(all_of_it) == part.coupling.units
    few = method.stays([part], scores, dense // 4, FORM)[part.coupling.name]
    assert len(few) < part.coupling.units
    # Those that stay come first in the order.
    order = scores[part.coupling.name].argsort(descending=True)
    assert sorted(order[: len(few)].tolist()) == few.tolist()


def test_gradients_are_summed_by_sequence() -> None:
    statistic = WeightGradient(squares=True)
    x, g = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    count, found = statistic.measure(g, x)
    each = torch.stack([g[i].T @ x[i] / 4 for i in range(3)])
    assert count == 3
    assert torch.allclose(found[0], each.sum(0), atol=1e-6)
    assert torch.allclose(found[1], each.square().sum(0), atol=1e-6)
