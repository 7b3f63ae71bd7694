"""What run folders hold."""

from __future__ import annotations

import json
from pathlib import Path


def losses(run_dir: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
