"""Layers call their children: what others hang on those (offloading, adapters) takes part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import IDS, tiny_llama
from rankwise.factors import Factors
from rankwise.layers import cache_dense, substitute
from rankwise.models import find_sites
from rankwise.quantizers import Packed, Rotation, codebook_named

FORMS = ("two_factor", "pivoted", "codes", "codes+numbers", "codes+codes", "mixed", "signs", "numbers")


def coded(weight: Tensor, bits: int = 4) -> Packed:
    return codebook_named("uniform", bits, by_row=True).quantize(weight)


def factors_of(weight: Tensor, bias: Tensor, form: str) -> Factors:
    """A weight in one of the forms that a checkpoint may hold."""
    m, n = weight.shape
    rank = min(m, n) // 2
    rotation = Rotation.drawn(m, n, torch.Generator().manual_seed(0))
    if form == "signs":
        rotation = Rotation(torch.rand(n) + 0.5, torch.rand(m) - 1.5)
    target = weight if form in ("two_factor", "pivoted") else rotation.weight(weight)
    q = None if form in ("two_factor", "pivoted", "numbers") else coded(target, 2)
    u, s, v = torch.linalg.svd(target if q is None else target - q.dense(), full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * v[:rank]
    if q is None and form != "numbers":
        return Factors(left, right, bias)
    full = {"codes": 0, "codes+codes": 0, "mixed": rank // 2}.get(form, rank)
    packed = None
    if full < rank and form != "codes":
        packed = coded(left[:, full:].T.contiguous()), coded(right[full:])
    numbers = (left[:, :full], right[:full]) if full else (None, None)
    return Factors(*numbers, bias, q=q, packed=packed, rotation=rotation)


def compressed(form: str) -> Any:
    """A tiny model whose sites are all in one form, 16-bit where the form has such numbers."""
    model = tiny_llama()
    torch.manual_seed(1)
    for site in find_sites(model):
        factors = factors_of(site.weight(model).double(), 0.1 * torch.randn(site.m), form)
        kind = form if form in ("two_factor", "pivoted") else "quantized"
        substitute(model, site.name, factors, kind, torch.float32)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([IDS])).logits


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest) -> Any:
    return compressed(request.param)


@pytest.mark.parametrize("buffers", [False, True])
def test_logits_stay_right_where_all_that_is_stored_is_offloaded(model: Any, buffers: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(model)
    for cached in (False, True):
        offloaded = copy.deepcopy(model)
        cache_dense(offloaded, cached)
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert any(p.device.type == "meta" for p in offloaded.parameters())
        for _ in range(2):
            torch.testing.assert_close(logits(offloaded), expected, atol=1e-4, rtol=1e-4)


def test_logits_stay_right_from_disk(model: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, offloaded = logits(model), copy.deepcopy(model)
    where = {"": "cpu", "model.layers.0": "disk", "model.layers.1.mlp": "disk", "lm_head": "cpu"}
    where = {name: place for name, place in where.items() if name}
    where |= {"model.embed_tokens": "cpu", "model.layers.1.self_attn": "cpu", "model.norm": "cpu"}
    where |= {"model.layers.1.input_layernorm": "cpu", "model.layers.1.post_attention_layernorm": "cpu"}
    where |= {"model.rotary_emb": "cpu"}
    accelerate.dispatch_model(
        offloaded, where, main_device="cpu", offload_dir=tmp_path, offload_buffers=True, force_hooks=True
    )
    assert any(p.device.type == "meta" for p in offloaded.model.layers[0].parameters())
    assert torch.equal(logits(offloaded), expected)


def test_what_peft_adapts_learns(model: Any) -> None:
    peft = pytest.importorskip("peft")
    children = {
        name.rpartition(".")[2] for name, each in model.model.layers.named_modules() if isinstance(each, nn.Linear)
    }
    if not children:
        pytest.skip("no layer of numbers is in it")
    assert children <= {"left", "right", "first", "rest"}
    config = peft.LoraConfig(r=2, target_modules=sorted(children), init_lora_weights=False, task_type="CAUSAL_LM")
    expected = logits(model)
    base = copy.deepcopy(model)
    cache_dense(base, True)
    logits(base)
    adapted = peft.get_peft_model(base, config)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(children) * len(find_sites(tiny_llama()))
    changed = logits(adapted)
    assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    steering = torch.optim.SGD(trained.values(), lr=0.1)
    before = {name: p.detach().clone() for name, p in trained.items()}
    ids = torch.tensor([IDS])
    adapted(input_ids=ids, labels=ids).loss.backward()
    steering.step()
    for name, p in trained.items():
        assert not torch.equal(p, before[name]), name
    assert not torch.equal(logits(adapted), changed)
    merged = adapted.merge_and_unload()
    assert (logits(merged) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_a_weight_kept_dequantised_is_made_anew_after_training() -> None:
    model = compressed("codes+numbers")
    layer = model.model.layers[0].mlp.up_proj
    cache_dense(model, True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(x), expected)
    layer(x)
    with torch.no_grad():
        layer.left.weight.mul_(2)
        torch.testing.assert_close(layer(x), layer._product(x) + layer.bias, atol=1e-4, rtol=1e-4)
        assert (layer(x) - expected).abs().max() > 1e-3
