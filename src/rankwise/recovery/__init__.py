"""Repair: what makes a compressed model's own parameters give back what compression took. One way a file."""

from rankwise.recovery.blocks import Blocks, block_parameters, train_block
from rankwise.recovery.factors import FullFactors
from rankwise.recovery.lora import Lora, attach_lora, merge_lora
from rankwise.recovery.low_rank import LowRankFactors, low_rank_parameters, open_low_rank, store_low_rank
from rankwise.recovery.original import Original
from rankwise.recovery.parameters import trainable
from rankwise.recovery.refit import Refit, refit_block
from rankwise.recovery.runner import BlockRunner, allocate
from rankwise.recovery.subspace import Subspace, attach_subspace, merge_subspace
from rankwise.recovery.training import Teacher, Training, mean_loss, steps_of, train

__all__ = [
    "BlockRunner",
    "Blocks",
    "FullFactors",
    "Lora",
    "LowRankFactors",
    "Original",
    "Refit",
    "Subspace",
    "Teacher",
    "Training",
    "allocate",
    "attach_lora",
    "attach_subspace",
    "block_parameters",
    "low_rank_parameters",
    "mean_loss",
    "merge_lora",
    "merge_subspace",
    "open_low_rank",
    "refit_block",
    "steps_of",
    "store_low_rank",
    "train",
    "train_block",
    "trainable",
]
