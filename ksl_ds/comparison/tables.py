"""A comparison as people read it: its tables and its sentences, from the `comparison` of results.json and nothing else.

So `ksl-ds compare --from results.json` prints what the run printed. Numbers are means over seeds with their sample standard
deviation. A difference is called significant when the paired bootstrap finds p < .05 with every seed, in one direction: the
bootstrap covers the choice of test sentences, the seeds cover the order of training, and no single p covers both.

"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ksl_ds.config.methods import Stage, label_of
from ksl_ds.report.html import learned_to_stop, pair
from ksl_ds.report.records import ComparisonResults, ComparisonSection, Scores, SeedTest
from ksl_ds.report.tables import DASH, STAGE_NOTES, Column, StageColumn, Table, columns_for, decimals, size
from ksl_ds.text.significance import MIN_SENTENCES

LEVEL = 0.05
BASELINES = (Stage.EMBED_TUNING, Stage.FULL_TUNING, Stage.UNTUNED)
WITH_SPREAD = {"test_loss": 3, "bleu": 1, "chrf": 1, "first_line_bleu": 1, "comet": 4}  # digits
SPREAD_NOTE = "± is the standard deviation over {} seeds."


def mean_stages(comparison: ComparisonSection) -> dict[str, Scores]:
    """Means over the seeds by entry, as `stages` of results.json; `spread` holds standard deviations, `seeds` their number.

    Entries without any result are left out.
    """
    stages = {}
    for key in comparison.order:
        runs = [run.scores for run in comparison.runs[key].values() if run.scores]
        if not runs:
            continue
        by_run = [run.numbers() for run in runs]
        known = {name: [numbers[name] for numbers in by_run if name in numbers] for name in by_run[0]}
        means: dict[str, Any] = dict.fromkeys(("test_loss", "bleu", "chrf", "first_line_bleu"))
        means |= {name: statistics.fmean(values) for name, values in known.items()}
        stages[key] = Scores(
            **means,
            signatures=runs[0].signatures,
            spread={name: statistics.stdev(values) if len(values) > 1 else None for name, values in known.items()},
            seeds=len(runs),
        )
    return stages


def score_table(results: ComparisonResults) -> Table:
    """What each entry costs and scores, copying the source first."""
    comparison = results.comparison
    stages = results.stages
    columns = [Column("", numeric=False)]
    shown_columns = columns_for([*results.baselines.values(), *stages.values()])
    for column, key, _ in shown_columns:
        columns.append(column)
        if key == "trained_parameters":
            columns.append(Column("tuned file", optional=True))
    rows = [
        [label_of(key), *_cells(None if key in missing_entries(comparison) else shown, shown_columns)]
        for key, shown in (results.baselines | {key: stages.get(key) for key in comparison.order}).items()
    ]
    notes = list(STAGE_NOTES)
    if len(comparison.seeds) > 1:
        notes.insert(0, SPREAD_NOTE.format(len(comparison.seeds)))
    return Table("Scores on the held-out text", columns, rows, notes + exceptions(comparison))


def _cells(scores: Scores | None, columns: Sequence[StageColumn]) -> list[str]:
    cells = []
    for _, key, show in columns:
        spread = scores.spread.get(key) if scores else None
        with_spread = key in WITH_SPREAD and spread is not None
        cells.append(
            show(getattr(scores, key, None)) + (f" ±{decimals(WITH_SPREAD[key])(spread)}" if with_spread else "")
        )
        if key == "trained_parameters":
            cells.append(size(scores.tuned_file_bytes if scores else None))
    return cells


def missing_entries(comparison: ComparisonSection) -> list[str]:
    """The keys of entries without a result with any seed."""
    return [key for key in comparison.order if not any(run.scores for run in comparison.runs[key].values())]


def exceptions(comparison: ComparisonSection) -> list[str]:
    """What has no result and why, and what shares another entry's result: a sentence for each reason."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for key in comparison.order:
        for seed, run in comparison.runs[key].items():
            reason = run.missing
            if reason is None and run.same_as is not None:
                reason = f"the same rows as {label_of(run.same_as)}, hence the same run"
            if reason is not None:
                by_reason.setdefault(reason, {}).setdefault(key, []).append(seed)
    return [
        f"{', '.join(f'{label_of(key)} ({_seeds(seeds)})' for key, seeds in keys.items())}: {reason.rstrip('.')}."
        for reason, keys in by_reason.items()
    ]


def _seeds(seeds: list[str]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}"


def baselines_tested(comparison: ComparisonSection) -> list[Stage]:
    """The baselines that the comparison has tests against."""
    return [name for name in BASELINES if name in comparison.tests]


