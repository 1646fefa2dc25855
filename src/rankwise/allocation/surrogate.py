"""The Gaussian process that stands in for the objective, and the point it would try next. BoTorch does the work.

Frazier (2018) for the method, Ament et al. (2023) for log expected improvement. A proposal depends on the trials so
far, the seed and the trial's number alone: an interrupted search goes on exactly as it would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rankwise.allocation.box import Box, unit
from rankwise.errors import MissingPackageError

LengthScales = Literal["fitted", "paper"]
Acquisition = Literal["log_ei", "qlog_nei"]

_RANDOM_POINTS = 512
_NEAR_POINTS = 512
_RADII = (0.01, 0.03, 0.1, 0.25)
_RESTARTS = 2
_REFINEMENTS = 25
_FIT_STEPS = 40
_SAFE_NOISE = 1e-2
_PAPER_SCALES = {True: 1.0, False: 0.8}


def require_botorch() -> None:
    """Raise unless BoTorch is installed.

    Raises:
        MissingPackageError: saying what to install.
    """
    try:
        import botorch  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "A search needs BoTorch.", where="allocation", remedy="pip install 'rankwise[search]'"
        ) from None


def generator(seed: int, trial: int) -> torch.Generator:
    """A source of randomness for one trial."""
    return torch.Generator().manual_seed((seed * 1_000_003 + trial) % 2**63)


def _near_points(space: Box, best: Tensor, source: torch.Generator) -> Tensor:
    """Points around the best ones: all coordinates moved a little, or a few moved and some put on a bound."""
    count = _NEAR_POINTS
    centres = best[torch.randint(len(best), (count,), generator=source)]
    radius = torch.tensor(_RADII, dtype=torch.float64)[torch.randint(len(_RADII), (count, 1), generator=source)]
    step = torch.randn(count, space.dimensions, generator=source, dtype=torch.float64)
    sparse = torch.rand(count, 1, generator=source) < 0.5
    moved = torch.rand(count, space.dimensions, generator=source) < min(1.0, 3 / space.dimensions)
    points = centres + radius * step * (space.upper - space.lower) * torch.where(sparse, moved, True)
    snapped = torch.rand(count, space.dimensions, generator=source) < 0.5 / space.dimensions
    return space.project(torch.where(snapped, space.upper, points))


def _model(space: Box, points: Tensor, values: Tensor, scales: LengthScales) -> Any:
    """Fit a process to values (higher is better) at points in the unit cube, or in the paper's own units."""
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim.fit import fit_gpytorch_mll_scipy
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import LogNormalPrior

    d = space.dimensions

    def unfitted() -> Any:
        if scales == "paper":
            kernel = MaternKernel(nu=2.5, ard_num_dims=d)
            fixed = [_PAPER_SCALES[attention] for attention in space.attention]
            kernel.lengthscale = torch.tensor(fixed, dtype=torch.float64).unsqueeze(0)
            kernel.raw_lengthscale.requires_grad_(False)
        else:
            # Hvarfner et al. (2024): a length scale that grows with the root of the dimension.
            prior = LogNormalPrior(math.sqrt(2) + math.log(d) / 2, math.sqrt(3))
            kernel = MaternKernel(nu=2.5, ard_num_dims=d, lengthscale_prior=prior)
            kernel.lengthscale = torch.full((1, d), math.sqrt(d) * 0.5, dtype=torch.float64)
        return SingleTaskGP(
            points, values.unsqueeze(-1), covar_module=ScaleKernel(kernel), outcome_transform=Standardize(m=1)
        )

    model = unfitted()
    try:
        # A bounded number of steps, without the retries that `fit_gpytorch_mll` makes when the bound is met: the last
        # steps change the length scales little and would take most of the time.
        fit_gpytorch_mll_scipy(ExactMarginalLogLikelihood(model.likelihood, model), options={"maxiter": _FIT_STEPS})
    except RuntimeError:
        # A step into a singular kernel. The starting values, with more noise, still make a usable model.
        model = unfitted()
        model.likelihood.noise = _SAFE_NOISE
    return model.eval()


