"""What calibration measures, one file a statistic, and the streamed passes that collect it.

A method imports the statistics it asks for from their files; nothing here lists them.
"""

from rankwise.statistics.base import Collected, Labels, Statistic, Sums, Totals
from rankwise.statistics.passes import HIDDEN_GB, collect, collecting
from rankwise.statistics.shards import shards
from rankwise.statistics.store import SiteStatistics, Store, save_totals

__all__ = [
    "HIDDEN_GB",
    "Collected",
    "Labels",
    "SiteStatistics",
    "Statistic",
    "Store",
    "Sums",
    "Totals",
    "collect",
    "collecting",
    "save_totals",
    "shards",
]
