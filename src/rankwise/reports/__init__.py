"""What a run tells after it ended: a report for machines, a card and a table for people."""

from rankwise.reports.model_card import model_card
from rankwise.reports.report import build_report
from rankwise.reports.table import closing_table

__all__ = ["build_report", "closing_table", "model_card"]
