"""The report: one JSON object with everything that was done and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rankwise.evaluation import Cost, Perplexity
from rankwise.sizes import Cut, Plan


def build_report(
    *,
    recipe: Mapping[str, Any],
    fingerprint: str,
    plan: Plan,
    search: Mapping[str, Any] | None,
    repair: Sequence[Mapping[str, Any]],
    roles: Mapping[str, tuple[int, str]],
    losses: Mapping[str, Mapping[str, Any]],
    costs: tuple[Cost, Cost],
    scores: tuple[Perplexity | None, Perplexity | None],
    calibration: Mapping[str, Any],
    machine: Mapping[str, str],
    notes: Sequence[str],
    stages: Mapping[str, Any],
    run_directory: str,
) -> dict[str, Any]:
    """Put a report together.

    Args:
        recipe: the recipe as plain values.
        fingerprint: hash of the dense model's weights.
        plan: cut of every site.
        search: how its ranks were searched for, or None.
        repair: what each step of the repair did.
        roles: site name -> (block, role).
        losses: site name -> what dropping components cost, and how the site is stored.
        costs: sizes before and after.
        scores: perplexities before and after, or None.
        calibration: what the statistics were taken on.
        machine: where the run took place.
        notes: what the user was told.
        stages: seconds and peak memory by stage.
        run_directory: where finished stages are.

    Returns:
        An object that JSON can hold. Bytes are of parameters in the dtypes stored.
    """
    before, after = costs
    sites = {
        name: {
            "block": roles[name][0],
            "role": roles[name][1],
            "shape": list(shape),
            **cut_facts(plan.cuts[name]),
            **losses.get(name, {}),
        }
        for name, shape in plan.shapes.items()
    }
    evaluation = None
    if scores[0] is not None and scores[1] is not None:
        evaluation = {
            "source": recipe["evaluation"]["source"],
            "dense": asdict(scores[0]),
            "compressed": asdict(scores[1]),
        }
    return {
        "format": "rankwise-report/1",
        "recipe": dict(recipe),
        "model_fingerprint": fingerprint,
        "architecture": plan.architecture,
        "keep": {"asked": plan.keep, "got": plan.kept},
        "bits": bits_of(plan, before),
        "storage": plan.form.storage,
        "size": plan.size,
        "coded": plan.coded,
        "counted": "weights of the decoder's linear layers; embeddings, head, norms and biases are not counted",
        "before": asdict(before),
        "after": asdict(after),
        "biases_added": after.linear_biases - before.linear_biases,
        "evaluation": evaluation,
        "calibration": dict(calibration),
        "search": None if search is None else dict(search),
        "repair": [dict(step) for step in repair],
        "groups": plan.groups,
        "sites": sites,
        "stages": dict(stages),
        "machine": dict(machine),
        "notes": list(notes),
        "run_directory": run_directory,
    }


def bits_of(plan: Plan, before: Cost) -> dict[str, Any] | None:
    """Bits a weight: asked for, got, and of the original; None for a plan that keeps a fraction in numbers."""
    if not plan.coded and plan.keep is not None:
        return None
    return {"asked": plan.bits, "got": plan.bits_a_weight, "before": 8 * before.linear_bytes / plan.weights}


def cut_facts(cut: Cut) -> dict[str, Any]:
    """What a report says of a site's cut: its rank, None for dense, and bits where it is coded."""
    facts: dict[str, Any] = {"rank": cut.rank}
    if cut.coded:
        facts |= {"q_bits": cut.q_bits, "lr_bits": cut.lr_bits}
    return facts
