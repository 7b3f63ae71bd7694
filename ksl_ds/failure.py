"""An unexpected exception: one line on stderr, and the traceback in a file."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

from ksl_ds import __version__, files
from ksl_ds.errors import UserError

SECONDS_FOR_RANK_0 = 10.0


def report(error: BaseException, command: str, run_dir: Path | None, job: str | None, verbose: bool) -> None:
    """Writes the traceback of this rank to a file and prints one line: what failed, where, and which file.

    When rank 0 of the same `job` fails at the same place, only rank 0 prints. The other ranks look for its file, as
    collectives may no longer be possible.
    """
    rank = os.environ.get("RANK", "0")
    host = socket.gethostname()
    frames = traceback.extract_tb(error.__traceback__)
    stage = _stage(error)
    place = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
    header = f"ksl_ds {__version__}, {command}, stage {stage or '-'}, rank {rank} on {host}, job {job}\n{place}\n\n"
    text = header + "".join(traceback.format_exception(type(error), error, error.__traceback__))
    file = _write(f"error-rank-{rank}.txt", text, run_dir)
    if verbose or file is None:
        print(text, file=sys.stderr, flush=True)
    if (
        job
        and rank != "0"
        and file
        and _rank0_reports(file.with_name(file.name.replace(f"rank-{rank}", "rank-0")), job, place)
    ):
        return
    reason = " ".join(str(error).split())[:300]
    doing = f"{command} failed in stage {stage}" if stage else f"{command} failed"
    print(
        f"ksl-ds: {doing}, rank {rank} on {host}: {type(error).__name__}{f': {reason}' if reason else ''} "
        f"(traceback {f'in {file}' if file else 'above'})",
        file=sys.stderr,
        flush=True,
    )


def _stage(error: BaseException) -> str | None:
    """The local variable `stage` of the innermost function that has one: those that train or evaluate a stage."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [
        frame.f_locals.get("stage") for frame in frames if frame.f_globals.get("__name__", "").startswith("ksl_ds.")
    ]
    names = [stage for stage in ours if isinstance(stage, str)]
    return names[-1] if names else None


def _write(name: str, text: str, run_dir: Path | None) -> Path | None:
    """Writes to run_dir if it holds a run (a new one must stay empty), else to the working or temporary directory."""
    started = run_dir is not None and (run_dir / "recipe.yaml").is_file()
    folders = [run_dir] if run_dir and started else []
    for folder in (*folders, Path(), Path(tempfile.gettempdir())):
        file = folder / (name if folder == run_dir else f"ksl-ds-{name}")
        try:
            files.write_text(file, text)
        except UserError:
            continue
        return file
    return None


def _rank0_reports(file: Path, job: str, place: str) -> bool:
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    while time.monotonic() < deadline:
        try:
            first, second = file.read_text(encoding="utf-8").splitlines()[:2]
        except (OSError, ValueError):
            pass
        else:
            if first.endswith(f"job {job}"):
                return second == place
        time.sleep(0.1)
    return False
