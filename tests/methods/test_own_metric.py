"""Every method minimises its own metric, and no other method's answer does.

A model of one weight has what the methods differ over: inputs of very uneven size that hang together, a large mean,
groups of sequences that differ, outputs whose loss gradients are of very uneven size and hang together. Hooks of the
test record what goes into the weight and what comes back to it. Metrics and least errors are made of that in numpy, the
latter as tails of the singular values of P^T W S, with P P^T = F and S S^T = M by Cholesky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankwise.factors import Factors
from rankwise.methods import FACTORISATIONS, Factorisation, Outlook, method_named
from rankwise.methods.bolaco import Bolaco
from rankwise.methods.caldera import Caldera
from rankwise.methods.fwsvd import FWSVD
from rankwise.methods.mixed import Mixed
from rankwise.methods.quantize import Quantize
from rankwise.methods.two_sided import TwoSided
from rankwise.models import Site
from rankwise.quantizers import codebook_named
from rankwise.sizes import Cut
from rankwise.statistics import SiteStatistics, Statistic, Store, collect, save_totals

SEQUENCES, TOKENS, VOCABULARY, GROUPS = 16, 32, 128, 4
RANKS = (4, 8, 16)
SHAPES = [(40, 24), (24, 40), (32, 32)]
"""Tall, wide (where outputs are watched) and square: the three ways to one decomposition."""

METHODS: dict[str, Factorisation] = {
    **{name: method_named(name) for name in FACTORISATIONS},  # type: ignore[misc]
    "bolaco": Bolaco(groups=GROUPS),
}
WORSE = 1.05
"""Every other method's answer has at least so many times the least error, at every rank; in the median four times."""

Array = np.ndarray[Any, np.dtype[np.float64]]


