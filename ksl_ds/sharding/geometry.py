"""How a (V, D) matrix lies on the ranks, as pure arithmetic on flat element ranges.

ZeRO-3 flattens a parameter and cuts it into equal parts with no regard for rows; the last part is padded. A row belongs to
the rank that holds its first element, so no rank owns two rows more than another. Python integers: nothing overflows.

Legend: V rows, D elements of a row; a span is a half-open range [start, stop) of the flattened matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """Elements `start` to `stop`, the latter excluded."""

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
    """The elements that each rank holds when parts of `part_size` cover `numel` elements; padding is left out."""
    return [Span(min(rank * part_size, numel), min((rank + 1) * part_size, numel)) for rank in range(num_ranks)]


def owned_rows(parts: list[Span], num_rows: int, row_length: int) -> list[Span]:
    """The rows that each rank owns: those whose first element it holds."""
    return [Span(-(-part.start // row_length), min(num_rows, -(-part.stop // row_length))) for part in parts]


def even_rows(num_rows: int, num_ranks: int) -> list[Span]:
    """Rows shared out evenly, for a matrix that every rank has as a whole."""
    return [Span(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks) for rank in range(num_ranks)]


def whole_rows(span: Span, row_length: int) -> Span:
    """The rows that lie within `span` as a whole; an empty span of rows where there is none."""
    first = -(-span.start // row_length)
    return Span(first, max(first, span.stop // row_length))


def blocks_of(span: Span, size: int) -> Iterator[Span]:
    """`span` in consecutive pieces of `size`, the last one perhaps smaller."""
    for start in range(span.start, span.stop, size):
        yield Span(start, min(start + size, span.stop))


def travelling(parts: list[Span], rows: list[Span], row_length: int) -> dict[tuple[int, int], Span]:
    """By (holder, owner), holder other than owner: the elements of the owner's rows that lie with the holder."""
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
