"""Pure tensor functions: no model, no site, no file."""

from rankwise.linalg.decompose import Decomposition, decompose
from rankwise.linalg.metrics import InputMetric, OutputMetric, psd_factor
from rankwise.linalg.pivot import Pivoted, pivot

__all__ = ["Decomposition", "InputMetric", "OutputMetric", "Pivoted", "decompose", "pivot", "psd_factor"]
