"""The KS test: counts against scipy and a brute-force ECDF, p-values against integer arithmetic, invariances, bad input."""

from __future__ import annotations

import doctest
import importlib
import math
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from ksl_ds import critical_count, ks_2samp
from ksl_ds.lottery import buckets, ks, sorting
from ksl_ds.lottery.ks import _counts_by_torch, row_counts
from ksl_ds.lottery.pvalues import pvalues

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALLEST = 5e-324


def brute_force(before, after):
    """k (for two sizes: D times their least common multiple) of each row of two matrices, from the definition."""
    counts = []
    for row_before, row_after in zip(before.double().numpy(), after.double().numpy(), strict=True):
        points = np.concatenate([row_before, row_after])[:, None]
        scale = math.lcm(len(row_before), len(row_after))
        below_before = (row_before <= points).sum(axis=1) * (scale // len(row_before))
        below_after = (row_after <= points).sum(axis=1) * (scale // len(row_after))
        counts.append(int(np.abs(below_before - below_after).max()))
    return counts


def random_rows(num_rows, width, dtype=torch.float32, seed=0, shift=0.1):
    """Pairs of rows as tuning leaves them, and the cases that tests of this kind get wrong."""
    generator = torch.Generator().manual_seed(seed)
    before = 0.02 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    after = before + shift * 0.02 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    before, after = before.to(dtype), after.to(dtype)
    if num_rows >= 12:
        after[0] = before[0]  # unchanged
        before[1], after[1] = 0.0, -0.0
        before[2], after[2] = 0.5, 0.25  # constant
        before[3], after[3] = before[3].sign(), after[3].sign()  # heavy ties
        before[4, 0] = 1000.0  # an outlier
        before[5], after[5] = before[5] * 1e4, after[5] * 1e4  # beyond 2
        after[6] = before[6].flip(0)  # a permutation
        after[7, 0] = after[7, 0] + 1
        before[8], after[8] = before[8] * 1e-5, after[8] * 1e-5  # denormals in float16
        before[9], after[9] = torch.finfo(dtype).max, torch.finfo(dtype).min
        before[10], after[10] = before[10].abs(), -before[10].abs()
        after[11, ::2] = before[11, ::2]
    return before, after


# ---- counts


@pytest.fixture(params=[True, False], ids=["sorted", "buckets"])
def both_ways(request, monkeypatch):
    """Runs a test with either of the two ways to count that processors differ in."""
    monkeypatch.setattr(ks, "_sorting_is_faster", lambda dtype: request.param or dtype == torch.float64)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("width", [1, 2, 3, 31, 64, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_are_those_of_the_definition(dtype, width):
    for shift in (0.001, 0.1, 3.0):
        before, after = random_rows(14, width, dtype, seed=width, shift=shift)
        expected = brute_force(before, after) if width < 1000 else searched(before, after)
        assert row_counts(before, after).tolist() == expected
        assert _counts_by_torch(before, after, 10**5, None, 0).tolist() == expected
        assert expected[:2] == [0, 0] and expected[2] == expected[9] == width


def searched(before, after):
    """`brute_force` for long rows, as scipy counts."""
    counts = []
    for row_before, row_after in zip(before.double().numpy(), after.double().numpy(), strict=True):
        points = np.concatenate([row_before, row_after])
        below = [np.searchsorted(np.sort(row), points, side="right") for row in (row_before, row_after)]
        counts.append(int(np.abs(below[0] - below[1]).max()))
    return counts


values = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.5, 1.5, SMALLEST, -SMALLEST, 1e-40, -1e-40, 6e-8, 65504.0, 1e-3]
    ),
    st.floats(-60000, 60000, allow_nan=False),
    st.floats(-1e-3, 1e-3, allow_nan=False),
)


@st.composite
def two_samples(draw, same_size):
    size_before = draw(st.integers(1, 12))
    size_after = size_before if same_size else draw(st.integers(1, 12).filter(lambda size: size != size_before))
    num_rows = draw(st.integers(1, 4))
    pool = draw(st.lists(values, min_size=1, max_size=6)) if draw(st.booleans()) else None
    entry = st.sampled_from(pool) if pool else values

    def matrix(size):
        rows = draw(st.lists(st.lists(entry, min_size=size, max_size=size), min_size=num_rows, max_size=num_rows))
        return torch.tensor(rows, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))

    return matrix(size_before), matrix(size_after)


