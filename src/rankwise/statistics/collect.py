"""The streamed passes over the calibration tokens. Memory does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import NotFiniteError
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.curvature import CurvatureSums, RowFisher, block_size, squared_rows
from rankwise.statistics.moments import AbsoluteMean, MomentSums, PooledMoments
from rankwise.statistics.needs import Need, Request
from rankwise.statistics.store import Record, Records, load_records, save_records
from rankwise.statistics.streams import Stream, input_streams, moment_streams, output_streams

_SNAPSHOT_SECONDS = 300.0
_BYTES_PER_CURVATURE_ENTRY = 12  # float32 on the device, float64 for the total


def group_ends(sequences: int, groups: int) -> list[int]:
    """Ends of `groups` contiguous groups, as equal as possible, that together hold every sequence."""
    return [(index + 1) * sequences // groups for index in range(groups)]


class _Collector:
    """Adds what hooks see to accumulators, and accumulators to records at the end of each group of sequences."""

    def __init__(self, records: Records, ends: Sequence[int]) -> None:
        self.records = records
        self._ends = ends
        self._segments: list[tuple[int, int, bool]] = []

    def begin(self, start: int, stop: int) -> None:
        """Split the batch of sequences `start..stop` where groups end."""
        cuts = sorted({start, stop, *(end for end in self._ends if start < end < stop)})
        self._segments = [(a - start, b - start, b in self._ends) for a, b in pairwise(cuts)]

    def segments(self, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Parts of a batch, each within one group, and whether the group ends there.

        Routed tokens (`[tokens, d]`) no longer know their sequence; they count to the batch's last group.
        """
        if x.ndim < 3:
            yield x, self._segments[-1][2]
            return
        for start, stop, ends in self._segments:
            yield x[start:stop], ends

    def group_ends_at(self, stop: int) -> bool:
        return stop in self._ends

    def merge(self, need: Need, key: str, record: Record) -> None:
        kept = self.records.setdefault(need, {})
        kept[key] = record if key not in kept else kept[key].merge(record)


def _require_finite(x: Tensor, name: str, what: str) -> None:
    if not torch.isfinite(x).all():
        raise NotFiniteError(
            f"{what} hold NaN or an infinity.",
            where=name,
            remedy="--set precision=float32 if the model overflows in half precision; else the checkpoint is damaged",
        )


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _watch_moments(
    model: nn.Module, stream: Stream, needs: set[Need], collector: _Collector, device: torch.device
) -> Any:
    sums = MomentSums(stream.d, device)

    def add(x: Tensor) -> None:
        for part, ends in collector.segments(x):
            if part.numel():
                sums.add(part.detach().reshape(-1, stream.d))
            if not ends or sums.empty:
                continue
            moments = sums.take()
            _require_finite(moments.scatter.diagonal(), stream.module, f"The {stream.side}s of this layer")
            for need in (Need.MOMENTS, Need.INPUT_MOMENTS):
                if need in needs:
                    collector.merge(need, stream.key, moments)
            if Need.POOLED_MOMENTS in needs:
                collector.merge(Need.POOLED_MOMENTS, stream.key, PooledMoments.of_group(moments))

    return _hook(model, stream, add)


def _watch_absolute(model: nn.Module, stream: Stream, collector: _Collector) -> Any:
    def add(x: Tensor) -> None:
        flat = x.detach().reshape(-1, stream.d)
        total = flat.abs().sum(0, dtype=torch.float32).cpu().double()
        _require_finite(total, stream.module, "The inputs of this layer")
        collector.merge(Need.ABSOLUTE_MEAN, stream.key, AbsoluteMean(len(flat), total))

    return _hook(model, stream, add)


def _hook(model: nn.Module, stream: Stream, add: Callable[[Tensor], None]) -> Any:
    module = model.get_submodule(stream.module)
    if stream.side == "input":
        return module.register_forward_pre_hook(lambda _m, arguments: add(arguments[0]))
    return module.register_forward_hook(lambda _m, _arguments, output: add(_first(output)))


def _watch_gradients(
    model: nn.Module, site: Site, needs: set[Need], block: int, collector: _Collector, device: torch.device
) -> Any:
    sums = CurvatureSums(site.m, block, device) if Need.CURVATURE in needs else None

    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        inputs = arguments[0].detach()

        def add(gradient: Tensor) -> None:
            _require_finite(gradient, site.name, "The loss gradients at this layer")
            if sums is not None:
                for part, ends in collector.segments(gradient):
                    if part.numel():
                        sums.add(part.reshape(-1, site.m))
                    if ends and not sums.empty:
                        collector.merge(Need.CURVATURE, f"{site.name}.output", sums.take())
            if Need.ROW_FISHER in needs:
                x, g = (t.float() if t.ndim == 3 else t.float()[None] for t in (inputs, gradient))
                record = RowFisher(len(x), squared_rows(x, g).cpu().double())
                collector.merge(Need.ROW_FISHER, f"{site.name}.output", record)

        _first(output).register_hook(add)

    return site.module(model).register_forward_hook(hook)


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _labels(logits: Tensor, tokens: Tensor, labels: str, seed: int) -> Tensor:
    """Targets for every position but the last, shape `[sequences, tokens - 1]`."""
    if labels == "text":
        return tokens[:, 1:]
    # Gumbel noise from a generator on the CPU: the same draw on every device.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device).clamp_min_(1e-20)
    return (logits.float() - (-noise.log()).log()).argmax(-1)


