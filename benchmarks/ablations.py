"""The ablations of the Bolaco paper, from the ready recipes, on the two real models.

python benchmarks/ablations.py

Tables 2 (covariance and calibration size), 4 (which validation samples), 10 (validation source) and Figure 4 (transfer
to a fine-tuned copy) on wiki-llama-8m; Table 3 (the objective) and the settings of the surrogate on stories260k with
three seeds.
Give --run-dir to keep what is finished, and --only to measure some.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from allocation import Kept, measure, score
from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise.checkpoints import load_model
from rankwise.recipes import read_recipe

WIKI, STORIES = "wiki-llama-8m", "stories260k"
SEEDS = (0, 1, 2)
SIZES = (64, 128, 256, 512, 1024)
HELD_OUT_TASKS = 35


def once(kept: Kept, label: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished figure, or a new one."""
    found = kept.get(label)
    if found is None:
        found = {**label, **make()}
        kept.add(found)
        print(label, {k: found[k] for k in ("perplexity", "infeasible") if k in found}, flush=True)
    return found


def wiki(recipe: str, shared: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """A ready recipe on wiki-llama-8m; changes are merged into its nodes."""
    values = read_recipe(recipe)
    calibration, _ = protocols(WIKI, shared)
    valid = {"source": f"text:{shared}/data/wikitext2.valid.txt", "sequences": 32, "length": 256, "bos": "never"}
    merged: dict[str, Any] = {"calibration": calibration, "validation": valid}
    for part in (values, changes):
        for key, value in part.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return measure(WIKI, shared, run, **merged)


def covariance(kept: Kept, shared: Path, run: Path) -> str:
    """Table 2."""
    rows = []
    for name, recipe in (("sample", "ablation-sample-covariance"), ("pooled", "ablation-pooled-covariance")):
        row = [name]
        for size in SIZES:
            label = {"table": "covariance", "row": name, "size": size}
            found = once(kept, label, partial(wiki, recipe, shared, run, calibration={"sequences": size}))
            row.append(" / ".join(f"{value:.2f}" for value in found["perplexity"].values()))
        rows.append(row)
    return (
        "## Covariance and calibration size (Table 2)\n\nwiki-llama-8m, keep 0.4, uniform, calibration sequences of "
        "256 tokens; perplexity on wikitext2.test / mix.heldout.\n\n"
        + markdown_table(["covariance", *map(str, SIZES)], rows)
    )


def samples(kept: Kept, shared: Path, run: Path) -> str:
    """Tables 4 and 10."""
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("top 32 of 128, wikitext2.valid", "ablation-validation-top", {}),
        ("random 32 of 128, wikitext2.valid", "ablation-validation-random", {}),
        ("bottom 32 of 128, wikitext2.valid", "ablation-validation-bottom", {}),
        ("32 of mix.calibration", "ablation-validation-source", {"source": None}),
        ("32 of instructions", "ablation-validation-source", {"source": f"text:{instructions(shared, run)[0]}"}),
    ]
    rows = []
    for name, recipe, valid in variants:
        label = {"table": "samples", "row": name}
        found = once(kept, label, partial(wiki, recipe, shared, run, validation=valid))
        rows.append([name, *(f"{value:.2f}" for value in found["perplexity"].values())])
    return (
        "## Validation samples (Tables 4 and 10)\n\nwiki-llama-8m, bolaco, bayesian:5x1, keep 0.4, 50 trials, one "
        "seed.\n\n" + markdown_table(["validation samples", "wikitext2.test", "mix.heldout"], rows)
    )


def instructions(shared: Path, folder: Path) -> tuple[Path, Path]:
    """The instruction tasks as plain text: all but the last 35 to train on, and those 35."""
    tasks = [json.loads(line) for line in (shared / "data" / "instructions.seed_tasks.jsonl").read_text().splitlines()]
    texts = [
        f"Instruction: {task['instruction']}\nInput: {each['input']}\nAnswer: {each['output']}\n\n"
        for task in tasks
        for each in task["instances"]
    ]
    held_out = sum(len(task["instances"]) for task in tasks[-HELD_OUT_TASKS:])
    paths = folder / "instructions.train.txt", folder / "instructions.heldout.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (texts[:-held_out], texts[-held_out:]), strict=True):
        path.write_text("".join(part))
    return paths


