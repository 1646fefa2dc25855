"""A statistic is one class: added here, without a word in the package. Those asked for together do not disturb each
other, and share what they can."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_llama
from rankwise import compress
from rankwise.methods.afm import AFM
from rankwise.models import BlockRunner, Site, find_sites, share_inputs
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.statistics import (
    Collected,
    Labels,
    SiteStatistics,
    Statistic,
    Store,
    by_block,
    collect,
    passes,
    save_totals,
)
from rankwise.statistics.absolute_mean import AbsoluteMean
from rankwise.statistics.base import Place, Sums, Totals
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.groups import group_ends
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.mean import MeanStatistic
from rankwise.statistics.moment_sums import MomentSums
from rankwise.statistics.moments import Moments
from rankwise.statistics.pooled_covariance import PooledCovariance
from rankwise.statistics.row_fisher import RowFisher
from rankwise.statistics.streams import Stream, gradient_streams, input_streams, output_streams, smaller_streams

ALL = (Moments(), InputMoments(), PooledCovariance(), AbsoluteMean(), RowFisher(), Curvature())


@dataclass(frozen=True)
class PowerMean(MeanStatistic):
    """E|v|^p of every output, or of the loss gradient there."""

    name = "power_mean"

    power: float = 3.0
    labels: Labels | None = None
    groups: int | None = None

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return output_streams(sites) if self.labels is None else gradient_streams(sites)

    def measure(self, x: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        flat = x.reshape(-1, x.shape[-1]).float()
        return len(flat), flat.abs().pow(self.power).sum(0)


@dataclass(frozen=True)
class LargestTotals(Totals):
    """The largest of each."""

    largest: Tensor

    def merge(self, other: LargestTotals) -> LargestTotals:
        return LargestTotals(torch.maximum(self.largest, other.largest))


class LargestSums(Sums):
    def __init__(self, d: int, device: torch.device) -> None:
        self._largest: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self._largest is None

    def add(self, x: Tensor, inputs: Tensor) -> None:
        fresh = x.float().flatten(0, -2).amax(0)
        self._largest = fresh if self._largest is None else torch.maximum(self._largest, fresh)

    def take(self) -> LargestTotals:
        assert self._largest is not None
        taken, self._largest = LargestTotals(self._largest.cpu().double()), None
        return taken


@dataclass(frozen=True)
class Largest(Statistic[LargestTotals, Tensor]):
    """The largest value of every input: totals that are no sums."""

    name = "largest"
    totals = LargestTotals

    groups: int = 4

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return input_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> Any:
        return LargestSums

    def seen(self, totals: LargestTotals, place: Place) -> Tensor:
        return totals.largest


class Dies(Reporter):
    """Kills a pass after some batches."""

    def __init__(self, after: int) -> None:
        super().__init__(show=False)
        self._after = after

    def track(self, items: Any, description: str, total: int, done: int = 0) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self._after:
                raise KeyboardInterrupt
            yield item


@cache
def model_and_sites() -> tuple[Any, tuple[Site, ...], Tensor]:
    model = tiny_llama()
    tokens = torch.randint(0, 2048, (11, 9), generator=torch.Generator().manual_seed(5))
    return model, tuple(share_inputs(model, find_sites(model), tokens[:1])), tokens


def collected(*asked: Statistic, sequences: int = 11, **options: Any) -> Collected:
    model, sites, tokens = model_and_sites()
    return collect(model, sites, tokens[:sequences], asked, **{"batch_size": 3, **options})


def same(one: dict[str, Totals], other: dict[str, Totals]) -> bool:
    """Whether the totals of all streams are equal bit by bit."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[key].tensors()[name])
        for key, totals in one.items()
        for name, tensor in totals.tensors().items()
    )


def read_back(found: Collected, site: Site, folder: Path) -> SiteStatistics:
    """What a method sees at a site after everything went to disk."""
    model, sites, _ = model_and_sites()
    folders = {statistic: folder / str(place) for place, statistic in enumerate(found)}
    for statistic, by_stream in found.items():
        for key, totals in by_stream.items():
            save_totals(folders[statistic] / f"{key}.safetensors", totals)
    return SiteStatistics(site, site.weight(model).double(), None, Store(folders, sites))


def watched(site: Site, sequences: int, labels: Labels | None) -> Tensor:
    """Outputs, or loss gradients at the text's tokens, shape `[tokens, m]`, float64."""
    model, _, tokens = model_and_sites()
    seen: list[Tensor] = []

    def hook(_module: Any, _arguments: Any, output: Tensor) -> None:
        seen.append(output)
        if labels is not None:
            output.retain_grad()

    handle = site.module(model).register_forward_hook(hook)
    logits = model(input_ids=tokens[:sequences]).logits[:, :-1].flatten(0, 1)
    handle.remove()
    if labels is None:
        return seen[0].detach().flatten(0, 1).double()
    torch.nn.functional.cross_entropy(logits, tokens[:sequences, 1:].flatten(), reduction="sum").backward()
    model.zero_grad()
    assert seen[0].grad is not None
    return seen[0].grad.flatten(0, 1).double()


