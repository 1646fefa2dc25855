"""Experts as plain linear layers, where transformers keeps those of a block in few large tensors.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint,
so that a checkpoint loads where rankwise is not installed.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SAID = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers says of every class of fused experts that it can run in more than one way."""


class Layout(NamedTuple):
    """Where a module keeps the weights of its experts.

    Attributes:
        experts: how many there are.
        first: names of the parameters of gate and up projection: one that holds both, one each, or that of up alone.
        down: name of the parameter of the down projection.
        activation: name of the activation between them.
        has_gate: whether there is a gate.
        has_bias: whether each parameter has another one beside it with biases, `[experts, out]`.
        transposed: whether the weights of `first` and those of `down` are kept `[in, out]`.
        concatenated: of a parameter that holds both, whether gate comes before up; else their rows take turns.
        said: whether the module's class says all this; else it is read off names and shapes.
        identities: experts beyond these that give back what they are given; the parameter of `first` has unused room
            for their weights.
    """

    experts: int
    first: tuple
    down: str
    activation: str
    has_gate: bool
    has_bias: bool
    transposed: tuple
    concatenated: bool
    said: bool
    identities: int = 0

    def weights(self) -> tuple:
        """Name of each parameter with weights, and whether these are transposed."""
        return (*((name, self.transposed[0]) for name in self.first), (self.down, self.transposed[1]))

    def parts(self, name: str, rows: int = 0) -> dict:
        """Which projections one parameter holds, and in which of its rows, of an expert's weight `[rows, in]`."""
        if name == self.down:
            return {"down_proj": slice(None)}
        if not self.has_gate:
            return {"up_proj": slice(None)}
        if len(self.first) == 2:
            return {"gate_proj" if name == self.first[0] else "up_proj": slice(None)}
        if self.concatenated:
            return {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
        return {"gate_proj": slice(0, rows, 2), "up_proj": slice(1, rows, 2)}


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
        fused: the module they come from. Its weights are taken from it, the linear ones are views of them.
        layout: how it keeps them.
    """

    post_expert_norm: nn.Module

    def __init__(self, fused: Any, layout: Layout) -> None:
        super().__init__()
        self.num_experts, self.layout = layout.experts, layout
        # What is left of the fused module knows the activation. In a tuple it is no child, whose names would count.
        self._fused = (fused,)
        for name, child in fused.named_children():
            if name != layout.down.rpartition(".")[0]:
                self.add_module(name, child)
        learns = fused.get_parameter(layout.down).requires_grad
        for number, views in enumerate(views_of(fused, layout)):
            expert = Expert()
            for name, (weight, bias) in views.items():
                expert.add_module(name, _linear(weight, bias).requires_grad_(learns))
            self.add_module(str(number), expert)
        for name, _ in layout.weights():
            owner, _, leaf = name.rpartition(".")
            for kept in (leaf, f"{leaf}_bias")[: 1 + layout.has_bias]:
                del fused.get_submodule(owner)._parameters[kept]

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Map tokens, shape `[..., H]`, to the same shape.

        Args:
            hidden_states: the tokens.
            routing: which experts each token goes to, integers of shape `[tokens, k]`, and with what weight, floating
                and of the same shape, in either order. An index that is no expert's is passed over, or is one of those
                that give back what they are given. None of both where the tokens are there once for each expert,
                `[experts tokens, H]`, zero for those that it is not to see.
            named: the same by name, as some blocks hand them on.
        """
        given = [*routing, *named.values()]
        if not given:
            return self._by_place(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = next(each for each in given if not each.is_floating_point())
        weight = next(each for each in given if each.is_floating_point())
        top = index.shape[-1]
        slots = index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(index.reshape(-1).clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
        found = []
        *routed, others = slots.split(counts)
        for number, mine in enumerate(routed):
            if len(mine):
                found.append(self._modules[str(number)](x[mine // top], self._activate))  # type: ignore[misc]
        if self.layout.identities and len(others):
            found.append(x[others // top])
        if not found:
            return torch.zeros_like(hidden_states)
        outputs = torch.cat(found)
        # Versions of transformers that know no such norm do not say that there is none.
        if getattr(self._fused[0], "has_post_expert_norm", False):
            outputs = self.post_expert_norm(outputs)
        # Every slot is written once and a token's slots are summed in order: the same on every run.
        spread = outputs.new_zeros(len(slots), outputs.shape[-1]).index_copy(0, slots[: len(outputs)], outputs)
        weighted = spread * weight.reshape(-1, 1)
        return weighted.view(len(x), top, -1).sum(1).to(hidden_states.dtype).view(hidden_states.shape)

    def _by_place(self, hidden_states: Tensor) -> Tensor:
        """Each expert maps its own share of the rows; those that are zero stay so."""
        found = []
        for number, rows in enumerate(hidden_states.chunk(self.num_experts)):
            mine = rows.any(-1).nonzero()[:, 0]
            outputs = torch.zeros_like(rows)
            if len(mine):
                mapped = self._modules[str(number)](rows[mine], self._activate)  # type: ignore[misc]
                outputs = outputs.index_copy(0, mine, mapped.to(rows.dtype))
            found.append(outputs)
        return torch.cat(found)

    def _activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        fused, activation = self._fused[0], operator.attrgetter(self.layout.activation)
        if gate is None:
            return activation(fused)(up)
        if not self.layout.said:
            return activation(fused)(gate) * up
        if self.layout.concatenated:
            return fused._apply_gate(torch.cat([gate, up], -1))
        return fused._apply_gate(torch.stack([gate, up], -1).flatten(-2))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def views_of(fused: Any, layout: Layout) -> list[dict[str, tuple[Tensor, Tensor | None]]]:
    """Weight `[out, in]` and bias of every projection of every expert, views of a fused module's parameters."""
    found: list = [{} for _ in range(layout.experts)]
    for name, transposed in layout.weights():
        whole = fused.get_parameter(name).detach()
        biases = fused.get_parameter(f"{name}_bias").detach() if layout.has_bias else [None] * layout.experts
        if whole.ndim == 3:
            whole = whole[: layout.experts]
        for views, kept, bias in zip(found, whole.view(layout.experts, -1, whole.shape[-1]), biases, strict=True):
            weight = kept.T if transposed else kept
            for part, rows in layout.parts(name, len(weight)).items():
                views[part] = (weight[rows], None if bias is None else bias[rows])
    return found


def layout_of(module: Any) -> Layout | None:
    """How a module keeps fused experts; None where it is none, or of no layout that can be taken apart.

    A module with parameters or buffers of its own beside the projections is none. Those whose class says how it keeps
    them are known by that; those of Llama 4, DBRX and LongCat-Flash by the names and shapes of their parameters.
    """
    count = _count(module)
    if not isinstance(count, int) or count < 1 or dict(module.named_buffers(recurse=False)):
        return None
    layout: Layout | None
    if all(hasattr(module, name) for name in _SAID):
        layout = _said(module)
    elif all(isinstance(module._parameters.get(name), Tensor) for name in ("gate_up_proj", "down_proj")):
        layout = _unsaid(module)
    else:
        layout = _in_rows(module)
    return layout if layout is not None and _fits(module, layout) else None


def _count(module: Any) -> Any:
    return getattr(module, "num_experts", getattr(module, "num_routed_experts", None))


def _said(module: Any) -> Layout:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return Layout(
        module.num_experts,
        (first,),
        "down_proj",
        "act_fn",
        module.has_gate,
        module.has_bias,
        (module.is_transposed, module.is_transposed),
        module.is_concatenated,
        True,
    )


def _unsaid(module: Any) -> Layout:
    """That of two tensors of three dimensions, gate before up; their shapes say on which side the inputs are."""
    first, down = module.gate_up_proj, module.down_proj
    transposed = first.ndim == down.ndim == 3 and first.shape[1] == down.shape[2]
    return Layout(
        _count(module),
        ("gate_up_proj",),
        "down_proj",
        "act_fn",
        True,
        False,
        (transposed, transposed),
        True,
        False,
        (getattr(module, "zero_expert_num", 0) or 0) if hasattr(module, "identity_expert") else 0,
    )


def _in_rows(module: Any) -> Layout | None:
    """That of three matrices in a module inside, where the rows of all experts lie one below another."""
    for name, child in module.named_children():
        if child._parameters.keys() == {"w1", "v1", "w2"}:
            first = (f"{name}.w1", f"{name}.v1")
            activation = f"{name}.activation_fn"
            return Layout(_count(module), first, f"{name}.w2", activation, True, False, (False, True), False, False)
    return None


def _fits(module: Any, layout: Layout) -> bool:
    """Whether a module holds the parameters of a layout and no others of its own, of shapes that go together."""
    names = [name for name, _ in layout.weights()]
    inside = layout.down.rpartition(".")[0]
    owner = module.get_submodule(inside)
    own = {f"{inside}.{name}".strip("."): p for name, p in owner._parameters.items() if p is not None}
    if set(own) != {*names, *(f"{name}_bias" for name in names if layout.has_bias)}:
        return False
    if inside and any(p is not None for p in module._parameters.values()):
        return False
    sides = []
    for name, transposed in layout.weights():
        whole = own[name]
        if layout.identities and name in layout.first:
            if len(whole) != layout.experts + layout.identities:
                return False
            whole = whole[: layout.experts]
        if len(whole) % layout.experts or (whole.ndim == 3) != (len(whole) == layout.experts) or whole.ndim > 3:
            return False
        shape = (whole.shape[-2] if whole.ndim == 3 else len(whole) // layout.experts, whole.shape[-1])
        sides.append(shape[::-1] if transposed else shape)
    *into, (width, inner) = sides
    joined = 2 if layout.has_gate and len(layout.first) == 1 else 1
    return all(rows == joined * inner and columns == width for rows, columns in into)


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
        layout = layout_of(module)
        if layout is None:
            raise ValueError(f"{path} is {type(module).__name__}, which holds no fused experts of a known layout")
        model.set_submodule(path, UnfusedExperts(module, layout))


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
        fused, layout = module._fused[0], module.layout
        layers = [dict(module._modules[str(number)].named_children()) for number in range(layout.experts)]
        for name, layer in ((name, layer) for each in layers for name, layer in each.items()):
            if layer.bias is not None and not layout.has_bias:
                raise ValueError(f"{path}.*.{name}.bias")
        for name, transposed in layout.weights():
            parts = list(layout.parts(name))
            weight = torch.stack([_joined(layout, [each[part].weight for part in parts]) for each in layers])
            weight = weight.mT.contiguous() if transposed else weight
            if layout.identities and name in layout.first:
                weight = torch.cat([weight, weight.new_zeros(layout.identities, *weight.shape[1:])])
            owner, _, leaf = name.rpartition(".")
            kept = fused.get_submodule(owner)
            # In a module inside lie matrices, the rows of all experts one below another.
            setattr(kept, leaf, nn.Parameter(weight.flatten(0, 1) if owner else weight, requires_grad=False))
            if layout.has_bias:
                bias = torch.stack([_joined(layout, [_bias(each[part]) for part in parts]) for each in layers])
                setattr(kept, f"{leaf}_bias", nn.Parameter(bias, requires_grad=False))
        model.set_submodule(path, fused)
    return paths


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()


def _joined(layout: Layout, parts: list) -> Tensor:
    """Rows of the gate and of the up projection in the order of the fused parameter; of one part, it alone."""
    if len(parts) == 1:
        return parts[0].detach()
    if layout.concatenated:
        return torch.cat([part.detach() for part in parts])
    return torch.stack([part.detach() for part in parts], 1).flatten(0, 1)
