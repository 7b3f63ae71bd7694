"""A ticket's folder: four files, written atomically, without pickles.

adapter_config.json, adapter_model.safetensors   what PEFT loads (TRAINABLE_TOKENS, absolute rows in float32)
ticket.json                                      the record: lists and scalars, fingerprint of the base, provenance
ks.safetensors                                   `count` int32 (V,), `base_rows` (K, D) in the base model's dtype

Choices and what they cost: SHA-256 checksums in ticket.json cover the tensors and ticket.json itself, so loading finds a
flipped bit; but ticket.json cannot be edited by hand. In adapter_config.json only the keys that determine the rows are
compared, since users edit the base model's name there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.files import Count, Record, atomic_folder, bytes_sha256, checked, file_sha256, read_json
from ksl_ds.lottery.pvalues import PValueMethod

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
TICKET_JSON, KS_TENSORS = "ticket.json", "ks.safetensors"
CARD = "README.md"  # for people and the Hub; not needed for loading
FILES = {ADAPTER_CONFIG, ADAPTER_MODEL, TICKET_JSON, KS_TENSORS}
FORMAT_VERSION = 1
Share = Annotated[float, Field(ge=0, le=1)]


class _Base(Record):
    dtype: str
    sha256: str


class _Source(Record):
    base: str | None = None
    before: str | None = None
    train_frequency: list[Count] | None = None


class _TicketRecord(Record):
    """ticket.json."""

    token_ids: Annotated[list[Count], Field(min_length=1)]
    tokens: list[str]
    count: list[Count]
    statistic: list[Share]
    pvalue: list[Share]
    shift_ratio: list[Annotated[float, Field(ge=0, le=torch.finfo(torch.float32).max)]]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    selection: str
    method: PValueMethod
    num_samples: Annotated[Count, Field(ge=1)]
    vocab_size: Count
    embedding_scope: Literal["input", "shared"]
    tested_dtype: str
    base: _Base
    source: _Source
    files: dict[str, str]
    modules: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees(self) -> _TicketRecord:
        ids = self.token_ids
        lists = {name: getattr(self, name) for name in ("tokens", "count", "statistic", "pvalue", "shift_ratio")}
        lists["source.train_frequency"] = self.source.train_frequency
        for name, values in lists.items():
            if values is not None and len(values) != len(ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(ids)} token_ids")
        if any(left >= right for left, right in zip(ids, ids[1:], strict=False)):
            raise ValueError("token_ids are not in ascending order")
        if ids[-1] >= self.vocab_size:
            raise ValueError(f"token_ids exceed the vocabulary of {self.vocab_size}")
        if max(self.count) > self.num_samples:
            raise ValueError(f"count is above num_samples ({self.num_samples})")
        return self


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in its own dtype."""
    return bytes_sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def write_ticket(
    folder: Path,
    record: dict[str, Any],
    module_names: list[str],
    rows_KD: Tensor,  # float32
    base_rows_KD: Tensor,  # in the base model's dtype
    count_V: Tensor,  # int32
    card: str = "",
) -> None:
    """Writes the four files and the card. Raises ValueError if `folder` exists and is not a ticket."""
    folder = Path(folder)
    if folder.exists():
        ours = FILES | {CARD}
        foreign = [folder.name] if not folder.is_dir() else sorted({path.name for path in folder.iterdir()} - ours)
        if foreign:
            raise ValueError(f"{folder} exists and is not a ticket (it holds {foreign[0]}); choose another folder")
    rows_KD = rows_KD.cpu().contiguous()
    base_rows_KD = base_rows_KD.cpu().contiguous()
    # A tied head has the same rows under its own name, as PEFT writes them; PEFT warns if they are missing.
    adapter = {f"base_model.model.{name}.trainable_tokens_delta": rows_KD.clone() for name in module_names}
    with atomic_folder(folder) as draft:
        # Not save_file, which raises SafetensorError instead of OSError for a full disk.
        (draft / ADAPTER_MODEL).write_bytes(safetensors.torch.save(adapter, metadata={"format": "pt"}))
        ks = {"count": count_V.cpu().contiguous(), "base_rows": base_rows_KD}
        (draft / KS_TENSORS).write_bytes(safetensors.torch.save(ks))
        _write_json(draft / ADAPTER_CONFIG, _adapter_config(record, module_names[0]))
        record = {
            "format_version": FORMAT_VERSION,
            **record,
            "modules": module_names,
            "files": {name: file_sha256(draft / name) for name in (ADAPTER_MODEL, KS_TENSORS)},
        }
        _write_json(draft / TICKET_JSON, {**record, "sha256": _record_sha256(record)})
        if card:
            (draft / CARD).write_text(card, encoding="utf-8")