@given(
    sequences=st.integers(2, 11),
    batch_size=st.integers(1, 4),
    progress=st.floats(0, 1, exclude_max=True),
    power=st.sampled_from([1.0, 2.0, 3.5]),
    labels=st.sampled_from([None, "text"]),
    groups=st.sampled_from([None, 1, 3, 32]),
    index=st.integers(0, 13),
)
@example(sequences=11, batch_size=2, progress=0.6, power=3.5, labels="text", groups=None, index=4)
@example(sequences=11, batch_size=1, progress=0.6, power=3.5, labels=None, groups=3, index=6)
@examples(deadline=None, max_examples=25)
def test_a_statistic_of_one_class_is_collected_stored_read_and_resumed(
    sequences: int,
    batch_size: int,
    progress: float,
    power: float,
    labels: Labels | None,
    groups: int | None,
    index: int,
) -> None:
    asked = PowerMean(power, labels, groups)
    both = (asked, replace(asked, power=power + 1))
    site = model_and_sites()[1][index]
    killed_after = int(progress * -(-sequences // batch_size))
    whole = collected(*both, sequences=sequences, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_SNAPSHOT_SECONDS", 0.0)
        # Whole batches, whose sums must be those of `whole`, which went block by block.
        patch.setattr(BlockRunner, "alone", lambda _self: False)
        folder = Path(name)
        options = {"sequences": sequences, "batch_size": batch_size, "snapshot": folder / "snapshot"}
        with pytest.raises(KeyboardInterrupt):
            collected(*both, reporter=Dies(killed_after), **options)
        reporter = Reporter(show=False)
        resumed = collected(*both, reporter=reporter, **options)
        ends = range(sequences) if groups is None else group_ends(sequences, groups, 1)
        left = [batch * batch_size for batch in range(1, killed_after + 1) if batch * batch_size in ends]
        notes = [f"continuing after {left[-1]} of {sequences} sequences"] if left else []
        assert [note.partition(": ")[2] for note in reporter.notes] == [
            "the sums of all layers are in memory at once",
            *notes,
        ]
        assert all(same(whole[each], resumed[each]) for each in both)
        found = read_back(resumed, site, folder / "statistics").of(asked)
    expected = watched(site, sequences, labels).abs().pow(power).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_a_statistic_that_a_method_asks_for_becomes_a_stage_of_its_own(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(power: float) -> int:
        monkeypatch.setattr(AFM, "requests", lambda _self: (Moments(), PowerMean(power)))
        compress(recipe_from(settings(method="afm")), run_directory=tmp_path / "run")
        return len(list((tmp_path / "run").glob("statistics-power_mean-*")))

    assert [run(2.0), run(2.0), run(3.0)] == [1, 1, 2]
    assert len(list((tmp_path / "run").glob("statistics-moments-*"))) == 1


def test_totals_may_merge_by_something_else_than_addition(tmp_path: Path) -> None:
    site = next(site for site in model_and_sites()[1] if site.name.endswith("1.mlp.up_proj"))
    model, _, tokens = model_and_sites()
    seen: list[Tensor] = []
    handle = site.module(model).register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach()))
    found = read_back(collected(Largest()), site, tmp_path).of(Largest())
    seen.clear()
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    torch.testing.assert_close(found, seen[0].flatten(0, 1).amax(0).double(), atol=1e-6, rtol=1e-5)


def test_statistics_made_of_the_same_sums_are_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    every = Moments(groups=32), InputMoments(groups=32), PooledCovariance(groups=32)
    alone = {asked: collected(asked)[asked] for asked in every}
    adds: list[int] = []
    real = MomentSums.add
    monkeypatch.setattr(MomentSums, "add", lambda sums, x, inputs: (adds.append(len(x)), real(sums, x, inputs))[1])
    together = collected(*alone)
    sites = model_and_sites()[1]
    streams = {*smaller_streams(sites), *input_streams(sites)}
    assert sum(adds) == 11 * len(streams)
    assert all(same(alone[asked], together[asked]) for asked in alone)


def test_gradients_of_the_same_labels_share_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (Curvature(labels="text"), RowFisher(labels="text"), RowFisher(labels="sampled"), PowerMean(2.0, "text"))
    alone = {each: collected(each)[each] for each in asked}
    backward: list[Labels] = []
    real = by_block.backward
    monkeypatch.setattr(by_block, "backward", lambda *a: (backward.append(a[2]), real(*a))[1])
    together = collected(*asked)
    assert backward == ["sampled"] * 4 + ["text"] * 4
    assert all(same(alone[each], together[each]) for each in asked)


def test_one_statistic_with_two_settings_is_two_statistics() -> None:
    asked = (PooledCovariance(groups=3), PooledCovariance(groups=5), Moments(groups=2), Curvature(memory_gb=1e-4))
    together = collected(*asked, Curvature())
    for each in asked:
        assert same(together[each], collected(each)[each])
    assert not same(together[asked[0]], together[asked[1]])
    assert not same(together[asked[3]], together[Curvature()])


@pytest.mark.parametrize("statistic", [*ALL, PowerMean(), Largest()], ids=lambda each: each.name)
def test_every_setting_is_in_the_key(statistic: Statistic) -> None:
    assert {name for name in ("groups", "labels") if getattr(statistic, name) is not None} <= set(statistic.settings())
    assert hash(statistic) == hash(replace(statistic))
    for field in fields(statistic):
        value = getattr(statistic, field.name)
        other = replace(statistic, **{field.name: value + 1 if isinstance(value, int | float) else "another"})
        assert other != statistic
        assert other.settings() != statistic.settings()


def test_names_are_distinct_and_streams_serve_every_site_once() -> None:
    _, sites, _ = model_and_sites()
    assert len({statistic.name for statistic in ALL}) == len(ALL)
    for statistic in ALL:
        served = [name for stream in statistic.streams(sites) for name in stream.sites]
        assert sorted(served) == sorted(site.name for site in sites)


def test_what_was_not_requested_with_these_settings_is_not_given(tmp_path: Path) -> None:
    site = model_and_sites()[1][0]
    seen = read_back(collected(Curvature(labels="text")), site, tmp_path)
    with pytest.raises(KeyError, match=r"Curvature\(labels='sampled'.*was not collected"):
        seen.of(Curvature(labels="sampled"))
