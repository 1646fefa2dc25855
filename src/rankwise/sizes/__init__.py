"""Sizes: what is decided of a weight (`Cut`), how that is stored (`Form`), what may be taken (`Budget`), the `Plan`."""

from rankwise.sizes.budget import SPELLINGS, Allowance, Budget, bytes_in_words, parse_size
from rankwise.sizes.candidates import Candidates, coded_candidates, dense_candidate, join, low_rank_candidates
from rankwise.sizes.cut import DENSE, Cut
from rankwise.sizes.form import FULL_BITS, Form, Storage
from rankwise.sizes.plan import Plan, same_shapes
from rankwise.sizes.stream import StreamSizes

__all__ = [
    "DENSE",
    "FULL_BITS",
    "SPELLINGS",
    "Allowance",
    "Budget",
    "Candidates",
    "Cut",
    "Form",
    "Plan",
    "Storage",
    "StreamSizes",
    "bytes_in_words",
    "coded_candidates",
    "dense_candidate",
    "join",
    "low_rank_candidates",
    "parse_size",
    "same_shapes",
]
