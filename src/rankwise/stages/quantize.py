"""Codes: what the methods that quantise put in place of the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import NotFiniteError
from rankwise.factors import Quantized
from rankwise.layers import QuantizedLinear, empty_quantized, fill_quantized
from rankwise.methods import QuantizingMethod
from rankwise.models import Site
from rankwise.sizes import QuantizedRank, RankPlan
from rankwise.stages.bases import draw_for, naming, weight_and_statistics
from rankwise.stages.factors import SiteFacts
from rankwise.stages.work import Work, calibration_key
from rankwise.statistics import Store


def quantize_sites(work: Work, store: Store, plan: RankPlan) -> SiteFacts:
    """Quantise every site that is not dense, and put the codes in its place.

    A site that is on disk already is not done again.

    Returns:
        By site name: errors by iteration, which was kept, bits, and the damping of the Hessian.

    Raises:
        NotFiniteError: naming the site.
    """
    method = work.recipe.method
    assert isinstance(method, QuantizingMethod)
    assert plan.form is not None
    model, found = work.loaded.model, {}
    sites = [site for site in work.sites if site.name in plan.q_bits]
    # A site's codes depend on its own rank alone, so that another plan reuses what it shares.
    key = {**calibration_key(work), "method": method.model_dump(exclude={"q_bits", "rank"})}
    folder = work.run.stage(f"codes-{method.name}", key).workspace()
    names = {site.name: f"{site.name}.{plan.q_bits[site.name]}bits.{plan.ranks[site.name]}" for site in sites}
    files = {name: folder / f"{label}.safetensors" for name, label in names.items()}
    done = sum(file.exists() for file in files.values())
    with work.reporter.counting("quantisation", total=len(sites), done=done) as advance:
        for site in sites:
            rank = plan.setting(site.name)
            assert isinstance(rank, QuantizedRank)
            dtype = work.loaded.stored_dtypes[f"{site.name}.weight"]
            file, facts_file = files[site.name], folder / f"{names[site.name]}.json"
            made = not file.exists()
            if made:
                weight, seen = weight_and_statistics(work, store, site)
                with naming(site):
                    quantized = method.quantize(weight.to(model.device), seen, rank, draw_for(work, site))
                _require_finite(quantized, site)
            layer = empty_quantized(model, site, plan.form, rank, dtype)
            if made:
                fill_quantized(layer, quantized)
                facts_file.write_text(json.dumps(_facts(quantized)))
                fresh = file.with_suffix(".new")
                save_file({name: values.contiguous() for name, values in _own(layer).items()}, fresh)
                fresh.replace(file)
                advance(f"quantisation: {site.name}, error {quantized.errors[quantized.kept]:.4g}")
            else:
                layer.load_state_dict(load_file(file), strict=False)
            facts = json.loads(facts_file.read_text())
            found[site.name] = {
                **facts,
                "q_bits": rank.q_bits,
                "bits": plan.site_bits(site.name),
                "storage": "quantized",
            }
            if facts["fallback"]:
                work.reporter.note(
                    f"{site.name} was never activated by the calibration text: its Hessian is zero, and the identity "
                    "stood for it"
                )
    # Through the stored dtypes, so that what is new is remembered beside them.
    work.loaded.to_stored_dtypes()
    work.loaded.to_compute_dtypes()
    return found


def _require_finite(found: Quantized, site: Site) -> None:
    """Raise when an error of any iteration is not finite."""
    if not all(math.isfinite(error) for error in found.errors):
        raise NotFiniteError(
            "The error of the quantised weight is NaN or infinite.",
            where=site.name,
            remedy="look at this layer's activations; a float32 run (--set precision=float32) may help",
        )


def _own(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """A layer's tensors by name, its bias left out."""
    return {name: values for name, values in layer.state_dict().items() if name != "bias"}


def _facts(found: Quantized) -> Mapping[str, Any]:
    return {
        "errors": list(found.errors),
        "iteration_kept": found.kept + 1,
        "error": found.errors[found.kept],
        "damping": found.damping,
        "fallback": found.fallback,
    }
