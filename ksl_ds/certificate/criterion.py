"""The certificate of a ticket, as reconstructed, and the measurement that stands beside it.

What is the paper's: its Theorem 2. The predictions of the model whose ticket rows alone were tuned agree with the
*embed-tuned* model's at confidence 1 - alpha, as a replication reports it. Its exact wording is not known here.

What is our reconstruction, named `reconstructed` wherever it is printed. Reference: the embed-tuned model. Candidate: the
same model with base values in every embedding row outside the ticket. Let k_i / d be row i's KS statistic between base
and reference, k* = critical_count(d, alpha), and tau(alpha) = k* / d, the critical D.
1. A row outside the ticket has k_i <= k* - 1, so its distribution function differs nowhere by more than (k* - 1) / d. So
   D <= tau holds with at least 1 / d to spare; (k* - 1) / d would serve too and certify a little more. We take the critical
   D itself, the stricter of the two. Where k* = d + 1 no test can reject, tau is above 1, and nothing is certified.
2. Let p_A > p_B be the reference's two largest next-token probabilities. *If* no token's probability changes by more than
   tau, the candidate gives A at least p_A - tau and every other token at most p_B + tau. So A stays on top where
       (p_A - p_B) / 2 > tau(alpha).
3. An input holds u tokens whose rows are outside the ticket. *If* each may change every probability by tau and the
   changes add up, a union bound asks for (p_A - p_B) / 2 > u * tau(alpha), u counting every occurrence.

What can be said against it:
- Step 2's "if" does not follow from step 1: D bounds the difference of two distribution functions, and a model does not draw
  from a row's distribution, it reads its coordinates in their order. A permuted row has D = 0 and any effect at all.
  Hence a certified token can differ; such counterexamples are counted and listed.
- `reconstructed` treats any number of changed rows as one. The union bound does not, and long prompts never meet it. Even
  that rests on step 2.
- 1 - alpha is the nominal level of one row's test (before and after are paired samples, and V rows are tested); nothing
  here makes it a probability of agreement.
- Partial tuning leaves ticket rows with values of its own. No D between base and reference bounds those: only a partial
  transfer, whose ticket rows are the reference's, is what steps 1 to 3 speak of.
- Agreement is measured with the reference translation as prefix. Output that a model generates follows its own prefix.

So what counts is measured: how often the top tokens agree on held-out text, with an exact interval over whole sentences,
since the tokens of one sentence are not independent.

Legend: N predicted tokens of all sentences, S sentences, L tokens of one sentence, R of its response, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95  # of the intervals
# Below, an exact interval is up to .37 wide and more: it would say nothing, with the look of saying something.
MIN_SENTENCES = 30

Interval = tuple[float, float]


@dataclass(frozen=True)
class Predictions:
    """The two largest next-token probabilities at every position of a text's responses, sentence after sentence.

    Attributes
    ----------
    first_N, second_N : float32 (N,); p_A and p_B
    top_N : int64 (N,); the token of p_A. Of tied tokens either may be it
    length_S : int64 (S,); predicted tokens of each sentence, at least one; their sum is N
    chrf_S : float64 (S,), sentence chrF++ of the model's own translations; None where nothing was generated
    """

    first_N: Tensor
    second_N: Tensor
    top_N: Tensor
    length_S: Tensor
    chrf_S: Tensor | None = None


@dataclass(frozen=True)
class Agreement:
    """How often a candidate's top token was the reference's, where a criterion holds: counts, and what they say.

    Attributes
    ----------
    tokens, agreeing : predicted tokens that the criterion covers, and those on which both models agree
    sentences, agreeing_sentences : sentences with such a token, and those that agree on all of theirs
    interval : exact 95 % interval of the share of agreeing sentences; None below MIN_SENTENCES sentences
    """

    tokens: int
    agreeing: int
    sentences: int
    agreeing_sentences: int
    interval: Interval | None


def certified(
    first_N: Tensor, second_N: Tensor, count: int, num_samples: int, untuned_N: Tensor | None = None
) -> Tensor:
    """Which tokens meet the `reconstructed` criterion (p_A - p_B) / 2 > tau, or its union bound.

    Parameters
    ----------
    first_N, second_N : floating tensor (N,)
        p_A and p_B of the reference.
    count, num_samples : int
        tau = count / num_samples: the critical count of alpha, and the d coordinates of a row.
    untuned_N : int64 tensor (N,), optional
        u, the tokens of each input whose rows are outside the ticket: asks for (p_A - p_B) / 2 > u * tau instead.

    Returns
    -------
    bool tensor (N,)

    Examples
    --------
    >>> import torch
    >>> first, second = torch.tensor([0.75, 0.5, 0.625]), torch.tensor([0.25, 0.25, 0.375])
    >>> certified(first, second, 1, 8)  # half the margin: 1/4, 1/8, 1/8; tau: 1/8
    tensor([ True, False, False])
    >>> certified(first, second, 1, 8, untuned_N=torch.tensor([2, 1, 0]))
    tensor([False, False,  True])
    """
    times = torch.ones_like(first_N, dtype=torch.float64) if untuned_N is None else untuned_N.double()
    # No division: with float32 probabilities and a d that is a power of 2 both sides are exact.
    return (first_N.double() - second_N.double()) * num_samples > 2 * count * times


def untuned_tokens(ids_L: Tensor, num_prompt: int, in_ticket_V: Tensor) -> Tensor:
    """u of each response token of a sentence: how many tokens before it have rows outside the ticket.

    Parameters
    ----------
    ids_L : int64 (L,)
        Prompt and response.
    num_prompt : int
        Tokens of the prompt, at least one.
    in_ticket_V : bool (V,)
        Which tokens have rows in the ticket.

    Returns
    -------
    int64 tensor (R,)
        R = L - num_prompt.

    Examples
    --------
    >>> import torch
    >>> in_ticket = torch.tensor([False, False, True])
    >>> untuned_tokens(torch.tensor([0, 2, 2, 1, 0]), 2, in_ticket)
    tensor([1, 1, 2])
    """
    return (~in_ticket_V[ids_L]).cumsum(0)[num_prompt - 1 : -1]


def agreement(agrees_N: Tensor, length_S: Tensor, covered_N: Tensor | None = None) -> Agreement:
    """Counts agreement over tokens and over sentences.

    Parameters
    ----------
    agrees_N : bool (N,)
        Whether both models put the same token on top.
    length_S : int64 (S,)
        Predicted tokens of each sentence.
    covered_N : bool (N,), optional
        The tokens that count, such as the certified ones; all unless given.
    """
    if covered_N is None:
        covered_N = torch.ones_like(agrees_N)
    sentence_N = torch.repeat_interleave(torch.arange(len(length_S)), length_S)
    covered_S = torch.zeros(len(length_S), dtype=torch.int64).index_add_(0, sentence_N, covered_N.long())
    differing_S = torch.zeros_like(covered_S).index_add_(0, sentence_N, (covered_N & ~agrees_N).long())
    sentences = int((covered_S > 0).sum())
    agreeing_sentences = sentences - int((differing_S > 0).sum())
    return Agreement(
        tokens=int(covered_N.sum()),
        agreeing=int((covered_N & agrees_N).sum()),
        sentences=sentences,
        agreeing_sentences=agreeing_sentences,
        interval=clopper_pearson(agreeing_sentences, sentences) if sentences >= MIN_SENTENCES else None,
    )


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact interval of a binomial proportion: it holds the true share with at least `confidence`.

    References
    ----------
    C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26, 1934.

    Examples
    --------
    >>> [round(end, 4) for end in clopper_pearson(30, 30)]
    [0.8843, 1.0]
    """
    from scipy.stats import binomtest

    ends = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(ends.low), float(ends.high)
