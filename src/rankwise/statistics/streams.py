"""`Stream`: a place in the model where vectors are watched, and the sites it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.models import Site


@dataclass(frozen=True)
class Stream:
    """The input that some sites share, the output of one site, or the loss gradient at that output.

    Attributes:
        module: path of the module that is watched.
        side: which of the three.
        d: dimension of the vectors.
        sites: names of the sites it serves.
    """

    module: str
    side: Literal["input", "output", "gradient"]
    d: int
    sites: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.module}.{self.side}"

    @property
    def vectors(self) -> str:
        """What its vectors are, as errors call them."""
        return "The loss gradients at this layer" if self.side == "gradient" else f"The {self.side}s of this layer"


def input_streams(sites: Sequence[Site]) -> list[Stream]:
    """One stream for every distinct input."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return [Stream(name, "input", members[0].n, tuple(s.name for s in members)) for name, members in groups.items()]


def output_streams(sites: Sequence[Site]) -> list[Stream]:
    """One stream for every site's output."""
    return [Stream(site.name, "output", site.m, (site.name,)) for site in sites]


def gradient_streams(sites: Sequence[Site]) -> list[Stream]:
    """One stream for the loss gradient at every site's output."""
    return [Stream(site.name, "gradient", site.m, (site.name,)) for site in sites]


def smaller_streams(sites: Sequence[Site]) -> list[Stream]:
    """Inputs where one n x n matrix serves, outputs where theirs are smaller together (a down projection)."""
    by_name = {site.name: site for site in sites}
    streams: list[Stream] = []
    for stream in input_streams(sites):
        members = [by_name[name] for name in stream.sites]
        if sum(site.m**2 for site in members) < stream.d**2:
            streams.extend(output_streams(members))
        else:
            streams.append(stream)
    return streams
