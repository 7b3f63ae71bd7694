"""The certificate of a risk: validity by simulation, published values, scipy, brute force; wrong variants are caught.

Legend: R repetitions, N sentences, A tickets, the largest first.
"""

from __future__ import annotations

import doctest
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import stats

from ksl_ds.certificate import risk
from ksl_ds.certificate.calibration import sentence_losses
from ksl_ds.certificate.criterion import Predictions
from ksl_ds.certificate.report import risk_curves, risk_sentence, risk_table
from ksl_ds.certificate.risk import (
    betting_pvalue,
    binomial_pvalue,
    certify_risk,
    fixed_sequence,
    hoeffding_bentkus_pvalue,
    risk_pvalue,
    sentences_needed,
    upper_bound,
)

REPETITIONS = 4000
DELTA = 0.05
# Four standard errors above delta: what a valid procedure does not exceed, up to one simulation in 30,000.
LIMIT = DELTA + 4 * math.sqrt(DELTA * (1 - DELTA) / REPETITIONS)


def token_shares(mean: float, n: int, tokens: int, correlation: float, seed: int) -> np.ndarray:
    """Share of differing tokens per sentence, (R, N). Tokens of a sentence share a rate, whose spread correlates them."""
    noise = np.random.default_rng(seed)
    if correlation == 0:
        return noise.binomial(tokens, mean, (REPETITIONS, n)) / tokens
    strength = 1 / correlation - 1
    rate_RN = noise.beta(mean * strength, (1 - mean) * strength, (REPETITIONS, n))
    return noise.binomial(tokens, rate_RN) / tokens


def test_the_examples_in_docstrings_run():
    done = doctest.testmod(risk)
    assert done.attempted >= 3 and done.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5, 60, 300])
@pytest.mark.parametrize("epsilon", [0.05, 0.2])
@pytest.mark.parametrize(("tokens", "correlation"), [(1, 0), (12, 0), (12, 0.3), (12, 0.9)])
def test_false_rejections_are_at_most_delta_at_the_edge(n, epsilon, tokens, correlation):
    """Risk exactly epsilon, the hardest case: every p-value, and the one that is used."""
    loss_RN = token_shares(epsilon, n, tokens, correlation, seed=n)
    found = {"used": risk_pvalue(loss_RN, epsilon, binary=tokens == 1)[0]}
    found["betting"] = betting_pvalue(loss_RN, epsilon)
    found["Hoeffding-Bentkus"] = hoeffding_bentkus_pvalue(loss_RN, epsilon)
    for name, p_R in found.items():
        for delta in (DELTA, 0.2):
            limit = delta + 4 * math.sqrt(delta * (1 - delta) / REPETITIONS)
            assert (p_R <= delta).mean() <= limit, (name, delta)


def family(p_of, in_order: bool = True) -> float:
    """Share of repetitions that certify a false ticket: 3 tickets of risk .02, then 10 of risk .1000001 at epsilon .1."""
    risks_A = [0.02] * 3 + [0.1 + 1e-7] * 10
    p_AR = np.stack([p_of(token_shares(mean, 80, 1, 0, seed=at)) for at, mean in enumerate(risks_A)])
    order_AR = np.argsort(p_AR, axis=0) if not in_order else np.arange(len(risks_A))[:, None].repeat(REPETITIONS, 1)
    false = 0
    for p_A, order_A in zip(p_AR.T, order_AR.T, strict=True):
        certified = order_A[: fixed_sequence(p_A[order_A].tolist(), DELTA)]
        false += bool((certified >= 3).any())
    return false / REPETITIONS


def exact(loss_RN):
    return binomial_pvalue(loss_RN, 0.1)


def test_false_certificates_of_a_whole_grid_are_at_most_delta():
    assert family(exact) <= LIMIT


def test_an_order_chosen_by_the_p_values_is_caught():
    assert family(exact, in_order=False) > 2 * LIMIT


def strictly_below(loss_RN):
    return stats.binom.cdf(loss_RN.sum(-1) - 1, loss_RN.shape[-1], 0.1)


def normal_approximation(loss_RN):
    mean_R = loss_RN.mean(-1)
    return stats.norm.cdf((mean_R - 0.1) / np.sqrt(mean_R * (1 - mean_R) / loss_RN.shape[-1] + 1e-12))


