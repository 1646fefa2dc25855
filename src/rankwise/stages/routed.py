"""What a run says of experts."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics import Store

_NAMED = 6


def note_experts(sites: Sequence[Site], store: Store, reporter: Reporter) -> None:
    """Say which experts saw too little of the calibration text to be known by it alone.

    Args:
        sites: all sites.
        store: what was measured there.
        reporter: told so.
    """
    seen: dict[str, int] = {}
    short: set[str] = set()
    for site in sites:
        reach = store.reach(site)
        if reach is not None:
            where, _, rest = site.pool.partition("*")
            expert = site.name[: len(site.name) - len(rest)]
            if not rest:
                # Of grouped layers, each of which holds one projection of all experts.
                expert = f"{where.rstrip('.').rpartition('.')[0]}, expert {expert.removeprefix(where)}"
            seen[expert] = reach.vectors
            if reach.vectors < reach.enough:
                short.add(expert)
    if not short:
        return
    worst = sorted((expert for expert in seen if expert in short), key=lambda expert: seen[expert])
    listed = [f"{expert} {seen[expert]}" for expert in worst[:_NAMED]] + ["..."] * (len(worst) > _NAMED)
    unused = sum(not seen[expert] for expert in short)
    reporter.note(
        f"{len(short)} of {len(seen)} experts saw fewer calibration tokens than a weight of theirs has inputs, "
        f"{unused} of them none; what was measured there is mixed with what all experts of their layer saw "
        f"(tokens: {', '.join(listed)})"
    )
