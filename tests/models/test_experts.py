"""Mixtures of experts: every projection of every expert is a site, and what is written is what was in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_architectures import SMALL
from transformers import AutoModelForCausalLM

from conftest import ELSEWHERE, IDS, failed
from rankwise import compress
from rankwise.checkpoints import load_model, save_low_rank
from rankwise.errors import ModelError
from rankwise.layers import substitute
from rankwise.layers.needs import WITHOUT_BLOCKS, WITHOUT_EXPERTS, unmet
from rankwise.methods.svd import SVD
from rankwise.models import UnfusedExperts, find_sites, fuse, share_inputs, unfuse_experts, unfusing
from rankwise.recipes import recipe_from

FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
    "num_key_value_heads": 4,
}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
CASES: dict[str, dict[str, Any]] = {
    "Mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**SMALL, **FEW, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**SMALL, **FEW, "norm_topk_prob": True},
    "Olmoe": {**SMALL, **FEW},
    # Transposed, with biases, rows of gate and up in turn, and an activation of its own.
    "GptOss": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    "DeepseekV3": {**SMALL, **MLA, **GROUPED, **FEW},
    # No gate: down(act(up x)); and its router scores all experts beside a latent space.
    "NemotronH": {
        **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
        **{k: v for k, v in GROUPED.items() if k != "first_k_dense_replace"},
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["attention", "moe"],
    },
}
GATED = [name for name in CASES if name != "NemotronH"]
SPARSE = {"DeepseekV3": 1, "NemotronH": 1}
"""Blocks that hold experts, where it is not both."""

QUICK = {"name": "caldera", "outer": 1, "inner": 1}

IDENTIFIERS = torch.arange(32).view(2, 16)


def build(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # Weights as large as those of a trained model, biases too.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: Any, ids: torch.Tensor = IDENTIFIERS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"ids": torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(0))}, path)
    return f"tokens:{path}"


def recipe(folder: Path, tokens: str, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "model": str(folder / "dense"),
        "output": str(folder / "small"),
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": {"source": tokens, "sequences": 24},
    }
    return recipe_from({**base, **changes})


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_every_expert_is_one_site(name: str) -> None:
    model = build(name)
    before, expected = dict(model.named_parameters()), logits(model)
    fused = {key: p.clone() for key, p in before.items() if p.ndim == 3 and "conv" not in key}
    assert len(fused) == 2 * SPARSE.get(name, 2)
    found = unfuse_experts(model)
    assert found.left == ()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    sites = find_sites(model)
    experts = [site for site in sites if site.pool]
    names = ["gate", "up", "down"] if name in GATED else ["up", "down"]
    assert [site.role for site in experts] == names * (4 * SPARSE.get(name, 2))
    assert {site.has_bias for site in experts} == {name == "GptOss"}
    assert len({site.pool for site in experts}) == len(names) * SPARSE.get(name, 2)
    assert sum(site.parameters for site in experts) == sum(p.numel() for p in fused.values())
    # Views: a number that changes in the fused tensor changes in one place of one site.
    for key, whole in fused.items():
        parts = [site for site in experts if found.parts[f"{site.name}.weight"] == key]
        seen = torch.cat([site.weight(model).flatten() for site in parts]).sort().values
        assert torch.equal(seen, whole.flatten().sort().values)
        storage = before[key].untyped_storage().data_ptr()
        assert {site.weight(model).untyped_storage().data_ptr() for site in parts} == {storage}
    covered = sum(site.parameters for site in sites)
    blocks = sum(p.numel() for key, p in before.items() if ".layers." in key)
    assert covered / blocks >= 0.95
    assert not [site.name for site in sites if site.role in ("router", "shared_expert_gate") or site.m in (1, 4)]


@pytest.mark.parametrize("name", CASES)
def test_fused_again_it_is_what_it_was(name: str) -> None:
    model = build(name)
    before = {key: p.clone() for key, p in model.named_parameters()}
    unfuse_experts(model)
    assert not before.keys() <= dict(model.named_parameters()).keys()
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[key], p) for key, p in before.items())


@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_the_model_itself(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "dense")
    loaded = load_model(str(tmp_path / "dense"))
    expected = logits(loaded.model)
    unfuse_experts(loaded.model)
    sites = find_sites(loaded.model)
    for site in sites:
        basis = SVD().decompose(site.weight(loaded.model).double(), None)  # type: ignore[arg-type]
        factors = basis.truncate(min(site.m, site.n), site.bias(loaded.model))
        substitute(loaded.model, site.name, factors, "two_factor", torch.float32)
    scale = expected.abs().max()
    assert float((logits(loaded.model) - expected).abs().max() / scale) < 1e-4
    (tmp_path / "small").mkdir()
    save_low_rank(tmp_path / "small", loaded, sites)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(again), logits(loaded.model))


@pytest.mark.parametrize("name", CASES)
def test_both_formats_load_and_agree(name: str, tokens: str, tmp_path: Path) -> None:
    """The default method at keep 0.6, from a checkpoint in bfloat16."""
    build(name).bfloat16().save_pretrained(tmp_path / "dense")
    method = {"name": "two_sided", "bias": name == "GptOss"}
    small = compress(recipe(tmp_path, tokens, method=method))
    assert 0.55 < small.plan.kept <= 0.6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(small.model))
    assert torch.equal(logits(load_model(str(tmp_path / "small"), precision="stored").model), logits(loaded))
    plain = compress(recipe(tmp_path, tokens, method=method, format="dense", output=str(tmp_path / "plain")))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(dense).__name__ == f"{name}ForCausalLM"
    assert torch.equal(logits(dense), logits(plain.model))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    written, before = (load_file(tmp_path / each / "model.safetensors") for each in ("plain", "dense"))
    assert {key: tensor.shape for key, tensor in written.items()} == {key: t.shape for key, t in before.items()}
    scale = logits(loaded).abs().max()
    assert (logits(dense) - logits(loaded)).abs().max() < 0.1 * scale
    assert (logits(original) - logits(loaded)).abs().max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("name", "method", "budget"),
    [
        ("Mixtral", "svd", {"keep": 0.6}),
        ("Qwen3Moe", "bolaco", {"keep": 0.6}),
        ("Olmoe", "fwsvd", {"keep": 0.6}),
        ("DeepseekV3", "asvd", {"keep": 0.6}),
        ("Mixtral", "quantize", {"bits": 4}),
        ("GptOss", "quantize", {"bits": 4}),
        ("Olmoe", QUICK, {"bits": 4}),
        ("Mixtral", {**QUICK, "name": "mixed"}, {"bits": 4}),
    ],
)
def test_every_method_takes_experts(
    name: str, method: Any, budget: dict[str, Any], tokens: str, tmp_path: Path
) -> None:
    build(name).save_pretrained(tmp_path / "dense")
    small = compress(recipe(tmp_path, tokens, method=method, budget={**budget, "rank_multiple": 1}))
    pools = [key for key, cut in small.plan.cuts.items() if ".experts." in key and not cut.dense]
    assert len(pools) > 4
    # Weights decoded once and kept are summed in another order.
    plain = {"rankwise_cache_dense": False} if "bits" in budget else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True, **plain)
    assert torch.equal(logits(loaded), logits(small.model))
    generated = [
        loaded.generate(IDENTIFIERS[:1], max_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (False, True)
    ]
    assert torch.equal(*generated)


@pytest.mark.long
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_checkpoint_stands_alone(name: str, tokens: str, tmp_path: Path) -> None:
    """Loaded, built from its config, and written again where rankwise is not installed."""
    build(name).save_pretrained(tmp_path / "dense")
    compress(recipe(tmp_path, tokens, method="svd", allocation="uniform"))
    loaded = load_model(str(tmp_path / "small"))
    torch.save(logits(loaded.model, torch.tensor([IDS])), tmp_path / "logits.pt")
    arguments = [str(tmp_path / each) for each in ("small", "again", "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout.strip().endswith("fine"), done.stderr
    entry = json.loads((tmp_path / "small/config.json").read_text())["rankwise"]
    assert entry["experts"] == [f"layers.{i}.mlp.experts" for i in range(2)]
    assert entry["format"] == WITHOUT_BLOCKS
    assert "reads formats 1 to 4" in unmet(entry, known=WITHOUT_EXPERTS)


def test_an_added_bias_has_no_place_in_fused_experts(tokens: str, tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="no place for the bias") as stopped:
        compress(recipe(tmp_path, tokens, method={"name": "bolaco", "bias": True}, format="dense"))
    assert stopped.value.where == "model.layers.0.mlp.experts.*.gate_proj.bias"


def test_an_expert_without_a_token_stays_a_site_and_shares_inputs_as_its_peers() -> None:
    model = build("Mixtral")
    # The router of the first block knows two experts only.
    model.model.layers[0].mlp.gate.weight.data[2:] = 0
    model.model.layers[0].mlp.gate.weight.data[:2] *= 100
    unfuse_experts(model)
    found = find_sites(model)
    ran: set[str] = set()
    for site in found:
        site.module(model).register_forward_pre_hook(lambda _m, _a, name=site.name: ran.add(name))
    sites = share_inputs(model, found, IDENTIFIERS[:1, :2])
    assert len(ran) < len(found)
    assert [site.name for site in sites] == [site.name for site in found]
    for site in sites:
        if site.role in ("gate", "up"):
            assert site.group == f"{site.name.rpartition('.')[0]}.gate_proj"
        elif site.pool:
            assert site.group == site.name


def test_a_token_for_no_expert_adds_nothing() -> None:
    model = build("Mixtral")
    unfuse_experts(model)
    experts = model.model.layers[0].mlp.experts
    x, index = torch.randn(3, 32), torch.tensor([[0, 1], [2, 4], [4, 4]])
    weight = torch.rand(3, 2)
    with torch.no_grad():
        found = experts(x, index, weight)
        alone = experts(x[1:2], index[1:2, :1], weight[1:2, :1])
        assert torch.equal(experts(x, top_k_weights=weight, top_k_index=index), found)
        assert not experts(x[2:], index[2:], weight[2:]).any()
    torch.testing.assert_close(found[1:2], alone)
    assert not found[2].any()


def test_experts_that_compute_something_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tokens: str, tmp_path: Path
) -> None:
    model = build("Mixtral")
    model.save_pretrained(tmp_path / "dense")
    kind = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "forward", lambda self, x, index, weight: 2 * x)
    expected = logits(model)
    assert unfuse_experts(model) == unfusing.Unfused({}, ("MixtralExperts",))
    assert torch.equal(logits(model), expected)
    assert not any(isinstance(module, UnfusedExperts) for module in model.modules())
    small = compress(recipe(tmp_path, tokens, method="svd", allocation="uniform", output=None))
    assert any("in stacks of matrices (experts, heads) stay dense" in note for note in small.report.notes)


def test_a_config_that_names_experts_wrongly_is_refused(rankwise: Any, tokens: str, tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "dense")
    compress(recipe(tmp_path, tokens, method="svd", allocation="uniform"))
    path = tmp_path / "small/config.json"
    whole = json.loads(path.read_text())
    for wrong, says in (([3], "by name which experts"), (["layers.0.mlp"], "holds no fused experts")):
        path.write_text(json.dumps({**whole, "rankwise": {**whole["rankwise"], "experts": wrong}}))
        failed(rankwise("generate", tmp_path / "small", "--prompt", "x"), says)
