"""What `check` says a step costs in communication, from measured bandwidth: the arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksl_ds import distributed
from ksl_ds.estimate.memory import MethodCost, ModelDims, Zero, rank_needs
from ksl_ds.preflight.checks import Checklist
from ksl_ds.preflight.traffic import Bandwidth, ranks_of_copy, step_line

ZERO = Zero(stage=3, persistence_threshold=0, max_reuse_distance=0)
METHOD = MethodCost("ticket", trained=[1000], frozen=[1_000_000_000], working=None)
DIMS = ModelDims(weight_bytes=2, vocab_size=10, width=10)


def test_seconds_of_a_step():
    """Four ranks on two hosts: plain, everything crosses; with copies on each, only what is trained."""
    bandwidth = Bandwidth(gather=1e6, reduce=1e3, gather_within=1e9)
    plain = rank_needs(METHOD, DIMS, ZERO, 4)
    gathered = 0.75 * 2 * 2 * 1_000_001_000
    assert bandwidth.seconds(plain) == pytest.approx(gathered / 1e6 + 0.75 * 2 * 1000 / 1e3)
    copies = rank_needs(METHOD, DIMS, replace(ZERO, host_ranks=2), 4)
    assert bandwidth.seconds(copies) == pytest.approx(
        0.5 * 2 * 2 * 1_000_000_000 / 1e9 + 0.75 * 2 * 2 * 1000 / 1e6 + 0.75 * 2 * 1000 / 1e3
    )
    # Two micro-batches.
    assert step_line(plain, bandwidth, 2, several=True) == "5.6 GiB between hosts in 1 h 40 min"
    assert step_line(copies, bandwidth, 2, several=True) == "8.8 KiB between hosts and 3.7 GiB within in 7.0 s"
    assert step_line(plain, bandwidth, 2, several=False) == "5.6 GiB in 1 h 40 min"


@pytest.mark.parametrize(
    ("hosts", "zero", "expected"),
    [
        ("aabb", ZERO, 2),
        ("aaaabbbb", replace(ZERO, host_ranks=2), 2),  # as configured
        ("aaaa", ZERO, 1),
        ("ab", ZERO, 1),
        ("aaab", ZERO, 1),
        ("aabb", Zero(stage=2), 1),
    ],
)
def test_ranks_that_share_a_copy(monkeypatch, hosts, zero, expected):
    monkeypatch.setattr(distributed, "world_size", lambda: len(hosts))
    assert ranks_of_copy(Checklist(hosts=list(hosts)), zero) == expected
