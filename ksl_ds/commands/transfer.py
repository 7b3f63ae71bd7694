"""A base model and a ticket become a full model folder; see model/transfer.py."""

from __future__ import annotations

from ksl_ds import distributed
from ksl_ds.config.schema import TransferCommand
from ksl_ds.model.transfer import transfer
from ksl_ds.report.tables import print_text


def main(command: TransferCommand) -> None:
    """Writes `command.out` and prints what differs from `command.base`."""
    print_text(distributed.run_on_rank0(lambda: transfer(command)))
