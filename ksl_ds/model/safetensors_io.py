"""Safetensors shards: reading rows of a tensor, and writing files that differ from others in known places only.

The format is 8 bytes of header length, a JSON header, raw tensors. A changed shard is the old file copied, without the
tensors that are written anew, then written in place: nothing else can differ, and memory stays at one block. Untouched shards
are hard links where the file system allows: they cost no disk, and share their bytes with the base, so neither may be
edited in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksl_ds.errors import UserError, reason_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
BLOCK_BYTES = 1 << 26


class Shards:
    """The tensors of a folder with model.safetensors, or with shards and their index. Reads are memory-mapped.

    Raises
    ------
    UserError
        On opening: no weights, only pickled weights, a missing shard. Later: a damaged shard, a missing tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open_files: dict[str, Any] = {}
        self.shard_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        if (self.path / INDEX).is_file():
            try:
                index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
                shard_of = dict(index["weight_map"])
                dict(index["metadata"])  # transformers reads it
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{self.path / INDEX} is not an index of shards, an object with metadata and weight_map "
                    f"({reason_of(error)})"
                ) from None
            strange = next((name for name, shard in shard_of.items() if not isinstance(shard, str)), None)
            if strange is not None:
                raise UserError(
                    f"{self.path / INDEX}: weight_map: {strange}: {shard_of[strange]!r} is not a file's name"
                )
            for shard in set(shard_of.values()):
                if Path(shard).name != shard or not (self.path / shard).is_file():
                    raise UserError(f"{self.path} is a model folder without weights: shard {shard} is missing")
            return shard_of
        pickled = sorted(path.name for path in self.path.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise UserError(
                f"{self.path} holds pickled weights only ({pickled[0]}), which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise UserError(f"{self.path} is a model folder without weights: no {SINGLE} and no {INDEX}")

    def _file(self, shard: str) -> Any:
        if shard not in self._open_files:
            try:
                self._open_files[shard] = safe_open(self.path / shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / shard} is truncated or not a safetensors file: {error}") from None
        return self._open_files[shard]

    def _slice(self, name: str) -> Any:
        if name not in self.shard_of:
            raise UserError(f"{self.path} has no tensor {name}")
        try:
            return self._file(self.shard_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{self.path / self.shard_of[name]}: tensor {name}: {error}") from None

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor. Raises UserError for a quantised one."""
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {kind}, which is not supported; give the 16-bit model")
        return DTYPES[kind]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor along its first dimension; nothing else is read. May be a mapped view."""
        if start >= stop:
            return torch.empty((0, *self.shape(name)[1:]), dtype=self.dtype(name))
        return self._slice(name)[start:stop]

    def read_slices(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, cut along its first dimensions; nothing else is read. May be a mapped view."""
        if not self.shape(name):  # a slice of a scalar does not exist
            return self._file(self.shard_of[name]).get_tensor(name)
        return self._slice(name)[slices]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor; reads only the rows they lie in."""
        shape = self.shape(name)
        if not shape:
            return self._file(self.shard_of[name]).get_tensor(name).reshape(1)[start:stop]
        width = torch.Size(shape[1:]).numel()
        if start >= stop or width == 0:
            return torch.empty(0, dtype=self.dtype(name))
        first = start // width
        return self.read_rows(name, first, -(-stop // width)).flatten()[start - first * width : stop - first * width]

    def read_ids(self, name: str, ids: list[int]) -> Tensor:
        """The rows `ids` of a matrix, (K, D)."""
        rows = [self.read_rows(name, number, number + 1) for number in ids]
        return torch.cat(rows) if rows else self.read_rows(name, 0, 0)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in blocks of rows of about 64 MiB."""
        shape = self.shape(name)
        row_bytes = torch.Size(shape[1:]).numel() * self.dtype(name).itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, shape[0], step):
            yield self.read_rows(name, start, min(start + step, shape[0]))


def link_or_copy(source: Path, target: Path, *, link: bool) -> None:
    """Makes `target` a hard link to `source` if `link` and the file system allow it, else a copy."""
    source = source.resolve()  # in the Hub's cache files are symbolic links
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(source, target)


def copy_shard(source: Path, target: Path, *, leave_out: Collection[str]) -> None:
    """Copies a safetensors file without the values of some tensors, whose place stays empty for a `ShardWriter`."""
    with source.open("rb") as old, target.open("wb") as new:
        begin, header = _read_header(old)
        size = old.seek(0, os.SEEK_END)
        new.truncate(size)
        position = 0
        for start, stop in [*sorted(header[name]["data_offsets"] for name in leave_out), (size - begin, 0)]:
            old.seek(position)
            new.seek(position)
            while (left := begin + start - position) > 0:
                position += new.write(old.read(min(left, BLOCK_BYTES)))
            position = begin + stop


def new_shard(shard: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Creates a safetensors file with one tensor, whose place stays empty for a `ShardWriter`."""
    kind = next(kind for kind, known in DTYPES.items() if known is dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, name: {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with shard.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


class ShardWriter:
    """Writes into the tensors of a folder's safetensors files, in any order; the file of the last write stays open.

    Parameters
    ----------
    folder
        Where the files are, with their headers.
    shard_of
        Each tensor's file.
    """

    def __init__(self, folder: Path, shard_of: Mapping[str, str]):
        self._folder = folder
        self._shard_of = shard_of
        self._open_shard: str | None = None
        self._file: BinaryIO | None = None
        self._begin = 0
        self._header: dict[str, Any] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Writes elements from `start` on of a flattened tensor, in the dtype of its file; converts block by block."""
        file = self._open(self._shard_of[name])
        entry = self._header[name]
        dtype = DTYPES[entry["dtype"]]
        file.seek(self._begin + entry["data_offsets"][0] + start * dtype.itemsize)
        for block in values.detach().reshape(-1).split(BLOCK_BYTES // max(values.itemsize, dtype.itemsize)):
            file.write(block.cpu().to(dtype).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Closes the file that is open, once it is on the disk: what waits to be written never exceeds one file."""
        file = self._file
        self._open_shard = self._file = None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())

    def _open(self, shard: str) -> BinaryIO:
        if self._file is None or shard != self._open_shard:
            self.close()
            self._file = (self._folder / shard).open("r+b")
            self._open_shard = shard
            self._begin, self._header = _read_header(self._file)
        return self._file


def _read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the first tensor begins in a safetensors file, and what its header says of each."""
    size = int.from_bytes(file.read(8), "little")
    return 8 + size, json.loads(file.read(size))
