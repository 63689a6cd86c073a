"""Which blocks of which sources exist, and which rows are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dspark.cache.files.layout import SOURCE_STRIDE, part_number

if TYPE_CHECKING:
    from dspark.cache.manifest import SourceInfo
    from dspark.cache.parts.record import PartRecord

Span = tuple[int, int, int]  # source, first row, one past the last row


def rows_known(
    records: Iterable[PartRecord], block_rows: int, sources: Sequence[SourceInfo]
) -> dict[int, int]:
    """Return the number of rows of each source, if known: from the source itself, or from a part
    that ends within its block.
    """
    known = {i: s.rows for i, s in enumerate(sources) if s.rows is not None}
    for record in records:
        if record.row_stop % block_rows:
            known.setdefault(record.source, record.row_stop)
    return known


def missing_rows(parts: Collection[int], rows: Mapping[int, int], block_rows: int) -> list[Span]:
    """Return the rows, of sources with ``rows`` rows each, that no part in ``parts`` holds;
    neighbours form one span.
    """
    out: list[Span] = []
    for source, count in sorted(rows.items()):
        for block in range(-(-count // block_rows)):
            if part_number(source, block) in parts:
                continue
            start, stop = block * block_rows, min((block + 1) * block_rows, count)
            if out and out[-1][0] == source and out[-1][2] == start:
                out[-1] = (source, out[-1][1], stop)
            else:
                out.append((source, start, stop))
    return out


def beyond(parts: Iterable[int], rows: Mapping[int, int], block_rows: int) -> list[int]:
    """Return the numbers of parts that begin beyond the last row of their source."""
    return [
        n
        for n in parts
        if n % SOURCE_STRIDE * block_rows >= max(rows.get(n // SOURCE_STRIDE, 0), 1)
    ]


def spans(missing: Sequence[Span], most: int = 8) -> str:
    """Describe ``missing`` in words: ``rows 0-255 and 1,024-1,279 of source 0``."""
    several = len({source for source, _, _ in missing}) > 1
    words = [
        f"{a:,}-{b - 1:,}" + (f" of source {s}" if several else "") for s, a, b in missing[:most]
    ]
    more = f" and {len(missing) - most:,} more spans" if len(missing) > most else ""
    return "rows " + ", ".join(words) + more
