"""What tickets share: against brute force, and the published tickets against the paper."""

from __future__ import annotations

import pytest
import torch
from helpers.tickets import random_matrix
from hypothesis import given
from hypothesis import strategies as st

from ksl_ds import draw_ticket
from ksl_ds.commands.inspect import short_names
from ksl_ds.errors import UserError
from ksl_ds.lottery.overlap import Overlaps, overlaps_at, overlaps_of
from ksl_ds.model.published import published_directions, published_ids

SETS = st.lists(st.frozensets(st.integers(0, 19)), min_size=2, max_size=5)


@given(SETS)
def test_overlaps_are_those_of_brute_force(rows):
    overlaps = Overlaps([str(number) for number in range(len(rows))], rows, 20)
    for one, mine in enumerate(rows):
        for other, theirs in enumerate(rows):
            shared = [number for number in range(20) if number in mine and number in theirs]
            either = [number for number in range(20) if number in mine or number in theirs]
            assert overlaps.shared(one, other) == len(shared)
            assert overlaps.jaccard(one, other) == (len(shared) / len(either) if either else None)
        assert overlaps.only(one) == [n for n in range(20) if n in mine and sum(n in some for some in rows) == 1]
    assert overlaps.common() == [n for n in range(20) if all(n in some for some in rows)]


def test_the_overlap_by_chance_is_the_mean_over_random_tickets():
    generator = torch.Generator().manual_seed(0)
    shared = []
    for _ in range(4000):
        first, second = (frozenset(torch.randperm(50, generator=generator)[:size].tolist()) for size in (10, 20))
        shared.append(len(first & second))
    overlaps = Overlaps(["a", "b"], [frozenset(range(10)), frozenset(range(20))], 50)
    assert (
        sum(shared) / len(shared) == pytest.approx(overlaps.by_chance(0, 1), abs=0.1) and overlaps.by_chance(0, 1) == 4
    )


def test_the_published_tickets_share_the_ten_rows_of_the_paper():
    rows = [frozenset(published_ids(direction)) for direction in published_directions()]
    assert len(rows) == 6 and len(Overlaps(published_directions(), rows, 32000).common()) == 10


def tickets(alpha: float = 0.5):
    before_VD = random_matrix()
    after = {}
    for name, moved in {"one": [3, 4, 5], "two": [4, 5, 6, 7]}.items():
        after_VD = before_VD.clone()
        after_VD[moved] += torch.arange(1, len(moved) + 1)[:, None] * 0.2
        after[name] = draw_ticket(before_VD, after_VD, alpha=alpha)
    return after


def test_at_its_own_alpha_a_ticket_is_what_was_drawn_and_it_grows_with_alpha():
    drawn = tickets()
    by_alpha = overlaps_at(drawn, [0.05, 0.5, 0.95])
    assert by_alpha[0.5].rows == overlaps_of(drawn).rows
    for number in range(2):
        sizes = [len(overlaps.rows[number]) for overlaps in by_alpha.values()]
        assert sizes == sorted(sizes) and sizes[-1] > 0
    for alpha, overlaps in by_alpha.items():
        assert overlaps.rows == overlaps_of(tickets(alpha)).rows


def test_tickets_of_different_models_do_not_compare():
    other_VD = random_matrix()[:, :7].contiguous()
    other = draw_ticket(other_VD, other_VD + 1, selection="top_k", top_k=2)
    with pytest.raises(UserError, match=r"one and other are tickets of embeddings of different shapes"):
        overlaps_of({"one": tickets()["one"], "other": other})


def test_names_are_what_tells_paths_apart():
    assert short_names(["runs/en-ca/ticket", "runs/en-es/ticket"]) == ["en-ca", "en-es"]
    assert short_names(["a/x/t", "b/x/s"]) == ["a/t", "b/s"]
    assert short_names(["a", "b/c"]) == ["a", "b/c"] and short_names(["a/b"]) == ["a/b"]
