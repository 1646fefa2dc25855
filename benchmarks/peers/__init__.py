"""Quantisers of others, run through their own code: a weight goes in, what they make of it comes out.

`make peers` installs what they need into `.peers`. Each file is one peer; `PEERS` lists what they offer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / ".peers"

RoundTrip = Callable[[Tensor, Tensor], Tensor]
"""A weight `[m, n]` in float32 and E[x x^T] of its inputs `[n, n]` -> the weight after quantising, in float32."""


@dataclass(frozen=True)
class Peer:
    """One setting of one peer.

    Attributes:
        bits: a weight, scales counted, for a weight of n columns; what pads a row is not counted, in the peer's favour.
        round_trip: quantises and dequantises.
    """

    bits: Callable[[int], float]
    round_trip: RoundTrip


def peers() -> Mapping[str, Peer]:
    """All peers by name.

    Raises:
        SystemExit: when they are not installed.
    """
    if not FOLDER.is_dir():
        sys.exit("the peers are not installed: make peers")
    sys.path.append(str(FOLDER))
    from peers import ggml, gptq, half_quadratic, torch_ao

    return {**ggml.peers(), **half_quadratic.peers(), **torch_ao.peers(), **gptq.peers()}
