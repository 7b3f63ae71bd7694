"""COMET scores by the command comet-score of the package unbabel-comet.

A process of its own, for two reasons: unbabel-comet takes numpy below 2 and transformers below 5, so it cannot be installed
beside this package; and the trainer in it would take the launcher's ranks for its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.text.corpus import one_line

COMMAND = "comet-score"
# Variables of launchers and batch systems, by which PyTorch Lightning would look for other ranks.
OF_RANKS = (
    "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "CROSS_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_",
)  # fmt: skip


@cache  # a comparison opens many runs
def check_comet(model: str) -> None:
    """Makes sure that a model scores, before anything is trained; the first time, the model is downloaded.

    Raises
    ------
    UserError
        If the command is not installed, or fails.
    """
    if shutil.which(COMMAND) is None:
        raise UserError(
            f"evaluation.comet needs the command {COMMAND}, which is not installed; `pipx install unbabel-comet` installs it "
            "in an environment of its own, as it needs older versions of numpy and transformers than ksl_ds"
        )
    comet_scores(model, ["a"], ["a"], ["a"])


def comet_scores(model: str, sources: list[str], hypotheses: list[str], references: list[str]) -> list[float]:
    """The score of every sentence; a text's score is their mean. On this process' GPU where there is one.

    Parameters
    ----------
    model
        Hub id of a COMET model such as Unbabel/wmt22-comet-da, or a folder that holds checkpoints/model.ckpt.
    sources, hypotheses, references
        The sentences; line breaks become spaces, as for the other scores.

    Raises
    ------
    UserError
        If the command fails, with the last line that it writes.
    """
    checkpoint = Path(model, "checkpoints", "model.ckpt")
    with tempfile.TemporaryDirectory() as folder:
        texts = {"sources": sources, "translations": hypotheses, "references": references}
        words = [COMMAND, "--model", str(checkpoint.absolute()) if checkpoint.is_file() else model]
        words += ["--gpus", str(int(distributed.device().type == "cuda"))]
        words += ["--quiet", "--only_system", "--to_json", "scores.json"]
        for name, lines in texts.items():
            Path(folder, name).write_text("".join(f"{one_line(line)}\n" for line in lines), encoding="utf-8")
            words += [f"--{name}", name]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_RANKS)}
        done = subprocess.run(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        written = Path(folder, "scores.json")
        if done.returncode or not written.is_file():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"evaluation.comet={model}: {COMMAND} failed: {said[-1].strip()[:300]}")
        (scored,) = json.loads(written.read_text(encoding="utf-8")).values()
    return [sentence["COMET"] for sentence in scored]
