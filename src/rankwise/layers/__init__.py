"""Modules that take the place of a linear layer."""

from rankwise.layers.biased import BiasedLinear
from rankwise.layers.coding import (
    VocabularyParts,
    code_vocabulary,
    coded_buffers,
    decode_vocabulary,
    factors_refused,
    vocabulary_entry,
    vocabulary_parts,
)
from rankwise.layers.decoding import decoded_once, keep_decoded
from rankwise.layers.fold import fold_orders
from rankwise.layers.kinds import KINDS, Kind, dense_layer, is_linear, kind_of, substitute
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.narrow import NarrowNorm, narrow_stream, stream_of
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import PackedMatrix, QuantizedLinear, cache_dense
from rankwise.layers.replace import replace_linears
from rankwise.layers.sliced import SlicedLinear, sliced
from rankwise.layers.stored import sixteen

__all__ = [
    "KINDS",
    "BiasedLinear",
    "Kind",
    "LowRankLinear",
    "NarrowNorm",
    "PackedMatrix",
    "PivotedLinear",
    "QuantizedLinear",
    "SlicedLinear",
    "VocabularyParts",
    "cache_dense",
    "code_vocabulary",
    "coded_buffers",
    "decode_vocabulary",
    "decoded_once",
    "dense_layer",
    "factors_refused",
    "fold_orders",
    "is_linear",
    "keep_decoded",
    "kind_of",
    "narrow_stream",
    "replace_linears",
    "sixteen",
    "sliced",
    "stream_of",
    "substitute",
    "vocabulary_entry",
    "vocabulary_parts",
]
