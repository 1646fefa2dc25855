"""Statistics on disk, and what a method sees of them at one site."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.runs import Folder
from rankwise.statistics.base import Collected, Latest, Place, Statistic, T, V
from rankwise.statistics.files import load_totals, save_totals
from rankwise.statistics.pools import Pools, Reach
from rankwise.statistics.streams import Stream


def _label(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def save_snapshot(folder: Path, collected: Collected, done: int) -> None:
    """Replace the snapshot in `folder`, atomically.

    Args:
        folder: where it is left.
        collected: what a pass has so far.
        done: sequences it covers.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    held = Folder(fresh, _label(folder), Reporter(show=False))
    for number, (statistic, by_stream) in enumerate(collected.items()):
        for key, totals in by_stream.items():
            with held.writing(f"{number}-{statistic.name}/{key}.safetensors") as path:
                save_totals(path, totals)
    held.write_json("done.json", {"sequences": done})
    held.finish()
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_snapshot(folder: Path, statistics: Sequence[Statistic], reporter: Reporter) -> tuple[Collected, int]:
    """Read a snapshot: what was collected, and how many sequences it covers; nothing where there is none.

    Args:
        folder: where it is.
        statistics: those of the pass that left it, in the same order.
        reporter: told that it is damaged, when it is.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        os.rename(old, folder)
    if not folder.exists():
        return {}, 0
    held = Folder(folder, _label(folder), reporter)
    damage = held.damage()
    if damage is not None:
        reporter.note(f"a snapshot of the calibration pass was damaged ({damage}): the pass begins anew", passing=True)
        shutil.rmtree(folder)
        return {}, 0
    collected: Collected = {statistic: {} for statistic in statistics}
    of_folder = {f"{number}-{statistic.name}": statistic for number, statistic in enumerate(statistics)}
    for name in held.names():
        inside, _, file = name.partition("/")
        if file:
            statistic = of_folder[inside]
            collected[statistic][file.removesuffix(".safetensors")] = load_totals(folder / name, statistic.totals)
    return collected, int(held.read_json("done.json")["sequences"])


class Store:
    """Finished statistics by site.

    Args:
        folders: statistic -> the folder with one file a stream.
        sites: sites they were collected at.
    """

    def __init__(self, folders: Mapping[Statistic, Path], sites: Sequence[Site]) -> None:
        self._folders = folders
        streams = {statistic: statistic.streams(sites) for statistic in folders}
        self._streams = {
            statistic: {name: stream for stream in found for name in stream.sites}
            for statistic, found in streams.items()
        }
        self._pools = Pools(folders, streams, sites)
        self.latest = Latest()

    def reach(self, site: Site) -> Reach | None:
        """How much of the text comes to an expert; None where the site is none, or nothing was measured that tells."""
        return self._pools.reach(site)

    def files(self, site: Site) -> list[Path]:
        """All files that a site's totals may be read from: of an expert those of its peers, too."""
        found: dict[Path, None] = {}
        for statistic, folder in self._folders.items():
            streams = [self._streams[statistic][site.name]] if site.name in self._streams[statistic] else []
            streams += self._pools.peers(statistic, site)
            for file in (folder / f"{stream.key}.safetensors" for stream in streams):
                if file.exists():
                    found[file] = None
        return list(found)

    def totals(self, statistic: Statistic[T, V], site: Site) -> tuple[Stream, T]:
        """The stream that serves a site, and its totals; those of an expert that saw little as `Pools` mixes them.

        Raises:
            KeyError: when the statistic was not collected with these settings.
        """
        if statistic not in self._folders:
            raise KeyError(f"{statistic} was not collected: the method has to request it, with the same settings")
        stream = self._streams[statistic][site.name]
        if site.pool:
            return stream, self._pools.totals(statistic, stream)
        return stream, load_totals(self._folders[statistic] / f"{stream.key}.safetensors", statistic.totals)


class SiteStatistics:
    """What a method sees of the statistics, at one site.

    Args:
        site: which.
        weight: W, shape `[m, n]`, float64; what is seen is on its device.
        bias: the layer's own bias, shape `[m]`, or None; on the same device.
        store: where the totals are.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None, store: Store) -> None:
        self._site, self._weight, self._bias, self._store = site, weight, bias, store

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, shape `[m]`, or None."""
        return self._bias

    @property
    def may_add(self) -> bool:
        """Whether a bias may be added here: not where zeros have to stay zeros, see `keeping_zeros`."""
        return not self._site.keeps_zeros

    def of(self, statistic: Statistic[T, V]) -> V:
        """What one statistic says here: see its class.

        Args:
            statistic: as the method requested it.

        Raises:
            KeyError: when it was not collected with these settings.
        """
        stream, totals = self._store.totals(statistic, self._site)
        place = Place(stream, self._weight, self._bias, self._store.latest)
        return statistic.seen(totals.to(self._weight.device), place)
