"""Embeddings and heads in 8 bits: what rounding changes, what a checkpoint holds, and who can read it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from conftest import ELSEWHERE, Run, failed, tiny_llama
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import BudgetError, ModelError, RecipeError
from rankwise.evaluation.operations import count_operations
from rankwise.layers import code_vocabulary, coded_buffers, decode_vocabulary, vocabulary_parts
from rankwise.layers.vocabulary import CodedHead, decoded_rows
from rankwise.models import Head
from rankwise.quantizers.eight import eight_bits
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from

IDS = torch.arange(3, 27)[None]
BOTH = {"embeddings": "8bit", "head": "8bit"}


@st.composite
def matrices(draw: Any) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 9)), 2 * draw(st.integers(1, 12))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(rows, columns, generator=source) * 10.0 ** draw(st.integers(-4, 4))
    values[torch.rand(rows, generator=source) < 0.2] = 0
    # Few entries far from the others, as some rows of embeddings have.
    values[torch.rand(rows, columns, generator=source) < 0.05] *= 50
    return values


@given(matrices(), st.sampled_from([1, 2]), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=80)
def test_rounding_changes_an_entry_by_half_a_scale(values: torch.Tensor, groups: int, dtype: torch.dtype) -> None:
    codes, scale = eight_bits(values, groups, dtype)
    assert (codes.dtype, codes.shape, scale.dtype) == (torch.int8, values.shape, dtype)
    assert scale.shape == (len(values), groups)
    back = decoded_rows(codes, scale.float())
    wide = scale.float().repeat_interleave(values.shape[1] // groups, 1)
    assert bool(((back - values).abs() <= wide * 0.5001).all())
    # No code is wasted: the largest of each group has the largest code, up to the rounding of the scale.
    largest = codes.int().abs().unflatten(-1, (groups, -1)).amax(-1)
    assert bool(((largest >= 126) | (scale == 0)).all())
    assert torch.equal(eight_bits(-values, groups, dtype)[0], -codes)
    if dtype is torch.float32:
        assert torch.equal(eight_bits(back, groups)[0], codes)


def family(kind: str) -> Any:
    """A tiny model: its embeddings are tied, or scaled, or stand beside positions, or its head has a bias."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
    small = {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return {
        "untied": tiny_llama,
        "tied": lambda: tiny_llama(tie_word_embeddings=True),
        "scaled": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**shape, num_key_value_heads=1, head_dim=16)),
        "positions": lambda: GPT2LMHeadModel(GPT2Config(**small, initializer_range=0.1)),
        "bias": lambda: PhiForCausalLM(PhiConfig(**shape)),
    }[kind]().eval()


KINDS = ["untied", "tied", "scaled", "positions", "bias"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_with_codes_says_what_it_says_with_their_numbers(kind: str) -> None:
    model = family(kind)
    if kind == "bias":
        model.lm_head.bias.normal_()
    names = [name for name, _ in model.named_parameters()]
    before, tied = model(input_ids=IDS).logits, model.config.tie_word_embeddings
    embedding = type(model.get_input_embeddings())
    parts = vocabulary_parts(model, True, True)
    replaced = code_vocabulary(model, parts)
    coded = model(input_ids=IDS).logits
    assert len(coded_buffers(model)) == (1 if tied else 2)
    assert sum(codes.numel() for codes in coded_buffers(model).values()) == (1 if tied else 2) * 2048 * 32
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(input_ids=IDS).logits, coded)
        assert not tied or each.get_output_embeddings().tied[0] is each.get_input_embeddings()
    half = copy.deepcopy(model).to(torch.bfloat16)(input_ids=IDS).logits
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), coded, atol=0.1 * float(coded.std()), rtol=0.1)
    decode_vocabulary(model)
    assert type(model.get_input_embeddings()) is embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    numbers = model(input_ids=IDS).logits
    torch.testing.assert_close(coded, numbers, atol=1e-4 * float(before.std()), rtol=1e-4)
    assert 0 < float((numbers - before).norm() / before.norm()) < 0.1
    assert [name for name, _ in model.named_parameters()] == names
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for module, weight in replaced:
        module.weight = weight
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_gradients_go_through_a_head_of_codes_as_through_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.layers.vocabulary._NUMBERS", 32 * 100)
    model = family("untied")
    code_vocabulary(model, vocabulary_parts(model, False, True))
    head = model.get_output_embeddings()
    assert isinstance(head, CodedHead)
    x = torch.randn(2, 3, 32, requires_grad=True)
    wanted = torch.randn(2, 3, 2048)
    found = torch.autograd.grad((head(x) * wanted).sum(), x)[0]
    expected = torch.autograd.grad((nn.functional.linear(x, head.weight) * wanted).sum(), x)[0]
    torch.testing.assert_close(found, expected)
    # Losses in chunks of tokens find the head too.
    parted = Head(model, IDS)
    assert parted.apart
    torch.testing.assert_close(parted(IDS).of(slice(None))[0], model(input_ids=IDS).logits[0])


