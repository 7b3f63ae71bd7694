"""Selection rules: which rows a test draws, and the controls. Pure functions of vectors over the vocabulary.

A rule is a function `select_NAME` with the decorator `rule`. `choose_rows` (shift.py) passes the parameters that it names.
Recipes, `ksl-ds draw`, help texts and, for controls, `compare` use every rule defined here:

    count_V, num_samples     int32 (V,): counts k of the KS test, and the row width d; D = k / d
    shift_norm_V             float32 (V,): norms of after - before
    shift_ratio_V            float32 (V,): the same divided by the norms of before
    frequency_V              int64 (V,): how often each token occurs in the training text
    alpha, method            level of one test, and how its p-value is computed
    top_k                    number of rows to draw
    vocab_size, seed         of a random draw

All return ascending token ids, int64 (K,). Rules on counts, frequencies and shifts never draw a row with value 0, even if
fewer than `top_k` rows have another: a ticket does not train rows that did not move.

torch is imported in the functions, so that `--help` can list the rules quickly.

Legend: V tokens, K drawn rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ksl_ds.lottery.pvalues import PValueMethod


@dataclass(frozen=True)
class Rule:
    """A selection rule.

    Attributes
    ----------
    name : str
        As `draw.selection` in a recipe.
    key : str
        Of a comparison's entry with these rows, in results.json.
    label : str
        What it draws, for tables.
    select : function
        Returns the token ids.
    inputs : frozenset of str
        Names of the parameters of `select`.
    """

    name: str
    key: str
    label: str
    select: Callable[..., Any]
    inputs: frozenset[str]

    @property
    def is_control(self) -> bool:
        """Whether it takes a given number of rows, so that it can be compared with a ticket of that size."""
        return "top_k" in self.inputs


RULES: dict[str, Rule] = {}


def rule(label: str, key: str = "") -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function `select_NAME` as the selection rule NAME; `key` defaults to `rows_by_NAME`."""

    def register(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = select.__name__.removeprefix("select_")
        RULES[name] = Rule(
            name, key or f"rows_by_{name}", label, select, frozenset(inspect.signature(select).parameters)
        )
        return select

    return register


@rule("rows with p < alpha")
def select_alpha(count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact") -> Tensor:
    """The method's own rule: tokens with p < alpha."""
    from ksl_ds.lottery.pvalues import critical_count

    return (count_V >= critical_count(num_samples, alpha, method)).nonzero().flatten()


@rule("rows of largest D", key="rows_of_largest_D")
def select_top_k(count_V: Tensor, top_k: int) -> Tensor:
    """The rows of largest KS statistic; ties go to the smaller id."""
    return _largest(count_V, top_k)


@rule("rows with p < alpha, Bonferroni")
def select_bonferroni(count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact") -> Tensor:
    """Tokens with p < alpha / V: the family-wise error rate is below alpha."""
    return select_alpha(count_V, num_samples, alpha / len(count_V), method)


@rule("rows with p < alpha, Benjamini-Hochberg")
def select_benjamini_hochberg(
    count_V: Tensor, num_samples: int, alpha: float, method: PValueMethod = "exact"
) -> Tensor:
    """Benjamini and Hochberg's step-up rule (1995): the false discovery rate is at most alpha.

    Sorted ascending, p_(1) .. p_(V): all tokens up to the last i with p_(i) <= i * alpha / V.
    """
    import torch

    from ksl_ds.lottery.pvalues import pvalues

    pvalue_V = pvalues(count_V.cpu(), num_samples, method)
    ordered_V = pvalue_V.sort().values
    passing = (ordered_V <= torch.arange(1, len(ordered_V) + 1) * (alpha / len(ordered_V))).nonzero().flatten()
    if len(passing) == 0:
        return torch.zeros(0, dtype=torch.int64)
    return (pvalue_V <= ordered_V[passing[-1]]).nonzero().flatten()


@rule("rows by frequency")
def select_frequency(frequency_V: Tensor, top_k: int) -> Tensor:
    """Control: the most frequent tokens; ties go to the smaller id."""
    return _largest(frequency_V, top_k)


@rule("rows at random", key="rows_at_random")
def select_random(vocab_size: int, top_k: int, seed: int) -> Tensor:
    """Control: random tokens, a function of the seed."""
    import torch

    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:top_k].sort().values


@rule("rows by shift norm")
def select_shift_norm(shift_norm_V: Tensor, top_k: int) -> Tensor:
    """Control: the rows of largest shift norm."""
    return _largest(shift_norm_V, top_k)


@rule("rows by shift ratio")
def select_shift_ratio(shift_ratio_V: Tensor, top_k: int) -> Tensor:
    """Control: the rows of largest shift ratio."""
    return _largest(shift_ratio_V, top_k)


def _largest(values_V: Tensor, k: int) -> Tensor:
    ordered = values_V.sort(descending=True, stable=True)
    return ordered.indices[:k][ordered.values[:k] > 0].sort().values
