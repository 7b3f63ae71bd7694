"""The draw on a sharded embedding: every rank tests its own rows, and one integer per token is all-reduced.

Legend: V tokens, D coordinates, R rows of this rank, K drawn rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.config.schema import Draw
from ksl_ds.errors import UserError
from ksl_ds.lottery.ks import row_counts
from ksl_ds.lottery.selection import RULES
from ksl_ds.lottery.ticket import Shift, Ticket, choose_rows, make_ticket, measure_shift
from ksl_ds.sharding.rows import RowShard, Traffic


def sharded_shift(shard: RowShard, before_RD: Tensor, *, lengths: bool = True) -> Shift:
    """The KS test of all rows against their values before training. Collective; every rank gets the same result.

    Parameters
    ----------
    shard
        The embedding, whose fp32 master weights are tested.
    before_RD
        float32 (R, D): this rank's rows before training, as `shard.read` returned them.
    lengths
        Also compute the shift norms and ratios, else they are NaN. The method itself needs only the counts.

    Raises
    ------
    UserError
        On every rank, for a row with NaN or infinity; names the token.
    """
    message = None
    count_R = torch.zeros(len(before_RD), dtype=torch.int32)
    norm_R, ratio_R = torch.full_like(before_RD[:, 0], torch.nan), torch.full_like(before_RD[:, 0], torch.nan)
    for first, after_BD in shard.blocks(shard.rows_of_a_block()):
        rows = slice(first - shard.start, first - shard.start + len(after_BD))
        before_BD = before_RD[rows].to(after_BD.device)
        try:
            if lengths:
                block = measure_shift(before_BD, after_BD, first_row=first)
                count_R[rows] = block.count_V
                norm_R[rows] = block.shift_norm_V
                ratio_R[rows] = block.shift_ratio_V
            else:
                count_R[rows] = row_counts(before_BD, after_BD, first_row=first).cpu()
        except ValueError as error:
            message = f"embedding after tuning: {error}"
            break
    distributed.raise_if_any_rank(message)
    own = Shift(count_R, norm_R, ratio_R, shard.row_length, "float32")
    return gather_shift(own, shard.start, shard.num_rows, shard.traffic, lengths=lengths)


def gather_shift(own: Shift, start: int, num_rows: int, traffic: Traffic, *, lengths: bool = True) -> Shift:
    """All-reduces the ranks' results to one Shift of all rows.

    Parameters
    ----------
    own
        This rank's result, of consecutive rows.
    start
        Its first row.
    num_rows
        Rows on all ranks together.
    traffic
        Counts the bytes.
    lengths
        Whether `own` has shift norms and ratios.

    Raises
    ------
    RuntimeError
        On every rank, if a checksum of the result differs between ranks.
    """

    def everywhere(values_R: Tensor) -> Tensor:
        values_V = torch.zeros(num_rows, dtype=values_R.dtype, device=distributed.device())
        values_V[start : start + len(values_R)] = values_R.to(values_V.device)
        return traffic.all_reduce(values_V).cpu()

    count_V = everywhere(own.count_V)
    norm_V = ratio_V = torch.full((num_rows,), torch.nan)
    if lengths:
        norm_V, ratio_V = everywhere(own.shift_norm_V), everywhere(own.shift_ratio_V)
    digest = hashlib.sha256(b"".join(vector.numpy().tobytes() for vector in (count_V, norm_V, ratio_V))).digest()
    least, most = (
        traffic.all_reduce(torch.tensor(list(digest), dtype=torch.int32, device=distributed.device()), op)
        for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)
    )
    if not torch.equal(least, most):
        raise RuntimeError("the ranks disagree about the result of the draw: a collective gave them different values")
    return Shift(count_V, norm_V, ratio_V, own.num_samples, own.tested_dtype)


def draw_from_shard(
    shard: RowShard,
    before_RD: Tensor,
    draw: Draw,
    *,
    seed: int,
    frequency_V: Tensor | None,
    tokens: list[str] | None,
    embedding_scope: str,
    source: dict[str, Any],
) -> tuple[Shift, Ticket]:
    """Tests all rows, selects some and gathers them. Collective.

    Parameters
    ----------
    shard
        The embedding after tuning.
    before_RD
        float32 (R, D): this rank's rows before tuning.
    draw
        Selection rule, alpha, p-value method and top_k.
    seed
        For selection "random".
    frequency_V
        int64 (V,): how often each token occurs in the training text; None where that is not known.
    tokens
        V strings, the vocabulary as text; None where there is no tokenizer.
    embedding_scope
        "input" or "shared", recorded in the ticket.
    source
        Provenance, recorded in the ticket; what a JSON file can hold.

    Returns
    -------
    Shift, Ticket
        The test of all tokens, and the ticket, which may be empty; the same on every rank.

    Raises
    ------
    UserError
        On every rank, for NaN or infinity in a row, or a selection rule that cannot be applied.
    """
    shift = sharded_shift(shard, before_RD)
    ids_K = ids_of_draw(shift, draw, seed=seed, frequency_V=frequency_V)
    rows_KD = shard.read_rows(ids_K)
    if frequency_V is not None:
        source = {**source, "train_frequency": frequency_V[ids_K].tolist()}
    return shift, make_ticket(
        shift,
        ids_K,
        before_rows(shard, before_RD, ids_K).to(shard.dtype),
        rows_KD,
        selection=draw.selection,
        alpha=draw.alpha,
        method=draw.method,
        tokens=None if tokens is None else [tokens[i] for i in ids_K.tolist()],
        embedding_scope=embedding_scope,
        source=source,
    )


def ids_of_draw(shift: Shift, draw: Draw, *, seed: int, frequency_V: Tensor | None) -> Tensor:
    """The token ids that a recipe's `draw` selects, int64 (K,). Raises UserError if the rule cannot be applied."""
    try:
        return choose_rows(
            shift,
            selection=draw.selection,
            alpha=draw.alpha,
            method=draw.method,
            top_k=draw.top_k,
            seed=seed,
            frequency_V=frequency_V,
        )
    except ValueError as error:
        raise UserError(f"draw: {error}") from None


