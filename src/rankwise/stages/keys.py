"""What the results of stages depend on: their keys, so that a finished one is taken over where nothing differs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from rankwise.device import computed_type
from rankwise.stages.work import Work

_STAGE_FORMAT = 13
"""Raised when the contents or the arithmetic of a stage change, so that old stages are not taken for new ones."""


def model_key(work: Work) -> dict[str, Any]:
    return {
        "format": _STAGE_FORMAT,
        "model": work.smaller or work.fingerprint,
        "precision": str(computed_type(work.loaded.model)),
        "device": work.loaded.model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def chosen_key(work: Work) -> dict[str, Any]:
    """What cuts depend on beside model, method and budget: sites that are left out, and, where the size of the whole is
    asked for, what all else takes of it.
    """
    found: dict[str, Any] = {"left_out": sorted(work.left_out)} if work.left_out else {}
    if work.problem.allowance.budget.size is not None:
        found["allowed"] = work.problem.allowance.bits
    return found


def calibration_key(work: Work) -> dict[str, Any]:
    read, settings = work.texts.calibration, work.recipe.calibration
    calibration: dict[str, Any] = {"ids": read.fingerprint, "batch_size": settings.batch_size}
    if work.gradient_sequences < len(read.ids):
        calibration["gradient_sequences"] = work.gradient_sequences
    return {**model_key(work), "calibration": calibration, "seed": work.recipe.seed}
