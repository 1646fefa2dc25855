"""What a search over bits keeps in memory beside the model, as a multiple of the decoder's weights.

python benchmarks/search_memory.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from common import markdown_table, shared_directory, write_result
from rankwise import stages
from rankwise.checkpoints import load_model
from rankwise.layers import SlicedLinear
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.runs import Run

MODEL = "stories260k"
METHODS: dict[str, dict[str, Any]] = {
    "two_sided": {"method": "two_sided", "budget": {"keep": 0.5, "rank_multiple": 1}},
    "quantize": {"method": "quantize", "budget": {"bits": 3, "rank_multiple": 1}},
    "caldera": {"method": "caldera", "budget": {"bits": 3, "rank_multiple": 1}},
    "mixed": {"method": "mixed", "budget": {"bits": 3, "rank_multiple": 1}},
}


def tensors_of(layer: SlicedLinear) -> dict[int, int]:
    """Bytes that a layer keeps beside the dense weight, by address."""
    found: dict[int, int] = {}

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                take(each)
        elif hasattr(value, "__dict__"):
            take({key: each for key, each in vars(value).items() if not callable(each)})

    take({key: value for key, value in vars(layer).items() if not key.startswith("_m") and key != "dense"})
    return found


def kept(shared: Any, method: str) -> tuple[float, float]:
    """Bytes beside the model over those of the weights as the model computes, with the finest cuts in force."""
    recipe = recipe_from(
        {
            "model": str(shared / "models" / MODEL),
            "calibration": {
                "source": f"text:{shared}/data/mix.calibration.txt",
                "sequences": 32,
                "length": 128,
                "bos": "never",
            },
            "validation": {
                "source": f"text:{shared}/data/wikitext2.valid.txt",
                "sequences": 2,
                "length": 128,
                "bos": "never",
            },
            "allocation": "bayesian:spectral",
            **METHODS[method],
        }
    )
    reporter = Reporter(show=False)
    loaded = load_model(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        texts = stages.read_texts(recipe, loaded, reporter, validate=True)
        work = stages.begin(recipe, Run(Path(folder)), loaded, texts, reporter)
        outlooks = stages.Outlooks(work, stages.collect_statistics(work))
        outlooks.look()
        weights = sum(4 * site.parameters for site in work.sites)

        def layer(site: Site) -> SlicedLinear:
            return site.module(loaded.model)

        assert texts.validation is not None
        with stages.judging(work, outlooks.of, texts.validation.ids) as objective:
            at_rest = sum(sum(tensors_of(layer(site)).values()) for site in work.sites)
            tables = work.problem.candidates
            cuts = {
                s.name: max((c for c in tables[s.name].cuts if not c.dense), key=lambda c: c.q_bits) for s in work.sites
            }
            objective.set_cuts(cuts)
            at_work = sum(sum(tensors_of(layer(site)).values()) for site in work.sites)
    return at_rest / weights, at_work / weights


def main() -> None:
    shared = shared_directory()
    figures = []
    for method in METHODS:
        at_rest, at_work = kept(shared, method)
        figures.append({"method": method, "at_rest": at_rest, "at_work": at_work})
    rows = [[f["method"], f"{f['at_rest']:.2f}", f"{f['at_work']:.2f}"] for f in figures]
    body = (
        f"{MODEL}, float32; bytes of bases and codes over those of the decoder's weights. In a trial the matrix of one "
        "Q a site is there besides.\n\n"
        + markdown_table(["method", "all cuts dense", "in a trial with the finest Q"], rows)
    )
    command = "python benchmarks/search_memory.py"
    write_result("search_memory", "What a search over bits keeps in memory", command, body, figures)


if __name__ == "__main__":
    main()
