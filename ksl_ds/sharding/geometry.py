"""How a (V, D) matrix is partitioned over the ranks, as arithmetic on flat element ranges.

ZeRO-3 flattens a parameter and cuts it into equal parts with no regard for rows; the last part is padded. A row belongs to
the rank that holds its first element, so no rank owns two rows more than another. Python integers: nothing overflows.

Legend: V rows, D elements of a row; a span is a half-open range [start, stop) of the flattened matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """The half-open range of elements [start, stop)."""

    start: int
    stop: int

    def __and__(self, other: Span) -> Span:
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def zero3_parts(numel: int, part_size: int, num_ranks: int) -> list[Span]:
    """The elements that each rank holds if `numel` elements are cut into parts of `part_size`; without padding."""
    return [Span(min(rank * part_size, numel), min((rank + 1) * part_size, numel)) for rank in range(num_ranks)]


def owned_rows(parts: list[Span], num_rows: int, row_length: int) -> list[Span]:
    """The rows that each rank owns: those whose first element it holds."""
    return [Span(-(-part.start // row_length), min(num_rows, -(-part.stop // row_length))) for part in parts]


def even_rows(num_rows: int, num_ranks: int) -> list[Span]:
    """Rows divided evenly over the ranks, for a matrix that every rank holds completely."""
    return [Span(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks) for rank in range(num_ranks)]


def whole_rows(span: Span, row_length: int) -> Span:
    """The rows that lie completely within `span`; an empty span of rows if there are none."""
    first = -(-span.start // row_length)
    return Span(first, max(first, span.stop // row_length))


def blocks_of(span: Span, size: int) -> Iterator[Span]:
    """`span` in consecutive pieces of `size`; the last may be smaller."""
    for start in range(span.start, span.stop, size):
        yield Span(start, min(start + size, span.stop))


def travelling(parts: list[Span], rows: list[Span], row_length: int) -> dict[tuple[int, int], Span]:
    """By (holder, owner) of different ranks: the elements of the owner's rows that the holder has."""
    found = {}
    wanted = [Span(span.start * row_length, span.stop * row_length) for span in rows]
    holder = 0
    for owner, span in enumerate(wanted):
        # Both lists ascend, so the first holder of one owner's rows is not before that of the owner before it.
        while holder + 1 < len(parts) and parts[holder].stop <= span.start:
            holder += 1
        candidate = holder
        while candidate < len(parts) and span.size and parts[candidate].start < span.stop:
            overlap = parts[candidate] & span
            if overlap.size and candidate != owner:
                found[candidate, owner] = overlap
            candidate += 1
    return found
