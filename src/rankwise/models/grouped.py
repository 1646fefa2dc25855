"""Layers that keep several linear ones in one weight, and the same as plain linear layers.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint,
so that a checkpoint loads where rankwise is not installed.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """Linear layers `0`, `1`, ... in the place of one module that holds the weights of all, `[groups, out, in]`.

    Args:
        whole: the module they come from. Its weight is taken from it; those of the layers are views of it.
        count: how many there are.
    """

    def __init__(self, whole: Any, count: int) -> None:
        super().__init__()
        self.count, self.routed = count, is_routed(whole)
        # What is left of it is put back when a model is saved as it was. In a tuple it is no child.
        self._whole = (whole,)
        weight = whole.weight
        for number, each in enumerate(weight.detach().view(count, -1, weight.shape[-1])):
            with torch.device("meta"):
                layer = nn.Linear(each.shape[1], each.shape[0], bias=False)
            layer.weight = nn.Parameter(each)
            self.add_module(str(number), layer.requires_grad_(weight.requires_grad))
        del whole._parameters["weight"]

    def forward(self, x: Tensor, sizes: Any = None) -> Tensor:
        """Map every group by its own layer; a layer without vectors is not run.

        Args:
            x: `[vectors, in]`, sorted by group, where groups are experts; `[..., groups, in]` elsewhere.
            sizes: of experts, how many vectors go to each, as a list.

        Returns:
            The same with out in the place of in.
        """
        layers = [self._modules[str(number)] for number in range(self.count)]
        if not self.routed:
            return torch.stack([layer(x[..., number, :]) for number, layer in enumerate(layers)], -2)  # type: ignore[misc]
        parts = zip(layers, x.split(sizes), strict=True)
        found = [layer(mine) for layer, mine in parts if len(mine)]  # type: ignore[misc]
        return torch.cat(found) if found else x.new_zeros(0, self.out_features)

    @property
    def out_features(self) -> int:
        """Outputs of every layer."""
        first: Any = self._modules["0"]
        return int(first.out_features)


def is_routed(whole: Any) -> bool:
    """Whether groups are experts, each with vectors of its own."""
    return isinstance(getattr(whole, "num_experts", None), int)


def groups_of(module: Any) -> int:
    """How many linear layers a module keeps in one weight; 0 where it is no such module.

    Two kinds are known: experts of one projection, handed vectors and how many go to each (JetMoE), and a linear layer
    of another class than torch's that maps groups of its inputs (DeepSeek V4).
    """
    held = [name for name, each in module._parameters.items() if each is not None]
    if held != ["weight"] or module._modules or module._buffers:
        return 0
    weight, taken = module.weight, len(inspect.signature(module.forward).parameters)
    if is_routed(module):
        return module.num_experts if weight.ndim == 3 and len(weight) == module.num_experts and taken == 2 else 0
    count, own = getattr(module, "n_groups", 0), type(module).forward is not nn.Linear.forward
    grouped = isinstance(module, nn.Linear) and own and taken == 1 and isinstance(count, int) and count > 1
    return count if grouped and len(weight) % count == 0 else 0


def ungroup(model: nn.Module, paths: list) -> None:
    """Put plain linear layers in the place of grouped ones.

    Args:
        model: changed in place.
        paths: of the grouped modules.

    Raises:
        ValueError: when a module is none of the kind.
    """
    for path in paths:
        module = model.get_submodule(path)
        count = groups_of(module)
        if not count:
            raise ValueError(f"{path} is {type(module).__name__}, which holds no linear layers that are known")
        model.set_submodule(path, GroupedLinear(module, count))


def group(model: nn.Module) -> None:
    """Bring the layers back into the modules they come from.

    Args:
        model: changed in place; every layer is a plain linear one.

    Raises:
        ValueError: naming a layer whose bias has no place in the module.
    """
    for path, found in [(path, each) for path, each in model.named_modules() if isinstance(each, GroupedLinear)]:
        layers: list[Any] = [found._modules[str(number)] for number in range(found.count)]
        for number, layer in enumerate(layers):
            if layer.bias is not None:
                raise ValueError(f"{path}.{number}.bias")
        weights = [layer.weight.detach() for layer in layers]
        whole = found._whole[0]
        joined = torch.stack(weights) if found.routed else torch.cat(weights)
        whole.weight = nn.Parameter(joined, requires_grad=False)
        model.set_submodule(path, whole)
