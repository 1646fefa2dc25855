"""Closed-form repair: each site's left factor, or both, fitted to the original's outputs from the compressed inputs.

With x the original's input at a site and x' what the compressed model, repaired up to there, feeds it, the site should
give W x. For z = R x' the best left factor is Cov(W x, z) (Cov(z) + damping)^{-1}, and the bias follows from the means.
The anchored form chooses both factors anew: W' = P^{-T} SVD_r(P^T W C S^{-T}) S^{-1} with S S^T = Cov(x'),
C = Cov(x, x') and P P^T the method's metric on outputs. (For the left factor alone no such metric changes the answer.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rankwise.errors import NotFiniteError
from rankwise.factors import Factors
from rankwise.layers import LowRankLinear, kind_of
from rankwise.linalg import OutputMetric
from rankwise.models import Site
from rankwise.models.blocks import BlockRunner, allocate
from rankwise.models.original import Original


class Refit(BaseModel):
    """How factors are refitted.

    Attributes:
        factors: `left` keeps R and solves for L; `both` chooses L and R anew (the anchored form).
        damping: ridge, relative to the mean variance of what is solved for. It holds L near its present value.
        batch_size: sequences a batch.
        memory: gigabytes of activations kept in memory; what is larger goes to files in the run's directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    factors: Literal["left", "both"] = "left"
    damping: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Annotated[int, Field(ge=1)] = 8
    memory: Annotated[float, Field(gt=0)] = 8.0


