"""What an offline run of wandb holds, by wandb's own record type: the Python package has no reader of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """What a .wandb file holds: a header of 7 bytes, then records in blocks of 32 KiB, in LevelDB's log format."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def summary_of(found: list[wandb_internal_pb2.Record]) -> dict[str, Any]:
    """The run's summary: explicit updates and logged values, the last of each."""
    summary: dict[str, Any] = {}
    for record in found:
        for item in [*record.history.item, *record.summary.update]:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return summary
