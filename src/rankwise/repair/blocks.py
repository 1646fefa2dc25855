"""Block refinement: the factors of one block trained to give the original's output from the compressed model's input.

Blocks are taken in forward order, so each one also makes up for what those before it still get wrong. Beside the model,
memory holds one block's gradients and optimiser, and hidden states of the calibration sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rankwise.models import Site
from rankwise.models.blocks import BlockRunner
from rankwise.repair.parameters import optimiser, trainable


class Blocks(BaseModel):
    """How blocks are trained.

    Attributes:
        epochs: passes over the calibration sequences, a block.
        batch_size: sequences a step.
        lr: step size relative to the root mean square of each tensor; cosine schedule.
        lookahead: weight of the loss after the following block, which stays as it is; 0 for none.
        norms: whether the norms of the block are trained too.
        memory: gigabytes of hidden states kept in memory; what is larger goes to files in the run's directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[float, Field(gt=0)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] = 0.02
    lookahead: Annotated[float, Field(ge=0)] = 0.0
    norms: bool = False
    memory: Annotated[float, Field(gt=0)] = 8.0


def block_parameters(model: nn.Module, index: int, sites: Sequence[Site], norms: bool) -> dict[str, nn.Parameter]:
    """What a block's refinement trains: factors and biases of its factored sites, and its norms if asked.

    Args:
        model: the compressed model.
        index: which block.
        sites: all sites.
        norms: whether to take the norms.
    """
    return trainable(model, [site for site in sites if site.block == index], norms)


def _variance(hidden: Tensor) -> float:
    """Mean over channels of the variance over tokens, sequence by sequence: hidden states may be larger than memory."""
    mean = torch.stack([row.mean(0) for row in hidden]).mean(0)
    return float(torch.stack([(row - mean).square().mean() for row in hidden]).mean())


def train_block(
    runner: BlockRunner,
    index: int,
    parameters: dict[str, nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
    settings: Blocks,
    seed: int,
    ahead: tuple[Callable[[], AbstractContextManager[None]], Tensor] | None = None,
    step_done: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train a block's parameters, in place.

    Args:
        runner: of the compressed model.
        index: which block.
        parameters: what is trained, by name.
        inputs: the compressed model's input to the block, shape `[sequences, length, d]`.
        targets: the original's output of it, same shape.
        settings: how.
        seed: for the order of sequences.
        ahead: puts the original's next block in place, and that block's output, for the look-ahead loss; None for none.
        step_done: told the loss after each step.

    Returns:
        The loss at each step: squared error relative to the targets' variance over tokens.
    """
    scale = _variance(targets)
    later_scale = 1.0 if ahead is None else _variance(ahead[1])
    # A mean over so many numbers has gradients below float16's range.
    raised = float(targets[0].numel() * min(settings.batch_size, len(inputs))) if runner.dtype == torch.float16 else 1.0
    size = min(settings.batch_size, len(inputs))
    steps = max(1, round(settings.epochs * len(inputs) / size))
    steering, schedule = optimiser(parameters.values(), settings.lr, steps)
    source = torch.Generator().manual_seed(seed + index)
    order = torch.empty(0, dtype=torch.long)
    losses = []
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(inputs), generator=source)])
            rows, order = order[:size], order[size:]
            output = runner.run(index, inputs[rows])
            loss = (output - targets[rows].to(output)).square().mean() / scale
            if ahead is not None:
                with ahead[0]():
                    later = runner.run(index + 1, output)
                error = (later - ahead[1][rows].to(later)).square().mean()
                loss = loss + settings.lookahead * error / later_scale
            steering.zero_grad(set_to_none=True)
            torch.autograd.backward(raised * loss, inputs=list(parameters.values()))
            if raised != 1:
                for parameter in parameters.values():
                    if parameter.grad is not None:
                        parameter.grad /= raised
            steering.step()
            schedule.step()
            losses.append(float(loss.detach()))
            step_done(losses[-1])
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses
