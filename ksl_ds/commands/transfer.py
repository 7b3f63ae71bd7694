"""`ksl-ds transfer`: a base model and a ticket become a full model folder.

With a ticket drawn from two checkpoints this is the paper's partial transfer (the rows of the tuned checkpoint, no
second training); with one from partial tuning it merges the tuned rows, for servers that cannot load row adapters.
Works on files: no model is loaded, and memory stays at a block of the embedding. Rank 0 writes, other ranks wait.

K ticket rows, D coordinates of a row.
"""

from __future__ import annotations

from ksl_ds import distributed
from ksl_ds.config.schema import TransferCommand
from ksl_ds.model.transfer import transfer
from ksl_ds.report.tables import print_text


def main(command: TransferCommand) -> None:
    """Writes `command.out` and prints what differs from `command.base`."""
    print_text(distributed.run_on_rank0(lambda: transfer(command)))
