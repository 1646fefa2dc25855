"""Hooks that hand what streams carry to sums, and sums to totals where groups of sequences end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import NotFiniteError
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Collected, StartSums, Statistic, Sums, Totals
from rankwise.statistics.groups import Grouping
from rankwise.statistics.streams import Stream

CPU = torch.device("cpu")


class _Watch:
    """The sums of one stream in groups of one kind, and the statistics made of them."""

    def __init__(
        self,
        stream: Stream,
        grouping: Grouping,
        sums: Sums,
        statistics: Sequence[Statistic],
        keeping: torch.device,
    ) -> None:
        self.stream = stream
        self._grouping, self._sums, self._statistics = grouping, sums, statistics
        self._keeping = keeping

    def add(self, x: Tensor, inputs: Tensor, kept: Collected) -> None:
        """Add what was seen of a batch, and to `kept` what the groups give that end in it."""
        for part, part_inputs, ends in self._grouping.parts(x, inputs):
            self._sums.add(part, part_inputs)
            if ends:
                self._take(kept)

    def end(self, kept: Collected) -> None:
        """A batch is over: where a group ended in it, add to `kept` what an expert saw that took none of its tokens."""
        if self._grouping.ended:
            self._take(kept)

    def _take(self, kept: Collected) -> None:
        if self._sums.empty:
            return
        # What one statistic alone is made of, as it was summed, is held by nothing else.
        (only, *others), key = self._statistics, self.stream.key
        if not others and key in kept[only] and type(only).totals_of is Statistic.totals_of:
            added = self._sums.add_to(kept[only][key])
            if added is not None:
                self._check_finite(added)
                kept[only][key] = added
                return
        taken = self._sums.take()
        self._check_finite(taken)
        for statistic in self._statistics:
            totals, by_stream = statistic.totals_of(taken).to(self._keeping), kept[statistic]
            before = by_stream.get(key)
            by_stream[key] = totals if before is None else before.merge(totals)

    def _check_finite(self, totals: Totals) -> None:
        if not totals.is_finite():
            raise NotFiniteError(
                f"{self.stream.vectors} hold NaN or an infinity.",
                where=self.stream.module,
                remedy="--set precision=float32 if the model overflows in half precision; "
                "else the checkpoint is damaged",
            )


class Collector:
    """What one pass collects. Statistics that sum a stream alike share its sums.

    Args:
        statistics: what is collected.
        sites: at which sites.
        sequences: calibration sequences there are.
        length: tokens of each.
        device: where the model is.
        keeping: where totals are kept until they are complete.
        reporter: told what the user should know.
    """

    def __init__(
        self,
        statistics: Sequence[Statistic],
        sites: Sequence[Site],
        sequences: int,
        length: int,
        device: torch.device,
        keeping: torch.device,
        reporter: Reporter,
    ) -> None:
        self.device, self._keeping = device, keeping
        self.kept: Collected = {statistic: {} for statistic in statistics}
        self._groupings = {s.groups: Grouping(sequences, s.groups, length) for s in statistics}
        self._alike: dict[tuple[Stream, int | None, StartSums], list[Statistic]] = {}
        for statistic in statistics:
            streams = statistic.streams(sites)
            start = statistic.sums(streams, sequences, reporter)
            for stream in streams:
                self._alike.setdefault((stream, statistic.groups, start), []).append(statistic)
        self._watches: dict[Stream, list[_Watch]] = {}
        # What an expert lacks it has from its peers.
        self._widths = {site.name: site.n for site in sites if not site.pool}

    @property
    def streams(self) -> list[Stream]:
        """All that is watched."""
        return list(dict.fromkeys(stream for stream, _, _ in self._alike))

    def serving(self, stream: Stream) -> list[Statistic]:
        """The statistics made of a stream."""
        return [each for (watched, _, _), members in self._alike.items() if watched == stream for each in members]

    def unknown(self, streams: Sequence[Stream], known: Callable[[Statistic, str], bool]) -> list[Stream]:
        """Those of some streams of which not every statistic is there already."""
        return [s for s in streams if not all(known(statistic, s.key) for statistic in self.serving(s))]

    def take(self, stream: Stream) -> Iterator[tuple[Statistic, str, Totals]]:
        """What was kept of a stream, and no longer is: statistic, key of the stream, totals on the CPU.

        A site that no gradient came to, such as one that a model runs without gradients, has those of zeros.
        """
        for statistic in self.serving(stream):
            if stream.side == "gradient" and stream.key not in self.kept[statistic] and stream.module in self._widths:
                self.kept[statistic][stream.key] = self._of_zeros(stream, statistic)
            if stream.key in self.kept[statistic]:
                yield statistic, stream.key, self.kept[statistic].pop(stream.key).to(CPU)

    def _of_zeros(self, stream: Stream, statistic: Statistic) -> Totals:
        start = next(start for (each, _, start), of in self._alike.items() if each == stream and statistic in of)
        sums = start(stream.d, self.device)
        nothing = torch.zeros(1, 1, stream.d, device=self.device)
        sums.add(nothing, nothing.new_zeros(1, 1, self._widths[stream.module]))
        return statistic.totals_of(sums.take()).to(CPU)

    def begin(self, start: int, stop: int) -> None:
        """A batch of the sequences `start..stop` comes next."""
        for grouping in self._groupings.values():
            grouping.begin(start, stop)

    def end(self) -> None:
        """The batch that began last is over: all hooks have run."""
        for watches in self._watches.values():
            for watch in watches:
                watch.end(self.kept)

    def sums_are_empty_after(self, stop: int) -> bool:
        """Whether all groups that have begun end after `stop` sequences, so that `kept` is all there is."""
        return all(grouping.ends_at(stop) for grouping in self._groupings.values())

    @contextmanager
    def watching(self, model: nn.Module, streams: Sequence[Stream]) -> Iterator[None]:
        """Watch these streams of the model inside the block; there is memory for their sums as long."""
        for (stream, groups, start), members in self._alike.items():
            if stream in streams:
                sums = start(stream.d, self.device)
                watch = _Watch(stream, self._groupings[groups], sums, members, self._keeping)
                self._watches.setdefault(stream, []).append(watch)
        handles = [self._hook(model, stream) for stream in self._watches]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._watches.clear()

    def _hook(self, model: nn.Module, stream: Stream) -> Any:
        module = model.get_submodule(stream.module)

        def add(x: Tensor, inputs: Tensor) -> None:
            for watch in self._watches[stream]:
                watch.add(x.detach(), inputs.detach(), self.kept)

        def watch_gradient(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            # Blocks that are made again in the backward pass run without gradients first.
            if _first(output).requires_grad:
                inputs = arguments[0].detach()
                _first(output).register_hook(lambda gradient: add(gradient, inputs))

        if stream.side == "input":
            return module.register_forward_pre_hook(lambda _m, arguments: add(arguments[0], arguments[0]))
        if stream.side == "output":
            return module.register_forward_hook(lambda _m, arguments, output: add(_first(output), arguments[0]))
        return module.register_forward_hook(watch_gradient)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
