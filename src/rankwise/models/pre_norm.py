"""`PreNorm`: what in a model reads its residual stream and what writes to it, where blocks read it behind norms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.models.block_names import FINAL_NORMS, HEAD_NORMS, BlockNames
from rankwise.models.sites import Site, decoder_blocks
from rankwise.models.watched import Watched

_AGREEMENT = 1e-3
"""Relative difference allowed between a norm and its formula."""


@dataclass(frozen=True)
class Half:
    """Attention or the MLP of a block: reads the stream behind a norm, and adds to it.

    Attributes:
        norm: name of the norm before it.
        readers: paths in the block of the linear layers that read what the norm gives.
        writer: path of the one whose output is added to the stream.
        parts: names of the modules that it is made of, in the order in which they run.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class PreNorm:
    """A decoder of blocks z <- z + attention(norm(z)), z <- z + mlp(norm(z)), or of both in one step, side by side.

    Attributes:
        blocks: path of the list of blocks in the decoder without head.
        halves: attention and the MLP of every block.
        width: d, of the stream.
        eps: of all its norms.
        head_norms: paths in a block of norms of single heads.
        final: path in the decoder of the norm behind the last block.
        centred: whether norms subtract the mean of a vector first, as LayerNorm does.
        parallel: whether attention and the MLP read the same stream, side by side.
        pair: whether a block returns a tuple.
        biased: paths in a block of readers that have no bias and get one from the shift of the norm before them.
        tables: paths in the decoder of other embeddings that are added to those of tokens.
        padded: whether code around the blocks takes the width of the embeddings for that of the last block's output.
    """

    blocks: str
    halves: tuple[Half, Half]
    width: int
    eps: float
    head_norms: tuple[str, ...] = ()
    final: str = "norm"
    centred: bool = False
    parallel: bool = False
    pair: bool = False
    biased: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    padded: bool = False

    @property
    def plain(self) -> bool:
        """Whether a usual norm over k numbers stands for a cut one, so that a plain checkpoint can say a cut stream."""
        return not (self.centred or self.parallel)

    @classmethod
    def of(cls, model: Any, sites: Sequence[Site]) -> PreNorm:
        """What a model is made of. Names say where to look; what is there is tried on a few tokens.

        Args:
            model: the causal language model, dense.
            sites: all its sites.

        Raises:
            ModelError: naming the architecture, and why it is none of this kind.
        """
        kind = type(model).__name__
        prefix, blocks = decoder_blocks(model)
        base, inner = model.base_model, f"{model.base_model_prefix}."
        forms = {_names_of(kind, block, tuple(_of_block(sites, prefix, i))) for i, block in enumerate(blocks)}
        if len(forms) > 1:
            raise _refused(kind, "its blocks are not all alike")
        names = forms.pop()
        if base is model or not prefix.startswith(inner):
            raise _refused(kind, "it has no decoder of blocks beside its head")
        here, width = _of_block(sites, prefix, 0), model.get_input_embeddings().weight.shape[1]
        watched = Watched.of(model, blocks, (*names.norms, *here))
        if not watched.read(names.norms[0], watched.first):
            raise _refused(kind, "its norms do not stand before attention and the MLP")
        if watched.first.shape[-1] != width:
            raise _refused(kind, f"its stream has {watched.first.shape[-1]} numbers a token, its embedding {width}")
        if not watched.summed:
            raise _refused(kind, "its first block reads something else than the sum of its embeddings")
        if not watched.narrowed and any(type(each) is not nn.Embedding for _, each in watched.embedded.values()):
            raise _refused(kind, "its code reads the width of embeddings that do more than look up")
        final = _final_norm(base, prefix.removeprefix(inner))
        if not final:
            raise _refused(kind, f"behind its blocks is no norm of the name {', '.join(FINAL_NORMS)}")
        norms = [base.get_submodule(final), *(block.get_submodule(name) for block in blocks for name in names.norms)]
        found = {_tried(kind, norm, width) for norm in norms}
        if len({eps for eps, _ in found}) > 1:
            raise _refused(kind, "its norms add different epsilons")
        if len(found) > 1:
            raise _refused(kind, "some of its norms subtract a mean and others do not")
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.in_features != width:
            raise _refused(kind, "its head is no linear layer of the stream")
        halves = (_half(kind, names, 0, here, watched, width), _half(kind, names, 1, here, watched, width))
        own = next(path for path, each in base.named_modules() if each is model.get_input_embeddings())
        tables = tuple(path for path in watched.embedded if path != own)
        shifted = [half for half in halves if getattr(blocks[0].get_submodule(half.norm), "bias", None) is not None]
        (eps, centred), inside = found.pop(), dict(blocks[0].named_parameters())
        return cls(
            blocks=prefix.removeprefix(inner),
            halves=halves,
            width=width,
            eps=eps,
            head_norms=tuple(name for name in HEAD_NORMS if f"{name}.weight" in inside),
            final=final,
            centred=centred,
            parallel=watched.read(names.norms[-1], watched.first),
            pair=watched.pair,
            biased=tuple(path for half in shifted for path in half.readers if not here[path].has_bias),
            tables=tables,
            padded=not watched.narrowed,
        )


