"""Repair: what makes a compressed model's own parameters give back what compression took. One way a file."""

from rankwise.repair.blocks import Blocks, block_parameters, train_block
from rankwise.repair.factors import FullFactors
from rankwise.repair.lora import Lora, attach_lora, merge_lora
from rankwise.repair.low_rank import LowRankFactors, low_rank_parameters, open_low_rank, store_low_rank
from rankwise.repair.parameters import trainable
from rankwise.repair.refit import Refit, refit_block
from rankwise.repair.subspace import Subspace, attach_subspace, merge_subspace
from rankwise.repair.training import Teacher, Training, mean_loss, steps_of, train

__all__ = [
    "Blocks",
    "FullFactors",
    "Lora",
    "LowRankFactors",
    "Refit",
    "Subspace",
    "Teacher",
    "Training",
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
