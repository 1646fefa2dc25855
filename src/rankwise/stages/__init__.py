"""What each line of the flows does, in the same order. Every stage is keyed by all that its result depends on."""

from rankwise.stages.at_site import draw_for, weight_and_statistics
from rankwise.stages.comparing import Cell, Protocol, Rows, cells_of, measure_dense, write_comparison
from rankwise.stages.crews import hire
from rankwise.stages.finish import score, speed, write
from rankwise.stages.fitting import fit_sites, store_layers, store_sites
from rankwise.stages.head import measure_head, store_head
from rankwise.stages.judged import judging
from rankwise.stages.keys import chosen_key
from rankwise.stages.measuring import collect_statistics
from rankwise.stages.memory import Need, available_memory, chosen_memory, expected_need, require_config
from rankwise.stages.one_row import RowHand, measure_cell
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.planning import Chosen, choose_cuts, objective_key, select_samples
from rankwise.stages.repairing import Repairing, check_repair, judge_repair, prepare_repair, repair_step
from rankwise.stages.smaller import check_budget, make_smaller
from rankwise.stages.vocabulary import store_vocabulary
from rankwise.stages.work import Texts, Work, begin, read_sequences, read_texts

__all__ = [
    "Cell",
    "Chosen",
    "Need",
    "Outlooks",
    "Protocol",
    "Repairing",
    "RowHand",
    "Rows",
    "Texts",
    "Work",
    "available_memory",
    "begin",
    "cells_of",
    "check_budget",
    "check_repair",
    "choose_cuts",
    "chosen_key",
    "chosen_memory",
    "collect_statistics",
    "draw_for",
    "expected_need",
    "fit_sites",
    "hire",
    "judge_repair",
    "judging",
    "make_smaller",
    "measure_cell",
    "measure_dense",
    "measure_head",
    "objective_key",
    "prepare_repair",
    "read_sequences",
    "read_texts",
    "repair_step",
    "require_config",
    "score",
    "select_samples",
    "speed",
    "store_head",
    "store_layers",
    "store_sites",
    "store_vocabulary",
    "weight_and_statistics",
    "write",
    "write_comparison",
]
