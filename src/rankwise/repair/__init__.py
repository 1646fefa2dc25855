"""Repair: what makes a compressed model's own parameters give back what compression took. One way a file."""

from rankwise.repair.blocks import Blocks, block_parameters, train_block
from rankwise.repair.factors import FullFactors
from rankwise.repair.lora import Lora
from rankwise.repair.low_rank import LowRankFactors
from rankwise.repair.parameters import trainable
from rankwise.repair.refit import Refit, refit_block
from rankwise.repair.subspace import Subspace
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
    "block_parameters",
    "mean_loss",
    "refit_block",
    "steps_of",
    "train",
    "train_block",
    "trainable",
]
