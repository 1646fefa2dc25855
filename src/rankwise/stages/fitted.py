"""The codes of a site, as a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.factors import Factors
from rankwise.quantizers import Packed, Rotation, stored_codebook
from rankwise.sizes import Cut, Form


def save_factors(path: Path, factors: Factors) -> None:
    """Write coded factors, their bias left out."""
    parts: dict[str, Tensor | None] = {
        "left": factors.left,
        "right": factors.right,
        "minus_in": factors.rotation.minus_in,
        "minus_out": factors.rotation.minus_out,
    }
    packed = {"q": factors.q}
    if factors.packed is not None:
        packed |= {"packed_left": factors.packed[0], "packed_right": factors.packed[1]}
    for name, part in packed.items():
        if part is not None:
            parts |= {
                f"{name}.codes": part.codes,
                f"{name}.scale": part.scale,
                f"{name}.columns": torch.tensor(part.columns),
            }
    save_file({name: part.cpu().contiguous() for name, part in parts.items() if part is not None}, path)


def load_factors(path: Path, form: Form, cut: Cut, bias: Tensor | None) -> Factors:
    """Read what `save_factors` wrote.

    Args:
        path: of the file.
        form: says the codebooks.
        cut: what the factors were fitted for.
        bias: of the layer.
    """
    parts = load_file(path)

    def packed(name: str, codebook: str, group: int) -> Packed | None:
        if f"{name}.codes" not in parts:
            return None
        columns, codes = int(parts[f"{name}.columns"]), parts[f"{name}.codes"]
        return Packed(codes, parts[f"{name}.scale"], columns, stored_codebook(codebook, codes.shape[-1]), group)

    of_pair = form.factor_codebook(cut.lr_bits) if cut.lr_bits is not None else ""
    left, right = packed("packed_left", of_pair, 0), packed("packed_right", of_pair, 0)
    return Factors(
        parts.get("left"),
        parts.get("right"),
        bias,
        q=packed("q", form.codebook, form.group),
        packed=None if left is None or right is None else (left, right),
        rotation=Rotation(parts.get("minus_in"), parts.get("minus_out")),
    )
