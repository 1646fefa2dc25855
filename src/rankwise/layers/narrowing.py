"""A model's residual stream turned to its principal directions and cut (SliceGPT, Ashkboos et al., 2024, section 3).

RMSNorm without gain commutes with an orthogonal Q, so that a stream may be turned where every reader and writer of it
turns along, and what is last in the turned coordinates may be left out. LayerNorm is RMSNorm of x M, M = I - 1 1^T / d:
where all writers write what has no mean, M is behind them. Vectors are rows: x Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.layers.kinds import dense_layer, kind_of
from rankwise.layers.narrow import LLAMA_FORM, NarrowNorm, adapters_of, carry, narrow_embedding
from rankwise.layers.stream_form import said_form
from rankwise.linalg import of_equal_norm, principal_directions, second_moment, without_mean
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


def fold_shift(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    """b + W s in float64: what the bias of a reader becomes when the norm before it no longer adds s.

    Args:
        weight: W, shape `[m, d]`.
        bias: b, shape `[m]`, or None for zeros.
        shift: s, shape `[d]`.
    """
    found = weight.double() @ shift.double()
    return found if bias is None else found + bias.double()


def residual_adapter(before: Tensor, after: Tensor) -> Tensor:
    """S = Q_before^T Q_after, which carries a stream from one cut basis into the next, shape `[k_1, k_2]`.

    Args:
        before: columns of an orthogonal matrix, shape `[d, k_1]`.
        after: of another, shape `[d, k_2]`.
    """
    return before.T @ after


def _put(parent: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None, like: Tensor | None = None) -> None:
    """A linear layer with these values, shapes `[m, n]` and `[m]`, of the kind and type of what stood there.

    Where `like` is given, nothing with numbers did: it is a plain one of this type.
    """
    old: Any = parent.get_submodule(path)
    transposed, like = (kind_of(old).transposed, old.weight) if like is None else (False, like)
    setattr(*_place(parent, path), dense_layer(weight, bias, transposed, like.dtype, like.device))


def _weight_of(layer: Any) -> Tensor:
    """W, shape `[m, n]`, float64."""
    return (layer.weight.T if kind_of(layer).transposed else layer.weight).double()


def _place(parent: nn.Module, path: str) -> tuple[nn.Module, str]:
    where, _, name = path.rpartition(".")
    return parent.get_submodule(where), name


def _turn_readers(block: nn.Module, half: Half, q: Tensor, scale: float = 1.0) -> None:
    """W <- scale W diag(gain) Q and b <- b + W shift for what reads the stream behind a norm; q of shape `[d, k]`."""
    norm: Any = block.get_submodule(half.norm)
    shift = getattr(norm, "bias", None)
    for path in half.readers:
        old: Any = block.get_submodule(path)
        weight = _weight_of(old)
        gain = weight.new_ones(len(q)) if norm.weight is None else norm.weight
        bias = old.bias if shift is None else fold_shift(weight, old.bias, shift)
        _put(block, path, fold_gain(weight, gain) @ q * scale, bias)


def _turn_writer(block: nn.Module, half: Half, q: Tensor, centred: bool = False) -> None:
    """W <- Q^T W, b <- Q^T b for what adds to the stream, M W and M b first where norms subtract a mean.

    Args:
        block: that holds it.
        half: that it ends.
        q: shape `[d, k]`.
        centred: whether they do.
    """
    old: Any = block.get_submodule(half.writer)
    weight, bias = _weight_of(old).T, None if old.bias is None else old.bias.double()
    if centred:
        weight, bias = without_mean(weight), None if bias is None else without_mean(bias)
    _put(block, half.writer, (weight @ q).T, None if bias is None else bias @ q)


def _keep_writer(block: nn.Module, half: Half) -> None:
    """The same numbers in a layer of the class that a checkpoint's is of, whatever class the architecture has."""
    old: Any = block.get_submodule(half.writer)
    _put(block, half.writer, _weight_of(old), old.bias)