def read_ticket(folder: Path) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """The record, rows_KD, base_rows_KD and count_V of a ticket folder.

    Raises
    ------
    ValueError
        Names the file that is missing, truncated, changed or inconsistent with another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such ticket folder")
    for name in sorted(FILES):
        if not (folder / name).is_file():
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"})
            hint = f" ({pickled[0]} is a pickle, which ksl_ds never loads)" if pickled else ""
            raise ValueError(f"{folder / name} is missing; a ticket is the four files {', '.join(sorted(FILES))}{hint}")
    record = _read_object(folder / TICKET_JSON)
    stated = record.pop("sha256", None)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder / TICKET_JSON} does not have ticket format {FORMAT_VERSION}")
    if stated != _record_sha256(record):
        raise ValueError(f"{folder / TICKET_JSON} does not match its own checksum; it was damaged or edited")
    checked(record, _TicketRecord, str(folder / TICKET_JSON))

    num_rows = len(record["token_ids"])
    vocab_size = record["vocab_size"]
    num_samples = record["num_samples"]
    keys = {f"base_model.model.{name}.trainable_tokens_delta" for name in record["modules"]}
    adapter = _read_tensors(folder / ADAPTER_MODEL, record["files"], keys)
    ks = _read_tensors(folder / KS_TENSORS, record["files"], {"count", "base_rows"})
    for path, tensor, shape, dtype in [
        *((folder / ADAPTER_MODEL, rows_KD, (num_rows, num_samples), "float32") for rows_KD in adapter.values()),
        (folder / KS_TENSORS, ks["base_rows"], (num_rows, num_samples), record["base"]["dtype"]),
        (folder / KS_TENSORS, ks["count"], (vocab_size,), "int32"),
    ]:
        if tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
            found = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
            raise ValueError(f"{path} holds a tensor {found}, but {TICKET_JSON} requires {shape} {dtype}")
    if tensor_sha256(ks["base_rows"]) != record["base"]["sha256"]:
        raise ValueError(f"{folder / KS_TENSORS}: base_rows do not match the fingerprint in {TICKET_JSON}")
    if ks["count"][torch.tensor(record["token_ids"], dtype=torch.int64)].tolist() != record["count"]:
        raise ValueError(f"{folder / KS_TENSORS}: count differs from the counts in {TICKET_JSON}")

    config = _read_object(folder / ADAPTER_CONFIG)
    expected = _adapter_config(record, record["modules"][0])
    for name in ("peft_type", "token_indices", "target_modules", "init_weights", "inference_mode"):
        if config.get(name) != expected[name]:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name} does not match {TICKET_JSON}")
    return record, adapter[min(adapter)], ks["base_rows"], ks["count"]


def _adapter_config(record: dict[str, Any], module_name: str) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": record["source"].get("base", record["source"].get("before")),
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "TRAINABLE_TOKENS",
        "revision": None,
        "target_modules": module_name,
        "task_type": "CAUSAL_LM",
        "token_indices": record["token_ids"],
    }


def _read_tensors(path: Path, checksums: dict[str, str], names: set[str]) -> dict[str, Tensor]:
    content = path.read_bytes()
    if bytes_sha256(content) != checksums.get(path.name):
        raise ValueError(
            f"{path} does not match its checksum in {TICKET_JSON}; it is truncated, damaged or of another ticket"
        )
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if tensors.keys() != names:
        raise ValueError(f"{path} holds {sorted(tensors)}; it must hold {sorted(names)}")
    return tensors


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _record_sha256(record: dict[str, Any]) -> str:
    return bytes_sha256(json.dumps(record, sort_keys=True).encode())
