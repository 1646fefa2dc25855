"""What a search costs: a trial against a bare forward, the optimiser's own time, and the plan without a search.

python benchmarks/search.py

A GPU is used when there is one: trials are then also measured on a random Llama of 7B shapes.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import stages
from rankwise.allocation import Cuts, MultipleChoice, Problem, fill
from rankwise.allocation.spaces import Space
from rankwise.allocation.surrogate import propose
from rankwise.checkpoints import load_model
from rankwise.evaluation import Objective, ObjectiveSettings
from rankwise.factors import Basis
from rankwise.layers import sliced, substitute
from rankwise.layers.sliced import Beside
from rankwise.methods import estimated_losses
from rankwise.models import Site, find_sites
from rankwise.progress import Reporter
from rankwise.quantizers import Rotation
from rankwise.recipes import recipe_from
from rankwise.runs import Run
from rankwise.sizes import DENSE, Allowance, Budget, Form, low_rank_candidates

KEEPS = (0.8, 0.6, 0.4)
ROUNDS = 9
SHAPES_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
SHAPES_7B |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}


def clock(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds, waiting for a GPU before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def trials(shared: Path, folder: str) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Trial over bare forward on wiki-llama-8m, beside copying the model and rebuilding its layers."""
    calibration, _ = protocols("wiki-llama-8m", shared)
    recipe = recipe_from(
        {
            "model": str(shared / "models" / "wiki-llama-8m"),
            "method": "two_sided",
            "calibration": calibration,
            "validation": {
                "source": f"text:{shared}/data/wikitext2.valid.txt",
                "sequences": 32,
                "length": 256,
                "bos": "never",
            },
            "budget": {"keep": 0.8, "rank_multiple": 1, "storage": "two_factor"},
        }
    )
    reporter = Reporter(show=False)
    loaded = load_model(recipe.model)
    texts = stages.read_texts(recipe, loaded, reporter, validate=True)
    work = stages.begin(recipe, Run(Path(folder)), loaded, texts, reporter)
    outlooks = stages.Outlooks(work, stages.collect_statistics(work))
    outlooks.look()
    assert texts.validation is not None
    ids = texts.validation.ids
    kept = {site.name: outlooks.of(site, 0).basis for site in work.sites}
    rows, figures = [], []
    for form in ("top_k", "head_inputs"):
        settings = ObjectiveSettings(predictions=form)
        with sliced(
            loaded.model,
            work.sites,
            lambda s: {0: (None, Rotation(), kept[s.name])},
            work.problem.candidates,
            loaded.stored_dtypes,
        ) as set_cuts:
            objective = Objective(loaded.model, ids, settings, set_cuts)
            for keep in KEEPS:
                plan = uniform(work.problem, keep)
                ratios = []
                for _ in range(ROUNDS):
                    set_cuts({site.name: DENSE for site in work.sites})
                    bare = clock(bare_forward, loaded.model, ids)
                    ratios.append(clock(objective, plan) / bare)
                figures.append({"form": form, "keep": keep, "ratio": statistics.median(ratios), "all": ratios})
                rows.append([f"{form}, keep {keep}", f"{statistics.median(ratios):.2f}", spread(ratios)])
    objective = Objective(loaded.model, ids, ObjectiveSettings(predictions="top_k"), lambda _cuts: None)
    plan = uniform(work.problem, 0.8)
    ratios = []
    for _ in range(5):
        bare = clock(bare_forward, loaded.model, ids)
        ratios.append(clock(rebuild, loaded.model, work.sites, kept, plan, objective) / bare)
    figures.append({"form": "copy and rebuild", "keep": 0.8, "ratio": statistics.median(ratios), "all": ratios})
    rows.append(
        ["copying the model and rebuilding its layers, keep 0.8", f"{statistics.median(ratios):.2f}", spread(ratios)]
    )
    return rows, figures


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


@torch.inference_mode()
def bare_forward(model: Any, ids: torch.Tensor) -> None:
    """Logits for every sample, nothing done with them."""
    for batch in ids.split(8):
        model(input_ids=batch.to(model.device), use_cache=False)


def rebuild(model: Any, sites: list[Site], kept: dict[str, Basis], plan: Cuts, objective: Objective) -> None:
    """A trial as research code does it: a copy of the model, new layers, a forward."""
    copied = copy.deepcopy(model)
    for site in sites:
        rank = plan[site.name].rank
        if rank is not None:
            dtype = site.weight(copied).dtype
            substitute(copied, site.name, kept[site.name].truncate(rank), "two_factor", dtype)
    objective.model = copied
    objective(plan)
    objective.model = model


class Cube(Space):
    """d coordinates with one equation, for timing alone."""

    def __init__(self, d: int) -> None:
        self.name, self.labels = "cube", [str(i) for i in range(d)]
        self.lower, self.upper = torch.full((d,), 0.2).double(), torch.ones(d).double()
        self.weights, self.total, self.attention = torch.full((d,), 1 / d).double(), 0.6, [False] * d

    def cuts(self, point: torch.Tensor) -> Cuts:
        return {}

    def starts(self, plan: Any, coordinates: Any) -> list[tuple[str, torch.Tensor]]:
        return []

    def labels_of_sites(self) -> dict[str, str]:
        return {}


