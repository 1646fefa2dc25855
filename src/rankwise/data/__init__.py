"""Text sources and token sequences."""

from rankwise.data.instructions import Examples, load_examples
from rankwise.data.lines import existing
from rankwise.data.sequences import Sequences, choose, load_sequences, spread_first, windows
from rankwise.data.sources import FILE_KINDS, Source, parse_source, require_files
from rankwise.data.start import Start, adds_start, start_token

__all__ = [
    "FILE_KINDS",
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
    "require_files",
    "spread_first",
    "start_token",
    "windows",
]
