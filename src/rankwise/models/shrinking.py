"""A model without some units of its couplings: smaller weights, under a config that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.device import summing_tolerance
from rankwise.errors import ModelError
from rankwise.models.couplings import Coupling, find_couplings
from rankwise.models.resizing import resize_blocks
from rankwise.models.sites import Site, decoder_blocks
from rankwise.reading import one_line

Stays = Mapping[str, Tensor]
"""Name of a coupling -> the units that stay, ascending; one that is not named keeps all."""

Biased = Callable[[int, int], nn.Linear]
"""Makes an empty linear layer with a bias, given inputs and outputs, where the architecture has none."""

_BIAS_SETTINGS = {"heads": ("attention_bias",), "channels": ("mlp_bias",)}


def shrunk_config(config: Any, couplings: Sequence[Coupling], stays: Stays) -> tuple[Any, dict[int, dict[str, int]]]:
    """The config of the smaller model.

    Args:
        config: of the model, left as it is.
        couplings: all of it.
        stays: what remains.

    Returns:
        A config that says the sizes in which all layers agree, and by block those in which they differ.
    """
    by_setting: dict[str, dict[int, int]] = {}
    for coupling in couplings:
        left = len(stays[coupling.name]) if coupling.name in stays else coupling.units
        for setting, size in coupling.settings:
            by_setting.setdefault(setting, {})[coupling.block] = left * size
    made = copy.deepcopy(config)
    # A width that follows from the number of heads has to be said once that changes.
    if "num_attention_heads" in by_setting and getattr(made, "head_dim", None) is None:
        made.head_dim = made.hidden_size // made.num_attention_heads
    layers: dict[int, dict[str, int]] = {}
    for setting, by_block in by_setting.items():
        if len(set(by_block.values())) == 1:
            setattr(made, setting, next(iter(by_block.values())))
            continue
        for block, value in by_block.items():
            layers.setdefault(block, {})[setting] = value
    return made, dict(sorted(layers.items()))


@torch.no_grad()
def shrink(
    model: Any,
    couplings: Sequence[Coupling],
    sites: Sequence[Site],
    stays: Stays,
    consumers: Mapping[str, tuple[Tensor, Tensor | None]],
    biased: Biased,
) -> Any:
    """A model of the same class with the units that stay; weights that lose nothing are shared with the old one.

    Args:
        model: the causal language model, whole in memory.
        couplings: all of it.
        sites: its sites.
        stays: by coupling.
        consumers: by site name, W of shape `[m, n']` and the bias that stand for what reads the units that stay; of
            those that are not named the columns are taken.
        biased: makes the layer where a bias has no place.

    Raises:
        ModelError: naming a weight that the smaller architecture wants otherwise.
    """
    by_name = {site.name: site for site in sites}
    rows: dict[str, list[Tensor]] = {}
    columns: dict[str, Tensor] = {}
    for coupling in couplings:
        if coupling.name not in stays:
            continue
        units = stays[coupling.name]
        for section in coupling.rows:
            rows.setdefault(section.site, []).append(section.of(units))
        columns[coupling.columns.site] = coupling.columns.of(units)
    config, layers = shrunk_config(model.config, couplings, stays)
    adds = {name for name, (_, bias) in consumers.items() if bias is not None and not by_name[name].has_bias}
    kinds = {coupling.columns.site: coupling.kind for coupling in couplings}
    for setting in {setting for name in adds for setting in _BIAS_SETTINGS[kinds[name]]}:
        if getattr(config, setting, None) is False:
            setattr(config, setting, True)
    with torch.device("meta"):
        small = type(model)(config)
        prefix, _ = decoder_blocks(model)
        resize_blocks(small, {f"{prefix}.{block}": sizes for block, sizes in layers.items()})
    if layers:
        # Caches of a fixed size, and other engines, read the sizes of each layer here.
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = layers
    small.generation_config = model.generation_config
    for name in sorted(adds):
        m, n = by_name[name].m, len(columns.get(name, torch.arange(by_name[name].n)))
        if small.get_submodule(name).bias is None:
            with torch.device("meta"):
                small.set_submodule(name, biased(n, m))
    old = dict(model.named_parameters())
    for name, expected in list(small.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if path in consumers and leaf in ("weight", "bias"):
            weight, bias = consumers[path]
            value = weight if leaf == "weight" else bias
            if value is not None:
                like = old[f"{path}.weight"]
                value = value.T if leaf == "weight" and by_name[path].transposed else value
                value = value.to(like.device, like.dtype).contiguous()
        else:
            value = old.get(name)
            if value is not None and path in by_name:
                value = _cut(value, leaf, by_name[path], rows.get(path), columns.get(path))
        if value is None:
            # A bias that came with the setting, of a layer that has nothing to add.
            like = old[f"{path}.weight"]
            value = torch.zeros(expected.shape, dtype=like.dtype, device=like.device)
        if value.shape != expected.shape:
            raise ModelError(
                f"Without some units it would be {list(value.shape)}, and {type(model).__name__} wants "
                f"{list(expected.shape)}.",
                where=name,
                remedy="use a method that keeps shapes, such as two_sided",
            )
        small.get_submodule(path).register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        persistent = leaf not in small.get_submodule(path)._non_persistent_buffers_set
        small.get_submodule(path).register_buffer(leaf, buffer, persistent=persistent)
    small.tie_weights()
    return small.eval()


def _cut(value: Tensor, leaf: str, site: Site, rows: list[Tensor] | None, columns: Tensor | None) -> Tensor:
    """A weight or a bias without the rows and columns that go."""
    value = value.detach()
    side = 1 if site.transposed and leaf == "weight" else 0
    if rows is not None:
        value = value.index_select(side, torch.cat(rows).to(value.device))
    if columns is not None and leaf == "weight":
        value = value.index_select(1 - side, columns.to(value.device))
    return value.contiguous()


def usable_couplings(
    model: Any, sites: Sequence[Site], probe: Tensor, biased: Biased
) -> tuple[list[Coupling], dict[str, str]]:
    """The couplings of a model that its architecture lets lose units.

    Args:
        model: the causal language model, left as it is.
        sites: its sites.
        probe: a short sequence, shape `[1, tokens]`.
        biased: see `shrink`.

    Returns:
        Couplings, and by kind, why there are none of it.

    Raises:
        ModelError: naming the architecture, when there are none at all, and what `find_couplings` raises.
    """
    found = find_couplings(model, sites)
    good: list[Coupling] = []
    reasons: dict[str, str] = {}
    for kind in ("heads", "channels"):
        of_kind = [coupling for coupling in found if coupling.kind == kind]
        reason = _wrong_with(model, of_kind, sites, probe, biased) if of_kind else "its layers are of no known form"
        if reason is None:
            good += of_kind
        else:
            reasons[kind] = reason
    if not good:
        raise ModelError(
            f"{type(model).__name__} has no units that can be taken out: "
            + "; ".join(f"{kind}, {reason}" for kind, reason in reasons.items())
            + ".",
            where=type(model).__name__,
            remedy="use a method that keeps shapes, such as two_sided",
        )
    return sorted(good, key=lambda coupling: (coupling.block, coupling.kind == "channels")), reasons


@torch.no_grad()
def _wrong_with(
    model: Any, couplings: Sequence[Coupling], sites: Sequence[Site], probe: Tensor, biased: Biased
) -> str | None:
    """Why couplings are not what they are taken for; None when they are.

    The model without the last quarter of each has to say what it says when the columns of these units are zero. It is
    tried in the first block alone, too, so that blocks may differ.
    """
    by_name = {site.name: site for site in sites}
    tolerance = summing_tolerance(model)
    try:
        for tried in (couplings, couplings[:1]):
            stays = {each.name: torch.arange(_left(each)) for each in tried if each.units > 1}
            small = shrink(model, couplings, sites, stays, {}, biased)
            after = small(input_ids=probe, use_cache=False).logits.float()
            kept: list[tuple[Tensor, Tensor]] = []
            try:
                for coupling in tried:
                    weight = by_name[coupling.columns.site].weight(model)
                    kept.append((weight, weight.clone()))
                    if coupling.units > 1:
                        last = coupling.columns.of(torch.arange(_left(coupling), coupling.units))
                        weight[:, last.to(weight.device)] = 0
                before = model(input_ids=probe, use_cache=False).logits.float()
            finally:
                for weight, values in kept:
                    weight.copy_(values)
            if not float((after - before).norm()) <= tolerance * float(before.norm()) + 1e-6:
                return "without some units a layer it says something else than with their columns zero"
    except ModelError as problem:
        return f"{problem.where}: {problem.problem}".rstrip(".")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AttributeError, TypeError, KeyError) as problem:
        # What an architecture makes of numbers of heads it was not written for.
        return f"the smaller model fails ({one_line(problem)})"
    return None


def _left(coupling: Coupling) -> int:
    """Units that stay while couplings are tried."""
    return coupling.units - max(1, coupling.units // 4)
