"""What a run tells after it ended: a report for machines, a card, tables and pictures for people."""

from rankwise.reports.model_card import model_card
from rankwise.reports.pictures import (
    can_draw,
    draw_iterations,
    draw_losses,
    draw_plan,
    draw_role_curves,
    draw_site_map,
    draw_trials,
)
from rankwise.reports.plan_table import kept_grid, plan_difference, plan_facts, plan_table
from rankwise.reports.report import build_report, cut_facts
from rankwise.reports.table import closing_table

__all__ = [
    "build_report",
    "can_draw",
    "closing_table",
    "cut_facts",
    "draw_iterations",
    "draw_losses",
    "draw_plan",
    "draw_role_curves",
    "draw_site_map",
    "draw_trials",
    "kept_grid",
    "model_card",
    "plan_difference",
    "plan_facts",
    "plan_table",
]
