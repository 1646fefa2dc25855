"""Statistics block by block: hidden states go up through all batches of one block before the next, gradients down.

Only one block's sums are held at a time. What lies between blocks is kept for the way down, in memory or in files; the
way down runs a block again, with gradients, from what it read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.models import BlockRunner, Head, Site, allocate
from rankwise.progress import Reporter, give_back_memory
from rankwise.runs import Folder
from rankwise.statistics.base import Labels, Statistic, Totals
from rankwise.statistics.labels import backward, gradients
from rankwise.statistics.streams import Stream
from rankwise.statistics.watch import Collector

_SNAPSHOT_SECONDS = 300.0

_HIDDEN = "hidden"
"""Folder of what lies between blocks."""


@dataclass
class ByBlock:
    """A walk up and down the blocks of a model.

    Args:
        runner: runs its blocks.
        sites: whose statistics are collected.
        folder: for what does not fit in memory, and for what a killed run goes on from; None for neither.
        hidden_gb: hidden states that may stay in memory, in 10^9 bytes.
        known: whether totals are there already, given a statistic and the key of a stream.
        reporter: told about progress.
        first: number of the first of the runner's sequences among all that are measured.
        gradient_sequences: of the runner's sequences, how many gradients are taken at: the first.
    """

    runner: BlockRunner
    sites: Sequence[Site]
    folder: Path | None
    hidden_gb: float
    known: Callable[[Statistic, str], bool]
    reporter: Reporter
    first: int
    gradient_sequences: int

    def __post_init__(self) -> None:
        self._block = {site.name: site.block for site in self.sites}
        # A smaller last batch has masks of its own; found out here, where nothing is watched.
        for part in (*self.runner.batches(), *self.runner.batches(self.gradient_sequences)):
            self.runner.learn(part.stop - part.start)

    def collecting(
        self, collectors: Mapping[Labels | None, Collector], seed: int
    ) -> Iterator[tuple[Statistic, str, Totals]]:
        """Statistic, stream key and totals, as they are complete.

        Args:
            collectors: by the labels at which gradients are taken; None for what one forward pass gives.
            seed: for sampled labels.

        Raises:
            NotFiniteError: naming the layer.
        """
        wanted = {labels: self._by_block(collector) for labels, collector in collectors.items()}
        down = [
            labels for labels in collectors if labels is not None and self.gradient_sequences and any(wanted[labels])
        ]
        count = len(self.runner.blocks)
        begun = {labels: self._snapshot(labels, wanted[labels]) for labels in down}
        # Above what was left behind on the way down nothing is needed.
        height = max((begun[labels][0] for labels in down), default=0)
        forward = wanted.get(None, [[]] * count)
        height = max([height, *(index + 1 for index in range(count) if forward[index])])
        if not height:
            return
        between: list[Tensor] | None = [] if down else None
        # Where nothing is summed on the way up, the others are not needed.
        read = len(self.runner.ids) if any(forward) else self.gradient_sequences
        with self.reporter.counting("calibration", total=height * self._batches(read)) as advance:
            yield from self._up(collectors.get(None), forward, between, height, read, advance)
        for labels in down:
            assert between is not None
            yield from self._down(labels, collectors[labels], wanted[labels], between, begun[labels], seed)
        if self.folder is not None:
            shutil.rmtree(self.folder / _HIDDEN, ignore_errors=True)

    def _batches(self, count: int) -> int:
        return sum(1 for _ in self.runner.batches(count))

    def _by_block(self, collector: Collector) -> list[list[Stream]]:
        """The streams of every block that are not known."""
        found: list[list[Stream]] = [[] for _ in self.runner.blocks]
        for stream in collector.unknown(collector.streams, self.known):
            found[self._block[stream.sites[0]]].append(stream)
        return found

    def _room(self, name: str, sequences: int, others: int) -> Tensor:
        """Room for the hidden states of some sequences, beside those of so many others."""
        folder = None if self.folder is None else self.folder / _HIDDEN
        _, length, d = self.runner.shape
        share = sequences / (sequences + others)
        return allocate((sequences, length, d), folder, name, int(self.hidden_gb * 1e9 * share))

    def _kept(self, name: str) -> Tensor:
        """Room for what lies between two blocks, of the sequences that gradients are taken at."""
        return self._room(
            name, self.gradient_sequences, self.gradient_sequences * len(self.runner.blocks) + len(self.runner.ids)
        )

    def _up(
        self,
        collector: Collector | None,
        wanted: Sequence[Sequence[Stream]],
        between: list[Tensor] | None,
        height: int,
        read: int,
        advance: Callable[[str], None],
    ) -> Iterator[tuple[Statistic, str, Totals]]:
        """Run so many blocks on the first `read` sequences, the lowest block first.

        Where there is a `between`, what each read and the last gave is added to it, of the sequences that gradients
        are taken at.
        """
        runner = self.runner
        others = self.gradient_sequences * (len(wanted) + 1) if between is not None else 0
        hidden = runner.embed(self._room(_HIDDEN, len(runner.ids), others))

        def keep() -> None:
            if between is not None:
                between.append(self._kept(f"{_HIDDEN}-{len(between)}").copy_(hidden[: self.gradient_sequences]))

        keep()
        for index in range(height):
            give_back_memory()
            for part in self._watched(collector, wanted[index], read):
                hidden[part] = _forward(runner, index, hidden[part])
                advance(f"calibration, block {index}")
            keep()
            for stream in wanted[index]:
                assert collector is not None
                yield from collector.take(stream)

    def _watched(self, collector: Collector | None, streams: Sequence[Stream], count: int) -> Iterator[slice]:
        """Every batch of the first `count` sequences, while these streams are watched."""
        if collector is None or not streams:
            yield from self.runner.batches(count)
            return
        with collector.watching(self.runner.model, streams):
            for part in self.runner.batches(count):
                collector.begin(self.first + part.start, self.first + part.stop)
                yield part
                collector.end()

    def _down(
        self,
        labels: Labels,
        collector: Collector,
        wanted: Sequence[Sequence[Stream]],
        between: Sequence[Tensor],
        begun: tuple[int, Tensor | None],
        seed: int,
    ) -> Iterator[tuple[Statistic, str, Totals]]:
        """From the loss, or from where a killed run was, down to the lowest block of which anything is wanted."""
        runner = self.runner
        start, gradient = begun
        lowest = min(index for index, streams in enumerate(wanted) if streams)
        description = f"calibration, gradients at {labels} labels"
        total = (start - lowest + (gradient is None)) * self._batches(self.gradient_sequences)
        saved = time.monotonic()
        with self.reporter.counting(description, total=total) as advance, gradients(runner.model, True):
            if gradient is None:
                gradient = self._at_the_top(labels, between[start], seed, lambda: advance(f"{description}, head"))
            for index in reversed(range(lowest, start)):
                give_back_memory()
                for part in self._watched(collector, wanted[index], self.gradient_sequences):
                    given = between[index][part].to(runner.device).requires_grad_()
                    with torch.enable_grad():
                        found = runner.run(index, given)
                    found.backward(gradient[part].to(found))
                    assert given.grad is not None
                    gradient[part] = given.grad.cpu()
                    advance(f"{description}, block {index}")
                for stream in wanted[index]:
                    yield from collector.take(stream)
                if self.folder is not None and index > lowest and time.monotonic() - saved >= _SNAPSHOT_SECONDS:
                    self._save(labels, index, gradient)
                    saved = time.monotonic()

    def _at_the_top(self, labels: Labels, top: Tensor, seed: int, advance: Callable[[], None]) -> Tensor:
        """The loss gradient at what the last block gave, shape `[sequences, tokens, d]`, on the CPU."""
        runner = self.runner
        head = Head(runner.model, runner.ids)
        gradient = self._kept(f"gradient-{labels}")
        for part in runner.batches(self.gradient_sequences):
            given = top[part].to(runner.device, runner.dtype).requires_grad_()
            ids = runner.ids[part].to(runner.device)
            with torch.enable_grad(), runner.above(given):
                backward(head(ids), ids, labels, seed, self.first + part.start)
            assert given.grad is not None
            gradient[part] = given.grad.float().cpu()
            advance()
        return gradient

    def _save(self, labels: Labels, index: int, gradient: Tensor) -> None:
        """Leave the gradient at what a block reads, for a run that goes on from there."""
        assert self.folder is not None
        held = Folder(self.folder / f"down-{labels}", f"down-{labels}", Reporter(show=False))
        with held.writing("gradient.safetensors") as path:
            save_file({str(index): gradient}, path)
        held.sync()

    def _snapshot(self, labels: Labels, wanted: Sequence[Sequence[Stream]]) -> tuple[int, Tensor | None]:
        """How many blocks are left on the way down, and the gradient where it goes on; all where more is wanted."""
        top = len(self.runner.blocks)
        if self.folder is None or not (self.folder / f"down-{labels}").exists():
            return top, None
        held = Folder(self.folder / f"down-{labels}", f"down-{labels}", self.reporter)
        if not held.has("gradient.safetensors"):
            return top, None
        ((index, gradient),) = load_file(held.path / "gradient.safetensors").items()
        if any(wanted[int(index) :]):
            return top, None
        self.reporter.note(f"gradients at {labels} labels: going on at block {int(index) - 1}", passing=True)
        return int(index), gradient


@torch.no_grad()
def _forward(runner: BlockRunner, index: int, hidden: Tensor) -> Tensor:
    return runner.run(index, hidden).cpu()
