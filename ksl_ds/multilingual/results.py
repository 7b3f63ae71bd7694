"""The end of a comparison of directions: scores, tests, tables, results.json, report.html. Needs no model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import read_text, write_text
from ksl_ds.lottery.overlap import Overlaps, overlaps_at, overlaps_of, tokens_of
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.multilingual import tables
from ksl_ds.multilingual.plots import transfer_map
from ksl_ds.multilingual.records import JOINT, DirectionScore, Kind, MultilingualResults, TransferRun
from ksl_ds.report.html import Section, bullets, figure, table, what_was_run, write_report
from ksl_ds.report.overlaps import alpha_table, overlap_map, overlap_table, shared_rows_table
from ksl_ds.report.records import BootstrapScore, read_results
from ksl_ds.report.tables import print_table, print_text
from ksl_ds.text.scores import read_translations
from ksl_ds.text.significance import MIN_SENTENCES, paired_bootstrap

logger = logging.getLogger(__name__)


def finish(recipe: Recipe, tickets: Mapping[int, Mapping[str, Ticket]], runs: Sequence[TransferRun]) -> None:
    """Reads the runs' scores, tests them, prints the tables, writes results.json and report.html; on one rank.

    Raises
    ------
    UserError
        Where no direction has a ticket.
    """
    home = Path(recipe.run_dir)
    directions = recipe.text.directions
    complete = [seed for seed, of in tickets.items() if sum(name in of for name in directions) > 1]
    if not complete:
        raise UserError("fewer than two directions have a ticket; the sentences above say why")
    results = MultilingualResults(
        directions=directions,
        seeds=list(tickets),
        tickets={str(seed): {name: one.token_ids for name, one in of.items()} for seed, of in tickets.items()},
        scores=_scores(recipe, runs),
        environment=hardware_and_versions(),
        recipe=asdict(recipe),
    )
    write_text(home / "results.json", results.to_json())
    of_seed = {name: ticket for name, ticket in tickets[complete[0]].items() if name in (*directions, JOINT)}
    overlaps = overlaps_of(of_seed)
    own = overlaps_of({name: ticket for name, ticket in of_seed.items() if name != JOINT})
    by_alpha = overlaps_at(of_seed)
    shown = [
        overlap_table(overlaps),
        shared_rows_table(own, tokens_of(of_seed.values())),
        alpha_table(by_alpha),
    ]
    if len(tickets) > 1:
        shown[0].notes.append(f"These and the next two tables are of seed {complete[0]}.")
    shown += [tables.transfer_table(results, "test_loss"), tables.transfer_table(results, "bleu")]
    for one in shown:
        print_table(one)
    words = tables.readings(results, overlaps)
    for sentence in words:
        print_text(f"- {sentence}")
    _write_report(recipe, results, overlaps, shown, words)
    for name, what in {"report.html": "the report", "results.json": "all numbers", "runs": "every run"}.items():
        print_text(f"{what + ':':36} {home / name}")


def _scores(recipe: Recipe, runs: Sequence[TransferRun]) -> list[DirectionScore]:
    """The scores of all runs by direction, those of trained rows with their test."""
    found = []
    for run in runs:
        results = read_results(run.folder)
        if results is None or run.stage not in results.stages:
            raise UserError(f"{run.folder} has lost its scores; delete it to run it again")
        for direction in run.directions:
            scores = results.stages[run.stage].directions[direction]
            found.append(
                DirectionScore(kind=run.kind, source=run.source, direction=direction, seed=run.seed, scores=scores)
            )
    logger.info("testing differences")
    for direction in recipe.text.directions:
        for seed in {run.seed for run in runs}:
            tests = _tests(recipe, [run for run in runs if run.seed == seed], direction)
            for score in found:
                if (score.kind, score.direction, score.seed) == (
                    Kind.TRAINED,
                    direction,
                    seed,
                ) and score.source in tests:
                    score.test = tests[score.source]
    return found


def _tests(recipe: Recipe, runs: Sequence[TransferRun], direction: str) -> dict[str, BootstrapScore]:
    """BLEU of every source's trained rows against the direction's own, by sacrebleu's paired bootstrap."""
    trained = {run.source: run for run in runs if run.kind is Kind.TRAINED and run.directions == [direction]}
    if direction not in trained:
        return {}
    lines = {source: _lines(run, "hypotheses") for source, run in trained.items()}
    references = _lines(trained[direction], "references")
    if len(references) < MIN_SENTENCES:
        return {}
    tested, _ = paired_bootstrap(lines, references, direction, recipe.evaluation.tokenize, ("bleu",))
    return {source: BootstrapScore(**asdict(by_metric["bleu"])) for source, by_metric in tested.items()}


def _lines(run: TransferRun, name: str) -> list[str]:
    return read_translations(run.folder / "translations" / run.stage, name)


def _write_report(
    recipe: Recipe,
    results: MultilingualResults,
    overlaps: Overlaps,
    shown: Sequence[Any],
    words: Sequence[str],
) -> None:
    home = Path(recipe.run_dir)
    maps = {
        "Jaccard overlap of all pairs": overlap_map(overlaps),
        "Test loss of every ticket's rows on every direction": transfer_map(results, "test_loss"),
        "BLEU of every ticket's rows on every direction": transfer_map(results, "bleu"),
    }
    drawn = [figure(caption, content, f"map{number}") for number, (caption, content) in enumerate(maps.items())]
    write_report(
        home / "report.html",
        title=f"Directions: {home.name}",
        recipe_yaml=read_text(home / "recipe.yaml"),
        summary=f"{what_was_run(recipe, {}, {}, results.environment.ranks)} Seeds: {', '.join(map(str, results.seeds))}.",
        sections=[
            Section("Reading", bullets(*words)),
            Section("Overlaps", Markup("\n").join([*map(table, shown[:3]), drawn[0]])),
            Section("Transfer", Markup("\n").join([*map(table, shown[3:]), *drawn[1:]])),
        ],
        environment=results.environment,
    )
