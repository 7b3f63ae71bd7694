"""What several tickets of one model share: sizes, overlaps, common rows.

Tickets of several languages overlap if the same rows matter for all of them. Tickets that were drawn at random overlap too,
so the overlap to expect by chance stands beside every measured one.

Legend: V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ksl_ds.errors import UserError
from ksl_ds.lottery.ks import critical_count
from ksl_ds.lottery.ticket import Ticket

ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95)  # levels at which overlaps are shown


@dataclass(frozen=True)
class Overlaps:
    """What sets of rows share.

    Attributes
    ----------
    names
        Of the tickets, in their order.
    rows
        Token ids of each ticket.
    vocab_size
        Rows of the embedding.
    """

    names: list[str]
    rows: list[frozenset[int]]
    vocab_size: int

    def shared(self, one: int, other: int) -> int:
        """Rows that are in two tickets, by their places."""
        return len(self.rows[one] & self.rows[other])

    def jaccard(self, one: int, other: int) -> float | None:
        """Shared rows of two tickets divided by the rows of either; None for two empty ones."""
        either = len(self.rows[one] | self.rows[other])
        return self.shared(one, other) / either if either else None

    def by_chance(self, one: int, other: int) -> float:
        """The shared rows to expect of two random tickets of these sizes: the mean of the hypergeometric distribution."""
        return len(self.rows[one]) * len(self.rows[other]) / self.vocab_size

    def mean_jaccard(self) -> float | None:
        """Over all pairs of tickets of which one has rows; None if all are empty."""
        pairs = [(one, other) for one in range(len(self.names)) for other in range(one)]
        known = [overlap for pair in pairs if (overlap := self.jaccard(*pair)) is not None]
        return sum(known) / len(known) if known else None

    def common(self) -> list[int]:
        """Rows of every ticket, sorted."""
        return sorted(frozenset.intersection(*self.rows))

    def only(self, one: int) -> list[int]:
        """Rows of one ticket that no other has, sorted."""
        others = frozenset().union(*(rows for number, rows in enumerate(self.rows) if number != one))
        return sorted(self.rows[one] - others)


def check_comparable(tickets: Mapping[str, Ticket]) -> None:
    """Raises UserError where two tickets are not of embeddings of the same shape."""
    (first, ticket), *others = tickets.items()
    for name, other in others:
        shapes = [(one.vocab_size, one.num_samples) for one in (ticket, other)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{first} and {name} are tickets of embeddings of different shapes, {shapes[0]} and {shapes[1]}; they cannot "
                "be compared"
            )


def overlaps_of(tickets: Mapping[str, Ticket]) -> Overlaps:
    """What tickets share as they were drawn. Raises UserError for tickets of different models."""
    check_comparable(tickets)
    rows = [frozenset(ticket.token_ids) for ticket in tickets.values()]
    return Overlaps(list(tickets), rows, next(iter(tickets.values())).vocab_size)


def tokens_of(tickets: Iterable[Ticket]) -> dict[int, str]:
    """The tokens of the rows that any of the tickets holds, by id."""
    return {number: text for one in tickets for number, text in zip(one.token_ids, one.tokens, strict=True)}


def overlaps_at(tickets: Mapping[str, Ticket], alphas: Sequence[float] = ALPHAS) -> dict[float, Overlaps]:
    """What the tickets of the same KS tests share at other levels: rows with p < alpha, by alpha.

    Parameters
    ----------
    tickets
        By name; the p-values of each are of its own method.
    alphas
        Levels in (0, 1).
    """
    check_comparable(tickets)
    found = {}
    for alpha in alphas:
        rows = []
        for ticket in tickets.values():
            least = critical_count(ticket.num_samples, alpha, ticket.method)
            rows.append(frozenset((ticket.count_V >= least).nonzero().flatten().tolist()))
        found[alpha] = Overlaps(list(tickets), rows, next(iter(tickets.values())).vocab_size)
    return found
