"""Whole rows from the flat parts in which ZeRO keeps a matrix.

Under ZeRO-3 a rank reads the fp32 master weights of its own part; only the pieces of rows that cross a partition's edge are
sent, from the rank that holds them to the row's owner. Under hierarchical partitioning (hpZ) these are the primary parts;
the host's copies are dropped after a write. In stages 1 and 2 the optimizer decides how the masters are
partitioned: nearly the same if the matrix trains alone, else rows are sent once to their owners. In stage 0 and without an
engine every rank holds all rows; masters.py finds the fp32 masters of 16-bit weights in stage 0.

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

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.sharding.geometry import Span, blocks_of, even_rows, owned_rows, travelling, whole_rows, zero3_parts
from ksl_ds.sharding.masters import hidden_master
from ksl_ds.sharding.partition import drop_host_copy, full_shape, is_partitioned, local_part

BLOCK_BYTES = 64 << 20  # of rows processed or broadcast at once


@dataclass
class Traffic:
    """Communication of rows, with counts of the bytes that this rank sends and receives.

    An all-reduce counts as a ring all-reduce, 2 (n - 1) / n of its size each way; a broadcast counts its size once at the
    sender and at each receiver. The few bytes that synchronise errors are not counted.
    """

    sent: int = 0
    received: int = 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduces in place over all ranks and returns the tensor."""
        size = 2 * (distributed.world_size() - 1) * tensor.nbytes // distributed.world_size()
        self.sent += size
        self.received += size
        return distributed.all_reduce(tensor, op)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Broadcasts rank `source`'s tensor, in place."""
        if distributed.world_size() > 1:
            dist.broadcast(tensor, source)
            self.sent += tensor.nbytes if source == distributed.rank() else 0
            self.received += tensor.nbytes if source != distributed.rank() else 0

    def exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, int]) -> dict[int, Tensor]:
        """Sends flat float32 tensors point to point.

        Parameters
        ----------
        outgoing
            Pieces to send, by rank.
        incoming
            Sizes of the pieces to receive, by rank.

        Returns
        -------
        dict
            The received pieces, by rank.
        """
        device = distributed.device()
        sends = {rank: piece.to(device, torch.float32).contiguous() for rank, piece in outgoing.items()}
        received = {rank: torch.empty(size, dtype=torch.float32, device=device) for rank, size in incoming.items()}
        operations = [dist.P2POp(dist.isend, piece, rank) for rank, piece in sends.items()]
        operations += [dist.P2POp(dist.irecv, piece, rank) for rank, piece in received.items()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.sent += sum(piece.nbytes for piece in sends.values())
        self.received += sum(piece.nbytes for piece in received.values())
        return received


def master_part(parameter: Any, *, search: bool = True) -> tuple[Tensor, int]:
    """This rank's flat part of a parameter that the optimizer steps, a view without padding, and its offset.

    It is the fp32 master if an optimizer holds one, else the weights. Writing to it changes the optimizer's copy only;
    `RowShard.write` changes both. For `search` see `hidden_master`.

    Raises
    ------
    UserError
        If the optimizer states are offloaded to NVMe.
    """
    if is_partitioned(parameter):
        part, start = local_part(parameter)
        optimizer = getattr(parameter, "_z3_optimizer", None)
        if optimizer is not None and parameter.requires_grad:
            if optimizer.swap_optimizer:
                raise UserError("optimizer states offloaded to NVMe are not supported; offload to cpu instead")
            # DeepSpeed's public getter would copy offloaded states to the GPU; this is the optimizer's own view.
            flat, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
            return flat.detach()[: part.numel()], start
        return part, start
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        return mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
    master = hidden_master(parameter, search=search)
    return (parameter.detach() if master is None else master).view(-1), 0


def copies_of(parameter: Any) -> list[tuple[Tensor, Span]]:
    """Every flat tensor on this rank that holds values of a parameter, a view, with its span. Raises as `master_part`."""
    flat, start = master_part(parameter)
    copies = [(flat, Span(start, start + flat.numel()))]
    if is_partitioned(parameter):
        copies.append((parameter.ds_tensor.detach()[: flat.numel()], copies[0][1]))
    else:
        weights = parameter.detach().view(-1)
        if weights.data_ptr() != flat.data_ptr():  # the optimizer has masters
            copies.append((weights, Span(0, weights.numel())))
    return copies


def drop_gathered(parameter: Any) -> None:
    """After a write: drops a gathered copy of a small parameter, and the host's copy under hpZ, which would be stale."""
    if hasattr(parameter, "ds_status") and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
    drop_host_copy(parameter)


def is_stepped_by_zero(parameter: Any) -> bool:
    """Whether ZeRO stages 1 to 3 step a parameter, on this or another rank."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


class RowShard:
    """The rows of a (V, D) parameter that this rank owns: plain, or under ZeRO stages 0 to 3.

    A rank owns the same rows for the whole job, with any engine. The constructor and all methods are collective.

    Parameters
    ----------
    parameter
        The (V, D) parameter.

    Attributes
    ----------
    num_rows, row_length
        V and D.
    dtype
        Of the weights in the model; master weights, and all rows read here, are float32.
    start, stop
        This rank owns rows start .. stop - 1.
    traffic
        Bytes sent and received by this object.

    Raises
    ------
    UserError
        For a parameter that DeepSpeed keeps in several groups of ranks (MiCS) or on NVMe.
    """

    def __init__(self, parameter: nn.Parameter):
        self._parameter: Any = parameter  # DeepSpeed adds attributes to it
        # NCCL needs a collective of all ranks before the first point-to-point communication.
        distributed.raise_if_any_rank(unsupported(parameter))
        self.num_rows, self.row_length = full_shape(parameter)
        self.dtype: torch.dtype = parameter.dtype
        self.traffic = Traffic()
        if is_partitioned(parameter):
            self._rows = owned_rows(self._zero3_parts(), self.num_rows, self.row_length)
        else:
            self._rows = even_rows(self.num_rows, distributed.world_size())
        self.start, self.stop = self._rows[distributed.rank()]

    def read(self) -> Tensor:
        """A copy of this rank's rows, float32 (R, D), in host memory."""
        rows_RD = torch.empty(self.stop - self.start, self.row_length)
        for first, block_BD in self.blocks(max(1, len(rows_RD))):
            rows_RD[first - self.start : first - self.start + len(block_BD)] = block_BD
        return rows_RD

    def blocks(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """This rank's rows in blocks of at most `num_rows`: the first row's number, and float32 rows on their device.

        Blocks may be views of the weights; copy what you keep. Pieces of rows are exchanged before the first block.
        """
        parts = self._parts()
        own = Span(self.start, self.stop)
        if parts is None:
            weight_VD = master_part(self._parameter)[0].view(self.num_rows, self.row_length)
            for rows in blocks_of(own, num_rows):
                yield rows.start, weight_VD[rows.start : rows.stop]
            return
        flat, held = self._local(parts)
        outgoing, incoming = self._moves(parts)
        pieces = self.traffic.exchange(
            {rank: cut(flat, held, span) for rank, span in outgoing.items()},
            {rank: span.size for rank, span in incoming.items()},
        )
        # Complete rows first, then those assembled from pieces: under ZeRO-3 the last one at most.
        whole = whole_rows(held & self._elements(own), self.row_length)
        for rows in blocks_of(whole, num_rows):
            yield rows.start, cut(flat, held, self._elements(rows)).view(-1, self.row_length)
        found = [(held, flat), *((span, pieces[rank]) for rank, span in incoming.items())]
        for broken in (Span(own.start, min(whole.start, own.stop)), Span(max(whole.stop, own.start), own.stop)):
            for rows in blocks_of(broken, num_rows):
                wanted = self._elements(rows)
                values = torch.empty(wanted.size, dtype=torch.float32, device=distributed.device())
                for span, piece in found:
                    cut(values, wanted, span & wanted).copy_(cut(piece, span, span & wanted))
                yield rows.start, values.view(-1, self.row_length)

    def write(self, rows_RD: Tensor) -> None:
        """Writes this rank's rows, float32 (R, D), to the fp32 masters and to the model's weights."""
        if not is_partitioned(self._parameter):
            self._write_everywhere(rows_RD)
            return
        parts = self._zero3_parts()
        held = parts[distributed.rank()]
        own = self._elements(Span(self.start, self.stop))
        flat_rows = rows_RD.flatten()
        flat = torch.empty(held.size)
        cut(flat, held, held & own).copy_(cut(flat_rows, own, held & own))
        # The exchange of `blocks`, reversed.
        incoming, outgoing = self._moves(parts)
        pieces = self.traffic.exchange(
            {rank: cut(flat_rows, own, span) for rank, span in outgoing.items()},
            {rank: span.size for rank, span in incoming.items()},
        )
        for rank, span in incoming.items():
            cut(flat, held, span).copy_(pieces[rank])
        store(flat, held, copies_of(self._parameter))
        drop_gathered(self._parameter)

    def _write_everywhere(self, rows_RD: Tensor) -> None:
        """Broadcasts each owner's rows in blocks, since every rank holds the whole matrix."""
        copies = copies_of(self._parameter)
        for owner, rows_of_owner in enumerate(self._rows):
            for rows in blocks_of(rows_of_owner, self.rows_of_a_block()):
                block_BD = torch.empty(rows.size, self.row_length, device=distributed.device())
                if owner == distributed.rank():
                    block_BD.copy_(rows_RD[rows.start - self.start : rows.stop - self.start])
                self.traffic.broadcast(block_BD, owner)
                store(block_BD.flatten(), self._elements(rows), copies)

    def read_rows(self, ids: Tensor) -> Tensor:
        """Gathers rows `ids` (int64 (K,), the same on every rank) on every rank: float32 (K, D) in host memory."""
        parts = self._parts()
        if parts is None:
            weight_VD = master_part(self._parameter)[0].view(self.num_rows, self.row_length)
            return weight_VD[ids.to(weight_VD.device)].to("cpu", torch.float32, copy=True)
        flat, held = self._local(parts)
        rows_KD = torch.zeros(len(ids), self.row_length, device=distributed.device())
        for place, row in enumerate(map(self._row, ids.tolist())):
            cut(rows_KD[place], row, row & held).copy_(cut(flat, held, row & held))
        # Summed as integers, all but one of them 0: the sum of floats would turn -0.0 into 0.0.
        return self.traffic.all_reduce(rows_KD.view(torch.int32)).view(torch.float32).cpu()

    def write_rows(self, ids: Tensor, rows_KD: Tensor) -> None:
        """Writes rows `ids` to the fp32 masters and the weights; every rank passes the same ids and rows (K, D)."""
        copies = copies_of(self._parameter)
        for row, row_D in zip(map(self._row, ids.tolist()), rows_KD, strict=True):
            store(row_D, row, copies)
        drop_gathered(self._parameter)

    def _parts(self) -> list[Span] | None:
        """Each rank's span of master values; None if every rank holds all."""
        if is_partitioned(self._parameter):
            return self._zero3_parts()
        mapping = getattr(self._parameter, "_hp_mapping", None)
        here = None
        if mapping is not None:
            start = mapping.lp_fragment_address.start
            here = (start, start + mapping.hp_fragment.numel())
        spans = distributed.gather_objects(here)
        if all(span is None for span in spans):
            return None
        # An empty span for a rank whose part of the optimizer holds none of this parameter.
        parts = []
        position = 0
        for span in spans:
            parts.append(Span(position, position) if span is None else Span(*span))
            position = parts[-1].stop
        return parts

    def _zero3_parts(self) -> list[Span]:
        return zero3_parts(self._parameter.ds_numel, self._parameter.ds_tensor.ds_numel, distributed.world_size())

    def _local(self, parts: list[Span]) -> tuple[Tensor, Span]:
        held = parts[distributed.rank()]
        return master_part(self._parameter)[0][: held.size], held

    def _moves(self, parts: list[Span]) -> tuple[dict[int, Span], dict[int, Span]]:
        """Elements here that belong to other ranks' rows, by owner, and of our rows on other ranks, by holder."""
        moves = travelling(parts, self._rows, self.row_length)
        mine = {owner: span for (holder, owner), span in moves.items() if holder == distributed.rank()}
        theirs = {holder: span for (holder, owner), span in moves.items() if owner == distributed.rank()}
        return mine, theirs

    def _elements(self, rows: Span) -> Span:
        return Span(rows.start * self.row_length, rows.stop * self.row_length)

    def _row(self, number: int) -> Span:
        return self._elements(Span(number, number + 1))

    def rows_of_a_block(self) -> int:
        """Rows that make about BLOCK_BYTES."""
        return max(1, BLOCK_BYTES // (4 * self.row_length))


def store(flat: Tensor, span: Span, copies: list[tuple[Tensor, Span]]) -> None:
    """Copies elements `span` to every flat tensor that holds some of them."""
    for copy, held in copies:
        cut(copy, held, held & span).copy_(cut(flat, span, held & span))


def cut(flat: Tensor, held: Span, wanted: Span) -> Tensor:
    """A view of elements `wanted` of a flat tensor that holds elements `held`."""
    return flat[wanted.start - held.start : wanted.stop - held.start]


def unsupported(parameter: Any) -> str | None:
    """A sentence about the DeepSpeed feature under which rows of this parameter cannot be read; None if supported."""
    if not is_partitioned(parameter):
        return None
    features = {
        "MiCS (mics_shard_size)": dist.get_world_size(parameter.ds_process_group) != distributed.world_size(),
        "offloading of parameters to NVMe": parameter.nvme_swapper is not None,
    }
    used = [name for name, is_used in features.items() if is_used]
    return (
        f"DeepSpeed's {used[0]} is not supported for the embedding; remove it from the DeepSpeed JSON" if used else None
    )
