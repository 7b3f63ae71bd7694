"""Whole rows out of the flat parts in which ZeRO keeps a matrix.

Under ZeRO-3 a rank reads the fp32 master weights of its own part, and only the pieces of rows that are broken at its edges
travel, from the rank that holds them to the one that owns the row. In stages 1 and 2 the masters are cut by the optimizer's
own plan, so rows travel once to their owners; in stage 0, and without an engine, every rank has all.

Legend: V rows of the matrix, D elements of a row, R rows that this rank owns, K chosen rows; `flat` is a part of the
flattened matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ksl_ds.sharding import cluster
from ksl_ds.sharding.geometry import Span, even_rows, owned_rows, travelling, zero3_parts


@dataclass
class Traffic:
    """Bytes that this rank sent and received; an all-reduce counts as a ring does it, 2 (n - 1) / n of its size each way."""

    sent: int = 0
    received: int = 0

    def reduced(self, tensor: Tensor) -> None:
        size = 2 * (cluster.world_size() - 1) * tensor.numel() * tensor.element_size() // cluster.world_size()
        self.sent += size
        self.received += size


def master_part(parameter: Any) -> tuple[Tensor, int]:
    """This rank's live flat part of a parameter, and its offset: what the optimizer steps.

    The fp32 master values where an optimizer holds some, else the weights themselves. Padding is left out. Writing to the
    tensor writes to the optimizer's copy only; see `RowShard.write` for both.
    """
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.ds_numel
        start = size * dist.get_rank(parameter.ds_process_group)
        real = max(0, min(size, parameter.ds_numel - start))
        optimizer = getattr(parameter, "_z3_optimizer", None)
        if optimizer is not None and parameter.requires_grad:
            # DeepSpeed's public getter copies to the GPU what is offloaded; the optimizer's own view is wanted here.
            flat, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
            return flat.detach()[:real], start
        return parameter.ds_tensor.detach()[:real], start
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        return mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
    return parameter.detach().view(-1), 0


class RowShard:
    """The rows of a (V, D) parameter that this rank owns: plain, or under ZeRO stages 0 to 3.

    Which rows a rank owns never changes in a job, whatever engine comes and goes. All methods are collective.

    Attributes
    ----------
    num_rows, row_length : V and D
    start, stop : this rank owns rows start .. stop - 1
    traffic : bytes that this object's communication moved
    """

    def __init__(self, parameter: nn.Parameter):
        self._parameter: Any = parameter  # DeepSpeed adds attributes to it
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        self.num_rows, self.row_length = shape
        self.traffic = Traffic()
        if hasattr(parameter, "ds_tensor"):
            self._rows = owned_rows(self._zero3_parts(), self.num_rows, self.row_length)
        else:
            self._rows = even_rows(self.num_rows, cluster.world_size())
        self.start, self.stop = self._rows[cluster.rank()]

    def read(self) -> Tensor:
        """A copy of this rank's whole rows, float32 (R, D), in host memory."""
        rows_RD = torch.empty(self.stop - self.start, self.row_length)
        for first, block_BD in self.blocks(max(1, len(rows_RD))):
            rows_RD[first - self.start : first - self.start + len(block_BD)] = block_BD
        return rows_RD

    def blocks(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """This rank's rows, at most `num_rows` at once: the number of the first, and the rows, where they lie.

        Blocks may be live views of the weights; copy what shall stay. The pieces of broken rows travel when the first
        block is asked for.
        """
        parts = self._parts()
        if parts is None:
            weight_VD = self._parameter.detach()
            for first in range(self.start, self.stop, num_rows):
                yield first, weight_VD[first : min(first + num_rows, self.stop)]
            return
        flat, held = self._local(parts)
        own = Span(self.start * self.row_length, self.stop * self.row_length)
        moves = travelling(parts, self._rows, self.row_length)
        outgoing = {
            owner: flat[span.start - held.start : span.stop - held.start]
            for (holder, owner), span in moves.items()
            if holder == cluster.rank()
        }
        incoming = {holder: span for (holder, owner), span in moves.items() if owner == cluster.rank()}
        pieces = self._exchange(outgoing, {rank: span.size for rank, span in incoming.items()})
        # Rows that lie here as a whole, then those that had to be put together: under ZeRO-3 the last one at most.
        here = held & own
        first_whole, end_whole = (
            -(-here.start // self.row_length),
            max(-(-here.start // self.row_length), here.stop // self.row_length),
        )
        for first in range(first_whole, end_whole, num_rows):
            stop = min(first + num_rows, end_whole)
            yield (
                first,
                flat[first * self.row_length - held.start : stop * self.row_length - held.start].view(
                    -1, self.row_length
                ),
            )
        for rows in (Span(self.start, min(first_whole, self.stop)), Span(max(end_whole, self.start), self.stop)):
            if rows.size <= 0:
                continue
            wanted = Span(rows.start * self.row_length, rows.stop * self.row_length)
            values = torch.empty(wanted.size, dtype=torch.float32, device=cluster.device())
            local = held & wanted
            values[local.start - wanted.start : local.stop - wanted.start] = flat[
                local.start - held.start : local.stop - held.start
            ]
            for holder, piece in pieces.items():
                span = incoming[holder] & wanted
                offset = incoming[holder].start
                values[span.start - wanted.start : span.stop - wanted.start] = piece[
                    span.start - offset : span.stop - offset
                ]
            yield from zip(
                range(rows.start, rows.stop, num_rows), values.view(-1, self.row_length).split(num_rows), strict=True
            )

    def write(self, rows_RD: Tensor) -> None:
        """Puts this rank's rows back, into the fp32 masters and into the weights that compute."""
        if not hasattr(self._parameter, "ds_tensor"):
            # Every rank computes with the whole matrix, wherever its masters lie.
            everything = torch.zeros(self.num_rows, self.row_length, dtype=torch.int32, device=cluster.device())
            everything[self.start : self.stop] = rows_RD.to(everything.device).view(torch.int32)
            self.traffic.reduced(everything)
            self._store(cluster.all_reduce(everything).view(torch.float32).flatten(), 0)
            return
        parts = self._zero3_parts()
        held = parts[cluster.rank()]
        own = Span(self.start * self.row_length, self.stop * self.row_length)
        flat_rows = rows_RD.flatten()
        flat = torch.empty(held.size, dtype=torch.float32)
        kept = held & own
        flat[kept.start - held.start : kept.stop - held.start] = flat_rows[
            kept.start - own.start : kept.stop - own.start
        ]
        # The way that `read` takes, backwards.
        moves = travelling(parts, self._rows, self.row_length)
        outgoing = {
            holder: flat_rows[span.start - own.start : span.stop - own.start]
            for (holder, owner), span in moves.items()
            if owner == cluster.rank()
        }
        incoming = {owner: span for (holder, owner), span in moves.items() if holder == cluster.rank()}
        for owner, piece in self._exchange(outgoing, {rank: span.size for rank, span in incoming.items()}).items():
            span = incoming[owner]
            flat[span.start - held.start : span.stop - held.start] = piece.cpu()
        self._store(flat, held.start)

    def read_rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64, the same on every rank) as float32 (K, D) in host memory, on every rank."""
        parts = self._parts()
        if parts is None:
            return self._parameter.detach()[ids.to(self._parameter.device)].to("cpu", torch.float32, copy=True)
        flat, held = self._local(parts)
        positions = self._elements(ids)
        mine = (positions >= held.start) & (positions < held.stop)
        # Summed as integers, of which all but one are 0: a float -0.0 would not survive the addition.
        bits = torch.zeros(positions.shape, dtype=torch.int32, device=cluster.device())
        local = flat[(positions[mine] - held.start).to(flat.device)].to(torch.float32)
        bits[mine.to(bits.device)] = local.to(bits.device).view(torch.int32)
        self.traffic.reduced(bits)
        return cluster.all_reduce(bits).view(torch.float32).cpu()

    def write_rows(self, ids: Tensor, rows_KD: Tensor) -> None:
        """Puts rows `ids` in place, into the fp32 masters and the weights; every rank passes the same rows."""
        for flat, start in self._copies():
            positions = self._elements(ids) - start
            mine = (positions >= 0) & (positions < flat.numel())
            flat[positions[mine].to(flat.device)] = rows_KD[mine].to(flat)
        self._release()

    def _parts(self) -> list[Span] | None:
        """The span of the authoritative values on each rank; None where every rank has all."""
        if hasattr(self._parameter, "ds_tensor"):
            return self._zero3_parts()
        mapping = getattr(self._parameter, "_hp_mapping", None)
        here = None
        if mapping is not None:
            start = mapping.lp_fragment_address.start
            here = (start, start + mapping.hp_fragment.numel())
        spans = cluster.gather_objects(here)
        if all(span is None for span in spans):
            return None
        # A rank whose part of the optimizer holds none of this parameter has an empty span in its place.
        parts, position = [], 0
        for span in spans:
            parts.append(Span(position, position) if span is None else Span(*span))
            position = parts[-1].stop
        return parts

    def _zero3_parts(self) -> list[Span]:
        return zero3_parts(self._parameter.ds_numel, self._parameter.ds_tensor.ds_numel, cluster.world_size())

    def _local(self, parts: list[Span]) -> tuple[Tensor, Span]:
        held = parts[cluster.rank()]
        return master_part(self._parameter)[0][: held.size], held

    def _copies(self) -> list[tuple[Tensor, int]]:
        """Every flat tensor on this rank that holds values of the parameter, with its offset."""
        copies = [master_part(self._parameter)]
        if hasattr(self._parameter, "ds_tensor"):
            weights = self._parameter.ds_tensor.detach()
            copies.append((weights[: copies[0][0].numel()], copies[0][1]))
        elif getattr(self._parameter, "_hp_mapping", None) is not None:
            copies.append((self._parameter.detach().view(-1), 0))
        return copies

    def _store(self, flat: Tensor, start: int) -> None:
        for copy, offset in self._copies():
            span = Span(start, start + flat.numel()) & Span(offset, offset + copy.numel())
            copy[span.start - offset : span.stop - offset] = flat[span.start - start : span.stop - start].to(copy)
        self._release()

    def _release(self) -> None:
        """Drops a gathered copy of a small parameter, which would be out of date."""
        if hasattr(self._parameter, "ds_status") and self._parameter.ds_status.name == "AVAILABLE":
            self._parameter.partition()

    def _elements(self, ids: Tensor) -> Tensor:
        """Flat positions of rows: int64 (K, D)."""
        return ids[:, None].cpu() * self.row_length + torch.arange(self.row_length)

    def _exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, int]) -> dict[int, Tensor]:
        """Sends pieces to ranks and returns those of the given sizes from others, all float32."""
        device = cluster.device()
        sends = {rank: piece.to(device, torch.float32).contiguous() for rank, piece in outgoing.items()}
        received = {rank: torch.empty(size, dtype=torch.float32, device=device) for rank, size in incoming.items()}
        operations = [dist.P2POp(dist.isend, piece, rank) for rank, piece in sends.items()]
        operations += [dist.P2POp(dist.irecv, piece, rank) for rank, piece in received.items()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.traffic.sent += sum(piece.numel() * 4 for piece in sends.values())
        self.traffic.received += sum(piece.numel() * 4 for piece in received.values())
        return received
