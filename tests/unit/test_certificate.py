"""The certificate's mathematics against cases done by hand, brute force and scipy; its words and its curves."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from helpers.html_requests import Page
from helpers.synthetic_certificate import COUNTEREXAMPLES, candidate
from scipy import stats

from ksl_ds.certificate import criterion as certificate
from ksl_ds.certificate.criterion import MIN_SENTENCES, agreement, certified, clopper_pearson, untuned_tokens
from ksl_ds.certificate.report import certificate_curves, certificate_reading, certificate_table, counterexamples_html
from ksl_ds.lottery.pvalues import critical_count
from ksl_ds.lottery.selection import select_alpha
from ksl_ds.report.plots import svg


def test_the_examples_in_docstrings_run():
    done = doctest.testmod(certificate)
    assert done.attempted >= 8 and done.failed == 0


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("num_samples", [32, 576])
def test_rows_outside_a_ticket_stay_below_tau(num_samples, alpha):
    """The premise: with k* / d as tau, D <= tau outside, and (k* - 1) / d is the largest D that can be there."""
    count_V = torch.arange(num_samples + 1)
    count = critical_count(num_samples, alpha)
    outside_V = torch.ones(len(count_V), dtype=torch.bool)
    outside_V[select_alpha(count_V, num_samples, alpha)] = False
    assert int(count_V[outside_V].max()) == count - 1


def test_criterion_at_its_edge_is_exact():
    """Half the margin equal to tau is not enough, one bit more is; done by hand in binary fractions."""
    first = torch.tensor([0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.75, 1.0])
    second = torch.tensor([0.25, 0.25, 0.25, 0.0])
    assert certified(first, second, 4, 32).tolist() == [False, True, True, True]
    # u = 2: the margin must be above 1/2; u = 0: any margin will do, but some.
    assert certified(first, second, 4, 32, torch.full((4,), 2)).tolist() == [False, False, False, True]
    assert certified(first, first, 4, 32, torch.zeros(4, dtype=torch.int64)).tolist() == [False] * 4
    assert certified(first, second, 4, 32, torch.zeros(4, dtype=torch.int64)).all()


def test_nothing_is_certified_where_no_test_can_reject():
    assert critical_count(2, 0.01) == 3
    assert not certified(torch.tensor([1.0]), torch.tensor([0.0]), 3, 2).any()


def test_untuned_tokens_are_those_of_the_input_so_far():
    noise = torch.Generator().manual_seed(0)
    ids_L = torch.randint(0, 20, (30,), generator=noise)
    in_ticket_V = torch.rand(20, generator=noise) < 0.4
    for num_prompt in (1, 7, 29):
        by_hand = [sum(not in_ticket_V[token] for token in ids_L[:at].tolist()) for at in range(num_prompt, len(ids_L))]
        assert untuned_tokens(ids_L, num_prompt, in_ticket_V).tolist() == by_hand


def test_agreement_counts_tokens_and_sentences():
    agrees = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    length = torch.tensor([2, 3, 2])  # yes yes | no yes yes | no yes
    covered = torch.tensor([0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    everything, part = agreement(agrees, length), agreement(agrees, length, covered)
    assert (everything.tokens, everything.agreeing) == (7, 5)
    assert (everything.sentences, everything.agreeing_sentences, everything.interval) == (3, 1, None)
    # The first sentence has no covered token, the second agrees on all of its own.
    assert (part.tokens, part.agreeing, part.sentences, part.agreeing_sentences) == (3, 2, 2, 1)


def test_an_interval_comes_with_the_sentences_for_it():
    for sentences in (MIN_SENTENCES - 1, MIN_SENTENCES):
        found = agreement(torch.ones(2 * sentences, dtype=torch.bool), torch.full((sentences,), 2))
        assert (found.interval is None) == (sentences < MIN_SENTENCES)
    # What MIN_SENTENCES says of itself.
    low, high = clopper_pearson(MIN_SENTENCES // 2, MIN_SENTENCES)
    assert 0.37 < high - low < 0.38


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (30, 30), (17, 64), (63, 64), (500, 1012)])
def test_clopper_pearson_inverts_the_binomial(successes, trials):
    low, high = clopper_pearson(successes, trials)
    beta = stats.beta.ppf([0.025, 0.975], [successes, successes + 1], [trials - successes + 1, trials - successes])
    assert (low, high) == pytest.approx((np.nan_to_num(beta[0]), 1.0 if np.isnan(beta[1]) else beta[1]), abs=1e-9)
    # Its definition: at the ends, what was seen or worse has a chance of 2.5 %.
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)


# --- what people see ---


def test_the_table_shows_counts_intervals_and_whose_words_they_are():
    rows = [candidate(0.5, certified=40, agreeing=38), candidate(0.05, certified=0, agreeing=0, sentences=12)]
    table = certificate_table(rows, "title")
    cells = dict(zip((column.name for column in table.columns), table.rows[0], strict=False))
    assert cells[""] == "partial transfer, alpha 0.5"
    assert cells["certified (reconstructed)"] == "0.400" and "0.950" in table.rows[0]
    assert cells["whole sentences agree [95%]"] == "58 of 64 [0.807, 0.965]"
    assert table.rows[1][6:8] == ["–", "–"] and table.rows[1][3] == "6 of 12 [too few]"
    words = " ".join(table.notes)
    for word in ("reported:", "reconstructed:", "measured:", "exact wording is not known", "not proved", "nominal"):
        assert word in words


def test_the_reading_names_what_breaks_and_what_says_nothing():
    rows = [
        candidate(0.05, certified=0, agreeing=0),
        candidate(0.5, certified=40, agreeing=38),
        candidate(0.95, certified=60, agreeing=60),
        candidate(0.5, certified=60, agreeing=60, given="partial_tuning", tau_count=40),
        candidate(None, certified=60, agreeing=60, given="partial_tuning", selection="top_k"),
    ]
    text = "\n".join(certificate_reading(rows))
    assert "certifies no token, so it says nothing, for partial transfer, alpha 0.05." in text
    assert "does not hold on this model" in text and "partial transfer, alpha 0.5 (2 of 40)" in text
    assert "No token that the reconstructed criterion certifies differs for partial transfer, alpha 0.95" in text
    assert "ticket (partial tuning), alpha 0.5: rows outside it reach the critical D" in text
    assert "ticket (partial tuning), top_k: no alpha drew it" in text
    assert "too few" not in text
    assert "No intervals: 1 sentence is too few" in certificate_reading([candidate(0.5, 1, 1, sentences=1)])[0]


def test_the_curves_hold_every_point():
    rows = [candidate(alpha, certified=40, agreeing=38) for alpha in (0.05, 0.5, 0.95)]
    rows += [candidate(0.5, certified=50, agreeing=45, given="partial_tuning")]
    rows += [candidate(None, certified=50, agreeing=45, given="partial_tuning", selection="top_k")]
    figure = certificate_curves(rows)
    certified_axes, agreement_axes = figure.axes
    assert [list(line.get_xdata()) for line in certified_axes.lines][::2] == [[0.05, 0.5, 0.95]] * 2
    assert [list(line.get_ydata()) for line in certified_axes.lines][:2] == [[0.4] * 3, [0.5]]
    (intervals, of_given) = agreement_axes.collections
    assert len(intervals.get_segments()) == 3 and len(of_given.get_segments()) == 1
    text = svg(figure, "f")
    for word in ("reconstructed", "union bound", "whole sentences", "tickets with rows of their own"):
        assert word in text


def test_counterexamples_show_text_that_is_no_markup():
    page = Page(str(counterexamples_html(COUNTEREXAMPLES)))
    assert page.requests == []
    text = " ".join(word for piece in page.text for word in piece.split())
    assert "the 10 of widest margin of 12 certified tokens that differ" in text
    assert "<b>source</b>" in text and "␣chat" in text and "reconstructed and union bound" in text
    assert page.tags.count("table") == 2