@pytest.mark.usefixtures("both_ways")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(two_samples(same_size=True))
def test_counts_of_any_values_and_dtypes(samples):
    before, after = samples
    expected = brute_force(before, after)
    result = ks_2samp(before, after)
    assert result.count.tolist() == expected
    assert result.statistic.tolist() == [count / before.shape[1] for count in expected]
    assert _counts_by_torch(before, after, 1, None, 0).tolist() == expected
    table = exact_pvalues(before.shape[1])
    assert result.pvalue.tolist() == pytest.approx([table[count] for count in expected], rel=1e-9)


@settings(deadline=None, max_examples=150)
@given(two_samples(same_size=False), st.sampled_from(["exact", "asymp"]))
def test_samples_of_two_sizes(samples, method):
    before, after = samples
    result = ks_2samp(before, after, method=method)
    assert result.count.tolist() == brute_force(before, after)
    for row, (row_before, row_after) in enumerate(zip(before.double(), after.double(), strict=True)):
        reference = stats.ks_2samp(row_before.numpy(), row_after.numpy(), method=method)
        assert float(result.statistic[row]) == pytest.approx(reference.statistic, rel=1e-12)
        assert float(result.pvalue[row]) == pytest.approx(reference.pvalue, rel=1e-9)


@pytest.mark.parametrize("kind", ["quicksort", "stable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_either_sort_of_16_bits_gives_the_same_counts(monkeypatch, dtype, kind):
    monkeypatch.setattr(ks, "_sorting_is_faster", lambda dtype: True)
    monkeypatch.setattr(sorting, "_fastest_sort", lambda: kind)
    before, after = random_rows(50, 300, dtype, seed=3, shift=0.1)
    assert row_counts(before, after).tolist() == searched(before, after)


def test_the_fastest_of_some_ways_is_found():
    def work(number):
        return lambda: sum(range(number))

    assert sorting.fastest([work(100_000), work(10), work(200_000)]) == 1


@pytest.mark.parametrize("most_in_doubt", [0.0, 0.01, 1.0])
def test_buckets_answer_what_a_sort_answers(monkeypatch, most_in_doubt):
    monkeypatch.setattr(buckets, "MOST_IN_DOUBT", most_in_doubt)
    monkeypatch.setattr(ks, "_sorting_is_faster", lambda dtype: False)
    left = 0
    for shift in (0.0001, 0.01, 1.0):
        before, after = random_rows(200, 576, shift=shift)
        counts, left_to_sort = buckets.bucket_counts(before.numpy(), after.numpy())
        expected = np.array(searched(before, after))
        assert (counts[~left_to_sort] == expected[~left_to_sort]).all()
        assert left_to_sort[[1, 9]].all()  # no range, or one that overflows
        left += left_to_sort.sum()
        assert row_counts(before, after).tolist() == expected.tolist()
    lowest, highest = {0.0: (300, 600), 0.01: (7, 599), 1.0: (6, 6)}[most_in_doubt]
    assert lowest <= left <= highest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_shapes_and_strides(dtype):
    before, after = random_rows(60, 40, dtype)
    expected = ks_2samp(before, after)
    for shape in ((60,), (3, 20), (2, 3, 10), (60, 1)):
        result = ks_2samp(before.reshape(*shape, 40), after.reshape(*shape, 40))
        for value, wanted in zip(result, expected, strict=True):
            assert value.shape == shape and torch.equal(value.flatten(), wanted)
    one = ks_2samp(before[20], after[20])
    assert one.count.shape == () and one.count == expected.count[20]
    assert [value.shape for value in ks_2samp(before[:0], after[:0])] == [(0,)] * 3
    assert ks_2samp(torch.zeros(2, 0, 5), torch.zeros(2, 0, 4)).count.shape == (2, 0)

    columns = torch.stack([before.T, after.T], dim=2)  # every stride unusual
    assert torch.equal(ks_2samp(columns[..., 0].T, columns[..., 1].T).count, expected.count)
    assert torch.equal(ks_2samp(before[::2], after[::2]).count, expected.count[::2])
    assert torch.equal(ks_2samp(before[:, ::3], after[:, ::3]).count, row_counts(before[:, ::3].clone(), after[:, ::3]))
    swapped_before, swapped_after = (rows.reshape(3, 20, 40).transpose(0, 1) for rows in (before, after))
    assert torch.equal(ks_2samp(swapped_before, swapped_after).count, expected.count.reshape(3, 20).T)
    shorter = ks_2samp(swapped_before, swapped_after[..., :30])
    assert torch.equal(shorter.pvalue, ks_2samp(before, after[:, :30]).pvalue.reshape(3, 20).T)


def test_a_gradient_is_no_obstacle():
    before, after = random_rows(12, 32)
    assert torch.equal(ks_2samp(before, torch.nn.Parameter(after)).count, ks_2samp(before, after).count)


# ---- p-values


@lru_cache
def exact_pvalues(num_samples):
    """P(D >= k / d) for k = 0 .. d, correctly rounded, from integers (Gnedenko and Korolyuk)."""
    binomials = [math.comb(2 * num_samples, num_samples)]  # C(2d, d - x)
    for x in range(num_samples):
        binomials.append(binomials[-1] * (num_samples - x) // (num_samples + x + 1))
    pvalues = [1.0]
    for k in range(1, num_samples + 1):
        numerator = sum(binomials[k :: 2 * k]) - sum(binomials[2 * k :: 2 * k])
        pvalues.append(2 * numerator / binomials[0])
    return np.array(pvalues)


@pytest.mark.parametrize("sizes", [range(1, 201), [576], [4096], [8192], [16384]], ids=str)
def test_exact_pvalues_are_those_of_integer_arithmetic(sizes):
    for num_samples in sizes:
        table, expected = pvalues(torch.arange(num_samples + 1), num_samples).numpy(), exact_pvalues(num_samples)
        normal = expected > np.finfo(np.float64).tiny
        assert np.abs(table[normal] / expected[normal] - 1).max() < 1e-9
        assert np.abs(table[~normal] - expected[~normal]).max(initial=0) <= 2 * SMALLEST
        assert table[0] == 1 and (np.diff(table) <= 0).all() and (table >= 0).all()


@pytest.mark.parametrize("num_samples", [1, 5, 64, 576, 4096])
def test_pvalues_are_scipys_where_scipy_stays_exact(num_samples):
    table = pvalues(torch.arange(num_samples + 1), num_samples)
    compared = 0
    for k in sorted({*range(min(num_samples, 12)), *np.geomspace(1, num_samples, 12).astype(int).tolist()}):
        before = np.arange(num_samples)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                reference = stats.ks_2samp(before, before + k - (0.5 if k else 0), method="exact")
            except RuntimeWarning:  # "Exact calculation unsuccessful. Switching to method=asymp"
                continue
        if reference.pvalue > 1e-290:
            assert round(reference.statistic * num_samples) == k
            assert float(table[k]) == pytest.approx(reference.pvalue, rel=1e-9)
            compared += 1
    assert compared >= min(num_samples, 8)


def test_asymptotic_pvalues_of_one_value_are_one():
    assert pvalues(torch.arange(2), 1, "asymp").tolist() == [1, 1]  # scipy's are NaN


@pytest.mark.parametrize("num_samples", [2, 7, 64, 577, 4096])
def test_asymptotic_pvalues_are_scipys(num_samples):
    table = pvalues(torch.arange(num_samples + 1), num_samples, "asymp")
    assert len(table) == num_samples + 1 and table[0] == 1
    for k in np.unique(np.geomspace(1, num_samples, 15).astype(int)).tolist():
        before = np.arange(num_samples, dtype=float)
        reference = stats.ks_2samp(before, before + k - 0.5, method="asymp").pvalue
        assert float(table[k]) == pytest.approx(reference, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("num_samples", [8192, 100_000])
def test_only_asymptotic_pvalues_that_occur_are_computed(num_samples, monkeypatch):
    asked = []
    sf = stats.kstwo.sf
    monkeypatch.setattr(stats.kstwo, "sf", lambda x, n: asked.append(np.size(x)) or sf(x, n))
    shift = 2 * int(num_samples**0.5)
    before = torch.arange(num_samples).double().expand(5, -1)
    after = before + torch.tensor([0.0, shift - 0.5, 0.0, shift - 0.5, num_samples]).unsqueeze(1)
    result = ks_2samp(before, after, method="asymp")
    assert result.count.tolist() == [0, shift, 0, shift, num_samples] and asked == [3]
    expected = stats.ks_2samp(before[1].numpy(), after[1].numpy(), method="asymp").pvalue
    assert result.pvalue.tolist() == pytest.approx([1, expected, 1, expected, 0], rel=1e-12, abs=1e-300)
    asked.clear()
    threshold = critical_count(num_samples, 0.05, "asymp")
    assert sum(asked) <= 17
    around = sf(np.array([threshold - 1, threshold]) / num_samples, num_samples // 2)
    assert around[0] >= 0.05 > around[1]


def test_asymptotic_critical_counts_are_those_of_the_whole_table():
    for num_samples in (1, 2, 3, 20, 577):
        table = pvalues(torch.arange(num_samples + 1), num_samples, "asymp")
        for alpha in (1e-300, 1e-9, 0.05, 0.5, 0.999, float(table[-1]), float(table[len(table) // 2])):
            if 0 < alpha < 1:
                assert critical_count(num_samples, alpha, "asymp") == int((table >= alpha).sum())


# d: (exact, asymp) at alpha = .05, .25, .5, .95; the asymptotic ones decide by scipy.stats.kstwo.sf(k / d, d / 2), which is
# .2453 at d = 1024, k = 46.
CRITICAL = {
    576: ((47, 35, 29, 18), (46, 35, 28, 18)),
    1024: ((62, 47, 38, 24), (62, 46, 38, 24)),
    4096: ((123, 93, 75, 48), (123, 92, 75, 47)),
    8192: ((174, 131, 106, 67), (174, 131, 106, 67)),
}


def test_published_critical_counts():
    for num_samples, (exact, asymp) in CRITICAL.items():
        for method, counts in (("exact", exact), ("asymp", asymp)):
            assert tuple(critical_count(num_samples, alpha, method) for alpha in (0.05, 0.25, 0.5, 0.95)) == counts


def test_critical_counts_are_strict_and_monotone():
    table = pvalues(torch.arange(65), 64)
    for k in range(8, 65):
        alpha = float(table[k])
        assert critical_count(64, alpha) == k + 1  # p < alpha, not p <= alpha
        assert critical_count(64, math.nextafter(alpha, 1)) == k
    levels = torch.logspace(-30, -0.001, 200).tolist()
    thresholds = [critical_count(576, alpha) for alpha in levels]
    assert thresholds == sorted(thresholds, reverse=True) and thresholds[0] > thresholds[-1]
    assert critical_count(3, 0.05) == 4  # not even k = 3 rejects


# ---- invariances, which need no reference


@pytest.mark.usefixtures("both_ways")
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from([7, 64, 576, 1500]), st.sampled_from([1e-3, 0.05, 2.0]))
def test_invariances(seed, width, shift):
    before, after = random_rows(24, width, seed=seed, shift=shift)
    counts = row_counts(before, after)
    assert torch.equal(row_counts(after, before), counts)
    one, other = (torch.randperm(width, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    assert torch.equal(row_counts(before[:, one], after[:, other]), counts)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(row_counts(before[order], after[order]), counts[order])
    # Strictly increasing and exact in float64.
    for transform in (torch.neg, lambda x: x * 2.0**-20, lambda x: x**3, lambda x: torch.sign(x) * x.abs().sqrt()):
        pair = [transform(rows.double()) for rows in (before, after)]
        assert torch.equal(row_counts(*pair), counts)
    # And on 32-bit values: ranks, which spread quite differently over buckets.
    ranks = torch.stack([before, after]).unique(return_inverse=True)[1].float()
    assert torch.equal(row_counts(*ranks), counts)


@pytest.mark.parametrize("workspace_bytes", [1, 10**5, 10**6, 1 << 28])
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_and_threads_change_nothing(workspace_bytes, threads):
    before, after = random_rows(700, 100)
    expected, done, usual = searched(before, after), [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        counts = row_counts(before, after, workspace_bytes=workspace_bytes, progress=done.append)
        told = []
        assert _counts_by_torch(before, after, workspace_bytes, told.append, 0).tolist() == expected
    finally:
        torch.set_num_threads(usual)
    assert counts.tolist() == expected and counts.dtype == torch.int32
    assert sum(done) == sum(told) == 700
    assert min(done) > 0 and min(told) > 0


# ---- bad input


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unchanged_rows_count_nothing_whatever_their_ties(dtype):
    rows, _ = random_rows(40, 256, dtype)
    rows[0], rows[1] = 0, rows[1].sign()
    assert ks_2samp(rows, rows.clone()).count.tolist() == [0] * 40
    assert ks_2samp(rows, rows.clone()).pvalue.tolist() == [1.0] * 40
    assert not row_counts(torch.zeros(3, 64, dtype=dtype), -torch.zeros(3, 64, dtype=dtype)).any()


@pytest.mark.parametrize("width", [33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_is_a_change(dtype, width):
    """Wherever it is in a matrix of several blocks, and whatever the size of the value."""
    before, _ = random_rows(600, width, dtype)
    limits = torch.finfo(dtype)
    edges = torch.tensor([limits.max, limits.tiny, limits.smallest_normal / 4, 1.0, 0.0], dtype=dtype)
    before[:, 1], before[:, 2] = edges[torch.arange(600) % 5], -edges[torch.arange(600) % 5]
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[before.element_size()]
    for column, bit in ((0, 0), (1, 0), (2, 0), (width - 1, 3)):
        after = before.clone()
        after.view(integers)[::7, column] ^= 1 << bit
        counts = row_counts(before, after, workspace_bytes=10**5)
        assert counts.tolist() == [int(row % 7 == 0) for row in range(600)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(dtype, bad):
    for name in ("before", "after", "both"):
        before, after = random_rows(30, 50, dtype)
        if name != "after":
            before[17, 3] = bad
        if name != "before":
            after[17, 3] = bad  # in `both`: an unchanged row, unless NaN
        after[25, 0] = bad
        message = f"row 17 of {'after' if name == 'after' else 'before'} holds NaN or infinity"
        for test in (ks_2samp, row_counts, lambda x, y: _counts_by_torch(x, y, 10**4, None, 0)):
            with pytest.raises(ValueError, match=message):
                test(before, after)
        with pytest.raises(ValueError, match=message):
            ks_2samp(before, after[:, :49])
        with pytest.raises(ValueError, match="row 1017 of"):
            row_counts(before, after, workspace_bytes=1, first_row=1000)
        with pytest.raises(ValueError, match=message):
            ks_2samp(before, after.double())
        with pytest.raises(ValueError, match=message):  # rows in an order of their own
            ks_2samp(*(rows.reshape(5, 6, 50).transpose(0, 1).clone().transpose(0, 1) for rows in (before, after)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    for name, pair in (("before", [dtype, torch.float32]), ("after", [torch.float32, dtype])):
        with pytest.raises(TypeError, match=f"{name} has dtype {dtype}"):
            ks_2samp(*(torch.zeros(2, 4).to(wanted) for wanted in pair))
    with pytest.raises(TypeError, match="after is a ndarray"):
        ks_2samp(torch.zeros(2, 4), np.zeros((2, 4)))


def test_other_shapes_and_arguments_are_refused():
    rows = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\) and after \(2, 4\)"):
        ks_2samp(rows, rows[:2])
    with pytest.raises(ValueError, match="all axes but the last"):
        ks_2samp(rows, rows[0])
    with pytest.raises(ValueError, match=r"before has shape \(3, 0\)"):
        ks_2samp(rows[:, :0], rows)
    with pytest.raises(ValueError, match=r"after has shape \(\)"):
        ks_2samp(rows, torch.tensor(1.0))
    with pytest.raises(ValueError, match="one device"):
        ks_2samp(rows, rows.to("meta"))
    for call in (lambda: ks_2samp(rows, rows, method="auto"), lambda: pvalues(torch.arange(5), 4, "auto")):
        with pytest.raises(ValueError, match="'auto'; it must be exact or asymp"):
            call()
    for alpha in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="significance level"):
            critical_count(4, alpha)
    with pytest.raises(ValueError, match="at least one value"):
        pvalues(torch.arange(1), 0)


@pytest.mark.parametrize("name", ["lottery.ks", "lottery.pvalues", "lottery.ticket", "model.row_hooks"])
def test_docstring_examples_run(name):
    results = doctest.testmod(importlib.import_module(f"ksl_ds.{name}"))
    assert results.attempted > 0 and results.failed == 0
