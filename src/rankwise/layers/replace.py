"""Empty layers of the right form where dense ones stood.

Apart from the imports of its sibling files the source of this file goes into the modelling file of every checkpoint.
"""

from torch import nn

from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear


def replace_linears(model: nn.Module, layers: dict) -> None:
    """Put an empty layer at every path named.

    Args:
        model: changed in place.
        layers: path -> `{"shape": [m, n], "rank": r, "bias": bool}`; a pivoted layer also has `"storage": "pivoted"`
            and `"order": bool`.
    """
    for path, form in layers.items():
        parent, _, name = path.rpartition(".")
        m, n = form["shape"]
        made: nn.Module
        if form.get("storage", "two_factor") == "pivoted":
            made = PivotedLinear(n, m, form["rank"], form["bias"], form["order"])
        else:
            made = LowRankLinear(n, m, form["rank"], form["bias"])
        setattr(model.get_submodule(parent), name, made)
