"""`ksl-ds transfer`: a base model and a ticket become a full model folder.

With a ticket drawn from two checkpoints this is the paper's partial transfer (the rows of the tuned checkpoint, no
second training); with one from partial tuning it merges the tuned rows, for servers that cannot load row adapters.
Works on files: no model is loaded, and memory stays at a block of the embedding. Rank 0 writes, other ranks wait.

K ticket rows, D coordinates of a row.
"""

from __future__ import annotations

from pathlib import Path

from ksl_ds.config.schema import TransferCommand
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Ticket, differing_rows
from ksl_ds.model.folder import open_model, token_strings
from ksl_ds.model.write_folder import write_model_with_rows

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def transfer(command: TransferCommand) -> str:
    """One line on what was written.

    Raises
    ------
    UserError
        For a damaged ticket or model folder, a base that the ticket was not drawn on (unless `command.force`), or an
        `out` that exists.
    """
    base = open_model(command.base)
    shape = base.shape(base.embedding_name)
    try:
        ticket = Ticket.load(command.ticket)
        ticket.check_shape(*shape, resized=command.force)
        base_KD = base.read_ids(base.embedding_name, ticket.token_ids)
        if not command.force:
            has_tokenizer = any((base.path / name).exists() for name in TOKENIZER_FILES)
            ticket.check_base(base_KD, token_strings(base.tokenizer(), ticket.token_ids) if has_tokenizer else None)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    write_model_with_rows(base, Path(command.out), ticket.token_ids, ticket.rows_KD, ticket.embedding_scope)
    changed = int(differing_rows(ticket.rows_KD.to(base_KD.dtype), base_KD).sum())
    head = ""
    if base.tied:
        untied = "the output head is now a matrix of its own with the old values"
        head = f"; {untied}" if ticket.embedding_scope == "input" else "; the tied output head moved along"
    return f"{command.out}: {changed} of {shape[0]} embedding rows differ from {command.base}{head}"
