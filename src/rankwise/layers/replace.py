"""Empty layers of the right form where dense ones stood, and the classes of the modules around them.

Apart from the imports of its sibling files the source of this file goes into the modelling file of every checkpoint.
"""

from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankwise.layers.biased import BiasedLinear
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import QuantizedLinear, cache_dense

LAYERS: dict = {
    "two_factor": LowRankLinear,
    "pivoted": PivotedLinear,
    "quantized": QuantizedLinear,
    "dense": BiasedLinear,
}
"""The layers that a checkpoint may hold in place of a linear one, by how they store it."""


def replace_linears(model: nn.Module, layers: dict, cache: bool | str = "auto") -> None:
    """Put an empty layer at every path named.

    Args:
        model: changed in place.
        layers: path -> `{"shape": [m, n], "storage": one of LAYERS, ...}`, the rest as the layer describes itself;
            without `"storage"` two factors are meant.
        cache: whether quantised layers keep their weight dequantised; `"auto"` for where memory allows, on a CPU.
    """
    parents = {}
    for path, form in layers.items():
        parent, _, name = path.rpartition(".")
        parents[parent] = model.get_submodule(parent)
        layer = LAYERS[form.get("storage", "two_factor")].described(form)
        for part in layer.modules():
            part.stands_for_another = True
        setattr(parents[parent], name, layer)
    for parent in parents.values():
        name_parent(model, parent)
    cache_dense(model, cache)


def name_parent(model: Any, parent: nn.Module) -> None:
    """Give a module the class that says which of its children are replaced, and by what.

    Engines look at one module of a class and take all others for alike. Names and values stay as they are.

    Args:
        model: that it belongs to; where it lists classes that must not be split over devices, the new one is listed.
        parent: changed in place.
    """
    plain: Any = getattr(type(parent), "rankwise_plain", type(parent))
    kinds = {layer: storage for storage, layer in LAYERS.items()}
    replaced = tuple((name, kinds[type(child)]) for name, child in parent.named_children() if type(child) in kinds)
    if parent is model or (type(parent) is plain and not replaced):
        return
    parent.__class__ = named_after(plain, replaced) if replaced else plain
    whole = getattr(model, "_no_split_modules", None) or []
    if replaced and any(each.__name__ in whole for each in plain.__mro__):
        model._no_split_modules = type(whole)([*whole, type(parent).__name__])


@cache
def named_after(plain: type, replaced: tuple) -> type:
    """A subclass that differs from a class in its name alone.

    Args:
        plain: the class.
        replaced: name and storage of each replaced child.
    """
    name = "_".join([plain.__name__, *(f"{child}_{storage}" for child, storage in replaced)])

    def reduce(self: Any, protocol: Any) -> tuple:
        return (_remade, (plain, replaced), *super(found, self).__reduce_ex__(protocol)[2:])

    # Where it is written is where the class it comes from is: inspection finds that one's source.
    where = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    found: Any = type(name, (plain,), {**where, "rankwise_plain": plain, "__reduce_ex__": reduce})
    return found


def _remade(plain: type, replaced: tuple) -> Any:
    """An empty module of such a class: a class that is made while running is pickled as what it was made of."""
    found: Any = named_after(plain, replaced)
    return found.__new__(found)


def without_what_lacks(module: nn.Module, original: Any) -> nn.Module:
    """Leave out of a decoder what the one of the original causal language model lacks, such as a pooler.

    Args:
        module: the decoder as it is built by itself.
        original: as the causal language model builds it; None where that has none.
    """
    for name in [name for name, _ in module.named_children()]:
        if getattr(original, name, name) is None:
            setattr(module, name, None)
    return module


class FillsAsOriginal:
    """What a model class here has before the class it comes from: loading fills what no file holds as the original's.

    transformers takes classes outside itself for ones that fill their modules in place, and passes over every module
    whose own parameters were loaded. So it leaves buffers uninitialised that a model fills in its children.
    """

    def initialize_weights(self) -> None:
        """As for a class that ships with transformers."""
        asked = ("is_custom_code", "is_remote_code")
        for name in asked:
            setattr(self, name, lambda: False)
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            for name in asked:
                delattr(self, name)

    def _init_weights(self, module: nn.Module) -> None:
        """As the original's, which may fill a layer by name that is another one here: it then fills one without data.

        Args:
            module: one of the model's.
        """
        if hasattr(module, "num_experts") and hasattr(module, "_fused"):
            # Its parameters are those of its layers, which are filled by themselves.
            return
        if hasattr(module, "stands_for_another"):
            # The original may know a linear layer by its path, and count on a bias that one of our factors lacks.
            PreTrainedModel._init_weights(self, module)  # type: ignore[arg-type]
            return
        stood = {path: child for path, child in module.named_modules() if path and type(child) in LAYERS.values()}
        for path, child in stood.items():
            bias = child.description()["bias"]
            module.set_submodule(path, nn.Linear(child.in_features, child.out_features, bias, device="meta"))
        try:
            super()._init_weights(module)  # type: ignore[misc]
        finally:
            for path, child in stood.items():
                module.set_submodule(path, child)
