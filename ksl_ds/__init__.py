"""KS-Lottery on DeepSpeed: find the few embedding rows that fine-tuning shifts, and train only those."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksl_ds.lottery.ks import KSResult as KSResult
    from ksl_ds.lottery.ks import critical_count as critical_count
    from ksl_ds.lottery.ks import ks_2samp as ks_2samp
    from ksl_ds.lottery.ticket import Ticket as Ticket
    from ksl_ds.lottery.ticket import draw_ticket as draw_ticket
    from ksl_ds.model.row_hooks import train_only_rows as train_only_rows

__version__ = "0.2.0"
__all__ = ["KSResult", "Ticket", "critical_count", "draw_ticket", "ks_2samp", "train_only_rows"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library prints nothing

# Imported on first use, so that `ksl-ds --help` does not import torch.
_HOMES = {
    "KSResult": "ksl_ds.lottery.ks",
    "ks_2samp": "ksl_ds.lottery.ks",
    "critical_count": "ksl_ds.lottery.ks",
    "Ticket": "ksl_ds.lottery.ticket",
    "draw_ticket": "ksl_ds.lottery.ticket",
    "train_only_rows": "ksl_ds.model.row_hooks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ksl_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
