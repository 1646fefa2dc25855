"""Low-rank adapters by peft on the compressed layers, and two honest ways to merge them.

A site of rank r with an adapter of rank a is the map L R + s B A. Merged by growing it is stored at rank r + a (or the
largest rank that is smaller than the dense weight), and the budget is counted again; merged by truncation it is cut
back to rank r. What either loses is measured.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.errors import MissingPackageError
from rankwise.factors import Factors
from rankwise.layers import LowRankLinear, kind_of, substitute
from rankwise.models import Site
from rankwise.repair.training import Training


def adapted_sites(model: Any, sites: Sequence[Site]) -> list[Site]:
    """The sites that get adapters: those that are factored; where none is, those that are whole."""
    factored = [site for site in sites if kind_of(site.module(model)).trains]
    return factored or [site for site in sites if not kind_of(site.module(model)).replaced]


def attach_adapters(model: Any, sites: Sequence[Site], rank: int, alpha: int, seed: int) -> dict[str, nn.Parameter]:
    """Put a peft adapter on every factored site, or, of a model that lost units and nothing else, on every weight.

    Returns:
        What is trained, by name.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    adapter = "rankwise"

    class AdaptedLowRank(nn.Module, LoraLayer):
        """peft's adapter around a low-rank layer: base(x) + s B (A x)."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, options["r"], lora_alpha=options["lora_alpha"], config=options["config"])

        def forward(self, x: Tensor) -> Tensor:
            down, up = self.lora_A[adapter], self.lora_B[adapter]
            base: Tensor = self.base_layer(x)
            return base + (self.scaling[adapter] * up(down(x))).to(base.dtype)

    names = [site.name for site in adapted_sites(model, sites)]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none")
    config._register_custom_module({LowRankLinear: AdaptedLowRank})
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft warns of every layer type that is not its own.
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=adapter)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in adapters.values():
        # On weights of 16 bits peft makes them of the same type, in which small steps are lost.
        parameter.data = parameter.data.float()
    return adapters


def merge_adapters(
    model: Any, sites: Sequence[Site], merge: Literal["grow", "truncate"], limits: Mapping[str, int]
) -> dict[str, float]:
    """Bring the adapters into the factors and remove them.

    Args:
        model: with adapters; changed in place.
        sites: all sites.
        merge: `grow` or `truncate`.
        limits: by site name, the rank beyond which a site does not grow.

    Returns:
        By site name, the share of the squared norm of the product that is lost; 0 where a site could grow.
    """
    lost = {}
    for site in sites:
        adapted = site.module(model)
        base = getattr(adapted, "base_layer", None)
        if base is None:
            continue
        (name,) = adapted.lora_A.keys()
        scale = adapted.scaling[name]
        if not kind_of(base).replaced:
            up, down = (part[name].weight.detach().double() for part in (adapted.lora_B, adapted.lora_A))
            made, lost[site.name] = _changed(base, scale * up @ down)
            model.set_submodule(site.name, made)
            continue
        old = kind_of(base).factors(base)
        left, right = old.pair()
        whole = Factors(
            torch.cat([left, scale * adapted.lora_B[name].weight.detach().double().cpu()], 1),
            torch.cat([right, adapted.lora_A[name].weight.detach().double().cpu()]),
            old.bias,
        )
        most = old.rank if merge == "truncate" else max(old.rank, limits[site.name])
        lost[site.name] = 0.0
        if whole.rank > most:
            whole, lost[site.name] = whole.reduced(most)
        model.set_submodule(site.name, base)
        substitute(model, site.name, whole, "two_factor", base.left.weight.dtype)
    return lost


def _changed(base: nn.Module, change: Tensor) -> tuple[nn.Module, float]:
    """A dense layer of the same kind with so much added to W, shape `[m, n]`, and the share that rounding it loses."""
    made: Any = copy.copy(base)
    made._parameters = dict(base._parameters)
    weight: Any = base.weight
    wanted = weight.detach().double() + (change.T if kind_of(base).transposed else change)
    made.weight = nn.Parameter(wanted.to(weight.dtype), requires_grad=False)
    missed = float((made.weight.double() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-300))
    return made, missed


class Lora(Training):
    """How adapters are trained and merged. Those of a weight that is whole are added to it.

    Attributes:
        rank: a, of each adapter.
        alpha: the adapter's product is scaled by alpha / rank.
        merge: `grow` keeps everything and raises the rank; `truncate` keeps the rank.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-3
    relative: bool = False
    loss: Literal["kl", "lm"] = "lm"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    merge: Literal["grow", "truncate"] = "truncate"

    def open(self, model: Any, sites: Sequence[Site]) -> None:
        if any(kind_of(site.module(model)).replaced for site in sites):
            super().open(model, sites)

    def require(self) -> None:
        super().require()
        if importlib.util.find_spec("peft") is None:
            raise MissingPackageError("LoRA needs peft.", remedy="pip install 'rankwise[train]'")

    def changes(self, model: Any, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
        adapted = adapted_sites(model, sites)
        return {
            name: parameter
            for site in adapted
            for name, parameter in site.module(model).named_parameters(prefix=site.name)
        }

    def attach(self, model: Any, sites: Sequence[Site], seed: int) -> dict[str, nn.Parameter]:
        return attach_adapters(model, sites, self.rank, self.alpha, seed)

    def fold_in(self, model: Any, sites: Sequence[Site], limits: Mapping[str, int]) -> dict[str, Any]:
        return {"norm_lost_in_merging": merge_adapters(model, sites, self.merge, limits)}
