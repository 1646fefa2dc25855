"""What blocks are handed beside hidden states is learned from one pass; further sizes of a batch take none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from conftest import tiny_llama
from rankwise.models import BlockRunner

IDS = torch.randint(0, 90, (5, 12), generator=torch.Generator().manual_seed(0))


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


class _Counting(nn.Module):
    """A block that counts how often it runs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.runs = block, 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        self.runs += 1
        return self.block(*positional, **named)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_further_sizes_run_no_block_and_are_what_a_pass_would_give(make: Any) -> None:
    model = make()
    runner = BlockRunner(model, IDS, 5)
    runner.learn(2)
    counting = [_Counting(block) for block in runner.blocks]
    for index, block in enumerate(counting):
        runner.blocks[index] = block
    runner.learn(5)
    assert [block.runs for block in counting] == [0] * len(counting)
    for index, block in enumerate(counting):
        runner.blocks[index] = block.block

    seen: list[torch.Tensor] = []
    handle = runner.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    hidden = runner.embed(torch.empty(runner.shape))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        handle.remove()
        for index in range(len(runner.blocks)):
            hidden = runner.run(index, hidden)
    torch.testing.assert_close(hidden, seen[0], rtol=1e-5, atol=1e-5)


class _Scaled(nn.Module):
    """A block that multiplies what a linear layer gives by a number it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8), 0

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return hidden + scale * self.linear(hidden)


class _Drifting(nn.Module):
    """Hands each block a number that depends on what the block before gave."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(96, 8), nn.ModuleList(_Scaled() for _ in range(3))
        self.dtype, self.as_number, self.skipped = torch.float32, False, -1

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        hidden = self.embedding(input_ids)
        for index, block in enumerate(self.layers):
            scale = hidden.mean()
            if index != self.skipped:
                hidden = block(hidden, scale=scale.item() if self.as_number else scale)
        return (hidden,)


@pytest.mark.parametrize("as_number", [False, True])
def test_arguments_that_depend_on_blocks_take_a_pass_each(as_number: bool) -> None:
    model = _Drifting()
    model.as_number = as_number
    runner = BlockRunner(model, IDS, 5, autocast=False)
    runner.learn(2)
    runner.learn(5)
    assert [block.runs for block in runner.blocks] == [2, 2, 2]


def test_a_block_that_is_never_run_leaves_the_model_as_it_is() -> None:
    model = _Drifting()
    model.skipped = 2
    blocks = list(model.layers)
    runner = BlockRunner(model, IDS, 5, autocast=False)
    runner.learn(2)
    runner.learn(5)
    assert list(model.layers) == blocks
    assert [block.runs for block in blocks] == [2, 2, 0]
