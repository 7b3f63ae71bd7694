"""The draw on whole rows of a sharded embedding: every rank tests its own, one integer a token is all-reduced.

Legend: V tokens, D coordinates, R rows of this rank, K drawn rows.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Shift, Ticket, choose_rows, make_ticket, measure_shift
from ksl_ds.recipe import Draw
from ksl_ds.sharding import cluster
from ksl_ds.sharding.rows import RowShard, Traffic

BLOCK_BYTES = 64 << 20  # of rows that are tested at once


def sharded_shift(shard: RowShard, before_RD: Tensor, *, lengths: bool = True) -> Shift:
    """The KS test of all rows against what they were before, the same on every rank.

    One integer a token travels, and with `lengths` how far its row moved, which no decision of the method needs.

    Raises
    ------
    UserError
        On every rank, for a row that is not finite, naming the token.
    """
    message = None
    count_R = torch.zeros(len(before_RD), dtype=torch.int32)
    norm_R, ratio_R = torch.zeros(len(before_RD)), torch.zeros(len(before_RD))
    for first, after_BD in shard.blocks(max(1, BLOCK_BYTES // (4 * shard.row_length))):
        rows = slice(first - shard.start, first - shard.start + len(after_BD))
        try:
            # Where the weights are: the snapshot's block goes to them.
            block = measure_shift(before_RD[rows].to(after_BD.device), after_BD, first_row=first)
        except ValueError as error:
            message = f"embedding after tuning: {error}"
            break
        count_R[rows], norm_R[rows], ratio_R[rows] = block.count_V, block.shift_norm_V, block.shift_ratio_V
    cluster.raise_together(message)
    own = Shift(count_R, norm_R, ratio_R, shard.row_length, "float32")
    return gather_shift(own, shard.start, shard.num_rows, shard.traffic, lengths=lengths)


def gather_shift(
    own: Shift, start: int, num_rows: int, traffic: Traffic | None = None, *, lengths: bool = True
) -> Shift:
    """One Shift of all `num_rows` rows from each rank's own, which begin at row `start`: the same on every rank.

    Without `lengths` the shift norms and ratios are NaN. Raises RuntimeError should the ranks disagree about what they
    received.
    """

    def everywhere(values_R: Tensor) -> Tensor:
        values_V = torch.zeros(num_rows, dtype=values_R.dtype, device=cluster.device())
        values_V[start : start + len(values_R)] = values_R.to(values_V.device)
        if traffic is not None:
            traffic.reduced(values_V)
        return cluster.all_reduce(values_V).cpu()

    count_V = everywhere(own.count_V)
    digest = hashlib.sha256(count_V.numpy().tobytes()).hexdigest()
    if len(set(cluster.gather_objects(digest))) > 1:
        raise RuntimeError("the ranks disagree about the KS counts: a collective returned different values")
    unknown_V = torch.full((num_rows,), torch.nan)
    norm_V, ratio_V = (
        (everywhere(own.shift_norm_V), everywhere(own.shift_ratio_V)) if lengths else (unknown_V, unknown_V)
    )
    return Shift(count_V, norm_V, ratio_V, own.num_samples, own.tested_dtype)


def draw_from_shard(
    shard: RowShard,
    before_RD: Tensor,
    draw: Draw,
    *,
    seed: int,
    frequency_V: Tensor,
    tokens: list[str],
    embedding_scope: str,
    source: dict[str, Any],
) -> tuple[Shift, Ticket]:
    """Tests, chooses rows and reads them: the shift of all tokens and the ticket, perhaps an empty one, on every rank."""
    shift = sharded_shift(shard, before_RD)
    ids_K = ids_of_draw(shift, draw, seed=seed, frequency_V=frequency_V)
    rows_KD = shard.read_rows(ids_K)
    source = {**source, "train_frequency": frequency_V[ids_K].tolist()}
    return shift, make_ticket(
        shift,
        ids_K,
        before_rows(shard, before_RD, ids_K),
        rows_KD,
        selection=draw.selection,
        alpha=draw.alpha,
        method=draw.method,
        tokens=[tokens[i] for i in ids_K.tolist()],
        embedding_scope=embedding_scope,
        source=source,
    )


def ids_of_draw(shift: Shift, draw: Draw, *, seed: int, frequency_V: Tensor) -> Tensor:
    """The rows that a recipe's `draw` chooses, int64 (K,). Raises UserError for a rule that cannot be followed."""
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
    """Rows `ids_K` of the snapshot: float32 (K, D) on every rank."""
    rows_KD = torch.zeros(len(ids_K), shard.row_length, dtype=torch.int32)
    mine_K = (ids_K >= shard.start) & (ids_K < shard.stop)
    rows_KD[mine_K] = before_RD[ids_K[mine_K] - shard.start].view(torch.int32)
    return cluster.all_reduce(rows_KD.to(cluster.device())).cpu().view(torch.float32)


class DrawMonitor:
    """Draws while embed tuning goes on, and says when the ticket has settled. It reads only: training is not disturbed.

    Parameters
    ----------
    shard, before_RD : the embedding, and this rank's rows of it before training
    draw : how to choose rows, how often to look, and when to stop
    seed, frequency_V : as for `draw_from_shard`
    """

    def __init__(self, shard: RowShard, before_RD: Tensor, draw: Draw, *, seed: int, frequency_V: Tensor):
        self._shard, self._before_RD, self._draw = shard, before_RD, draw
        self._seed, self._frequency_V = seed, frequency_V
        self._last: set[int] = set()
        self._settled_draws = 0
        self._watched_since = time.perf_counter()

    def __call__(self, step: int) -> tuple[dict[str, Any], bool]:
        """What the draw after `step` found, for the log, and whether the ticket has settled; nothing between draws."""
        if self._draw.every is None or step % self._draw.every:
            return {}, False
        started, sent = time.perf_counter(), self._shard.traffic.sent
        lengths = self._draw.selection in ("shift_norm", "shift_ratio")
        shift = sharded_shift(self._shard, self._before_RD, lengths=lengths)
        ids_K = ids_of_draw(shift, self._draw, seed=self._seed, frequency_V=self._frequency_V)
        ticket = set(ids_K.tolist())
        overlap = len(ticket & self._last) / len(ticket | self._last) if ticket | self._last else 0.0
        self._last = ticket
        settled = self._draw.stop_when_settled
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
            "draw_bytes_sent": self._shard.traffic.sent - sent,
            "draw_share": (ended - started) / (ended - self._watched_since),
        }
        self._watched_since = ended
        return numbers, settled is not None and self._settled_draws >= settled.draws
