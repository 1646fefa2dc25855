"""A layer whose weight the model's own code reads stays what it is; any other may be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import RwkvConfig, RwkvForCausalLM

from conftest import IDS, tiny_llama
from rankwise import compress
from rankwise.models import find_sites, read_outside
from rankwise.recipes import recipe_from

IDS_ = torch.tensor([IDS[:8]])


def test_who_only_calls_a_layer_reads_nothing() -> None:
    model = tiny_llama()
    kinds = [type(each) for each in model.modules()]
    assert read_outside(model, find_sites(model), IDS_) == []
    assert [type(each) for each in model.modules()] == kinds


def test_a_weight_that_is_read_is_named_and_no_other() -> None:
    model = tiny_llama()
    mlp: Any = model.model.layers[1].mlp
    plain = type(mlp).forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x.to(self.up_proj.weight.dtype))

    # As the model's own code does: in a function of another module than torch's.
    mlp.__class__ = type("ReadsItself", (type(mlp),), {"forward": forward})
    assert read_outside(model, find_sites(model), IDS_) == ["model.layers.1.mlp.up_proj"]
    # Who looks at it in the layer's own forward does what any layer does.
    down: Any = model.model.layers[0].mlp.down_proj

    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, 2 * self.weight)

    doubled.__code__ = doubled.__code__.replace(co_name="forward")
    down.__class__ = type("Doubled", (type(down),), {"forward": doubled})
    assert read_outside(model, find_sites(model), IDS_) == ["model.layers.1.mlp.up_proj"]


def test_a_model_whose_code_reads_weights_ends_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    config = RwkvConfig(**sizes, num_hidden_layers=2, context_length=64, bos_token_id=0)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"ids": torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))}, tokens)
    calibration = {"source": f"tokens:{tokens}", "sequences": 8}
    values = {"model": str(tmp_path / "model"), "method": "svd", "budget": {"keep": 0.6}, "calibration": calibration}
    result = compress(recipe_from({**values, "output": str(tmp_path / "out")}), run_directory=tmp_path / "run")
    assert any("own code reads their weights" in note for note in result.report.notes)
    assert not any(".output" in name or "feed_forward.value" in name for name in result.plan.cuts)
    assert any("attention.key" in name for name in result.plan.cuts)
