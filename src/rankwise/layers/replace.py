"""Empty layers of the right form where dense ones stood.

Apart from the imports of its sibling files the source of this file goes into the modelling file of every checkpoint.
"""

from torch import nn

from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import QuantizedLinear, cache_dense


def replace_linears(model: nn.Module, layers: dict, cache: bool = False) -> None:
    """Put an empty layer at every path named.

    Args:
        model: changed in place.
        layers: path -> `{"shape": [m, n], "rank": r, "bias": bool}`; a pivoted layer also has `"storage": "pivoted"`
            and `"order": bool`, a quantised one `"storage": "quantized"` and `"form"`, see `QuantizedLinear`.
        cache: whether quantised layers keep their weight dequantised.
    """
    for path, form in layers.items():
        parent, _, name = path.rpartition(".")
        m, n = form["shape"]
        made: nn.Module
        storage = form.get("storage", "two_factor")
        if storage == "quantized":
            made = QuantizedLinear(n, m, form["bias"], form["form"])
        elif storage == "pivoted":
            made = PivotedLinear(n, m, form["rank"], form["bias"], form["order"])
        else:
            made = LowRankLinear(n, m, form["rank"], form["bias"])
        setattr(model.get_submodule(parent), name, made)
    cache_dense(model, cache)
