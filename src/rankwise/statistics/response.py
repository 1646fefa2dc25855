"""`Response`: a second moment as a decomposition takes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from rankwise.linalg import InputMetric
from rankwise.statistics.base import Place


@dataclass(frozen=True)
class Response:
    """A second moment of inputs, or of W x itself.

    Attributes:
        mean_output: E[W x], shape `[m]`, float64.
        inputs: metric on inputs, or None when outputs were watched.
        outputs: second moment of W x, shape `[m, m]`, or None when inputs were watched.
    """

    mean_output: Tensor
    inputs: InputMetric | None
    outputs: Tensor | None


def respond(place: Place, kind: Hashable, mean: Tensor, moment: Callable[[Tensor], Tensor]) -> Response:
    """The response at a site. Sites that share an input share its metric, root and all.

    Args:
        place: the site, and the stream that was watched: its input or its output.
        kind: what the moment is, to tell metrics of one stream apart.
        mean: of the stream's vectors, shape `[d]`, float64.
        moment: gives the second moment, shape `[d, d]`, for vectors with the mean it is handed.
    """
    if place.stream.side == "input":
        inputs = place.latest.get((kind, place.stream.key, place.weight.device), lambda: InputMetric(moment(mean)))
        return Response(place.weight @ mean, inputs, None)
    # An output is W x + b: its covariance is that of W x, its mean is off by b.
    if place.bias is not None:
        mean = mean - place.bias.double()
    return Response(mean, None, moment(mean))