def fine_tune(shared: Path, folder: Path) -> Path:
    """A copy of wiki-llama-8m after 60 steps on the instruction tasks."""
    out = folder / "wiki-llama-8m-tuned"
    if out.exists():
        return out
    source = shared / "models" / WIKI
    model = load_model(str(source)).model
    model.requires_grad_(True).train()
    tokenizer = AutoTokenizer.from_pretrained(source)
    stream = torch.tensor(tokenizer(instructions(shared, folder)[0].read_text(), add_special_tokens=False)["input_ids"])
    rows = stream[: len(stream) // 256 * 256].view(-1, 256)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4)
    source_of_order = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = rows[torch.randint(len(rows), (8,), generator=source_of_order)]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def transfer(kept: Kept, shared: Path, run: Path) -> str:
    """Figure 4: a plan found on the original, used on a fine-tuned copy."""
    from rankwise import compress
    from rankwise.progress import Reporter
    from rankwise.recipes import recipe_from

    tuned = str(fine_tune(shared, run))
    held_out = {"source": f"text:{instructions(shared, run)[1]}", "length": 256, "bos": "never"}
    calibration, texts = protocols(WIKI, shared)
    texts = {"instructions, held out": held_out, "mix.heldout": texts["mix.heldout"]}
    valid = {"source": f"text:{instructions(shared, run)[0]}", "sequences": 32, "length": 256, "bos": "never"}
    plan = run / "base-plan.json"

    def run_one(model: str, allocation: Any) -> dict[str, Any]:
        recipe = recipe_from(
            {
                "model": model,
                "method": "bolaco",
                "allocation": allocation,
                "budget": {"keep": 0.4, "rank_multiple": 1, "storage": "two_factor"},
                "calibration": calibration,
                "validation": valid,
            }
        )
        result = compress(recipe, run_directory=run / Path(model).name, reporter=Reporter(show=False))
        if model != tuned:
            plan.write_text(result.plan.model_dump_json())
        return {"perplexity": {name: score(result.model, model, settings) for name, settings in texts.items()}}

    base = str(shared / "models" / WIKI)
    if not plan.exists():
        once(kept, {"table": "transfer", "row": "the original"}, lambda: run_one(base, "bayesian:5x1"))
    rows = []
    warm = {"name": "bayesian", "space": "5x1", "trials": 20, "plan": str(plan)}
    for name, allocation in (
        ("uniform", "uniform"),
        ("plan of the original, 0 trials", {"name": "plan", "file": str(plan)}),
        ("plan of the original, 20 trials", warm),
        ("no plan, 20 trials", {"name": "bayesian", "space": "5x1", "trials": 20}),
        ("no plan, 50 trials", "bayesian:5x1"),
    ):
        found = once(kept, {"table": "transfer", "row": name}, partial(run_one, tuned, allocation))
        rows.append([name, *(f"{value:.2f}" for value in found["perplexity"].values())])
    dense = [f"{score(load_model(tuned).model, tuned, settings):.2f}" for settings in texts.values()]
    return (
        "## Transfer to a fine-tuned copy (Figure 4)\n\nwiki-llama-8m after 60 steps on instruction tasks; bolaco, "
        "5x1, keep 0.4, validation on instruction tasks.\n\n"
        + markdown_table(["plan", *texts], [["dense", *dense], *rows])
    )


def objectives(kept: Kept, shared: Path, run: Path) -> str:
    """Table 3 and the surrogate's settings, three seeds."""
    keeps = (0.8,)
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("perplexity + KL(compressed, original), fitted length scales, LogEI", "ablation-kl", {}),
        ("perplexity + KL(original, compressed)", "ablation-kl-eq8", {}),
        ("perplexity alone", "ablation-no-kl", {}),
        ("the paper's length scales", "ablation-length-scales", {}),
        ("qLogNEI", "ablation-kl", {"acquisition": "qlog_nei"}),
    ]
    rows = []
    for name, recipe, settings in variants:
        values = read_recipe(recipe)
        values["allocation"] = {**values["allocation"], **settings}
        row = [name]
        for keep in keeps:
            values["budget"] = {"keep": keep, "rank_multiple": 1, "storage": "two_factor"}
            figures = [
                once(
                    kept,
                    {"table": "objective", "row": name, "keep": keep, "seed": seed},
                    partial(measure, STORIES, shared, run / STORIES, seed=seed, **values),
                )["perplexity"]["sampled stories"]
                for seed in SEEDS
            ]
            row.append(f"{statistics.mean(figures):.2f} ± {(max(figures) - min(figures)) / 2:.2f}")
        rows.append(row)
    return (
        "## Objective and surrogate (Table 3)\n\nstories260k, bolaco, bayesian:5x1, 50 trials; test perplexity, mean "
        "of three seeds ± half the range.\n\n" + markdown_table(["variant", *(f"keep {k}" for k in keeps)], rows)
    )


TABLES = {"covariance": covariance, "samples": samples, "transfer": transfer, "objectives": objectives}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    shared = shared_directory()
    folder = arguments.run_dir or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    parts, figures = [], []
    for name in arguments.only:
        kept = Kept(folder / f"ablations-{name}.json")
        parts.append(TABLES[name](kept, shared, folder / "run"))
        figures += kept.figures
    if set(arguments.only) == set(TABLES):
        parts.append("Everything is stored as two factors.")
        write_result(
            "ablations", "Ablations of the Bolaco paper", "python benchmarks/ablations.py", "\n\n".join(parts), figures
        )


if __name__ == "__main__":
    main()
