"""Empty layers of the right form where dense ones stood.

Apart from the imports of its sibling files the source of this file goes into the modelling file of every checkpoint.
"""

from torch import nn

from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import QuantizedLinear, cache_dense

LAYERS: dict = {"two_factor": LowRankLinear, "pivoted": PivotedLinear, "quantized": QuantizedLinear}
"""The layers that a checkpoint may hold in place of a linear one, by how they store it."""


def replace_linears(model: nn.Module, layers: dict, cache: bool = False) -> None:
    """Put an empty layer at every path named.

    Args:
        model: changed in place.
        layers: path -> `{"shape": [m, n], "storage": one of LAYERS, ...}`, the rest as the layer describes itself;
            without `"storage"` two factors are meant.
        cache: whether quantised layers keep their weight dequantised.
    """
    for path, form in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LAYERS[form.get("storage", "two_factor")].described(form))
    cache_dense(model, cache)
