"""What looking at a weight and fitting it share: W and its statistics, where they are worked on, and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.models import Site
from rankwise.reading import one_line
from rankwise.stages.work import Work
from rankwise.statistics import SiteStatistics, Store

X = TypeVar("X")


def weight_and_statistics(
    work: Work, store: Store, site: Site, device: torch.device | str = "cpu"
) -> tuple[Tensor, SiteStatistics]:
    """W in float64 on a device, shape `[m, n]`, and what was collected at its site, which is seen there."""
    weight = site.weight(work.loaded.model).to(device).double()
    bias = site.bias(work.loaded.model)
    return weight, SiteStatistics(site, weight, None if bias is None else bias.to(device), store)


def on_gpu_or_cpu(work: Work, site: Site, make: Callable[[torch.device], X]) -> X:
    """What `make` gives on the model's device, or on the CPU where that has too little memory or cannot do it.

    Args:
        work: the run.
        site: what is made is of this one.
        make: is called with a device, and again with the CPU when a GPU failed.
    """
    device = work.loaded.model.device
    try:
        return make(device)
    except (RuntimeError, NotFiniteError) as problem:
        if device.type == "cpu" or not _may_be_the_gpu(problem):
            raise
        why = one_line(problem)
    torch.cuda.empty_cache()
    work.reporter.note(f"{site.name}: decomposed on the CPU, because the GPU could not ({why})")
    return make(torch.device("cpu"))


def _may_be_the_gpu(problem: Exception) -> bool:
    """Whether the CPU may do what a GPU failed at: it had no memory left, or its eigensolver gave up."""
    if isinstance(problem, torch.OutOfMemoryError) or isinstance(problem.__cause__, torch.linalg.LinAlgError):
        return True
    return any(each in str(problem) for each in ("CUSOLVER_STATUS", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory"))


@contextmanager
def naming(site: Site) -> Iterator[None]:
    """Give a numerical failure the name of its site.

    Raises:
        NotFiniteError: naming it.
    """
    try:
        yield
    except (torch.linalg.LinAlgError, ValueError) as problem:
        raise NotFiniteError(
            f"The decomposition failed: {problem}.",
            where=site.name,
            remedy="use more calibration text, or another method",
        ) from problem


def draw_for(work: Work, site: Site) -> torch.Generator:
    """A generator for one site: what it draws does not depend on the other sites."""
    digest = hashlib.sha256(f"{work.recipe.seed}:{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
