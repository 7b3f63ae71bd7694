"""The KS test of two checkpoints: row blocks straight from safetensors, spread over the ranks; no model is loaded.

Legend: V tokens, D coordinates, R rows of this rank, B rows of a block, K drawn rows.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ksl_ds.errors import UserError
from ksl_ds.files import reason
from ksl_ds.lottery.ticket import Shift, choose_rows, explain_empty, make_ticket, measure_shift
from ksl_ds.model.folder import ModelFolder, open_model, token_strings
from ksl_ds.recipe import DrawCommand
from ksl_ds.report.tables import print_table, ticket_rows, ticket_table
from ksl_ds.sharding import cluster
from ksl_ds.sharding.draw import gather_shift
from ksl_ds.sharding.geometry import even_rows
from ksl_ds.sharding.rows import Traffic

BLOCK_BYTES = 64 << 20  # of one checkpoint's rows at once


def run(command: DrawCommand) -> None:
    """Draws a ticket from `before` and `after` into `out`. Raises UserError where they are not two of one model."""
    with cluster.together():
        if Path(command.out).exists():
            raise UserError(f"out={command.out} exists already; choose another folder for the ticket")
        before, after = (open_model(path) for path in (command.before, command.after))
        check_same_model(before, after)
        tokenizer = before.tokenizer()
    shift = checkpoint_shift(before, after)
    with cluster.together():
        try:
            ids_K = choose_rows(
                shift,
                selection=command.selection,
                alpha=command.alpha,
                method=command.method,
                top_k=command.top_k,
                seed=command.seed,
            )
        except ValueError as error:
            raise UserError(f"draw: {error}") from None
        if len(ids_K) == 0:
            raise UserError(explain_empty(shift, command.alpha, command.method))
        if cluster.is_main():
            ids = ids_K.tolist()
            ticket = make_ticket(
                shift,
                ids_K,
                before.read_ids(before.embedding_name, ids),
                after.read_ids(after.embedding_name, ids),
                selection=command.selection,
                alpha=command.alpha,
                method=command.method,
                tokens=token_strings(tokenizer, ids),
                embedding_scope=command.embedding_scope,
                source={"stage": "embed_tuning", "before": command.before, "after": command.after},
            )
            shared_head = before.head_module if before.tied and command.embedding_scope == "shared" else None
            try:
                ticket.save(command.out, before.embedding_module, shared_head)
            except (OSError, ValueError) as error:
                raise UserError(f"out={command.out} could not be written: {reason(error)}") from None
            rows = ticket_rows(
                ticket.token_ids, ticket.tokens, ticket.count, ticket.statistic, ticket.pvalue, ticket.shift_ratio
            )
            print_table(ticket_table(rows, limit=40, title=f"{command.out}: {len(rows)} of {len(shift.count_V)} rows"))


def check_same_model(before: ModelFolder, after: ModelFolder) -> None:
    """Raises UserError unless the two folders hold one model at two times."""
    shapes = [folder.shape(folder.embedding_name) for folder in (before, after)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{before.path} has an embedding of shape {shapes[0]} and {after.path} one of {shapes[1]}; "
            "only two checkpoints of one model can be compared"
        )
    vocabularies = [folder.tokenizer().get_vocab() for folder in (before, after)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(f"{before.path} and {after.path} have different tokenizers; their tokens cannot be compared")


def checkpoint_shift(before: ModelFolder, after: ModelFolder) -> Shift:
    """The KS test of all rows, each rank its even share, in blocks; the same on every rank."""
    num_rows, width = before.shape(before.embedding_name)
    own = even_rows(num_rows, cluster.world_size())[cluster.rank()]
    itemsize = max(folder.dtype(folder.embedding_name).itemsize for folder in (before, after))
    block = max(1, BLOCK_BYTES // (width * itemsize))
    parts, message = [], None
    # A rank without rows tests one block of none, so that it has vectors of the right kind to send.
    with cluster.progress(range(own.start, max(own.stop, own.start + 1), block), "drawing") as starts:
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
    cluster.raise_together(message)
    own_shift = Shift(
        torch.cat([part.count_V for part in parts]),
        torch.cat([part.shift_norm_V for part in parts]),
        torch.cat([part.shift_ratio_V for part in parts]),
        width,
        parts[0].tested_dtype,
    )
    return gather_shift(own_shift, own.start, num_rows, Traffic())
