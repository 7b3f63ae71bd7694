"""Shows a ticket: its tokens with their statistics, and what two tickets share."""

from __future__ import annotations

from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.model.published import published_ids, published_pieces
from ksl_ds.report.tables import print_table, print_text, ticket_rows, ticket_table


def main(ticket: str, other: str | None, published: str | None, limit: int | None) -> None:
    """Prints a ticket's table, and what it shares with another or with a published one.

    Parameters
    ----------
    ticket, other : str
        Ticket folders.
    published : str or None
        Translation direction of a published LLaMA ticket, such as "en-ca".
    limit : int or None
        Rows of a table at most, those of largest D.

    Raises
    ------
    UserError
        For a folder that holds no ticket, and for an unknown direction.
    """
    first = load(ticket)
    show(first, ticket, limit)
    if other is not None:
        second = load(other)
        show(second, other, limit)
        print_text("\n".join(comparison(first, second)))
    if published is not None:
        print_text(against_published(first, published))


def load(path: str) -> Ticket:
    """A ticket folder. Raises UserError."""
    try:
        return Ticket.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"ticket {path}: {error}") from None


def show(ticket: Ticket, path: str, limit: int | None) -> None:
    """Prints a ticket's rows, at most `limit` of them."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1")
    rows = ticket_rows(
        ticket.token_ids,
        ticket.tokens,
        ticket.count,
        ticket.statistic,
        ticket.pvalue,
        ticket.shift_ratio,
        ticket.source.get("train_frequency"),
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


def against_published(ticket: Ticket, direction: str) -> str:
    """How a ticket of LLaMA compares with the published one. Raises UserError for another tokenizer's."""
    ids = published_ids(direction)
    pieces = dict(zip(ticket.token_ids, ticket.tokens, strict=True))
    strangers = [
        f"{number} is {pieces[number]!r}, not {piece!r}"
        for number, piece in published_pieces().items()
        if pieces.get(number, piece) not in (piece, "")
    ]
    if ticket.vocab_size < max(ids) or strangers:
        reason = strangers[0] if strangers else f"it has {ticket.vocab_size} tokens"
        raise UserError(f"the ticket is not of LLaMA-1's tokenizer ({reason}), so no published ticket compares with it")
    both = set(ids) & set(ticket.token_ids)
    return (
        f"Published for {direction}: {len(ids)} rows, {len(both)} of them in this ticket of {len(ticket)}; missing here: "
        f"{' '.join(map(str, sorted(set(ids) - both))) or 'none'}."
    )
