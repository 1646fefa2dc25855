"""Which sites a run touches: patterns over their names say what is taken, and what is left out stays as it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rankwise.errors import RecipeError
from rankwise.models import Site
from rankwise.progress import Reporter

_SHOWN = 3


def left_out(sites: Sequence[Site], include: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """Names of the sites that a run leaves as they are.

    Args:
        sites: all that were found.
        include: glob patterns over names; a site is taken when it matches any of them, or there are none
        exclude: and when it matches none of these.

    Raises:
        RecipeError: when a pattern matches no site, or no site is left.
    """
    names = [site.name for site in sites]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(
                    f"The pattern {pattern!r} matches no linear weight of the model's blocks.",
                    where=option,
                    remedy=_nearest(pattern, names),
                )
    taken = {
        name
        for name in names
        if (not include or any(fnmatchcase(name, each) for each in include))
        and not any(fnmatchcase(name, each) for each in exclude)
    }
    if not taken:
        raise RecipeError(
            f"The patterns leave none of the model's {len(names)} linear weights to be compressed.",
            where="include, exclude",
            remedy="take a pattern out of exclude, or give include a wider one",
        )
    return frozenset(names) - taken


def note_left_out(sites: Sequence[Site], names: frozenset[str], reporter: Reporter) -> None:
    """Say what a run leaves as it is, and how much that is.

    Args:
        sites: all that were found.
        names: what `left_out` answered.
        reporter: told so.
    """
    if not names:
        return
    left = sum(site.parameters for site in sites if site.name in names)
    whole = sum(site.parameters for site in sites)
    leaves = list(dict.fromkeys(_without_numbers(site.name) for site in sites if site.name in names))
    listed = ", ".join(leaves[:_SHOWN]) + (f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else "")
    reporter.note(
        f"{len(names)} of {len(sites)} linear weights ({listed}) are left out and stay as they are: "
        f"{left / whole:.1%} of the parameters that a budget counts, where they are counted dense"
    )


def watched(sites: Sequence[Site], names: frozenset[str]) -> list[Site]:
    """The sites at which statistics are collected: all but those left out that nobody else's statistics need.

    What shares an input shares its statistics, and what is known of an expert is mixed with what its peers saw; so the
    statistics of a site are the same whatever else is left out.

    Args:
        sites: all.
        names: of those that are left out.
    """
    pools = {site.pool for site in sites if site.pool and site.name not in names}
    groups = {site.group for site in sites if site.name not in names or site.pool in pools}
    return [site for site in sites if site.group in groups]


def _without_numbers(name: str) -> str:
    """A name with a star for each number: `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Patterns that do match, those most like one that does not first."""
    shapes = list(dict.fromkeys(map(_without_numbers, names)))
    leaves = list(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names))
    # A name with its numbers is near itself with one mistake, a pattern is near another pattern.
    close = difflib.get_close_matches(pattern, [*shapes, *leaves, *names], n=_SHOWN, cutoff=0.6)
    if close:
        return f"patterns are matched against whole names; near are {', '.join(close)}"
    return f"patterns are matched against whole names, such as {names[0]}; known: {', '.join(leaves)}"