class OneWeight(nn.Module):
    """Embedding, one weight with a bias, head: all that the passes need of a causal language model."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source)

        def uneven(count: int, decades: float) -> Tensor:
            return torch.logspace(decades / 2, -decades / 2, count)[torch.randperm(count, generator=source)]

        def mixing(count: int) -> Tensor:
            return torch.linalg.qr(drawn(count, count))[0]

        self.embedding = nn.Embedding(VOCABULARY, n)
        self.layer = nn.Linear(n, m)
        self.head = nn.Linear(m, VOCABULARY, bias=False)
        group = torch.arange(VOCABULARY) // (VOCABULARY // GROUPS)
        with torch.no_grad():
            inputs = (drawn(VOCABULARY, n) * uneven(n, 1.5)) @ mixing(n)
            inputs += (4 * drawn(GROUPS, n))[group] + 8 * drawn(n)
            self.embedding.weight.copy_(inputs * uneven(n, 2.0))
            self.layer.weight.copy_(drawn(m, n) / n**0.5)
            self.layer.bias.copy_(3 * drawn(m))
            felt = (drawn(VOCABULARY, m) * torch.logspace(0, -3, m)) @ mixing(m)
            self.head.weight.copy_(0.05 * felt * uneven(m, 2.0))

    @property
    def base_model(self) -> OneWeight:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.layer(self.embedding(input_ids))))


def sequences() -> Tensor:
    """Token ids, every group of sequences in a part of the vocabulary of its own."""
    part = VOCABULARY // GROUPS
    ids = torch.randint(0, part, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    return ids + part * (torch.arange(SEQUENCES) // (SEQUENCES // GROUPS))[:, None]


@dataclass(frozen=True)
class Seen:
    """One weight, its statistics, and what the test recorded itself.

    Attributes:
        weight: W, shape `[m, n]`.
        bias: the layer's own, shape `[m]`.
        statistics: what the package collected.
        x: inputs, shape `[sequences, tokens, n]`.
        g: by labels, loss gradients at the output, shape `[sequences, tokens, m]`.
    """

    weight: Tensor
    bias: Tensor
    statistics: SiteStatistics
    x: Array
    g: dict[str, Array]

    @property
    def inputs(self) -> Array:
        """Shape `[all tokens, n]`."""
        return self.x.reshape(-1, self.x.shape[-1])

    def second_moment(self) -> Array:
        return self.inputs.T @ self.inputs / len(self.inputs)

    def curvature(self) -> Array:
        g = self.g["sampled"].reshape(-1, self.weight.shape[0])
        return g.T @ g / len(g)

    def metrics(self, name: str, damped: bool = True) -> tuple[Array, Array]:
        """F and M of the metric tr(F E M E^T) that a factorisation minimises."""
        m, n = self.weight.shape
        outputs, inputs = np.eye(m), np.eye(n)
        if name == "fwsvd":
            by_sequence = np.einsum("stm,stn->smn", self.g["text"], self.x)
            rows = (by_sequence**2).sum(2).mean(0)
            outputs = np.diag(rows + FWSVD().damping * rows.mean())
        elif name == "asvd":
            inputs = np.diag(np.abs(self.inputs).mean(0))
        elif name == "svd_llm":
            inputs = self.second_moment()
        elif name == "bolaco":
            parts = np.split(self.x, GROUPS)
            inputs = np.mean([np.cov(part.reshape(-1, n).T) for part in parts], 0)
        elif name in ("afm", "two_sided"):
            inputs = np.cov(self.inputs.T)
        if name == "two_sided":
            outputs = self.curvature()
            if damped:
                outputs = outputs + TwoSided().damping * np.diag(outputs).mean() * np.eye(m)
        return outputs, inputs


def see(m: int, n: int, folder: Path) -> Seen:
    """Collect what all methods ask for, and record beside it what the statistics are made of."""
    model = OneWeight(m, n)
    site = Site("layer", "layer", 0, m, n, False, True, "layer")
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].detach().double())
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.append(gradient.double()))

    handle = model.layer.register_forward_hook(record)
    methods = [*METHODS.values(), Mixed()]
    asked: list[Statistic] = list(dict.fromkeys(each for method in methods for each in method.requests()))
    folders: dict[Statistic, Path] = {}
    x = np.zeros(0)
    g: dict[str, Array] = {}
    for labels in (None, "text", "sampled"):
        inputs.clear()
        gradients.clear()
        found = collect(model, [site], sequences(), [each for each in asked if each.labels == labels], batch_size=5)
        if labels is None:
            x = torch.cat(inputs).numpy()
        else:
            g[labels] = torch.cat(gradients).numpy()
        for statistic, by_stream in found.items():
            folders[statistic] = folder / str(len(folders))
            for key, totals in by_stream.items():
                save_totals(folders[statistic] / f"{key}.safetensors", totals)
    handle.remove()
    weight, bias = model.layer.weight.detach().double(), model.layer.bias.detach()
    return Seen(weight, bias, SiteStatistics(site, weight, bias, Store(folders, [site])), x, g)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, int]], Seen]:
    """What is seen of a weight of each shape."""
    found = {shape: see(*shape, tmp_path_factory.mktemp("statistics")) for shape in SHAPES}
    return found.__getitem__


def error(metrics: tuple[Array, Array], missed: Tensor) -> float:
    """tr(F E M E^T)."""
    outputs, inputs = metrics
    e = missed.numpy()
    return float(np.trace(outputs @ e @ inputs @ e.T))


def least_error(metrics: tuple[Array, Array], weight: Tensor, rank: int) -> float:
    """The least tr(F E M E^T) that any product of this rank leaves of a weight."""
    outputs, inputs = (np.linalg.cholesky(metric) for metric in metrics)
    values = np.linalg.svd(outputs.T @ weight.numpy() @ inputs, compute_uv=False)
    return float((values[rank:] ** 2).sum())


def answer(method: Factorisation, seen: Seen, rank: int) -> Factors:
    basis = method.decompose(seen.weight, seen.statistics)
    return method.fit(seen.weight, seen.statistics, Cut(rank), drawn(), lambda _q_bits: Outlook(basis))[0]


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def not_looking(_q_bits: int) -> None:
    """Nothing was seen before."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_a_method_attains_the_least_error_in_its_own_metric(name: str, shape: tuple[int, int], seen: Any) -> None:
    at = seen(shape)
    metrics = at.metrics(name)
    for rank in RANKS:
        missed = at.weight - answer(METHODS[name], at, rank).reconstruct()
        assert error(metrics, missed) == pytest.approx(least_error(metrics, at.weight, rank), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("other", FACTORISATIONS)
def test_no_other_methods_answer_does(other: str, shape: tuple[int, int], seen: Any) -> None:
    """So a method that ignored its statistic, and gave another one's answer, would be found out."""
    at = seen(shape)
    for rank in RANKS:
        missed = at.weight - answer(METHODS[other], at, rank).reconstruct()
        for name in FACTORISATIONS:
            if name != other:
                metrics = at.metrics(name)
                assert error(metrics, missed) > WORSE * least_error(metrics, at.weight, rank), (name, rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_energies_are_what_each_rank_leaves_in_the_methods_own_metric(
    name: str, shape: tuple[int, int], seen: Any
) -> None:
    """Those of `two_sided` by the curvature as it was measured: damping steers its directions alone."""
    at = seen(shape)
    basis = METHODS[name].decompose(at.weight, at.statistics)
    metrics = at.metrics(name, damped=False)
    whole = error(metrics, at.weight)
    assert float(basis.energy.sum()) == pytest.approx(whole, rel=1e-4)
    for rank in RANKS:
        missed = at.weight - basis.truncate(rank).reconstruct()
        assert float(basis.energy[rank:].sum()) == pytest.approx(error(metrics, missed), rel=1e-4, abs=1e-8 * whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_a_bias_makes_the_mean_output_exact_and_is_the_layers_own_where_none_is_added(
    name: str, shape: tuple[int, int], seen: Any
) -> None:
    at = seen(shape)
    mean = torch.from_numpy(at.inputs.mean(0))
    wanted = at.weight @ mean + at.bias.double()
    for rank in RANKS:
        found = answer(METHODS[name], at, rank)
        assert found.bias is not None
        if METHODS[name].adds_bias:
            got = found.reconstruct() @ mean + found.bias.double()
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        else:
            assert torch.equal(found.bias, at.bias)


def test_methods_that_add_a_bias_are_those_that_centre() -> None:
    assert {name for name, method in METHODS.items() if method.adds_bias} == {"afm", "bolaco", "two_sided"}


class Identity:
    """Statistics of a site whose inputs all weigh the same."""

    def __init__(self, n: int, bias: Tensor) -> None:
        self.bias, self._n = bias, n

    def of(self, _statistic: Statistic) -> Any:
        return SimpleNamespace(second_moment=lambda: torch.eye(self._n, dtype=torch.float64))


QUANTISERS = {
    "quantize": (Quantize(output_feedback=False), Cut(0, 2), 1.5),
    "quantize, uniform": (
        Quantize(codebook="uniform", hadamard=False, output_feedback=False),
        Cut(0, 3),
        1.5,
    ),
    "caldera": (Caldera(outer=4, inner=4), Cut(4, 2, 4), 10.0),
    "caldera, 16 bits": (Caldera(outer=4, lr_bits=16), Cut(4, 2, 16), 10.0),
}
"""Method, cut, and how many times its error the answers have that are not by the measured H."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", QUANTISERS)
def test_codes_by_the_hessian_beat_nearest_ones_and_those_of_an_identity(
    name: str, shape: tuple[int, int], seen: Any
) -> None:
    """In tr(E H E^T) with the H that was measured."""
    at, (method, cut, times) = seen(shape), QUANTISERS[name]
    metrics = np.eye(shape[0]), at.second_moment()

    def missed(statistics: Any) -> float:
        found, _ = method.fit(at.weight, statistics, cut, drawn(), not_looking)
        return error(metrics, at.weight - found.reconstruct())

    nearest = codebook_named(method.codebook, cut.q_bits, by_row=True).quantize(at.weight).dense()
    own = missed(at.statistics)
    assert error(metrics, at.weight - nearest) > times * own
    assert missed(Identity(shape[1], at.bias)) > times * own


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "cut"),
    [
        (Quantize(), Cut(0, 4)),
        (Quantize(codebook="uniform"), Cut(0, 5)),
        (Mixed(), Cut(0, 4)),
        (Caldera(output_feedback=True), Cut(0, 4)),
    ],
    ids=str,
)
def test_codes_by_both_metrics_lose_less_than_those_by_the_hessian(
    method: Quantize | Mixed | Caldera, cut: Cut, shape: tuple[int, int], seen: Any
) -> None:
    """In tr(F E H E^T) with the F and H that were measured."""
    at = seen(shape)
    metrics = at.curvature(), at.second_moment()

    def lost(method: Any) -> float:
        found, _ = method.fit(at.weight, at.statistics, cut, drawn(), not_looking)
        return error(metrics, at.weight - found.reconstruct())

    along_inputs = {"output_feedback": False}
    assert lost(method) < 0.9 * lost(method.model_copy(update=along_inputs))
    # With passes rows are rounded by themselves.
    again = lost(method.model_copy(update={"passes": 1}))
    assert again == lost(method.model_copy(update={"passes": 1, **along_inputs}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cut", [Cut(4, 2, 16), Cut(8, 0, 16)], ids=str)
def test_nothing_of_its_rank_leaves_less_beside_q_than_calderas_pair(
    cut: Cut, shape: tuple[int, int], seen: Any
) -> None:
    at, method = seen(shape), Caldera(outer=4, lr_bits=16)
    found, _ = method.fit(at.weight, at.statistics, cut, drawn(), not_looking)
    moment = at.second_moment()
    metrics = np.eye(shape[0]), moment + method.damping * np.diag(moment).mean() * np.eye(shape[1])
    q = Factors(None, None, q=found.q, rotation=found.rotation).reconstruct() if cut.q_bits else 0 * at.weight
    least = least_error(metrics, at.weight - q, cut.rank or 0)
    assert error(metrics, at.weight - found.reconstruct()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_estimated_of_codes_alone_is_their_loss_by_both_metrics(shape: tuple[int, int], seen: Any) -> None:
    at = seen(shape)
    outlook = Quantize().outlook(at.weight, at.statistics, 2, drawn())
    coarse = Factors(None, None, q=outlook.q, rotation=outlook.rotation).reconstruct()
    loss = error((at.curvature(), at.second_moment()), at.weight - coarse)
    assert outlook.basis.energy.tolist() == pytest.approx([loss], rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_alone_of_mixed_are_what_quantize_gives(shape: tuple[int, int], seen: Any) -> None:
    at = seen(shape)
    (found, fit), (wanted, wanted_fit) = (
        method.fit(at.weight, at.statistics, Cut(0, 2), drawn(), lambda _: None) for method in (Mixed(), Quantize())
    )
    assert torch.equal(found.reconstruct(), wanted.reconstruct())
    torch.testing.assert_close(found.bias, wanted.bias, atol=0, rtol=0)
    assert fit.errors == pytest.approx(wanted_fit.errors)


def both_metrics(at: Any, method: Mixed) -> tuple[Any, Any]:
    """F and H as `mixed` damps them."""
    curvature, moment = at.curvature(), at.second_moment()
    felt = curvature + method.curvature_damping * np.diag(curvature).mean() * np.eye(len(curvature))
    return felt, moment + method.damping * np.diag(moment).mean() * np.eye(len(moment))


@pytest.mark.parametrize("cut", [Cut(4, 2, 16), Cut(8, 0, 16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_of_its_rank_loses_less_beside_q_than_the_pair_of_mixed(
    cut: Cut, shape: tuple[int, int], seen: Any
) -> None:
    at, method = seen(shape), Mixed(outer=4, lr_bits=16)
    found, _ = method.fit(at.weight, at.statistics, cut, drawn(), not_looking)
    metrics = both_metrics(at, method)
    q = Factors(None, None, q=found.q, rotation=found.rotation).reconstruct() if cut.q_bits else 0 * at.weight
    least = least_error(metrics, at.weight - q, cut.rank or 0)
    assert error(metrics, at.weight - found.reconstruct()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("cut", [Cut(4, 2, 4), Cut(4, 2, 16), Cut(8, 0, 4), Cut(8, 0, 8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_fits_the_loss_and_caldera_the_outputs(shape: tuple[int, int], cut: Cut, seen: Any) -> None:
    at = seen(shape)
    mixed, caldera = (
        at.weight - method.fit(at.weight, at.statistics, cut, drawn(), not_looking)[0].reconstruct()
        for method in (Mixed(outer=4, output_feedback=False), Caldera(outer=4))
    )
    metrics = both_metrics(at, Mixed())
    assert error(metrics, mixed) < 0.99 * error(metrics, caldera)
    inputs_alone = np.eye(shape[0]), metrics[1]
    assert error(inputs_alone, caldera) < error(inputs_alone, mixed)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cut_in_numbers_of_mixed_is_what_two_sided_gives(shape: tuple[int, int], rank: int, seen: Any) -> None:
    at, mixed = seen(shape), Mixed(outer=1, inner=1)

    def looking(q_bits: int) -> Outlook:
        return mixed.outlook(at.weight, at.statistics, q_bits, drawn())

    found, fit = mixed.fit(at.weight, at.statistics, Cut(rank), drawn(), looking)
    wanted = answer(TwoSided(), at, rank)
    assert torch.equal(found.reconstruct(), wanted.reconstruct())
    torch.testing.assert_close(found.bias, wanted.bias, atol=0, rtol=0)
    assert fit.damping == TwoSided().damping
