"""What a run tells after it ended: a report for machines, a card, tables and pictures for people."""

from rankwise.reports.compared import COMPARISON_FILE, ComparedModels, ComparedRow, TaskFigure
from rankwise.reports.comparison_page import write_comparison_page
from rankwise.reports.measured_tables import print_comparison, print_operations, print_scores, print_speeds
from rankwise.reports.model_card import model_card
from rankwise.reports.outcome import Advice, MemoryUse, Speed, Verdict
from rankwise.reports.parts import (
    Bits,
    CalibrationText,
    Kept,
    KeptPredictions,
    Machine,
    Named,
    Part,
    RecipeSettings,
    Scores,
    SearchSummary,
    SearchTimes,
    Settings,
    SiteReport,
    ValidationText,
    bits_of,
    in_words,
)
from rankwise.reports.pictures import (
    can_draw,
    draw_iterations,
    draw_losses,
    draw_plan,
    draw_role_curves,
    draw_site_map,
    draw_trials,
)
from rankwise.reports.plan_table import kept_grid, plan_difference, plan_facts, plan_table, plan_tables
from rankwise.reports.report import REPORT_FORMAT, Report
from rankwise.reports.report_page import PAGE_FILE, SPECTRA_FILE, write_report_page
from rankwise.reports.table import closing_table, print_closing
from rankwise.reports.trained import (
    BlockRepair,
    ExampleCounts,
    FineTuneSettings,
    FineTuneStep,
    LearnedText,
    RepairStep,
    TrainingStep,
)
from rankwise.reports.verdict import in_lines, verdict

__all__ = [
    "COMPARISON_FILE",
    "PAGE_FILE",
    "REPORT_FORMAT",
    "SPECTRA_FILE",
    "Advice",
    "Bits",
    "BlockRepair",
    "CalibrationText",
    "ComparedModels",
    "ComparedRow",
    "ExampleCounts",
    "FineTuneSettings",
    "FineTuneStep",
    "Kept",
    "KeptPredictions",
    "LearnedText",
    "Machine",
    "MemoryUse",
    "Named",
    "Part",
    "RecipeSettings",
    "RepairStep",
    "Report",
    "Scores",
    "SearchSummary",
    "SearchTimes",
    "Settings",
    "SiteReport",
    "Speed",
    "TaskFigure",
    "TrainingStep",
    "ValidationText",
    "Verdict",
    "bits_of",
    "can_draw",
    "closing_table",
    "draw_iterations",
    "draw_losses",
    "draw_plan",
    "draw_role_curves",
    "draw_site_map",
    "draw_trials",
    "in_lines",
    "in_words",
    "kept_grid",
    "model_card",
    "plan_difference",
    "plan_facts",
    "plan_table",
    "plan_tables",
    "print_closing",
    "print_comparison",
    "print_operations",
    "print_scores",
    "print_speeds",
    "verdict",
    "write_comparison_page",
    "write_report_page",
]
