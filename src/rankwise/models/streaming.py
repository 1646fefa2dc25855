"""Weights that lie in files until they are needed: one block at a time in the type and on the device it computes in.

What transformers reads from safetensors on a CPU is the file itself, mapped into memory. It stays so: before a block
runs, its matrices are cast and moved, and after it they are let go. What lies outside the blocks (embeddings, head,
norms) and every vector is cast and moved once. What a run makes (factors, codes) goes to files that have no name and
vanish with the process.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.models.sites import decoder_blocks
from rankwise.runs import take_space

SMALL = 2**20
"""Bytes up to which a tensor is not worth a file."""

_PREFIX = "weights-"


def into_file(tensor: Tensor, folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU, in a file mapped into memory if it is large; the file has no name and lives with the tensor.

    Args:
        tensor: of any shape and type.
        folder: on a disk with room for it.
        dtype: of the copy; that of the tensor by default.

    Raises:
        RunError: when the disk has no room.
    """
    dtype = dtype or tensor.dtype
    size = tensor.numel() * dtype.itemsize
    if size <= SMALL:
        return tensor.to("cpu", dtype, copy=True)
    room = empty_in_file(tuple(tensor.shape), dtype, folder)
    return room.copy_(tensor)


def empty_in_file(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """An empty tensor in a file without a name; errors as for `into_file`."""
    count = math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX, delete=False) as file:
        path = Path(file.name)
    try:
        take_space(path, count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
    finally:
        path.unlink(missing_ok=True)


class Streaming:
    """Holds a model's weights in files and its blocks ready.

    Args:
        model: as it was read from files, on the CPU.
        folder: for weights that the run makes.
        device: where blocks compute.
        dtype: what floating weights compute in; None for what they are stored in.

    Attributes:
        dtype: as given; may be changed between passes.
    """

    def __init__(self, model: Any, folder: Path, device: torch.device, dtype: torch.dtype | None) -> None:
        self.model, self.folder, self.device, self.dtype = model, folder, device, dtype
        for left in folder.glob(f"{_PREFIX}*"):  # by a process that was killed just there
            left.unlink()
        prefix, blocks = decoder_blocks(model)
        self._inside = f"{prefix}."
        # Held on to, so that their addresses stay theirs.
        self._read = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        self._cast: dict[str, tuple[Tensor, Tensor]] = {}
        self._taken: dict[int, list[list[tuple[dict[str, Any], str, Any]]]] = {}
        for block in dict.fromkeys(blocks):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, always_call=True)
        for name, buffer in model.named_buffers():
            if not name.startswith(self._inside) and buffer.device != device:
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._buffers[leaf] = buffer.to(device)

    def streams(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is cast and moved with its block alone."""
        return name.startswith(self._inside) and parameter.ndim > 1

    def to_compute(self) -> None:
        """Cast and move what is not streamed."""
        for name, parameter in self.model.named_parameters():
            if self.streams(name, parameter):
                continue
            dtype = self.dtype if self.dtype is not None and parameter.is_floating_point() else parameter.dtype
            place = torch.device("cpu") if name.startswith(self._inside) else self.device
            if parameter.dtype == dtype and parameter.device == place:
                continue
            before, held = parameter.data, self._cast.get(name)
            if held is not None and held[1].data_ptr() == before.data_ptr():
                before = held[0]  # as it was read
            on_cpu = place.type == "cpu"
            parameter.data = into_file(before, self.folder, dtype) if on_cpu else before.to(place, dtype)
            if parameter.ndim > 1:
                self._cast[name] = before, parameter.data

    def stored(self, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter's values in the type that it is stored in; those that were read and cast alone are as read."""
        before, after = self._cast.pop(name, (None, None))
        if before is not None and after is not None and parameter.data_ptr() == after.data_ptr():
            return before
        return into_file(parameter.data, self.folder, dtype)

    def settle(self, module: nn.Module) -> None:
        """Put what a module holds in memory of its own into files."""
        for each in module.modules():
            for held in (each._parameters, each._buffers):
                for name, tensor in held.items():
                    if tensor is not None and not self._in_file(tensor):
                        moved = into_file(tensor.detach(), self.folder)
                        frozen = nn.Parameter(moved, requires_grad=False)
                        held[name] = frozen if isinstance(tensor, nn.Parameter) else moved  # type: ignore[assignment]

    def _in_file(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        small = tensor.numel() * tensor.dtype.itemsize <= SMALL
        return small or storage.filename is not None or storage.data_ptr() in self._read

    def _wanted(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor if tensor.dtype == dtype and tensor.device == self.device else tensor.to(self.device, dtype)

    def _enter(self, block: nn.Module, _arguments: Any) -> None:
        taken: list[tuple[dict[str, Any], str, Any]] = []
        self._taken.setdefault(id(block), []).append(taken)
        for module in block.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and (ready := self._wanted(parameter)) is not parameter:
                    taken.append((module._parameters, name, parameter))
                    # Of one that learns the gradient flows back to where it lies.
                    learns = parameter.requires_grad
                    module._parameters[name] = ready if learns else nn.Parameter(ready, requires_grad=False)  # type: ignore[assignment]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device != self.device:
                    taken.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.to(self.device)

    def _leave(self, block: nn.Module, _arguments: Any, _output: Any) -> None:
        waiting = self._taken.get(id(block))
        for held, name, tensor in waiting.pop() if waiting else ():
            held[name] = tensor
