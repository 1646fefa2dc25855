"""`PreNorm`: what in a model reads its residual stream and what writes to it, where blocks have two plain RMSNorms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.models.sites import Site, decoder_blocks

_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms of single heads (Qwen3), which never see the stream."""

_AGREEMENT = 1e-3
"""Relative difference allowed between a norm and its formula."""


@dataclass(frozen=True)
class Half:
    """Attention or the MLP of a block: reads the stream behind a norm, and adds to it.

    Attributes:
        norm: name of the norm before it.
        readers: paths in the block of the linear layers that read what the norm gives.
        writer: path of the one whose output is added to the stream.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str


@dataclass(frozen=True)
class PreNorm:
    """A decoder of blocks z <- z + attention(norm(z)), z <- z + mlp(norm(z)).

    Attributes:
        blocks: path of the list of blocks in the decoder without head.
        halves: attention and the MLP of every block.
        width: d, of the stream.
        eps: of all its norms.
        head_norms: paths in a block of norms of single heads.
    """

    blocks: str
    halves: tuple[Half, Half]
    width: int
    eps: float
    head_norms: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any, sites: Sequence[Site]) -> PreNorm:
        """What a model is made of.

        Args:
            model: the causal language model, dense.
            sites: all its sites.

        Raises:
            ModelError: naming the architecture, and why it is none of this kind.
        """
        kind = type(model).__name__
        prefix, blocks = decoder_blocks(model)
        base, inner = model.base_model, f"{model.base_model_prefix}."
        forms = {_form_of(kind, block, _of_block(sites, prefix, i)) for i, block in enumerate(blocks)}
        if len(forms) > 1:
            raise _refused(kind, "its blocks are not all alike")
        final, width = getattr(base, "norm", None), model.get_input_embeddings().weight.shape[1]
        if base is model or not prefix.startswith(inner) or not isinstance(final, nn.Module):
            raise _refused(kind, "it has no decoder of blocks and a final norm of the name norm")
        norms = [final, *(block.get_submodule(half.norm) for block in blocks for half in next(iter(forms))[0])]
        found = {_eps_of(kind, norm, width) for norm in norms}
        if len(found) > 1:
            raise _refused(kind, "its norms add different epsilons")
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.in_features != width:
            raise _refused(kind, "its head is no linear layer of the stream")
        (halves, head_norms), (eps,) = forms.pop(), found
        return cls(prefix.removeprefix(inner), halves, width, eps, head_norms)


def _refused(kind: str, why: str) -> ModelError:
    return ModelError(
        f"{kind} cannot be sliced: {why}.",
        where=kind,
        remedy="slicing knows blocks of two RMSNorms, attention and an MLP one after the other, as of Llama, Mistral, "
        "Qwen2, Qwen3 and Phi-3; take a method of low rank",
    )


def _of_block(sites: Sequence[Site], prefix: str, index: int) -> dict[str, Site]:
    start = f"{prefix}.{index}."
    return {site.name.removeprefix(start): site for site in sites if site.name.startswith(start)}


def _form_of(kind: str, block: nn.Module, sites: dict[str, Site]) -> tuple[tuple[Half, Half], tuple[str, ...]]:
    """The halves of one block, and its norms of heads."""
    for name in _CHILDREN:
        if not hasattr(block, name):
            parallel = ", as where attention and the MLP stand side by side" if name == _CHILDREN[2] else ""
            raise _refused(kind, f"its blocks have no {name}{parallel}")
    known = {*(f"{path}.{leaf}" for path in sites for leaf in ("weight", "bias")), *(f"{n}.weight" for n in _CHILDREN)}
    known |= {f"{name}.weight" for name in _HEAD_NORMS}
    for name, _ in block.named_parameters():
        if name in ("input_layernorm.bias", "post_attention_layernorm.bias"):
            raise _refused(kind, "its norms shift, as LayerNorm does")
        if name not in known:
            raise _refused(kind, f"its blocks hold {name}, beside two norms, attention and an MLP of linear layers")
    halves = []
    for norm, module, role in zip(_CHILDREN[::2], _CHILDREN[1::2], ("o", "down"), strict=True):
        here = {path: site for path, site in sites.items() if path.startswith(f"{module}.")}
        writers = [path for path, site in here.items() if site.role == role]
        if len(writers) != 1 or len(here) < 2 or any(site.transposed for site in here.values()):
            raise _refused(kind, f"its {module} has no one linear layer that writes to the stream and others that read")
        halves.append(Half(norm, tuple(path for path in here if path not in writers), writers[0]))
    heads = tuple(name for name in _HEAD_NORMS if any(n == f"{name}.weight" for n, _ in block.named_parameters()))
    return (halves[0], halves[1]), heads


def _eps_of(kind: str, norm: nn.Module, width: int) -> float:
    """Epsilon of a norm that is tried to be x w / sqrt(mean x^2 + eps)."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if eps is not None and isinstance(weight, Tensor) and weight.shape == (width,):
        tried: Any = copy.deepcopy(norm).to("cpu", torch.float32)
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 0.5
        with torch.no_grad():
            goal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tried.weight
            if bool((tried(x) - goal).norm() <= _AGREEMENT * goal.norm()):
                return float(eps)
    raise _refused(kind, f"its {type(norm).__name__} is no x w / sqrt(mean x^2 + eps)")