def _turn_embeddings(model: Any, q: Tensor, form: PreNorm) -> None:
    """E <- E Q, E M Q where norms subtract a mean; a head that shared them keeps them as they were."""
    base, width = model.base_model, form.width if form.padded else 0

    def turned(old: Any) -> nn.Module:
        rows = old.weight
        wide = without_mean(rows.double()) if form.centred else rows.double()
        new: Any = narrow_embedding(old, q.shape[1], width)
        new.weight = nn.Parameter((wide @ q).to(rows.dtype), requires_grad=False)
        return new

    model.set_input_embeddings(turned(model.get_input_embeddings()))
    for path in form.tables:
        base.set_submodule(path, turned(base.get_submodule(path)))
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


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
    blocks, device, said = runner.blocks, runner.device, said_form(form)
    adapters, whole = adapters_of(said), bool(known)
    stream = torch.empty(0)

    def measured(part: slice, out: Tensor, into: Directions) -> None:
        """Take in some of the stream, and go on with it."""
        out = without_mean(out) if form.centred else out
        into.add(out.to(device))
        stream[part] = out.cpu()

    if not whole:
        # What blocks are handed beside the stream is learned while they fit together.
        for part in runner.batches():
            runner.learn(len(runner.ids[part]))
        # The stream in the coordinates of the original, as the cut blocks so far give it.
        stream = runner.embed(torch.empty(runner.shape))
        seen = Directions(form.eps, tokens)
        for part in runner.batches():
            measured(part, stream[part], seen)
        known[_EMBEDDED] = seen.found()[:, :kept].cpu()
    q = known[_EMBEDDED].to(device)
    _turn_embeddings(model, q, form)
    shapes = []

    def go_on(index: int, name: str, step: Callable[..., Any], before: Tensor) -> Tensor:
        """Run a part of a block on the cut stream; the directions of what comes out, shape `[d, k]`."""
        point = f"{index}.{name}"
        if not whole:
            found = Directions(form.eps, tokens)
            with forward_of(blocks[index], step):
                for part in runner.batches():
                    measured(part, runner.run(index, stream[part].to(device) @ before.float()), found)
            known[point] = found.found()[:, :kept].cpu()
        return known[point].to(device)

    for index in track(range(len(blocks))):
        block: Any = blocks[index]
        like = block.get_submodule(form.halves[0].writer).weight
        carry(model, block, said)
        for name, halves, step in zip(adapters, _steps(form), _forwards(block, form), strict=True):
            # Until directions behind it are known, its adapter leads back to the original coordinates.
            for half in halves:
                _turn_readers(block, half, q)
            for half in halves:
                block.set_submodule(half.norm, NarrowNorm(form.width, form.eps))
            _put(block, name, q, like=like)
            if index == len(blocks) - 1 and name == adapters[-1]:
                for half in halves:
                    _keep_writer(block, half)
                continue
            after = go_on(index, name, step, q)
            for half in halves:
                _turn_writer(block, half, after, form.centred)
            _put(block, name, residual_adapter(q, after).T, like=like)
            q = after
        shapes.append([list(block.get_submodule(name).weight.shape) for name in adapters])
    model.base_model.rankwise_stream = {
        "width": form.width,
        "kept": kept,
        "eps": form.eps,
        "blocks": form.blocks,
        "readers": [list(half.readers) for half in form.halves],
        "writers": [half.writer for half in form.halves],
        "adapters": shapes,
        **({} if said == LLAMA_FORM else {"form": said}),
    }


def _steps(form: PreNorm) -> list[tuple[Half, ...]]:
    """The halves that each adapter of a block stands beside."""
    return [form.halves] if form.parallel else [(half,) for half in form.halves]


def _forwards(block: Any, form: PreNorm) -> list[Callable[..., Any]]:
    """The parts of a block that its adapters belong to, each from the stream before it to that behind it."""
    if form.parallel:
        return [block.after_both]
    return [block.after_attention, lambda hidden_states, *_, **__: block.after_mlp(hidden_states)]


@torch.no_grad()
def slice_by_one_rotation(
    model: Any, form: PreNorm, kept: int, runner: BlockRunner, tokens: Tokens, known: Known, track: Track = iter
) -> None:
    """Turn the whole stream by one Q and cut it; no adapter is needed, and the model is a plain one of width k.

    A usual norm over k numbers with the epsilon eps d / k gives sqrt(k / d) times what the cut norm should. Its readers
    take sqrt(d / k), not its gain, which would be rounded alike for all of them.

    Args:
        model: the causal language model, changed in place, its config too.
        form: what it is made of; `form.plain` holds.
        kept: k, at most d.
        runner: of this model, on the calibration sequences.
        tokens: how they weigh.
        known: the directions, if it is not empty; else filled.
        track: goes over the starts of the batches.
    """
    base, blocks, device = model.base_model, runner.blocks, runner.device
    final: Any = base.get_submodule(form.final)
    if not known:
        seen = Directions(form.eps, tokens)
        norms = [block.get_submodule(half.norm) for block in blocks for half in form.halves] + [final]
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
    _turn_embeddings(model, q, form)

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
    _put(model, name, fold_gain(head.weight, final.weight) @ q * scale, head.bias)
    base.set_submodule(form.final, plain_norm(final))
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
