"""What each line of `compress` does, in the same order. Every stage is keyed by all that its result depends on."""

from rankwise.stages.bases import collect_statistics, decompose_sites, draw_for, load_basis, weight_and_statistics
from rankwise.stages.factors import put_factors, store, store_factors
from rankwise.stages.finish import score, write
from rankwise.stages.quantize import quantize_sites
from rankwise.stages.ranks import Chosen, check_budget, choose_ranks, judging, objective_key, select_samples
from rankwise.stages.repair import Repairing, judge, prepare_repair, repair
from rankwise.stages.work import Texts, Work, begin, device_of, read_sequences, read_texts

__all__ = [
    "Chosen",
    "Repairing",
    "Texts",
    "Work",
    "begin",
    "check_budget",
    "choose_ranks",
    "collect_statistics",
    "decompose_sites",
    "device_of",
    "draw_for",
    "judge",
    "judging",
    "load_basis",
    "objective_key",
    "prepare_repair",
    "put_factors",
    "quantize_sites",
    "read_sequences",
    "read_texts",
    "repair",
    "score",
    "select_samples",
    "store",
    "store_factors",
    "weight_and_statistics",
    "write",
]
