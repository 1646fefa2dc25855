"""The objective: slices in place of layers, the original's predictions kept small, one number out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from conftest import given_logits, tiny_llama
from rankwise.errors import NotFiniteError
from rankwise.evaluation import Objective, ObjectiveSettings, perplexity
from rankwise.evaluation.predictions import HeadInputs, TopK
from rankwise.factors import Basis
from rankwise.layers import LowRankLinear, SlicedLinear, sliced, substitute
from rankwise.models import Site, find_sites
from rankwise.quantizers import Rotation
from rankwise.sizes import DENSE, Candidates, Cut

DIRECTIONS = ("compressed_original", "original_compressed")


def basis_of(site: Site, model: Any) -> Basis:
    weight = site.weight(model).double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    mean = torch.linspace(-1, 1, site.n, dtype=torch.float64)
    right = s[:, None] * v
    return Basis(u.float(), right.float(), s.square().float(), (weight @ mean).float(), (right @ mean).float())


@pytest.fixture
def model() -> Any:
    return tiny_llama(vocab_size=128)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(1))


def bases_of(model: Any) -> Callable[[Site], Any]:
    """What `sliced` reads: one basis a site, and no Q beside it."""
    return lambda site: {0: (None, Rotation(), basis_of(site, model))}


def some_cuts(sites: list[Site]) -> dict[str, Cut]:
    return {site.name: DENSE if i % 4 == 3 else Cut(3 + i % 5) for i, site in enumerate(sites)}


def every_rank(sites: list[Site]) -> dict[str, Candidates]:
    """All ranks of each site, and the dense weight."""
    cuts = {site.name: (*map(Cut, range(1, min(site.m, site.n) + 1)), DENSE) for site in sites}
    return {
        name: Candidates(each, torch.arange(len(each)), torch.arange(len(each)), (0.0, 16.0))
        for name, each in cuts.items()
    }


def test_slices_are_what_substitution_makes_and_leave_no_trace(model: Any, ids: torch.Tensor) -> None:
    sites = find_sites(model)
    before = copy.deepcopy(model.state_dict())
    cuts = some_cuts(sites)
    with (
        sliced(model, sites, bases_of(model), every_rank(sites), {}) as set_cuts,
        torch.no_grad(),
    ):
        dense = model(ids).logits
        set_cuts(cuts)
        small = model(ids).logits
        set_cuts(dict.fromkeys(cuts, DENSE))
        torch.testing.assert_close(model(ids).logits, dense)
        layer = sites[0].module(model)
        assert isinstance(layer, SlicedLinear)
        with pytest.raises(ValueError, match=r"1\.\."):
            layer.set_cut(Cut(33))
    assert not any(isinstance(m, SlicedLinear | LowRankLinear) for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for site in sites:
        rank = cuts[site.name].rank
        if rank is not None:
            factors = basis_of(site, model).truncate(rank, site.bias(model))
            substitute(model, site.name, factors, "two_factor", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, small, rtol=1e-4, atol=1e-4)
    assert (small - dense).abs().max() > 0.1


def test_the_model_is_whole_again_after_an_error(model: Any) -> None:
    sites = find_sites(model)

    def broken(site: Site) -> Any:
        if site is sites[5]:
            raise NotFiniteError("bad", where=site.name)
        return bases_of(model)(site)

    with pytest.raises(NotFiniteError), sliced(model, sites, broken, every_rank(sites), {}):
        pass
    assert not any(isinstance(m, SlicedLinear) for m in model.modules())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_objective_is_perplexity_and_divergence(model: Any, ids: torch.Tensor, direction: Any) -> None:
    sites = find_sites(model)
    settings = ObjectiveSettings(kl_weight=2.5, kl_direction=direction, predictions="head_inputs")
    cuts = some_cuts(sites)
    with (
        sliced(model, sites, bases_of(model), every_rank(sites), {}) as set_cuts,
        torch.no_grad(),
    ):
        dense = model(ids).logits[:, :-1].log_softmax(-1)
        objective = Objective(model, ids, settings, set_cuts, batch_size=4)
        value, ppl, kl = objective(cuts)
        small = model(ids).logits[:, :-1].log_softmax(-1)
        by_sample = objective.sample_perplexities(cuts)
        assert objective(dict.fromkeys(cuts, DENSE))[2] == pytest.approx(0, abs=1e-6)
    first, second = (small, dense) if direction == "compressed_original" else (dense, small)
    expected = functional.kl_div(second, first, log_target=True, reduction="none").sum(-1).mean()
    assert kl == pytest.approx(float(expected), rel=1e-4)
    nll = -small.gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert ppl == pytest.approx(math.exp(float(nll.mean())), rel=1e-5)
    assert value == pytest.approx(ppl + 2.5 * kl)
    torch.testing.assert_close(by_sample, nll.double().mean(1).exp(), rtol=1e-5, atol=1e-5)
    assert math.exp(objective.dense_nll) == pytest.approx(perplexity(model, ids).perplexity, rel=1e-5)
    assert objective.predictions_bytes == 6 * 23 * 32 * 4


@given(seed=st.integers(0, 9999), k=st.integers(1, 40), sharp=st.floats(0.1, 8))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_top_k_never_say_more_than_the_whole(direction: Any, seed: int, k: int, sharp: float) -> None:
    source = torch.Generator().manual_seed(seed)
    one, two = ((sharp * torch.randn(5, 40, generator=source, dtype=torch.float64)).log_softmax(-1) for _ in range(2))
    everything = slice(None)
    whole = HeadInputs(given_logits(one)).divergence(two.float(), everything, direction)
    # The same in pieces, as logits are made.
    kept = TopK(one.split(2), k)
    part = torch.cat([kept.divergence(two[piece], piece, direction) for piece in (slice(0, 3), slice(3, 5))])
    assert (part <= whole * (1 + 1e-4) + 1e-5).all()
    assert (part >= -1e-9).all()
    if sharp < 2:  # Beyond that what one token holds is lost in 1 minus the rest.
        torch.testing.assert_close(
            TopK([one], 39).divergence(two, everything, direction).float(), whole, rtol=1e-3, atol=1e-4
        )
    assert float(TopK([one], k).divergence(one, everything, direction).abs().max()) < 1e-9


@pytest.mark.parametrize("cut", [True, False])
def test_a_head_whose_logits_are_bent_is_measured_as_the_model_bends_them(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    if not cut:  # A model that keeps its decoder to itself.
        monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    settings = ObjectiveSettings(predictions="head_inputs" if cut else "top_k", k=128)

    def perturb(_cuts: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(0.5)

    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    objective = Objective(model, ids, settings, perturb)
    assert objective.predictions_form == ("head_inputs" if cut else "top_k")
    _, perplexity, kl = objective({})
    with torch.no_grad():
        after = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    assert kl == pytest.approx(float((after.exp() * (after - before)).sum(-1).mean()), rel=1e-3)
    loss = -after.gather(-1, ids[:, 1:, None]).mean()
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_what_the_top_k_miss_is_measured(model: Any, ids: torch.Tensor) -> None:
    sites = find_sites(model)
    settings = ObjectiveSettings(predictions="top_k", k=16)
    with sliced(model, sites, bases_of(model), every_rank(sites), {}) as set_cuts:
        objective = Objective(model, ids, settings, set_cuts)
        assert objective.kl_error is None
        objective(some_cuts(sites))
        assert objective.kl_error is not None
        assert 0 < objective.kl_error < 1
        plain = Objective(model, ids, ObjectiveSettings(kl_weight=0), set_cuts)
        value, ppl, kl = plain(some_cuts(sites))
        assert (value, kl, plain.predictions_bytes) == (ppl, 0.0, 0)


def test_a_destroyed_plan_is_not_finite_but_a_destroyed_original_is_an_error(model: Any, ids: torch.Tensor) -> None:
    objective = Objective(model, ids, ObjectiveSettings(), lambda _ranks: None)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert not math.isfinite(objective({})[0])
    with pytest.raises(NotFiniteError, match="original"):
        Objective(model, ids, ObjectiveSettings(), lambda _ranks: None)
