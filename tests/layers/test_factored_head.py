"""A head of two factors: what it is fitted by, what a checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from conftest import ELSEWHERE, Run, failed, tiny_llama
from rankwise import compress
from rankwise.checkpoints import LoadedModel, load_model
from rankwise.errors import BudgetError, ModelError, RecipeError
from rankwise.evaluation.operations import count_operations
from rankwise.layers import LowRankLinear, decode_vocabulary, substitute, vocabulary_entry
from rankwise.layers.factored_head import head_rank
from rankwise.models import Head
from rankwise.progress import Reporter
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from
from rankwise.stages.head import INPUT_DAMPING, ROW_DAMPING, fit_head, head_site
from rankwise.stages.vocabulary import chosen_vocabulary
from rankwise.statistics.head_moments import HeadMoments, head_moments

IDS = torch.arange(3, 27)[None]
V, D = 2048, 32

Settings = Callable[..., dict[str, Any]]


def family(kind: str) -> Any:
    """A tiny model with a head of its own: with soft-capped logits, or with a bias, or neither."""
    shape: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
    capped = {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    model = {
        "plain": tiny_llama,
        "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**shape, **capped)),
        "bias": lambda: PhiForCausalLM(PhiConfig(**shape)),
    }[kind]().eval()
    if kind == "bias":
        model.lm_head.bias.data.normal_()
    return model


KINDS = ["plain", "capped", "bias"]


def checkpoint(folder: Path, model: Any) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@st.composite
def heads(draw: Any) -> tuple[torch.Tensor, HeadMoments]:
    v, d = draw(st.integers(2, 40)), draw(st.integers(2, 12))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    root = torch.randn(d, d, dtype=torch.float64, generator=source) * 10.0 ** draw(st.integers(-2, 2))
    root[:, : draw(st.integers(0, d - 1))] = 0
    p = torch.randn(v, dtype=torch.float64, generator=source).mul(3).softmax(0)
    return torch.randn(v, d, dtype=torch.float64, generator=source), HeadMoments(root @ root.T, p - p.square())


def lost(weight: torch.Tensor, product: torch.Tensor, seen: HeadMoments) -> float:
    """tr(D E C E^T), D and C damped as the fit damps them."""
    error = weight - product
    inputs = seen.inputs + INPUT_DAMPING * seen.inputs.diagonal().mean() * torch.eye(len(seen.inputs)).double()
    rows = seen.rows + ROW_DAMPING * seen.rows.mean()
    return float((rows * ((error @ inputs) * error).sum(1)).sum())


@given(heads(), st.data())
@settings(max_examples=60)
def test_no_other_factors_of_its_rank_lose_less(made: tuple[torch.Tensor, HeadMoments], data: Any) -> None:
    weight, seen = made
    most = min(weight.shape)
    rank = data.draw(st.integers(1, most))
    with patch("rankwise.stages.head._ROWS", 7):
        factors, share = fit_head(weight, seen, rank)
    product = factors.reconstruct()
    assert (factors.pair()[0].shape, factors.pair()[1].shape) == ((len(weight), rank), (rank, weight.shape[1]))
    whole = lost(weight, torch.zeros_like(weight), seen)
    assert lost(weight, product, seen) == pytest.approx(share * whole, abs=1e-9 * whole)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert lost(weight, product, seen) <= lost(weight, plain, seen) + 1e-9 * whole
    # Inputs alone, and rows alone, are the answers of other questions.
    for other in (
        HeadMoments(seen.inputs, torch.ones_like(seen.rows)),
        HeadMoments(torch.eye(len(seen.inputs)).double(), seen.rows),
    ):
        assert (
            lost(weight, product, seen)
            <= lost(weight, fit_head(weight, other, rank)[0].reconstruct(), seen) + 1e-9 * whole
        )
    if rank == most:
        torch.testing.assert_close(product, weight, atol=1e-6, rtol=1e-6)


@given(st.integers(1, 300), st.integers(1, 80), st.floats(0.01, 0.99), st.sampled_from([1, 8]))
def test_a_rank_is_the_largest_within_its_fraction(v: int, d: int, keep: float, multiple: int) -> None:
    rank = head_rank((v, d), keep, multiple)
    assert 1 <= rank <= min(v, d)
    assert rank == 1 or rank * (v + d) <= keep * v * d
    step = multiple if rank >= multiple else 1
    assert (rank + step) * (v + d) > keep * v * d * (1 - 1e-12)
    assert rank < multiple or rank % multiple == 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_moments_are_of_what_the_head_reads_and_the_model_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = family(kind), torch.arange(3, 99).view(4, 24)
    read: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0].flatten(0, 1)))
    p = model(input_ids=ids).logits.flatten(0, 1).softmax(-1).double()
    handle.remove()
    x = read[0].double()
    # A few tokens at a time, and sequences in batches that are not alike.
    monkeypatch.setattr("rankwise.models.head.LOGITS", 7 * V)
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr("rankwise.models.head.Head._agrees", lambda self, probe: setattr(self, "vocabulary", V))
        found = head_moments(model, ids, 3)
        torch.testing.assert_close(found.inputs, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.rows, (p - p.square()).mean(0), rtol=1e-4, atol=1e-8)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_a_model_says_what_it_said(kind: str) -> None:
    model = family(kind)
    before = model(input_ids=IDS).logits.detach()
    site = head_site(model)
    names = [name for name, _ in model.named_parameters()]
    factors, _ = fit_head(site.weight(model).double(), head_moments(model, IDS, 1), D)
    factors = type(factors)(factors.left, factors.right, site.bias(model))
    head = substitute(model, site.name, factors, "two_factor", torch.float32)
    assert vocabulary_entry(model) == {"head": {"path": "lm_head", "rank": D, "bias": kind == "bias"}}
    scale = float(before.std())
    torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-4 * scale, rtol=1e-4)
    # Losses in chunks of tokens find it, and gradients go through it.
    parted = Head(model, IDS)
    assert parted.apart
    torch.testing.assert_close(parted(IDS).of(slice(None))[0], model(input_ids=IDS).logits[0])
    x = torch.randn(3, D, requires_grad=True)
    wanted = torch.randn(3, V)
    expected = torch.autograd.grad((x @ head.dense_weight().float().T * wanted).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((head(x) * wanted).sum(), x)[0], expected, atol=1e-3, rtol=1e-3)
    decode_vocabulary(model)
    assert type(model.lm_head) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", ["capped", "bias"])
def test_a_checkpoint_holds_two_factors(kind: str, settings: Settings, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family(kind)), tmp_path / "out"
    values = settings(model=str(source), method="svd", budget={"keep": 0.6})
    plain = compress(recipe_from(values), run_directory=tmp_path / "run").report
    given = {**values, "head": "low-rank", "output": str(out)}
    made = compress(recipe_from(given), run_directory=tmp_path / "run")
    report, bias = made.report, kind == "bias"
    # 0.6 of 2048 x 32 numbers is rank 18, of which 16 is a multiple of 8.
    assert plain.after.bytes - report.after.bytes == 2 * (V * D - 16 * (V + D))
    assert plain.after.parameters - report.after.parameters == V * D - 16 * (V + D)
    assert plain.keep == report.keep
    state = load_file(out / "model.safetensors")
    held = {name: list(tensor.shape) for name, tensor in state.items() if name.startswith("lm_head")}
    assert held == {"lm_head.left.weight": [V, 16], "lm_head.right.weight": [16, D]} | (
        {"lm_head.left.bias": [V]} if bias else {}
    )
    assert {state[name].dtype for name in held} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in state.values()) == report.after.bytes
    assert any("two factors of rank 16: 131.07 KB become 66.56 KB" in note for note in report.notes)
    entry = json.loads((out / "config.json").read_text())["rankwise"]
    assert (entry["format"], entry["vocabulary"]) == (10, {"head": {"path": "lm_head", "rank": 16, "bias": bias}})
    loaded = load_model(str(out))
    assert isinstance(loaded.model.lm_head, LowRankLinear)
    with pytest.raises(ValueError, match="cannot be resized"):
        loaded.model.resize_token_embeddings(4096)
    assert loaded.model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 26)
    found, whole = (count_operations(m, torch.bfloat16) for m in (loaded.model, load_model(str(source)).model))
    assert found.weight_bytes == report.after.bytes
    lost = whole.linear_parameters - found.linear_parameters + V * D - 16 * (V + D)
    assert whole.parameters - found.parameters == lost
    assert whole.macs - found.macs == 64 * lost
    with pytest.raises(ModelError, match="compressed already"):
        compress(recipe_from(settings(model=str(out), head="low-rank:0.5")), run_directory=tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_where_rankwise_is_not_installed(kind: str, settings: Settings, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family(kind)), tmp_path / "out"
    given = settings(model=str(source), method="svd", head="low-rank:0.4", embeddings="8bit", output=str(out))
    compress(recipe_from(given), run_directory=tmp_path / "run")
    elsewhere = load_model(str(out), precision="stored").model
    with torch.no_grad():
        torch.save(elsewhere(input_ids=IDS).logits, tmp_path / "logits.pt")
    words = [sys.executable, "-c", ELSEWHERE, str(out), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_a_size_counts_factors_and_multiplied_back_they_are_a_plain_head(settings: Settings, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family("plain")), tmp_path / "out"
    values = settings(model=str(source), method="svd", budget={"size": "220KB", "rank_multiple": 1})
    with pytest.raises(BudgetError, match="no weight at all"):
        compress(recipe_from(values), run_directory=tmp_path / "run")
    given = {**values, "head": "low-rank", "output": str(out), "memory": "blocks"}
    compress(recipe_from(given), run_directory=tmp_path / "run")
    assert 200_000 < (out / "model.safetensors").stat().st_size <= 220_000
    low_rank = load_model(str(out)).model.lm_head
    assert low_rank.right.weight.shape == (head_rank((V, D), 0.5), D)
    dense = tmp_path / "dense"
    compress(recipe_from({**given, "format": "dense", "output": str(dense)}), run_directory=tmp_path / "run")
    plain = LlamaForCausalLM.from_pretrained(dense)
    assert torch.equal(plain.lm_head.weight, low_rank.dense_weight().to(plain.dtype))


class _ReadsItsWeight(LlamaForCausalLM):
    """Multiplies by the head's matrix itself."""

    def forward(self, **given: Any) -> Any:
        found = super().forward(**given)
        found.logits = found.logits + self.lm_head.weight.sum()
        return found


