"""SmolLM2-135M made smaller in every way, ours, the papers' and llama.cpp's, under one protocol.

python benchmarks/compare.py low-rank
python benchmarks/compare.py repaired
python benchmarks/compare.py bits
python benchmarks/compare.py peers                  # after `make peers`
python benchmarks/compare.py control                # the original, trained likewise
python benchmarks/compare_results.py

Needs `make real-model` and the shared texts. The first three are runs of `rankwise compare` and go on after a stop, as
do the next two; the last puts their rows into the result files, where rows of before stay, and makes the pictures.
--sizes and --methods measure some of the cells: several processes may share them out, each with a folder of its own in
the --run-dir that the last reads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from common import ROOT, shared_directory
from peers import peers
from rankwise import stages
from rankwise.checkpoints import load_model
from rankwise.data import Examples
from rankwise.device import named_device
from rankwise.flows.compare import compare
from rankwise.models import find_sites
from rankwise.progress import Reporter
from rankwise.recipes import Comparison, comparison_from, read_sizes, read_ways
from rankwise.repair import Lora, train
from rankwise.reports import ComparedRow
from rankwise.runs import stage_key

MODEL = ROOT / "real-models" / "smollm2-135m"
FOLDER = ROOT / ".benchmarks" / "compare"
TEXTS = ("wikitext2.test", "mix.heldout")
LENGTH, SCORED, CALIBRATION, LEARNED, LIMIT = 256, 32, 256, 1024, 50
SIZES = {"low-rank": "0.8,0.6,0.9,0.7,0.5", "repaired": "0.8,0.6,0.9,0.7,0.5", "bits": "3,2.5,4,2.1"}
PUBLISHED = ("svd", "fwsvd", "asvd", "svd_llm", "afm", "bolaco")
LORD = "manual:q=0.7,k=0.7,v=dense,o=0.8,gate=0.8,up=0.8,down=0.8"
"""The proportions that LoRD publishes for 20%, scaled to the size that is asked."""
SPREAD = ("uniform", LORD, "bayesian:5x1", "bayesian:5x4")
METHODS = {
    "low-rank": [f"{method}/{way}" for way in SPREAD for method in PUBLISHED]
    + ["two_sided", "two_sided/bayesian:spectral", "flap", "llm_pruner", "slicegpt"]
    + ["pruned", "pruned/bayesian:spectral"],
    "repaired": [f"{method}/{way}+subspace" for way in SPREAD for method in PUBLISHED]
    + [f"{method}/uniform+blocks" for method in PUBLISHED]
    + ["llm_pruner+lora", "two_sided+subspace", "two_sided+blocks", "two_sided+blocks+factors"]
    + ["two_sided/bayesian:spectral+blocks", "pruned+blocks", "pruned+lora"],
    "bits": ["quantize", "caldera", "mixed"],
}
CONTROL = "dense+lora"


def protocol(
    shared: Path, folder: Path, part: str, sizes: str, methods: str, tasks: bool, learned: int = LEARNED
) -> Comparison:
    """The comparison of one part: texts and tasks are the same for all, and a repair learns from more."""
    spelling = "bits" if part == "bits" else "keep"
    return comparison_from(
        {
            "model": str(MODEL),
            "output": str(folder / part),
            "spelling": spelling,
            "sizes": read_sizes(sizes, spelling),  # type: ignore[arg-type]
            "ways": read_ways(methods, spelling),  # type: ignore[arg-type]
            "texts": [
                {
                    "source": f"text:{shared}/data/{text}.txt",
                    "sequences": SCORED,
                    "length": LENGTH,
                    "sample": "random",
                    "seed": 1,
                    "batch_size": 4,
                    "bos": "never",
                }
                for text in TEXTS
            ],
            "tasks": ["local_next_sentence", "local_cloze", "local_order", "local_arithmetic"] if tasks else [],
            "limit": LIMIT,
            "task_text": f"text:{shared}/data/mix.heldout.txt",
            "settings": {
                "calibration": {
                    "source": f"text:{shared}/data/mix.calibration.txt",
                    "sequences": learned if part == "repaired" else CALIBRATION,
                    "length": LENGTH,
                    "batch_size": 8,
                    "bos": "never",
                },
                "budget": {"rank_multiple": 8},
                "methods": {"caldera": {"outer": 5}} if "caldera" in methods else {},
                "precision": "float32",
            },
        }
    )


def run_peers(shared: Path, folder: Path, names: list[str], tasks: bool) -> None:
    """Quantise every site with the code of others, and score what they make of it like every other row."""
    asked = protocol(shared, folder, "bits", "4", "quantize", tasks)
    reporter = Reporter(lines=True)
    output = folder / "peers"
    output.mkdir(parents=True, exist_ok=True)
    rows = stages.Rows(output / "rows.jsonl", reporter)
    recipe = stages.cells_of(asked)[0].recipe
    scored_by, dense = stages.measure_dense(asked, recipe, rows, reporter)
    loaded = load_model(str(MODEL), precision="float32", device=named_device(recipe.device))
    sites = find_sites(loaded.model)
    original = {site.name: site.weight(loaded.model).clone() for site in sites}
    known = peers()
    keys = {name: stage_key({**scored_by.key, "peer": name}) for name in names or known}
    missing = any(rows.taken(key) is None for key in keys.values())
    moments = second_moments(loaded, sites, recipe) if missing else {}
    weights = sum(site.parameters for site in sites)
    found = [dense]
    for name, key in keys.items():
        row = rows.taken(key)
        if row is None:
            started, bits = time.monotonic(), 0.0
            for site in sites:
                site.weight(loaded.model).copy_(known[name].round_trip(original[site.name], moments[site.name]))
                bits += known[name].bits(site.n) * site.parameters
            seconds = round(time.monotonic() - started, 1)
            size = round((dense.bytes or 0) - 2 * weights + bits / 8)
            row = ComparedRow(
                key=key,
                way=name,
                asked=round(bits / weights, 3),
                bits=bits / weights,
                keep=bits / weights / 16,
                bytes=size,
                parameters=dense.parameters,
                linear_parameters=dense.linear_parameters,
                macs=dense.macs,
                seconds=seconds,
                **scored_by.score(loaded.model, dense),
            )
            rows.add(row)
        print(row.way, f"{row.bits:.3f}", row.perplexity, flush=True)
        found.append(row)
        # As far as it is: a stop leaves what is done to be read.
        stages.write_comparison(scored_by, found, output)


def run_control(shared: Path, folder: Path, learned: int, tasks: bool) -> None:
    """Train the original itself by the adapters of `llm_pruner+lora`, on so many of the same sequences; score it."""
    asked = protocol(shared, folder, "repaired", "0.8", "llm_pruner+lora", tasks, learned)
    reporter = Reporter(lines=True)
    output = folder / f"control-{learned}"
    output.mkdir(parents=True, exist_ok=True)
    rows = stages.Rows(output / "rows.jsonl", reporter)
    recipe = stages.cells_of(asked)[0].recipe
    scored_by, dense = stages.measure_dense(asked, recipe, rows, reporter)
    key = stage_key({**scored_by.key, "trained": CONTROL, "sequences": learned})
    row = rows.taken(key)
    if row is None:
        started = time.monotonic()
        loaded = load_model(str(MODEL), precision="float32", device=named_device(recipe.device))
        sites, settings = find_sites(loaded.model), Lora()
        ids = list(stages.read_sequences(recipe.calibration, loaded, recipe.seed, skip=0).ids)
        examples = Examples(ids, ids, recipe.calibration.source)
        adapters = settings.attach(loaded.model, sites, recipe.seed)
        train(loaded.model, adapters, examples, settings, teacher=None, folder=output / "trainer", seed=recipe.seed)
        settings.fold_in(loaded.model, sites, {})
        row = dense.model_copy(
            update={
                "key": key,
                "way": CONTROL,
                "asked": 1.0,
                "seconds": round(time.monotonic() - started, 1),
                **scored_by.score(loaded.model, dense),
            }
        )
        rows.add(row)
    stages.write_comparison(scored_by, [dense, row], output)


@torch.inference_mode()
def second_moments(loaded: Any, sites: Any, recipe: Any) -> dict[str, torch.Tensor]:
    """E[x x^T] of the inputs of every site on the calibration text, shape `[n, n]` each."""
    ids = stages.read_sequences(recipe.calibration, loaded, recipe.seed, skip=0).ids
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for site in sites:

        def watch(_module: Any, given: Any, name: str = site.name) -> None:
            x = given[0].flatten(0, -2).float()
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        handles.append(site.module(loaded.model).register_forward_pre_hook(watch))
    for batch in ids.to(loaded.model.device).split(2):
        loaded.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*METHODS, "peers", "control"])
    parser.add_argument("--run-dir", type=Path, default=FOLDER)
    parser.add_argument("--stages", type=Path, help="where finished stages are kept; in --run-dir by default")
    parser.add_argument("--sizes")
    parser.add_argument("--methods", help="for peers, their names joined by semicolons")
    parser.add_argument("--learned", type=int, default=LEARNED, help="sequences that the control learns from")
    parser.add_argument("--no-tasks", dest="tasks", action="store_false", help="perplexity alone")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "peers":
        names = arguments.methods.split(";") if arguments.methods else []
        run_peers(shared_directory(), arguments.run_dir, names, arguments.tasks)
        return
    if arguments.what == "control":
        run_control(shared_directory(), arguments.run_dir, arguments.learned, arguments.tasks)
        return
    asked = protocol(
        shared_directory(),
        arguments.run_dir,
        arguments.what,
        arguments.sizes or SIZES[arguments.what],
        arguments.methods or ",".join(METHODS[arguments.what]),
        arguments.tasks,
    )
    compare(asked, run_directory=arguments.stages or arguments.run_dir / "run", reporter=Reporter(lines=True))


if __name__ == "__main__":
    main()
