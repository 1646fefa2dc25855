"""SmolLM2-135M made smaller in every way, ours, the papers' and llama.cpp's, under one protocol.

python benchmarks/compare.py low-rank
python benchmarks/compare.py bits
python benchmarks/compare.py peers                  # after `make peers`
python benchmarks/compare.py write

Needs `make real-model` and the shared texts. The first two are runs of `rankwise compare` and go on after a stop, as do
the peers; `write` makes the result files and the picture of README. --sizes and --methods measure some of the cells:
several processes may share them out, each with a folder of its own in the --run-dir that `write` reads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, ROOT, markdown_table, shared_directory, write_result
from peers import peers
from rankwise import stages
from rankwise.checkpoints import load_model
from rankwise.flows.compare import compare
from rankwise.models import find_sites
from rankwise.progress import Reporter
from rankwise.recipes import Comparison, comparison_from, read_sizes, read_ways
from rankwise.reports import ComparedRow
from rankwise.reports.compared import mean_accuracy
from rankwise.runs import stage_key

MODEL = ROOT / "real-models" / "smollm2-135m"
TEXTS = ("wikitext2.test", "mix.heldout")
LENGTH, SCORED, CALIBRATION, LIMIT = 256, 32, 48, 50
SIZES = {"keep": "0.8,0.9,0.6", "bits": "2.5,3,4"}
METHODS = {
    "keep": "svd,fwsvd,asvd,svd_llm,afm,bolaco,two_sided,flap,llm_pruner,slicegpt,pruned",
    "bits": "quantize,caldera,mixed",
}


def protocol(shared: Path, folder: Path, spelling: str, sizes: str, methods: str, tasks: bool) -> Comparison:
    """The comparison of one spelling: texts, tasks and calibration are the same for both."""
    return comparison_from(
        {
            "model": str(MODEL),
            "output": str(folder / spelling),
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
                    "sequences": CALIBRATION,
                    "length": LENGTH,
                    "batch_size": 2,
                    "bos": "never",
                },
                "budget": {"rank_multiple": 8},
                "methods": {name: {"outer": 5} for name in ("caldera", "mixed") if name in methods},
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
    scored_by, dense = stages.measure_dense(asked, stages.cells_of(asked)[0].recipe, rows, reporter)
    loaded = load_model(str(MODEL))
    sites = find_sites(loaded.model)
    original = {site.name: site.weight(loaded.model).clone() for site in sites}
    moments = second_moments(loaded, sites, asked.recipe(asked.ways[0], 4.0, 0))
    weights = sum(site.parameters for site in sites)
    found = [dense]
    known = peers()
    for name in names or list(known):
        key = stage_key({**scored_by.key, "peer": name})
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
    stages.write_comparison(scored_by, found, output)


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
    for batch in ids.split(2):
        loaded.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


GROUPS = {
    "two_sided": ("ours, low rank", "C3", "o"),
    "mixed": ("ours, mixed", "C3", "D"),
    "quantize": ("ours, Q alone", "C1", "s"),
    "caldera": ("ours, Q + L R", "C1", "^"),
    "svd": ("SVD", "C7", "v"),
    "fwsvd": ("FWSVD", "C7", "<"),
    "asvd": ("ASVD", "C7", ">"),
    "svd_llm": ("SVD-LLM", "C7", "x"),
    "afm": ("AFM", "C7", "+"),
    "bolaco": ("Bolaco, uniform", "C7", "P"),
    "pruned": ("ours, units and ranks", "C3", "X"),
    "flap": ("FLAP", "C5", "<"),
    "llm_pruner": ("LLM-Pruner", "C5", ">"),
    "slicegpt": ("SliceGPT", "C5", "P"),
    "llama.cpp": ("llama.cpp", "C0", "o"),
    "HQQ": ("HQQ", "C2", "o"),
    "torchao": ("torchao", "C4", "o"),
    "GPTQ": ("GPTQ", "C6", "o"),
}
"""First word of a row's name -> how the picture calls and draws it."""


def group_of(way: str) -> str:
    """Which of `GROUPS` a row belongs to."""
    return way.split(" ")[0].split("/")[0].split("+")[0]


def read(folder: Path) -> list[ComparedRow]:
    """All finished rows of all runs below a folder, the original first and once."""
    rows: list[ComparedRow] = []
    for file in sorted(folder.rglob("rows.jsonl")):
        for line in file.read_text().splitlines():
            row = ComparedRow(**{key: value for key, value in json.loads(line).items() if key != "chain"})
            rows += [row] if row.asked is not None or not rows else []
    return list({row.key: row for row in rows}.values())