@dataclass
class _Joint:
    """Second moments of x (the original's input) and x' (the compressed model's), both of width n."""

    count: int
    mean: Tensor
    mean_new: Tensor
    cross: Tensor
    new: Tensor

    @classmethod
    def empty(cls, n: int, device: torch.device) -> _Joint:
        zeros = torch.zeros(n, n, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros[0].clone(), zeros, zeros.clone())

    def add(self, x: Tensor, x_new: Tensor) -> None:
        self.count += len(x)
        self.mean += x.sum(0, dtype=torch.float64)
        self.mean_new += x_new.sum(0, dtype=torch.float64)
        self.cross += (x.T @ x_new).double()
        self.new += (x_new.T @ x_new).double()

    def covariances(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C = Cov(x, x'), Cov(x'), E[x], E[x']; plain second moments and zero means unless centred."""
        if not centred:
            return self.cross / self.count, self.new / self.count, 0 * self.mean, 0 * self.mean_new
        mean, mean_new = self.mean / self.count, self.mean_new / self.count
        return (
            self.cross / self.count - mean.outer(mean_new),
            self.new / self.count - mean_new.outer(mean_new),
            mean,
            mean_new,
        )


def refit_left(weight: Tensor, old: Factors, cross: Tensor, new: Tensor, damping: float) -> Factors:
    """The left factor that gives W x from R x', near the old one.

    Args:
        weight: W, shape `[m, n]`, float64.
        old: L, R.
        cross: Cov(x, x'), shape `[n, n]`.
        new: Cov(x'), shape `[n, n]`.
        damping: ridge relative to the mean variance of R x'.
    """
    left, right = old.pair()
    codes = right @ new @ right.T
    residual = weight @ cross @ right.T - left @ codes
    ridge = damping * codes.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    codes.diagonal().add_(ridge)
    return Factors(left + torch.linalg.solve(codes, residual, left=False), right)


def refit_both(
    weight: Tensor, rank: int, cross: Tensor, new: Tensor, damping: float, metric: OutputMetric | None = None
) -> Factors:
    """Both factors of the best W' of a rank for W x ~ W' x'.

    Args:
        weight: W, shape `[m, n]`, float64.
        rank: r.
        cross: Cov(x, x'), shape `[n, n]`.
        new: Cov(x'), shape `[n, n]`.
        damping: ridge relative to the mean variance of x'.
        metric: weighs errors of the outputs; None for all alike.
    """
    # Where the inputs are zero, the identity stands for their metric.
    ridge = damping * new.diagonal().mean() if new.any() else torch.ones((), dtype=new.dtype, device=new.device)
    eye = torch.eye(len(new), dtype=new.dtype, device=new.device)
    factor = torch.linalg.cholesky(new + ridge * eye)
    # The ridge is added on both sides, so that W' = W is the answer where x' = x.
    target = torch.linalg.solve_triangular(factor, (weight @ (cross + ridge * eye)).T, upper=False).T
    weighed = target if metric is None else metric.weigh(target)
    u, s, v = torch.linalg.svd(weighed, full_matrices=False)
    root = s[:rank].sqrt()
    left = u[:, :rank] * root
    right = torch.linalg.solve_triangular(factor.T, (root[:, None] * v[:rank]).T, upper=True).T
    return Factors(left if metric is None else metric.undo(left), right)


def input_groups(runner: BlockRunner, index: int, hidden: Tensor, sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of a block in the order they run, those that read one input together.

    Args:
        runner: runs the block.
        index: which block.
        hidden: a little input, shape `[batch, length, d]`.
        sites: the block's sites.
    """
    order: dict[int, list[Site]] = {}
    alive: list[Tensor] = []

    def watch(site: Site) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            alive.append(inputs[0])
            order.setdefault(id(inputs[0]), []).append(site)

        return site.module(runner.model).register_forward_pre_hook(hook)

    runner.learn(len(hidden))  # Runs the whole model, once, which no hook here may see.
    handles = [watch(site) for site in sites]
    try:
        with torch.no_grad():
            runner.run(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return list(order.values())


class _Reached(Exception):  # noqa: N818
    """Ends a block's run once the input asked for is known."""


@torch.no_grad()
def _inputs_of(runner: BlockRunner, index: int, sites: Sequence[Site], hidden: Tensor) -> list[Tensor]:
    """What sites read when their block runs on `hidden`, each of shape `[tokens, n]`; the rest is not run."""
    seen: dict[str, Tensor] = {}

    def watch(site: Site) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[site.name] = inputs[0].float().flatten(0, -2)
            if len(seen) == len(sites):
                raise _Reached

        return hook

    runner.learn(hidden.shape[0])
    handles = [site.module(runner.model).register_forward_pre_hook(watch(site)) for site in sites]
    try:
        runner.run(index, hidden)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [seen[site.name] for site in sites]


def refit_block(
    runner: BlockRunner,
    index: int,
    sites: Sequence[Site],
    originals: Original,
    dense: Tensor,
    compressed: Tensor,
    settings: Refit,
    scratch: Path | None = None,
    metric_of: Callable[[Site], OutputMetric | None] = lambda site: None,
) -> None:
    """Refit every factored site of a block in the order they run.

    Experts are left as they are: the compressed model routes other tokens to them than the original does.

    Args:
        runner: of the compressed model, changed in place.
        index: which block.
        sites: its sites.
        originals: the original model.
        dense: the original's input to the block, shape `[sequences, length, d]`.
        compressed: the compressed model's, same shape.
        settings: how.
        scratch: folder for the original's inputs at every site, when they are too many for memory.
        metric_of: what errors of a site's outputs are weighed by, for `both`; in float64 on the CPU.

    Raises:
        NotFiniteError: naming the site.
    """
    groups = [
        factored
        for group in input_groups(runner, index, compressed[:1], [site for site in sites if not site.pool])
        if (factored := [site for site in group if kind_of(site.module(runner.model)).trains])
    ]
    if not groups:
        return
    firsts = [group[0] for group in groups]
    per_row = dense.shape[1]
    known = [
        allocate((len(dense), per_row * site.n), scratch, f"inputs-{i}", int(settings.memory * 1e9 / len(firsts)))
        for i, site in enumerate(firsts)
    ]
    with originals.in_place(runner.model, sites):
        for part in runner.batches():
            for kept, x in zip(known, _inputs_of(runner, index, firsts, dense[part]), strict=True):
                kept[part] = x.reshape(-1, kept.shape[1]).cpu()
    for group, kept in zip(groups, known, strict=True):
        joint = _Joint.empty(group[0].n, runner.device)
        for part in runner.batches():
            (x_new,) = _inputs_of(runner, index, group[:1], compressed[part])
            joint.add(kept[part].reshape(-1, group[0].n).to(x_new), x_new)
        for site in group:
            layer: LowRankLinear = site.module(runner.model)
            original: Any = originals.modules[site.name]
            weight = (original.weight.T if site.transposed else original.weight).to(runner.device, torch.float64)
            biased = layer.left.bias is not None
            cross, new, mean, mean_new = joint.covariances(biased)
            old = Factors(layer.left.weight.to(weight), layer.right.weight.to(weight))
            try:
                if settings.factors == "left":
                    found = refit_left(weight, old, cross, new, settings.damping)
                else:
                    # On the CPU, where bases are made too: decompositions in float64 are slow on most GPUs.
                    parts = (weight.cpu(), old.rank, cross.cpu(), new.cpu())
                    found = refit_both(*parts, settings.damping, metric_of(site))
            except torch.linalg.LinAlgError as problem:
                raise NotFiniteError(
                    f"The refit failed: {str(problem).splitlines()[0]}",
                    where=site.name,
                    remedy="raise repair.refit.damping, or use more calibration text",
                ) from None
            left, right = found.pair()
            if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise NotFiniteError("The refit gave NaN or an infinity.", where=site.name, remedy="raise the damping")
            layer.left.weight.data.copy_(left)
            layer.right.weight.data.copy_(right)
            if biased:
                own = 0 if original.bias is None else original.bias.to(weight)
                shift = weight @ mean - (left @ (right @ mean_new.to(right))).to(weight)
                layer.left.bias.data.copy_(own + shift)
