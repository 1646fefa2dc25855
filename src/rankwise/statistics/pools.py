"""Experts that saw few tokens or none: what was measured there, mixed with what their peers saw.

Of an expert that saw c vectors of dimension d with c < d, less is known than its metric has directions. The d - c that
are missing are taken to be like those of the pool, which is all that the same projection of all experts of its layer
saw. So a mean over vectors at the expert is

    w own + (1 - w) pooled,    w = min(1, c / d),

for moments (whose scatter holds the distance of the two means too), for curvature and for every other mean alike. From
d vectors on nothing is mixed in; an expert that saw none has the pool's means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.models import Site
from rankwise.statistics.base import Latest, Statistic, T, V
from rankwise.statistics.files import load_totals, load_vectors
from rankwise.statistics.streams import Stream


def mixed(own: T | None, pooled: T, d: int) -> T:
    """What is taken for the totals of an expert.

    Args:
        own: what it saw; None when that is nothing.
        pooled: of all experts of its layer.
        d: dimension of the vectors.
    """
    if own is None:
        return pooled if pooled.seen_vectors is None else pooled.weighing(d)
    count = own.seen_vectors
    if count is None or count >= d:
        return own
    return own.weighing(count).merge(pooled.weighing(d - count))


@dataclass(frozen=True)
class Reach:
    """How much of the text comes to one projection of an expert.

    Attributes:
        vectors: tokens it saw.
        enough: its inputs, from as many tokens on nothing is mixed into what it saw of them.
        mean: what each of its layer's experts saw on average.
    """

    vectors: int
    enough: int
    mean: float

    @property
    def counted(self) -> float:
        """Tokens it is taken to see: no fewer than are needed to know it, or than the mean where that is less."""
        return max(self.vectors, min(self.enough, self.mean))


class Pools:
    """Finished statistics of experts.

    Args:
        folders: statistic -> the folder with one file a stream.
        streams: statistic -> its streams.
        sites: sites they were collected at.
    """

    def __init__(
        self, folders: Mapping[Statistic, Path], streams: Mapping[Statistic, Sequence[Stream]], sites: Sequence[Site]
    ) -> None:
        self._folders = folders
        self._peers: dict[tuple[Statistic, str], list[Stream]] = {}
        self._pools: dict[tuple[Statistic, Stream], str] = {}
        self._counting: dict[str, tuple[Statistic, Stream]] = {}
        self._latest: dict[str, Latest] = {}
        self._counts: dict[tuple[Statistic, str], dict[str, int]] = {}
        of_site = {site.name: site.pool for site in sites if site.pool}
        for statistic, found in streams.items():
            for stream in (each for each in found if each.module in of_site):
                pool = f"{of_site[stream.module]}.{stream.side}"
                self._pools[statistic, stream] = pool
                self._peers.setdefault((statistic, pool), []).append(stream)
                if statistic.totals.vectors_in:
                    self._count_by(statistic, stream)

    def _count_by(self, statistic: Statistic, stream: Stream) -> None:
        """Tokens are told by what was taken of all of them, if there is such: gradients are of some sequences alone."""
        for name in stream.sites:
            if name not in self._counting or statistic.labels is None:
                self._counting[name] = statistic, stream

    def peers(self, statistic: Statistic, site: Site) -> list[Stream]:
        """Streams of all experts of a site's layer that are pooled with its own; none where it is no expert's."""
        own = [pool for (of, stream), pool in self._pools.items() if of == statistic and site.name in stream.sites]
        return [stream for pool in own for stream in self._peers[statistic, pool]]

    def totals(self, statistic: Statistic[T, V], stream: Stream) -> T:
        """The totals of an expert's stream, mixed where they are of few vectors.

        Raises:
            FileNotFoundError: when none of its layer's experts saw a token.
        """
        own = self._load(statistic, stream)
        if own is not None and (own.seen_vectors is None or own.seen_vectors >= stream.d):
            return own
        return mixed(own, self._pooled(statistic, self._pools[statistic, stream]), stream.d)

    def reach(self, site: Site) -> Reach | None:
        """How much of the text comes to a site; None where it is no expert's, or nothing was measured that tells."""
        if site.name not in self._counting:
            return None
        statistic, stream = self._counting[site.name]
        pool = self._pools[statistic, stream]
        if (statistic, pool) not in self._counts:
            peers = self._peers[statistic, pool]
            self._counts[statistic, pool] = {peer.key: self._vectors(statistic, peer) for peer in peers}
        counts = self._counts[statistic, pool]
        return Reach(counts[stream.key], site.n, sum(counts.values()) / len(counts))

    def _file(self, statistic: Statistic, stream: Stream) -> Path:
        return self._folders[statistic] / f"{stream.key}.safetensors"

    def _load(self, statistic: Statistic[T, V], stream: Stream) -> T | None:
        file = self._file(statistic, stream)
        return load_totals(file, statistic.totals) if file.exists() else None

    def _vectors(self, statistic: Statistic, stream: Stream) -> int:
        file = self._file(statistic, stream)
        return load_vectors(file, statistic.totals) if file.exists() else 0

    def _pooled(self, statistic: Statistic[T, V], pool: str) -> T:
        """Totals of all peers together; those of a projection are kept until another layer's are asked for."""

        def merge() -> T:
            total: T | None = None
            for peer in self._peers[statistic, pool]:
                found = self._load(statistic, peer)
                if found is not None:
                    total = found if total is None else total.merge(found)
            if total is None:
                raise FileNotFoundError(f"{pool}: no expert saw a token")
            return total

        projection = f"{statistic.name} {'.'.join(part for part in pool.split('.') if not part.isdecimal())}"
        return self._latest.setdefault(projection, Latest()).get((statistic, pool), merge)
