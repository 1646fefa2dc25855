"""What a model is made of: linear weights, blocks run one at a time, a head, and the original beside its successor."""

from rankwise.models.blocks import BlockRunner, allocate
from rankwise.models.couplings import Coupling, Section, find_couplings
from rankwise.models.experts import UnfusedExperts, fuse
from rankwise.models.grouped import GroupedLinear, group
from rankwise.models.head import LOGITS, Head, Logits
from rankwise.models.multimodal import (
    beside_language_model,
    has_own_language_model,
    language_model,
    reads_images,
    text_config,
)
from rankwise.models.original import Original
from rankwise.models.outside import read_outside
from rankwise.models.padding import keeping_zeros
from rankwise.models.places import places_of
from rankwise.models.pre_norm import PreNorm
from rankwise.models.recompute import recomputed
from rankwise.models.shrinking import shrink, usable_couplings
from rankwise.models.sites import (
    Site,
    decoder_blocks,
    find_sites,
    other_layers,
    share_inputs,
    shared_layers,
    stacked_parameters,
)
from rankwise.models.streaming import Streaming, empty_in_file, into_file
from rankwise.models.unfusing import Unfused, unfuse_experts

__all__ = [
    "LOGITS",
    "BlockRunner",
    "Coupling",
    "GroupedLinear",
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
    "beside_language_model",
    "decoder_blocks",
    "empty_in_file",
    "find_couplings",
    "find_sites",
    "fuse",
    "group",
    "has_own_language_model",
    "into_file",
    "keeping_zeros",
    "language_model",
    "other_layers",
    "places_of",
    "read_outside",
    "reads_images",
    "recomputed",
    "share_inputs",
    "shared_layers",
    "shrink",
    "stacked_parameters",
    "text_config",
    "unfuse_experts",
    "usable_couplings",
]
