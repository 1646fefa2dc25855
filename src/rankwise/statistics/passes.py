"""The streamed passes over the calibration tokens. Memory does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Collected, Labels, Statistic
from rankwise.statistics.store import load_snapshot, save_snapshot
from rankwise.statistics.watch import Collector

_SNAPSHOT_SECONDS = 300.0

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
            with collector.watching(model), _gradients(model, labels is not None):
                _run_batches(_step(model, labels, seed), collector, tokens, batch_size, folder, description, reporter)
            collected.update(collector.kept)
    finally:
        model.train(was_training)
    return collected


def _step(model: Any, labels: Labels | None, seed: int) -> Step:
    """What is done with each batch of a pass."""

    def step(batch: Tensor, start: int) -> None:
        if labels is None:
            model.base_model(input_ids=batch, use_cache=False)
        else:
            _backward(model, batch, labels, seed * 1_000_003 + start)

    return step


def _backward(model: Any, tokens: Tensor, labels: Labels, seed: int) -> None:
    """Back-propagate the summed next-token loss to activations; no parameter gets a gradient."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = _targets(logits.detach(), tokens, labels, seed)
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").backward()


def _targets(logits: Tensor, tokens: Tensor, labels: Labels, seed: int) -> Tensor:
    """Targets for every position but the last, shape `[sequences, tokens - 1]`."""
    if labels == "text":
        return tokens[:, 1:]
    # Gumbel noise from a generator on the CPU: the same draw on every device.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device).clamp_min_(1e-20)
    return (logits.float() - (-noise.log()).log()).argmax(-1)


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
        due = time.monotonic() - saved >= _SNAPSHOT_SECONDS
        if folder is not None and due and collector.sums_are_empty_after(stop) and stop < len(tokens):
            save_snapshot(folder, collector.kept, stop)
            saved = time.monotonic()
