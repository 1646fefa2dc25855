"""What a method saw in one weight, as a file of a stage that only grows."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.factors import Basis
from rankwise.methods import Outlook
from rankwise.models import Site
from rankwise.quantizers import Packed, Rotation, stored_codebook
from rankwise.runs import Stage
from rankwise.stages.keys import model_key
from rankwise.stages.measuring import measured_key
from rankwise.stages.work import Work


def outlook_stage(work: Work) -> Stage:
    """The stage that grows a file for every outlook."""
    method = work.recipe.method
    key = measured_key(work) if method.requests() else model_key(work)
    return work.stage(f"outlooks-{method.label}", {**key, "method": method.model_dump(exclude=set(method.unseen))})


def outlook_file(site: Site, q_bits: int) -> str:
    """Name of the file of an outlook beside a Q of so many bits."""
    return f"{site.name}.safetensors" if not q_bits else f"{site.name}.{q_bits}bits.safetensors"


def save_outlook(path: Path, outlook: Outlook, most: int) -> None:
    """Write an outlook.

    Args:
        path: of the file.
        outlook: what is kept of it: energies, codes of Q, and
        most: so many components of the basis.
    """
    basis = outlook.basis
    parts: dict[str, Tensor | None] = {
        "energy": basis.energy.float(),
        "damping": torch.tensor([basis.damping]),
        "noise": torch.tensor([[float(bits), share] for bits, share in outlook.noise.items()]).reshape(-1, 2).double(),
    }
    parts |= {
        "left": basis.left[:, :most].float(),
        "right": basis.right[:most].float(),
        "mean_output": None if basis.mean_output is None else basis.mean_output.float(),
        "mean_code": None if basis.mean_code is None else basis.mean_code[:most].float(),
        "minus_in": outlook.rotation.minus_in,
        "minus_out": outlook.rotation.minus_out,
    }
    if outlook.q is not None:
        parts |= {"q.codes": outlook.q.codes, "q.scale": outlook.q.scale, "q.group": torch.tensor(outlook.q.group)}
        parts["q.columns"] = torch.tensor(outlook.q.columns)
    save_file({name: part.cpu().contiguous() for name, part in parts.items() if part is not None}, path)


def load_outlook(path: Path, codebook: str) -> Outlook:
    """Read what `save_outlook` wrote."""
    parts = load_file(path)
    q = None
    if "q.codes" in parts:
        codes, columns, group = parts["q.codes"], int(parts["q.columns"]), int(parts["q.group"])
        q = Packed(codes, parts["q.scale"], columns, stored_codebook(codebook, codes.shape[-1]), group)
    basis = Basis(
        parts["left"],
        parts["right"],
        parts["energy"],
        parts.get("mean_output"),
        parts.get("mean_code"),
        float(parts["damping"]),
    )
    return Outlook(basis, q, Rotation(parts.get("minus_in"), parts.get("minus_out")), noise_of(parts["noise"]))


def noise_of(rows: Tensor) -> dict[int, float]:
    """By bits of L and R, the share that was kept in rows of two."""
    return {int(bits): share for bits, share in rows.tolist()}
