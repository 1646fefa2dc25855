"""How many sites become codes at a time: side by side in threads, and in groups that are rounded in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankwise.methods import Method
from rankwise.models import Site

_TOGETHER_BYTES = 2e8
_GROUPS = 4
"""What fits of a group hold at once, and how many groups every worker gets at least, so that none waits for long."""


def together_bytes(site: Site) -> int:
    """Bytes that a fit beside others holds: second moments, those rotated, and feedback; the weight and its errors."""
    return 8 * (3 * site.n * site.n + 6 * site.m * site.n)


def most_together(sites: Sequence[Site], workers: int) -> float:
    """Bytes that the fits of a group may hold."""
    return min(_TOGETHER_BYTES, sum(map(together_bytes, sites)) / (_GROUPS * workers))


_SMALL = 1 << 21
_NARROW = 4096
_MOST_AT_ONCE = 8
"""Weights and the longer side of the largest site for several to be rounded at once, and how many: larger ones keep all
cores busy by themselves, and take memory."""


def rounded_at_once(method: Method, sites: Sequence[Site], on_gpu: bool, mode: str) -> int:
    """How many sites are rounded to codes at a time.

    On a CPU that is many short steps, none of which has use for more than a core, so that small sites are rounded side
    by side where the model is whole.
    """
    small = all(site.parameters <= _SMALL and max(site.m, site.n) <= _NARROW for site in sites)
    if not method.rounds or on_gpu or mode != "whole" or not small:
        return 1
    return min(torch.get_num_threads(), _MOST_AT_ONCE)