def _refused(kind: str, why: str) -> ModelError:
    return ModelError(
        f"{kind} cannot be sliced: {why}.",
        where=kind,
        remedy="slicing knows blocks that read their stream behind RMSNorm or LayerNorm, attention and an MLP of "
        "linear layers, one after the other or side by side, as docs/slicing.md says; take a method of low rank",
    )


def _of_block(sites: Sequence[Site], prefix: str, index: int) -> dict[str, Site]:
    start = f"{prefix}.{index}."
    return {site.name.removeprefix(start): site for site in sites if site.name.startswith(start)}


def _within(path: str, parts: Sequence[str]) -> bool:
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def _names_of(kind: str, block: nn.Module, paths: Sequence[str]) -> BlockNames:
    """Names of what a block holds, and of nothing else that has numbers."""
    names = BlockNames.of(block)
    if names is None:
        held = ", ".join(name for name, _ in block.named_children())
        raise _refused(kind, f"its blocks hold {held}, which are no names of norms, attention and an MLP that it knows")
    parts = (*names.parts(0), *names.parts(1))
    known = {*(f"{path}.{leaf}" for path in paths if _within(path, parts) for leaf in ("weight", "bias"))}
    known |= {f"{name}.{leaf}" for name in names.norms for leaf in ("weight", "bias")}
    known |= {f"{name}.weight" for name in HEAD_NORMS}
    for name, _ in block.named_parameters():
        if name not in known:
            raise _refused(kind, f"its blocks hold {name}, beside norms, attention and an MLP of linear layers")
    return names


def _final_norm(base: Any, blocks: str) -> str:
    """Path in the decoder of the norm beside the list of blocks; empty where there is none."""
    beside, holder = blocks.rpartition(".")[0], base.get_submodule(blocks.rpartition(".")[0])
    found = next((name for name in FINAL_NORMS if isinstance(getattr(holder, name, None), nn.Module)), "")
    return f"{beside}.{found}" if found and beside else found


def _half(kind: str, names: BlockNames, half: int, sites: dict[str, Site], watched: Watched, width: int) -> Half:
    """Attention (0) or the MLP (1) of the first block: what read the output of its norm, and the one that did not."""
    norm, parts = names.norm(half), names.parts(half)
    here = [path for path in sites if _within(path, parts)]
    readers = tuple(path for path in here if norm in watched.outputs and watched.read(path, watched.outputs[norm]))
    writers = [path for path in here if path not in readers]
    if len(writers) != 1 or not readers or sites[writers[0]].m != width:
        raise _refused(kind, f"its {parts[0]} has no one linear layer that writes to the stream and others that read")
    return Half(norm, readers, writers[0], parts)


def _tried(kind: str, norm: nn.Module, width: int) -> tuple[float, bool]:
    """Epsilon of a norm that is tried to be x w / sqrt(mean x^2 + eps) + b, and whether it subtracts the mean first."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if eps is not None and all(each is None or each.shape == (width,) for each in (weight, bias)):
        tried: Any = copy.deepcopy(norm).to("cpu", torch.float32)
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 0.5
        with torch.no_grad():
            out = tried(x)
            for centred in (False, True):
                goal = _formula(x - x.mean(-1, keepdim=True) if centred else x, eps, weight, bias)
                if bool((out - goal).norm() <= _AGREEMENT * goal.norm()):
                    return float(eps), centred
    raise _refused(kind, f"its {type(norm).__name__} is no x w / sqrt(mean x^2 + eps) + b, of x or of x less its mean")


def _formula(x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    found = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    found = found if weight is None else found * weight.float().cpu()
    return found if bias is None else found + bias.float().cpu()
