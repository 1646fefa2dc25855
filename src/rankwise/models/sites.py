"""`Site`: one linear weight of the decoder, whatever module holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import ModelError, NotFiniteError
from rankwise.linalg import all_finite

_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Site:
    """One linear weight y = W x + b with W of shape `[m, n]` (out x in).

    Attributes:
        name: path of its module in the causal language model.
        role: `q k v o gate up down`, or the module's own name.
        block: index of its decoder block.
        m: outputs.
        n: inputs.
        transposed: True when the module keeps W as `[n, m]` (GPT-2's Conv1D).
        has_bias: True when the module adds a bias of its own.
        group: name of the first site that reads the same input.
    """

    name: str
    role: str
    block: int
    m: int
    n: int
    transposed: bool
    has_bias: bool
    group: str

    @property
    def parameters(self) -> int:
        """Numbers in W: m n."""
        return self.m * self.n

    def module(self, model: nn.Module) -> Any:
        """The module of `model` that holds this weight."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """W as `[m, n]`, a view in the model's dtype.

        Raises:
            NotFiniteError: when W holds NaN or an infinity.
        """
        weight: Tensor = self.module(model).weight.detach()
        if not all_finite(weight):
            raise NotFiniteError(
                "A weight holds NaN or an infinity.",
                where=f"{self.name}.weight",
                remedy="the checkpoint is damaged or was trained to divergence; fetch or train it again",
            )
        return weight.T if self.transposed else weight

    def bias(self, model: nn.Module) -> Tensor | None:
        """b of shape `[m]`, or None."""
        return self.module(model).bias.detach() if self.has_bias else None


def place_of(name: str) -> tuple[int, str]:
    """Block and role of a site, read off its name: the first number in the path, and the last part.

    A site itself knows both better; this is for plans, which hold names alone.
    """
    parts = name.split(".")
    leaf = parts[-1]
    return next((int(part) for part in parts if part.isdecimal() and len(part) < 10), 0), _ROLES.get(leaf, leaf)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module list that holds most linear weights: the decoder's blocks."""

    def linear_parameters(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError("The model has no list of decoder blocks.", where=type(model).__name__)
    # Of nested lists the outermost holds as much as its children; max() keeps the first, which is the outermost.
    return max(lists, key=lambda item: linear_parameters(item[1]))


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear weight in the decoder's blocks, in forward order of definition.

    Embeddings, the head and everything outside the blocks are no sites.

    Raises:
        ModelError: when the model has no blocks or no linear weight in them.
    """
    prefix, blocks = decoder_blocks(model)
    sites = []
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
            elif isinstance(module, Conv1D):
                n, m = module.weight.shape
            else:
                continue
            name = f"{prefix}.{index}.{path}"
            leaf = path.rsplit(".", 1)[-1]
            sites.append(
                Site(
                    name=name,
                    role=_ROLES.get(leaf, leaf),
                    block=index,
                    m=m,
                    n=n,
                    transposed=isinstance(module, Conv1D),
                    has_bias=module.bias is not None,
                    group=name,
                )
            )
    if not sites:
        raise ModelError("The model's blocks hold no linear layers.", where=type(model).__name__)
    return sites


def fused_expert_parameters(model: nn.Module) -> int:
    """Parameters in the blocks that are kept as 3-D tensors (mixtures of experts), which are no sites."""
    _, blocks = decoder_blocks(model)
    return sum(p.numel() for p in blocks.parameters() if p.ndim == 3)


def share_inputs(model: nn.Module, sites: Sequence[Site], input_ids: Tensor) -> list[Site]:
    """Mark which sites read one and the same input, by watching one forward pass.

    Args:
        model: the causal language model that holds the sites.
        sites: what `find_sites` returned.
        input_ids: a short sequence, shape `[1, tokens]`.

    Returns:
        The sites that ran, with `group` set. A site that no token reached (an idle expert) is left out.
    """
    first_reader: dict[int, str] = {}
    group_of: dict[str, str] = {}
    kept_alive: list[Tensor] = []  # An id is unique only while its tensor lives.

    def watch(site: Site) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept_alive.append(arguments[0])
            group_of[site.name] = first_reader.setdefault(id(arguments[0]), site.name)

        return site.module(model).register_forward_pre_hook(hook)

    handles = [watch(site) for site in sites]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [replace(site, group=group_of[site.name]) for site in sites if site.name in group_of]
