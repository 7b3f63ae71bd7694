"""Where rows lie when a matrix is cut by elements: against brute force, and at sizes that only arithmetic reaches."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksl_ds.sharding.geometry import Span, blocks_of, even_rows, owned_rows, travelling, whole_rows, zero3_parts


def holders(parts: list[Span], element: int) -> list[int]:
    return [rank for rank, part in enumerate(parts) if part.start <= element < part.stop]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 24), st.integers(0, 5))
@example(7, 5, 3, 0)
@example(2, 12, 24, 0)  # a row on twelve ranks, more ranks than rows
@settings(deadline=None, max_examples=400)
def test_every_element_reaches_its_owner(num_rows, row_length, num_ranks, padding):
    numel = num_rows * row_length
    parts = zero3_parts(numel, -(-(numel + padding) // num_ranks), num_ranks)
    rows = owned_rows(parts, num_rows, row_length)
    moves = travelling(parts, rows, row_length)
    owners = [[rank for rank, span in enumerate(rows) if span.start <= row < span.stop] for row in range(num_rows)]
    assert all(len(owner) == 1 for owner in owners)
    for element in range(numel):
        (holder,) = holders(parts, element)
        (owner,) = owners[element // row_length]
        carried = [pair for pair, span in moves.items() if span.start <= element < span.stop]
        assert carried == ([] if holder == owner else [(holder, owner)])
    if padding == 0 and numel % num_ranks == 0:
        sizes = [span.size for span in rows]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
@given(st.integers(1, 300_000), st.integers(1, 16_384), st.integers(1, 1024))
@settings(deadline=None, max_examples=2000)
def test_up_to_1024_ranks(num_rows, row_length, num_ranks):
    numel = num_rows * row_length
    parts = zero3_parts(numel, math.ceil(numel / num_ranks), num_ranks)
    rows = owned_rows(parts, num_rows, row_length)
    assert rows[0].start == 0 and rows[-1].stop == num_rows
    assert all(left.stop == right.start for left, right in zip(rows, rows[1:], strict=False))
    moves = travelling(parts, rows, row_length)
    # Each broken row travels once, without the piece that its owner holds.
    received = [0] * num_ranks
    for (holder, owner), span in moves.items():
        assert holder > owner and (parts[holder] & span) == span
        received[owner] += span.size
    for rank, span in enumerate(rows):
        held = (Span(span.start * row_length, span.stop * row_length) & parts[rank]).size
        assert held + received[rank] == span.size * row_length
        assert received[rank] < row_length


@pytest.mark.parametrize("num_rows", [128_256, 128_257, 262_144])  # of LLaMA-3; an odd one; 2^31 elements
def test_llama_3_70b_on_512_ranks_row_by_row(num_rows):
    """Every element of every row comes from one holder, lies in its owner's rows, and rows are whole and in order."""
    width, num_ranks = 8_192, 512
    numel = num_rows * width
    parts = zero3_parts(numel, math.ceil(numel / num_ranks), num_ranks)
    rows = owned_rows(parts, num_rows, width)
    pieces = [(span, owner) for (_, owner), span in travelling(parts, rows, width).items()]
    for rank, span in enumerate(rows):
        pieces.append((parts[rank] & Span(span.start * width, span.stop * width), rank))
    pieces.sort()
    assert [piece.start for piece, _ in pieces] == [0] + [piece.stop for piece, _ in pieces[:-1]]
    assert pieces[-1][0].stop == numel
    gathered = dict.fromkeys(range(num_rows), 0)  # elements that have reached each row's owner
    for piece, owner in pieces:
        for row in range(piece.start // width, -(-piece.stop // width)):
            assert rows[owner].start <= row < rows[owner].stop
            gathered[row] += (piece & Span(row * width, (row + 1) * width)).size
    assert set(gathered.values()) == {width}


@given(st.integers(0, 1000), st.integers(1, 100))
def test_even_rows_cover_all_rows(num_rows, num_ranks):
    rows = even_rows(num_rows, num_ranks)
    assert rows[0].start == 0 and rows[-1].stop == num_rows
    assert all(left.stop == right.start for left, right in zip(rows, rows[1:], strict=False))
    assert max(span.size for span in rows) - min(span.size for span in rows) <= 1


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 30))
@example(10, 3, 10)  # from the first element of a row, and not to its end
@example(13, 4, 10)  # within one row
def test_whole_rows_are_those_within(start, size, row_length):
    span = Span(start, start + size)
    found = whole_rows(span, row_length)
    rows = [row for row in range(500) if span.start <= row * row_length and (row + 1) * row_length <= span.stop]
    assert list(range(*found)) == rows


@given(st.integers(0, 50), st.integers(-3, 50), st.integers(1, 20))
def test_blocks_cover_a_span_in_order(start, size, block):
    blocks = list(blocks_of(Span(start, start + size), block))
    assert [number for span in blocks for number in range(*span)] == list(range(start, start + size))
    assert all(span.size == block for span in blocks[:-1]) and all(0 < span.size <= block for span in blocks[-1:])
