"""Whether a fused weight, q, k and v or gate and up in one, is better compressed as one site or as its parts.

python benchmarks/fused.py [--run-dir DIR]

wiki-llama-8m is written a second time in the layout of Phi-3, whose blocks keep q, k, v in one weight and gate, up in
another; both compute the same. Each is compressed to equal size on the same text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from common import ROOT, markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import compress
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

LAYOUTS = {"parts": "as its parts", "one": "as one site"}
TEXTS = ("wikitext2.test", "mix.heldout")
CASES: dict[str, dict[str, Any]] = {
    **{f"two_sided, keep {keep}": {"method": "two_sided", "budget": {"keep": keep}} for keep in (0.8, 0.6, 0.4)},
    **{f"bolaco, keep {keep}": {"method": "bolaco", "budget": {"keep": keep}} for keep in (0.8, 0.6)},
    "quantize, 3 bits": {"method": "quantize", "budget": {"bits": 3}},
}


def fused(source: Path, folder: Path) -> None:
    """The same model in the layout of Phi-3."""
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    own = dense.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    more = ("num_key_value_heads", "max_position_embeddings")
    config = Phi3Config(**{key: getattr(own, key) for key in (*same, *ids, *more)}, sliding_window=None)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for whole, parts in (
                ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("gate_up_proj", ("gate_proj", "up_proj")),
            ):
                if whole in name:
                    parameter.copy_(torch.cat([found[name.replace(whole, part)] for part in parts]))
                    break
            else:
                parameter.copy_(found[name])
        probe = torch.arange(3, 67)[None]
        difference = (model.float()(input_ids=probe).logits - dense.float()(input_ids=probe).logits).abs().max()
    assert float(difference) < 1e-3, float(difference)
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def measure(model: Path, shared: Path, run: Path, text: str, case: dict[str, Any]) -> dict[str, Any]:
    calibration, texts = protocols("wiki-llama-8m", shared)
    values = {
        **case,
        "model": str(model),
        "budget": {**case["budget"], "rank_multiple": 1},
        "calibration": {**calibration, "sequences": 128},
        "evaluation": texts[text],
    }
    found = compress(recipe_from(values), run_directory=run, reporter=Reporter(show=False))
    scores = found.report.evaluation
    assert scores is not None
    return {
        "dense": scores.dense.perplexity,
        "perplexity": scores.compressed.perplexity,
        "bytes": found.report.after.linear_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "fused")
    run = parser.parse_args().run_dir
    run.mkdir(parents=True, exist_ok=True)
    shared = shared_directory()
    models = {"parts": shared / "models" / "wiki-llama-8m", "one": run / "model"}
    if not (models["one"] / "config.json").exists():
        fused(models["parts"], models["one"])
    file = run / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for layout, model in models.items():
        # Stages are shared by the cases of a model.
        with tempfile.TemporaryDirectory() as stages:
            for name, case in CASES.items():
                for text in TEXTS:
                    key = f"{name} | {layout} | {text}"
                    if key not in figures:
                        figures[key] = measure(model, shared, Path(stages), text, case)
                        print(key, figures[key], flush=True)
                        file.write_text(json.dumps(figures))
    rows = []
    for name in CASES:
        row = [name]
        for layout in LAYOUTS:
            row.append(" / ".join(f"{figures[f'{name} | {layout} | {text}']['perplexity']:.2f}" for text in TEXTS))
        rows.append(row)
    dense = " / ".join(f"{figures[f'{next(iter(CASES))} | one | {text}']['dense']:.2f}" for text in TEXTS)
    body = (
        f"wiki-llama-8m, 128 x 256 tokens of its training text; perplexity on {' / '.join(TEXTS)}, dense {dense}.\n\n"
        + markdown_table(["method, size", *LAYOUTS.values()], rows)
    )
    write_result("fused", "Fused weights", "python benchmarks/fused.py", body, figures)


if __name__ == "__main__":
    main()
