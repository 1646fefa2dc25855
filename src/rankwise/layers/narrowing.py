"""A model's residual stream turned to its principal directions and cut (SliceGPT, Ashkboos et al., 2024, section 3).

RMSNorm without gain commutes with an orthogonal Q, so that a stream may be turned where every reader and writer of it
turns along, and what is last in the turned coordinates may be left out. Vectors are rows: x Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.layers.kinds import dense_layer
from rankwise.layers.narrow import ADAPTERS, NarrowNorm, carry
from rankwise.linalg import of_equal_norm, principal_directions, second_moment
from rankwise.models import BlockRunner, PreNorm
from rankwise.models.forwards import forward_of
from rankwise.models.pre_norm import Half

Tokens = Literal["normalised", "raw"]
"""How tokens weigh in a second moment: all the same, each divided by its norm, or as they are (the released code), so
that few of massive norm decide."""

Known = dict[str, Tensor]
"""Directions by the point of the stream that they are of: columns of a Q, shape `[d, k]`, float64."""

Track = Callable[[Sequence[int]], Iterable[int]]

_EMBEDDED = "embedded"

_AGREEMENT = 1e-3
"""Difference of logits that is rounding, relative to the largest; above that of float32, far below any other form's."""


@dataclass
class Directions:
    """Sums up the second moment of a stream, and gives its principal directions, rounded to float32 as files hold them.

    Args:
        eps: of the model's norms.
        tokens: how they weigh.
    """

    eps: float
    tokens: Tokens
    _moment: Tensor | None = field(default=None, init=False)

    def add(self, stream: Tensor) -> None:
        """Take in some tokens, shape `[..., d]`."""
        wide = stream.detach().double()
        found = second_moment(of_equal_norm(wide, self.eps) if self.tokens == "normalised" else wide)
        self._moment = found if self._moment is None else self._moment.add_(found)

    def found(self) -> Tensor:
        """Q, shape `[d, d]`, float64, the direction that holds most first."""
        assert self._moment is not None
        return principal_directions(self._moment).float().double()


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """W diag(gain) in float64: what a reader becomes when the norm before it loses its gain.

    Args:
        weight: W, shape `[m, d]`.
        gain: shape `[d]`.
    """
    return weight.double() * gain.double()


def residual_adapter(before: Tensor, after: Tensor) -> Tensor:
    """S = Q_before^T Q_after, which carries a stream from one cut basis into the next, shape `[k_1, k_2]`.

    Args:
        before: columns of an orthogonal matrix, shape `[d, k_1]`.
        after: of another, shape `[d, k_2]`.
    """
    return before.T @ after


def check_form(model: Any, form: PreNorm, probe: Tensor) -> None:
    """Find out whether blocks with adapters that change nothing give what the model gives.

    Args:
        model: the dense model; as it was afterwards.
        form: what it seems to be made of.
        probe: token ids, shape `[1, tokens]`.

    Raises:
        ModelError: naming the architecture, when they do not.
    """
    blocks = list(model.base_model.get_submodule(form.blocks))
    plain, listed = [type(block) for block in blocks], getattr(model, "_no_split_modules", None)
    problem, agree = "", False
    with torch.no_grad():
        goal = model(input_ids=probe, use_cache=False).logits.float()
        try:
            for block in blocks:
                carry(model, block)
            found = model(input_ids=probe, use_cache=False).logits.float()
            allowed = max(_AGREEMENT, 16 * torch.finfo(model.dtype).eps) * goal.abs().max()
            agree = found.shape == goal.shape and bool((found - goal).abs().max() <= allowed)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as raised:
            problem = f" ({raised})"
        finally:
            for block, kind in zip(blocks, plain, strict=True):
                block.__class__ = kind
                for name in ADAPTERS:
                    delattr(block, name)
            if listed is not None:
                model._no_split_modules = listed
    if not agree:
        name = type(model).__name__
        raise ModelError(
            f"{name} cannot be sliced: its blocks do more than z + attention(norm(z)), then z + mlp(norm(z)){problem}.",
            where=name,
            remedy="take a method of low rank",
        )


