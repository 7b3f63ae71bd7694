"""Which ticket is certified to have a mean loss of at most epsilon: Learn then Test.

A loss of a sentence is a number in [0, 1]; a ticket's risk is its mean loss over all sentences that could come. For every
ticket the null hypothesis "risk > epsilon" is tested on n calibration sentences, from the largest ticket to the smallest. The
first one that is not rejected ends the tests, and all rejected before it are certified.

Why it is valid: if no ticket has a risk above epsilon, no certificate is false. Otherwise let T be the first ticket in
the order whose risk is above epsilon. T is the same whatever the sentences are, since the order is. A ticket of risk above
epsilon can be certified only if T is, and T only if its p-value is at most delta, which a valid p-value is with
probability at most delta. So with probability 1 - delta no certified ticket has a risk above epsilon, however many are tested.
Tickets need not be nested, nor risks rise as tickets shrink: that affects only how much is certified.

What it assumes:

- The calibration sentences are independent draws from the distribution of future sentences. Tokens within a sentence may
  depend on each other in any way, since a loss is one number a sentence.
- The tickets, the reference, epsilon, the confidence and the loss were fixed without the calibration sentences. Text that
  trained a model, stopped its training or chose a learning rate is no calibration text for it.
- One run, one statement: who certifies several times on the same sentences and keeps the best has no guarantee.

Legend: N sentences, J bets. Losses may have leading dimensions ("..."), one sample a row.

References
----------
A. N. Angelopoulos, S. Bates, E. J. Candès, M. I. Jordan, L. Lei, "Learn then Test", arXiv 2110.01052: fixed-sequence testing.
S. Bates, A. N. Angelopoulos, L. Lei, J. Malik, M. I. Jordan, "Distribution-free, risk-controlling prediction sets",
arXiv 2101.02703: the Hoeffding-Bentkus p-value. I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by
betting", arXiv 2010.09686: the betting p-value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
Bound = Literal["binomial", "Hoeffding-Bentkus", "betting"]

NUM_BETS = 50
MOST_SENTENCES = 10_000_000  # where the search for a sufficient number of sentences ends
STEPS = 40  # of a bisection: epsilon to 1e-12


def binomial_pvalue(loss_N: Losses, epsilon: float) -> Losses:
    """Exact p-value of "mean loss > epsilon" for losses that are 0 or 1: P(Binomial(n, epsilon) <= sum of the losses).

    The sum is Binomial(n, r) with r > epsilon under the null hypothesis, thus stochastically larger than Binomial(n, epsilon),
    whose distribution function at its own draw is at most delta with probability at most delta.

    Parameters
    ----------
    loss_N : float64 array (..., N)
        0 or 1 each.
    epsilon : float
        Tested risk, in (0, 1).

    Returns
    -------
    float64 array (...)

    Raises
    ------
    ValueError
        For losses other than 0 and 1, no losses, or epsilon outside (0, 1).

    Examples
    --------
    Without a failure, 59 trials are the fewest that show at most 5 % with 95 % confidence (S. S. Wilks, 1941).

    >>> [bool(binomial_pvalue(np.zeros(n), 0.05) <= 0.05) for n in (58, 59)]
    [False, True]
    """
    from scipy.stats import binom

    _check(loss_N, epsilon)
    if not np.isin(loss_N, (0, 1)).all():
        raise ValueError("the binomial p-value is for losses that are 0 or 1")
    return np.asarray(binom.cdf(loss_N.sum(-1), loss_N.shape[-1], epsilon))


def hoeffding_bentkus_pvalue(loss_N: Losses, epsilon: float) -> Losses:
    """p-value of "mean loss > epsilon" for losses in [0, 1], from their mean alone.

    min(exp(-n kl(min(mean, epsilon), epsilon)), e P(Binomial(n, epsilon) <= ceil(n mean))), kl being the relative entropy of
    two Bernoulli variables: both of Hoeffding's and Bentkus' inequalities bound the same lower tail P(mean <= x), and the
    smaller of two such bounds is a bound of it for every x, so no correction for the choice is needed.

    Parameters
    ----------
    loss_N : float64 array (..., N)
        In [0, 1].
    epsilon : float
        Tested risk, in (0, 1).

    Returns
    -------
    float64 array (...)

    Raises
    ------
    ValueError
        For losses outside [0, 1], no losses, or epsilon outside (0, 1).
    """
    _check(loss_N, epsilon)
    return _hoeffding_bentkus(loss_N.mean(-1), loss_N.shape[-1], epsilon)


def betting_pvalue(loss_N: Losses, epsilon: float) -> Losses:
    """p-value of "mean loss > epsilon" for losses in [0, 1], by betting: it uses their whole distribution.

    A bet of size b in (0, 1] turns a capital of 1 into the product over sentences of 1 + b (epsilon - loss) / (1 - epsilon),
    which is never negative. Under the null hypothesis each factor has a mean below 1 and they are independent, so the
    product has one too, and so has the average over fixed bets ("diversified Kelly betting"). By Markov's inequality the
    average capital reaches 1 / delta with probability at most delta: its inverse is a p-value. Fixed bets make it the same
    in every order of sentences.

    Parameters
    ----------
    loss_N : float64 array (..., N)
        In [0, 1].
    epsilon : float
        Tested risk, in (0, 1).

    Returns
    -------
    float64 array (...)

    Raises
    ------
    ValueError
        For losses outside [0, 1], no losses, or epsilon outside (0, 1).
    """
    _check(loss_N, epsilon)
    return _of_capital(_log_growth(loss_N, epsilon), loss_N.shape[-1])


def risk_pvalue(loss_N: Losses, epsilon: float, binary: bool) -> tuple[Losses, NDArray[np.str_]]:
    """A valid p-value of "mean loss > epsilon", and the name of the bound that gave it.

    Binary losses: the exact binomial. Others: twice the smaller of Hoeffding-Bentkus and betting. The factor two is the
    price of choosing after the fact: either is below delta / 2 with probability at most delta / 2, so one of them is with
    at most delta. Which bound is used for binary losses is decided by the kind of loss, never by the sample.

    Parameters
    ----------
    loss_N : float64 array (..., N)
        In [0, 1].
    epsilon : float
        Tested risk, in (0, 1).
    binary : bool
        Whether a loss of this kind is always 0 or 1.

    Returns
    -------
    p : float64 array (...)
    bound : array (...) of names
        See `Bound`.

    Raises
    ------
    ValueError
        See `binomial_pvalue` and `betting_pvalue`.
    """
    if binary:
        p = binomial_pvalue(loss_N, epsilon)
        return p, np.full(p.shape, "binomial")
    return _smaller(hoeffding_bentkus_pvalue(loss_N, epsilon), betting_pvalue(loss_N, epsilon))


def upper_bound(loss_N: Losses, confidence: float, binary: bool) -> float:
    """Upper confidence bound of one ticket's risk: every larger epsilon is rejected, its p-value being 1 - confidence at most.

    All p-values fall as epsilon grows, so the rejected ones are an interval. The bound is for one ticket looked at alone.

    Parameters
    ----------
    loss_N : float64 array (N,)
        In [0, 1].
    confidence : float
        In (0, 1).
    binary : bool
        Whether a loss of this kind is always 0 or 1.

    Returns
    -------
    float
        In (0, 1]; rounded up by at most 1e-12.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if risk_pvalue(loss_N, middle, binary)[0] <= 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def sentences_needed(loss_N: Losses, epsilon: float, confidence: float, binary: bool) -> int | None:
    """About how many sentences would certify epsilon if their losses were distributed as the measured ones.

    It is the number at which a sample of the measured distribution has a p-value of 1 - confidence. A new sample does
    better or worse by chance, so this many certify in about one of two cases.

    Parameters
    ----------
    loss_N : float64 array (N,)
        In [0, 1].
    epsilon : float
        In (0, 1).
    confidence : float
        In (0, 1).
    binary : bool
        Whether a loss of this kind is always 0 or 1.

    Returns
    -------
    int or None
        None if the measured risk is not below epsilon, or so close to it that ten million are too few.

    Examples
    --------
    >>> sentences_needed(np.zeros(20), 0.05, 0.95, binary=True)
    59
    """
    from scipy.stats import binom

    _check(loss_N, epsilon)
    mean, growth_J = loss_N.mean(-1), _log_growth(loss_N, epsilon)

    def enough(n: int) -> bool:
        if binary:
            p = binom.cdf(np.ceil(n * mean - 1e-9), n, epsilon)
        else:
            p, _ = _smaller(_hoeffding_bentkus(mean, n, epsilon), _of_capital(growth_J, n))
        return bool(p <= 1 - confidence)

    if mean >= epsilon:
        return None
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_SENTENCES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class TicketRisk:
    """A ticket's test.

    Attributes
    ----------
    rows : int
        Ticket size.
    risk : float
        Measured mean loss.
    upper_bound : float
        Upper confidence bound of this ticket's risk, looked at alone.
    p : float
        p-value of "risk > epsilon".
    bound : str
        Which bound gave p.
    certified : bool
        Whether it and all larger tickets are rejected.
    """

    rows: int
    risk: float
    upper_bound: float
    p: float
    bound: str
    certified: bool