def draw(rows: list[ComparedRow], text: str, path: Path) -> None:
    """Perplexity against the bytes of all weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    dense = rows[0]
    top, above = 8 * (dense.perplexity[text] or 0.0), []
    for group, (label, colour, marker) in GROUPS.items():
        points = sorted(
            ((row.bytes or 0) / 1e6, row.perplexity[text] or 0.0)
            for row in rows
            if row.asked is not None and group_of(row.way) == group and row.perplexity.get(text)
        )
        if points and min(value for _, value in points) > top:
            above.append(label)
        elif points:
            line = "none" if group in ("llama.cpp", "HQQ", "torchao", "GPTQ") else "-"
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, ms=5, lw=1, label=label)
    best = dense.perplexity[text] or 0.0
    axes.axhline(best, color="black", linewidth=0.8)
    axes.annotate(
        f"dense, {(dense.bytes or 0) / 1e6:.0f} MB", (0.99, best), xycoords=("axes fraction", "data"), ha="right"
    )
    axes.set_yscale("log")
    axes.set_ylim(best * 0.95, top)
    if above:
        axes.annotate(f"above this scale: {', '.join(above)}", (0.99, 0.74), xycoords="axes fraction", ha="right")
    ticks = [best * factor for factor in (1, 1.25, 1.5, 2, 3, 4, 6, 8)]
    axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of all weights, MB")
    axes.set_ylabel(f"perplexity on {text.rpartition('/')[2].removesuffix('.txt')}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    figure.savefig(path, metadata={"Date": None})


NOTES = f"""SmolLM2-135M-Instruct. Calibration {CALIBRATION} x {LENGTH} tokens of mix.calibration, {SCORED} x {LENGTH}
of each text scored; one seed; no repair and no search; low rank is stored as `auto` in every row, so that the papers'
methods take pivot rows where those are smaller. Few bits of ours are rows of `benchmarks/results/mixed.json`. Rows of
peers are the weights that their own code makes; what pads a row there is not counted. GPTQ's scales are of the extremes
of each group and its Hessians of the original model. Embeddings stay at 16 bits in
every row. The weights were rounded to 4 bits once before (Q4_1), which favours formats of 4 bits in small groups.

"""
OURS = {"Q alone": "quantize", "Q + L R": "caldera", "mixed": "mixed"}


def of_few_bits(dense: ComparedRow, texts: dict[str, str]) -> list[ComparedRow]:
    """Rows of quantize, caldera and mixed, from the results of `mixed.py`."""
    record = json.loads((RESULTS / "mixed.json").read_text())["figures"]["smollm2-135m"]
    weights = dense.linear_parameters or 0
    return [
        ComparedRow(
            key="",
            way=OURS[cell["row"]],
            asked=cell["asked"],
            bits=cell["bits"],
            keep=cell["bits"] / 16,
            bytes=round((dense.bytes or 0) - 2 * weights + cell["bits"] * weights / 8),
            perplexity={source: cell["perplexity"][name] for source, name in texts.items()},
            seconds=cell["seconds"],
        )
        for cell in record
        if cell["row"] in OURS
    ]


def write(folder: Path) -> None:
    rows = read(folder)
    texts = list(rows[0].perplexity)
    tasks = [(figure.task, figure.metric) for figure in rows[0].tasks if figure.metric == "acc"]
    names = {text: text.rpartition("/")[2].removesuffix(".txt") for text in texts}
    if not any(row.way in OURS.values() for row in rows):
        rows += of_few_bits(rows[0], names)
    figures: list[dict[str, Any]] = []
    lines = []
    for row in rows:
        scores = {figure.task: figure for figure in row.tasks if figure.metric == "acc"}
        figures.append(
            {
                "way": row.way,
                "asked": row.asked,
                "bits": row.bits,
                "keep": row.keep,
                "bytes": row.bytes,
                "megabytes": (row.bytes or 0) / 1e6,
                "perplexity": {names[text]: value for text, value in row.perplexity.items()},
                "accuracy": {task: scores[task].score for task, _ in tasks if task in scores},
                "difference_error": {task: scores[task].difference_error for task, _ in tasks if task in scores},
                "mean_accuracy": mean_accuracy(row),
                "seconds": row.seconds,
                "problem": row.problem,
            }
        )
    order = sorted(figures[1:], key=lambda figure: -(figure["bytes"] or 0))
    for figure in [figures[0], *order]:
        if figure["problem"]:
            lines.append([figure["way"], "-", "-", *(["no plan"] * (len(texts) + 1))])
            continue
        lines.append(
            [
                figure["way"],
                f"{figure['bytes'] / 1e6:.1f}",
                f"{figure['bits']:.2f}",
                *(f"{figure['perplexity'][names[text]]:.1f}" for text in texts),
                "-" if figure["mean_accuracy"] is None else f"{figure['mean_accuracy']:.3f}",
            ]
        )
    header = ["row", "MB in all", "bits a linear weight", *(names[text] for text in texts), "mean accuracy"]
    notes = NOTES
    if tasks:
        notes += (
            f"{LIMIT} examples of each of four local tasks made from mix.heldout; an accuracy has an error of 0.03.\n\n"
        )
    else:
        header, lines = header[:-1], [line[:-1] for line in lines]
    body = notes + markdown_table(header, lines)
    write_result("compare", "SmolLM2-135M, made smaller in every way", "python benchmarks/compare.py", body, figures)
    for text in texts:
        draw(rows, text, ROOT / "docs" / "images" / f"compare-{names[text].replace('.', '-')}.svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["low-rank", "bits", "peers", "write"])
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "compare")
    parser.add_argument("--stages", type=Path, help="where finished stages are kept; in --run-dir by default")
    parser.add_argument("--sizes")
    parser.add_argument("--methods", help="for peers, their names joined by semicolons")
    parser.add_argument("--no-tasks", dest="tasks", action="store_false", help="perplexity alone")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        write(arguments.run_dir)
        return
    if arguments.what == "peers":
        names = arguments.methods.split(";") if arguments.methods else []
        run_peers(shared_directory(), arguments.run_dir, names, arguments.tasks)
        return
    spelling = {"low-rank": "keep", "bits": "bits"}[arguments.what]
    asked = protocol(
        shared_directory(),
        arguments.run_dir,
        spelling,
        arguments.sizes or SIZES[spelling],
        arguments.methods or METHODS[spelling],
        arguments.tasks,
    )
    compare(asked, run_directory=arguments.stages or arguments.run_dir / "run", reporter=Reporter(lines=True))


if __name__ == "__main__":
    main()
