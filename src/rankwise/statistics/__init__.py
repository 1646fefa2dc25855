"""What calibration measures: moments of inputs, curvature at outputs, and the streamed passes that collect them."""

from rankwise.statistics.collect import collect, streams_of
from rankwise.statistics.curvature import Curvature, RowFisher
from rankwise.statistics.moments import AbsoluteMean, Moments, PooledMoments
from rankwise.statistics.needs import Need, Request
from rankwise.statistics.store import Response, SiteStatistics, Store, save_record

__all__ = [
    "AbsoluteMean",
    "Curvature",
    "Moments",
    "Need",
    "PooledMoments",
    "Request",
    "Response",
    "RowFisher",
    "SiteStatistics",
    "Store",
    "collect",
    "save_record",
    "streams_of",
]