def test_what_cannot_be_is_refused_by_name(settings: Settings) -> None:
    def tried(model: Any, head: str = "low-rank") -> Any:
        types = {name: p.dtype for name, p in model.named_parameters()}
        recipe = recipe_from(settings(head=head))
        return chosen_vocabulary(recipe, LoadedModel(model, None, "", "auto", types), IDS, Reporter(show=False))

    model = family("capped")
    before = model(input_ids=IDS).logits
    parts = tried(model)
    assert (parts.coded, parts.rank) == (False, 18)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert tried(model, "low-rank:0.1").rank == 3
    with pytest.raises(ModelError, match=r"(?s)one matrix with the embeddings.*--head 8bit"):
        tried(tiny_llama(tie_word_embeddings=True))
    model = family("plain")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="it is a Sequential"):
        tried(model)
    model = family("plain")
    model.__class__ = _ReadsItsWeight
    head = model.lm_head
    with pytest.raises(ModelError, match="two factors: its forward reads them in a way of its own"):
        tried(model)
    assert model.lm_head is head
    model = family("plain")
    model.other = nn.Linear(D, V, bias=False)
    model.other.weight = model.lm_head.weight
    with pytest.raises(ModelError, match=r"lm_head.weight, other.weight at once"):
        tried(model)


