"""Draws a ticket from two checkpoints of one model; see model/checkpoint_draw.py.

Legend: K drawn rows.
"""

from __future__ import annotations

from pathlib import Path

from ksl_ds import distributed
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import DrawCommand
from ksl_ds.errors import UserError
from ksl_ds.files import reason
from ksl_ds.lottery.ticket import choose_rows, explain_empty, make_ticket
from ksl_ds.model.checkpoint_draw import checkpoint_shift
from ksl_ds.model.folder import check_same_model, open_model, token_strings
from ksl_ds.report.card import licence_of, ticket_card
from ksl_ds.report.tables import print_table, rows_of_ticket, ticket_table


def main(command: DrawCommand) -> None:
    """Draws a ticket from `before` and `after` into `out`. Raises UserError where they are not of one model."""
    with distributed.raise_on_all_ranks():
        if Path(command.out).exists():
            raise UserError(f"out={command.out} already exists; choose another folder for the ticket")
        before, after = (open_model(path) for path in (command.before, command.after))
        check_same_model(before, after)
        tokenizer = before.tokenizer()
    shift = checkpoint_shift(before, after)
    with distributed.raise_on_all_ranks():
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
        if distributed.is_rank0():
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
                source={"stage": Stage.EMBED_TUNING, "before": command.before, "after": command.after},
            )
            shared_head = before.head_module if before.tied and command.embedding_scope == "shared" else None
            try:
                card = ticket_card(ticket, base_model=command.before, licence=licence_of(before.path))
                ticket.save(command.out, before.embedding_module, shared_head, card=card)
            except (OSError, ValueError) as error:
                raise UserError(f"out={command.out} could not be written: {reason(error)}") from None
            rows = rows_of_ticket(ticket)
            print_table(ticket_table(rows, limit=40, title=f"{command.out}: {len(rows)} of {len(shift.count_V)} rows"))
