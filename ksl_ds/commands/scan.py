"""The KS test of every matrix of two checkpoints; see scan/."""

from __future__ import annotations

from pathlib import Path

from ksl_ds import distributed
from ksl_ds.config.schema import ScanCommand
from ksl_ds.model.folder import ModelFolder, local_folder
from ksl_ds.report.tables import print_text
from ksl_ds.scan.report import scan_folders


def main(command: ScanCommand) -> None:
    """Scans `before` and `after` into `out`. Raises UserError where they are not of one model."""
    out = Path(command.out)
    with distributed.raise_on_all_ranks():
        before = ModelFolder(local_folder(command.before))
    scan_folders(before, command.after, out, command.alpha, command.rows)
    for name, what in {
        "report.html": "the report",
        "results.json": "all numbers",
        "scan.safetensors": "k of every row",
    }.items():
        print_text(f"{what + ':':36} {out / name}")
