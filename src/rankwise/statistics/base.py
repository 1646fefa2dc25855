"""What a statistic is: frozen settings that say what is watched, how it adds, how it is stored and what a method sees.

A new one is a file with a class of its own; nothing else changes but the methods that use it. `MeanStatistic`
(`statistics/mean.py`) is the short way for anything that is a mean over batches.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.streams import Stream

Labels = Literal["text", "sampled"]


@dataclass(frozen=True)
class Totals(ABC):
    """What was summed, in float64. Every field is a tensor or an integer; a file holds the fields.

    Attributes:
        vectors_in: name of the field that counts the vectors that were added; empty for totals that do not know, which
            are never mixed with those of others.

    Raises:
        TypeError: when a tensor is of another precision.
    """

    vectors_in: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.dtype != torch.float64:
                raise TypeError(f"{type(self).__name__}.{field.name} is {value.dtype}: totals are float64")

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The totals of both sets together."""

    @property
    def seen_vectors(self) -> int | None:
        """Vectors that were added; None when these totals do not know."""
        return getattr(self, self.vectors_in) if self.vectors_in else None

    def weighing(self, vectors: int) -> Self:
        """Totals with the same means, of which a merge takes as many vectors to have been seen as this says."""
        return self

    def is_finite(self) -> bool:
        """Whether nothing that was added held NaN or an infinity."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors().values())

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {k: v.to(device) for k, v in parts.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The fields as a file holds them: an integer is a tensor of shape `[1]`."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v.contiguous() if isinstance(v, Tensor) else torch.tensor([v]) for k, v in parts.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` was made of."""
        counts = {field.name for field in dataclasses.fields(cls) if field.type in (int, "int")}
        return cls(**{name: int(value) if name in counts else value for name, value in tensors.items()})


class Sums(ABC):
    """What is summed at one stream: float32 on the model's device, until it is taken."""

    @abstractmethod
    def add(self, x: Tensor, inputs: Tensor) -> None:
        """Add what was seen of a batch, or of the part of one that lies in one group.

        Args:
            x: the stream's vectors, shape `[sequences, tokens, d]`, or `[tokens, d]` where tokens are routed.
            inputs: what the watched module read for them, shape `[..., n]`. The same as `x` where inputs are watched.
        """

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing was added since the sums were taken."""

    @abstractmethod
    def take(self) -> Totals:
        """What was added, in float64 on the same device; the sums start afresh."""

    def add_to(self, before: Any) -> Any | None:
        """What `before.merge(take())` gives, made of the tensors of `before` themselves; None where that saves nothing.

        Args:
            before: totals that an earlier `take` of these sums gave, and that nothing else holds.
        """
        return None


StartSums = Callable[[int, torch.device], Sums]
"""Begins the sums of one stream, given the dimension of its vectors and the device they live on."""

T = TypeVar("T", bound=Totals)
V = TypeVar("V")
X = TypeVar("X")


class Latest:
    """Keeps the last thing made: sites that share a stream come one after another, and share it.

    Threads may share it, too; each gets what belongs to its label.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, Any] | None = None

    def get(self, label: Hashable, make: Callable[[], X]) -> X:
        """What `make` gives; the same object when the call before had the same label."""
        kept = self._kept
        if kept is None or kept[0] != label:
            kept = self._kept = label, make()
        value: X = kept[1]
        return value


@dataclass(frozen=True)
class Place:
    """The site at which totals are looked at.

    Attributes:
        stream: where they were summed.
        weight: W, shape `[m, n]`, float64.
        bias: the layer's own bias, shape `[m]`, or None.
        latest: what the site before made.
    """

    stream: Stream
    weight: Tensor
    bias: Tensor | None
    latest: Latest


class Statistic(ABC, Generic[T, V]):
    """One statistic, asked for with its settings. Subclasses are frozen dataclasses; their fields are the settings.

    Attributes:
        name: what it is called on disk.
        totals: what it is kept as.
        groups: groups of sequences at whose ends sums move from float32 to totals in float64, as for `group_ends`.
            None moves them after every batch.
        labels: None for a forward pass. Otherwise a backward pass is made, from the loss at the `text`'s next tokens,
            or at tokens `sampled` from the model itself.
    """

    name: ClassVar[str]
    totals: type[T]
    groups: int | None = None
    labels: Labels | None = None

    def settings(self) -> dict[str, object]:
        """What the numbers depend on beside model and text, for the key under which they are kept."""
        fields: Any = self
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(fields)}}

    @abstractmethod
    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        """What is watched: streams that together serve every site, each site once."""

    @abstractmethod
    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        """How it is summed. Asked once, before a pass.

        Statistics in one pass whose answers are equal and whose groups are the same share the sums of a stream.

        Args:
            streams: all that it watches.
            sequences: calibration sequences there are.
            reporter: told what the user should know.
        """

    def shared(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """What the totals of one stream depend on because others are watched, too; nothing by default.

        Args:
            streams: all that it watches.
        """
        return {}

    def totals_of(self, taken: Any) -> T:
        """Its totals, from what its sums gave at the end of a group. Other statistics may be handed the same object."""
        totals: T = taken
        return totals

    @abstractmethod
    def seen(self, totals: T, place: Place) -> V:
        """What a method sees of the totals at one site."""


Collected = dict[Statistic, dict[str, Totals]]
"""Statistic -> stream key -> totals."""
