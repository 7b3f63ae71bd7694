"""Processes started as users start them, ended with their tests, and small file systems."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.warm_start import Warm

REPOSITORY = Path(__file__).parents[2]
# Ends what hangs, and nothing else: far more than anything takes on a slow and busy machine.
HANG_SECONDS = 1800
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    # Nothing may be compiled: a process killed meanwhile would leave a lock on which all later ones wait.
    "TORCH_EXTENSIONS_DIR": os.devnull,
    # The checkout that is tested, wherever the installed package points; rank scripts import helpers.
    "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
}
WARM = Warm()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(ranks: int, *words: object, cwd: Path, timeout: float = HANG_SECONDS, **environment: str):
    """`deepspeed --num_accelerators RANKS WORDS...`; returns the finished process with stdout and stderr as text.

    WORDS are a script and its arguments, or `--module`, a module and its arguments. Ranks that outlive the
    timeout are ended and the test fails.
    """
    command = ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), *words]
    return run(*command, cwd=cwd, timeout=timeout, **environment)


def run(*command: object, cwd: Path, timeout: float = HANG_SECONDS, warm: Warm = WARM, **environment: str):
    """Runs a command to its end in a process group of its own, so that nothing of it survives a timeout.

    `deepspeed` and `ksl-ds` start warm (warm_start.py). A `warm` of the test's own has the `environment` of its first command.
    """
    imported_with = ENVIRONMENT if warm is WARM else {**ENVIRONMENT, **environment}
    with subprocess.Popen(
        warm.command([str(word) for word in command], imported_with),
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            pytest.fail(f"{command} was still running after {timeout} s\n{out[-4000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def succeeds(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert process.returncode == 0, f"{process.args}\n{process.stdout[-6000:]}\n{process.stderr[-6000:]}"
    return process


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, a new one; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