def _acquisition(model: Any, kind: Acquisition, points: Tensor, best: float, seed: int, pending: Tensor | None) -> Any:
    from botorch.acquisition import LogExpectedImprovement, qLogNoisyExpectedImprovement
    from botorch.sampling import SobolQMCNormalSampler

    if kind == "log_ei" and pending is None:
        return LogExpectedImprovement(model, best_f=best)
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=seed)
    return qLogNoisyExpectedImprovement(model, points, sampler=sampler, prune_baseline=True, X_pending=pending)


def propose(
    space: Box,
    points: Tensor,
    values: Tensor,
    trial: int,
    seed: int,
    *,
    scales: LengthScales = "fitted",
    acquisition: Acquisition = "log_ei",
    is_new: Callable[[Tensor], bool] = lambda _point: True,
    pending: Tensor | None = None,
) -> Tensor:
    """The next point to try.

    The budget is a linear equality handed to the optimiser of the acquisition, so no proposal is wasted.

    Args:
        space: where points lie.
        points: tried so far, shape `[t, d]`.
        values: objective there, shape `[t]`, positive, lower is better; modelled by its logarithm.
        trial: number of the trial to come.
        seed: of the search.
        scales: length scales `fitted` by likelihood, or the `paper`'s, 1.0 for attention and 0.8 for MLP coordinates.
        acquisition: log expected improvement, or its noisy form.
        is_new: says whether a point stands for ranks that were not tried.
        pending: points that are being tried, shape `[p, d]`; then the noisy form is taken, which counts them in.

    Returns:
        Shape `[d]`.
    """
    from botorch.exceptions import BotorchWarning, InputDataWarning, OptimizationWarning
    from botorch.optim import optimize_acqf

    source = generator(seed, trial)
    paper = scales == "paper"

    def inside(x: Tensor) -> Tensor:
        return x if paper else unit(space, x)

    targets = -values.log()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed * 1_000_003 + trial)
        for kind in (BotorchWarning, InputDataWarning, OptimizationWarning, RuntimeWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        model = _model(space, inside(points), targets, scales)
        waiting = inside(pending) if pending is not None and len(pending) else None
        score = _acquisition(model, acquisition, inside(points), float(targets.max()), trial, waiting)
        best = points[values.argsort()[:3]]
        raw = torch.cat([space.draw(_RANDOM_POINTS, source), _near_points(space, best, source)])
        with torch.no_grad():
            scores = score(inside(raw).unsqueeze(1))
        order = scores.argsort(descending=True, stable=True)
        starts = raw[order[:_RESTARTS]]
        span = torch.ones_like(space.lower) if paper else space.upper - space.lower
        origin = torch.zeros_like(space.lower) if paper else space.lower
        bound = (space.weights > 0).nonzero().flatten()
        equation = (bound, (space.weights * span)[bound], space.total - float((space.weights * origin).sum()))
        try:
            refined, refined_scores = optimize_acqf(
                score,
                bounds=torch.stack([inside(space.lower), inside(space.upper)]),
                q=1,
                num_restarts=len(starts),
                batch_initial_conditions=inside(starts).unsqueeze(1),
                equality_constraints=[equation],
                return_best_only=False,
                options={"maxiter": _REFINEMENTS},
            )
            found = space.project(origin + refined.squeeze(1) * span)
            candidates = torch.cat([found, raw])
            assert refined_scores is not None
            scores = torch.cat([refined_scores.detach().flatten(), scores])
        except (ValueError, RuntimeError):
            # The polish can fail numerically; the best of a thousand points is still good.
            candidates = raw
    for index in scores.argsort(descending=True, stable=True)[:64].tolist():
        if is_new(candidates[index]):
            return candidates[index]
    return space.draw(1, source)[0]