@dataclass(frozen=True)
class CertifiedRisk:
    """Tests of all tickets of a grid, the largest first, and the smallest certified one.

    Attributes
    ----------
    epsilon, confidence : float
        What is promised: risk at most epsilon, with this confidence.
    sentences : int
        Calibration sentences.
    tickets : tuple of TicketRisk
        In the order tested.
    needed : int or None
        Where none is certified: about how many sentences would certify the first; see `sentences_needed`.
    """

    epsilon: float
    confidence: float
    sentences: int
    tickets: tuple[TicketRisk, ...]
    needed: int | None

    @property
    def smallest(self) -> TicketRisk | None:
        """The smallest certified ticket, None if none is."""
        certified = [ticket for ticket in self.tickets if ticket.certified]
        return certified[-1] if certified else None

    def sentence(self) -> str:
        """The result in one sentence."""
        if (found := self.smallest) is not None:
            return (
                f"With {self.confidence:.0%} confidence the ticket of {found.rows:,} rows has a risk of at most "
                f"{self.epsilon:g} (measured {found.risk:.4f} on {self.sentences:,} sentences)."
            )
        first = self.tickets[0]
        none = f"No ticket is certified at epsilon {self.epsilon:g}: the largest, {first.rows:,} rows, has a measured risk of "
        none += f"{first.risk:.4f} on {self.sentences:,} sentences; "
        alone = f"an epsilon of {first.upper_bound:.4f}"
        if self.needed is None:
            return f"{none}{alone} would certify it, more sentences would not."
        return f"{none}{alone}, or about {self.needed:,} sentences with the same risk, would certify it."