def _backward(model: nn.Module, tokens: Tensor, labels: str, seed: int) -> None:
    """Back-propagate the summed next-token loss to activations; no parameter gets a gradient."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = _labels(logits.detach(), tokens, labels, seed)
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").backward()


def _curvature_block(sites: Sequence[Site], request: Request, reporter: Reporter) -> int:
    """Largest diagonal block with which the curvature of all sites fits the memory granted."""
    largest = max(site.m for site in sites)
    block = largest
    while block > 1:
        entries = sum(site.m * block_size(site.m, block) for site in sites)
        if entries * _BYTES_PER_CURVATURE_ENTRY <= request.curvature_gb * 1e9:
            break
        block //= 2
    if block < largest:
        reporter.note(
            f"the full curvature does not fit {request.curvature_gb:g} GB: diagonal blocks of at most {block} outputs "
            "are kept (method.curvature_gb raises the limit)"
        )
    return block


def streams_of(need: Need, sites: Sequence[Site]) -> list[Stream]:
    """Where a statistic is watched."""
    if need in (Need.MOMENTS, Need.POOLED_MOMENTS):
        return moment_streams(sites)
    return input_streams(sites) if need in (Need.ABSOLUTE_MEAN, Need.INPUT_MOMENTS) else output_streams(sites)


def collect(
    model: Any,
    sites: Sequence[Site],
    tokens: Tensor,
    requests: Sequence[Request],
    *,
    batch_size: int,
    seed: int = 0,
    snapshot: Path | None = None,
    reporter: Reporter | None = None,
) -> Records:
    """Collect the union of what is requested: one forward pass, and one with a backward pass where gradients are asked.

    Args:
        model: causal language model, on its device.
        sites: sites whose statistics are collected, inputs shared as `share_inputs` found.
        tokens: calibration sequences, shape `[sequences, tokens]`.
        requests: what to collect.
        batch_size: sequences per batch. The last batch may be smaller; no sequence is dropped.
        seed: for sampled labels.
        snapshot: folder where long passes leave what they have, to continue from after a kill.
        reporter: told about progress and about anything the user should know.

    Returns:
        Need -> stream key -> record.

    Raises:
        NotFiniteError: naming the layer, when an activation or a gradient is not finite.
    """
    reporter = reporter or Reporter(show=False)
    groups = max(request.groups for request in requests)
    if len(tokens) < groups:
        if any(request.need is Need.POOLED_MOMENTS for request in requests):
            reporter.note(f"{len(tokens)} calibration sequences make {len(tokens)} pooling groups, not {groups}")
        groups = len(tokens)
    ends = group_ends(len(tokens), groups)
    device = next(model.parameters()).device
    records: Records = {}
    forward = {request.need for request in requests if not request.need.is_gradient}
    backward = [request for request in requests if request.need.is_gradient]
    was_training = model.training
    model.eval()
    try:
        if forward:
            collector = _Collector({}, ends)
            handles = []
            watched: dict[Stream, set[Need]] = {}
            for need in forward & {Need.MOMENTS, Need.POOLED_MOMENTS, Need.INPUT_MOMENTS}:
                for stream in streams_of(need, sites):
                    watched.setdefault(stream, set()).add(need)
            handles += [_watch_moments(model, s, needs, collector, device) for s, needs in watched.items()]
            if Need.ABSOLUTE_MEAN in forward:
                handles += [_watch_absolute(model, s, collector) for s in input_streams(sites)]

            def forward_only(batch: Tensor, _start: int) -> None:
                model.base_model(input_ids=batch, use_cache=False)

            with _removed(handles), torch.no_grad():
                _pass(collector, tokens, forward_only, device, batch_size, snapshot, "calibration", reporter)
            records.update(collector.records)
        if backward:
            collector = _Collector({}, ends)
            needs = {request.need for request in backward}
            block = _curvature_block(sites, backward[0], reporter)
            handles = [_watch_gradients(model, s, needs, block_size(s.m, block), collector, device) for s in sites]
            # Gradients start at the embeddings' output, so that they flow though no parameter takes one.
            embedding = model.get_input_embeddings()
            handles.append(embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_(True)))

            def with_backward(batch: Tensor, start: int) -> None:
                _backward(model, batch, backward[0].labels, seed * 1_000_003 + start)

            with _removed(handles), _frozen(model):
                _pass(
                    collector, tokens, with_backward, device, batch_size, snapshot, "calibration, gradients", reporter
                )
            records.update(collector.records)
    finally:
        model.train(was_training)
    return records


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _pass(
    collector: _Collector,
    tokens: Tensor,
    run: Callable[[Tensor, int], None],
    device: torch.device,
    batch_size: int,
    snapshot: Path | None,
    description: str,
    reporter: Reporter,
) -> None:
    """Run all batches, leaving a snapshot now and then at a point where no accumulator holds anything."""
    folder = snapshot / description.replace(", ", "-") if snapshot else None
    begin = 0
    if folder is not None and folder.exists():
        collector.records, begin = load_records(folder)
        reporter.note(f"{description}: continuing after {begin} of {len(tokens)} sequences")
    starts = range(begin, len(tokens), batch_size)
    saved = time.monotonic()
    total = -(-len(tokens) // batch_size)
    for start in reporter.track(starts, description, total=total, done=total - len(starts)):
        batch = tokens[start : start + batch_size]
        stop = start + len(batch)
        collector.begin(start, stop)
        run(batch.to(device), start)
        due = time.monotonic() - saved >= _SNAPSHOT_SECONDS
        if folder is not None and due and collector.group_ends_at(stop) and stop < len(tokens):
            save_records(folder, collector.records, stop)
            saved = time.monotonic()
