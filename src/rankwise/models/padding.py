"""Linear weights in front of a state that runs from token to token, which padding reaches as zeros.

Of zeros such a weight makes zeros, so that padding leaves the state as it is. With a bias it would not, and a sequence
in a padded batch would come out otherwise than by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.models.blocks import Handed, first_of
from rankwise.models.sites import Site, decoder_blocks

_TOKENS, _PADDED = 16, 4
_ROUNDING = 1e-4
"""Of the largest number, how much the others may differ where nothing comes of padding."""


@torch.no_grad()
def keeping_zeros(model: Any, sites: Sequence[Site], probe: Tensor) -> set[str]:
    """Names of the sites that read zeros where a sequence is padded on its left, and have to give zeros there.

    One pass of two sequences, one of them padded, shows which read zeros; the first block with such a weight is then
    run by itself with something else than zeros behind it. Of a model that takes no mask there are none.

    Args:
        model: the causal language model.
        sites: its sites.
        probe: token ids, shape `[1, tokens]`.
    """
    ids = probe[:, :_TOKENS].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :_PADDED] = 0
    zeros: dict[str, bool] = {}
    handed: dict[int, Handed] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
            read = given[0] if given else None
            if isinstance(read, Tensor) and read.ndim >= 3 and read.shape[:2] == ids.shape:
                padding, rest = read[1, :_PADDED], read[1, _PADDED:]
                zeros[name] = zeros.get(name, True) and bool(rest.any()) and not bool(padding.any())

        return hook

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            handed.setdefault(index, (positional, named))

        return hook

    path, blocks = decoder_blocks(model)
    handles = [site.module(model).register_forward_pre_hook(watch(site.name)) for site in sites]
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(keep(index), with_kwargs=True))
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # whatever a model says that takes no mask, or none with padding
        return set()
    finally:
        for handle in handles:
            handle.remove()
    by_place: dict[str, list[Site]] = {}
    for site in sites:
        if zeros.get(site.name):
            by_place.setdefault(site.name.removeprefix(f"{path}.").partition(".")[2], []).append(site)
    return {
        site.name
        for alike in by_place.values()
        if _is_felt(model, alike[0], blocks[alike[0].block], handed.get(alike[0].block))
        for site in alike
    }


def _is_felt(model: Any, site: Site, block: nn.Module, handed: Handed | None) -> bool:
    """Whether what a block gives for tokens changes with what a weight of it gives for the padding before them."""

    def disturb(_module: nn.Module, _given: Any, found: Tensor) -> Tensor:
        disturbed = found.clone()
        disturbed[1, :_PADDED] += found.abs().max()
        return disturbed

    if handed is None:  # a block whose parts are called without it
        return True
    positional, named = handed
    try:
        plain = first_of(block(*positional, **named))[1, _PADDED:].float()
        handle = site.module(model).register_forward_hook(disturb)
        try:
            found = first_of(block(*positional, **named))[1, _PADDED:].float()
        finally:
            handle.remove()
    except Exception:  # of a block that does not run by itself
        return True
    return not float((found - plain).abs().max()) <= _ROUNDING * float(plain.abs().max())
