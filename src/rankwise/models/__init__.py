"""What a model is made of: its linear weights, its blocks run one at a time, and the original beside its successor."""

from rankwise.models.blocks import BlockRunner, allocate
from rankwise.models.original import Original
from rankwise.models.sites import (
    Site,
    decoder_blocks,
    find_sites,
    fused_expert_parameters,
    place_of,
    share_inputs,
)

__all__ = [
    "BlockRunner",
    "Original",
    "Site",
    "allocate",
    "decoder_blocks",
    "find_sites",
    "fused_expert_parameters",
    "place_of",
    "share_inputs",
]
