"""Shows a ticket: its tokens with their statistics; and what several tickets share."""

from __future__ import annotations

from pathlib import Path

from ksl_ds.errors import UserError
from ksl_ds.lottery.overlap import Overlaps, overlaps_at, overlaps_of, tokens_of
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.model.published import published_directions, published_ids, published_pieces
from ksl_ds.report.overlaps import alpha_table, overlap_table, shared_rows_table, write_overlap_report
from ksl_ds.report.tables import print_table, print_text, rows_of_ticket, ticket_table

ALL = "all"


def main(tickets: list[str], published: str | None, limit: int | None, report: Path | None) -> None:
    """Prints the tables of tickets, and what they share with each other or with published ones.

    Parameters
    ----------
    tickets
        Ticket folders.
    published
        Translation direction of a published LLaMA ticket, such as "en-ca", or "all".
    limit
        Rows of a ticket's table at most, those of largest D.
    report
        HTML file to write, with the overlaps.

    Raises
    ------
    UserError
        For a folder that holds no ticket, for tickets of different models, and for an unknown direction.
    """
    loaded = dict(zip(short_names(tickets), map(load, tickets), strict=True))
    for path, ticket in zip(tickets, loaded.values(), strict=True):
        show(ticket, path, limit)
    overlaps = overlaps_of(loaded)
    directions = list(published_directions()) if published == ALL else [published] if published else []
    for path, ticket in loaded.items():
        for direction in directions:
            print_text(f"{path}: {against_published(ticket, direction)}")
    names = [*overlaps.names, *(f"published {direction}" for direction in directions)]
    rows = [*overlaps.rows, *(frozenset(published_ids(direction)) for direction in directions)]
    overlaps = Overlaps(names, rows, overlaps.vocab_size)
    if len(names) == 1:
        if report is not None:
            raise UserError("--report shows what tickets share; give at least two of them, or --published")
        return
    by_alpha = overlaps_at(loaded) if len(loaded) > 1 else {}
    tokens = tokens_of(loaded.values())
    print_table(overlap_table(overlaps))
    print_table(shared_rows_table(overlaps, tokens))
    if by_alpha:
        print_table(alpha_table(by_alpha))
    if len(loaded) == 2:
        print_text(difference(*loaded.values()))
    if report is not None:
        write_overlap_report(report, overlaps, by_alpha, tokens)
        print_text(f"the report: {report}")


def short_names(paths: list[str]) -> list[str]:
    """What tells paths apart: the parts that not all share, where they have equally many. Raises UserError for equal ones."""
    if len(set(paths)) < len(paths):
        raise UserError("a ticket is given twice; name different folders")
    columns = list(zip(*(Path(path).parts for path in paths), strict=False))
    if len(paths) == 1 or any(len(Path(path).parts) != len(columns) for path in paths):
        return paths
    distinct = [column for column in columns if len(set(column)) > 1]
    return ["/".join(parts) for parts in zip(*distinct, strict=True)]


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
    rows = rows_of_ticket(ticket)
    title = (
        f"{path}: {len(ticket):,} of {ticket.vocab_size:,} rows (selection {ticket.selection}, alpha {ticket.alpha}, "
        f"{ticket.method} p-values, d = {ticket.num_samples}, {ticket.tested_dtype})"
    )
    print_table(ticket_table(rows, limit=limit, title=title))


def difference(ticket: Ticket, other: Ticket) -> str:
    """How the KS tests of two tickets differ."""
    differing = int((ticket.count_V != other.count_V).sum())
    furthest = int((ticket.count_V - other.count_V).abs().max())
    return f"k differs for {differing:,} of {ticket.vocab_size:,} tokens" + (
        f", by {furthest} at most." if differing else "."
    )


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
