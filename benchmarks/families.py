"""Every family of causal language models that the installed transformers can build small: compressed, saved, loaded.

python benchmarks/families.py [FAMILY ...] [--run-dir DIR]

A model of a few thousand parameters is made from each family's own config, compressed to half with random tokens and
written, which tries it in a process without rankwise; then the two-sided method with a backward pass, from a bfloat16
checkpoint. A family is fine where both end well; what is refused says why; anything else is a foreign exception.
Outcomes stay in --run-dir: the same command goes on after a stop, and families that are named are tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import ROOT, ended, forked, markdown_table, write_result
from rankwise import compress
from rankwise.checkpoints import load_model, reload
from rankwise.errors import RankwiseError
from rankwise.models import decoder_blocks, find_sites, unfuse_experts
from rankwise.recipes import recipe_from

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "lru_width", "mamba_d_ssm"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "rotary_dim": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LARGEST = 8_000_000
"""Parameters beyond which a model is not small."""

SECONDS = 400


def build(family: str) -> Any:
    """A small model of a family with random weights."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    known = kind.config_class().to_dict()
    config = kind.config_class(**{name: value for name, value in SMALL.items() if name in known})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest config here has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        if not model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits.isfinite().all():
            raise ValueError("its logits are not finite")
    return model


def try_family(family: str, folder: Path) -> dict[str, Any]:
    """What came of one family."""
    try:
        model = build(family)
        model.save_pretrained(folder / "float32")
        model.bfloat16().save_pretrained(folder / "bfloat16")
    except Exception as problem:
        return {"outcome": "not built", "why": f"{type(problem).__name__}: {problem}".splitlines()[0][:160]}
    ids = torch.randint(3, 100, (16, 16), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, folder / "ids.safetensors")
    values = {
        "budget": {"keep": 0.5, "rank_multiple": 1},
        "calibration": {"source": f"tokens:{folder}/ids.safetensors"},
    }
    try:
        loaded = load_model(str(folder / "float32"))
        unfuse_experts(loaded.model)
        sites = find_sites(loaded.model)
        blocks = decoder_blocks(loaded.model)[1]
        matrices = sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
        covered = sum(site.parameters for site in sites) / matrices
        compress(
            recipe_from({**values, "model": str(folder / "float32"), "method": "bolaco", "output": str(folder / "one")})
        )
        compress(
            recipe_from(
                {**values, "model": str(folder / "bfloat16"), "method": "two_sided", "output": str(folder / "two")}
            )
        )
    except RankwiseError as problem:
        return {"outcome": "refused", "why": problem.problem[:300]}
    except Exception as problem:
        return {"outcome": "foreign", "why": f"{type(problem).__name__}: {problem}".splitlines()[0][:300]}
    return {"outcome": "fine", "sites": len(sites), "covered": covered}


def in_a_process(family: str) -> dict[str, Any]:
    """The same in a process of its own, so that nothing stays."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["RANKWISE_CACHE"] = str(folder / "cache")

        def work() -> None:
            torch.set_num_threads(1)
            (folder / "outcome.json").write_text(json.dumps(try_family(family, folder)))

        status = ended(forked(work), SECONDS)
        if status:
            return {"outcome": "foreign", "why": f"the process ended with {status}"}
        return dict(json.loads((folder / "outcome.json").read_text()))


def main() -> None:
    reload._elsewhere()  # One for all, which each would start else.
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*")
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "families")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        file = arguments.run_dir / f"{family}.json"
        if family in arguments.family or not (arguments.family or file.exists()):
            file.write_text(json.dumps(in_a_process(family)))
            print(family, file.read_text(), flush=True)
        if file.exists():
            found[family] = json.loads(file.read_text())
    write_result("families", "Families of decoders", "python benchmarks/families.py", table(found), found)
    PAGE.write_text(page(found, transformers.__version__))


def table(found: dict[str, dict[str, Any]]) -> str:
    """All families with what came of them."""
    count = Counter(row["outcome"] for row in found.values())
    rows = [
        [
            family,
            row["outcome"],
            f"{100 * row['covered']:.0f}%" if "covered" in row else "",
            row.get("why", "").replace("|", "/").replace("\n", " "),
        ]
        for family, row in found.items()
    ]
    return (
        f"transformers {transformers.__version__}. {count['fine']} families fine, {count['refused']} refused with a "
        f"reason, {count['foreign']} ended with a foreign exception; {count['not built']} could not be built small.\n\n"
        "Covered: share of the decoder's matrices that are sites. The others stay as they are.\n\n"
    ) + markdown_table(["family", "outcome", "covered", "why"], rows)


PAGE = ROOT / "docs" / "architectures.md"


def page(found: dict[str, dict[str, Any]], version: str) -> str:
    """docs/architectures.md, of the families that could be built."""
    built = {family: row for family, row in found.items() if row["outcome"] != "not built"}
    fine = {family: row for family, row in built.items() if row["outcome"] == "fine"}
    whole = sum(row["covered"] > _NEARLY_ALL for row in fine.values())
    rows = [
        [
            family,
            f"{100 * row['covered']:.0f}%" if "covered" in row else "-",
            "" if row["outcome"] == "fine" else _why(row),
        ]
        for family, row in built.items()
    ]
    return (
        f"""# Architectures

Every family of causal language models that transformers {version} knows, if its own config could be made small: random
weights, compressed to half by `bolaco` from float32 and by `two_sided` (with a backward pass) from bfloat16, written,
and tried in a process without rankwise. Of {len(built)} families {len(fine)} end well, {whole} of them with all
matrices of the decoder covered but for routers and the like. `python benchmarks/families.py` makes this page and
`benchmarks/results/families.md`, which lists the {len(found) - len(built)} that could not be built small, too.

Covered is the share of the numbers in the decoder's matrices that are compressed. The rest stays as it is: routers,
convolutions, states, experts of a layout that is not known, and linear layers that make something else of their weights
than W x + b. Models that read images too: [vision.md](vision.md).

"""
        + markdown_table(["family", "covered", "what keeps it"], rows)
        + "\n"
    )


_NEARLY_ALL = 0.985
"""Share from which on a page says 'all but routers and the like'."""


def _why(row: dict[str, Any]) -> str:
    """What stopped a family, in one cell."""
    return " ".join(row["why"].replace("|", "/").split())[:160]


if __name__ == "__main__":
    main()
