"""Decoder blocks of other sizes than the model's config says.

The source of this file goes into the modelling file of a checkpoint whose blocks differ.
"""

import copy
from typing import Any


def resize_blocks(model: Any, sizes: dict) -> None:
    """Build blocks anew, each under the config of the model with some settings of its own.

    Args:
        model: changed in place.
        sizes: path of a block -> setting -> value.
    """
    for path, settings in sizes.items():
        own = copy.deepcopy(model.config)
        if getattr(own, "is_heterogeneous", False):
            own.per_layer_config = None
        for setting, value in settings.items():
            setattr(own, setting, value)
        parent, _, index = path.rpartition(".")
        blocks = model.get_submodule(parent)
        blocks[int(index)] = type(blocks[int(index)])(own, layer_idx=int(index))
