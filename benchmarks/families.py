"""Every family of causal language models that the installed transformers can build small: compressed, saved, loaded.

python benchmarks/families.py [FAMILY ...] [--run-dir DIR]

A model of a few thousand parameters is made from each family's own config (`small_configs.py`), compressed to half with
random tokens and written, which tries it in a process without rankwise; then the two-sided method with a backward pass,
from a bfloat16 checkpoint. A family is fine where both end well; what is refused says why; anything else is a foreign
exception.
Outcomes stay in --run-dir: the same command goes on after a stop, and families that are named are tried again. A family
without an outcome there keeps its row of the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import RESULTS, ROOT, ended, forked, markdown_table, write_result
from rankwise import compress
from rankwise.checkpoints import load_model, reload
from rankwise.errors import RankwiseError
from rankwise.methods.two_sided import TwoSided
from rankwise.models import BlockRunner, Site, decoder_blocks, find_sites, share_inputs, unfuse_experts
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.statistics import collect
from small_configs import CANNOT, small_config

LARGEST = 8_000_000
"""Parameters beyond which a model is not small."""

SECONDS = 400

APART = 1e-3
"""Difference, relative to the largest logit, from which on a model does not give the same in two ways."""

SAME = 1e-4
"""Relative difference of two statistics up to which they are the same but for rounding."""


def build(family: str) -> Any:
    """A small model of a family with random weights."""
    config = small_config(family)
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
    if family in CANNOT:
        return {"outcome": "not built", "why": CANNOT[family]}
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
        left = what_stays(blocks, {site.weight(loaded.model).data_ptr() for site in sites}, matrices)
        differs = by_block_differs(loaded.model, sites, ids)
        if differs is not None and not differs <= SAME:
            return {"outcome": "foreign", "why": f"statistics block by block differ by {differs:.1g}"}
        compress(
            recipe_from({**values, "model": str(folder / "float32"), "method": "bolaco", "output": str(folder / "one")})
        )
        compress(
            recipe_from(
                {**values, "model": str(folder / "bfloat16"), "method": "two_sided", "output": str(folder / "two")}
            )
        )
        if wrong := behaves_otherwise(folder / "float32", folder / "one"):
            return {"outcome": "foreign", "why": wrong}
    except RankwiseError as problem:
        return {"outcome": "refused", "why": problem.problem[:300]}
    except Exception as problem:
        return {"outcome": "foreign", "why": f"{type(problem).__name__}: {problem}".splitlines()[0][:300]}
    found = {"outcome": "fine", "sites": len(sites), "covered": covered, "left": left, "by_block": differs}
    return found | ({} if covered > _NEARLY_ALL else {"at_full_size": covered_at_full_size(family)})


def covered_at_full_size(family: str) -> float | None:
    """What is covered at the shapes of a family's default config, where a small one has more beside; None if it is not
    built.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](), dtype=torch.bfloat16)
        matrices = sum(p.numel() for p in decoder_blocks(model)[1].parameters() if p.ndim >= 2)
        unfuse_experts(model)
        return sum(site.parameters for site in find_sites(model)) / matrices
    except Exception:  # such as a config whose defaults are none
        return None


def by_block_differs(model: Any, sites: list[Site], ids: torch.Tensor) -> float | None:
    """Largest relative difference of a statistic taken block by block from that of the whole model, the last batch
    smaller; None where a model's blocks are not run by themselves.
    """
    ids = ids[:7]
    sites = share_inputs(model, sites, ids[:1])
    if not BlockRunner(model, ids, 3, autocast=False).alone():
        return None
    asked = TwoSided().requests()

    def taken() -> Any:
        return collect(model, sites, ids, asked, batch_size=3, reporter=Reporter(show=False))

    one = taken()
    with patch.object(BlockRunner, "alone", lambda _self: False):
        other = taken()
    if any(one[statistic].keys() != other[statistic].keys() for statistic in asked):
        return math.inf
    return max(
        float((value - found).norm() / value.norm().clamp_min(1e-30))
        for statistic in asked
        for key, totals in other[statistic].items()
        for value, found in zip(vars(totals).values(), vars(one[statistic][key]).values(), strict=True)
        if isinstance(value, torch.Tensor) and value.numel()
    )


def behaves_otherwise(before: Path, after: Path) -> str:
    """What the checkpoint does not do that the original did, both as transformers loads them; '' if it does all."""
    original, made = (
        AutoModelForCausalLM.from_pretrained(each, trust_remote_code=True).eval() for each in (before, after)
    )
    if tied(original) != tied(made):
        return f"embeddings and head are tied: {tied(original)} before, {tied(made)} after"
    ways = {"with a cache": cached, "padded on the left": padded}
    before_and_after = {name: (compare(original), compare(made)) for name, compare in ways.items()}
    if any(one is not None and not one <= APART for one, _ in before_and_after.values()):
        return ""  # as of one whose attention picks tokens, where equal scores are a matter of order
    for name, (one, other) in before_and_after.items():
        if one is not None and not (other is not None and other <= APART):
            return f"{name} its logits differ by {'nothing known' if other is None else f'{other:.1g}'}"
    return ""


