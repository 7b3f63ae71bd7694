"""Rank scripts of several cases: one job runs them one after the other, and each is a test of its own.

A script `ranks_NAME.py` has a dict `CASES` of functions by name and ends with `run_cases(CASES)`. Its test module makes a
fixture of the job and a test of every case:

    rows = job_of_cases(ranks_rows, ranks=[1, 2])

    @pytest.mark.parametrize("case", ranks_rows.CASES)
    def test_other_rows_stay(case, rows):
        rows(case)

Only selected cases run. One that fails does not hide the others, unless a rank no longer comes out of it. By hand, in a folder
prepared as the fixture prepares it: `deepspeed --num_accelerators 2 ranks_rows.py CASE ...`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from helpers.processes import launch

FOLDER = "cases"
# How long a rank waits for the others at the end of a case: they take the same time, unless one hangs.
WAIT_SECONDS = 600
WAIT_AFTER_A_FAILURE_SECONDS = 20


def outcome_file(script: str, case: str, rank: int) -> Path:
    """Within the job's folder: empty where the script's case has passed on this rank, else why not."""
    return Path(FOLDER, Path(script).stem) / f"{quote(case, safe='')}.{rank}"


def run_cases(cases: Mapping[str, Callable[[], None]]) -> None:
    """Runs the cases that the command line names, or all, on every rank."""
    from ksl_ds import distributed
    from ksl_ds.report import html
    from ksl_ds.sharding.engine import set_library_verbosity

    distributed.initialize()
    set_library_verbosity(False)
    html.svg = lambda figure, prefix: ""  # drawing is a third of a tiny run, and no case looks at its figures
    ranks = distributed.world_size()
    outcome = partial(outcome_file, sys.argv[0])
    outcome("", 0).parent.mkdir(parents=True, exist_ok=True)
    named = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    failed = False
    for case in named or cases:
        why = ""
        try:
            cases[case]()
        except Exception:
            why = traceback.format_exc()
            print(why, file=sys.stderr, flush=True)
        outcome(case, distributed.rank()).write_text(why)
        ends = time.monotonic() + (WAIT_AFTER_A_FAILURE_SECONDS if why else WAIT_SECONDS)
        # Not a collective: a rank that has failed in the midst of a case would take it for one of the case's.
        while not all(outcome(case, rank).exists() for rank in range(ranks)):
            if time.monotonic() > ends:
                os._exit(1)
            time.sleep(0.01)
        failed |= any(outcome(case, rank).stat().st_size for rank in range(ranks))
    distributed.shutdown()
    sys.exit(failed)


def job_of_cases(
    script: ModuleType,
    ranks: Sequence[int],
    prepare: Callable[[Path], Any] = lambda folder: None,
    after: str | None = None,
) -> Any:
    """A fixture: the job of a script's selected cases with each number of ranks, in a folder that `prepare` fills.

    `after` is the fixture of another job, in whose folder this one runs; a test of both has the same case of both.
    The value takes a case's name and fails the test where the case has failed.
    """

    @pytest.fixture(scope="module", params=ranks, ids=lambda number: f"{number} ranks")
    def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
        name = request.fixturename
        of_module = [item for item in request.session.items if item.path == request.path]
        items = [item for item in of_module if name in getattr(item, "fixturenames", ())]
        cases = [item.callspec.params["case"] for item in items if item.callspec.params[name] == request.param]
        selected = dict.fromkeys(cases)
        folder = request.getfixturevalue(after).folder if after else tmp_path_factory.mktemp(script.__name__)
        prepare(folder)
        done = launch(request.param, script.__file__, *selected, cwd=folder)

        def check(case: str) -> None:
            for rank in range(request.param):
                file = folder / outcome_file(script.__name__, case, rank)
                if not file.exists():
                    pytest.fail(f"rank {rank} did not come to the end of {case!r}\n{done.stderr[-6000:]}")
                if why := file.read_text():
                    pytest.fail(f"rank {rank}: {why}")

        check.job = done  # type: ignore[attr-defined]
        check.folder = folder  # type: ignore[attr-defined]
        return check

    return job