def fixed_sequence(p: Sequence[float], delta: float) -> int:
    """How many hypotheses are rejected in the order given, at a family-wise error of at most delta.

    The order must not depend on the p-values. See the top of the file for why it is valid.

    Examples
    --------
    >>> fixed_sequence([0.01, 0.04, 0.2, 0.001], 0.05)
    2
    """
    for rejected, value in enumerate(p):
        if not value <= delta:
            return rejected
    return len(p)


def certify_risk(
    losses: Sequence[tuple[int, Losses]], epsilon: float, confidence: float, binary: bool
) -> CertifiedRisk:
    """Tests every ticket, the largest first.

    Parameters
    ----------
    losses : sequence of (ticket rows, float64 array (N,))
        Losses of the same N sentences for every ticket, the largest ticket first.
    epsilon : float
        Tested risk, in (0, 1).
    confidence : float
        In (0, 1).
    binary : bool
        Whether a loss of this kind is always 0 or 1.

    Returns
    -------
    CertifiedRisk

    Raises
    ------
    ValueError
        If there are no tickets, their rows are not in falling order, or the numbers of sentences differ; if epsilon, the
        confidence or a loss is out of range.
    """
    rows = [size for size, _ in losses]
    if not rows or any(larger <= smaller for larger, smaller in zip(rows, rows[1:], strict=False)):
        raise ValueError(f"tickets are tested from the largest to the smallest, but have {rows} rows")
    if len({loss_N.shape for _, loss_N in losses}) > 1:
        raise ValueError("every ticket needs a loss for the same sentences")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence:g}")
    found = [risk_pvalue(loss_N, epsilon, binary) for _, loss_N in losses]
    rejected = fixed_sequence([float(p) for p, _ in found], 1 - confidence)
    tickets = tuple(
        TicketRisk(
            size, float(loss_N.mean()), upper_bound(loss_N, confidence, binary), float(p), str(bound), index < rejected
        )
        for index, ((size, loss_N), (p, bound)) in enumerate(zip(losses, found, strict=True))
    )
    first_N = losses[0][1]
    needed = None if rejected else sentences_needed(first_N, epsilon, confidence, binary)
    return CertifiedRisk(epsilon, confidence, len(first_N), tickets, needed)


def _check(loss_N: Losses, epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, not {epsilon:g}")
    if not loss_N.shape[-1]:
        raise ValueError("there are no sentences")
    if not ((loss_N >= 0) & (loss_N <= 1)).all():  # so that NaN is refused too
        raise ValueError("losses must be between 0 and 1")


def _hoeffding_bentkus(mean: Losses, n: int, epsilon: float) -> Losses:
    from scipy.special import rel_entr
    from scipy.stats import binom

    below = np.minimum(mean, epsilon)
    hoeffding = np.exp(-n * (rel_entr(below, epsilon) + rel_entr(1 - below, 1 - epsilon)))
    bentkus = np.e * binom.cdf(np.ceil(n * mean), n, epsilon)
    return np.minimum(1.0, np.minimum(hoeffding, bentkus))


def _log_growth(loss_N: Losses, epsilon: float) -> Losses:
    """Mean logarithm of a sentence's factor for every bet, array (J, ...); -inf where the capital is lost."""
    bets_J = np.arange(1, NUM_BETS + 1) / NUM_BETS
    edge_N = (epsilon - loss_N) / (1 - epsilon)
    with np.errstate(divide="ignore"):
        return np.stack([np.log1p(np.maximum(bet * edge_N, -1.0)).mean(-1) for bet in bets_J])


def _of_capital(growth_J: Losses, n: int) -> Losses:
    from scipy.special import logsumexp

    log_capital = logsumexp(n * growth_J, axis=0) - np.log(NUM_BETS)
    return np.exp(np.minimum(0.0, -log_capital))


def _smaller(hoeffding_bentkus: Losses, betting: Losses) -> tuple[Losses, NDArray[np.str_]]:
    p = np.minimum(1.0, 2 * np.minimum(hoeffding_bentkus, betting))
    return p, np.where(betting < hoeffding_bentkus, "betting", "Hoeffding-Bentkus")
