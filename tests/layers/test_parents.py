"""The class of a module says which of its children are replaced: engines look at one module of a class for all."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from test_children import compressed, factors_of, logits
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import tiny_llama
from rankwise.layers import substitute
from rankwise.layers.replace import LAYERS, name_parent, replace_linears
from rankwise.models import find_sites


def replaced(model: Any, *paths: str, form: str = "two_factor") -> Any:
    for path in paths:
        weight = model.get_submodule(path).weight.detach().double()
        kind = form if form in LAYERS else "quantized"
        substitute(model, path, factors_of(weight, torch.zeros(len(weight)), form), kind, torch.float32)
    return model


def test_a_class_stands_for_one_set_of_replaced_children() -> None:
    model = tiny_llama(num_hidden_layers=4)
    first, second, third, fourth = (f"model.layers.{index}.mlp" for index in range(4))
    replaced(model, f"{second}.up_proj", f"{second}.gate_proj", f"{third}.gate_proj", f"{third}.up_proj")
    replaced(model, f"{fourth}.up_proj", form="codes")
    kinds = [type(model.get_submodule(path)) for path in (first, second, third, fourth)]
    assert kinds[0] is LlamaMLP
    assert kinds[1] is kinds[2]
    assert len(set(kinds)) == 3
    assert kinds[1].__name__ == "LlamaMLP_gate_proj_two_factor_up_proj_two_factor"
    assert kinds[3].__name__ == "LlamaMLP_up_proj_quantized"
    assert all(isinstance(model.get_submodule(path), LlamaMLP) for path in (first, second, third, fourth))
    replaced(model, f"{first}.up_proj", form="pivoted")
    assert type(model.get_submodule(first)) not in kinds
    model.set_submodule(f"{first}.up_proj", nn.Linear(32, 80, bias=False))
    name_parent(model, model.get_submodule(first))
    assert type(model.get_submodule(first)) is LlamaMLP


def test_empty_layers_name_their_parents_too() -> None:
    model, other = replaced(tiny_llama(), "model.layers.1.mlp.up_proj"), tiny_llama()
    names = list(model.state_dict())
    form = {"shape": [80, 32], **model.model.layers[1].mlp.up_proj.description()}
    replace_linears(other, {"model.layers.1.mlp.up_proj": form})
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    assert list(other.state_dict()) == names
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("form", ["two_factor", "codes"])
def test_such_modules_are_copied_pickled_and_inspected(form: str) -> None:
    model = compressed(form)
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)
        assert type(again.model.layers[0].mlp) is type(model.model.layers[0].mlp)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)
    kind = type(model.model.layers[0].mlp)
    assert "class LlamaMLP" in inspect.getsource(kind)
    assert inspect.signature(kind.forward) == inspect.signature(LlamaMLP.forward)


def test_blocks_that_must_stay_whole_on_a_device_still_do() -> None:
    """OPT's feed-forward layers are children of the block itself."""
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    )
    (path,) = {site.name for site in find_sites(model) if site.name.endswith("1.fc1")}
    replaced(model, path)
    block = type(model.get_submodule(path.rpartition(".")[0]))
    assert block.__name__ != "OPTDecoderLayer"
    assert block.__name__ in model._no_split_modules
