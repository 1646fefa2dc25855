"""Rounding of matrices to few bits: codebooks, feedback, rotations, and the low-rank part beside them."""

from rankwise.quantizers.codebooks import (
    CODEBOOKS,
    Codebook,
    OwnLevels,
    Packed,
    codebook_class,
    codebook_named,
    full_codebook_name,
    is_codebook,
    stored_codebook,
)
from rankwise.quantizers.expected import Rounding, gaussian_answer
from rankwise.quantizers.incoherence import Rotation, packed_signs
from rankwise.quantizers.ldlq import Hessian, Target, improve, ldlq, ldlq_together
from rankwise.quantizers.lplr import LowRank, low_rank, weighed_error
from rankwise.quantizers.two_sided import OutputFeedback, round_along_both

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "Hessian",
    "LowRank",
    "OutputFeedback",
    "OwnLevels",
    "Packed",
    "Rotation",
    "Rounding",
    "Target",
    "codebook_class",
    "codebook_named",
    "full_codebook_name",
    "gaussian_answer",
    "improve",
    "is_codebook",
    "ldlq",
    "ldlq_together",
    "low_rank",
    "packed_signs",
    "round_along_both",
    "stored_codebook",
    "weighed_error",
]
