"""A tensor as rows to be tested, cut into blocks that are read one by one.

The cut depends on the tensor's shape alone, never on the number of ranks, so every block is computed in the same way wherever
it is computed. A block of columns touches every page of the matrix; it is a copy, and the whole matrix never is.

Legend: M matrices of a stack, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

BLOCK_ELEMENTS = 1 << 25  # 64 MiB in 16 bits


class Block(NamedTuple):
    """Rows `start` to `stop` of a tensor, and the part of the tensor that holds them."""

    slices: tuple[slice, ...]
    start: int
    stop: int


def row_shape(shape: tuple[int, ...], by_columns: bool) -> tuple[tuple[int, ...], int]:
    """How a tensor's rows are arranged, and how many values each has: a vector is one row, a stack keeps its first axes."""
    if len(shape) < 2:
        return (1,), math.prod(shape)
    return ((*shape[:-2], shape[-1]), shape[-2]) if by_columns else (shape[:-1], shape[-1])


def blocks_of(shape: tuple[int, ...], by_columns: bool, block_elements: int = BLOCK_ELEMENTS) -> Iterator[Block]:
    """All rows of a tensor in order, in blocks of about `block_elements` values, of at least one row."""
    if len(shape) < 2:
        yield Block((slice(None),), 0, 1)
        return
    rows, width = row_shape(shape, by_columns)
    if len(shape) == 2:
        step = max(1, block_elements // width)
        for start in range(0, rows[0], step):
            stop = min(start + step, rows[0])
            yield Block((slice(None), slice(start, stop)) if by_columns else (slice(start, stop),), start, stop)
        return
    of_one = math.prod(rows[1:])  # rows of an entry of the first axis
    if of_one * width <= block_elements or len(shape) > 3:
        step = max(1, block_elements // (of_one * width))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            yield Block((slice(start, stop),), start * of_one, stop * of_one)
        return
    for number in range(shape[0]):
        for part in blocks_of(shape[1:], by_columns, block_elements):
            first = number * of_one
            yield Block((slice(number, number + 1), *part.slices), first + part.start, first + part.stop)


def as_rows(part: Tensor, by_columns: bool) -> Tensor:
    """The values of a block as a matrix of its rows; a view where they lie in this order."""
    if part.ndim < 2:
        return part.reshape(1, -1)
    part = part.transpose(-1, -2) if by_columns else part
    return part.reshape(-1, part.shape[-1])
