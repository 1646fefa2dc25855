"""Experts see what is routed to them: all of it is counted, and where it is little their peers stand in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from rankwise import compress
from rankwise.models import Site, find_sites, share_inputs, unfuse_experts
from rankwise.recipes import recipe_from
from rankwise.statistics import Collected, SiteStatistics, Statistic, Store, collect, passes, save_totals
from rankwise.statistics.absolute_mean import AbsoluteMean
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.moment_sums import MomentTotals
from rankwise.statistics.moments import Moments
from rankwise.statistics.pooled_covariance import PooledCovariance
from rankwise.statistics.pools import Reach, mixed
from rankwise.statistics.row_fisher import RowFisher

ALL = (Moments(), InputMoments(), PooledCovariance(), AbsoluteMean(), RowFisher(), Curvature())
EXPERTS = "model.layers.0.mlp.experts"


def model_of_few() -> Any:
    """A Mixtral of 5 experts, of which the first block gives the last one no token, and the one before it few.

    A score that is the mean of others is never above all of them.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=1, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[3] = gate[:3].mean(0) + 0.3 * gate[3]
    gate[4] = gate[:4].mean(0)
    return model


@cache
def routed() -> tuple[Any, list[Site], Tensor]:
    model = model_of_few()
    unfuse_experts(model)
    tokens = torch.randint(0, 2048, (11, 9), generator=torch.Generator().manual_seed(5))
    return model, share_inputs(model, find_sites(model), tokens[:1]), tokens


def watched() -> dict[str, Tensor]:
    """What every site reads, shape `[tokens, n]`, float64, by name; of an expert without a token, nothing."""
    model, sites, tokens = routed()
    seen: dict[str, Tensor] = {}

    def watch(site: Site) -> Any:
        def hook(_module: Any, given: Any) -> None:
            seen[site.name] = given[0].detach().flatten(0, -2).double()

        return site.module(model).register_forward_pre_hook(hook)

    handles = [watch(site) for site in sites]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen


def read_back(found: Collected, site: Site, folder: Path) -> tuple[SiteStatistics, Store]:
    model, sites, _ = routed()
    folders = {statistic: folder / str(place) for place, statistic in enumerate(found)}
    for statistic, by_stream in found.items():
        for key, totals in by_stream.items():
            save_totals(folders[statistic] / f"{key}.safetensors", totals)
    store = Store(folders, sites)
    return SiteStatistics(site, site.weight(model).double(), None, store), store


def expert(number: int, role: str = "up") -> Site:
    return next(site for site in routed()[1] if site.name == f"{EXPERTS}.{number}.{role}_proj")


def test_the_model_routes_as_the_tests_here_need_it() -> None:
    seen = watched()
    counts = [len(seen.get(f"{EXPERTS}.{number}.up_proj", ())) for number in range(5)]
    assert min(counts[:3]) >= 16
    assert 0 < counts[3] < 16
    assert counts[4] == 0
    assert sum(counts) == 99


