"""What a compression lost in plain words, whether that is usual, and what to try next, with what each costs.

All of it is a function of the report. What is called usual are measurements of this project, in `MEASURED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rankwise.methods import METHODS, Pruning
from rankwise.reports.escaping import printable
from rankwise.reports.outcome import Advice, Verdict
from rankwise.reports.report import Report
from rankwise.sizes import bytes_in_words


@dataclass(frozen=True)
class Measured:
    """What one model lost at one size.

    Attributes:
        coded: whether its weights are codes; else low rank.
        model: which one.
        size: fraction kept of low rank, bits a weight of codes.
        ratio: perplexity after over before, the larger of two texts where two were scored.
        file: in `benchmarks/results`, without `.md`.
    """

    coded: bool
    model: str
    size: float
    ratio: float
    file: str


MEASURED = (
    Measured(False, "SmolLM2-135M", 0.9, 1.03, "real_model"),
    Measured(False, "SmolLM2-135M", 0.8, 1.17, "real_model"),
    Measured(False, "stories260k", 0.9, 1.08, "repair-stories260k"),
    Measured(False, "stories260k", 0.8, 1.66, "repair-stories260k"),
    Measured(False, "stories260k", 0.7, 4.26, "repair-stories260k"),
    Measured(False, "wiki-llama-8m", 0.6, 1.01, "repair-wiki-llama-8m"),
    Measured(False, "wiki-llama-8m", 0.4, 1.05, "repair-wiki-llama-8m"),
    Measured(False, "wiki-llama-8m", 0.25, 1.32, "repair-wiki-llama-8m"),
    Measured(False, "wiki-llama-8m", 0.15, 1.79, "repair-wiki-llama-8m"),
    Measured(True, "SmolLM2-135M", 3, 1.28, "mixed"),
    Measured(True, "wiki-llama-8m", 4, 1.00, "mixed"),
    Measured(True, "wiki-llama-8m", 3, 1.01, "mixed"),
    Measured(True, "wiki-llama-8m", 2.5, 1.01, "mixed"),
    Measured(True, "wiki-llama-8m", 2.1, 1.02, "mixed"),
)
"""Default method, allocation and storage for low rank, the worst of `quantize`, `caldera` and `mixed` for codes."""

HARDLY, LITTLE, MUCH, MOST = 1.03, 1.2, 1.5, 3.0
"""Perplexity ratios at which what is lost changes its name.