def tied(model: Any) -> bool:
    """Whether embeddings and head are one tensor."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


@torch.inference_mode()
def cached(model: Any) -> float | None:
    """How far logits are, relative to the largest, that are made token after token with a cache; None without one."""
    ids = torch.arange(3, 19)[None]
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids[:, :12], use_cache=True)
        parts = [found.logits]
        for place in range(12, ids.shape[1]):
            name = "cache_params" if hasattr(found, "cache_params") else "past_key_values"
            found = model(input_ids=ids[:, place : place + 1], **{name: getattr(found, name)}, use_cache=True)
            parts.append(found.logits)
    except Exception:  # such as a cache of another kind
        return None
    return float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())


@torch.inference_mode()
def padded(model: Any) -> float | None:
    """How far the logits of a sequence are beside a longer one, padded on its left; None where that is not possible."""
    long, short = torch.arange(3, 19)[None], torch.arange(20, 30)[None]
    gap = long.shape[1] - short.shape[1]
    mask = torch.ones_like(long).repeat(2, 1)
    mask[1, :gap] = 0
    try:
        alone = model(input_ids=short, use_cache=False).logits
        both = torch.cat([long, torch.nn.functional.pad(short, (gap, 0), value=3)])
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        found = model(input_ids=both, attention_mask=mask, position_ids=places, use_cache=False).logits[1:, gap:]
    except Exception:  # such as a model without positions
        return None
    return float((found - alone).abs().max() / alone.abs().max())


def what_stays(blocks: Any, taken: set[int], matrices: int) -> dict[str, float]:
    """The names of what is no site, numbers left out, and their share of the decoder's matrices; the largest three."""
    shares: Counter[str] = Counter()
    for name, parameter in blocks.named_parameters():
        if parameter.ndim >= 2 and parameter.data_ptr() not in taken:
            words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
            shares[".".join(words[-2:])] += parameter.numel()
    return {name: count / matrices for name, count in shares.most_common(3) if count >= 0.01 * matrices}


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


def before() -> dict[str, dict[str, Any]]:
    """What came of each family before, of those that transformers still knows."""
    file = RESULTS / "families.json"
    figures = json.loads(file.read_text())["figures"] if file.exists() else {}
    return {family: row for family, row in figures.items() if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def main() -> None:
    reload._elsewhere()  # One for all, which each would start else.
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*")
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "families")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    found = before()
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        file = arguments.run_dir / f"{family}.json"
        if family in arguments.family or not (arguments.family or file.exists()):
            file.write_text(json.dumps(in_a_process(family)))
            print(family, file.read_text(), flush=True)
        if file.exists():
            found[family] = json.loads(file.read_text())
    found = dict(sorted(found.items()))
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
        f"reason, {count['foreign']} ended with a foreign exception; {count['not built']} could not be built.\n\n"
        "Covered: share of the decoder's matrices that are sites. The others stay as they are.\n\n"
    ) + markdown_table(["family", "outcome", "covered", "why"], rows)


PAGE = ROOT / "docs" / "architectures.md"


def page(found: dict[str, dict[str, Any]], version: str) -> str:
    """docs/architectures.md, of the families that could be built."""
    built = {family: row for family, row in found.items() if row["outcome"] != "not built"}
    fine = {family: row for family, row in built.items() if row["outcome"] == "fine"}
    whole = sum(row["covered"] > _NEARLY_ALL for row in fine.values())
    same = [row["by_block"] for row in fine.values() if row.get("by_block") is not None]
    most = max(same, default=0.0)
    rows = [
        [
            family,
            f"{100 * row['covered']:.0f}%" if "covered" in row else "-",
            f"{row['at_full_size']:.1%}" if row.get("at_full_size") else "",
            _stays(row) if row["outcome"] == "fine" else _why(row),
        ]
        for family, row in built.items()
    ]
    return (
        f"""# Architectures

Every family of causal language models that transformers {version} knows, if a small one could be built: its own config,
random weights, compressed to half by `bolaco` from float32 and by `two_sided` (with a backward pass) from bfloat16,
written, and tried in a process without rankwise. Where the original gives the same logits with a cache as without and
for a sequence that is padded on its left, the smaller one does, too; what is tied stays tied. Of {len(built)} families
{len(fine)} end well, {whole} of them with all matrices of the decoder covered but for routers and the like.
`python benchmarks/families.py` makes this page and `benchmarks/results/families.md`, which lists the
{len(found) - len(built)} that could not be built, too.

Statistics are taken block by block where blocks can be run by themselves: in {len(same)} of these families, where
those of the whole model differ from them by {most:.0e} of their norm at most. The other {len(fine) - len(same)} are run
whole.

Covered is the share of the numbers in the decoder's matrices that are compressed. The rest stays as it is: routers,
convolutions, states, experts of a layout that is not known, linear layers whose weights several blocks share, and those
that make something else of their weights than W x + b. A small model has more of that than a large one: at full size is
the share at the shapes of the family's default config, of those with less than {_NEARLY_ALL:.1%} here. Models that read
images too: [vision.md](vision.md).

"""
        + markdown_table(["family", "covered", "at full size", "what keeps it"], rows)
        + "\n"
    )


_NEARLY_ALL = 0.985
"""Share from which on a page says 'all but routers and the like'."""


def _stays(row: dict[str, Any]) -> str:
    """What keeps a family from being covered, where that is known."""
    if row["covered"] > _NEARLY_ALL:
        return ""
    return ", ".join(f"`{name}` {share:.0%}" for name, share in row.get("left", {}).items())


def _why(row: dict[str, Any]) -> str:
    """What stopped a family, in one cell."""
    return " ".join(row["why"].replace("|", "/").split())[:160]


if __name__ == "__main__":
    main()
