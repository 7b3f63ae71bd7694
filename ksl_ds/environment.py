"""Hardware and software that a run used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from ksl_ds import distributed
from ksl_ds.files import Count, Record

VERSIONS_OF = (
    "ksl_ds",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "scipy",
    "sacrebleu",
    "wandb",
)


class Environment(Record):
    """Hardware and software, as results.json has them. No host or user name."""

    versions: dict[str, str]  # of `VERSIONS_OF`, and of python
    ranks: Count
    gpus_of_a_host: list[str]
    cpu: str
    cpu_cores: Count
    memory_bytes: Count
    system: str
    git_commit: str | None


def hardware_and_versions() -> Environment:
    """The environment of this process."""
    versions = {}
    for name in VERSIONS_OF:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Environment(
        versions={"python": platform.python_version(), **versions},
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus_of_a_host=gpus,
        ranks=distributed.world_size(),
        git_commit=_git_commit(),
    )


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` if tracked files differ from it."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip() or None
    return None