def checkpoint(folder: Path, model: Any) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


Settings = Callable[..., dict[str, Any]]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tied", "scaled"])
def test_a_checkpoint_holds_one_matrix_and_loads_without_rankwise(
    kind: str, settings: Settings, tmp_path: Path
) -> None:
    source, out = checkpoint(tmp_path / "source", family(kind)), tmp_path / "out"
    values = settings(model=str(source), method="svd", head="8bit")
    plain = compress(recipe_from(values | {"head": None}), run_directory=tmp_path / "run").report
    report = compress(recipe_from({**values, "output": str(out)}), run_directory=tmp_path / "run").report
    # Two bytes a number become one, and two a row.
    assert plain.after.bytes - report.after.bytes == 2048 * (32 - 2)
    assert plain.after.parameters == report.after.parameters
    state = load_file(out / "model.safetensors")
    codes = [name for name, tensor in state.items() if tensor.dtype == torch.int8]
    assert len(codes) == 1
    assert not any(name.startswith("lm_head") or name == "model.embed_tokens.weight" for name in state)
    assert sum(tensor.nbytes for tensor in state.values()) == report.after.bytes
    assert any("one matrix, are stored in 8 bits" in note and "131.07 KB" in note for note in report.notes)
    config = json.loads((out / "config.json").read_text())
    assert config["rankwise"]["format"] == 7
    loaded = load_model(str(out))
    with pytest.raises(ValueError, match="cannot be resized"):
        loaded.model.resize_token_embeddings(4096)
    assert loaded.model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 26)
    dense = load_model(str(source)).model
    found, whole = (count_operations(each, torch.bfloat16) for each in (loaded.model, dense))
    assert found.weight_bytes == report.after.bytes
    lost = whole.linear_parameters - found.linear_parameters
    assert whole.parameters - found.parameters == lost
    assert whole.macs - found.macs == 64 * lost
    elsewhere = load_model(str(out), precision="stored").model
    with torch.no_grad():
        torch.save(elsewhere(input_ids=IDS).logits, tmp_path / "logits.pt")
    words = [sys.executable, "-c", ELSEWHERE, str(out), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_a_size_counts_codes_and_a_fraction_does_not(settings: Settings, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family("tied"))
    values = settings(model=str(source), method="svd", budget={"size": "115KB", "rank_multiple": 1})
    with pytest.raises(BudgetError, match="no weight at all"):
        compress(recipe_from(values), run_directory=tmp_path / "run")
    out = tmp_path / "out"
    made = compress(recipe_from({**values, "embeddings": "8bit", "output": str(out)}), run_directory=tmp_path / "run")
    assert 90_000 < (out / "model.safetensors").stat().st_size <= 115_000
    assert made.report.after.bytes < 115_000
    asked = [
        compress(
            recipe_from(settings(model=str(source), method="svd", **each)), run_directory=tmp_path / "run"
        ).plan.cuts
        for each in ({}, BOTH)
    ]
    assert asked[0] == asked[1]


def test_dense_is_what_the_codes_stand_for(settings: Settings, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family("tied")), tmp_path / "out"
    values = settings(model=str(source), method="svd", format="dense", output=str(out), budget={"keep": 1.0}, **BOTH)
    compress(recipe_from(values), run_directory=tmp_path / "run")
    plain = LlamaForCausalLM.from_pretrained(out)
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    old = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    codes, scale = eight_bits(old)
    assert torch.equal(plain.model.embed_tokens.weight, decoded_rows(codes, scale).to(plain.dtype))
    assert not torch.equal(plain.model.embed_tokens.weight, old)


class _ReadsOtherwise(nn.Embedding):
    """Looks up by itself, past its parent."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input, self.weight)


def test_what_cannot_be_is_refused_by_name(settings: Settings, tmp_path: Path) -> None:
    from rankwise.checkpoints import LoadedModel
    from rankwise.progress import Reporter
    from rankwise.stages.vocabulary import chosen_vocabulary

    def tried(model: Any) -> Any:
        types = {name: p.dtype for name, p in model.named_parameters()}
        recipe = recipe_from(settings(**BOTH))
        return chosen_vocabulary(recipe, LoadedModel(model, None, "", "auto", types), IDS, Reporter(show=False))

    model = family("untied")
    before = model(input_ids=IDS).logits
    assert tried(model).tied is False
    assert torch.equal(model(input_ids=IDS).logits, before)
    model.model.embed_tokens.__class__ = _ReadsOtherwise
    with pytest.raises(ModelError, match="reads them in a way of its own"):
        tried(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    model = family("untied")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="its head is a Sequential"):
        vocabulary_parts(model, False, True)
    model = family("untied")
    model.other = nn.Linear(32, 2048, bias=False)
    model.other.weight = model.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"embed_tokens.weight, other.weight at once"):
        vocabulary_parts(model, True, False)
    with pytest.raises(RecipeError, match="4bit"):
        recipe_from(settings(embeddings="4bit"))
    with pytest.raises(RecipeError, match="not size"):
        recipe_from(settings(method="slicegpt", head="8bit", budget={"size": "1MB"}))


@pytest.mark.long
def test_it_is_scored_and_trained_like_any_other(rankwise: Run, settings: Settings, text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family("tied")), tmp_path / "out"
    scored = {"source": f"text:{text}", "sequences": 4, "length": 32}
    values = settings(model=str(source), output=str(out), evaluation=scored, **BOTH)
    report = compress(recipe_from(values), run_directory=tmp_path / "run").report
    assert report.evaluation is not None
    status, said, err = rankwise("evaluate", out, "--json", "--quiet")
    assert status == 0, err
    assert json.loads(said)["perplexity"] == pytest.approx(report.evaluation.compressed.perplexity, rel=1e-4)
    tuned = tmp_path / "tuned"
    words = ["finetune", out, "-o", tuned, "--data", f"text:{text}", "--method", "lora", "--epochs", 1]
    status, _, err = rankwise(*words, "--length", 32, "--held-out", 4, "--quiet")
    assert status == 0, err
    one, two = (load_file(each / "model.safetensors") for each in (out, tuned))
    assert torch.equal(one["model.embed_tokens.codes"], two["model.embed_tokens.codes"])


def test_damaged_codes_are_refused(rankwise: Run, settings: Settings, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, out = checkpoint(tmp_path / "source", family("untied")), tmp_path / "out"
    values = settings(model=str(source), output=str(out), method="svd", budget={"keep": 1.0}, **BOTH)
    compress(recipe_from(values), run_directory=tmp_path / "run")
    file = out / "model.safetensors"
    state = load_file(file)
    del state["lm_head.scale"]
    save_file(state, file, {"format": "pt"})
    failed(rankwise("generate", out, "--prompt", "a"), "lm_head.scale")
