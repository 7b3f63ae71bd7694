"""The KS test of two checkpoints: row blocks read from safetensors, divided over the ranks; no model is loaded.

Legend: V tokens, D coordinates, R rows of this rank, B rows of a block.
"""

from __future__ import annotations

import torch

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Shift, measure_shift
from ksl_ds.model.folder import ModelFolder
from ksl_ds.sharding.draw import gather_shift
from ksl_ds.sharding.geometry import even_rows
from ksl_ds.sharding.rows import Traffic

BLOCK_BYTES = 64 << 20  # of one checkpoint's rows at once


def checkpoint_shift(before: ModelFolder, after: ModelFolder) -> Shift:
    """The KS test of all rows, divided evenly over the ranks. Collective; every rank gets the same result."""
    num_rows, width = before.shape(before.embedding_name)
    own = even_rows(num_rows, distributed.world_size())[distributed.rank()]
    itemsize = max(folder.dtype(folder.embedding_name).itemsize for folder in (before, after))
    block = max(1, BLOCK_BYTES // (width * itemsize))
    parts = []
    message = None
    # A rank without rows tests one empty block, so that it has tensors of the right dtype to send.
    with distributed.progress(range(own.start, max(own.stop, own.start + 1), block), "drawing") as starts:
        for start in starts:
            stop = min(start + block, own.stop)
            try:
                rows_BD = [folder.read_rows(folder.embedding_name, start, stop) for folder in (before, after)]
                parts.append(measure_shift(*rows_BD, first_row=start))
            except UserError as error:
                message = str(error)
                break
            except ValueError as error:
                message = f"{before.path} and {after.path}: {error}"
                break
    distributed.raise_if_any_rank(message)
    own_shift = Shift(
        torch.cat([part.count_V for part in parts]),
        torch.cat([part.shift_norm_V for part in parts]),
        torch.cat([part.shift_ratio_V for part in parts]),
        width,
        parts[0].tested_dtype,
    )
    return gather_shift(own_shift, own.start, num_rows, Traffic())
