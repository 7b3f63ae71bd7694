"""The draw on whole rows of a sharded embedding: every rank tests its own, one integer a token is all-reduced.

Legend: V tokens, D coordinates, R rows of this rank, K drawn rows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ksl_ds.lottery.ticket import Shift, Ticket, choose_rows, make_ticket, measure_shift
from ksl_ds.recipe import Draw
from ksl_ds.sharding import cluster
from ksl_ds.sharding.rows import RowShard, Traffic


def sharded_shift(shard: RowShard, before_RD: Tensor) -> Shift:
    """The KS test of all rows against what they were before, the same on every rank.

    Raises
    ------
    UserError
        On every rank, for a row that is not finite, naming the token.
    """
    message, own = None, None
    try:
        own = measure_shift(before_RD, shard.read(), first_row=shard.start)
    except ValueError as error:
        message = f"embedding after tuning: {error}"
    cluster.raise_together(message)
    assert own is not None
    return gather_shift(own, shard.start, shard.num_rows, shard.traffic)


def gather_shift(own: Shift, start: int, num_rows: int, traffic: Traffic | None = None) -> Shift:
    """One Shift of all `num_rows` rows from each rank's own, which begin at row `start`: the same on every rank.

    One integer and two floats a token travel. Raises RuntimeError should the ranks disagree about what they received.
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
    return Shift(
        count_V, everywhere(own.shift_norm_V), everywhere(own.shift_ratio_V), own.num_samples, own.tested_dtype
    )


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
    ids_K = choose_rows(
        shift,
        selection=draw.selection,
        alpha=draw.alpha,
        method=draw.method,
        top_k=draw.top_k,
        seed=seed,
        frequency_V=frequency_V,
    )
    rows_KD = shard.read_rows(ids_K)
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


def before_rows(shard: RowShard, before_RD: Tensor, ids_K: Tensor) -> Tensor:
    """Rows `ids_K` of the snapshot: float32 (K, D) on every rank."""
    rows_KD = torch.zeros(len(ids_K), shard.row_length, dtype=torch.int32)
    mine_K = (ids_K >= shard.start) & (ids_K < shard.stop)
    rows_KD[mine_K] = before_RD[ids_K[mine_K] - shard.start].view(torch.int32)
    return cluster.all_reduce(rows_KD.to(cluster.device())).cpu().view(torch.float32)