def measured_below(loss_RN):
    return np.where(loss_RN.mean(-1) <= 0.1, 0.0, 1.0)


@pytest.mark.parametrize("wrong", [strictly_below, normal_approximation, measured_below])
def test_a_wrong_p_value_is_caught(wrong):
    assert family(wrong) > LIMIT


def test_counting_the_tokens_of_a_sentence_as_independent_is_caught():
    """The exact binomial over tokens holds without correlation, and only then; over sentences betting holds with it."""
    n, tokens = 60, 12
    rates = {}
    for correlation in (0, 0.3):
        loss_RN = token_shares(0.1, n, tokens, correlation, seed=3)
        differing_R = np.rint(loss_RN.sum(-1) * tokens)
        rates[correlation] = (stats.binom.cdf(differing_R, n * tokens, 0.1) <= DELTA).mean()
        assert (betting_pvalue(loss_RN, 0.1) <= DELTA).mean() <= LIMIT
    assert rates[0] <= LIMIT < 2 * LIMIT < rates[0.3]


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.2])
def test_betting_is_as_near_to_the_best_bet_as_an_average_can_be(mean):
    """Brute force over bets: no average is better than the best bet, nor worse by more than the number of bets."""
    loss_RN = token_shares(mean, 200, 8, 0.1, seed=3)[:300]
    with np.errstate(divide="ignore"):
        capital_R = np.max([np.log1p(bet / 200 * (0.1 - loss_RN) / 0.9).sum(-1) for bet in range(201)], axis=0)
    best_p_R = np.exp(-capital_R)
    p_R = betting_pvalue(loss_RN, 0.1)
    assert (p_R >= best_p_R * (1 - 1e-9)).all()
    assert (p_R <= best_p_R * risk.NUM_BETS * 1.1).all()


@pytest.mark.parametrize(
    ("n", "epsilon", "capital"),
    [(40, 0.2, 14.145962677349909), (150, 0.15, 16.729501163672115), (400, 0.14, 63.83822140452384)],
)
def test_betting_against_the_implementation_of_its_authors(n, epsilon, capital):
    """Capital of confseq 0.0.11: diversified_betting_mart(1 - loss, 1 - epsilon), 50 fixed bets of equal weight, theta=1."""
    number_N = np.arange(1, n + 1)
    loss_N = (number_N**2 * 7919 % 101 / 101) ** 3 / 2
    assert betting_pvalue(loss_N, epsilon) == pytest.approx(1 / capital, rel=1e-12)


def test_wilks_tables_of_failures_and_trials():
    """Published for 95 % / 95 %: 59, 93, 124, 153, 181 trials with 0 to 4 failures; one trial fewer is not enough."""
    for failures, n in enumerate([59, 93, 124, 153, 181]):
        for trials in (n - 1, n):
            loss_N = np.zeros(trials)
            loss_N[:failures] = 1
            assert (binomial_pvalue(loss_N, 0.05) <= 0.05) == (trials == n)


def test_binomial_against_scipy_and_a_sum_by_hand():
    for n, failures, epsilon in [(1, 0, 0.3), (7, 2, 0.05), (60, 5, 0.2), (500, 20, 0.05)]:
        loss_N = np.r_[np.ones(failures), np.zeros(n - failures)]
        p = binomial_pvalue(loss_N, epsilon)
        assert p == pytest.approx(stats.binomtest(failures, n, epsilon, alternative="less").pvalue, rel=1e-10)
        by_hand = math.fsum(math.comb(n, k) * epsilon**k * (1 - epsilon) ** (n - k) for k in range(failures + 1))
        assert p == pytest.approx(by_hand, rel=1e-9)
        bound = stats.binomtest(failures, n, alternative="less").proportion_ci(0.95, method="exact").high
        assert upper_bound(loss_N, 0.95, binary=True) == pytest.approx(bound, abs=1e-9)


