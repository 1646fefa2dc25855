"""Pure tensor functions: no model, no site, no file."""

from rankwise.linalg.decompose import Decomposition, decompose
from rankwise.linalg.metrics import InputMetric, OutputMetric, psd_factor

__all__ = ["Decomposition", "InputMetric", "OutputMetric", "decompose", "psd_factor"]
