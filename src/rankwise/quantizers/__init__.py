"""Rounding of matrices to few bits: codebooks, feedback, rotations, and the low-rank part beside them."""

from rankwise.quantizers.codebooks import CODEBOOKS, Codebook, Packed, codebook_named
from rankwise.quantizers.incoherence import Rotation, packed_signs
from rankwise.quantizers.ldlq import Hessian, improve, ldlq
from rankwise.quantizers.lplr import LowRank, low_rank, weighed_error

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "Hessian",
    "LowRank",
    "Packed",
    "Rotation",
    "codebook_named",
    "improve",
    "ldlq",
    "low_rank",
    "packed_signs",
    "weighed_error",
]
