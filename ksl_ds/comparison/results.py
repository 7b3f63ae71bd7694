"""The end of a comparison: tests, tables, results.json, report.html. Reads what the runs left; needs no model.

Also prints a comparison again from its results.json, on its own and without DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ksl_ds.comparison import tables as report
from ksl_ds.comparison.plots import loss_against_size, loss_curves, score_bars
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import read_text, write_text
from ksl_ds.report.html import Section, bullets, figure, table, what_was_run, write_report
from ksl_ds.report.records import (
    ComparisonResults,
    ComparisonSection,
    EntryRun,
    RunResults,
    read_comparison,
    read_metrics,
)
from ksl_ds.report.tables import print_table, print_text
from ksl_ds.report.tracking import Tracker
from ksl_ds.text.scores import read_translations
from ksl_ds.text.significance import paired_bootstrap

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 12


@dataclass
class Outcome:
    """What came of an entry with one seed."""

    entry: EntryRun
    results: RunResults | None = None  # of its run, if that has scores


Outcomes = Mapping[str, Mapping[int, Outcome]]  # by key and seed


def finish(recipe: Recipe, home: Path, outcomes: Outcomes) -> None:
    """Tests and writes down what the runs found; on one rank. Raises UserError where no entry has a result."""
    done = [outcome.results for by_seed in outcomes.values() for outcome in by_seed.values() if outcome.results]
    if not done:
        raise UserError("no entry of the comparison has a result; the sentences above say why")
    order = _shown_order(outcomes)
    runs = {key: {str(seed): outcome.entry for seed, outcome in outcomes[key].items()} for key in order}
    logger.info("testing differences")
    tests, signatures = _tests(home, runs, recipe.evaluation.tokenize)
    comparison = ComparisonSection(
        order=order, seeds=recipe.compare.seeds, runs=runs, tests=tests, signatures=signatures
    )
    results = ComparisonResults(
        comparison=comparison,
        stages=report.mean_stages(comparison),
        baselines=done[0].baselines,
        text=done[0].text,
        environment=hardware_and_versions(),
        environments_of_runs=_distinct(found.environment for found in done),
        recipe=asdict(recipe),
    )
    write_text(home / "results.json", results.to_json())
    results = read_comparison(home / "results.json")  # what --from will see
    show(results)
    _write_report(recipe, home, results)
    for name, what in {
        "report.html": "the report",
        "results.json": "all numbers",
        "runs": "every run, with its translations",
    }.items():
        print_text(f"{what + ':':36} {home / name}")


def show(results: ComparisonResults) -> None:
    """Prints the tables and the sentences of a comparison."""
    print_table(report.score_table(results))
    print_table(report.difference_table(results))
    for sentence in report.readings(results):
        print_text(f"- {sentence}")


def show_file(path: Path) -> None:
    """Prints the comparison that a results.json holds. Raises UserError for another file."""
    show(read_comparison(path))


def _shown_order(outcomes: Outcomes) -> list[str]:
    """The table's order: untuned, full and embed tuning, then as they ran."""
    first = [key for key in (Stage.UNTUNED, Stage.FULL_TUNING, Stage.EMBED_TUNING) if key in outcomes]
    return first + [key for key in outcomes if key not in first]


