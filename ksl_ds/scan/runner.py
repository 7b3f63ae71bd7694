"""The scan itself: which tensors of two checkpoints are compared, and k and shift ratio of each of their rows.

Blocks of rows are spread over the ranks by their number of values. Which blocks there are does not depend on the ranks, and
what the ranks send each other are sums with zeros, so any number of ranks finds the same bits.

Legend: R rows of a block, D values of a row, N rows of all tensors, T rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.lottery.ks import FLOATS, row_counts
from ksl_ds.lottery.shift import dtype_name, shift_of_rows
from ksl_ds.scan.blocks import Block, as_rows, blocks_of, row_shape
from ksl_ds.scan.checkpoints import Checkpoint, ModelCheckpoint
from ksl_ds.scan.names import Place, places

RowKind = Literal["output", "input"]
SHIFT_ELEMENTS = 1 << 18  # of a block whose lengths are computed at once: its float32 copies stay in the cache


@dataclass(frozen=True)
class ScannedTensor:
    """A tensor that both checkpoints hold, and how its rows are taken.

    Attributes
    ----------
    name : of the parameter in the model
    before_name, after_name : what to read; another name only where one side ties the head to the embedding
    by_columns : whether a row is a column of the stored matrix
    row_shape : how the rows are arranged; their number is its product
    num_samples : values of a row
    """

    name: str
    before_name: str
    after_name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    place: Place
    by_columns: bool
    row_shape: tuple[int, ...]
    num_samples: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return torch.Size(self.row_shape).numel()


@dataclass
class Plan:
    """What a scan compares, in the model's order, and what it leaves out: {name: why} and names of one side."""

    tested: list[ScannedTensor]
    not_tested: dict[str, str] = field(default_factory=dict)
    only_before: list[str] = field(default_factory=list)
    only_after: list[str] = field(default_factory=list)


@dataclass
class Found:
    """Of every tested tensor: k (int32) and shift ratio (float32) of each row, flat; in the order of the plan."""

    count_T: list[Tensor]
    ratio_T: list[Tensor]


def make_plan(before: ModelCheckpoint, after: Checkpoint, rows: RowKind) -> Plan:
    """Pairs the tensors of two checkpoints.

    Raises
    ------
    UserError
        For a tensor whose shapes differ (it is named), and where nothing can be compared.
    """
    plan = Plan([])
    head = before.head
    shared = before.names & after.names
    everywhere = before.names | after.names
    if head in everywhere - shared and before.embedding in shared:
        shared = shared | {str(head)}  # tied on one side: there its values are the embedding's
    order = {name: number for number, name in enumerate(dict(before.folder.meta_model.named_parameters()))}
    place_of = places(everywhere)
    buffers = before.buffers
    for name in sorted(shared, key=lambda name: (order.get(name, len(order)), name)):
        before_name, after_name = (name if name in side.names else before.embedding for side in (before, after))
        shape = before.shape(before_name)
        other_shape = after.shape(after_name)
        if shape != other_shape:
            raise UserError(
                f"{name} has shape {shape} in {before.path} and {other_shape} in {after.path}; only two checkpoints of one "
                "model can be compared"
            )
        dtypes = before.dtype(before_name), after.dtype(after_name)
        other = next((dtype for dtype in dtypes if dtype not in FLOATS), None)
        if other is not None:
            plan.not_tested[name] = f"holds {dtype_name(other)}"
        elif name in buffers:
            plan.not_tested[name] = "a buffer, which no training changes"
        elif 0 in shape:
            plan.not_tested[name] = "empty"
        else:
            # A lookup table's row is an input; a stack of biases has a row an expert.
            table = name in before.embeddings or name.endswith("bias")
            by_columns = len(shape) > 1 and not table and (rows == "input") != (name in before.inputs_first)
            arranged, num_samples = row_shape(shape, by_columns)
            plan.tested.append(
                ScannedTensor(
                    name, before_name, after_name, shape, dtypes, place_of[name], by_columns, arranged, num_samples
                )
            )
    plan.only_before = sorted(before.names - shared)
    plan.only_after = sorted(after.names - shared)
    if not plan.tested:
        raise UserError(
            f"{before.path} and {after.path} have no floating-point tensor in common; nothing can be compared"
        )
    return plan


def run_scan(before: Checkpoint, after: Checkpoint, plan: Plan) -> Found:
    """Tests every row of the plan, each rank its share of the blocks; the same on every rank.

    Raises
    ------
    UserError
        On every rank, for a damaged file and for NaN or infinity, which names the tensor and the row.
    """
    first_row = [0, *accumulate(tensor.num_rows for tensor in plan.tested)]
    count_N = torch.zeros(first_row[-1], dtype=torch.int32, device=distributed.device())
    ratio_N = torch.zeros(first_row[-1], dtype=torch.float32, device=distributed.device())
    message = None
    with distributed.progress(own_blocks(plan.tested), "scanning") as blocks:
        for number, block in blocks:
            tensor = plan.tested[number]
            at = slice(first_row[number] + block.start, first_row[number] + block.stop)
            try:
                parts = before.read(tensor.before_name, block.slices), after.read(tensor.after_name, block.slices)
                compared = compare_parts(*parts, tensor.by_columns, block.start)
            except UserError as error:
                message = str(error)
                break
            except ValueError as error:
                message = f"{tensor.name}: {error} (before is {before.path}, after {after.path})"
                break
            if compared is not None:
                count_N[at], ratio_N[at] = compared
    distributed.raise_if_any_rank(message)
    distributed.all_reduce(count_N)
    distributed.all_reduce(ratio_N)
    sizes = [tensor.num_rows for tensor in plan.tested]
    return Found(list(count_N.cpu().split(sizes)), list(ratio_N.cpu().split(sizes)))


def own_blocks(tested: Sequence[ScannedTensor]) -> list[tuple[int, Block]]:
    """This rank's blocks, with the number of their tensor: consecutive ones with an even share of all values."""
    blocks = [
        (number, block) for number, tensor in enumerate(tested) for block in blocks_of(tensor.shape, tensor.by_columns)
    ]
    sizes = [(block.stop - block.start) * tested[number].num_samples for number, block in blocks]
    ends = accumulate(sizes)
    share = max(1, sum(sizes)) / distributed.world_size()
    return [
        block
        for block, size, end in zip(blocks, sizes, ends, strict=True)
        if int((end - size / 2) / share) == distributed.rank()
    ]


def compare_parts(before: Tensor, after: Tensor, by_columns: bool, start: int) -> tuple[Tensor, Tensor] | None:
    """k and shift ratio of the rows of a block, (R,) each; None where the block has not changed by a bit.

    Raises
    ------
    ValueError
        For NaN or infinity in a block that has changed; its first row is called `start`.
    """
    if before.dtype == after.dtype and torch.equal(before, after):
        return None
    before_RD, after_RD = (as_rows(part.to(distributed.device()), by_columns).contiguous() for part in (before, after))
    count_R = row_counts(before_RD, after_RD, first_row=start)
    step = max(1, SHIFT_ELEMENTS // before_RD.shape[1])
    ratios = [shift_of_rows(*pair)[1] for pair in zip(before_RD.split(step), after_RD.split(step), strict=True)]
    return count_R, torch.cat(ratios)
