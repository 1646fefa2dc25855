"""A short decode is timed: bounded, and one token a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_llama
from rankwise.evaluation import decode_speed


@pytest.mark.parametrize(("seconds", "context", "steps"), [(60.0, 64, 4), (0.0, 64, 1), (60.0, 20, 4)])
def test_a_decode_is_bounded(seconds: float, context: int, steps: int) -> None:
    model, seen = tiny_llama(max_position_embeddings=context), []

    def watch(_module: Any, _inputs: Any, given: dict[str, Any], out: Any) -> None:
        seen.append((given["input_ids"].shape[1], out.past_key_values.get_seq_length()))

    model.register_forward_hook(watch, with_kwargs=True)
    assert decode_speed(model, torch.arange(3, 60), seconds=seconds, tokens=4) > 0
    # The prompt, and a step that is not timed.
    prompt = min(16, context - 6)
    assert seen == [(prompt, prompt), *((1, prompt + each + 1) for each in range(steps + 1))]
    assert seen[-1][1] <= context