@pytest.mark.parametrize(
    "text", ["low-rank:2", "low-rank:0", "low-rank:", "low-rank:abc", "low-rank:nan", "low-rank:-1"]
)
def test_a_fraction_is_above_zero_and_below_one(text: str, rankwise: Run, tiny: Path, tmp_path: Path) -> None:
    failed(rankwise("compress", tiny, "-o", tmp_path / "out", "--head", text), "as in low-rank:0.6", text)


def test_heads_that_there_are_not_are_refused(settings: Settings) -> None:
    for text in ("4bit", "low_rank", "8bit:0.5", ""):
        with pytest.raises(RecipeError, match="there is no such head"):
            recipe_from(settings(head=text))
    with pytest.raises(RecipeError, match="cuts the head itself"):
        recipe_from(settings(method="slicegpt", head="low-rank"))
    with pytest.raises(RecipeError, match="write head low-rank"):
        recipe_from(settings(head="low-rank", budget={"keep": 1.0}))
    assert recipe_from(settings(head="low-rank", budget={"keep": 0.7})).head_keep == 0.7
    assert recipe_from(settings(head="low-rank", method="quantize", budget={"bits": 3})).head_keep == 0.5
    assert recipe_from(settings(head="low-rank:0.4", budget={"keep": 1.0})).head_keep == 0.4
    assert recipe_from(settings(head="8bit")).head_keep is None


@pytest.mark.long
def test_it_is_scored_and_trained_like_any_other(rankwise: Run, settings: Settings, text: Path, tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "source", family("plain")), tmp_path / "out"
    scored = {"source": f"text:{text}", "sequences": 4, "length": 32}
    values = settings(model=str(source), output=str(out), evaluation=scored, head="low-rank")
    report = compress(recipe_from(values), run_directory=tmp_path / "run").report
    assert report.evaluation is not None
    status, said, err = rankwise("evaluate", out, "--json", "--quiet")
    assert status == 0, err
    assert json.loads(said)["perplexity"] == pytest.approx(report.evaluation.compressed.perplexity, rel=1e-4)
    tuned = tmp_path / "tuned"
    words = ["finetune", out, "-o", tuned, "--data", f"text:{text}", "--method", "lora", "--epochs", 1]
    status, _, err = rankwise(*words, "--loss", "kl", "--length", 32, "--held-out", 4, "--quiet")
    assert status == 0, err
    one, two = (load_file(each / "model.safetensors") for each in (out, tuned))
    assert torch.equal(one["lm_head.left.weight"], two["lm_head.left.weight"])
