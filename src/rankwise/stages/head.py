"""A head of two factors: measured while the model is the original, fitted and stored last."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.factors import Factors
from rankwise.layers import substitute
from rankwise.linalg import OutputMetric, decompose
from rankwise.models import Site
from rankwise.stages.at_site import naming, on_gpu_or_cpu
from rankwise.stages.keys import calibration_key
from rankwise.stages.work import Work
from rankwise.statistics.head_moments import HeadMoments, head_moments

INPUT_DAMPING = 0.01
"""Added to E[x x^T], relative to its mean diagonal."""

ROW_DAMPING = 1.0
"""Added to what rows weigh, relative to their mean; see benchmarks/results/head.md."""

_ROWS = 2**11
"""Rows of a head that are taken to float64 at a time."""

_FILE = "moments.safetensors"


def measure_head(work: Work) -> HeadMoments | None:
    """What the head reads and says on the calibration text; None where it stays one matrix.

    Raises:
        NotFiniteError: when that is not finite.
    """
    if work.vocabulary is None or work.vocabulary.rank is None:
        return None
    stage = work.stage("head", calibration_key(work))
    if not stage.taken_over():
        calibration, batch_size = work.texts.calibration, work.recipe.calibration.batch_size
        found = head_moments(work.loaded.model, calibration.ids, batch_size, work.reporter)
        with stage.making() as folder, folder.writing(_FILE) as path:
            save_file({"inputs": found.inputs, "rows": found.rows}, path)
    return HeadMoments(**load_file(stage.folder / _FILE))


def fit_head(weight: Tensor, seen: HeadMoments, rank: int, row_damping: float = ROW_DAMPING) -> tuple[Factors, float]:
    """The two factors in place of a head that change its logits least, errors of a token weighed as it is predicted.

    Minimises tr(D (W - L R) C (W - L R)^T), C = E[x x^T] and D = diag(E[p (1 - p)]), both damped: the second order of
    the change of the loss, its cross terms between tokens left out. With P P^T = C and U the leading eigenvectors of
    P^T W^T D W P this is L = W P U, R = U^T P^{-1}: a few rows of W are taken to float64 at a time.

    Args:
        weight: W, shape `[v, d]`.
        seen: C and D, on the same device.
        rank: r.
        row_damping: added to D, relative to its mean.

    Returns:
        L, shape `[v, r]`, float32 at least, and R, shape `[r, d]`, float64, without a bias; and the share of what W has
        in this metric that they lose.
    """
    metric = OutputMetric.where_felt(seen.inputs[None], INPUT_DAMPING)
    weighs = seen.rows + row_damping * seen.rows.mean()
    parts = [slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)]
    moment = torch.zeros_like(seen.inputs)
    for part in parts:
        rows = weight[part].double()
        moment.addmm_((rows * weighs[part, None]).T, rows)
    found = decompose(torch.eye(len(moment)).to(moment), outputs=moment, metric=metric)
    wide = torch.promote_types(weight.dtype, torch.float32)
    decoder = found.encoder[:rank].T
    left = torch.cat([(weight[part].double() @ decoder).to(wide) for part in parts])
    whole = float(found.energy.sum())
    lost = float(found.energy[rank:].sum()) / whole if whole else 0.0
    return Factors(left, found.left[:, :rank].T), lost


def store_head(work: Work, seen: HeadMoments | None) -> None:
    """Put two factors in place of the head, in the type that it is stored in.

    Args:
        work: the run; every site is stored, and the head is the original's.
        seen: what `measure_head` answered.

    Raises:
        NotFiniteError: when it cannot be decomposed, or a number is beyond the range of its type.
    """
    if seen is None:
        return
    assert work.vocabulary is not None
    assert work.vocabulary.rank is not None
    loaded, rank = work.loaded, work.vocabulary.rank
    site = head_site(loaded.model)
    loaded.to_stored_dtypes()
    weight = site.weight(loaded.model)

    def fit(device: torch.device) -> tuple[Factors, float]:
        with naming(site):
            return fit_head(weight.to(device), seen.to(device), rank)

    factors, lost = on_gpu_or_cpu(work, site, fit)
    factors = Factors(factors.left, factors.right, site.bias(loaded.model))
    substitute(loaded.model, site.name, factors, "two_factor", weight.dtype)
    loaded.settle(site.name)
    loaded.to_compute_dtypes()
    work.reporter.note(
        f"the head's two factors lose {lost:.2%} of the square of its logits, weighed by what is predicted"
    )


def head_site(model: Any) -> Site:
    """The head of a model that holds numbers, as what is decomposed is named."""
    head = model.get_output_embeddings()
    name = next(name for name, each in model.named_modules() if each is head)
    v, d = head.weight.shape
    return Site(name, "head", 0, v, d, False, head.bias is not None, name)
