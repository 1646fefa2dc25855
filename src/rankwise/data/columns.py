"""Texts in a column of a parquet file."""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.data.lines import existing, known_keys
from rankwise.errors import DataError, MissingPackageError
from rankwise.reading import one_line


def parquet_column(target: str, field: str | None) -> Iterator[str]:
    """Texts in a column of a parquet file.

    Raises:
        DataError: when the file is none, or it has no such column of text.
    """
    path = existing(target)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("Reading parquet needs pyarrow.", remedy="pip install 'rankwise[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = list(table.schema_arrow.names)
        if names.count(field) != 1:
            raise DataError(
                f"The file has no column {field!r}." if field not in names else f"Two columns are named {field!r}.",
                where=target,
                remedy=f"its columns: {known_keys(dict.fromkeys(names))}",
            )
        kind = table.schema_arrow.field(field).type
        kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(
                f"The column {field!r} holds {one_line(kind, 60)}, not text.",
                where=target,
                remedy="name a column of strings",
            )
        for batch in table.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield text
    # What a damaged file makes pyarrow raise has many types, a plain OSError among them.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as problem:
        raise DataError("The file is not parquet, or it is damaged.", where=target, remedy=one_line(problem)) from None
