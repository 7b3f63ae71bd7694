"""A comparison of directions as people read it: the transfer matrices and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from ksl_ds.lottery.overlap import Overlaps
from ksl_ds.multilingual.records import INTERSECTION, JOINT, RANDOM, UNION, Kind, MultilingualResults
from ksl_ds.report.tables import Column, Table, decimals

LEVEL = 0.05
SHOWN = {"test_loss": ("Test loss", 3), "bleu": ("BLEU", 1)}  # title, digits


def matrix_rows(results: MultilingualResults) -> Iterator[tuple[str, Kind, dict[str, str]]]:
    """The rows of a transfer matrix: label, kind, and the source of each direction's cell."""
    directions = results.directions
    own = {direction: direction for direction in directions}
    yield "untuned", Kind.UNTUNED, dict.fromkeys(directions, JOINT)
    yield "embed tuning, own text", Kind.EMBED, own
    yield "embed tuning, all text", Kind.EMBED, dict.fromkeys(directions, JOINT)
    yield "own ticket", Kind.TRAINED, own
    for source in (*directions, JOINT, UNION, INTERSECTION, RANDOM):
        yield f"rows of {source}", Kind.TRAINED, dict.fromkeys(directions, source)
    for source in (*directions, JOINT):
        yield f"tuned on {source}, as is", Kind.APPLIED, dict.fromkeys(directions, source)


def differs(results: MultilingualResults, source: str, direction: str) -> bool:
    """Whether rows of a source score significantly otherwise than the direction's own: with every seed, in one way."""
    tests = [
        score.test
        for score in results.scores
        if (score.kind, score.source, score.direction) == (Kind.TRAINED, source, direction)
    ]
    differences = [test.difference for test in tests if test is not None and test.difference is not None]
    known = len(differences) == len(results.seeds)
    one_way = known and (min(differences) > 0 or max(differences) < 0)
    return one_way and all(test is not None and test.p is not None and test.p < LEVEL for test in tests)


def transfer_table(results: MultilingualResults, score: str) -> Table:
    """A score of every source's rows on every direction, the mean over seeds; `score` is test_loss or bleu."""
    title, digits = SHOWN[score]
    show = decimals(digits)
    rows = []
    for label, kind, sources in matrix_rows(results):
        values = {direction: results.mean(kind, source, direction, score) for direction, source in sources.items()}
        if all(value is None for value in values.values()):
            continue
        cells = []
        for direction, value in values.items():
            tested = score == "bleu" and kind is Kind.TRAINED and differs(results, sources[direction], direction)
            cells.append(show(value) + ("*" if tested else ""))
        rows.append([label, *cells])
    notes = [
        "rows of: that ticket's rows, trained on the direction from their base values. tuned on ..., as is: that lottery's "
        "tuned rows, not trained again. union, intersection: of the directions' tickets. random: as many rows as the own "
        "ticket has.",
    ]
    if score == "bleu":
        notes.append(
            "*: differs from the own ticket, p < .05 by sacrebleu's paired bootstrap with every seed, in one direction; not "
            "corrected for multiple comparisons."
        )
    seeds = f", mean of {len(results.seeds)} seeds" if len(results.seeds) > 1 else ""
    columns = [Column("", numeric=False), *map(Column, results.directions)]
    return Table(f"{title} on the test text of each direction{seeds}", columns, rows, notes)


def readings(results: MultilingualResults, overlaps: Overlaps) -> list[str]:
    """What the numbers say, a sentence each."""
    directions = results.directions
    numbers = [number for number, name in enumerate(overlaps.names) if name != JOINT]
    pairs = [(one, other) for one in numbers for other in numbers if other < one]
    above = [pair for pair in pairs if overlaps.shared(*pair) > overlaps.by_chance(*pair)]
    common = frozenset.intersection(*(overlaps.rows[number] for number in numbers))
    sentences = [
        f"{len(above)} of {len(pairs)} pairs of tickets share more rows than random tickets of their sizes would; "
        f"{len(common)} rows are in all."
    ]
    if more := _over_seeds(results, overlaps.vocab_size):
        sentences.append(more)
    for label, kind, sources in (
        ("Another direction's rows, trained, gain", Kind.TRAINED, directions),
        ("The joint ticket's rows, trained, gain", Kind.TRAINED, [JOINT]),
        ("The rows of all tickets together, trained, gain", Kind.TRAINED, [UNION]),
        ("The rows common to all, trained, gain", Kind.TRAINED, [INTERSECTION]),
        ("Random rows, trained, gain", Kind.TRAINED, [RANDOM]),
        ("Another direction's tuned rows, as they are, gain", Kind.APPLIED, directions),
    ):
        gained = []
        for direction in directions:
            own = _gain(results, Kind.TRAINED, direction, direction)
            for source in sources:
                other = _gain(results, kind, source, direction)
                if source != direction and own and other is not None:
                    gained.append(other / own)
        if gained:
            sentences.append(
                f"{label} {100 * sum(gained) / len(gained):.0f} % of what the own ticket gains in test loss "
                f"(from {100 * min(gained):.0f} % to {100 * max(gained):.0f} %)."
            )
    starred = [
        f"{source} on {direction}"
        for direction in directions
        for source in (*directions, JOINT, UNION, INTERSECTION, RANDOM)
        if source != direction and differs(results, source, direction)
    ]
    sentences.append(
        f"BLEU differs significantly from the own ticket's for: {', '.join(starred)}."
        if starred
        else "In BLEU no ticket's rows differ significantly from the direction's own."
    )
    return sentences


def _over_seeds(results: MultilingualResults, vocab_size: int) -> str | None:
    """Whether a ticket depends on the direction or on the sentences' order; None for a single seed."""
    drawn = [(name, seed, ids) for seed, of in results.tickets.items() for name, ids in of.items() if name != JOINT]
    overlaps = Overlaps([name for name, _, _ in drawn], [frozenset(ids) for *_, ids in drawn], vocab_size)
    same = []
    different = []
    for one, other in combinations(range(len(drawn)), 2):
        jaccard = overlaps.jaccard(one, other)
        if jaccard is None:
            continue
        if drawn[one][0] == drawn[other][0]:
            same.append(jaccard)
        elif drawn[one][1] == drawn[other][1]:
            different.append(jaccard)
    if not same or not different:
        return None
    return (
        f"Tickets of one direction with two seeds have a Jaccard overlap of {sum(same) / len(same):.3f} on average, those of "
        f"two directions with one seed {sum(different) / len(different):.3f}."
    )


def _gain(results: MultilingualResults, kind: Kind, source: str, direction: str) -> float | None:
    """By how much rows lower the test loss."""
    untuned = results.mean(Kind.UNTUNED, JOINT, direction, "test_loss")
    tuned = results.mean(kind, source, direction, "test_loss")
    return None if untuned is None or tuned is None else untuned - tuned
