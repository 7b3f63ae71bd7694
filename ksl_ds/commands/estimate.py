"""What a run needs, before it is paid for: memory of a rank by kind, network traffic, seconds of a draw, fewest GPUs."""

from __future__ import annotations

from ksl_ds import distributed
from ksl_ds.config.schema import EstimateCommand
from ksl_ds.estimate.plan import plan_of, recipe_of
from ksl_ds.estimate.tables import tables
from ksl_ds.report.tables import print_table


def main(command: EstimateCommand) -> None:
    """Prints the tables. Raises UserError for an unknown model and for values that make no sense."""
    with distributed.raise_on_all_ranks():
        plan = plan_of(recipe_of(command), command.response_length, command.rows, command.shared_length or 0)
        if distributed.is_rank0():
            for table in tables(plan, command):
                print_table(table)
