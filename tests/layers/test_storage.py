"""Pivoted storage: the same map in fewer numbers, in the layer, the checkpoint and the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from conftest import ELSEWHERE, IDS, tiny_llama
from rankwise import compress
from rankwise.checkpoints import REPORT_FILE, load_model
from rankwise.factors import Factors
from rankwise.layers import LowRankLinear, PivotedLinear, fold_orders, kind_of, kinds, substitute
from rankwise.models import Site, find_sites
from rankwise.quantizers import Packed
from rankwise.recipes import recipe_from
from rankwise.sizes import Plan


def one_site(m: int, n: int, rank: int, bias: bool) -> tuple[nn.Sequential, Site, Factors]:
    torch.manual_seed(m * n + rank)
    model = nn.Sequential(nn.Linear(n, m, bias=bias))
    site = Site("0", "q", 0, m, n, False, bias, "0")
    extra = torch.randn(m).double() if bias else None
    return model, site, Factors(torch.randn(m, rank).double(), torch.randn(rank, n).double(), extra)


def test_factors_go_to_a_device_and_codes_stay() -> None:
    _, _, factors = one_site(6, 5, 2, True)
    moved = factors.on(torch.device("meta"))
    assert moved.left is not None
    assert moved.right is not None
    assert moved.bias is factors.bias
    assert (moved.left.device.type, moved.right.device.type) == ("meta", "meta")
    nothing = Factors(None, None, factors.bias)
    assert nothing.on(torch.device("meta")) is nothing
    coded = replace(factors, q=Packed(torch.zeros(6, 1, 2, dtype=torch.uint8), torch.ones(1, 1), 5, "uniform"))
    assert coded.on(torch.device("meta")) is coded


@given(m=st.integers(2, 40), n=st.integers(1, 40), bias=st.booleans(), data=st.data())
def test_both_layers_compute_the_same_map(m: int, n: int, bias: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m - 1, n)))
    model, site, factors = one_site(m, n, rank, bias)
    x = torch.randn(3, 5, n)
    two = substitute(model, site.name, factors, "two_factor", torch.float32)
    expected = model(x)
    layer = substitute(model, site.name, factors, "pivoted", torch.float32)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), two.dense_weight(), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name) == rank * (m + n - rank)
    again = kind_of(layer).factors(layer)
    torch.testing.assert_close(again.reconstruct(), layer.dense_weight())
    if bias:
        torch.testing.assert_close(again.bias.float(), factors.bias.float())


def test_gradients_reach_every_part_of_a_pivoted_layer() -> None:
    model, site, factors = one_site(9, 7, 4, True)
    layer = substitute(model, site.name, factors, "pivoted", torch.float32)
    layer.requires_grad_(True)
    model(torch.randn(6, 7)).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in layer.parameters())


def pivot_all(model: Any, share: float = 0.6, leave: tuple[str, ...] = ()) -> list[Site]:
    sites = find_sites(model)
    for site in sites:
        if site.role in leave:
            continue
        u, s, v = torch.linalg.svd(site.weight(model).double(), full_matrices=False)
        rank = max(1, int(share * len(s)))
        whole = Factors(u[:, :rank] * s[:rank], v[:rank], torch.randn(site.m) * 0.1)
        substitute(model, site.name, whole, "pivoted", torch.float32)
    return sites


@pytest.mark.parametrize("leave", [(), ("up",), ("down",), ("gate", "down")])
def test_one_order_serves_a_whole_gated_layer(leave: tuple[str, ...]) -> None:
    model = tiny_llama()
    sites = pivot_all(model, leave=leave)
    ids = torch.tensor([IDS])
    before = model(input_ids=ids).logits
    settled: list[str] = []
    assert fold_orders(model, sites, ids, settled.append) == 2
    assert sorted(settled) == sorted(site.name for site in sites if site.role in ("up", "gate", "down"))
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    mlp = model.model.layers[0].mlp
    leader, other = (mlp.gate_proj, mlp.up_proj) if "up" in leave else (mlp.up_proj, mlp.gate_proj)
    assert leader.place is None
    assert not isinstance(other, PivotedLinear) or other.place is not None


class Scaled(nn.Module):
    def __init__(self, scales: torch.Tensor) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) * self.scales


@pytest.mark.parametrize("spread", [0.02, 2])
def test_an_order_is_kept_where_the_channels_are_not_interchangeable(spread: float) -> None:
    model = tiny_llama()
    sites = pivot_all(model)
    scales = torch.linspace(1, 1 + spread, 80)
    for block in model.model.layers:
        block.mlp.act_fn = Scaled(scales)
    ids = torch.tensor([IDS])
    before = model(input_ids=ids).logits
    assert fold_orders(model, sites, ids) == 0
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.model.layers[0].mlp.up_proj.place is not None


@pytest.mark.long
@pytest.mark.parametrize("storage", ["pivoted", "auto"])
def test_a_checkpoint_of_pivoted_layers_stands_alone(storage: str, settings: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = compress(recipe_from(settings(output=str(output), budget=budget(storage))))
    logits = result.model(input_ids=torch.tensor([IDS])).logits.detach()
    torch.save(logits, tmp_path / "logits.pt")
    arguments = [str(output), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    loaded = load_model(str(output))
    assert any(isinstance(m, PivotedLinear) for m in loaded.model.modules())
    torch.testing.assert_close(loaded.model(input_ids=torch.tensor([IDS])).logits, logits)
    report = json.loads((output / REPORT_FILE).read_text())
    tensors = load_file(output / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == report["after"]["bytes"]
    integers = sum(t.numel() for t in tensors.values() if not t.is_floating_point())
    assert integers == report["after"]["linear_indices"] > 0
    counted = report["after"]["linear_parameters"] + (integers if storage == "auto" else 0)
    # What auto counts for an order that is then folded away is not stored.
    numbers = result.plan.kept_bits / 32
    assert counted <= numbers <= counted + (2 * 80 if storage == "auto" else 0)
    assert {facts.get("storage") for facts in report["sites"].values()} <= {"pivoted", "two_factor", None}


def budget(storage: str) -> dict[str, Any]:
    return {"keep": 0.7, "rank_multiple": 1, "storage": storage}


def in_pivot_rows(plan: Plan) -> Plan:
    """The same cuts, stored as pivot rows, on no budget."""
    return plan.model_copy(update={"form": plan.form.model_copy(update={"storage": "pivoted"}), "keep": None})


def test_both_storages_give_the_same_model_at_equal_ranks(settings: Any, tmp_path: Path) -> None:
    two = compress(recipe_from(settings(budget=budget("two_factor"))))
    (tmp_path / "plan.json").write_text(in_pivot_rows(two.plan).model_dump_json())
    kept = {"keep": None, "rank_multiple": 1, "storage": "pivoted"}
    plan = {"name": "plan", "file": str(tmp_path / "plan.json")}
    pivoted = compress(recipe_from(settings(budget=kept, allocation=plan)))
    assert pivoted.plan.cuts == two.plan.cuts
    assert pivoted.plan.kept < two.plan.kept
    ids = torch.tensor([IDS])
    expected, found = (result.model(input_ids=ids).logits.float() for result in (two, pivoted))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_plan_made_for_one_storage_is_scaled_for_another(settings: Any, tmp_path: Path) -> None:
    two = compress(recipe_from(settings(budget=budget("two_factor"))))
    (tmp_path / "plan.json").write_text(two.plan.model_dump_json())
    plan = {"name": "plan", "file": str(tmp_path / "plan.json")}
    result = compress(recipe_from(settings(budget=budget("pivoted"), allocation=plan)))
    assert two.plan.kept <= 0.7 >= result.plan.kept > 0.68
    assert sum(cut.rank or 0 for cut in result.plan.cuts.values()) > sum(
        cut.rank or 0 for cut in two.plan.cuts.values()
    )
    assert any("storage" in note for note in result.report.notes)


def test_ill_conditioned_pivots_fall_back_to_two_factors(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "ILL_CONDITIONED", 1e-6)
    result = compress(recipe_from(settings(output=str(tmp_path / "out"), budget=budget("pivoted"))))
    assert not any(isinstance(m, PivotedLinear) for m in result.model.modules())
    assert any(isinstance(m, LowRankLinear) for m in result.model.modules())
    assert any("ill-conditioned" in note and "numbers more than planned" in note for note in result.report.notes)


def test_the_dense_format_multiplies_pivoted_layers_back(settings: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    values = settings(budget=budget("pivoted"), output=str(output), format="dense")
    result = compress(recipe_from(values))
    plain = compress(recipe_from(settings(budget=budget("pivoted"))))
    ids = torch.tensor([IDS])
    torch.testing.assert_close(
        result.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, atol=1e-3, rtol=1e-3
    )


@pytest.mark.long
def test_in_bfloat16_the_storages_differ_by_less_than_a_fifth_of_a_percent(bundled: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": str(bundled),
        "method": "bolaco",
        "budget": {"keep": 0.7, "rank_multiple": 1, "storage": "two_factor"},
        "calibration": {"source": "bundled:train", "sequences": 32, "length": 128},
        "evaluation": {"source": "bundled:heldout", "sequences": 32, "length": 128},
    }
    two = compress(recipe_from(values), run_directory=tmp_path / "run")
    (tmp_path / "plan.json").write_text(in_pivot_rows(two.plan).model_dump_json())
    values["budget"] = {"keep": None, "rank_multiple": 1, "storage": "pivoted"}
    values["allocation"] = {"name": "plan", "file": str(tmp_path / "plan.json")}
    pivoted = compress(recipe_from(values), run_directory=tmp_path / "run")
    assert {str(p.dtype) for p in pivoted.model.parameters()} == {"torch.bfloat16"}
    factored = [name for name, site in pivoted.report.sites.items() if site.storage == "pivoted"]
    assert len(factored) == len(pivoted.plan.cuts)
    expected, found = (result.report.evaluation.compressed.perplexity for result in (two, pivoted))
    assert found == pytest.approx(expected, rel=0.002)
    assert found != expected


def test_files_are_as_large_as_the_arithmetic_says(settings: Any, tmp_path: Path) -> None:
    for storage in ("two_factor", "pivoted", "auto"):
        output = tmp_path / storage
        result = compress(recipe_from(settings(output=str(output), budget=budget(storage))))
        after, file = result.report.after, (output / "model.safetensors").stat().st_size
        header = int.from_bytes((output / "model.safetensors").read_bytes()[:8], "little")
        assert file == 8 + header + after.bytes
        assert after.linear_parameters <= 0.7 * result.report.before.linear_parameters
        assert result.report.bytes_on_disk == file
