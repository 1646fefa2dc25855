"""The streamed passes over the calibration tokens. Memory does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.models import Head, Logits, Site, decoder_blocks, recomputed
from rankwise.progress import Reporter
from rankwise.statistics.base import Collected, Labels, Statistic
from rankwise.statistics.store import load_snapshot, save_snapshot
from rankwise.statistics.watch import Collector

_SNAPSHOT_SECONDS = 300.0

RECOMPUTE_BEYOND = 2**30
"""Bytes of inputs and outputs of all sites in one batch from which on blocks keep their inputs alone."""

Step = Callable[[Tensor, int], None]
"""Runs one batch, given the number of its first sequence."""


def collect(
    model: Any,
    sites: Sequence[Site],
    tokens: Tensor,
    statistics: Sequence[Statistic],
    *,
    batch_size: int,
    seed: int = 0,
    snapshot: Path | None = None,
    reporter: Reporter | None = None,
) -> Collected:
    """Collect what is asked for: one forward pass, and a pass with gradients for each kind of labels asked for.

    Args:
        model: causal language model, on its device.
        sites: sites whose statistics are collected, inputs shared as `share_inputs` found.
        tokens: calibration sequences, shape `[sequences, tokens]`.
        statistics: what to collect.
        batch_size: sequences per batch. The last batch may be smaller; no sequence is dropped.
        seed: for sampled labels.
        snapshot: folder where long passes leave what they have, to continue from after a kill.
        reporter: told about progress and about anything the user should know.

    Returns:
        Statistic -> stream key -> totals.

    Raises:
        NotFiniteError: naming the layer, when an activation or a gradient is not finite.
    """
    reporter = reporter or Reporter(show=False)
    passes: dict[Labels | None, list[Statistic]] = {}
    for statistic in sorted(dict.fromkeys(statistics), key=lambda each: each.labels or ""):
        passes.setdefault(statistic.labels, []).append(statistic)
    device = next(model.parameters()).device
    collected: Collected = {}
    was_training = model.training
    model.eval()
    try:
        for labels, wanted in passes.items():
            collector = Collector(wanted, sites, len(tokens), device, reporter)
            description = "calibration" if labels is None else f"calibration, gradients at {labels} labels"
            folder = snapshot / (labels or "forward") if snapshot else None
            step = _step(model, labels, seed, tokens)
            saved = labels is not None and 4 * batch_size * tokens.shape[1] * _numbers_a_token(sites) > RECOMPUTE_BEYOND
            blocks = list(decoder_blocks(model)[1]) if saved else []
            with collector.watching(model), _gradients(model, labels is not None), recomputed(blocks):
                _run_batches(step, collector, tokens, batch_size, folder, description, reporter)
            collected.update(collector.kept)
    finally:
        model.train(was_training)
    return collected


def _numbers_a_token(sites: Sequence[Site]) -> int:
    return sum(site.m + site.n for site in sites)


def _step(model: Any, labels: Labels | None, seed: int, tokens: Tensor) -> Step:
    """What is done with each batch of a pass."""
    if labels is None:
        return lambda batch, start: model.base_model(input_ids=batch, use_cache=False)
    head = Head(model, tokens)
    return lambda batch, start: _backward(head(batch), batch, labels, seed, start)


def _backward(logits: Logits, tokens: Tensor, labels: Labels, seed: int, start: int) -> None:
    """Back-propagate the summed next-token loss to activations; no parameter gets a gradient."""
    targets = tokens[:, 1:].flatten()
    draws = None if labels == "text" else _draws(len(tokens), tokens.shape[1] - 1, seed, start).to(tokens.device)

    def loss(raw: Tensor, part: slice) -> Tensor:
        raw = raw.float()
        chosen = targets[part] if draws is None else _drawn(raw.detach(), draws[part])
        return torch.nn.functional.cross_entropy(raw, chosen, reduction="sum")

    logits.predicting().sum(loss).backward()


def _draws(sequences: int, tokens: int, seed: int, start: int) -> Tensor:
    """A number from [0, 1) for every token, shape `[sequences tokens]`: the same wherever its sequence is run."""
    numbers = [torch.Generator().manual_seed(seed * 1_000_003 + start + each) for each in range(sequences)]
    return torch.cat([torch.rand(tokens, generator=generator, dtype=torch.float64) for generator in numbers])


def _drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens drawn from the model, shape `[tokens]`: where the distribution's sum passes each number of `draws`."""
    sums = logits.softmax(-1).double().cumsum(-1)
    wanted = draws[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1)


@contextmanager
def _gradients(model: Any, wanted: bool) -> Iterator[None]:
    """Inside the block gradients flow to activations, or not at all; no parameter takes one."""
    if not wanted:
        with torch.no_grad():
            yield
        return
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    # Gradients start at the embeddings' output, so that they flow though no parameter takes one.
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _run_batches(
    step: Step,
    collector: Collector,
    tokens: Tensor,
    batch_size: int,
    folder: Path | None,
    description: str,
    reporter: Reporter,
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
        collector.begin(start, stop)
        step(batch.to(collector.device), start)
        collector.end()
        due = time.monotonic() - saved >= _SNAPSHOT_SECONDS
        if folder is not None and due and collector.sums_are_empty_after(stop) and stop < len(tokens):
            save_snapshot(folder, collector.kept, stop)
            saved = time.monotonic()
