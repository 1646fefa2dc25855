"""The loss whose gradients are measured: at the text's next tokens, or at tokens drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ModelError
from rankwise.models import Logits
from rankwise.reading import one_line
from rankwise.statistics.base import Labels


def backward(logits: Logits, tokens: Tensor, labels: Labels, seed: int, start: int) -> None:
    """Back-propagate the summed next-token loss to activations; no parameter gets a gradient."""
    targets = tokens[:, 1:].flatten()
    draws = None if labels == "text" else _draws(len(tokens), tokens.shape[1] - 1, seed, start).to(tokens.device)

    def loss(raw: Tensor, part: slice) -> Tensor:
        raw = raw.float()
        chosen = targets[part] if draws is None else _drawn(raw.detach(), draws[part])
        return torch.nn.functional.cross_entropy(raw, chosen, reduction="sum")

    logits.predicting().sum(loss).backward()


def _draws(sequences: int, tokens: int, seed: int, start: int) -> Tensor:
    """A number from [0, 1) for every token, shape `[sequences tokens]`: the same wherever its sequence is run."""
    numbers = [torch.Generator().manual_seed(seed * 1_000_003 + start + each) for each in range(sequences)]
    return torch.cat([torch.rand(tokens, generator=generator, dtype=torch.float64) for generator in numbers])


def _drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens drawn from the model, shape `[tokens]`: where the distribution's sum passes each number of `draws`."""
    sums = logits.softmax(-1).double().cumsum(-1)
    wanted = draws[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1)


@contextmanager
def gradients(model: Any, wanted: bool) -> Iterator[None]:
    """Inside the block gradients flow to activations, or not at all; no parameter takes one.

    Raises:
        ModelError: where the model's own backward pass does not do so in evaluation mode.
    """
    if not wanted:
        with torch.no_grad():
            yield
        return
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    # Gradients start at the embeddings' output, so that they flow though no parameter takes one; at a copy of it, which
    # some models scale in place.
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_(True).clone())
    try:
        yield
    except (AssertionError, NotImplementedError) as problem:
        raise ModelError(
            f"{type(model).__name__} gives no gradients as a model that is not trained ({one_line(problem, 200)}).",
            where="calibration",
            remedy="use a method that needs none, such as bolaco or svd; for codes --q-bits B with "
            "--set method.output_feedback=false",
        ) from problem
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
