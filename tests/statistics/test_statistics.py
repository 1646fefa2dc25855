"""Statistics: merging is addition, groups drop nothing, streams agree with watching every output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_llama
from rankwise.errors import NotFiniteError
from rankwise.models import BlockRunner, Site, find_sites, share_inputs
from rankwise.progress import Reporter
from rankwise.statistics import SiteStatistics, Statistic, Store, collect, labels, passes, save_totals
from rankwise.statistics.absolute_mean import AbsoluteMean
from rankwise.statistics.curvature import Curvature, CurvatureSums, block_size
from rankwise.statistics.groups import group_ends
from rankwise.statistics.moment_sums import MomentSums, MomentTotals
from rankwise.statistics.moments import Moments
from rankwise.statistics.pooled_covariance import PooledCovariance, PooledTotals
from rankwise.statistics.row_fisher import RowFisher, squared_rows


def samples(count: int, d: int, seed: int, offset: float = 0.0) -> Tensor:
    return torch.randn(count, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset


@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=5), seed=st.integers(0, 10**6), offset=st.floats(-50, 50)
)
@settings(deadline=None)
def test_merging_equals_collecting_together_in_any_order(counts: list[int], seed: int, offset: float) -> None:
    parts = [samples(count, 4, seed + i, offset * i) for i, count in enumerate(counts)]
    whole = MomentTotals.of(torch.cat(parts))
    moments = [MomentTotals.of(part) for part in parts]
    left = moments[0]
    for each in moments[1:]:
        left = left.merge(each)
    right = moments[-1]
    for each in reversed(moments[:-1]):
        right = each.merge(right)
    for merged in (left, right):
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(merged.scatter, whole.scatter, atol=1e-6, rtol=1e-9)


def test_welford_is_merging_one_vector_at_a_time() -> None:
    x = samples(30, 5, 0, 7.0)
    moments = MomentTotals.of(x[:1])
    for row in x[1:]:
        moments = moments.merge(MomentTotals.of(row[None]))
    torch.testing.assert_close(moments.covariance(), torch.cov(x.T))
    torch.testing.assert_close(moments.second_moment(), x.T @ x / 30)


def test_float32_sums_keep_the_covariance_of_inputs_with_a_large_mean() -> None:
    x = samples(4000, 6, 1, 3000.0)
    sums = MomentSums(6, torch.device("cpu"))
    for part in x.float().split(700):
        sums.add(part)
    torch.testing.assert_close(sums.take().covariance(), torch.cov(x.float().double().T), atol=2e-3, rtol=2e-3)
    assert sums.empty


@pytest.mark.parametrize("d", [1, 127, 300])
def test_float32_sums_give_both_halves_of_the_gram_matrix(d: int) -> None:
    x = samples(50, d, 2).float()
    sums = MomentSums(d, torch.device("cpu"))
    sums.add(x)
    found = sums.take()
    torch.testing.assert_close(found.scatter, MomentTotals.of(x).scatter, atol=1e-3, rtol=1e-4)
    assert torch.equal(found.scatter, found.scatter.T)


@given(sequences=st.integers(1, 200), groups=st.integers(1, 40))
def test_groups_are_equal_to_within_one_and_drop_no_sequence(sequences: int, groups: int) -> None:
    groups = min(groups, sequences)
    ends = group_ends(sequences, groups, 1)
    lengths = [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert sum(lengths) == sequences
    assert max(lengths) - min(lengths) <= 1


def test_squared_rows_equal_the_squared_weight_gradient() -> None:
    x, g = samples(3 * 5, 4, 2).view(3, 5, 4), samples(3 * 5, 6, 3).view(3, 5, 6)
    expected = sum((g[i].T @ x[i]).square().sum(1) for i in range(3))
    torch.testing.assert_close(squared_rows(x, g), expected)


@given(m=st.integers(1, 60), largest=st.integers(0, 80))
def test_block_sizes_divide(m: int, largest: int) -> None:
    size = block_size(m, largest)
    assert m % size == 0
    assert size <= max(1, largest)


def test_curvature_blocks_are_blocks_of_the_full_matrix() -> None:
    g = samples(50, 6, 4).float()
    full, parts = CurvatureSums(6, 6, torch.device("cpu")), CurvatureSums(6, 2, torch.device("cpu"))
    full.add(g)
    parts.add(g)
    whole, blocks = full.take().value()[0], parts.take().value()
    for i in range(3):
        torch.testing.assert_close(blocks[i], whole[2 * i : 2 * i + 2, 2 * i : 2 * i + 2])


class Setup:
    """A tiny model, its sites and random tokens."""

    def __init__(self, sequences: int = 11) -> None:
        self.model = tiny_llama()
        self.tokens = torch.randint(0, 2048, (sequences, 9), generator=torch.Generator().manual_seed(5))
        self.sites = share_inputs(self.model, find_sites(self.model), self.tokens[:1])

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name.endswith(name))

    def outputs(self, site: Site) -> Tensor:
        """What a hook on the site's output sees, shape [sequences, tokens, m], float64."""
        seen: list[Tensor] = []
        handle = site.module(self.model).register_forward_hook(lambda _m, _a, y: seen.append(y.detach().double()))
        with torch.no_grad():
            self.model(input_ids=self.tokens)
        handle.remove()
        return seen[0]

    def statistics(self, folder: Path, site: Site, *asked: Statistic, **options: Any) -> SiteStatistics:
        options = {"batch_size": 4, **options}
        collected = collect(self.model, self.sites, self.tokens, asked, **options)
        for statistic, by_stream in collected.items():
            for key, totals in by_stream.items():
                save_totals(folder / statistic.name / f"{key}.safetensors", totals)
        store = Store({statistic: folder / statistic.name for statistic in collected}, self.sites)
        weight = site.weight(self.model).double()
        return SiteStatistics(site, weight, site.bias(self.model), store)


