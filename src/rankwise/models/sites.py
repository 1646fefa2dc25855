"""`Site`: one linear weight of the decoder, whatever module holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import ModelError, NotFiniteError
from rankwise.linalg import all_finite
from rankwise.models.experts import UnfusedExperts
from rankwise.models.grouped import GroupedLinear
from rankwise.models.multimodal import language_model
from rankwise.models.places import places_of


@dataclass(frozen=True)
class Site:
    """One linear weight y = W x + b with W of shape `[m, n]` (out x in).

    Attributes:
        name: path of its module in the causal language model.
        role: `q k v o gate up down`, or the module's own name, as `places_of` reads it.
        block: index of its decoder block.
        m: outputs.
        n: inputs.
        transposed: True when the module keeps W as `[n, m]` (GPT-2's Conv1D).
        has_bias: True when the module adds a bias of its own.
        group: name of the first site that reads the same input.
        pool: of one expert among others, its name with a star for the expert: what its peers have in common. Empty
            for all other sites.
        keeps_zeros: whether padding reaches it as zeros and has to leave it so, see `keeping_zeros`.
    """

    name: str
    role: str
    block: int
    m: int
    n: int
    transposed: bool
    has_bias: bool
    group: str
    pool: str = ""
    keeps_zeros: bool = False

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


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module list that holds most linear weights: the decoder's blocks, and their path.

    Of a model that reads images too it is one within the language model, however large the rest.

    Raises:
        ModelError: when the model has no module list.
    """

    def linear_parameters(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))

    path, decoder = language_model(model)
    start = f"{path}." if path else ""
    lists = [(start + name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError("The model has no list of decoder blocks.", where=type(model).__name__)
    # Of nested lists the outermost holds as much as its children; max() keeps the first, which is the outermost.
    return max(lists, key=lambda item: linear_parameters(item[1]))


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear weight in the decoder's blocks, in forward order of definition.

    Embeddings, the head and everything outside the blocks are no sites, nor is what routes tokens to experts, or a
    linear layer whose class makes something else of its weight than W x + b, or whose weight is another layer's too.
    Experts that are fused in one tensor have none, and grouped layers neither; `unfuse_experts` takes them apart.

    Raises:
        ModelError: when the model has no blocks or no linear weight in them.
    """
    prefix, blocks = decoder_blocks(model)
    shared = _of_several(blocks)
    sites = []
    for index, block in enumerate(blocks):
        experts = _experts_in(block)
        for path, module in block.named_modules():
            if _routes(path, module, experts) or not gives_product(module) or _weight_id(module) in shared:
                continue
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
            elif isinstance(module, Conv1D):
                n, m = module.weight.shape
            else:
                continue
            name = f"{prefix}.{index}.{path}"
            sites.append(
                Site(
                    name=name,
                    role="",
                    block=index,
                    m=m,
                    n=n,
                    transposed=isinstance(module, Conv1D),
                    has_bias=module.bias is not None,
                    group=name,
                    pool=_pool_of(name, [f"{prefix}.{index}.{where}" for where in experts]),
                )
            )
    if not sites:
        raise ModelError("The model's blocks hold no linear layers.", where=type(model).__name__)
    places = places_of(site.name for site in sites)
    return [replace(site, role=places[site.name][1]) for site in sites]


_AS_A_PRODUCT = 0.02
"""Relative difference from W x + b: above the rounding of 16 bits."""


@torch.no_grad()
def gives_product(module: nn.Module) -> bool:
    """Whether a linear layer gives W x + b; one whose class has a forward of its own is tried on random vectors.

    Args:
        module: anything; what is no linear layer gives what it gives.
    """
    if not isinstance(module, nn.Linear | Conv1D) or type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    drawn = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = drawn.to(weight.device, weight.dtype)
    expected = nn.functional.linear(x, weight, module.bias)
    try:
        found = module(x)
    except Exception:  # whatever it wants instead: it is then another layer
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or bool((found - expected).norm() <= _AS_A_PRODUCT * expected.norm())


def other_layers(model: nn.Module) -> dict[str, int]:
    """Linear layers in the blocks that are no sites because they do not give W x + b: parameters by name."""
    prefix, blocks = decoder_blocks(model)
    linear = [(name, each) for name, each in blocks.named_modules() if isinstance(each, nn.Linear | Conv1D)]
    return {f"{prefix}.{name}": each.weight.numel() for name, each in linear if not gives_product(each)}


def shared_layers(model: nn.Module) -> dict[str, int]:
    """Linear layers in the blocks that are no sites because several hold one weight: parameters by name of the first.

    Zamba runs one transformer block at several depths.
    """
    prefix, blocks = decoder_blocks(model)
    shared, found = _of_several(blocks), {}
    for name, module in blocks.named_modules():
        if _weight_id(module) in shared:
            found[f"{prefix}.{name}"] = module.weight.numel()
            shared.remove(_weight_id(module))
    return found


def _of_several(blocks: nn.Module) -> set[int | None]:
    """Ids of weights that lie in more than one linear layer, or in one that lies in several places."""
    held = Counter(_weight_id(module) for _, module in blocks.named_modules(remove_duplicate=False))
    return {number for number, count in held.items() if number is not None and count > 1}


def _weight_id(module: nn.Module) -> int | None:
    return id(module.weight) if isinstance(module, nn.Linear | Conv1D) else None


def _experts_in(block: nn.Module) -> dict[str, int]:
    """Paths of the modules in a block that hold experts, fused or as children with numbers, and how many each holds."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, UnfusedExperts):
            found[path] = module.num_experts + module.layout.identities
        elif isinstance(module, GroupedLinear):
            if module.routed:
                found[path] = module.count
        elif isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            found[path] = len(module)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            count = getattr(module, "num_experts", None)
            if isinstance(count, int):
                found[path] = count
    return found


def _pool_of(name: str, experts: Sequence[str]) -> str:
    for path in experts:
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdecimal():
            return f"{path}.*.{rest}".rstrip(".")
    return ""


def _routes(path: str, module: nn.Module, experts: Mapping[str, int]) -> bool:
    """Whether a layer beside experts scores them, one output an expert, or says how far the shared one counts."""
    if not isinstance(module, nn.Linear):
        return False
    parts = path.split(".")
    for where, count in experts.items():
        beside = where.rpartition(".")[0]
        if (not beside or path.startswith(f"{beside}.")) and not path.startswith(f"{where}."):
            named = any("gate" in part or "router" in part for part in parts)
            if named and module.out_features in (1, count):
                return True
    return False


def stacked_parameters(model: nn.Module) -> int:
    """Parameters in the blocks that are kept as 3-D tensors (experts of an unknown layout, heads of a state space)."""
    _, blocks = decoder_blocks(model)
    owners = (module for module in blocks.modules() if not isinstance(module, nn.Conv1d))
    return sum(p.numel() for module in owners for p in module.parameters(recurse=False) if p.ndim == 3)


def share_inputs(model: nn.Module, sites: Sequence[Site], input_ids: Tensor) -> list[Site]:
    """Mark which sites read one and the same input, by watching one forward pass.

    Args:
        model: the causal language model that holds the sites.
        sites: what `find_sites` returned.
        input_ids: a short sequence, shape `[1, tokens]`.

    Returns:
        The sites that ran, with `group` set. An expert that no token reached shares inputs as its peers do. Any other
        site that no token reached is left out, and so are experts of whose peers none was reached.
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
    of_pool: dict[str, str] = {}
    for site in sites:
        if site.pool and site.name in group_of:
            of_pool.setdefault(site.pool, _among_peers(site, group_of[site.name]))
    for site in sites:
        if site.name not in group_of and site.pool in of_pool:
            where, _, rest = site.pool.partition("*")
            number = site.name[len(where) : len(site.name) - len(rest)]
            group_of[site.name] = of_pool[site.pool].replace("*", number)
    return [replace(site, group=group_of[site.name]) for site in sites if site.name in group_of]


def _among_peers(site: Site, group: str) -> str:
    """The name of a group with a star for the expert; that of the site itself where its leader is no part of it."""
    where, _, rest = site.pool.partition("*")
    number = site.name[len(where) : len(site.name) - len(rest)]
    start = f"{where}{number}."
    return f"{where}*.{group.removeprefix(start)}" if group.startswith(start) else site.pool
