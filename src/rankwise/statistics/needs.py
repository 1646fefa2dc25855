"""The kinds of statistics a method can ask for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

DEFAULT_GROUPS = 32
DEFAULT_CURVATURE_GB = 8.0


class Need(StrEnum):
    """One kind of statistic, collected and kept by itself."""

    MOMENTS = "moments"
    """Mean and second moment of a site's input (or output, where that is smaller)."""
    INPUT_MOMENTS = "input_moments"
    """Mean and second moment of a site's input, whatever its size."""
    POOLED_MOMENTS = "pooled_moments"
    """The same, averaged over groups of sequences."""
    ABSOLUTE_MEAN = "absolute_mean"
    """Mean absolute value of every input."""
    ROW_FISHER = "row_fisher"
    """Squared gradient of the loss, summed over each row of the weight."""
    CURVATURE = "curvature"
    """Second moment of the loss gradient at the site's output."""

    @property
    def is_gradient(self) -> bool:
        """Whether it takes a backward pass."""
        return self in (Need.ROW_FISHER, Need.CURVATURE)


@dataclass(frozen=True)
class Request:
    """A statistic, and how it is to be collected.

    Attributes:
        need: which statistic.
        groups: groups of sequences. Sums move from float32 to float64 at their ends, and pooled moments average over
            them.
        labels: for gradients: `sampled` from the model itself, or `text`, the token that follows.
        curvature_gb: memory that curvature may take, in 10^9 bytes, all sites together.
    """

    need: Need
    groups: int = DEFAULT_GROUPS
    labels: Literal["sampled", "text"] = "text"
    curvature_gb: float = DEFAULT_CURVATURE_GB

    def settings(self) -> dict[str, object]:
        """What the collected numbers depend on, for the key under which they are kept."""
        settings: dict[str, object] = {"need": self.need.value, "groups": self.groups}
        if self.need.is_gradient:
            settings["labels"] = self.labels
        if self.need is Need.CURVATURE:
            settings["curvature_gb"] = self.curvature_gb
        return settings
