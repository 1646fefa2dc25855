"""The quantised linear layer: W = U^T (Q + L R) V with Q, and if so wished L and R, as codes of few bits.

Apart from the imports of rankwise's own files the source of this file goes into the modelling file of every checkpoint.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.quantizers.codes import BYTE, decode, tables_for, tile_of, unpack_bits, wide_scale
from rankwise.quantizers.rotation import rotate

_ROWS = 256


def free_memory() -> int:
    """Bytes of main memory that may still be taken; 0 where the system does not say."""
    found = []
    try:
        facts = Path("/proc/meminfo").read_text().split()
        found.append(int(facts[facts.index("MemAvailable:") + 1]) * 1024)
    except (OSError, ValueError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            # Half of all there is, where nobody says what is free.
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = Path("/sys/fs/cgroup")
    try:
        limit, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        facts = (group / "memory.stat").read_text().split()
        # What files left in memory is given back.
        found.append(limit - taken + int(facts[facts.index("inactive_file") + 1]))
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(found, default=0))


class KeptWhereItFits:
    """Whether the quantised layers of a model keep their weights decoded: on a CPU, where memory allows; said once.

    Args:
        entries: of all those weights.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._decided: bool | None = None

    def fits(self, width: int) -> bool:
        """Whether memory holds them in numbers of so many bytes, and half of that beside them."""
        return 1.5 * self.entries * width < free_memory()

    def in_words(self, kept: bool, width: int) -> str:
        """What becomes of them, and the memory that is of."""
        size = f"{self.entries * width / 1e6:,.1f} MB"
        return f"are decoded once and kept ({size})" if kept else f"are decoded in every pass (kept, they take {size})"

    def allows(self, x: Tensor) -> bool:
        """Whether a layer keeps its weight to map x."""
        if x.device.type != "cpu":
            return False
        if self._decided is None:
            self._decided = self.fits(x.element_size())
            logging.getLogger(__name__).warning(
                f"rankwise: quantised weights {self.in_words(self._decided, x.element_size())}; "
                f"rankwise_cache_dense={not self._decided} changes that"
            )
        return self._decided


class StoredLinear(nn.Linear):
    """A linear layer without bias whose numbers are as wide as they are stored, whatever it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`, in the type of x."""
        return functional.linear(x, self.weight.to(x.dtype))


