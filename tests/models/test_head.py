"""Logits in parts, and blocks made again in the backward pass: the same numbers as all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from rankwise.evaluation import perplexity
from rankwise.models import BlockRunner, Head, decoder_blocks, find_sites, head, recomputed, share_inputs
from rankwise.statistics import passes
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.passes import collect

IDS = torch.randint(0, 2048, (3, 12), generator=torch.Generator().manual_seed(1))


def quarter(raw: Tensor, part: slice) -> Tensor:
    """A loss that is not the same for every token."""
    weight = torch.arange(part.start, part.stop) / 4
    return (raw.float().logsumexp(-1) * weight).sum()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS", 5 * 2048)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("cut", [True, False])
def test_a_sum_over_parts_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    model: Any = tiny_llama()
    whole = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = torch.autograd.grad(quarter(whole, slice(0, len(whole))), weight)[0]
    if not cut:
        monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    made = Head(model, IDS)
    assert made.apart is cut
    logits = made(IDS).predicting()
    assert [part.stop - part.start for part in logits.parts()] == [5, 5, 5, 5, 5, 5, 3]
    torch.testing.assert_close(torch.cat([logits.of(part) for part in logits.parts()]), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(logits.sum(quarter), weight)[0], expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        value = made(IDS).predicting().sum(quarter)
    assert float(value) == pytest.approx(float(quarter(whole.detach(), slice(0, len(whole)))), rel=1e-5)
    assert "forward" not in model.model.__dict__


@pytest.mark.usefixtures("in_parts")
def test_no_more_logits_are_made_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: made.append(out[..., 0].numel()))
    sites = share_inputs(model, find_sites(model), IDS[:1])
    made.clear()
    perplexity(model, IDS)
    collect(model, sites, IDS, [Curvature(labels="sampled")], batch_size=3)
    # The probes of the cut have 8 tokens, and every sequence is asked for its first one when the decoder runs.
    assert max(made) <= 8
    assert sum(made) > 2 * 33


@pytest.mark.parametrize("labels", ["text", "sampled"])
def test_statistics_do_not_depend_on_the_parts_or_on_blocks_made_again(
    monkeypatch: pytest.MonkeyPatch, labels: Any
) -> None:
    model: Any = tiny_llama()
    sites = share_inputs(model, find_sites(model), IDS[:1])

    def found(batch_size: int) -> list[Tensor]:
        asked = Curvature(labels=labels)
        totals = collect(model, sites, IDS, [asked], batch_size=batch_size)[asked]
        return [totals[key].blocks for key in sorted(totals, key=str)]

    once = found(3)
    monkeypatch.setattr(head, "LOGITS", 5 * 2048)
    monkeypatch.setattr(passes, "RECOMPUTE_BEYOND", 0)
    whole = [found(3), found(2)]
    monkeypatch.setattr(BlockRunner, "alone", lambda _self: False)
    for again in [*whole, found(3), found(2)]:
        for mine, theirs in zip(once, again, strict=True):
            # Of entries that all but cancel, float32 keeps few digits.
            torch.testing.assert_close(theirs, mine, atol=1e-5 * float(mine.abs().max()), rtol=1e-3)
    assert "forward" not in model.model.layers[0].__dict__


def test_blocks_made_again_keep_nothing_but_their_inputs() -> None:
    model: Any = tiny_llama()
    blocks = list(decoder_blocks(model)[1])
    inside: list[bool] = []
    blocks[0].mlp.up_proj.register_forward_hook(lambda _m, _a, out: inside.append(out.requires_grad))
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    model.requires_grad_(False)
    with recomputed(blocks):
        model(input_ids=IDS).logits.sum().backward()
    assert inside == [False, True]