def test_hoeffding_bentkus_by_hand():
    assert hoeffding_bentkus_pvalue(np.zeros(50), 0.1) == pytest.approx(0.9**50)
    assert hoeffding_bentkus_pvalue(np.full(50, 0.1), 0.1) == 1
    loss_N = np.full(100, 0.04)
    kl = 0.04 * math.log(0.04 / 0.1) + 0.96 * math.log(0.96 / 0.9)
    by_hand = min(math.exp(-100 * kl), math.e * stats.binom.cdf(4, 100, 0.1))
    assert hoeffding_bentkus_pvalue(loss_N, 0.1) == pytest.approx(by_hand)


def test_betting_is_the_sharper_bound_for_losses_of_small_variance():
    loss_RN = np.full((1, 300), 0.08)
    p, bound = risk_pvalue(loss_RN, 0.1, binary=False)
    assert bound.tolist() == ["betting"] and p[0] < hoeffding_bentkus_pvalue(loss_RN, 0.1)[0] / 10
    assert risk_pvalue(np.zeros((1, 300)), 0.1, binary=False)[1].tolist() == ["Hoeffding-Bentkus"]


def test_p_values_fall_with_epsilon_and_ignore_the_order_of_sentences():
    loss_N = token_shares(0.1, 100, 10, 0.3, seed=1)[0]
    p = [float(risk_pvalue(loss_N, epsilon, False)[0]) for epsilon in np.linspace(0.01, 0.99, 99)]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(p, p[1:], strict=False))
    assert risk_pvalue(loss_N[::-1], 0.15, False)[0] == pytest.approx(risk_pvalue(loss_N, 0.15, False)[0], rel=1e-9)


def test_power_grows_with_sentences_and_with_the_distance_to_epsilon():
    def power(mean, n):
        return (risk_pvalue(token_shares(mean, n, 12, 0.2, seed=7)[:1000], 0.1, False)[0] <= DELTA).mean()

    assert power(0.05, 100) < power(0.05, 300) and power(0.08, 300) < power(0.05, 300)
    assert power(0.02, 300) > 0.99


def test_the_smallest_certified_ticket_and_the_sentence():
    losses = [(100, np.zeros(200)), (50, np.full(200, 0.01)), (10, np.full(200, 0.3)), (0, np.zeros(200))]
    found = certify_risk(losses, 0.05, 0.95, binary=False)
    assert [ticket.certified for ticket in found.tickets] == [True, True, False, False]
    assert found.smallest is not None and found.smallest.rows == 50
    assert found.sentence().startswith("With 95% confidence the ticket of 50 rows has a risk of at most 0.05")
    # p <= delta and an upper bound of at most epsilon are the same statement.
    assert [ticket.upper_bound <= 0.05 for ticket in found.tickets] == [ticket.p <= 0.05 for ticket in found.tickets]


def test_none_certified_says_what_would_do():
    found = certify_risk([(9, np.zeros(20))], 0.05, 0.95, binary=True)
    assert found.smallest is None and found.needed == 59
    assert "about 59 sentences" in found.sentence()
    assert risk_pvalue(np.zeros(20), found.tickets[0].upper_bound, True)[0] <= 0.05
    hopeless = certify_risk([(9, np.full(20, 0.2))], 0.05, 0.95, binary=False)
    assert hopeless.needed is None and "more sentences would not" in hopeless.sentence()


def test_sentences_needed_is_where_the_same_losses_repeated_are_enough():
    few_N = np.r_[np.full(3, 0.5), np.zeros(47)]
    needed = sentences_needed(few_N, 0.05, 0.95, binary=False)
    assert needed is not None
    times = needed / 50
    assert risk_pvalue(np.tile(few_N, math.ceil(times)), 0.05, False)[0] <= 0.05
    assert risk_pvalue(np.tile(few_N, math.ceil(times) - 1), 0.05, False)[0] > 0.05


@pytest.mark.parametrize(
    ("losses", "epsilon", "words"),
    [
        ([(5, np.zeros(9)), (10, np.zeros(9))], 0.1, "from the largest"),
        ([(5, np.zeros(9)), (5, np.zeros(9))], 0.1, "from the largest"),
        ([], 0.1, "from the largest"),
        ([(5, np.zeros(9)), (4, np.zeros(8))], 0.1, "same sentences"),
        ([(5, np.zeros(0))], 0.1, "no sentences"),
        ([(5, np.zeros(9))], 1.0, "epsilon"),
        ([(5, np.full(9, 1.5))], 0.1, "between 0 and 1"),
        ([(5, np.full(9, np.nan))], 0.1, "between 0 and 1"),
    ],
)
def test_what_cannot_be_tested_is_refused(losses, epsilon, words):
    with pytest.raises(ValueError, match=words):
        certify_risk(losses, epsilon, 0.95, binary=False)