def _put(parent: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None, like: Tensor | None = None) -> None:
    """A linear layer with these values, shapes `[m, n]` and `[m]`, in the type of `like` or of what stood there."""
    old = parent.get_submodule(path).weight if like is None else like
    setattr(*_place(parent, path), dense_layer(weight, bias, False, old.dtype, old.device))  # type: ignore[arg-type]


def _place(parent: nn.Module, path: str) -> tuple[nn.Module, str]:
    where, _, name = path.rpartition(".")
    return parent.get_submodule(where), name


def _turn_readers(block: nn.Module, half: Half, q: Tensor, scale: float = 1.0) -> None:
    """W <- scale W diag(gain) Q for what reads the stream behind a norm; q of shape `[d, k]`."""
    gain: Any = block.get_submodule(half.norm).weight
    for path in half.readers:
        old: Any = block.get_submodule(path)
        _put(block, path, fold_gain(old.weight, gain) @ q * scale, old.bias)


def _turn_writer(block: nn.Module, half: Half, q: Tensor) -> None:
    """W <- Q^T W, b <- Q^T b for what adds to the stream; q of shape `[d, k]`."""
    old: Any = block.get_submodule(half.writer)
    _put(block, half.writer, q.T @ old.weight.double(), None if old.bias is None else old.bias.double() @ q)


