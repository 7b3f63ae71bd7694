"""The two ways to train a ticket under ZeRO, `hooks` and `rows`: the same losses and the same rows."""

from __future__ import annotations

import pytest
import ranks_ticket
from helpers.cases import job_of_cases

tickets = job_of_cases(ranks_ticket, ranks=[1, 2])


@pytest.mark.parametrize("case", ranks_ticket.CASES)
def test_rows_and_hooks_train_a_ticket_alike(case, tickets):
    """10 or 50 steps with decay and clipping, six architectures, tied and untied, stages 0 to 3, to 1e-6 in fp32."""
    tickets(case)
