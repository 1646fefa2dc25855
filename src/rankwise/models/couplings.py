"""Couplings: rows and columns of a block's weights that can only be taken out together.

A channel of a feed-forward layer is a row of gate and of up and a column of down. A group of heads is a key-value head
with its query heads: rows of q, k and v, columns of o. Which they are is read off names and shapes, and then tried:
without some units the model has to say what it says when the consumer's columns of these are zero (`shrinking.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rankwise.errors import ModelError
from rankwise.models.sites import Site, shared_layers

_CHANNELS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""Names of a feed-forward layer's weights, the consumer last."""

_HEADS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("qkv_proj", "o_proj"),
)
"""Names of an attention layer's weights, the consumer last."""


@dataclass(frozen=True)
class Section:
    """Rows or columns of one weight, unit after unit.

    Attributes:
        site: name of the site.
        start: the first of unit 0.
        size: how many a unit has.
    """

    site: str
    start: int
    size: int

    def of(self, units: Tensor) -> Tensor:
        """Indices of some units' rows or columns, shape `[units size]`, unit after unit."""
        return (self.start + units[:, None] * self.size + torch.arange(self.size)).flatten()


@dataclass(frozen=True)
class Coupling:
    """Units of a block that weights share.

    Attributes:
        name: path of the module that holds the weights.
        kind: channels of a feed-forward layer, or groups of attention heads.
        block: index of the decoder block.
        units: how many there are.
        rows: of the weights that make a unit's values; of one weight there may be several.
        columns: of the weight that reads them.
        settings: what a config calls them, and how many of those a unit is.
    """

    name: str
    kind: Literal["channels", "heads"]
    block: int
    units: int
    rows: tuple[Section, ...]
    columns: Section
    settings: tuple[tuple[str, int], ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites it goes through, the one that reads last."""
        return (*dict.fromkeys(section.site for section in self.rows), self.columns.site)

    def numbers(self, inputs: int, outputs: int) -> int:
        """Numbers of one unit: its rows over the producers' inputs, its columns over the consumer's outputs.

        Args:
            inputs: n of the producers.
            outputs: m of the consumer.
        """
        return sum(section.size for section in self.rows) * inputs + self.columns.size * outputs


def find_couplings(model: Any, sites: Sequence[Site]) -> list[Coupling]:
    """The couplings of every block, as names and shapes say them; see `usable_couplings` for whether they are so.

    Args:
        model: the causal language model.
        sites: its sites.

    Raises:
        ModelError: naming a weight that several layers share, a head count that does not divide, or layers that differ
            already.
    """
    if getattr(model.config, "is_heterogeneous", False):
        raise ModelError(
            "Its layers have sizes of their own already, from which no more units are taken.",
            where=type(model).__name__,
            remedy="use a method that keeps shapes, such as two_sided",
        )
    shared = shared_layers(model)
    if shared:
        raise ModelError(
            "Several layers share one weight, which cannot lose units for all of them.",
            where=next(iter(shared)),
            remedy="use a method that keeps shapes, such as two_sided",
        )
    children: dict[str, dict[str, Site]] = {}
    for site in sites:
        parent, _, leaf = site.name.rpartition(".")
        children.setdefault(parent, {})[leaf] = site
    found: list[Coupling] = []
    for parent, leaves in children.items():
        if any(site.pool for site in leaves.values()):
            continue  # Experts: how many tokens see a channel is not how many see another's.
        each = _channels(parent, leaves, model.config) or _heads(parent, leaves, model)
        if each is not None:
            found.append(each)
    return found


def _setting(config: Any, value: int) -> str | None:
    """What a config calls the width of its feed-forward layers."""
    if value == 4 * getattr(config, "hidden_size", 0) and getattr(config, "n_inner", value) is None:
        return "n_inner"  # Unset, it is four times the width of the model.
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    return next((name for name in names if getattr(config, name, None) == value), None)


def _channels(parent: str, leaves: dict[str, Site], config: Any) -> Coupling | None:
    names = next((names for names in _CHANNELS if set(names) <= set(leaves)), None)
    if names is None:
        return None
    consumer, producers = leaves[names[-1]], [leaves[name] for name in names[:-1]]
    width = consumer.n
    rows: list[Section] = []
    for site in producers:
        if site.m % width:
            return None
        # gate_up holds gate above up.
        rows += [Section(site.name, part * width, 1) for part in range(site.m // width)]
    setting = _setting(config, width)
    if setting is None:
        return None
    return Coupling(
        parent, "channels", consumer.block, width, tuple(rows), Section(consumer.name, 0, 1), ((setting, 1),)
    )


def _heads(parent: str, leaves: dict[str, Site], model: Any) -> Coupling | None:
    names = next((names for names in _HEADS if set(names) <= set(leaves)), None)
    if names is None:
        return None
    config, module = model.config, model.get_submodule(parent)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise ModelError(
            f"{heads} query heads do not divide into {groups} groups.", where=parent, remedy="check config.json"
        )
    consumer = leaves[names[-1]]
    width = getattr(module, "head_dim", None) or consumer.n // heads
    shared = heads // groups
    if consumer.n != heads * width:
        return None
    query, key = shared * width, width
    if len(names) == 2:
        fused = leaves[names[0]]
        if fused.m != (heads + 2 * groups) * width:
            return None
        starts = (0, heads * width, (heads + groups) * width)
        rows = tuple(Section(fused.name, start, size) for start, size in zip(starts, (query, key, key), strict=True))
    else:
        wanted = (heads * width, groups * width, groups * width)
        if tuple(leaves[name].m for name in names[:3]) != wanted:
            return None
        rows = tuple(
            Section(leaves[name].name, 0, size) for name, size in zip(names[:3], (query, key, key), strict=True)
        )
    settings: tuple[tuple[str, int], ...] = (("num_attention_heads", shared),)
    if getattr(config, "num_key_value_heads", None) is not None:
        settings = (*settings, ("num_key_value_heads", 1))
    return Coupling(parent, "heads", consumer.block, groups, rows, Section(consumer.name, 0, query), settings)
