"""What experts that saw few tokens should be taken to know: what they saw, what their peers saw, or both.

python benchmarks/experts.py [--run-dir DIR]

A mixture of 8 experts, two a token, is made of wiki-llama-8m: every expert is its MLP with half of the channels drawn
anew (another half for each), and all is trained on three megabytes of its own kind of text until experts differ. Then
it is compressed on few sequences of that text, with three rules for experts of fewer tokens than a weight has inputs.
The trained model stays in --run-dir.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from common import ROOT, markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import compress
from rankwise.models import fuse, unfuse_experts
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.statistics import pools

EXPERTS, AT_ONCE = 8, 2
STEPS, BATCH, LENGTH = 300, 8, 256
SEQUENCES = (1, 4, 16)
SEEDS = (0, 1)
KEEP = 0.7
RULES = ("own", "mixed", "pool")
METHODS = ("two_sided",)


def upcycled(dense: Any) -> Any:
    """The mixture: as many MLPs as experts, half of whose channels are drawn anew."""
    own = dense.config
    config = MixtralConfig(
        **{key: getattr(own, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: getattr(own, key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")},
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps,
        rope_parameters=own.rope_parameters,
        num_local_experts=EXPERTS,
        num_experts_per_tok=AT_ONCE,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        **{key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    unfuse_experts(model)
    found = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(found[name])
        for block, old in zip(model.model.layers, dense.model.layers, strict=True):
            for number in range(EXPERTS):
                expert: Any = block.mlp.experts.get_submodule(str(number))
                kept = torch.randperm(own.intermediate_size)[: own.intermediate_size // 2]
                for each in ("gate_proj", "up_proj"):
                    new, weight = getattr(expert, each).weight, getattr(old.mlp, each).weight
                    new.normal_(0, float(weight.std()))
                    new[kept] = weight[kept]
                new, weight = expert.down_proj.weight, old.mlp.down_proj.weight
                new.normal_(0, float(weight.std()))
                new[:, kept] = weight[:, kept]
    return model


def sequences_of(path: Path, tokenizer: Any) -> Tensor:
    """All of a text, shape `[sequences, LENGTH]`."""
    ids = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(folder: Path, shared: Path) -> Path:
    """The mixture as a checkpoint, made where it is not there."""
    if (folder / "config.json").exists():
        return folder
    source = shared / "models" / "wiki-llama-8m"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = upcycled(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    model.requires_grad_(True).train()
    texts = sequences_of(shared / "data" / "mix.calibration.txt", tokenizer)
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=STEPS, pct_start=0.1)
    started = time.monotonic()
    for step in range(STEPS):
        ids = texts[torch.randint(len(texts), (BATCH,), generator=draw)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {STEPS}: {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    fuse(model)
    model.eval().bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def knowing(rule: str) -> Iterator[None]:
    """What is taken for an expert of few tokens, for as long as the block runs."""
    if rule == "mixed":
        yield
        return

    def own_alone(own: Any, pooled: Any, d: int) -> Any:
        return pooled.weighing(d) if own is None else own

    def pool_alone(own: Any, pooled: Any, d: int) -> Any:
        return pooled.weighing(d)

    with patch.object(pools, "mixed", own_alone if rule == "own" else pool_alone):
        yield


def measure(model: Path, shared: Path, method: str, sequences: int, rule: str, seed: int) -> dict[str, Any]:
    calibration, texts = protocols("wiki-llama-8m", shared)
    values = {
        "model": str(model),
        "method": method,
        # One allocation for all rules, so that fits alone differ.
        "allocation": "uniform",
        "budget": {"keep": KEEP, "rank_multiple": 1},
        "calibration": {**calibration, "sequences": sequences},
        "seed": seed,
        "evaluation": {**texts["mix.heldout"], "sequences": 48},
    }
    with knowing(rule), tempfile.TemporaryDirectory() as run:
        found = compress(recipe_from(values), run_directory=run, reporter=Reporter(show=False))
    scores = found.report.evaluation
    assert scores is not None
    few = [note for note in found.report.notes if "fewer calibration tokens" in note]
    return {"dense": scores.dense.perplexity, "perplexity": scores.compressed.perplexity, "few": few[:1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "experts")
    arguments = parser.parse_args()
    shared, run = shared_directory(), arguments.run_dir
    run.mkdir(parents=True, exist_ok=True)
    model = trained(run / "model", shared)
    file = run / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for method in METHODS:
        for seed in SEEDS:
            for sequences in SEQUENCES:
                for rule in RULES:
                    key = f"{method} {sequences} {rule} {seed}"
                    if key not in figures:
                        figures[key] = measure(model, shared, method, sequences, rule, seed)
                        print(key, figures[key], flush=True)
                        file.write_text(json.dumps(figures))
    write(figures)


def write(figures: dict[str, Any]) -> None:
    tables = []
    for method in METHODS:
        rows = []
        for sequences in SEQUENCES:
            row = [f"{sequences} ({sequences * LENGTH * AT_ONCE // EXPERTS})"]
            for rule in RULES:
                found = [figures[f"{method} {sequences} {rule} {seed}"]["perplexity"] for seed in SEEDS]
                row.append(f"{statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})")
            rows.append(row)
        header = ["sequences (tokens an expert)", "what it saw", "mixed, the default", "what all saw"]
        tables.append(f"## {method}\n\n{markdown_table(header, rows)}")
    dense = next(iter(figures.values()))["dense"]
    body = (
        f"A mixture of {EXPERTS} experts, {AT_ONCE} a token, made of wiki-llama-8m ({STEPS} steps of {BATCH} x "
        f"{LENGTH} tokens); keep {KEEP}, uniform. Perplexity on mix.heldout, mean of {len(SEEDS)} draws of calibration "
        f"text (least to most); dense {dense:.1f}. Weights have 256 inputs (gate, up) and 688 (down).\n\n"
        + "\n\n".join(tables)
    )
    write_result("experts", "Experts that saw few tokens", "python benchmarks/experts.py", body, figures)


if __name__ == "__main__":
    main()
