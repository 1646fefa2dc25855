"""Methods that take units or directions out beside those of low rank, at equal numbers kept.

On SmolLM2-135M (`make real-model`) most are rows of `compare.py`; here `pruned` and `two_sided` are measured, with the
text that a CPU reads by default.

python benchmarks/pruning.py stories260k
python benchmarks/pruning.py wiki-llama-8m
python benchmarks/pruning.py smollm2-135m --rows "two_sided;pruned"
python benchmarks/pruning.py write

Needs the shared models. Finished rows stay in --run-dir, and the same command goes on after a stop; `write`
puts them into the result files, where cells of before stay. --rows and --keeps measure some of the cells.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import RESULTS, ROOT, markdown_table, shared_directory, write_result
from methods import protocols
from mixed import texts_of
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.evaluation import perplexity
from rankwise.flows.finetune import finetune
from rankwise.progress import Reporter
from rankwise.recipes import finetune_from, recipe_from
from real_model import MODEL, scored
from text import FEW

KEEPS = {"stories260k": (0.8, 0.6, 0.4), "wiki-llama-8m": (0.8, 0.6, 0.4), MODEL: (0.8, 0.6)}
ROWS: dict[str, dict[str, Any]] = {
    "FLAP": {"method": "flap"},
    "FLAP, linear": {"method": {"name": "flap", "compensation": "linear"}},
    "SliceGPT": {"method": {"name": "slicegpt", "multiple": 1}},
    "SliceGPT, one rotation": {"method": {"name": "slicegpt", "adapters": "none", "multiple": 1}},
    "LLM-Pruner": {"method": "llm_pruner"},
    "LLM-Pruner, linear": {"method": {"name": "llm_pruner", "compensation": "linear"}},
    "LLM-Pruner + LoRA": {"method": "llm_pruner", "tuned": True},
    "Bolaco, uniform": {"method": "bolaco", "allocation": "uniform"},
    "Bolaco, 5x1": {"method": "bolaco", "allocation": "bayesian:5x1"},
    "two_sided": {"method": "two_sided"},
    "pruned": {"method": "pruned"},
    "pruned, searched": {
        "method": "pruned",
        "allocation": {"name": "bayesian", "space": "spectral", "trials": 12},
        "validated": True,
    },
}


def settings_of(model: str, shared: Path) -> dict[str, Any]:
    """A recipe's mapping without method and size."""
    calibration, texts = protocols(model, shared)
    evaluation = next(iter(texts.values()))
    if model == "wiki-llama-8m":
        calibration, evaluation = {**calibration, "sequences": 128}, {**evaluation, "sequences": 100}
    return {
        "model": str(shared / "models" / model),
        "calibration": calibration,
        "evaluation": {**evaluation, "speed": False},
    }


def measured(model: str, name: str, keep: float, shared: Path, folder: Path) -> dict[str, Any]:
    """One cell: the size that was reached and perplexity before and after."""
    started, row = time.monotonic(), dict(ROWS[name])
    if model == MODEL:
        return {"model": model, "row": name, "asked": keep, **_on_the_real_model(row, keep, shared, folder)}
    tuned, validated = row.pop("tuned", False), row.pop("validated", False)
    values = {**settings_of(model, shared), **row, "budget": {"keep": keep, "rank_multiple": 1}}
    if validated and model == "stories260k":
        # The 32 stories between those of calibration and those that are scored.
        own = {"source": values["calibration"]["source"], "skip": 192, "sequences": 32, "sample": "first"}
        values["validation"] = own
    output = folder / "output"
    if tuned:
        values["output"] = str(output)
    reporter = Reporter(lines=True)
    result = compress(recipe_from(values), run_directory=folder / f"run-{model}", overwrite=True, reporter=reporter)
    scores = result.report.evaluation
    assert scores is not None
    after, plan = scores.compressed.perplexity, result.plan
    if tuned:
        after = _tuned(values, output, folder / "tuned", reporter)
    return {
        "model": model,
        "row": name,
        "asked": keep,
        "kept": plan.kept,
        "text": values["evaluation"]["source"].rpartition("/")[2],
        "dense": scores.dense.perplexity,
        "perplexity": after,
        "stays": {coupling: len(units) for coupling, units in plan.stays.items()},
        "seconds": time.monotonic() - started,
    }


def _on_the_real_model(row: dict[str, Any], keep: float, shared: Path, folder: Path) -> dict[str, Any]:
    """The same with the tokens that a CPU reads by default, scored on the texts of `real_model.py`."""
    started, (count, gradients) = time.monotonic(), FEW[0]
    texts = texts_of(MODEL, shared)
    source = f"text:{shared}/data/mix.calibration.txt"
    found = scored(shared, folder / f"run-{MODEL}", source, count, texts, gradients, budget={"keep": keep}, **row)
    dense = json.loads((RESULTS / "real_model.json").read_text())["figures"]
    return {
        "kept": found["kept"],
        "text": "wikitext2.test.txt",
        "dense": next(each for each in dense if each["row"] == "dense")["perplexity"]["wikitext2.test"],
        "perplexity": found["perplexity"]["wikitext2.test"],
        "perplexity_mixed": found["perplexity"]["mix.heldout"],
        "seconds": time.monotonic() - started,
    }