SmolLM2 diverges from its original by 0.05 to 0.07 nats a token at a ratio of up to 1.03, by 0.23 to 0.28 at 1.17, by
0.37 to 0.49 at up to 1.44, and by more than one from 2.6 on (`benchmarks/results/real_model.md`).
"""

ENOUGH_TOKENS = 256 * 256
"""Calibration text beyond which more of it changes nothing that was measured, without a repair (`ablations.md`)."""

_WORDS = ((HARDLY, "hardly anything"), (LITTLE, "little"), (MUCH, "a good deal"), (MOST, "much"))

_WIDEST = 8.0
"""Bits of the widest number over those of the narrowest that weights are stored in."""

_BITS = 4.0
"""Codes of so many bits lost least of what was measured."""


def verdict(report: Report) -> Verdict:
    """Say what was lost, whether that is usual, and the next things to try in order.

    Args:
        report: of a compression. Perplexity of a text says what was lost; without one it is not known.
    """
    if report.evaluation is None:
        return _not_scored(report)
    dense, small = report.evaluation.dense.perplexity, report.evaluation.compressed.perplexity
    ratio = small / dense if dense else math.inf
    if not math.isfinite(ratio):
        return Verdict(lost="Everything was lost: perplexity is not finite.", next=_next(report, math.inf))
    named = next((words for limit, words in _WORDS if ratio < limit), "most of what it knew")
    low, high = usual(report.coded, _size(report))
    lost = f"Perplexity on {report.evaluation.source} is {_times(ratio)} times the original's: {named} was lost. "
    return Verdict(
        ratio=ratio,
        usual=(low, high),
        lost=lost + _usual_in_words(report, ratio, low, high),
        next=_next(report, ratio),
    )


def _not_scored(report: Report) -> Verdict:
    """What is usual at this size, where nothing says what was lost; with bits instead where that is a good deal."""
    scoring = Advice(what="--evaluation text:FILE", cost="two passes over that text; the rest is taken over")
    lost = "What was lost is not known: no text was scored."
    if not _of_a_model(report):
        return Verdict(lost=lost, next=(scoring,))
    low, high = usual(report.coded, _size(report))
    span = f"{low:.3g} times or more" if high is None else f"{_span(low, high)} times"
    lost += f" At {_size_in_words(report)} a perplexity of {span} the original's is usual."
    codes = _codes(report) if high is None or high >= MUCH else None
    return Verdict(usual=(low, high), lost=lost, next=tuple(each for each in (scoring, codes) if each is not None))


def in_lines(said: Verdict) -> list[str]:
    """A verdict as lines of text: the sentence, and one line for each thing to try."""
    lines = [printable(said.lost)]
    if said.next:
        lines.append("next, in this order:" if len(said.next) > 1 else "next:")
        lines += [f"  {n}. {printable(f'{each.what}: {each.cost}')}" for n, each in enumerate(said.next, 1)]
    return lines


def usual(coded: bool, size: float) -> tuple[float, float | None]:
    """The perplexity ratios that were measured around a size: least and most, None where there is no most.

    Each model that was measured brackets its own by the nearest sizes above and below, as more is lost of less. Below
    the least size of a model it may lose anything from there on.

    Args:
        coded: whether weights are codes.
        size: fraction kept, or bits a weight.
    """
    least, most = math.inf, 0.0
    for model in dict.fromkeys(each.model for each in MEASURED if each.coded == coded):
        rows = [each for each in MEASURED if each.coded == coded and each.model == model]
        # What is got falls short of what is asked by a little.
        above = [each.ratio for each in rows if each.size > size + 0.005]
        same = [each.ratio for each in rows if abs(each.size - size) <= 0.005]
        below = [each.ratio for each in rows if each.size < size - 0.005]
        least = min([least, *(same or [max(above, default=1.0)])])
        most = max([most, *(same or [min(below, default=math.inf)])])
    return least, most if math.isfinite(most) else None


def _times(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < HARDLY else f"{ratio:.3g}"


def _size(report: Report) -> float:
    return report.bits.got if report.coded and report.bits is not None else report.keep.got


def _size_in_words(report: Report) -> str:
    return f"{_size(report):.3g} bits a weight" if report.coded else f"{_size(report):.3g} of the weights"


def _usual_in_words(report: Report, ratio: float, low: float, high: float | None) -> str:
    size = _size_in_words(report)
    if high is None:
        worst = max((each for each in MEASURED if each.coded == report.coded), key=lambda each: each.ratio)
        reached = f"{worst.ratio:.3g} at {worst.size:g}"
        if ratio < low:
            return f"That is less than usual at {size} (from {low:.3g} on)."
        return (
            f"That is usual at {size}: models with weights to spare lose from {low:.3g} on, others more than was "
            f"measured ({worst.model}: {reached})."
        )
    span = _span(low, high)
    if ratio > high:
        return f"That is more than usual at {size} ({span})."
    return f"That is {'usual' if ratio >= low else 'less than usual'} at {size} ({span})."


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _next(report: Report, ratio: float) -> tuple[Advice, ...]:
    if ratio < HARDLY:
        return _smaller(report)
    # What the next size is, and what it costs, follows from a size that a model can have.
    larger, codes = (_larger(report), _codes(report)) if _of_a_model(report) else (None, None)
    steps = (_text(report), _storage(report), _method(report), larger, _repair(report), codes)
    return tuple(each for each in steps if each is not None)


def _of_a_model(report: Report) -> bool:
    """Whether the sizes in a report, which a file may hold otherwise, are some that a model can have."""
    return 0 < report.keep.got <= _WIDEST and (
        report.bits is None or 0 < report.bits.got <= _WIDEST * report.bits.before
    )


def _text(report: Report) -> Advice | None:
    used = max(1, report.calibration.sequences * report.calibration.length)
    what = f"more calibration text than the {used:,} tokens used"
    factor = max(2, math.ceil(ENOUGH_TOKENS / used))
    cost = f"statistics take {factor} times as long"
    if report.calibration.source.startswith("bundled"):
        return Advice(
            what="--calibration text:FILE with text of the kind the model is for, where documentation of Python was "
            f"used ({used:,} tokens)",
            cost="statistics are taken again",
        )
    if used >= ENOUGH_TOKENS:
        return None
    sequences = factor * report.calibration.sequences
    if report.calibration.available < sequences:
        return Advice(what=f"{what}, in a file that holds it", cost=cost)
    if report.calibration.gradient_sequences is None:
        return Advice(what=f"{what}: --sequences {sequences}", cost=cost)
    few = f"{what}: --sequences {sequences} --gradient-sequences {report.calibration.gradient_sequences}"
    return Advice(what=few, cost=f"statistics of inputs take {factor} times as long")


def _storage(report: Report) -> Advice | None:
    if report.coded or report.storage != "two_factor":
        return None
    return Advice(what="--storage auto (pivot rows where they are smaller)", cost="no time or size worth naming")


def _method(report: Report) -> Advice | None:
    method, allocation = report.recipe.method.name, report.recipe.allocation.name
    if report.coded or (method in ("two_sided", "pruned") and allocation != "uniform"):
        return None
    return Advice(
        what="--method two_sided --allocation spectral", cost="statistics need a backward pass over the text as well"
    )


def _larger(report: Report) -> Advice | None:
    """Less compression, with the bytes that it costs."""
    whole = report.before.linear_bytes
    if report.coded and report.bits is not None:
        more = math.floor(report.bits.got) + 1
        if more > 8:
            return None
        rise = (more - report.bits.got) / report.bits.before
        return Advice(what=f"a smaller step: --bits {more}", cost=f"{bytes_in_words(rise * whole)} more")
    keep = round((1 + report.keep.got) / 2, 2)
    if keep >= 0.96:
        return None
    return Advice(
        what=f"a smaller step: --keep {keep:g}", cost=f"{bytes_in_words((keep - report.keep.got) * whole)} more"
    )


def _repair(report: Report) -> Advice | None:
    measured = "for 8.4 million parameters and 65,536 tokens, and in proportion"
    if report.coded:
        if not any(site.q_bits and site.rank for site in report.sites.values()):
            return None
        return Advice(what="rankwise finetune DIR --method lowrank --data text:FILE", cost="minutes to hours")
    kind = METHODS.get(report.recipe.method.name)
    done = {step.step for step in report.repair}
    if kind is not None and kind.prunes and not kind.keeps_factors:
        # Of weights that are whole, what lost units can be trained by adapters.
        if not issubclass(kind, Pruning) or "lora" in done:
            return None
        return Advice(what="rankwise finetune DIR --method lora --data text:FILE", cost="minutes to hours")
    if done & {"blocks", "factors"}:
        return None
    if "refit" in done:
        return Advice(what="--repair refit,blocks", cost=f"5 minutes on one core {measured}")
    return Advice(what="--repair refit, then --repair blocks", cost=f"2 and 5 minutes on one core {measured}")


def _codes(report: Report) -> Advice | None:
    """Bits instead of rank, at no more than the size that rank takes."""
    if report.coded or report.recipe.format == "dense":
        return None
    number = 8 * report.before.linear_bytes / max(1, report.before.linear_parameters)
    kept = report.keep.got * number
    if kept < 2:
        return None
    bits = math.floor(10 * min(_BITS, kept)) / 10
    saved = report.after.linear_bytes - report.before.linear_bytes * bits / number
    size = f"{bytes_in_words(saved)} less" if saved >= 0.01 * report.after.linear_bytes else "the same size"
    return Advice(
        what=f"bits instead of rank: --method quantize --bits {bits:g}",
        cost=f"{size}, minutes to make, and slower on a CPU unless decoded once",
    )


def _smaller(report: Report) -> tuple[Advice, ...]:
    """Where hardly anything was lost, what is smaller still."""
    cost = "plan, fits and checkpoint anew; statistics are taken over"
    if report.coded and report.bits is not None:
        fewer = math.ceil(report.bits.got) - 1
        return (Advice(what=f"smaller: --bits {fewer}", cost=cost),) if fewer >= 2 else ()
    keep = round(report.keep.got - 0.1, 1)
    return (Advice(what=f"smaller: --keep {keep:g}", cost=cost),) if keep >= 0.1 else ()