def difference(tests: Mapping[str, SeedTest], text: str = "whole", metric: str = "bleu") -> tuple[float, float, bool]:
    """Of one entry against one baseline: the mean difference, the largest p of any seed, and whether it is significant."""
    found = [test[text][metric] for test in tests.values()]
    differences = [test.difference for test in found if test.difference is not None]
    largest = max(test.p for test in found if test.p is not None)
    one_direction = min(differences) > 0 or max(differences) < 0
    return statistics.fmean(differences), largest, one_direction and largest < LEVEL


def interval(comparison: ComparisonSection, key: str, metric: str = "bleu") -> tuple[float, float] | None:
    """The 95 % interval of a score that covers the bootstrap intervals of all seeds; None without a test."""
    for baseline in baselines_tested(comparison):
        if key in comparison.tests[baseline]:
            found = [test.whole[metric] for test in comparison.tests[baseline][key].values()]
            return (
                min(test.mean - test.half_width for test in found),
                max(test.mean + test.half_width for test in found),
            )
    return None


def difference_table(results: ComparisonResults) -> Table:
    """BLEU with its interval, and against embed tuning, full tuning and the untuned model the differences and their p."""
    comparison = results.comparison
    baselines = baselines_tested(comparison)
    columns = [Column("", numeric=False), Column("BLEU, 95 % interval")]
    for baseline in baselines:
        name = label_of(baseline)
        side = baseline is Stage.UNTUNED
        columns += [Column(f"against {name}", optional=side), Column("p", optional=side)]
        columns += [Column("on first lines", optional=True), Column("p", optional=True)]
    rows = []
    for key in comparison.order:
        if key in missing_entries(comparison):
            continue
        bounds = interval(comparison, key)
        cells = [label_of(key), DASH if bounds is None else f"{max(0.0, bounds[0]):.1f} to {bounds[1]:.1f}"]
        for baseline in baselines:
            tests = comparison.tests[baseline].get(key)
            for text in ("whole", "first_line"):
                if key == baseline or tests is None:
                    cells += [DASH, DASH]
                    continue
                mean, p, significant = difference(tests, text)
                cells += [f"{mean:+.1f}{'*' if significant else ''}", p_value(p)]
        rows.append(cells)
    notes = [
        "Differences in BLEU by sacrebleu's paired bootstrap over test sentences; p is the largest of the seeds, the interval "
        "covers those of all seeds. *: p < .05 with every seed, in one direction.",
        "The tests are not corrected for multiple comparisons: of twenty between equal methods, one finds a difference.",
    ]
    return Table("Differences in BLEU and their p-values", columns, rows, notes)


def p_value(p: float) -> str:
    """A p-value with three digits."""
    return f"{p:.3f}"


def readings(results: ComparisonResults) -> list[str]:
    """The comparison in words: what is significant, what only learned to stop, what loses to copying the source."""
    comparison = results.comparison
    sentences = []
    for baseline in baselines_tested(comparison):
        for text, name in (("whole", "BLEU"), ("first_line", "first-line BLEU")):
            groups: dict[str, list[str]] = {"above": [], "not different": [], "below": []}
            for key in comparison.order:
                tests = comparison.tests[baseline].get(key)
                if key in (baseline, Stage.UNTUNED) or tests is None:
                    continue
                mean, _, significant = difference(tests, text)
                direction = "above" if mean > 0 else "below"
                groups[direction if significant else "not different"].append(label_of(key))
            said = [
                f"{'no significant difference' if group == 'not different' else f'significantly {group} it'}: "
                f"{', '.join(names)}"
                for group, names in groups.items()
                if names
            ]
            if said:
                sentences.append(f"{name} against {label_of(baseline)}: {'; '.join(said)}.")
    if not comparison.tests:
        sentences.append(f"Fewer than {MIN_SENTENCES} test sentences are too few for a bootstrap: none was made.")
    stages = results.stages
    untuned = stages.get(Stage.UNTUNED)
    trained = [key for key in comparison.order if key in stages and key != Stage.UNTUNED]
    sentences += [
        f"{label_of(key)}: learned to stop. {stopping}"
        for key in trained
        if (stopping := learned_to_stop(stages[key], untuned))
    ]
    copying = results.baselines.get(Stage.COPYING_SOURCE)
    for what, other, sign, digits, worse in (
        ("chrf", copying, 1, 1, "chrF++ not above that of copying the source"),
        ("test_loss", untuned, -1, 3, "test loss not below the untuned model's"),
    ):
        names = [
            label_of(key)
            for key in trained
            if (both := pair(stages[key], other, what)) and sign * both[0] <= sign * both[1]
        ]
        if names:
            sentences.append(f"{worse} ({getattr(other, what):.{digits}f}): {', '.join(names)}.")
    return sentences


def curves(metrics: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, tuple[list[int], list[float]]]:
    """Training losses by entry, (steps, losses), from the lines of each run's metrics.jsonl."""
    found = {}
    for key, lines in metrics.items():
        points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if points:
            found[key] = ([step for step, _ in points], [loss for _, loss in points])
    return found
