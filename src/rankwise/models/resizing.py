"""Decoder blocks of other sizes than the model's config says.

The source of this file goes into the modelling file of a checkpoint whose blocks differ.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_size(config: Any, resized: Any = True) -> Iterator[None]:
    """Inside the block a config says the sizes of the whole model alone: where layers differ, reading these warns.

    Args:
        config: of the model; as it was afterwards.
        resized: whether there are blocks that are built anew. Where there are none, an architecture whose layers differ
            by themselves (Gemma 4) reads what the config says of each.
    """
    kept = vars(config).pop("_heterogeneity_spec", None) if resized else None
    try:
        yield
    finally:
        if kept is not None:
            vars(config)["_heterogeneity_spec"] = kept


def resize_blocks(model: Any, sizes: dict) -> None:
    """Build blocks anew, each under the config of the model with some settings of its own.

    Args:
        model: changed in place.
        sizes: path of a block -> setting -> value.
    """
    for path, settings in sizes.items():
        with one_size(model.config):
            own = copy.deepcopy(model.config)
        for setting, value in settings.items():
            setattr(own, setting, value)
        parent, _, index = path.rpartition(".")
        blocks = model.get_submodule(parent)
        blocks[int(index)] = type(blocks[int(index)])(own, layer_idx=int(index))
