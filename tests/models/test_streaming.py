"""A model whose weights lie in files is the same model, and its run gives the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from conftest import tiny_llama
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.checkpoints.load import fingerprint
from rankwise.errors import RunError
from rankwise.models import decoder_blocks, empty_in_file, into_file, streaming
from rankwise.recipes import recipe_from
from rankwise.statistics import by_block

IDS = torch.randint(3, 2000, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16, with the tokenizer of nobody."""
    folder = tmp_path / "half"
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _every_tensor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SMALL", 0)


def in_file(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def test_logits_are_those_of_the_model_in_memory(half: Path, tmp_path: Path) -> None:
    whole, held = load_model(str(half)), load_model(str(half), files=tmp_path / "files")
    blocks = decoder_blocks(held.model)[1]
    seen: list[torch.dtype] = []
    blocks[0].mlp.up_proj.register_forward_hook(lambda module, _a, _o: seen.append(module.weight.dtype))
    with torch.no_grad():
        expected, found = (each.model(input_ids=IDS).logits for each in (whole, held))
    assert torch.equal(expected, found)
    assert seen == [torch.float32]
    # Between passes: matrices of blocks as they are stored, everything else as it computes.
    for name, parameter in held.model.named_parameters():
        inside = name.startswith("model.layers") and parameter.ndim > 1
        assert parameter.dtype == (torch.bfloat16 if inside else torch.float32), name
    assert fingerprint(whole.model, whole.stored_dtypes) == fingerprint(held.model, held.stored_dtypes)
    assert not list((tmp_path / "files").iterdir())


def test_there_and_back_is_what_was_read(half: Path, tmp_path: Path) -> None:
    held = load_model(str(half), files=tmp_path / "files")
    before = load_model(str(half), precision="stored").model.state_dict()
    for _ in range(2):
        held.to_stored_dtypes()
        after = held.model.state_dict()
        assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
        with torch.no_grad():
            assert held.model(input_ids=IDS).logits.dtype == torch.bfloat16
        held.to_compute_dtypes()
        with torch.no_grad():
            assert held.model(input_ids=IDS).logits.dtype == torch.float32
    assert held.model.lm_head.weight.dtype == torch.float32


def test_a_weight_that_changed_is_not_taken_back_from_the_file(half: Path, tmp_path: Path) -> None:
    held = load_model(str(half), files=tmp_path / "files")
    held.model.lm_head.weight = nn.Parameter(held.model.lm_head.weight * 2, requires_grad=False)
    held.to_stored_dtypes()
    again = load_model(str(half), precision="stored").model.lm_head.weight
    assert torch.equal(held.model.lm_head.weight, again * 2)


def test_a_pass_that_fails_leaves_the_weights_as_they_lay(half: Path, tmp_path: Path) -> None:
    held = load_model(str(half), files=tmp_path / "files")
    blocks = decoder_blocks(held.model)[1]

    def fail(*_: Any) -> None:
        raise KeyError("no")

    for handle in (
        blocks[1].mlp.register_forward_hook(fail),
        blocks[1].register_forward_pre_hook(fail, prepend=True),
        blocks[1].register_forward_pre_hook(fail),
    ):
        with pytest.raises(KeyError):
            held.model(input_ids=IDS)
        handle.remove()
        assert {p.dtype for p in blocks.parameters() if p.ndim > 1} == {torch.bfloat16}
    with torch.no_grad():
        held.model(input_ids=IDS)


def test_gradients_reach_what_learns_where_it_lies(half: Path, tmp_path: Path) -> None:
    held = load_model(str(half), files=tmp_path / "files")
    learns = decoder_blocks(held.model)[1][0].self_attn.q_proj.weight.requires_grad_()
    held.model(input_ids=IDS).logits.square().sum().backward()
    assert learns.grad is not None
    assert learns.grad.dtype == torch.bfloat16
    assert learns.grad.any()


def test_what_a_module_holds_goes_to_files(tmp_path: Path, half: Path) -> None:
    held = load_model(str(half), files=tmp_path / "files")
    layer = nn.Linear(6, 5).requires_grad_(False)
    layer.register_buffer("codes", torch.arange(7, dtype=torch.uint8))
    held.model.model.layers[0].mlp.up_proj = layer
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    held.settle("model.layers.0.mlp.up_proj")
    after = held.model.model.layers[0].mlp.up_proj.state_dict()
    assert all(in_file(tensor) and torch.equal(before[name], tensor) for name, tensor in after.items())
    addresses = {name: tensor.data_ptr() for name, tensor in after.items()}
    held.settle("model.layers.0.mlp.up_proj")
    held.settle("model.layers.1.mlp.up_proj")
    assert addresses == {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    assert not in_file(held.model.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_a_copy_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).reshape(4, 6).T
    found = into_file(values, tmp_path, dtype)
    assert in_file(found)
    assert torch.equal(found, values.to(dtype))
    assert not list(tmp_path.iterdir())
    (tmp_path / "weights-of-a-killed-run").touch()
    assert empty_in_file((2, 3), dtype, tmp_path).shape == (2, 3)


def tiny_mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.runs.files.os.posix_fallocate", _no_room)
    with pytest.raises(RunError, match="The disk is full"):
        into_file(torch.zeros(4, 4), tmp_path)
    assert not list(tmp_path.iterdir())


def _no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_disk_leaves_no_hidden_states_in_memory(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    real = by_block.allocate

    def allocate(shape: tuple[int, ...], folder: Path | None, name: str, most_bytes: int) -> Tensor:
        kept.append(most_bytes)
        return real(shape, folder, name, most_bytes)

    monkeypatch.setattr(by_block, "allocate", allocate)
    for memory in ("blocks", "disk"):
        compress(recipe_from(settings(memory=memory)), run_directory=tmp_path / memory)
        assert (set(kept) == {0}) == (memory == "disk")
        kept.clear()


KINDS: dict[str, dict[str, Any]] = {
    "default": {"budget": {"keep": 0.6, "rank_multiple": 1}},
    "codes": {"method": {"name": "caldera", "outer": 1}, "budget": {"bits": 3, "rank_multiple": 1}},
    "repairs": {
        "budget": {"keep": 0.5, "rank_multiple": 1},
        "repair": {"steps": ["refit", "blocks", "subspace"], "blocks": {"epochs": 1, "norms": True}},
        "validation": {"sequences": 4, "select": "all"},
    },
    "experts": {"budget": {"keep": 0.6, "rank_multiple": 1}},
    "search": {
        "method": "bolaco",
        "allocation": {"name": "bayesian", "trials": 3},
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "validation": {"sequences": 4, "select": "all"},
    },
}


@pytest.mark.parametrize(("kind", "memory"), [*((kind, "blocks") for kind in KINDS), ("default", "disk")])
def test_all_ways_to_hold_a_model_give_the_same_bytes(
    kind: str, memory: str, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = settings(**KINDS[kind])
    model = tiny_mixtral() if kind == "experts" else tiny_llama()
    model.to(torch.bfloat16).save_pretrained(values["model"])
    found = {}
    for each in ("whole", memory):
        output = tmp_path / each
        recipe = recipe_from({**values, "memory": each, "output": str(output)})
        result = compress(recipe, run_directory=tmp_path / f"run-{each}")
        assert any(in_file(parameter) for parameter in result.model.parameters()) == (each != "whole")
        assert result.report.memory is not None
        assert result.report.memory.mode == each
        found[each] = [
            hashlib.sha256((output / name).read_bytes()).hexdigest() for name in ("model.safetensors", "plan.json")
        ]
        assert not list((tmp_path / f"run-{each}").glob("weights-*"))
    assert found["whole"] == found[memory]
