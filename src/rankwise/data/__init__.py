"""Text sources and token sequences."""

from rankwise.data.instructions import Examples, load_examples
from rankwise.data.lines import existing
from rankwise.data.sequences import Sequences, choose, load_sequences, windows
from rankwise.data.sources import Source, parse_source
from rankwise.data.start import Start, adds_start, start_token

__all__ = [
    "Examples",
    "Sequences",
    "Source",
    "Start",
    "adds_start",
    "choose",
    "existing",
    "load_examples",
    "load_sequences",
    "parse_source",
    "start_token",
    "windows",
]