def _distinct(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _lines(home: Path, run: EntryRun, name: str) -> list[str]:
    """The sentences of a file of a run's translations."""
    try:
        return read_translations(home / run.folder / "translations" / run.stage, name)
    except UserError as error:
        raise UserError(f"{error}; delete its run folder to run it again") from None


def _tests(
    home: Path, runs: Mapping[str, Mapping[str, EntryRun]], tokenize: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """sacrebleu's paired bootstrap of every entry against every baseline, seed by seed."""
    tests: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    seeds = list(dict.fromkeys(seed for by_seed in runs.values() for seed in by_seed))
    for seed in seeds:
        # What is the same for all seeds has run with the first only.
        of_seed = {key: by_seed.get(seed) or next(iter(by_seed.values())) for key, by_seed in runs.items()}
        of_seed = {key: run for key, run in of_seed.items() if run.scores}
        for baseline in report.BASELINES:
            if baseline not in of_seed:
                continue
            references = _lines(home, of_seed[baseline], "references")
            if len(references) < report.MIN_SENTENCES:
                return {}, {}
            for text, name in {"whole": "hypotheses", "first_line": "hypotheses_first_line"}.items():
                hypotheses = {key: _lines(home, run, name) for key, run in of_seed.items()}
                metrics = ("bleu", "chrf") if text == "whole" else ("bleu",)
                found, signed = paired_bootstrap(hypotheses, references, baseline, tokenize, metrics)
                signatures |= signed
                for key, by_metric in found.items():
                    place = tests.setdefault(baseline, {}).setdefault(key, {}).setdefault(seed, {})
                    place[text] = {metric: asdict(tested) for metric, tested in by_metric.items()}
    return tests, signatures


def _write_report(recipe: Recipe, home: Path, results: ComparisonResults) -> None:
    comparison = results.comparison
    stages = results.stages
    first_runs: dict[str, EntryRun] = {}
    for key in comparison.order:
        scored = [run for run in comparison.runs[key].values() if run.scores]
        if key in stages and scored:
            first_runs[key] = scored[0]
    metrics: dict[str, list[Mapping[str, Any]]] = {}
    for key, run in first_runs.items():
        metrics[key] = [line for line in read_metrics(home / run.folder) if line["stage"] == run.stage]
    intervals = {key: report.interval(comparison, key) for key in first_runs}
    ordered = {key: stages[key] for key in first_runs}
    figures = {
        "Scores with the 95 % intervals of the bootstrap": score_bars(results.baselines | ordered, intervals),
        "Test loss against trained parameters": loss_against_size(ordered),
        "Training loss with the first seed": loss_curves(report.curves(metrics)),
    }
    with Tracker(home, recipe) as tracker:
        for caption, content in figures.items():
            tracker.figure(caption, content)
        tracker.summary(results.baselines | ordered)
    words = report.readings(results)
    if len(results.environments_of_runs) > 1:
        words.append("The runs were made on different software or hardware; the results.json of each says on which.")
    pairs = {name: part.pairs for name, part in results.text.items()}
    seeds = ", ".join(map(str, comparison.seeds))
    drawn = (figure(caption, content, f"f{number}") for number, (caption, content) in enumerate(figures.items()))
    write_report(
        home / "report.html",
        title=f"Comparison: {Path(recipe.run_dir).name}",
        recipe_yaml=read_text(home / "recipe.yaml"),
        samples=_samples(home, first_runs),
        summary=f"{what_was_run(recipe, pairs, {}, results.environment.ranks)} Seeds: {seeds}.",
        sections=[
            Section("Scores", table(report.score_table(results))),
            Section("Differences", table(report.difference_table(results)) + bullets(*words)),
            Section("Figures", Markup("\n").join(drawn)),
        ],
        environment=results.environment,
    )


def _samples(home: Path, runs: Mapping[str, EntryRun]) -> list[dict[str, str]]:
    """The first test sentences with every entry's translation, of the first seed."""
    first = next(iter(runs.values()))
    sources, references = (_lines(home, first, name) for name in ("sources", "references"))
    samples = [
        {"source": source, "reference": reference} for source, reference in zip(sources, references, strict=True)
    ][:SAMPLES_SHOWN]
    for key, run in runs.items():
        lines = _lines(home, run, "hypotheses")
        if len(lines) != len(sources):
            raise UserError(
                f"{home / run.folder}: its hypotheses.txt of {run.stage} has {len(lines)} lines for {len(sources)} "
                "sentences; delete its run folder to run it again"
            )
        for sample, line in zip(samples, lines[: len(samples)], strict=True):
            sample[key] = line
    return samples