def test_binomial_refuses_losses_between():
    with pytest.raises(ValueError, match="0 or 1"):
        binomial_pvalue(np.full(5, 0.5), 0.1)


# --- what people see ---


def record(epsilon, losses=((100, 0.0), (50, 0.01), (10, 0.3))):
    found = certify_risk([(rows, np.full(200, loss)) for rows, loss in losses], epsilon, 0.95, binary=False)
    tickets = [
        {"name": f"alpha 0.{ticket.rows}", "alpha": 0.5, **asdict(ticket), "held_out_risk": 0.02}
        for ticket in found.tickets
    ]
    certified = [ticket for ticket in tickets if ticket["certified"]]
    sequences = [{"name": "partial transfer", "confidence": 0.95, "needed": found.needed, "tickets": tickets}]
    return {"risk": "tokens", "epsilon": epsilon, "confidence": 0.95, "sentences": 200, "held_out_sentences": 99} | {
        "sequences": sequences,
        "smallest": certified[-1] if certified else None,
    }


def test_the_risk_table_and_its_sentence_name_the_smallest_certified_ticket():
    table = risk_table(record(0.05))
    assert [row[6] for row in table.rows] == ["yes", "yes", "no"] and table.rows[1][2] == "0.0100"
    assert "independent draws" in " ".join(table.notes)
    assert "ticket of 50 rows" in risk_sentence(record(0.05)) and "0.0200 on 99 held-out" in risk_sentence(record(0.05))
    assert "about 368 sentences" in risk_sentence(record(0.01, [(100, 0.0)]))
    assert "an epsilon of" in risk_sentence(record(0.05, [(100, 0.3)]))
    assert "sentences with that risk" not in risk_sentence(record(0.05, [(100, 0.3)]))


def test_the_risk_curve_marks_the_certified_ticket():
    axes = risk_curves(record(0.05)).axes[0]
    risk_line, held_out, epsilon, smallest = axes.lines
    assert list(risk_line.get_ydata()) == pytest.approx([0, 0.01, 0.3]) and list(held_out.get_ydata()) == [0.02] * 3
    assert set(epsilon.get_ydata()) == {0.05} and list(smallest.get_xdata()) == [50]
    assert len(axes.collections[0].get_segments()) == 3


@pytest.mark.parametrize("n", [50, 200, 600])
def test_losses_of_sentences_are_those_counted_by_hand(n):
    noise = torch.Generator().manual_seed(n)
    length_S = torch.randint(1, 9, (n,), generator=noise)
    gold_N, *tops = (torch.randint(0, 2, (int(length_S.sum()),), generator=noise) for _ in range(3))
    one, other = (Predictions(torch.empty(0), torch.empty(0), top_N, length_S) for top_N in tops)
    by_hand = [
        (left != right).double().mean().item()
        for left, right in zip(*(t.split(length_S.tolist()) for t in tops), strict=True)
    ]
    assert sentence_losses("tokens", one, other, gold_N).tolist() == pytest.approx(by_hand)
    assert sentence_losses("sentence", one, other, gold_N).tolist() == [float(share > 0) for share in by_hand]
    lost = [
        ((left == gold) & (right != gold)).double().mean().item()
        for gold, left, right in zip(*(t.split(length_S.tolist()) for t in (gold_N, *tops)), strict=True)
    ]
    assert sentence_losses("lost_tokens", one, other, gold_N).tolist() == pytest.approx(lost)
    one, other = (replace(side, chrf_S=torch.rand(n, generator=noise).double() * 100) for side in (one, other))
    worse = [
        max(0.0, (left - right) / 100) for left, right in zip(one.chrf_S.tolist(), other.chrf_S.tolist(), strict=True)
    ]
    assert sentence_losses("chrf", one, other, gold_N).tolist() == pytest.approx(worse)
