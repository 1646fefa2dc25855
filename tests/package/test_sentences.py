"""What README and docs say of measurements in running text is what `benchmarks/results` say, rounded."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import pytest

from conftest import ROOT, figures, results

README = "README.md"
RESULTS = "docs/results.md"
ALLOCATION, FEW, REPAIR, STORAGE, TWO_SIDED = (
    f"docs/{name}.md" for name in ("allocation", "quantisation", "repair", "storage", "methods/two_sided")
)
TEXTS = ("wikitext2.test", "mix.heldout")
WIKITEXT, MIX = (f"perplexity/{text}" for text in TEXTS)
STORIES = "perplexity/sampled stories"


def one(name: str, figure: str, part: str = "", **has: Any) -> float:
    return mean(figures(name, figure, part, **has))


def step(label: str) -> list[float]:
    """A row of CALDERA step by step: perplexity on both texts."""
    return [one("caldera", figure, label=label) for figure in (WIKITEXT, MIX)]


def study(label: str, size: float) -> list[float]:
    """A cell of the study at equal bytes, likewise."""
    return [one("caldera-study", figure, label=label, size=size) for figure in (WIKITEXT, MIX)]


def less(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def allocated(model: str, row: str, keep: float, figure: str) -> float:
    return one(f"allocation-{model}", figure, "runs", row=row, keep=keep)


def repaired(row: str, keep: float, figure: str = WIKITEXT, model: str = "wiki-llama-8m") -> float:
    return one(f"repair-{model}", figure, "runs", row=row, keep=keep)


def of_dense_models() -> Iterator[tuple[str, str]]:
    wiki = [results("repair-wiki-llama-8m")["dense"][text] for text in TEXTS]
    yield (
        RESULTS,
        "The dense model has {:.1f} on wikitext2.test, which it was not trained on, and {:.1f} on".format(*wiki),
    )
    yield RESULTS, "the dense model has {:.1f} on wikitext2.test and {:.1f} on mix.heldout".format(*wiki)
    yield REPAIR, "It had {:.2f} and {:.2f} before".format(*wiki)
    yield REPAIR, f"perplexity {results('repair-stories260k')['dense']['sampled stories']:.2f} before"
    for page in (RESULTS, FEW):
        yield page, "dense {:.1f} on wikitext2.test and {:.1f} on mix.heldout".format(*step("dense"))


def of_rounding_on_a_gpu() -> Iterator[tuple[str, str]]:
    rows = results("ldlq-gpu")
    tried, usual = (
        {bits: seconds for name, bits, seconds in rows[part] if name == "e8p, two sides"}
        for part in ("all patterns", "as on a CPU")
    )
    ratios = [usual[bits] / tried[bits] for bits in tried]
    page = "docs/methods/quantize.md"
    yield page, "in {:.2f} seconds at 2 bits, {:.2f} at 3 and {:.2f} at 4 on an H100".format(*tried.values())
    yield page, f"it takes {min(ratios):.1f} to {max(ratios):.1f}"


def of_the_original_trained() -> Iterator[tuple[str, str]]:
    trained, dense = (
        [one("compare", figure, way=way) for figure in (WIKITEXT, MIX)] for way in ("dense+lora", "dense")
    )
    yield README, "(LoRA, on 256 of those sequences) the original itself has {:.1f} and {:.1f}".format(*trained)
    yield "docs/choosing.md", f"the original itself is at {trained[0] / dense[0]:.2f})"


def of_turns() -> Iterator[tuple[str, str]]:
    def cells(method: str) -> tuple[list[float], float]:
        """What 15 turns take off the divergence of one, and how many times as long they take."""
        found = {(f["bits"], f["outer"]): f for f in results("turns") if f["method"] == method}
        bits = sorted({each for each, _ in found})
        saved = [1 - found[b, 15]["kl"][text] / found[b, 1]["kl"][text] for b in bits for text in TEXTS]
        # Of the first size one run measures, and the others do not.
        return saved, max(found[b, 15]["seconds"] / found[b, 1]["seconds"] for b in bits[1:])

    saved, times = cells("mixed")
    page = "docs/methods/mixed.md"
    yield page, f"15 turns diverge at most {100 * max(saved):.0f}% less than one"
    yield page, f"takes up to {times:.0f} times as long"
    saved, times = cells("caldera")
    page = "docs/methods/caldera.md"
    yield page, f"15 turns diverge {100 * min(saved):.0f} to {100 * max(saved):.0f}% less than one"
    yield page, f"takes up to {times:.0f} times as long"


def of_allocations() -> Iterator[tuple[str, str]]:
    plain, searched = "two_sided, spectral", "two_sided, bayesian:spectral"

    def won(model: str, keep: float, figure: str) -> str:
        return " to ".join(f"{allocated(model, row, keep, figure):.0f}" for row in (plain, searched))

    wiki, stories = "wiki-llama-8m", "stories260k"
    rise = allocated(wiki, searched, 0.25, MIX) - allocated(wiki, plain, 0.25, MIX)
    fall = allocated(wiki, plain, 0.25, WIKITEXT) - allocated(wiki, searched, 0.25, WIKITEXT)
    assert f"{rise:.0f}" == "1"
    yield RESULTS, f"at 0.25 it wins {fall:.0f} points on text of that kind and loses one on the other"
    yield ALLOCATION, f"{won(wiki, 0.25, WIKITEXT)} at keep 0.25 on wikitext2.test"
    yield ALLOCATION, f"{won(stories, 0.8, STORIES)} and {won(stories, 0.7, STORIES)} on stories260k at 0.8 and 0.7"
    yield ALLOCATION, f"loses {100 * rise / allocated(wiki, plain, 0.25, MIX):.0f}% on mix.heldout at keep 0.25"
    rows = ("bolaco, bayesian:5x1", "bolaco, uniform", "bolaco, bayesian:5x4")
    (a, b, c), (d, e, f) = ([allocated(wiki, row, 0.4, figure) for row in rows] for figure in (WIKITEXT, MIX))
    yield ALLOCATION, f"({a:.1f} against {b:.1f}, {d:.1f} against {e:.1f})"
    yield ALLOCATION, f"({c:.1f} and {f:.1f})"
    *others, worst = sorted(figures("ablations", STORIES, table="objective"))
    yield ALLOCATION, f"every search ends between {others[0]:.2f} and {others[-1]:.2f}"
    yield ALLOCATION, f"which ends at {worst:.2f}"
    damped, hardly = (
        [allocated(stories, row, keep, STORIES) for keep in (0.9, 0.7)]
        for row in (plain, "two_sided (damping 0.1), spectral")
    )
    yield TWO_SIDED, f"is {damped[0]:.2f} with 1 and {hardly[0]:.2f} with 0.1 at keep 0.9"
    yield TWO_SIDED, f"and {damped[1]:.0f} and {hardly[1]:.0f} at 0.7"


def of_quantisation() -> Iterator[tuple[str, str]]:
    first = [step(f"2 bits, {how}")[0] for how in ("to the nearest, uniform", "LDLQ, uniform", "LDLQ, Hadamard, E8P")]
    yield FEW, "to the nearest give {:.1f}, with feedback {:.1f}, rotated with E8P {:.1f}".format(*first)
    ranks = [step(f"2 bits, rank {rank} at 4 bits")[0] for rank in (8, 16, 32, 64)]
    yield FEW, "at 4 bits beside it {:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*ranks)
    coarse = [
        difference
        for rank in (4, 8, 16, 32, 64)
        for difference in less(*(step(f"2 bits, rank {rank} at {bits} bits") for bits in (4, 16)))
    ]
    yield FEW, f"between {-min(coarse):.2f} better and {max(coarse):.2f} worse than 16-bit ones"
    assert max(map(abs, less(step("4 bits, LDLQ, Hadamard, E8P"), step("4 bits, LDLQ, uniform")))) < 0.03
    yield FEW, "At 4 bits E8P and evenly spaced levels with feedback are within 0.03"
    for rank in (16, 32):
        row = f"2 bits, rank {rank} at 16 bits"
        assert max(map(abs, less(step(f"{row}, downdate"), step(row)))) < 0.2
    yield FEW, "`downdate` with 16-bit factors changes perplexity by less than 0.2 in either direction"
    trained = "2 bits, rank 16 at 4 bits, fine-tuned: kl, stored at 16 bits"
    four = [*step("2 bits, rank 16 at 4 bits"), *step(trained)]
    yield FEW, "from {:.2f} and {:.2f} to {:.2f} and {:.2f}".format(*four)
    full = step("2 bits, rank 16 at 16 bits")
    yield (
        FEW,
        "({:.2f} bits a weight, where L R left at 16 bits from the start has {:.2f} and {:.2f})".format(
            one("caldera", "bits", label=trained), *full
        ),
    )


def of_equal_bytes() -> Iterator[tuple[str, str]]:
    sizes = (2.1, 2.5, 3.0, 4.0)
    low = [study("low rank, 16 bits", size)[0] for size in sizes[:3]]
    yield FEW, "{:.0f}, {:.0f} and {:.0f} on wikitext2.test at 2.1, 2.5 and 3 bits".format(*low)
    behind = [d for s in sizes for d in less(study("low rank, 4 bits", s), study("Q alone, uniform", s))]
    yield FEW, f"it is {min(behind):.1f} to {max(behind):.1f} behind Q alone"
    # What the same bits everywhere lose against bits by estimated loss.
    alone, both = (
        {size: less(study(f"{what}, uniform", size), study(f"{what}, spectral", size)) for size in sizes}
        for what in ("Q alone", "Q + L R")
    )
    between = alone.pop(2.5) + both.pop(2.5)
    yield FEW, f"(2.5), bits spread by estimated loss win {min(between):.1f} to {max(between):.1f}"
    assert max(abs(d) for each in alone.values() for d in each) < 0.1
    yield FEW, "For Q alone the same bits everywhere are within 0.1 at 2.1, 3 and 4"
    worst = [max(each) for each in both.values()]
    yield FEW, "for Q + L R they are up to {:.2f} behind at 2.1, {:.2f} at 3 and {:.2f} at 4".format(*worst)
    spread = [less(study("Q + L R, spectral", size), study("Q alone, spectral", size)) for size in sizes]
    assert max(abs(d) for each in spread for d in each) < 0.1
    yield FEW, "both spread by estimated loss, are within 0.1 of each other at every size"
    same = [less(study("Q + L R, uniform", size), study("Q alone, uniform", size)) for size in sizes]
    yield FEW, f"everywhere Q + L R is behind, by up to {max(d for each in same for d in each):.1f}"


def gains_of_mixed(model: str) -> tuple[list[float], list[float]]:
    """What `mixed` takes off the divergence of the better of the other two, its share of Q + L R at each size; LDLQ."""
    cells = results("mixed")[model]
    gains, paired = [], []
    for size in (2.1, 2.5, 3.0, 4.0):
        of_size = {each["row"]: each for each in cells if each.get("asked") == size}
        for text in TEXTS:
            least = min(of_size[row]["kl"][text] for row in ("Q alone, LDLQ", "Q + L R"))
            gains.append(1 - of_size["mixed, LDLQ"]["kl"][text] / least)
        shares = of_size["mixed, LDLQ"]["chosen"]
        paired.append(sum(share for kind, share in shares.items() if "bits + L R at 4" in kind))
    return gains, paired


def of_mixed() -> Iterator[tuple[str, str]]:
    real, _ = gains_of_mixed("smollm2-135m")
    yield (
        FEW,
        f"Its divergence is {100 * min(real):.0f} to {100 * max(real):.0f}% below that of the better of the other two.",
    )
    gains, paired = gains_of_mixed("wiki-llama-8m")
    span = f"{100 * min(gains):.0f} to {100 * max(gains):.0f}% off"
    yield RESULTS, f"takes {span} what the better of the two diverges"
    yield FEW, f"takes {span} the divergence of the better of the two"
    assert min(paired) >= 0.5


def of_two_sides() -> Iterator[tuple[str, str]]:
    for model in ("smollm2-135m", "wiki-llama-8m"):
        cells = {(each["row"], each.get("asked")): each["kl"] for each in results("mixed")[model] if "kl" in each}
        pairs = [(of, cells["Q alone, LDLQ", size]) for (row, size), of in cells.items() if row == "Q alone"]
        off = [1 - two[text] / one_sided[text] for two, one_sided in pairs for text in TEXTS]
        assert len(off) == 8
        begins = "Two-sided rounding" if model == "smollm2-135m" else "two-sided rounding"
        span = f"takes {100 * min(off):.0f} to {100 * max(off):.0f}% off"
        yield FEW, f"{begins} {span}"
        if model == "smollm2-135m":
            sizes = {size for row, size in cells if row == "mixed"}
            below = {
                size: [1 - cells["mixed", size][text] / cells["Q alone", size][text] for text in TEXTS]
                for size in sizes
            }
            assert max(abs(each) for each in below.pop(3.0)) < 0.015
            found = [each for of_size in below.values() for each in of_size]
            span = f"diverges {100 * min(found):.0f} to {100 * max(found):.0f}% less"
            yield FEW, f"{span} than Q alone at 2.1, 2.5 and 4 bits and as much at 3"
            yield "docs/choosing.md", f"{span} at 2.1, 2.5 and 4 bits and as much at 3"
        if model == "wiki-llama-8m":
            yield RESULTS, f"{span} what Q alone diverges"
            mixed = [(of, cells["Q alone", size]) for (row, size), of in cells.items() if row == "mixed"]
            below = [1 - of[text] / alone[text] for of, alone in mixed for text in TEXTS]
            assert len(below) == 8
            for page in (FEW, RESULTS):
                yield page, f"is then {100 * min(below):.0f} to {100 * max(below):.0f}% below Q alone"


def of_a_head_of_two_factors() -> Iterator[tuple[str, str]]:
    def head(way: str, fraction: float | None) -> list[float]:
        return [one("head", text, way=way, fraction=fraction) for text in TEXTS]

    undamped, damped = "inputs, and rows undamped", "inputs, and rows damped by 1 (as it is)"
    yield STORAGE, "{:.2f} and {:.2f} with the whole head".format(*head("whole", 1.0))
    yield STORAGE, "In 8 bits the same head gives {:.2f} and {:.2f}".format(*head("8bit", None))
    worse = {fraction: less(head(undamped, fraction), head(damped, fraction)) for fraction in (0.8, 0.6, 0.4)}
    assert max(abs(each) for fraction in (0.8, 0.6) for each in worse[fraction]) < 0.05
    yield STORAGE, "worse by {:.2f} and {:.2f} at 0.4".format(*worse[0.4])


def of_storage_and_repair() -> Iterator[tuple[str, str]]:
    plain, pivoted = "two-factor, spectral", "pivoted, spectral"
    pairs = [[repaired(row, keep) for row in (plain, pivoted)] for keep in (0.6, 0.4, 0.25, 0.15)]
    yield STORAGE, "{}, {}, {} and {} at keep".format(*(f"{two:.1f} to {pivots:.1f}" for two, pivots in pairs))
    entries = [
        run["largest_pivot_entry"] or 0
        for m in ("wiki-llama-8m", "stories260k")
        for run in results(f"repair-{m}")["runs"]
    ]
    assert max(entries) < 2
    yield STORAGE, "The largest entry of any map stays below 2"
    small, dense = "stories260k", results("repair-stories260k")["dense"]["sampled stories"]
    lost = repaired(pivoted, 0.8, STORIES, small) - dense
    back = [1 - (repaired(f"{pivoted}, {how}", 0.8, STORIES, small) - dense) / lost for how in ("subspace", "factors")]
    yield REPAIR, "they take back {:.0%} of what was lost, where training all factors takes back {:.0%}".format(*back)
    original = results("repair-wiki-llama-8m")["dense"]["wikitext2.test"]
    less_text, more_text = (
        repaired(f"{which}{pivoted}, blocks, factors", 0.4) / original - 1 for which in ("", "1024 sequences: ")
    )
    yield REPAIR, f"256 sequences ends {less_text:.1%} above the original"
    yield REPAIR, f"1,024 sequences and fewer passes over them {more_text:.1%} above it"
    minutes: dict[str, list[float]] = {"blocks": [], "factors": []}
    for run in results("repair-wiki-llama-8m")["runs"]:
        if run["row"] == f"1024 sequences: {pivoted}, blocks, factors":
            for each in run["repair"]:
                minutes[each["step"]].append(each["seconds"] / 60)
    (a, b), (c, d) = ((min(found), max(found)) for found in minutes.values())
    yield RESULTS, f"`blocks` takes {a:.0f} to {b:.0f} minutes on one core here, `factors` another {c:.0f} to {d:.0f}"


def of_speed() -> Iterator[tuple[str, str]]:
    def ratio(variant: str, keep: float, mode: str) -> float:
        return one("speed-cpu", "ratio", "models", variant=variant, keep=keep, mode=mode)

    modes, ways = ("prefill 1 x 512", "decode, batch 1"), ("two factors", "pivoted")
    half, most = ([[ratio(way, keep, mode) for way in ways] for mode in modes] for keep in (0.5, 0.8))
    assert f"{half[0][0]:.2f}" == f"{half[0][1]:.2f}"
    yield (
        README,
        "takes {:.2f} of the dense block's time for 512 tokens and {:.2f} (two factors) or {:.2f}".format(
            half[0][0], *half[1]
        ),
    )
    yield README, "at 0.8, {:.2f} or {:.2f} and {:.2f} or {:.2f}".format(*most[0], *most[1])
    cells = [(keep, mode) for keep in (0.8, 0.5) for mode in (*modes, "prefill 8 x 512", "decode, batch 8")]
    more = max(ratio("pivoted", *cell) / ratio("two factors", *cell) - 1 for cell in cells)
    saved = max(1 - ratio("pivoted, ranks of two factors", *cell) / ratio("two factors", *cell) for cell in cells)
    yield STORAGE, f"take up to {more:.0%} more time than two factors; at equal rank they save up to {saved:.0%}"

    def on_gpu(figure: str, variant: str, mode: str) -> float:
        return one("speed-gpu", figure, "models", variant=variant, keep=0.8, mode=mode)

    slow = [on_gpu("ratio", way, "decode, batch 1") for way in ways]
    yield README, "{:.2f} times (two factors, keep 0.8) or {:.2f} times".format(*slow)
    many_at_once = [on_gpu("ratio", way, "prefill 8 x 512") for way in ways]
    yield README, "8 x 512 tokens at once take {:.2f} and {:.2f} of its time".format(*many_at_once)
    token = median(1000 * on_gpu("seconds", way, "decode, batch 1") / r for way, r in zip(ways, slow, strict=True))
    yield STORAGE, f"the dense model's token takes {token:.0f} ms"
    parts = {record["tokens"]: record["milliseconds"] for record in results("speed-cpu")["parts"]}
    many, some = parts[4096], parts[512]
    joined, order = many["products and joining"], many["order by gather"]
    yield STORAGE, f"of the {joined + order:.0f} ms of a layer"
    yield STORAGE, f"joining takes {joined - many['the two products']:.0f} and reordering {order:.0f}"
    gains = [each["order by indexing"] / each["order by gather"] for each in parts.values()]
    yield STORAGE, f"`gather` is {min(gains):.1f} to {max(gains):.1f} times faster"
    yield (
        STORAGE,
        "({:.0f} ms there, {:.1f} against {:.1f} at 512 tokens)".format(
            many["order by indexing"], some["order by indexing"], some["order by gather"]
        ),
    )
    yield STORAGE, "({:.0f} ms against {:.0f};".format(many["three first factors as one"], many["three first factors"])


def of_cost() -> Iterator[tuple[str, str]]:
    ratios = [one("search", "ratio", "trials", form="top_k", keep=keep) for keep in (0.8, 0.6, 0.4)]
    yield README, "A trial of a search takes {:.2f}, {:.2f} and {:.2f} times the bare forward pass".format(*ratios)
    yield README, f"{one('search', 'ratio', 'trials', form='copy and rebuild'):.2f} at 0.8)"
    seconds = [mean(each["seconds"]) for each in results("search")["optimiser"]]
    yield README, f"{min(seconds):.2f} to {max(seconds):.2f} s at 5 to 20 dimensions"
    eight, every = (one("search", "seconds", "spectral", rank_multiple=multiple) for multiple in (8, 1))
    yield README, f"{eight:.2f} s, or {every:.1f} s with a rank multiple of 1"
    ours, theirs = (results("calibration")[w]["ratios"] for w in ("ours, method bolaco", "torch.cov of every output"))
    yield README, f"takes {median(ours):.2f} times the bare forward pass (median of {len(ours)} rounds"
    yield README, f"{min(ours):.2f} to {max(ours):.2f}); calling `torch.cov`"
    yield README, f"as research code does, {median(theirs):.2f} times"
    rises = [(each["peak"] - each["before"]) / 1e6 for each in results("memory") if each["method"] == "two_sided"]
    yield README, "peaks of {:.0f}, {:.0f}, {:.0f} MB".format(*rises)
    shapes = ("4096 x 4096", "11008 x 4096", "4096 x 11008")
    a, b = ([one("decomposition", "seconds", method=m, shape=s) for s in shapes] for m in ("bolaco", "two_sided"))
    yield README, "{} s (4096 x 4096), {} s (11008 x 4096) and {} s (4096 x 11008) with `bolaco`".format(*a)
    yield README, "with `bolaco`, and {}, {} and {} s with `two_sided`".format(*b)


@pytest.mark.parametrize(
    "said",
    [
        of_dense_models,
        of_allocations,
        of_quantisation,
        of_equal_bytes,
        of_mixed,
        of_two_sides,
        of_rounding_on_a_gpu,
        of_the_original_trained,
        of_turns,
        of_a_head_of_two_factors,
        of_storage_and_repair,
        of_speed,
        of_cost,
    ],
)
def test_running_text_says_what_was_measured(said: Any) -> None:
    missing = [(page, text) for page, text in said() if text not in " ".join((ROOT / page).read_text().split())]
    assert not missing
