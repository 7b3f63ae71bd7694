"""The draw on whole rows of a sharded embedding: every rank tests its own, one integer a token is all-reduced.

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
    """The KS test of all rows against what they were before, the same on every rank.

    One integer a token travels, and with `lengths` how far its row moved, which no decision of the method needs; without
    them the shift norms and ratios are NaN.

    Raises
    ------
    UserError
        On every rank, for a row that is not finite, naming the token.
    """
    message = None
    count_R = torch.zeros(len(before_RD), dtype=torch.int32)
    norm_R, ratio_R = torch.full_like(before_RD[:, 0], torch.nan), torch.full_like(before_RD[:, 0], torch.nan)
    for first, after_BD in shard.blocks(shard.rows_of_a_block()):
        rows = slice(first - shard.start, first - shard.start + len(after_BD))
        before_BD = before_RD[rows].to(after_BD.device)  # the snapshot's block goes to where the weights are
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
    """One Shift of all `num_rows` rows from each rank's own, which begin at row `start`: the same on every rank.

    Raises
    ------
    RuntimeError
        On every rank, should they disagree about what they received.
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
        before_rows(shard, before_RD, ids_K).to(shard.dtype),
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
    return shard.traffic.all_reduce(rows_KD.to(distributed.device())).cpu().view(torch.float32)


class DrawMonitor:
    """Draws while embed tuning goes on, and says when the ticket has settled. It reads only: training is not disturbed.

    Parameters
    ----------
    shard, before_RD : the embedding, and this rank's rows of it before training
    draw : how to choose rows, how often to look, and when to stop
    seed, frequency_V : as for `draw_from_shard`
    """

    def __init__(self, shard: RowShard, before_RD: Tensor, draw: Draw, *, seed: int, frequency_V: Tensor):
        self._shard = shard
        self._before_RD = before_RD
        self._draw = draw
        self._seed = seed
        self._frequency_V = frequency_V
        self._last: set[int] = set()
        self._settled_draws = 0
        self._watched_since = time.perf_counter()

    def __call__(self, step: int) -> tuple[dict[str, Any], bool]:
        """What the draw after `step` found, for the log, and whether the ticket has settled; nothing between draws."""
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
        """What a resumed training needs to go on watching; plain numbers, the same on every rank."""
        return {"last": sorted(self._last), "settled_draws": self._settled_draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._last = set(state["last"])
        self._settled_draws = state["settled_draws"]
