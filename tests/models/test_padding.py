"""In front of a running state zeros stay zeros, so that a padded sequence comes out as it does by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_architectures import SMALL, tokens  # noqa: F401
from test_reloading import MAMBA
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from rankwise import compress
from rankwise.factors import Basis
from rankwise.methods import Factorisation
from rankwise.models import find_sites, keeping_zeros
from rankwise.recipes import recipe_from

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Mamba2": ({**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, {"mixer.in_proj"}),
    # Heads and states beside one another, in blocks of both kinds.
    "Bamba": (
        {
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "attn_layer_indices": [1],
        },
        {"mamba.in_proj"},
    ),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CASES[name][0])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # None zero, as none of a trained model is.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def places(names: set[str]) -> set[str]:
    """Within their blocks."""
    return {".".join(name.split(".")[-2:]) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_weights_in_front_of_a_state_are_found(name: str) -> None:
    model, ids = built(name), torch.arange(3, 30)[None]
    found = keeping_zeros(model, find_sites(model), ids)
    assert places(found) == CASES[name][1]
    every = {site.name for site in find_sites(model)}
    assert found == {each for each in every if places({each}) == CASES[name][1]}


def test_attention_gives_zeros_for_padding_and_nothing_comes_of_it() -> None:
    model = tiny_llama()
    read: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, given: read.append(given[0]))
    assert keeping_zeros(model, find_sites(model), torch.arange(3, 30)[None]) == set()
    assert not read[0][1, :4].any()
    assert read[0][1, 4:].any()


def test_a_model_that_takes_no_mask_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("Mamba2")
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: real(input_ids, use_cache=use_cache))
    assert keeping_zeros(model, find_sites(model), torch.arange(3, 30)[None]) == set()


def logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Of the last row, whose padding is on its left."""
    length = max(map(len, rows))
    ids = torch.tensor([[3] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[-1, length - len(rows[-1]) :]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["two_sided", "bolaco", "afm"])
def test_a_padded_sequence_is_what_it_is_alone(
    method: str,
    name: str,
    tokens: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    built(name).save_pretrained(tmp_path / "model")
    values = {
        "model": str(tmp_path / "model"),
        "output": str(tmp_path / "small"),
        "method": method,
        "allocation": "uniform",
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": {"source": tokens},
    }
    compress(recipe_from(values))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    short, long = list(range(20, 28)), list(range(40, 56))
    torch.testing.assert_close(logits(model, [long, short]), logits(model, [short]), atol=1e-5, rtol=1e-4)
    biased = {key.rpartition(".")[0] for key in model.state_dict() if "proj" in key and key.endswith("bias")}
    # The others have one.
    assert biased
    assert not any("in_proj" in key for key in biased)


class Means(Factorisation):
    """A factorisation of one's own, which asks nothing about zeros."""

    name: str = "means"

    def decompose(self, weight: torch.Tensor, statistics: Any) -> Basis:
        one = torch.ones(len(weight), dtype=weight.dtype)
        return Basis(torch.eye(len(weight)).to(weight), weight, one, mean_output=one, mean_code=one)


@pytest.mark.parametrize("may_add", [True, False])
def test_a_method_that_does_not_ask_adds_no_bias_there_either(may_add: bool) -> None:
    seen: Any = SimpleNamespace(may_add=may_add)
    basis = Means().outlook(torch.randn(3, 4).double(), seen, 0, torch.Generator()).basis
    assert (basis.truncate(2).bias is not None) == may_add