@pytest.mark.parametrize(("batch_size", "groups"), [(1, 4), (2, 32), (3, 2), (11, 3)])
def test_no_routed_token_is_lost_where_groups_end(
    batch_size: int, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert may take tokens early in a group and none in the batch with which it ends."""
    model, sites, tokens = routed()
    seen = watched()
    monkeypatch.setattr(passes, "_SNAPSHOT_SECONDS", 0.0)
    for asked in (InputMoments(groups=groups), Curvature(groups=groups)):
        found = collect(model, sites, tokens, [asked], batch_size=batch_size, snapshot=tmp_path / asked.name)[asked]
        for site in sites:
            key = f"{site.group if asked.name == 'input_moments' else site.name}."
            count = next((totals.seen_vectors for name, totals in found.items() if name.startswith(key)), 0)
            assert count == len(seen.get(site.name, ())), (site.name, asked)


def by_hand(name: str, parts: list[Tensor]) -> Tensor:
    """A mean over what all of the parts hold."""
    x = torch.cat(parts)
    return x.T @ x / len(x) if name == "second moment" else x.abs().mean(0)


@pytest.mark.parametrize("asked", [Moments(), InputMoments(), AbsoluteMean()])
def test_an_expert_of_few_tokens_is_mixed_with_its_peers(asked: Statistic, tmp_path: Path) -> None:
    model, sites, tokens = routed()
    seen = watched()
    found = collect(model, sites, tokens, [asked], batch_size=3)
    what = "absolute mean" if asked.name == "absolute_mean" else "second moment"
    of_all = by_hand(what, [seen[f"{EXPERTS}.{number}.up_proj"] for number in range(4)])
    for number in range(5):
        own = seen.get(f"{EXPERTS}.{number}.up_proj")
        w = 0.0 if own is None else min(1.0, len(own) / 16)
        expected = (1 - w) * of_all + (0 if own is None else w * by_hand(what, [own]))
        statistics, _ = read_back(found, expert(number), tmp_path / str(number))
        given: Any = statistics.of(asked)
        if asked.name == "moments":
            given = given.second_moment().inputs.output_moment(torch.eye(16, dtype=torch.float64))
        elif asked.name == "input_moments":
            given = given.second_moment()
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)


def test_curvature_and_the_rows_of_a_fisher_matrix_are_mixed_alike(tmp_path: Path) -> None:
    model, sites, tokens = routed()
    asked = (Curvature(), RowFisher(), PooledCovariance())
    found = collect(model, sites, tokens, asked, batch_size=3)
    for statistic in asked[:2]:
        totals = {number: found[statistic].get(f"{EXPERTS}.{number}.up_proj.gradient") for number in range(5)}
        known: list[Any] = [each for each in totals.values() if each is not None]
        assert len(known) == 4
        pooled = known[0]
        for each in known[1:]:
            pooled = pooled.merge(each)
        few: Any = totals[3]
        w = few.seen_vectors / 24
        assert 0 < w < 1
        expected = w * few.value() + (1 - w) * pooled.value()
        given = [read_back(found, expert(n), tmp_path / f"{statistic.name}{n}")[0].of(statistic) for n in (3, 4)]
        torch.testing.assert_close(given[0], expected, atol=0, rtol=1e-9)
        torch.testing.assert_close(given[1], pooled.value(), atol=0, rtol=1e-9)
    for number in range(5):
        seen: Any = read_back(found, expert(number, "down"), tmp_path / f"p{number}")[0].of(PooledCovariance())
        moment = seen.outputs if seen.inputs is None else seen.inputs.output_moment(torch.eye(24, dtype=torch.float64))
        assert moment.isfinite().all()
        assert moment.diagonal().sum() > 0


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), d=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_mixing_is_a_mean_of_means_and_stops_where_enough_is_known(counts: list[int], d: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    parts = [3 + torch.randn(count, 3, generator=source, dtype=torch.float64) for count in counts]
    moments = [MomentTotals.of(part) for part in parts]
    pooled = moments[0]
    for each in moments[1:]:
        pooled = pooled.merge(each)
    w = min(1.0, counts[0] / d)
    found = mixed(moments[0], pooled, d)
    assert found.count == max(counts[0], d)
    torch.testing.assert_close(found.mean, w * parts[0].mean(0) + (1 - w) * torch.cat(parts).mean(0))
    second = [part.T @ part / len(part) for part in (parts[0], torch.cat(parts))]
    torch.testing.assert_close(found.second_moment(), w * second[0] + (1 - w) * second[1])
    torch.testing.assert_close(mixed(None, pooled, d).second_moment(), second[1])
    assert mixed(moments[0], pooled, counts[0]) is moments[0]


def test_how_much_of_the_text_comes_to_an_expert(tmp_path: Path) -> None:
    model, sites, tokens = routed()
    seen = watched()
    found = collect(model, sites, tokens, [Curvature(), Moments()], batch_size=3)
    _, store = read_back(found, expert(0), tmp_path)
    for number in range(5):
        for role, enough in (("gate", 16), ("up", 16), ("down", 24)):
            site = expert(number, role)
            assert store.reach(site) == Reach(len(seen.get(site.name, ())), enough, 99 / 5)
    assert store.reach(next(site for site in sites if site.role == "q")) is None
    assert [Reach(count, 16, 99 / 5).counted for count in (0, 3, 16, 40)] == [16, 16, 16, 40]
    assert Reach(3, 24, 99 / 5).counted == 99 / 5


@pytest.mark.parametrize("asked", [[InputMoments(), Curvature()], [Curvature(), InputMoments()]], ids=["last", "first"])
def test_what_comes_to_an_expert_is_told_by_all_tokens_where_gradients_are_of_some(
    asked: list[Statistic], tmp_path: Path
) -> None:
    model, sites, tokens = routed()
    seen = watched()
    found = collect(model, sites, tokens, asked, batch_size=3, gradient_sequences=4)
    _, store = read_back(found, expert(0), tmp_path)
    for number in range(5):
        site = expert(number)
        assert store.reach(site) == Reach(len(seen.get(site.name, ())), 16, 99 / 5)


def test_a_run_says_which_experts_saw_little_and_spends_less_on_them(tmp_path: Path) -> None:
    model_of_few().save_pretrained(tmp_path / "dense")
    # Expert 3 of the first block sees more than it has inputs, and a tenth of what the others see.
    save_file({"ids": torch.randint(0, 2048, (64, 32), generator=torch.Generator().manual_seed(1))}, tmp_path / "t")
    values = {
        "model": str(tmp_path / "dense"),
        "budget": {"keep": 0.5, "rank_multiple": 1, "storage": "two_factor"},
        "calibration": {"source": f"tokens:{tmp_path}/t", "sequences": 64},
    }
    made = compress(recipe_from({**values, "output": str(tmp_path / "small")}))
    notes = [note for note in made.report.notes if "calibration tokens" in note]
    assert notes == [
        "1 of 10 experts saw fewer calibration tokens than a weight of theirs has inputs, 1 of them none; what was "
        f"measured there is mixed with what all experts of their layer saw (tokens: {EXPERTS}.4 0)"
    ]
    kept = {
        number: sum(made.plan.site_bits(f"{EXPERTS}.{number}.{role}_proj") for role in ("gate", "up", "down"))
        for number in range(5)
    }
    assert max(kept[3], kept[4]) < min(kept[0], kept[1], kept[2])