class PackedMatrix(nn.Module):
    """A matrix as codes and scales.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        bits: a weight.
        codebook: its name, as `codes.decode` knows it.
        scales: shape of the scales, `[1, 1]`, `[rows, 1]` or `[rows, groups]`.
        group: columns that share a scale; 0 when all columns do.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int, codebook: str, scales: list, group: int) -> None:
        super().__init__()
        self.columns, self.codebook, self.group = columns, codebook, group
        tables_for(codebook, bits)  # a name that it does not know is no codebook
        self.register_buffer("codes", torch.zeros(rows, -(-columns // tile_of(codebook)[1]), bits, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.bfloat16))

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Map `[..., columns]` to `[..., rows]` by the matrix, or the other way by its transpose."""
        matrix = self.dense(x.dtype)
        return x @ (matrix if transposed else matrix.T)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix it stands for, shape `[rows, columns]`."""
        tables = [table.to(self.codes.device) for table in tables_for(self.codebook, self.codes.shape[-1])]
        wide = torch.promote_types(dtype, torch.float32)
        parts = []
        # In parts: codes are widened while they are read.
        for codes, scale in zip(
            self.codes.split(_ROWS), self.scale.expand(len(self.codes), -1).split(_ROWS), strict=True
        ):
            values = decode(codes, self.codebook, tables).to(wide)
            scaled = values * wide_scale(scale.to(wide), self.group, values.shape[1])
            parts.append(scaled[:, : self.columns].to(dtype))
        return torch.cat(parts)


class QuantizedLinear(nn.Module):
    """y = U^T (Q + L R) V x + b, Q dequantised in every forward; W once where `cache` says so and no gradient is taken.

    U and V are randomised Hadamard rotations (or nothing).

    Args:
        in_features: n.
        out_features: m.
        bias: whether the layer adds a bias of shape `[m]`.
        form: `{"rank": r, "full": t, "half": name, "hadamard": bool, "trained_signs": bool, "q": parts, "factors":
            parts}`: the first t ranks of L R are 16-bit numbers, the others codes. Parts are `PackedMatrix`'s `{"bits",
            "codebook", "scales", "group"}`, of Q and of L^T and R each; None where there are no codes. `"half"` names
            the type of those numbers, which is said outright: loading would take the model's.
    """

    signs_in: Tensor | None
    signs_out: Tensor | None
    cache: bool | KeptWhereItFits = False

    def __init__(self, in_features: int, out_features: int, bias: bool, form: dict) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, form["rank"]
        self.form = form
        number = getattr(torch, form["half"])
        self.q = None if form["q"] is None else PackedMatrix(out_features, in_features, **form["q"])
        self.left: Any = None
        self.right: Any = None
        self.packed_left: Any = None
        self.packed_right: Any = None
        if form["full"]:
            self.left = StoredLinear(form["full"], out_features, bias=False, dtype=number)
            self.right = StoredLinear(in_features, form["full"], bias=False, dtype=number)
        if self.rank > form["full"]:
            self.packed_left = PackedMatrix(self.rank - form["full"], out_features, **form["factors"])
            self.packed_right = PackedMatrix(self.rank - form["full"], in_features, **form["factors"])
        for name, size in (("signs_in", in_features), ("signs_out", out_features)):
            if form["trained_signs"]:
                self.register_parameter(name, nn.Parameter(torch.ones(size, dtype=number)))
            else:
                packed = torch.zeros(-(-size // BYTE), 1, dtype=torch.uint8) if form["hadamard"] else None
                self.register_buffer(name, packed)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._kept: Tensor | None = None

    def signs(self, signs: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Signs of the rotation as numbers, shape `[size]`."""
        if signs.dtype != torch.uint8:
            return signs.to(dtype)
        return 1 - 2 * unpack_bits(signs).flatten()[:size].to(dtype)

    def pair(self, dtype: torch.dtype) -> tuple:
        """L, shape `[m, r]`, and R, shape `[r, n]`."""
        lefts, rights = [], []
        if self.left is not None:
            lefts.append(self.left.weight.to(dtype))
            rights.append(self.right.weight.to(dtype))
        if self.packed_left is not None:
            lefts.append(self.packed_left.dense(dtype).T)
            rights.append(self.packed_right.dense(dtype))
        return torch.cat(lefts, 1), torch.cat(rights)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        if not torch.is_grad_enabled() and self._keeps(x) and self._is_plain():
            if self._kept is None or self._kept.dtype != x.dtype or self._kept.device != x.device:
                with torch.inference_mode(False):
                    eye = torch.eye(self.in_features, device=x.device)
                    self._kept = self._product(eye).T.to(x.dtype, memory_format=torch.contiguous_format)
            y = functional.linear(x, self._kept)
        else:
            self._kept = None
            y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _keeps(self, x: Tensor) -> bool:
        return self.cache if isinstance(self.cache, bool) else self.cache.allows(x)

    def _is_plain(self) -> bool:
        """Whether nobody put something else in place of a part, whose values may change unseen."""
        parts = (self.q, self.left, self.right, self.packed_left, self.packed_right)
        return all(type(part) in (StoredLinear, PackedMatrix) for part in parts if part is not None)

    def _product(self, x: Tensor) -> Tensor:
        """W x, every part called and not read, so that what others hang on it (offloading, adapters) takes part."""
        if self.signs_in is not None:
            x = rotate(x * self.signs(self.signs_in, self.in_features, x.dtype))
        parts = [] if self.q is None else [self.q(x)]
        if self.left is not None:
            parts.append(self.left(self.right(x)))
        if self.packed_left is not None:
            parts.append(self.packed_left(self.packed_right(x), transposed=True))
        y = parts[0]
        for part in parts[1:]:
            y = y + part
        if self.signs_out is not None:
            y = rotate(y) * self.signs(self.signs_out, self.out_features, y.dtype)
        return y

    def description(self) -> dict:
        """What a config says of it, beside its shape."""
        return {"bias": self.bias is not None, "storage": "quantized", "form": self.form}

    @classmethod
    def described(cls, form: dict) -> "QuantizedLinear":
        """An empty layer from a config's entry."""
        m, n = form["shape"]
        return cls(n, m, form["bias"], form["form"])

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """W as it is meant, shape `[m, n]`."""
        device = next(t.device for t in (*self.parameters(), *self.buffers()))
        shape = (self.out_features, self.in_features)
        weight = torch.zeros(shape, dtype=dtype, device=device) if self.q is None else self.q.dense(dtype)
        if self.rank:
            left, right = self.pair(dtype)
            weight = weight + left @ right
        if self.signs_in is not None:
            weight = rotate(weight) * self.signs(self.signs_in, self.in_features, dtype)
        if self.signs_out is not None:
            weight = (rotate(weight.T) * self.signs(self.signs_out, self.out_features, dtype)).T
        return weight

    def dense_bias(self) -> Tensor | None:
        """b, shape `[m]`, or None."""
        return self.bias


def quantized_layers(model: nn.Module) -> list:
    """Those of a model, of this class or of its copy in a checkpoint's modelling file."""
    return [module for module in model.modules() if hasattr(module, "cache") and hasattr(module, "dense_weight")]


def cache_dense(model: nn.Module, on: bool | str) -> None:
    """Let every quantised layer keep its weight dequantised (faster, as large as the original), or not.

    Args:
        model: changed in place.
        on: `"auto"` for where memory allows, on a CPU.
    """
    layers = quantized_layers(model)
    entries = sum(layer.in_features * layer.out_features for layer in layers)
    choice = KeptWhereItFits(entries) if on == "auto" else bool(on)
    for layer in layers:
        layer.cache = choice
        layer._kept = None
