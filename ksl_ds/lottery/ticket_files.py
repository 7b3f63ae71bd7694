"""A ticket's folder: four files, whole or absent, read without ever unpickling.

adapter_config.json, adapter_model.safetensors   what PEFT loads (TRAINABLE_TOKENS, absolute rows in float32)
ticket.json                                      the record: lists and scalars, fingerprint of the base, provenance
ks.safetensors                                   `count` int32 (V,), `base_rows` (K, D) in the base model's dtype

Choices and what they cost: every byte that carries meaning is covered by a SHA-256 in ticket.json, which covers itself
too, so a flipped bit is found when loading; the price is that ticket.json cannot be edited by hand. In
adapter_config.json only what decides the rows is compared, since people do edit the base model's name there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ksl_ds.files import sync

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
TICKET_JSON, KS_TENSORS = "ticket.json", "ks.safetensors"
FILES = {ADAPTER_CONFIG, ADAPTER_MODEL, TICKET_JSON, KS_TENSORS}
FORMAT_VERSION = 1


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well and vanishes when it does not.

    An existing `target` stays as it is until the new one is complete on disk; it is then moved aside and removed.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(aside)
        try:
            draft.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values as they lie in memory, in its own dtype."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def write_ticket(
    folder: Path,
    record: dict[str, Any],
    module_names: list[str],
    rows_KD: Tensor,  # float32
    base_rows_KD: Tensor,  # in the base model's dtype
    count_V: Tensor,  # int32
) -> None:
    """Writes the four files. Raises ValueError where `folder` holds something that is no ticket."""
    folder = Path(folder)
    if folder.exists():
        foreign = [folder.name] if not folder.is_dir() else sorted({path.name for path in folder.iterdir()} - FILES)
        if foreign:
            raise ValueError(f"{folder} exists and is not a ticket (it holds {foreign[0]}); choose another folder")
    rows_KD, base_rows_KD = rows_KD.cpu().contiguous(), base_rows_KD.cpu().contiguous()
    # A tied head gets the same rows under its own name, as PEFT itself writes them: without it PEFT warns.
    adapter = {f"base_model.model.{name}.trainable_tokens_delta": rows_KD.clone() for name in module_names}
    with whole_folder(folder) as draft:
        safetensors.torch.save_file(adapter, draft / ADAPTER_MODEL, metadata={"format": "pt"})
        safetensors.torch.save_file(
            {"count": count_V.cpu().contiguous(), "base_rows": base_rows_KD}, draft / KS_TENSORS
        )
        _write_json(draft / ADAPTER_CONFIG, _adapter_config(record, module_names[0]))
        record = {
            "format_version": FORMAT_VERSION,
            **record,
            "modules": module_names,
            "files": {name: _sha256((draft / name).read_bytes()) for name in (ADAPTER_MODEL, KS_TENSORS)},
        }
        _write_json(draft / TICKET_JSON, {**record, "sha256": _record_sha256(record)})


def read_ticket(folder: Path) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """The record, rows_KD, base_rows_KD and count_V of a ticket folder.

    Raises
    ------
    ValueError
        Naming the file that is missing, truncated, changed, or at odds with another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such ticket folder")
    for name in sorted(FILES):
        if not (folder / name).is_file():
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"})
            hint = f" ({pickled[0]} is pickled, and pickles are never loaded)" if pickled else ""
            raise ValueError(f"{folder / name} is missing; a ticket is the four files {', '.join(sorted(FILES))}{hint}")
    record = _read_json(folder / TICKET_JSON)
    stated = record.pop("sha256", None)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder / TICKET_JSON} is not in ticket format {FORMAT_VERSION}")
    if stated != _record_sha256(record):
        raise ValueError(f"{folder / TICKET_JSON} does not match its own checksum; it was damaged or edited")
    _check_record(folder / TICKET_JSON, record)

    num_rows, vocab_size, num_samples = len(record["token_ids"]), record["vocab_size"], record["num_samples"]
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
            raise ValueError(f"{path} holds a tensor {found} where {TICKET_JSON} asks for {shape} {dtype}")
    if tensor_sha256(ks["base_rows"]) != record["base"]["sha256"]:
        raise ValueError(f"{folder / KS_TENSORS}: base_rows are not the rows that {TICKET_JSON} fingerprints")
    if ks["count"][torch.tensor(record["token_ids"], dtype=torch.int64)].tolist() != record["count"]:
        raise ValueError(f"{folder / KS_TENSORS}: count differs from the counts in {TICKET_JSON}")

    config, expected = _read_json(folder / ADAPTER_CONFIG), _adapter_config(record, record["modules"][0])
    for name in ("peft_type", "token_indices", "target_modules", "init_weights", "inference_mode"):
        if config.get(name) != expected[name]:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name} is at odds with {TICKET_JSON}")
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


def _check_record(path: Path, record: dict[str, Any]) -> None:
    lists = {"token_ids": int, "tokens": str, "count": int, "statistic": float, "pvalue": float, "shift_ratio": float}
    scalars = {"alpha": float, "selection": str, "method": str, "num_samples": int, "vocab_size": int}
    scalars |= {"embedding_scope": str, "tested_dtype": str, "base": dict, "source": dict, "files": dict}
    scalars |= {"modules": list}

    def fits(value: Any, kind: type) -> bool:
        return type(value) is kind or (kind, type(value)) == (float, int)

    for name, kind in scalars.items():
        if not fits(record.get(name), kind):
            raise ValueError(f"{path}: {name} is missing or not of type {kind.__name__}")
    for name, kind in lists.items():
        values = record.get(name)
        if type(values) is not list or not all(fits(value, kind) for value in values):
            raise ValueError(f"{path}: {name} is missing or not a list of type {kind.__name__}")
        if len(values) != len(record["token_ids"]):
            raise ValueError(f"{path}: {name} has {len(values)} entries beside {len(record['token_ids'])} token_ids")
    ids = record["token_ids"]
    if any(left >= right for left, right in zip(ids, ids[1:], strict=False)):
        raise ValueError(f"{path}: token_ids are not in ascending order")
    if ids and not 0 <= ids[0] <= ids[-1] < record["vocab_size"]:
        raise ValueError(f"{path}: token_ids leave the vocabulary of {record['vocab_size']}")
    if not record["modules"] or not {"dtype", "sha256"} <= record["base"].keys():
        raise ValueError(f"{path}: the base model's fingerprint or module is missing")


def _read_tensors(path: Path, checksums: dict[str, str], names: set[str]) -> dict[str, Tensor]:
    content = path.read_bytes()
    if _sha256(content) != checksums.get(path.name):
        raise ValueError(
            f"{path} does not match its checksum in {TICKET_JSON}; it is truncated, damaged or not its own"
        )
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if tensors.keys() != names:
        raise ValueError(f"{path} holds {sorted(tensors)} where {sorted(names)} belong")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _record_sha256(record: dict[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