@pytest.mark.parametrize("name", ["0.self_attn.q_proj", "1.self_attn.v_proj", "0.mlp.up_proj", "1.mlp.down_proj"])
def test_input_statistics_give_the_outputs_moments(name: str, tmp_path: Path) -> None:
    setup = Setup()
    site = setup.site(name)
    y = setup.outputs(site).flatten(0, 1)
    seen = setup.statistics(tmp_path, site, Moments()).of(Moments()).covariance()
    weight = site.weight(setup.model).double()
    measured = seen.outputs if seen.outputs is not None else seen.inputs.output_moment(weight)
    assert (seen.outputs is not None) == ("down" in name)
    torch.testing.assert_close(seen.mean_output, y.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(measured, torch.cov(y.T), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("groups", "batch_size"), [(4, 4), (4, 3), (3, 11), (11, 2)])
def test_pooled_covariance_averages_groups_that_hold_every_sequence(
    groups: int, batch_size: int, tmp_path: Path
) -> None:
    setup = Setup()
    site = setup.site("0.mlp.down_proj")
    y = setup.outputs(site)
    ends = group_ends(len(y), groups, 1)
    parts = [y[a:b].flatten(0, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    expected = sum(torch.cov(part.T) for part in parts) / groups
    asked = PooledCovariance(groups=groups)
    seen = setup.statistics(tmp_path, site, asked, batch_size=batch_size).of(asked)
    assert seen.outputs is not None
    torch.testing.assert_close(seen.outputs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.mean_output, sum(p.mean(0) for p in parts) / groups, atol=1e-5, rtol=1e-4)


def test_one_group_is_the_sample_covariance() -> None:
    moments = MomentTotals.of(samples(20, 3, 6))
    torch.testing.assert_close(PooledTotals.of_group(moments).covariance(), moments.covariance())


def test_fewer_sequences_than_groups_means_fewer_groups_and_is_said() -> None:
    setup = Setup(sequences=3)
    reporter = Reporter(show=False)
    asked = PooledCovariance()
    collected = collect(setup.model, setup.sites, setup.tokens, [asked], batch_size=8, reporter=reporter)
    assert {totals.groups for totals in collected[asked].values()} == {3}
    assert reporter.notes == ["3 calibration sequences make 3 pooling groups, not 32"]


def test_absolute_mean(tmp_path: Path) -> None:
    setup = Setup()
    site = setup.site("0.self_attn.o_proj")
    seen: list[Tensor] = []
    site.module(setup.model).register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach()))
    found = setup.statistics(tmp_path, site, AbsoluteMean(), batch_size=11).of(AbsoluteMean())
    torch.testing.assert_close(found, seen[-1].double().abs().mean((0, 1)), atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_the_text_loss(tmp_path: Path) -> None:
    """Curvature and row Fisher against autograd on the weights themselves."""
    setup = Setup(sequences=5)
    site = setup.site("1.mlp.gate_proj")
    curvature, fisher = Curvature(labels="text"), RowFisher(labels="text")
    found = setup.statistics(tmp_path, site, curvature, fisher, batch_size=2)
    weight = site.module(setup.model).weight.requires_grad_()
    rows, second = torch.zeros(site.m).double(), torch.zeros(site.m, site.m).double()
    for sequence in setup.tokens:
        kept: list[Tensor] = []
        handle = site.module(setup.model).register_forward_hook(
            lambda _m, _a, y, kept=kept: (y.retain_grad(), kept.append(y))[0]
        )
        logits = setup.model(input_ids=sequence[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
        handle.remove()
        g = kept[0].grad[0].double()
        second += g.T @ g
        rows += weight.grad.double().square().sum(1)
        weight.grad = None
    torch.testing.assert_close(found.of(curvature)[0], second / setup.tokens.numel(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(found.of(fisher), rows / len(setup.tokens), atol=1e-6, rtol=1e-3)


def gradients(setup: Setup, labels: Any, batch_size: int = 4, seed: int = 0) -> Tensor:
    """What a pass brings back to the outputs of a site, shape `[sequences, tokens, m]`."""
    seen: list[Tensor] = []
    layer = setup.site("1.mlp.gate_proj").module(setup.model)

    def watch(_module: Any, _arguments: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(seen.append)

    handle = layer.register_forward_hook(watch)
    asked = [Curvature(labels=labels)]
    collect(setup.model, setup.sites, setup.tokens, asked, batch_size=batch_size, seed=seed)
    handle.remove()
    return torch.cat(seen)


def test_sampled_labels_are_drawn_anew_for_every_seed_and_batch() -> None:
    setup = Setup(sequences=6)
    setup.tokens = setup.tokens[:1].repeat(6, 1)
    drawn = gradients(setup, "sampled")
    assert torch.equal(drawn, gradients(setup, "sampled"))
    assert not torch.allclose(drawn, gradients(setup, "sampled", seed=1))
    assert not torch.allclose(drawn, gradients(setup, "text"))
    # One sequence many times over: the text's labels are alike in every batch, drawn ones are not.
    by_one = [gradients(setup, labels, batch_size=1) for labels in ("text", "sampled")]
    assert [len({tuple(each.flatten().tolist()) for each in found}) for found in by_one] == [1, 6]


def test_sampled_labels_are_as_frequent_as_the_model_says() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    draws = labels._draws(4, 5000, seed=7, start=3)
    assert torch.equal(draws[5000:], labels._draws(3, 5000, seed=7, start=4))
    drawn = labels._drawn(logits.expand(20000, 4), draws)
    assert drawn.shape == (20000,)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 4
    frequent = drawn.flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(frequent, logits.softmax(0), atol=0.015, rtol=0)


def test_the_backward_pass_leaves_no_gradient_on_any_weight() -> None:
    setup = Setup()
    for parameter in setup.model.parameters():
        parameter.requires_grad_(True)
    collect(setup.model, setup.sites, setup.tokens, [Curvature(labels="sampled")], batch_size=4)
    assert all(parameter.grad is None for parameter in setup.model.parameters())
    assert all(parameter.requires_grad for parameter in setup.model.parameters())


def test_a_small_memory_limit_cuts_curvature_to_blocks_and_says_so() -> None:
    setup = Setup()
    reporter = Reporter(show=False)
    asked = Curvature(labels="text", memory_gb=1e-4)
    collected = collect(setup.model, setup.sites, setup.tokens, [asked], batch_size=4, reporter=reporter)
    total = sum(totals.blocks.numel() for totals in collected[asked].values())
    assert total * 12 <= 1e-4 * 1e9 < sum(site.m**2 for site in setup.sites) * 12
    assert "diagonal blocks" in reporter.notes[0]


def test_an_activation_that_is_not_finite_names_the_layer() -> None:
    setup = Setup()
    with torch.no_grad():
        setup.model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(NotFiniteError, match=r"layers\.1\.self_attn\.q_proj"):
        collect(setup.model, setup.sites, setup.tokens, [Moments()], batch_size=4)


@pytest.mark.parametrize("asked", [Curvature(groups=1), Curvature(labels="sampled"), RowFisher()], ids=repr)
def test_a_gradient_that_is_not_finite_names_the_layer(asked: Statistic) -> None:
    """The loss gradient of one token overflows at the output of the first block: its last layer is the first to see."""
    setup = Setup()
    calls: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        calls.append(1)
        scale = torch.ones_like(gradient)
        scale[0, 3, 5] = float("inf") if len(calls) == 1 else 1.0
        return gradient * scale

    block = setup.model.model.layers[0]

    def watch(_module: Any, _arguments: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(overflow)

    block.register_forward_hook(watch)
    with pytest.raises(NotFiniteError, match=r"(?s)loss gradients.*layers\.0\.mlp\.down_proj"):
        collect(setup.model, setup.sites, setup.tokens, [asked], batch_size=4)
    assert setup.model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(("harm", "again"), [("none", 3), ("half replaced", 3), ("a byte", 6), ("its end", 6)])
def test_a_pass_killed_between_snapshots_ends_with_the_same_bytes(
    harm: str, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that is not as it was written is said, and no batch of it is taken over."""
    monkeypatch.setattr(passes, "_SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(BlockRunner, "alone", lambda _self: False)
    setup = Setup(sequences=12)
    moments, curvature = asked = (Moments(groups=6), Curvature(groups=6, labels="sampled"))

    reporter = Reporter(show=False)

    def run(snapshot: Path | None) -> Any:
        options = {"batch_size": 2, "snapshot": snapshot, "reporter": reporter}
        return collect(setup.model, setup.sites, setup.tokens, asked, **options)

    whole = run(None)
    real, calls = passes.backward, []

    def dies(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(passes, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "snapshot")
    folder = tmp_path / "snapshot" / "sampled"
    if harm == "half replaced":
        folder.rename(folder.with_name("sampled.old"))
    elif harm == "a byte":
        file = next(folder.glob("0-curvature/*.safetensors"))
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "its end":
        (folder / "manifest.jsonl").write_bytes((folder / "manifest.jsonl").read_bytes()[:-9])
    resumed = run(tmp_path / "snapshot")
    assert len(calls) == 4 + again  # of six batches
    assert any("snapshot of the calibration pass was damaged" in note for note in reporter.notes) == (again == 6)
    for statistic, field in ((moments, "scatter"), (curvature, "blocks")):
        for key, totals in whole[statistic].items():
            found = resumed[statistic][key]
            assert totals.count == found.count
            assert torch.equal(getattr(totals, field), getattr(found, field))
