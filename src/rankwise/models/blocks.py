"""The decoder's blocks run one at a time on hidden states, so that a block can be compared and trained by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.device import computed_type, computing
from rankwise.errors import ModelError
from rankwise.models.sites import decoder_blocks
from rankwise.runs import take_space

_AGREEMENT = 0.02
"""Relative difference allowed between blocks run alone and the model itself: above bfloat16's rounding."""


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass whose rest is not needed."""


Handed = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is handed beside hidden states: by position, and by name."""

Form = tuple[Any, tuple[Any, ...]] | None
"""Type of a block's answer and what goes with the hidden states in it; None where these are all of it."""


class _Passing(nn.Module):
    """Stands where a block is and does nothing; no hook of the block runs.

    Args:
        block: asked for attributes.
        form: of its answer.
        hidden: what it answers; None for what it reads.
    """

    def __init__(
        self, block: nn.Module, form: tuple[Any, tuple[Any, ...]] | None, hidden: Tensor | None = None
    ) -> None:
        super().__init__()
        # Not as children or parameters: the model has none but its own.
        self.__dict__.update(block=block, form=form, hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        form, hidden = self.__dict__["form"], self.__dict__["hidden"]
        if hidden is None:
            hidden = positional[0] if positional else named["hidden_states"]
        return hidden if form is None else form[0]([hidden, *form[1]])


def _alike(one: Any, other: Any) -> bool:
    """Whether two modules' arguments are the same, tensors to the last bit, and so what objects among them hold."""
    if one is other:
        return True
    if isinstance(one, Tensor):
        same_kind = isinstance(other, Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
        return same_kind and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, bool | int | float | str | torch.dtype):
        return type(one) is type(other) and bool(one == other)
    return type(one) is type(other) and _alike(getattr(one, "__dict__", None), getattr(other, "__dict__", None))


def _keeping(found: dict[int, Handed], index: int) -> Callable[..., None]:
    """A hook that keeps what a block is handed."""

    def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[index] = positional[1:], {key: value for key, value in named.items() if key != "hidden_states"}

    return hook


def first_of(outputs: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def allocate(shape: tuple[int, ...], folder: Path | None, name: str, most_bytes: int) -> Tensor:
    """An empty float32 tensor, in memory or, when it is larger than `most_bytes`, in a file mapped into memory.

    Args:
        shape: its shape.
        folder: where such a file goes; None keeps everything in memory.
        name: of the file.
        most_bytes: largest size kept in memory.

    Raises:
        RunError: when the disk has no room for the file.
    """
    count = math.prod(shape)
    if folder is None or 4 * count <= most_bytes:
        return torch.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    take_space(folder / name, 4 * count)
    return torch.from_file(str(folder / name), shared=True, size=count, dtype=torch.float32).view(shape)


@dataclass
class BlockRunner:
    """Runs blocks of one model on sequences of one length.

    Args:
        model: the causal language model; blocks are looked up at every call, so their layers may be exchanged.
        ids: token sequences, shape `[sequences, length]`.
        batch_size: sequences a batch.

        autocast: whether a block may hold factors in float32 while it computes in less.

    Attributes:
        dtype: what blocks compute in.
    """

    model: Any
    ids: Tensor
    batch_size: int
    autocast: bool = True
    _arguments: dict[tuple[int, int], Handed] = field(default_factory=dict)
    _returns: dict[int, Form] = field(default_factory=dict)
    _cheap: bool | None = None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.dtype = computed_type(self.model)

    def _computing(self) -> AbstractContextManager[Any]:
        return computing(self.model) if self.autocast else nullcontext()

    @property
    def blocks(self) -> nn.ModuleList:
        return decoder_blocks(self.model)[1]

    def batches(self, count: int | None = None) -> Iterator[slice]:
        """Slices of the sequences, the last one maybe smaller; of the first `count` alone, where it is given."""
        count = len(self.ids) if count is None else count
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the hidden states: sequences, length, d."""
        sequences, length = self.ids.shape
        return sequences, length, self._inputs(self.ids[:1]).shape[-1]

    def embed(self, out: Tensor) -> Tensor:
        """What the first block reads.

        Args:
            out: filled and returned, of `shape`.
        """
        for part in self.batches():
            out[part] = self._inputs(self.ids[part]).cpu()
        return out

    @torch.no_grad()
    def _inputs(self, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(positional[0] if positional else named["hidden_states"])
            raise _Seen

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self.model(input_ids=ids.to(self.device), use_cache=False)
        except _Seen:
            pass
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def learn(self, size: int) -> None:
        """Find out once what the model hands its blocks beside hidden states (masks, positions) at a batch size.

        The first size takes a pass. Where that showed that the same is handed to blocks that do nothing, further ones
        take none.
        """
        if (0, size) in self._arguments:
            return
        if self._arguments and self._cheap is None:
            _, first = next(iter(self._arguments))
            self._cheap = self._same_to_none(first)
        if self._cheap:
            self._arguments |= {(index, size): handed for index, handed in self._handed_to_none(size).items()}
        else:
            self._pass(size)

    def _same_to_none(self, size: int) -> bool:
        """Whether blocks that do nothing are handed what was learned at this size."""
        try:
            found = self._handed_to_none(size)
        except Exception:  # such as of a model that computes with what else its blocks return
            return False
        return all(_alike(found.get(index), self._arguments[index, size]) for index in range(len(self.blocks)))

    def _handed_to_none(self, size: int) -> dict[int, Handed]:
        """By block, what it is handed beside hidden states where no block does anything."""
        blocks, real = self.blocks, list(self.blocks)
        found: dict[int, Handed] = {}
        try:
            for index, block in enumerate(real):
                blocks[index] = _Passing(block, self._returns[index])
                blocks[index].register_forward_pre_hook(_keeping(found, index), with_kwargs=True)
            with self._computing():
                self.model.base_model(input_ids=self.ids[:size].to(self.device), use_cache=False)
        finally:
            for index, block in enumerate(real):
                blocks[index] = block
        return found

    def _pass(self, size: int) -> None:
        """Learn from a pass of the model as it is."""
        found: dict[int, Handed] = {}

        def keep_form(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                # What goes with the hidden states is let go: only the form of the answer is of use.
                rest = (None,) * (len(output) - 1) if isinstance(output, tuple | list) else None
                self._returns[index] = None if rest is None else (type(output), rest)

            return hook

        blocks = self.blocks
        handles = [
            block.register_forward_pre_hook(_keeping(found, index), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        handles += [block.register_forward_hook(keep_form(i)) for i, block in enumerate(blocks)]
        try:
            with self._computing():
                self.model.base_model(input_ids=self.ids[:size].to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._arguments |= {(index, size): handed for index, handed in found.items()}

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """A block's output.

        Args:
            index: which block.
            hidden: its input, shape `[batch, length, d]`.

        Returns:
            Shape `[batch, length, d]`, on the model's device.
        """
        size = hidden.shape[0]
        self.learn(size)
        positional, named = self._arguments[index, size]
        with self._computing():
            found = self.blocks[index](hidden.to(self.device, self.dtype), *positional, **named)
        return first_of(found).float()

    @torch.no_grad()
    def forward_all(self, index: int, hidden: Tensor, out: Tensor) -> Tensor:
        """A block's output for every sequence.

        Args:
            index: which block.
            hidden: shape `[sequences, length, d]`, on the CPU.
            out: filled and returned; may be `hidden` itself.
        """
        for part in self.batches():
            out[part] = self.run(index, hidden[part]).cpu()
        return out

    @contextmanager
    def above(self, hidden: Tensor) -> Iterator[None]:
        """Inside the `with` the model starts from what its last block gave: no block is run.

        Args:
            hidden: shape `[batch, length, d]`, on the model's device; gradients flow to it.
        """
        self.learn(len(hidden))
        blocks = self.blocks
        real = list(blocks)
        try:
            for index, block in enumerate(real):
                blocks[index] = _Passing(block, self._returns[index], hidden)
            yield
        finally:
            for index, block in enumerate(real):
                blocks[index] = block

    def alone(self) -> bool:
        """Whether blocks run one after another, and what comes above them, give what the model gives; tried once.

        Blocks that share parameters do not count as that, nor do models in float64.
        """
        try:
            owned = [id(p) for block in self.blocks for p in block.parameters()]
            if len(owned) != len(set(owned)) or self.dtype.itemsize > 4:
                return False
            return self._agrees_above(*self._tried())
        except Exception:  # whatever a model of an unforeseen shape raises: it is then run whole
            return False

    @torch.no_grad()
    def _agrees_above(self, ids: Tensor, last: Tensor, whole: Tensor) -> bool:
        """Whether what comes above the last block makes of its output what the model gives for these tokens."""
        with self._computing(), self.above(last):
            found = self.model.base_model(input_ids=ids.to(self.device), use_cache=False)[0]
        return bool((found - whole).norm() <= _AGREEMENT * whole.norm())

    def check(self) -> None:
        """Raise unless the blocks, one after another, give what the model gives.

        Raises:
            ModelError: for an architecture whose blocks exchange more than hidden states.
        """
        self._tried()

    @torch.no_grad()
    def _tried(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of `check`, and what the model's last block and the model itself give for them."""
        size = min(self.batch_size, len(self.ids), 2)
        # What blocks are handed beside hidden states must not depend on the tokens: learned from one text, checked on
        # another. Such a difference may hardly be seen in what comes out.
        self.learn(size)
        handed: dict[int, Handed] = {}
        others = self.ids[:size].flip(-1)
        # Not the same tokens in another order, either.
        others[:, 1::2] = others[:, : others.shape[1] // 2 * 2 : 2]
        seen: list[Tensor] = []
        ran: list[nn.Module] = []
        handles = [block.register_forward_hook(lambda m, _i, _o: ran.append(m)) for block in dict.fromkeys(self.blocks)]
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(_keeping(handed, index), with_kwargs=True))
        handles.append(self.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(first_of(out))))
        try:
            with self._computing():
                whole = self.model.base_model(input_ids=others.to(self.device), use_cache=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        try:
            if ran != list(self.blocks):
                raise ValueError(f"{len(ran)} calls in a pass, of {len(self.blocks)} blocks, or in another order")
            for index, arguments in handed.items():
                if not _alike(arguments, self._arguments[index, size]):
                    raise ValueError(f"block {index} is handed, beside hidden states, what depends on the tokens")
            hidden = self._inputs(others)
            if hidden.ndim != 3 or hidden.shape[:2] != others.shape:
                raise ValueError(f"hidden states of {list(hidden.shape)} for {list(others.shape)} tokens")
            beside = hidden
            for index in range(len(self.blocks)):
                hidden = self.run(index, hidden)
            # A block that leaves something for later ones, such as keys, leaves here what it made of another text.
            other = self._inputs(self.ids[:size])
            for index in range(len(self.blocks)):
                beside, other = self.run(index, beside), self.run(index, other)
            changed = float((beside - hidden).norm() / hidden.norm())
            if not changed <= min(_AGREEMENT / 2, 10 * torch.finfo(self.dtype).eps):
                raise ValueError(f"what they give changes by {changed:.1g} when another text is run between them")
            last = seen[0].float()
            difference = float((hidden - last).norm() / last.norm())
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as problem:
            raise ModelError(
                f"The blocks of {type(self.model).__name__} cannot be run by themselves ({problem}).",
                where="repair",
                remedy="leave refit and blocks out of --repair; subspace, factors and lora train the whole model",
            ) from problem
        if not difference <= _AGREEMENT:
            kind = type(self.model).__name__
            raise ModelError(
                f"The blocks of {kind}, run one by one, differ from the model by {difference:.2g}.",
                where="repair",
                remedy="leave refit and blocks out of --repair; subspace, factors and lora train the whole model",
            )
        return others, seen[0], whole
