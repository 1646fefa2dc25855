"""The streamed passes over the calibration tokens. Memory does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.models import BlockRunner, Head, Site, decoder_blocks, recomputed
from rankwise.progress import Reporter
from rankwise.statistics.base import Collected, Labels, Statistic, Totals
from rankwise.statistics.by_block import ByBlock
from rankwise.statistics.labels import backward, gradients
from rankwise.statistics.store import load_snapshot, save_snapshot
from rankwise.statistics.watch import CPU, Collector

_SNAPSHOT_SECONDS = 300.0

RECOMPUTE_BEYOND = 2**30
"""Bytes of inputs and outputs of all sites in one batch from which on blocks keep their inputs alone."""

HIDDEN_GB = 1.0
"""Hidden states between blocks that are kept in memory, in 10^9 bytes; what is more goes to files."""

Step = Callable[[Tensor, int], None]
"""Runs one batch, given the number of its first sequence."""

Finished = Iterator[tuple[Statistic, str, Totals]]
"""Statistic, key of a stream, its totals."""


def collect(
    model: Any, sites: Sequence[Site], tokens: Tensor, statistics: Sequence[Statistic], **how: Any
) -> Collected:
    """What `collecting` gives, all of it in memory.

    Returns:
        Statistic -> stream key -> totals.
    """
    collected: Collected = {statistic: {} for statistic in statistics}
    for statistic, key, totals in collecting(model, sites, tokens, statistics, **how):
        collected[statistic][key] = totals
    return collected


def collecting(
    model: Any,
    sites: Sequence[Site],
    tokens: Tensor,
    statistics: Sequence[Statistic],
    *,
    batch_size: int,
    seed: int = 0,
    snapshot: Path | None = None,
    hidden_gb: float = HIDDEN_GB,
    known: Callable[[Statistic, str], bool] = lambda _statistic, _key: False,
    reporter: Reporter | None = None,
    first: int = 0,
    of: int | None = None,
    gradient_sequences: int | None = None,
) -> Finished:
    """Collect what is asked for: one forward pass, and a pass with gradients for each kind of labels asked for.

    Block by block where the model's blocks can be run by themselves: then only one block's sums are in memory, and
    hidden states between blocks are kept. Else batch by batch through the whole model. Both give the same sums.

    Args:
        model: causal language model, on its device.
        sites: sites whose statistics are collected, inputs shared as `share_inputs` found.
        tokens: calibration sequences, shape `[sequences, tokens]`.
        statistics: what to collect.
        batch_size: sequences per batch. The last batch may be smaller; no sequence is dropped.
        seed: for sampled labels.
        snapshot: folder where long passes leave what they have, to continue from after a kill.
        hidden_gb: hidden states between blocks that may stay in memory; more goes to files beside the snapshot.
        known: whether the totals of a statistic at a stream, by its key, are there already and not to be made.
        reporter: told about progress and about anything the user should know.
        first: number of the first of these sequences among all that are measured, where this is a shard of them.
        of: how many those are; None for no more than these.
        gradient_sequences: of all that are measured, how many gradients are taken at: the first; None for all.

    Yields:
        Statistic, stream key, totals, as soon as they are complete.

    Raises:
        NotFiniteError: naming the layer, when an activation or a gradient is not finite.
    """
    reporter = reporter or Reporter(show=False)
    passes: dict[Labels | None, list[Statistic]] = {}
    for statistic in sorted(dict.fromkeys(statistics), key=lambda each: each.labels or ""):
        passes.setdefault(statistic.labels, []).append(statistic)
    of = len(tokens) if of is None else of
    gradient_sequences = of if gradient_sequences is None else min(gradient_sequences, of)
    # Of the sequences that are here.
    own = max(0, min(len(tokens), gradient_sequences - first))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        runner = BlockRunner(model, tokens, batch_size, autocast=False)
        by_block = runner.alone()
        if not by_block and len({site.block for site in sites}) > 1:
            reporter.note("its blocks do not run by themselves: the sums of all layers are in memory at once")
        # A device that holds the sums of one block has room for their totals; of all blocks it may not.
        keeping = device if by_block else CPU
        collectors = {
            labels: Collector(
                wanted,
                sites,
                of if labels is None else gradient_sequences,
                tokens.shape[1],
                device,
                keeping,
                reporter,
            )
            for labels, wanted in passes.items()
        }
        if by_block:
            walk = ByBlock(runner, sites, snapshot, hidden_gb, known, reporter, first, own)
            yield from walk.collecting(collectors, seed)
            return
        for labels, collector in collectors.items():
            left = collector.unknown(collector.streams, known)
            read = tokens if labels is None else tokens[:own]
            if not left or not len(read):
                continue
            description = "calibration" if labels is None else f"calibration, gradients at {labels} labels"
            folder = snapshot / (labels or "forward") if snapshot else None
            step = _step(model, labels, seed, read, first)
            saved = labels is not None and 4 * batch_size * tokens.shape[1] * _numbers_a_token(sites) > RECOMPUTE_BEYOND
            blocks = list(decoder_blocks(model)[1]) if saved else []
            with collector.watching(model, left), gradients(model, labels is not None), recomputed(blocks):
                _run_batches(step, collector, read, batch_size, folder, description, reporter, first)
            for stream in left:
                yield from collector.take(stream)
    finally:
        model.train(was_training)


def _numbers_a_token(sites: Sequence[Site]) -> int:
    return sum(site.m + site.n for site in sites)


def _step(model: Any, labels: Labels | None, seed: int, tokens: Tensor, first: int) -> Step:
    """What is done with each batch of a pass."""
    if labels is None:
        return lambda batch, start: model.base_model(input_ids=batch, use_cache=False)
    head = Head(model, tokens)
    return lambda batch, start: backward(head(batch), batch, labels, seed, first + start)


def _run_batches(
    step: Step,
    collector: Collector,
    tokens: Tensor,
    batch_size: int,
    folder: Path | None,
    description: str,
    reporter: Reporter,
    first: int,
) -> None:
    """Do every batch of a pass, leaving a snapshot in `folder` now and then, at a point where no sums hold anything."""
    begin = 0
    if folder is not None:
        found, begin = load_snapshot(folder, list(collector.kept), reporter)
        collector.kept.update(found)
        if begin:
            reporter.note(f"{description}: continuing after {begin} of {len(tokens)} sequences", passing=True)
    starts = range(begin, len(tokens), batch_size)
    saved = time.monotonic()
    total = -(-len(tokens) // batch_size)
    for start in reporter.track(starts, description, total=total, done=total - len(starts)):
        batch = tokens[start : start + batch_size]
        stop = start + len(batch)
        collector.begin(first + start, first + stop)
        step(batch.to(collector.device), start)
        collector.end()
        due = time.monotonic() - saved >= _SNAPSHOT_SECONDS
        if folder is not None and due and collector.sums_are_empty_after(first + stop) and stop < len(tokens):
            save_snapshot(folder, collector.kept, stop)
            saved = time.monotonic()
