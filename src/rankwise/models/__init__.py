"""What a model is made of: linear weights, blocks run one at a time, a head, and the original beside its successor."""

from rankwise.models.blocks import BlockRunner, allocate
from rankwise.models.couplings import Coupling, Section, find_couplings
from rankwise.models.experts import UnfusedExperts, fuse
from rankwise.models.head import LOGITS, Head, Logits
from rankwise.models.original import Original
from rankwise.models.pre_norm import PreNorm
from rankwise.models.recompute import recomputed
from rankwise.models.shrinking import shrink, usable_couplings
from rankwise.models.sites import (
    Site,
    decoder_blocks,
    find_sites,
    fused_expert_parameters,
    place_of,
    share_inputs,
)
from rankwise.models.streaming import Streaming, empty_in_file, into_file
from rankwise.models.unfusing import Unfused, unfuse_experts

__all__ = [
    "LOGITS",
    "BlockRunner",
    "Coupling",
    "Head",
    "Logits",
    "Original",
    "PreNorm",
    "Section",
    "Site",
    "Streaming",
    "Unfused",
    "UnfusedExperts",
    "allocate",
    "decoder_blocks",
    "empty_in_file",
    "find_couplings",
    "find_sites",
    "fuse",
    "fused_expert_parameters",
    "into_file",
    "place_of",
    "recomputed",
    "share_inputs",
    "shrink",
    "unfuse_experts",
    "usable_couplings",
]
