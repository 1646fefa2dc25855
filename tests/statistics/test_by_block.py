"""Sums taken block by block are those of whole batches, wherever hidden states lie and whatever is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig, Qwen3Config

from conftest import tiny_llama
from rankwise.models import BlockRunner, find_sites, share_inputs
from rankwise.progress import Reporter
from rankwise.statistics import Collected, Statistic, Totals, by_block, collect, collecting
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.moments import Moments
from rankwise.statistics.row_fisher import RowFisher

IDS = torch.randint(3, 100, (7, 12), generator=torch.Generator().manual_seed(2))

ASKED = (Moments(groups=3), Curvature(labels="sampled", groups=2), RowFisher(labels="text"))

SMALL = {"vocab_size": 100, "max_position_embeddings": 16}
FAMILIES = {
    "gpt2": lambda: GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=3, n_head=2),
    "opt": lambda: OPTConfig(
        **SMALL, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "mixtral": lambda: MixtralConfig(
        **SMALL, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    ),
    "qwen3": lambda: Qwen3Config(
        **SMALL, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    ),
}  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return tiny_llama() if family == "llama" else AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def same(one: Collected, other: Collected) -> bool:
    return one.keys() == other.keys() and all(
        by_stream.keys() == other[statistic].keys()
        and all(
            torch.equal(tensor, other[statistic][key].tensors()[name])
            for key, totals in by_stream.items()
            for name, tensor in totals.tensors().items()
        )
        for statistic, by_stream in one.items()
    )


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_the_sums_are_those_of_whole_batches(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    sites = share_inputs(model, find_sites(model), IDS[:1])
    options = {"batch_size": 3, "seed": 5}
    assert BlockRunner(model, IDS, 3, autocast=False).alone()
    found = collect(model, sites, IDS, ASKED, **options)
    in_files = collect(model, sites, IDS, ASKED, **options, hidden_gb=0.0, snapshot=tmp_path)
    monkeypatch.setattr(BlockRunner, "alone", lambda _self: False)
    assert same(collect(model, sites, IDS, ASKED, **options), found)
    assert same(in_files, found)
    assert not list(tmp_path.rglob("hidden-*"))


@pytest.mark.parametrize("batch_size", [3, 4])
def test_gradients_at_the_first_sequences_alone(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    sites = share_inputs(model, find_sites(model), IDS[:1])
    inputs, gradients = ASKED[:1], ASKED[1:]
    options = {"batch_size": batch_size, "seed": 5}
    apart = collect(model, sites, IDS, inputs, **options) | collect(model, sites, IDS[:4], gradients, **options)
    few = collect(model, sites, IDS, ASKED, **options, gradient_sequences=4)
    in_files = collect(model, sites, IDS, ASKED, **options, gradient_sequences=4, hidden_gb=0.0, snapshot=tmp_path)
    assert {totals.seen_vectors for totals in few[ASKED[1]].values()} == {4 * IDS.shape[1]}
    assert same(few, apart)
    assert same(in_files, apart)
    monkeypatch.setattr(BlockRunner, "alone", lambda _self: False)
    assert same(collect(model, sites, IDS, ASKED, **options, gradient_sequences=4), apart)
    assert same(
        collect(model, sites, IDS, ASKED, **options, gradient_sequences=99),
        collect(model, sites, IDS, ASKED, **options),
    )


def test_gradients_alone_run_no_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    sites = share_inputs(model, find_sites(model), IDS[:1])
    run: list[int] = []
    real = by_block._forward
    monkeypatch.setattr(by_block, "_forward", lambda *given: run.append(len(given[2])) or real(*given))
    collect(model, sites, IDS, ASKED[2:], batch_size=3, gradient_sequences=3)
    assert run == [3] * len(model.model.layers)


class _Remembers(nn.Module):
    """Adds what the first block read: hidden states are not all that this block needs."""

    def __init__(self, block: nn.Module, first: list[Tensor]) -> None:
        super().__init__()
        self.block, self._first = block, first

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        self._first.append(hidden)
        return self.block(hidden, *others, **named) + self._first[-2 if len(self._first) > 1 else -1]


def test_blocks_that_exchange_more_than_hidden_states_are_run_whole() -> None:
    model = tiny_llama()
    first: list[Tensor] = []
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = _Remembers(block, first)
    assert not BlockRunner(model, IDS, 3, autocast=False).alone()
    shared = tiny_llama()
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    assert not BlockRunner(shared, IDS, 3, autocast=False).alone()


def test_a_model_without_a_list_of_blocks_is_run_whole() -> None:
    model = tiny_llama()
    only = model.model.layers[0]
    del model.model.layers
    model.model.add_module("layers", only)
    assert not BlockRunner(model, IDS, 3, autocast=False).alone()


def finished(found: Iterator[tuple[Statistic, str, Totals]], kept: Collected, most: int) -> None:
    """Keep what comes, and die after so many."""
    for number, (statistic, key, totals) in enumerate(found):
        if number == most:
            raise KeyboardInterrupt
        kept[statistic][key] = totals


@pytest.mark.parametrize("most", [0, 1, 5, 9, 10, 14, 17, 20])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_walk_that_is_killed_goes_on_with_the_same_bytes(
    most: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_block, "_SNAPSHOT_SECONDS", seconds)
    model = tiny_llama()
    sites = share_inputs(model, find_sites(model), IDS[:1])
    whole = collect(model, sites, IDS, ASKED, batch_size=3)
    kept: Collected = {statistic: {} for statistic in ASKED}

    def walk(dies_after: int, reporter: Reporter) -> None:
        known: Callable[[Statistic, str], bool] = lambda statistic, key: key in kept[statistic]  # noqa: E731
        found = collecting(model, sites, IDS, ASKED, batch_size=3, snapshot=tmp_path, known=known, reporter=reporter)
        finished(found, kept, dies_after)

    with pytest.raises(KeyboardInterrupt):
        walk(most, Reporter(show=False))
    before = sum(len(by_stream) for by_stream in kept.values())
    reporter = Reporter(show=False)
    walk(10**6, reporter)
    assert before == most
    assert same(kept, whole)


@pytest.mark.parametrize("harm", ["none", "a byte", "a total that is gone"])
def test_what_was_left_on_the_way_down_is_gone_on_with(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_block, "_SNAPSHOT_SECONDS", 0.0)
    model = tiny_llama()
    sites = share_inputs(model, find_sites(model), IDS[:1])
    asked = [Curvature(labels="sampled")]
    whole = collect(model, sites, IDS, asked, batch_size=3)
    kept: Collected = {statistic: {} for statistic in asked}
    blocks = len(model.model.layers)
    by_key = len(sites) // blocks

    def walk(most: int, reporter: Reporter) -> None:
        found = collecting(
            model, sites, IDS, asked, batch_size=3, snapshot=tmp_path, reporter=reporter,
            known=lambda statistic, key: key in kept[statistic],
        )  # fmt: skip
        finished(found, kept, most)

    with pytest.raises(KeyboardInterrupt):
        walk(by_key * (blocks - 1), Reporter(show=False))
    file = tmp_path / "down-sampled" / "gradient.safetensors"
    if harm == "a byte":
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif harm == "a total that is gone":
        kept[asked[0]].pop(f"{sites[-1].name}.gradient")
    tops: list[int] = []
    real = by_block.ByBlock._at_the_top
    monkeypatch.setattr(by_block.ByBlock, "_at_the_top", lambda *a: (tops.append(1), real(*a))[1])
    reporter = Reporter(show=False)
    walk(10**6, reporter)
    assert len(tops) == (harm != "none")
    assert any("going on at block 0" in note for note in reporter.notes) == (harm == "none")
    assert any("was damaged" in note for note in reporter.notes) == (harm == "a byte")
    assert same(kept, whole)