def optimiser() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Seconds of fit and acquisition before the 50th trial, and their mean over a whole search."""
    rows, figures = [], []
    for d in (5, 8, 20):
        space = Cube(d)
        points = space.draw(50, torch.Generator().manual_seed(0))
        values = (points * torch.arange(1, d + 1)).sum(-1).sin().exp()
        propose(space, points[:15], values[:15], 15, 0)
        seconds = [clock(propose, space, points[:t], values[:t], t, 0) for t in range(15, 50, 5)]
        figures.append({"dimensions": d, "seconds": seconds})
        rows.append([str(d), f"{statistics.mean(seconds):.2f}", f"{seconds[-1]:.2f}"])
    return rows, figures


def uniform(problem: Problem, keep: float) -> Cuts:
    """The same fraction of every site."""
    budget = problem.allowance.budget.model_copy(update={"keep": keep})
    asked = replace(problem, allowance=replace(problem.allowance, budget=budget))
    return fill(asked, {site.name: 1.0 for site in problem.sites})


def problem_of(sites: list[Site], keep: float, multiple: int) -> Problem:
    """What a plan of low rank chooses from, in two factors of 16-bit numbers."""
    budget = Budget(keep=keep, rank_multiple=multiple, storage="two_factor")
    form = Form(storage="two_factor")
    shapes = {(site.m, site.n) for site in sites}
    tables = {shape: low_rank_candidates(shape, form, multiple) for shape in shapes}
    allowance = Allowance(budget, sum(site.parameters for site in sites), form.number_bits)
    return Problem(sites, {site.name: tables[site.m, site.n] for site in sites}, form, allowance)


def with_losses(problem: Problem, energies: dict[str, torch.Tensor]) -> Problem:
    """The same with losses from energies."""
    tables = {
        name: table.with_losses(estimated_losses(table, {0: energies[name]}, {0: {}}))
        for name, table in problem.candidates.items()
    }
    return replace(problem, candidates=tables)


def plan_afresh(sites: list[Site], energies: dict[str, torch.Tensor], multiple: int) -> None:
    """Candidates and plan."""
    MultipleChoice(with_losses(problem_of(sites, 0.8, multiple), energies)).plan()


def spectral() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Seconds for the plan of 32 layers x 7 sites at Llama-2-7B's shapes."""
    sites = [
        Site(f"layers.{block}.{role}", role, block, m, n, False, False, "")
        for block in range(32)
        for role, (m, n) in SHAPES_7B.items()
    ]
    source = torch.Generator().manual_seed(0)
    energies = {
        s.name: torch.rand(1, generator=source) * torch.arange(1, min(s.m, s.n) + 1).float() ** -1.2 for s in sites
    }
    rows, figures = [], []
    for multiple in (8, 1):
        whole = clock(plan_afresh, sites, energies, multiple)
        choice = MultipleChoice(with_losses(problem_of(sites, 0.8, multiple), energies))
        again = clock(choice.plan)
        figures.append({"rank_multiple": multiple, "seconds": whole, "seconds_again": again})
        rows.append([str(multiple), f"{whole:.2f}", f"{again:.2f}"])
    return rows, figures


def large_trials() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Trial over bare forward at 7B shapes on a GPU: random weights and bases, 8 of 32 layers, 16 x 2048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 8
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=32000)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config).eval()
    model.to(torch.bfloat16)
    sites = find_sites(model)
    problem = problem_of(sites, 0.8, 8)

    def load(site: Site) -> dict[int, Beside]:
        k = problem.candidates[site.name].largest_rank
        scale = (site.m * k) ** -0.25
        with torch.device("cuda"):
            made = Basis(torch.randn(site.m, k) * scale, torch.randn(k, site.n) * scale, torch.ones(k))
        return {0: (None, Rotation(), made)}

    rows, figures = [], []
    ids = torch.randint(0, 32000, (16, 2048))
    with sliced(model, sites, load, problem.candidates, {}) as set_cuts:
        objective = Objective(model, ids, ObjectiveSettings(), set_cuts, batch_size=4)
        for keep in KEEPS:
            plan = uniform(problem, keep)
            ratios = []
            for _ in range(ROUNDS):
                set_cuts({site.name: DENSE for site in sites})
                bare = clock(bare_forward, model, ids)
                ratios.append(clock(objective, plan) / bare)
            figures.append({"keep": keep, "ratio": statistics.median(ratios), "all": ratios, "bare_seconds": bare})
            form = objective.predictions_form
            rows.append([f"{form}, keep {keep}", f"{statistics.median(ratios):.2f}", spread(ratios)])
    return rows, figures


def main() -> None:
    shared = shared_directory()
    with tempfile.TemporaryDirectory() as folder:
        trial_rows, trial_figures = trials(shared, folder)
    optimiser_rows, optimiser_figures = optimiser()
    spectral_rows, spectral_figures = spectral()
    header = ["", "median of the ratio", "range"]
    parts = [
        "Seconds of one trial over seconds of one bare forward of the original over the same 32 x 256 tokens, "
        "wiki-llama-8m:\n",
        markdown_table(header, trial_rows),
        "\nThe optimiser's own time (fit and acquisition), seconds a trial:\n",
        markdown_table(["dimensions", "mean, trials 15 to 50", "before trial 46"], optimiser_rows),
        "\nThe spectral plan for 32 layers x 7 sites at Llama-2-7B's shapes, seconds:\n",
        markdown_table(["rank multiple", "from energies", "again, other weights"], spectral_rows),
    ]
    figures: dict[str, Any] = {"trials": trial_figures, "optimiser": optimiser_figures, "spectral": spectral_figures}
    if torch.cuda.is_available():
        large_rows, figures["large_trials"] = large_trials()
        parts += ["\nThe same ratio at Llama-2-7B's shapes on the GPU, bfloat16:\n", markdown_table(header, large_rows)]
    write_result("search", "What a search costs", "python benchmarks/search.py", "\n".join(parts), figures)


if __name__ == "__main__":
    main()
