"""Text sources and token sequences."""

from rankwise.data.sequences import Sequences, choose, load_sequences, windows
from rankwise.data.sources import Source, parse_source

__all__ = ["Sequences", "Source", "choose", "load_sequences", "parse_source", "windows"]
