"""What some families do: layers of another product, embeddings scaled in place, no gradient, no pooler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_architectures import SMALL, tokens  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.checkpoints.save import check_finite
from rankwise.errors import ModelError, NotFiniteError
from rankwise.models import BlockRunner, find_sites, other_layers, share_inputs
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.statistics import collect
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments

BERT = {**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}, "is_decoder": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Its causal class leaves out a pooler that its decoder has by itself.
    "Bert": ("BertLMHeadModel", BERT),
    # Its embeddings are scaled in place.
    "CTRL": ("CTRLLMHeadModel", {"vocab_size": 128, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}),
    # Its class says a name of the decoder that is none of its children.
    "Llama4Text": ("Llama4ForCausalLM", {**SMALL, "intermediate_size_mlp": 64, "num_local_experts": 2}),
    # Its layers have heads of different widths, as its own config says.
    "Gemma4Text": (
        "Gemma4ForCausalLM",
        {
            **SMALL,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
        },
    ),
    # It fills some linear layers by their paths, and counts on their biases.
    "xLSTM": ("xLSTMForCausalLM", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_unusual_family_is_compressed_with_gradients_and_reloaded(
    name: str,
    tokens: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    kind, settings = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**settings)).eval()
    for parameter in model.parameters():  # None zero, as none of a trained model is.
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "method": "two_sided",
        "budget": {"keep": 0.5, "rank_multiple": 1},
        "calibration": {"source": tokens},
    }
    small = compress(recipe_from(values))
    assert all(0 < site.dropped_energy < 1 for site in small.report.sites.values() if site.rank)
    ids = torch.arange(3, 19)[None]
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = small.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(trusted(input_ids=ids, use_cache=False).logits, expected)
        assert torch.equal(load_model(str(tmp_path / "small")).model(input_ids=ids, use_cache=False).logits, expected)


def test_infinite_bounds_of_the_architecture_are_stored_and_an_infinite_weight_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.register_buffer("bound", torch.tensor(float("inf")))
    check_finite(model)
    model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(NotFiniteError) as stopped:
        check_finite(model)
    assert stopped.value.where == "lm_head.weight"


class Grouped(nn.Linear):
    """A linear layer in name, which multiplies each half of its input by its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        half = self.weight[:, : x.shape[-1] // 2]
        return nn.functional.linear(first, half) - nn.functional.linear(second, half)


class Spelled(nn.Linear):
    """W x + b, written in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def test_a_layer_that_is_no_product_stays_and_one_that_is_spelled_otherwise_is_a_site(
    tokens: str,  # noqa: F811
) -> None:
    model = tiny_llama()
    before = [site.name for site in find_sites(model)]
    model.model.layers[0].mlp.up_proj.__class__ = Grouped
    model.model.layers[1].mlp.up_proj.__class__ = Spelled
    left = [site.name for site in find_sites(model)]
    assert set(before) - set(left) == {"model.layers.0.mlp.up_proj"}
    assert other_layers(model) == {"model.layers.0.mlp.up_proj": 80 * 32}
    meta = tiny_llama().to("meta")
    meta.model.layers[0].mlp.up_proj.__class__ = Spelled
    assert [site.name for site in find_sites(meta)] == before


def leaving_keys(weight: float) -> Any:
    """A model whose second block adds what its first one left outside of the hidden states, as shared keys are."""
    model = tiny_llama()
    first, second = (model.model.layers[number].mlp for number in (0, 1))
    left: dict[str, torch.Tensor] = {}
    real, other = first.forward, second.forward

    def leaves(x: torch.Tensor) -> torch.Tensor:
        left["states"] = x
        return real(x)  # type: ignore[no-any-return]

    first.forward, second.forward = leaves, lambda x: other(x + weight * left["states"])
    return model


@pytest.mark.parametrize("weight", [1.0, 0.001])
def test_blocks_that_leave_something_for_later_ones_are_not_run_by_themselves(weight: float) -> None:
    """Batch after batch through one block, the next would read what the last batch left."""
    ids = torch.randint(3, 2000, (6, 16), generator=torch.Generator().manual_seed(1))
    assert BlockRunner(tiny_llama(), ids, 2).alone()
    model = leaving_keys(weight)
    assert not BlockRunner(model, ids, 2).alone()
    with pytest.raises(ModelError, match="when another text is run between them"):
        BlockRunner(model, ids, 2).check()
    sites = share_inputs(model, find_sites(model), ids[:1])
    found, whole = (
        collect(model, sites, ids, [InputMoments()], batch_size=size, reporter=Reporter(show=False))[InputMoments()]
        for size in (2, 6)
    )
    assert found.keys() == whole.keys()
    for key, totals in found.items():
        torch.testing.assert_close(totals.second_moment(), whole[key].second_moment())


def test_blocks_that_run_more_than_once_in_a_pass_are_not_run_by_themselves() -> None:
    model = tiny_llama()
    ids = torch.randint(3, 2000, (4, 16), generator=torch.Generator().manual_seed(1))
    block = model.model.layers[1]
    # Its second pass changes so little that what comes out looks right.
    block.mlp.down_proj.weight.data *= 1e-4
    block.self_attn.o_proj.weight.data *= 1e-4
    real = block.forward

    def twice(hidden: torch.Tensor, **named: Any) -> Any:
        block.forward = real
        try:
            return block(block(hidden, **named), **named)
        finally:
            block.forward = twice

    block.forward = twice
    assert not BlockRunner(model, ids, 2).alone()
    with pytest.raises(ModelError, match=r"cannot be run by themselves \(4 calls in a pass, of 2 blocks"):
        BlockRunner(model, ids, 2).check()


@pytest.mark.parametrize("by_block", [True, False])
def test_a_site_without_gradients_has_those_of_zeros(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_block:
        monkeypatch.setattr("rankwise.statistics.passes.BlockRunner.alone", lambda _self: False)
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    real = layer.forward

    def without(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return real(x)

    layer.forward = without
    ids = torch.randint(3, 2000, (4, 16), generator=torch.Generator().manual_seed(1))
    sites = share_inputs(model, find_sites(model), ids[:1])
    found = collect(model, sites, ids, [Curvature()], batch_size=2, reporter=Reporter(show=False))[Curvature()]
    assert len(found) == len(sites)
    for site in sites:
        value = found[f"{site.name}.gradient"].value()
        assert torch.isfinite(value).all()
        assert bool(value.any()) != (site.name == "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("by_block", [True, False])
def test_a_model_that_gives_no_gradients_untrained_is_refused(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Reformer, whose own backward pass asks for training mode."""
    if not by_block:
        monkeypatch.setattr("rankwise.statistics.passes.BlockRunner.alone", lambda _self: False)

    class Asserts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_gradients: torch.Tensor) -> torch.Tensor:
            raise AssertionError("use train()")

    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    real = layer.forward
    layer.forward = lambda x: Asserts.apply(real(x))
    ids = torch.randint(3, 2000, (4, 16), generator=torch.Generator().manual_seed(1))
    sites = share_inputs(model, find_sites(model), ids[:1])
    with pytest.raises(ModelError, match=r"gives no gradients .*use train\(\)"):
        collect(model, sites, ids, [Curvature()], batch_size=2, reporter=Reporter(show=False))
