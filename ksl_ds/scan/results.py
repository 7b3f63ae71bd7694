"""What a scan found, in numbers: shares of rows by level and correction, by module kind and by layer.

The family of tests is all rows of the scan: M rows. "Nominal" is p < alpha, row by row. Bonferroni is p < alpha / M. Benjamini
and Hochberg's step-up rule (1995) takes all p up to the largest p_(i) <= i alpha / M. p-values are exact and depend on a row's
width, so each decision is a count k that a row of that width must reach.

Legend: T rows of a tensor, K k-values of a width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ksl_ds.files import write_bytes
from ksl_ds.lottery.pvalues import critical_count, pvalues
from ksl_ds.lottery.shift import dtype_name
from ksl_ds.scan.runner import Found, Plan, ScannedTensor

COUNTS_FILE = "scan.safetensors"
LARGEST_ROWS = 50  # rows of largest D that are listed
TICKET_ROWS = 200  # tokens that are listed at most
RULES = ("nominal", "benjamini_hochberg", "bonferroni")


@dataclass(frozen=True)
class Thresholds:
    """By rule and width of a row: the smallest k that is rejected; the width + 1 where none is."""

    alpha: float
    num_rows: int
    by_width: dict[str, dict[int, int]]

    def rejected(self, rule: str, tensor: ScannedTensor, count_T: Tensor) -> Tensor:
        """Which rows of a tensor a rule rejects; bool (T,)."""
        return count_T >= self.by_width[rule][tensor.num_samples]


def thresholds(plan: Plan, found: Found, alpha: float) -> Thresholds:
    """The counts that every rule asks for at level `alpha`."""
    rows_of: dict[int, Tensor] = {}  # by width: how many rows have which k
    for tensor, count_T in zip(plan.tested, found.count_T, strict=True):
        number_K = torch.bincount(count_T.long(), minlength=tensor.num_samples + 1)
        rows_of[tensor.num_samples] = rows_of.get(tensor.num_samples, 0) + number_K
    num_rows = sum(len(count_T) for count_T in found.count_T)
    widths = sorted(rows_of)
    pvalue_of = {width: pvalues(torch.arange(width + 1), width) for width in widths}
    every = torch.cat([pvalue_of[width] for width in widths])
    number = torch.cat([rows_of[width] for width in widths])
    every = every[number > 0]
    number = number[number > 0]
    order = every.argsort(stable=True)
    every = every[order]
    number = number[order]
    # The rank of the last of equal p-values passes first; an earlier one of a run only where the last does too.
    passing = every[every <= number.cumsum(0) * (alpha / num_rows)]
    largest = float(passing.max()) if len(passing) else -1.0
    return Thresholds(
        alpha,
        num_rows,
        {
            "nominal": {width: critical_count(width, alpha) for width in widths},
            "benjamini_hochberg": {width: int((pvalue_of[width] > largest).sum()) for width in widths},
            "bonferroni": {width: critical_count(width, alpha / num_rows) for width in widths},
        },
    )


def summary(
    tensors: Sequence[ScannedTensor], count_T: Sequence[Tensor], ratio_T: Sequence[Tensor], levels: Thresholds
) -> dict[str, Any]:
    """What the rows of some tensors together show; the median shift ratio is that of the rows that moved."""
    ratios = torch.cat(list(ratio_T))
    rows = len(ratios)
    moved = ratios[ratios > 0]
    rejected = {
        rule: sum(int(levels.rejected(rule, tensor, k).sum()) for tensor, k in zip(tensors, count_T, strict=True))
        for rule in RULES
    }
    return {
        "tensors": len(tensors),
        "rows": rows,
        "moved": len(moved),
        "share": {rule: number / rows for rule, number in rejected.items()},
        "largest_statistic": max(int(k.max()) / tensor.num_samples for tensor, k in zip(tensors, count_T, strict=True)),
        "median_shift_ratio": float(moved.median()) if len(moved) else 0.0,
        "largest_shift_ratio": float(ratios.max()),
    }


def grouped(plan: Plan, found: Found, levels: Thresholds, keys: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """A summary for each key, given tensor by tensor; in the order in which keys first appear."""
    groups: dict[Any, list[int]] = {}
    for number, group in enumerate(keys):
        groups.setdefault(group, []).append(number)
    return {
        group: summary(
            [plan.tested[number] for number in numbers],
            [found.count_T[number] for number in numbers],
            [found.ratio_T[number] for number in numbers],
            levels,
        )
        for group, numbers in groups.items()
    }


def row_facts(tensor: ScannedTensor, count_T: Tensor, ratio_T: Tensor, rows: Tensor) -> list[dict[str, Any]]:
    """k, D, p and shift ratio of some rows of a tensor."""
    pvalue = pvalues(count_T[rows], tensor.num_samples).tolist()
    return [
        {
            "tensor": tensor.name,
            "row": [int(at) for at in torch.unravel_index(torch.tensor(row), tensor.row_shape)],
            "count": int(count_T[row]),
            "num_samples": tensor.num_samples,
            "statistic": int(count_T[row]) / tensor.num_samples,
            "pvalue": p,
            "shift_ratio": float(ratio_T[row]),
        }
        for row, p in zip(rows.tolist(), pvalue, strict=True)
    ]


def largest_rows(plan: Plan, found: Found, levels: Thresholds) -> list[dict[str, Any]]:
    """The rows of largest D in the whole model; rows so short that no D has p < alpha are left out."""
    facts = []
    for tensor, count_T, ratio_T in zip(plan.tested, found.count_T, found.ratio_T, strict=True):
        if levels.by_width["nominal"][tensor.num_samples] <= tensor.num_samples:
            top = count_T.sort(descending=True, stable=True).indices[:LARGEST_ROWS]
            facts += row_facts(tensor, count_T, ratio_T, top[count_T[top] > 0])
    return sorted(facts, key=lambda fact: -fact["statistic"])[:LARGEST_ROWS]


def ticket_of(tensor: ScannedTensor, count_T: Tensor, ratio_T: Tensor, levels: Thresholds) -> dict[str, Any]:
    """The rows of an embedding or head with p < alpha, and facts of those of largest D; `row` is the token id."""
    top = count_T.sort(descending=True, stable=True).indices[:TICKET_ROWS]
    rows = [fact | {"row": fact["row"][0]} for fact in row_facts(tensor, count_T, ratio_T, top[count_T[top] > 0])]
    return {
        "tensor": tensor.name,
        "vocab_size": len(count_T),
        "rows": int(levels.rejected("nominal", tensor, count_T).sum()),
        "largest": rows,
    }


def results_of(plan: Plan, found: Found, alpha: float, vocabularies: Iterable[str]) -> dict[str, Any]:
    """The numbers of results.json; `vocabularies`: the matrices whose rows are tokens."""
    levels = thresholds(plan, found, alpha)
    places = [tensor.place for tensor in plan.tested]
    per_tensor = grouped(plan, found, levels, range(len(places)))
    tickets = {
        tensor.name: ticket_of(tensor, count_T, ratio_T, levels)
        for tensor, count_T, ratio_T in zip(plan.tested, found.count_T, found.ratio_T, strict=True)
        if tensor.name in set(vocabularies) and not tensor.by_columns
    }
    cells = grouped(plan, found, levels, places)
    return {
        "alpha": alpha,
        "num_rows": levels.num_rows,
        "critical_counts": levels.by_width,
        "all": grouped(plan, found, levels, [None] * len(places))[None],
        "kinds": grouped(plan, found, levels, (place.kind for place in places)),
        "layers": [
            {"layer": layer, **found_there}
            for layer, found_there in grouped(plan, found, levels, (place.layer for place in places)).items()
        ],
        "cells": [{"layer": place.layer, "kind": place.kind, **cell} for place, cell in cells.items()],
        "tensors": {
            tensor.name: {
                "layer": tensor.place.layer,
                "kind": tensor.place.kind,
                "shape": tensor.shape,
                "dtypes": [dtype_name(dtype) for dtype in tensor.dtypes],
                "num_samples": tensor.num_samples,
                **per_tensor[number],
            }
            for number, tensor in enumerate(plan.tested)
        },
        "largest_rows": largest_rows(plan, found, levels),
        "tickets": tickets,
        "not_tested": plan.not_tested,
        "only_before": plan.only_before,
        "only_after": plan.only_after,
    }


def save_counts(plan: Plan, found: Found, path: Path) -> None:
    """Writes k of every row, int32, a tensor for each tested one under its name. Raises UserError."""
    tensors = {
        tensor.name: count_T.reshape(tensor.row_shape).contiguous()
        for tensor, count_T in zip(plan.tested, found.count_T, strict=True)
    }
    widths = {tensor.name: tensor.num_samples for tensor in plan.tested}
    # One entry, since safetensors writes several in no order.
    write_bytes(path, safetensors.torch.save(tensors, {"num_samples": json.dumps(widths)}))