def before_rows(shard: RowShard, before_RD: Tensor, ids_K: Tensor) -> Tensor:
    """Rows `ids_K` before tuning, float32 (K, D), gathered on every rank."""
    rows_KD = torch.zeros(len(ids_K), shard.row_length, dtype=torch.int32)
    mine_K = (ids_K >= shard.start) & (ids_K < shard.stop)
    rows_KD[mine_K] = before_RD[ids_K[mine_K] - shard.start].view(torch.int32)
    return shard.traffic.all_reduce(rows_KD.to(distributed.device())).cpu().view(torch.float32)


class DrawMonitor:
    """Draws every `draw.every` steps of embed tuning and decides on early stopping. Only reads the weights.

    Parameters
    ----------
    shard, before_RD
        The embedding, and this rank's rows of it before training.
    draw
        Selection rule, interval and early stopping.
    seed, frequency_V
        As for `draw_from_shard`.
    """

    def __init__(self, shard: RowShard, before_RD: Tensor, draw: Draw, *, seed: int, frequency_V: Tensor | None):
        self._shard = shard
        self._before_RD = before_RD
        self._draw = draw
        self._seed = seed
        self._frequency_V = frequency_V
        self._last: set[int] = set()
        self._settled_draws = 0
        self._watched_since = time.perf_counter()

    def __call__(self, step: int) -> tuple[dict[str, Any], bool]:
        """The numbers to log of the draw after `step`, and whether to stop early. ({}, False) between draws."""
        if self._draw.every is None or step % self._draw.every:
            return {}, False
        started = time.perf_counter()
        moved = dataclasses.replace(self._shard.traffic)
        lengths = bool(RULES[self._draw.selection].inputs & {"shift_norm_V", "shift_ratio_V"})
        shift = sharded_shift(self._shard, self._before_RD, lengths=lengths)
        ids_K = ids_of_draw(shift, self._draw, seed=self._seed, frequency_V=self._frequency_V)
        ticket = set(ids_K.tolist())
        overlap = len(ticket & self._last) / len(ticket | self._last) if ticket | self._last else 0.0
        self._last = ticket
        settled = self._draw.early_stopping
        if settled is not None:
            self._settled_draws = self._settled_draws + 1 if overlap >= settled.overlap else 0
        statistic_V = shift.count_V.double() / shift.num_samples
        ended = time.perf_counter()
        numbers = {
            "ticket_size": len(ticket),
            "ticket_overlap": overlap,
            "largest_statistic": float(statistic_V.max()),
            **{f"statistic_quantile_{q}": float(statistic_V.quantile(q)) for q in (0.5, 0.9, 0.99, 0.999)},
            "draw_seconds": ended - started,
            "draw_bytes_sent": self._shard.traffic.sent - moved.sent,
            "draw_bytes_received": self._shard.traffic.received - moved.received,
            "draw_share": (ended - started) / (ended - self._watched_since),
        }
        self._watched_since = ended
        return numbers, settled is not None and self._settled_draws >= settled.draws

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers, the same on every rank."""
        return {"last": sorted(self._last), "settled_draws": self._settled_draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._last = set(state["last"])
        self._settled_draws = state["settled_draws"]
