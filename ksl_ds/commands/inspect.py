"""Shows a ticket: its tokens with their statistics, and what two tickets share."""

from __future__ import annotations

import argparse

from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.report.tables import print_table, ticket_rows, ticket_table


def run(words: list[str]) -> None:
    """`ksl-ds inspect TICKET [OTHER] [--limit N]`."""
    parser = argparse.ArgumentParser(prog="ksl-ds inspect", description=__doc__)
    parser.add_argument("ticket", help="ticket folder")
    parser.add_argument("other", nargs="?", help="second ticket folder, to compare with")
    parser.add_argument("--limit", type=int, help="show at most so many tokens, those of largest D")
    arguments = parser.parse_args(words)
    ticket = load(arguments.ticket)
    show(ticket, arguments.ticket, arguments.limit)
    if arguments.other is not None:
        other = load(arguments.other)
        show(other, arguments.other, arguments.limit)
        print("\n".join(comparison(ticket, other)))


def load(path: str) -> Ticket:
    try:
        return Ticket.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"ticket {path}: {error}") from None


def show(ticket: Ticket, path: str, limit: int | None) -> None:
    rows = ticket_rows(
        ticket.token_ids, ticket.tokens, ticket.count, ticket.statistic, ticket.pvalue, ticket.shift_ratio
    )
    title = (
        f"{path}: {len(ticket):,} of {ticket.vocab_size:,} rows (selection {ticket.selection}, alpha {ticket.alpha}, "
        f"{ticket.method} p-values, d = {ticket.num_samples}, {ticket.tested_dtype})"
    )
    print_table(ticket_table(rows, limit=limit, title=title))


def comparison(ticket: Ticket, other: Ticket) -> list[str]:
    """What two tickets share, in sentences."""
    if (ticket.vocab_size, ticket.num_samples) != (other.vocab_size, other.num_samples):
        return [
            f"The tickets are of embeddings of different shapes, ({ticket.vocab_size}, {ticket.num_samples}) and "
            f"({other.vocab_size}, {other.num_samples}); they cannot be compared."
        ]
    mine, theirs = set(ticket.token_ids), set(other.token_ids)
    differing = int((ticket.count_V != other.count_V).sum())
    furthest = int((ticket.count_V - other.count_V).abs().max())
    return [
        f"Rows in both: {len(mine & theirs)}; only in the first: {len(mine - theirs)}; only in the second: "
        f"{len(theirs - mine)}; Jaccard overlap {len(mine & theirs) / len(mine | theirs):.3f}.",
        f"k differs for {differing:,} of {ticket.vocab_size:,} tokens"
        + (f", by {furthest} at most." if differing else "."),
    ]
