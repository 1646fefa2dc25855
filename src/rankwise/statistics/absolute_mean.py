"""Mean absolute value of every input (ASVD, arXiv 2312.05821)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.statistics.mean import MeanStatistic
from rankwise.statistics.streams import Stream, input_streams


@dataclass(frozen=True)
class AbsoluteMean(MeanStatistic):
    """E|x| over all tokens; a method sees it, shape `[n]`. Sums move to float64 after every batch."""

    name = "absolute_mean"

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return input_streams(sites)

    def measure(self, x: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        return len(flat), flat.abs().sum(0, dtype=torch.float32)
