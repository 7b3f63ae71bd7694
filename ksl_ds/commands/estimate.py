"""What a run needs, before it is paid for: memory of a rank by kind, network traffic, seconds of a draw, fewest GPUs.

The model is built on the meta device, so that parameters are counted and not computed, and one training step of each method
is run there without data (ksl_ds/model/dry_run.py); the rest is arithmetic (ksl_ds/estimate/memory.py). Only the
KS test of a few hundred rows is timed, on this machine.
"""

from __future__ import annotations

from ksl_ds import distributed
from ksl_ds.config.schema import EstimateCommand
from ksl_ds.estimate.plan import _recipe, plan_of
from ksl_ds.estimate.tables import tables
from ksl_ds.report.tables import print_table


def main(command: EstimateCommand) -> None:
    """Prints the tables. Raises UserError for an unknown model and for values that make no sense."""
    with distributed.raise_on_all_ranks():
        plan = plan_of(_recipe(command), command.response_length, command.rows)
        if distributed.is_rank0():
            for table in tables(plan, command):
                print_table(table)