def _tuned(values: dict[str, Any], source: Path, output: Path, reporter: Reporter) -> float:
    """Perplexity after adapters made two passes over the calibration sequences, and were added."""
    shutil.rmtree(output, ignore_errors=True)
    loaded = load_model(str(source))

    def ids_of(settings: dict[str, Any]) -> torch.Tensor:
        return load_sequences(
            parse_source(settings["source"]),
            loaded.tokenizer,
            loaded.vocabulary,
            length=settings.get("length"),
            count=settings.get("sequences"),
            seed=settings.get("seed", 0) if settings.get("sample") == "random" else None,
            first=settings.get("skip", 0),
            start="never",
        ).ids

    learned, scored = ids_of({"sample": "random", **values["calibration"]}), ids_of(values["evaluation"])
    file = source.parent / "learned.safetensors"
    save_file({"tokens": learned.contiguous()}, file)
    wanted = {"model": str(source), "output": str(output), "data": f"tokens:{file}", "method": "lora", "bos": "never"}
    finetune(finetune_from(wanted, {}), reporter=reporter)
    return perplexity(load_model(str(output)).model, scored, batch_size=8, reporter=reporter).perplexity


NOTES = """Linear weights are counted, biases are not; `auto` storage for what is of low rank; ranks, channels and
widths are multiples of 1, channels of `pruned` of 8. LLM-Pruner protects the first eighth and the last sixteenth of the
layers as published, and scores by gradients of the calibration text; "linear" adds the compensation of `pruned`. No
repair but where LoRA is named: two passes over the calibration sequences, 16 of them held out. "Searched": 12 trials
of `bayesian:spectral`, judged on text that is neither calibrated on nor scored.

"""
TEXTS = {
    "stories260k": "calibration 192 stories, scored on the others",
    "wiki-llama-8m": "calibration 128 x 256 tokens of mix.calibration, 100 x 256 tokens of wikitext2.test scored; "
    "FLAP, SliceGPT, LLM-Pruner and uniform ranks made on an NVIDIA H100, the others on the machine above",
    MODEL: "calibration 48 x 256 tokens of mix.calibration, gradients at 12 of these sequences, 32 x 256 tokens of "
    "wikitext2.test scored, and of mix.heldout",
}


def _cell(cell: dict[str, Any]) -> str:
    scores = [f"{cell[key]:.2f}" for key in ("perplexity", "perplexity_mixed") if key in cell]
    return f"{' / '.join(scores)} ({cell['kept']:.3f})"


def write(folder: Path) -> None:
    result = RESULTS / "pruning.json"
    cells = json.loads(result.read_text())["figures"] if result.exists() else []
    cells += [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    # Of two of one place the newer one.
    cells = list({(cell["model"], cell["row"], cell["asked"]): cell for cell in cells}.values())
    body = NOTES
    for model, keeps in KEEPS.items():
        own = [cell for cell in cells if cell["model"] == model]
        if not own:
            continue
        lines = []
        for name in ROWS:
            found = {cell["asked"]: cell for cell in own if cell["row"] == name}
            if found:
                texts = [_cell(found[k]) if k in found else "-" for k in keeps]
                lines.append([name, *texts])
        body += f"{model}, {TEXTS[model]}: dense {own[0]['dense']:.2f}; kept in brackets\n\n"
        body += markdown_table(["method", *(f"keep {keep}" for keep in keeps)], lines) + "\n\n"
    write_result("pruning", "Units, directions and ranks at equal size", "python benchmarks/pruning.py", body, cells)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*KEEPS, "write"])
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "pruning")
    parser.add_argument("--rows", help="names joined by semicolons")
    parser.add_argument("--keeps", help="joined by commas")
    arguments = parser.parse_args()
    folder = arguments.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        write(folder)
        return
    model, shared = arguments.what, shared_directory()
    file = folder / f"{model}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = arguments.rows.split(";") if arguments.rows else list(ROWS)
    keeps = [float(keep) for keep in arguments.keeps.split(",")] if arguments.keeps else KEEPS[model]
    for name in names:
        for keep in keeps:
            if any((cell["row"], cell["asked"]) == (name, keep) for cell in done):
                continue
            try:
                cell = measured(model, name, keep, shared, folder)
            except Exception as problem:
                print(name, keep, f"no result: {problem}", flush=True)
                continue
            with file.open("a") as lines:
                lines.write(json.dumps(cell) + "\n")
            print(name, keep, round(cell["kept"], 4), round(cell["perplexity"], 2), flush=True)


if __name__ == "__main__":
    main()
