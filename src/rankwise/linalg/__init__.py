"""Pure tensor functions: no model, no site, no file."""

from rankwise.linalg.decompose import Decomposition, balanced, balancing, decompose
from rankwise.linalg.finite import all_finite
from rankwise.linalg.metrics import InputMetric, OutputMetric, plus_diagonal, psd_factor
from rankwise.linalg.pivot import Pivoted, pivot
from rankwise.linalg.principal import of_equal_norm, principal_directions, second_moment, without_mean
from rankwise.linalg.removal import compensated, damped, removal_losses, removal_order

__all__ = [
    "Decomposition",
    "InputMetric",
    "OutputMetric",
    "Pivoted",
    "all_finite",
    "balanced",
    "balancing",
    "compensated",
    "damped",
    "decompose",
    "of_equal_norm",
    "pivot",
    "plus_diagonal",
    "principal_directions",
    "psd_factor",
    "removal_losses",
    "removal_order",
    "second_moment",
    "without_mean",
]
