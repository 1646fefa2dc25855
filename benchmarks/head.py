"""A head of two factors, fitted four ways, in front of a decoder that stays as it is.

    python benchmarks/head.py

Needs the shared models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common import markdown_table, shared_directory, write_result
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.evaluation import perplexity
from rankwise.factors import Factors
from rankwise.layers import code_vocabulary, decode_vocabulary, substitute, vocabulary_parts
from rankwise.layers.factored_head import head_rank
from rankwise.stages.head import ROW_DAMPING, fit_head, head_site
from rankwise.statistics.head_moments import HeadMoments, head_moments

LENGTH, CALIBRATION, SCORED, BATCH = 256, 256, 128, 8
FRACTIONS = (0.8, 0.6, 0.4)
TEXTS = ("wikitext2.test", "mix.heldout")


def ways(weight: Tensor, seen: HeadMoments, rank: int) -> dict[str, Factors]:
    """Factors of a head by what they are fitted by."""
    alike = torch.eye(len(seen.inputs)).double()
    equal = torch.ones_like(seen.rows)
    fits = {
        "the matrix alone (SVD)": fit_head(weight, HeadMoments(alike, equal), rank),
        "inputs": fit_head(weight, HeadMoments(seen.inputs, equal), rank),
        "inputs, and rows undamped": fit_head(weight, seen, rank, row_damping=0.0),
        f"inputs, and rows damped by {ROW_DAMPING:g} (as it is)": fit_head(weight, seen, rank),
    }
    return {name: factors for name, (factors, _) in fits.items()}


def main() -> None:
    shared = shared_directory()
    loaded = load_model(str(shared / "models/wiki-llama-8m"))
    model = loaded.model

    def read(text: str, count: int, seed: int | None) -> Tensor:
        source = parse_source(f"text:{shared}/data/{text}.txt")
        return load_sequences(source, loaded.tokenizer, loaded.vocabulary, length=LENGTH, count=count, seed=seed).ids

    scored = {text: read(text, SCORED, None) for text in TEXTS}

    def score() -> list[float]:
        return [perplexity(model, ids, batch_size=BATCH).perplexity for ids in scored.values()]

    site = head_site(model)
    weight, plain = site.weight(model), site.module(model)
    whole = score()
    figures: list[dict[str, Any]] = [{"fraction": 1.0, "way": "whole", **dict(zip(TEXTS, whole, strict=True))}]
    rows = [["1", site.n, "", *(f"{each:.2f}" for each in whole)]]
    replaced = code_vocabulary(model, vocabulary_parts(model, False, True))
    coded = score()
    decode_vocabulary(model, replaced)
    figures.append({"fraction": None, "way": "8bit", **dict(zip(TEXTS, coded, strict=True))})
    rows.append(["8bit", site.n, "", *(f"{each:.2f}" for each in coded)])
    seen = head_moments(model, read("mix.calibration", CALIBRATION, 0), BATCH)
    for fraction in FRACTIONS:
        rank = head_rank((site.m, site.n), fraction, 8)
        for way, factors in ways(weight, seen, rank).items():
            substitute(model, site.name, factors, "two_factor", torch.float32)
            found = score()
            model.set_submodule(site.name, plain)
            rows.append([f"{fraction:g}", rank, way, *(f"{each:.2f}" for each in found)])
            record = {"fraction": fraction, "rank": rank, "way": way, **dict(zip(TEXTS, found, strict=True))}
            figures.append(record)
            print(record, flush=True)
    body = (
        f"wiki-llama-8m, head {site.m} x {site.n} and not tied, everything else dense, float32; fitted on "
        f"{CALIBRATION} sequences of {LENGTH} tokens of mix.calibration. Perplexity on the first {SCORED} sequences "
        f"of {LENGTH} tokens of each text.\n\n" + markdown_table(["fraction kept", "rank", "fitted by", *TEXTS], rows)
    )
    write_result("head", "A head of two factors", "python benchmarks/head.py", body, figures)


if __name__ == "__main__":
    main()