def _turn_embeddings(model: Any, q: Tensor) -> None:
    """E <- E Q; a head that shared them keeps them as they were."""
    old = model.get_input_embeddings()
    new = nn.Embedding(old.num_embeddings, q.shape[1], old.padding_idx, device="meta")
    new.weight = nn.Parameter((old.weight.double() @ q).to(old.weight.dtype), requires_grad=False)
    model.set_input_embeddings(new)
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def _after_mlp(block: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return block.after_mlp(hidden)


@torch.no_grad()
def slice_with_adapters(
    model: Any, form: PreNorm, kept: int, runner: BlockRunner, tokens: Tokens, known: Known, track: Track = iter
) -> None:
    """Cut the stream before and within every block, each in directions of its own, what is upstream being cut already.

    The stream behind the last block stays whole, in its own coordinates, so that the last norm and the head stay too.

    Args:
        model: the causal language model, changed in place.
        form: what it is made of.
        kept: k, at most d.
        runner: of this model, on the calibration sequences.
        tokens: how they weigh.
        known: directions by point, which are used where all are there; else filled.
        track: goes over the blocks.
    """
    blocks, (attention, mlp) = runner.blocks, form.halves
    device = runner.device
    whole = bool(known)
    stream = torch.empty(0)
    if not whole:
        # What blocks are handed beside the stream is learned while they fit together.
        for part in runner.batches():
            runner.learn(len(runner.ids[part]))
        # The stream in the coordinates of the original, as the cut blocks so far give it.
        stream = runner.embed(torch.empty(runner.shape))
        seen = Directions(form.eps, tokens)
        for part in runner.batches():
            seen.add(stream[part].to(device))
        known[_EMBEDDED] = seen.found()[:, :kept].cpu()
    q = known[_EMBEDDED].to(device)
    _turn_embeddings(model, q)
    shapes = []

    def go_on(index: int, name: str, half: Callable[..., Tensor], before: Tensor) -> Tensor:
        """Run half a block on the cut stream; the directions of what comes out, shape `[d, k]`."""
        point = f"{index}.{name}"
        if not whole:
            found = Directions(form.eps, tokens)
            with forward_of(blocks[index], half):
                for part in runner.batches():
                    out = runner.run(index, stream[part].to(device) @ before.float())
                    found.add(out)
                    stream[part] = out.cpu()
            known[point] = found.found()[:, :kept].cpu()
        return known[point].to(device)

    for index in track(range(len(blocks))):
        block: Any = blocks[index]
        like, last = block.get_submodule(attention.writer).weight, index == len(blocks) - 1
        carry(model, block)
        # Until a half's own directions are known, its adapter leads back to the original coordinates.
        _turn_readers(block, attention, q)
        block.set_submodule(attention.norm, NarrowNorm(form.width, form.eps))
        _put(block, ADAPTERS[0], q, like=like)
        q_mid = go_on(index, ADAPTERS[0], block.after_attention, q)
        _turn_writer(block, attention, q_mid)
        _put(block, ADAPTERS[0], residual_adapter(q, q_mid).T, like=like)
        _turn_readers(block, mlp, q_mid)
        block.set_submodule(mlp.norm, NarrowNorm(form.width, form.eps))
        _put(block, ADAPTERS[1], q_mid, like=like)
        if not last:
            mlp_alone = partial(_after_mlp, block)
            after = go_on(index, ADAPTERS[1], mlp_alone, q_mid)
            _turn_writer(block, mlp, after)
            _put(block, ADAPTERS[1], residual_adapter(q_mid, after).T, like=like)
            q = after
        shapes.append([list(block.get_submodule(name).weight.shape) for name in ADAPTERS])
    model.base_model.rankwise_stream = {
        "width": form.width,
        "kept": kept,
        "eps": form.eps,
        "blocks": form.blocks,
        "readers": [list(half.readers) for half in form.halves],
        "writers": [half.writer for half in form.halves],
        "adapters": shapes,
    }


@torch.no_grad()
def slice_by_one_rotation(
    model: Any, form: PreNorm, kept: int, runner: BlockRunner, tokens: Tokens, known: Known, track: Track = iter
) -> None:
    """Turn the whole stream by one Q and cut it; no adapter is needed, and the model is a plain one of width k.

    A usual norm over k numbers with the epsilon eps d / k gives sqrt(k / d) times what the cut norm should. Its readers
    take sqrt(d / k), not its gain, which would be rounded alike for all of them.

    Args:
        model: the causal language model, changed in place, its config too.
        form: what it is made of.
        kept: k, at most d.
        runner: of this model, on the calibration sequences.
        tokens: how they weigh.
        known: the directions, if it is not empty; else filled.
        track: goes over the starts of the batches.
    """
    base, blocks, device = model.base_model, runner.blocks, runner.device
    if not known:
        seen = Directions(form.eps, tokens)
        norms = [block.get_submodule(half.norm) for block in blocks for half in form.halves] + [base.norm]
        handles = [norm.register_forward_pre_hook(lambda _, given: seen.add(given[0])) for norm in norms]
        try:
            for start in track(range(0, len(runner.ids), runner.batch_size)):
                base(input_ids=runner.ids[start : start + runner.batch_size].to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        known[_EMBEDDED] = seen.found()[:, :kept].cpu()
    q = known[_EMBEDDED].to(device)
    scale, eps = (form.width / kept) ** 0.5, form.eps * form.width / kept
    _turn_embeddings(model, q)

    def plain_norm(old: nn.Module) -> nn.Module:
        new: Any = type(old)(kept, eps=eps)
        return new.to(device, old.weight.dtype).requires_grad_(False)

    for block in blocks:
        for half in form.halves:
            _turn_readers(block, half, q, scale)
            _turn_writer(block, half, q)
            block.set_submodule(half.norm, plain_norm(block.get_submodule(half.norm)))
        for path in form.head_norms:
            # The config has one epsilon for all norms, so what is normalised grows as it did.
            norm, reader = block.get_submodule(path), block.get_submodule(path.replace("_norm", "_proj"))
            setattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", eps)
            for parameter in reader.parameters():
                parameter.mul_(scale)
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    _put(model, name, fold_gain(head.weight, base.norm.weight) @ q * scale, head.bias)
    base.norm = plain_norm(base.norm)
    config = model.config
    config.head_dim = getattr(config, "head_dim", None) or form.width // config.num_attention_heads
    config.hidden_size, config.rms_norm_eps = kept, eps


def accepts_width(config: Any, width: int) -> bool:
    """Whether a config of this architecture may say so many hidden numbers beside its heads."""
    if not hasattr(config, "rms_norm_eps"):
        return False
    tried = type(config).from_dict({**config.to_dict(), "head_dim": 2})
    try:
        tried.hidden_size = width
        getattr(tried, "validate_architecture", lambda: None)()
    except ValueError:
        return False
    return True
