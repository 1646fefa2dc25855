"""Experts as plain linear layers, where transformers keeps those of a block in tensors of three dimensions.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint,
so that a checkpoint loads where rankwise is not installed.
"""

from typing import Any

import torch
from torch import Tensor, nn

_LAYOUT = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers says of every class of fused experts that it can run in more than one way."""


class Expert(nn.Module):
    """One expert: down(activate(gate x, up x)), or down(activate(up x)) without a gate."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor, activate: Any) -> Tensor:
        """Map tokens of shape `[tokens, H]` to the same shape.

        Args:
            x: the tokens that were routed here, never none.
            activate: what lies between, given the outputs of gate (or None) and up, each `[tokens, I]`.
        """
        gate = self.gate_proj(x) if "gate_proj" in self._modules else None
        return self.down_proj(activate(gate, self.up_proj(x)))


class UnfusedExperts(nn.Module):
    """The experts of one block as modules `0`, `1`, ..., each an `Expert` made of plain linear layers.

    They compute what the fused module does: its own activation is called, and its own norm if it has one. Experts that
    no token was routed to are not run.

    Args:
        fused: the module they come from. Its 3-D parameters are taken from it, the linear weights are views of them.
    """

    post_expert_norm: nn.Module

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts = int(fused.num_experts)
        # What is left of the fused module knows the activation. In a tuple it is no child, whose names would count.
        self._fused = (fused,)
        for name, child in fused.named_children():
            self.add_module(name, child)
        learns = fused.down_proj.requires_grad
        for number, views in enumerate(views_of(fused)):
            expert = Expert()
            for name, (weight, bias) in views.items():
                expert.add_module(name, _linear(weight, bias).requires_grad_(learns))
            self.add_module(str(number), expert)
        for name in list(fused._parameters):
            del fused._parameters[name]

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Map tokens, shape `[tokens, H]`, to the same shape.

        Args:
            hidden_states: the tokens.
            routing: which experts each token goes to, integers of shape `[tokens, k]`, and with what weight, floating
                and of the same shape, in either order. An index that is no expert's is passed over.
            named: the same by name, as some blocks hand them on.
        """
        given = [*routing, *named.values()]
        index = next(each for each in given if not each.is_floating_point())
        weight = next(each for each in given if each.is_floating_point())
        top = index.shape[-1]
        slots = index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(index.reshape(-1).clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
        found = []
        for number, mine in enumerate(slots.split(counts)[: self.num_experts]):
            if len(mine):
                found.append(self._modules[str(number)](hidden_states[mine // top], self._activate))  # type: ignore[misc]
        if not found:
            return torch.zeros_like(hidden_states)
        outputs = torch.cat(found)
        # Versions of transformers that know no such norm do not say that there is none.
        if getattr(self._fused[0], "has_post_expert_norm", False):
            outputs = self.post_expert_norm(outputs)
        # Every slot is written once and a token's slots are summed in order: the same on every run.
        spread = outputs.new_zeros(len(slots), outputs.shape[-1]).index_copy(0, slots[: len(outputs)], outputs)
        weighted = spread * weight.reshape(-1, 1)
        return weighted.view(len(index), top, -1).sum(1).to(hidden_states.dtype)

    def _activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        fused = self._fused[0]
        if gate is None:
            return fused.act_fn(up)
        if fused.is_concatenated:
            return fused._apply_gate(torch.cat([gate, up], -1))
        return fused._apply_gate(torch.stack([gate, up], -1).flatten(-2))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def projections(fused: Any) -> tuple:
    """Names of the two parameters that hold the weights of a fused module."""
    return "gate_up_proj" if fused.has_gate else "up_proj", "down_proj"


def views_of(fused: Any) -> list[dict[str, tuple[Tensor, Tensor | None]]]:
    """Weight `[out, in]` and bias of every projection of every expert, views of a fused module's parameters."""
    found = []
    first, down = projections(fused)
    for number in range(fused.num_experts):
        weights, biases = {}, {}
        for name in (first, down):
            weight = getattr(fused, name).detach()[number]
            weights[name] = weight.T if fused.is_transposed else weight
            biases[name] = getattr(fused, f"{name}_bias").detach()[number] if fused.has_bias else None
        views = {}
        if fused.has_gate:
            for name, rows in _rows_of(fused, len(weights[first])).items():
                bias = biases[first]
                views[name] = (weights[first][rows], None if bias is None else bias[rows])
        else:
            views["up_proj"] = (weights[first], biases[first])
        views[down] = (weights[down], biases[down])
        found.append(views)
    return found


def _rows_of(fused: Any, rows: int) -> dict[str, slice]:
    """Which of the joint rows are the gate's and which the up projection's."""
    if fused.is_concatenated:
        return {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {"gate_proj": slice(0, rows, 2), "up_proj": slice(1, rows, 2)}


def is_fused(module: Any) -> bool:
    """Whether a module keeps experts fused, in a layout that can be taken apart.

    A module with parameters or buffers of its own beside the projections is none.
    """
    if not all(hasattr(module, name) for name in _LAYOUT) or dict(module.named_buffers(recurse=False)):
        return False
    names = projections(module)
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    if set(own) != {*names, *(f"{name}_bias" for name in names if module.has_bias)}:
        return False
    if any(own[name].ndim != 3 or len(own[name]) != module.num_experts for name in names):
        return False
    (_, *into), (_, *out) = (own[name].shape for name in names)
    if not module.is_transposed:
        into, out = into[::-1], out[::-1]
    return into[0] == out[1] and into[1] == (2 if module.has_gate else 1) * out[0]


def unfuse(model: nn.Module, paths: list) -> None:
    """Put plain linear layers in the place of fused experts.

    Args:
        model: changed in place.
        paths: of the fused modules.

    Raises:
        ValueError: when a module is none of the kind.
    """
    for path in paths:
        module = model.get_submodule(path)
        if not is_fused(module):
            raise ValueError(f"{path} is {type(module).__name__}, which holds no fused experts of a known layout")
        model.set_submodule(path, UnfusedExperts(module))


def fuse(model: nn.Module) -> list:
    """Bring all experts back into the fused modules they come from.

    Args:
        model: changed in place; every expert's layers are plain linear ones.

    Returns:
        Paths of the fused modules.

    Raises:
        ValueError: naming a projection whose bias has no place in the fused module.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, UnfusedExperts)]
    for path in paths:
        module: Any = model.get_submodule(path)
        fused = module._fused[0]
        layers = [dict(module._modules[str(number)].named_children()) for number in range(module.num_experts)]
        for name, layer in ((name, layer) for each in layers for name, layer in each.items()):
            if layer.bias is not None and not fused.has_bias:
                raise ValueError(f"{path}.*.{name}.bias")
        for name in projections(fused):
            parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
            weight = torch.stack([_joined(fused, [each[part].weight for part in parts]) for each in layers])
            weight = weight.mT.contiguous() if fused.is_transposed else weight
            setattr(fused, name, nn.Parameter(weight, requires_grad=False))
            if fused.has_bias:
                bias = torch.stack([_joined(fused, [_bias(each[part]) for part in parts]) for each in layers])
                setattr(fused, f"{name}_bias", nn.Parameter(bias, requires_grad=False))
        model.set_submodule(path, fused)
    return paths


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()


def _joined(fused: Any, parts: list) -> Tensor:
    """Rows of the gate and of the up projection in the order of the fused parameter; of one part, it alone."""
    if len(parts) == 1:
        return parts[0].detach()
    if fused.is_concatenated:
        return torch.cat([part.detach() for part in parts])
    return torch.stack([part.detach() for part in parts], 1).flatten(0, 1)
