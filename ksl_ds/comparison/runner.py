"""KS tickets beside their controls and beside other methods: the same text, seeds, schedule and evaluation for all.

Every entry with every seed is a run of its own (entries.py), by the same functions as `lottery` and `tune`. What is there
already is not run again, so a stopped comparison resumes, and entries can be added later. An entry that
fails is reported in one sentence; the others still run. In return, the model is loaded for each run.

Legend: V tokens, D coordinates of a row, K chosen rows.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.comparison.entries import (
    Entry,
    entries_of,
    finished,
    scored_by_lottery,
    seeds_of,
)
from ksl_ds.comparison.results import Outcome, finish
from ksl_ds.config.methods import Rows, Stage, label_of
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.selection import RULES
from ksl_ds.lottery.shift import load_shift
from ksl_ds.lottery.ticket import Shift, Ticket, choose_rows, explain_empty, make_ticket
from ksl_ds.model.folder import ModelFolder, token_strings
from ksl_ds.report.records import EntryRun
from ksl_ds.sharding.draw import ids_of_draw
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.evaluation import score_copying
from ksl_ds.training.inputs import INPUTS, differing_model, read_inputs
from ksl_ds.training.parts import create_home
from ksl_ds.training.run import RunContext, open_run
from ksl_ds.training.stages import (
    DRAW_FILE,
    run_stage,
    save_ticket,
    token_frequency,
    untested_ticket,
)
from ksl_ds.training.summary import scan_result

logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """A comparison in progress."""

    recipe: Recipe
    home: Path
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)  # by entry's key and seed
    drawn: dict[tuple[Entry, int], list[int]] = field(default_factory=dict)  # rows of a ticket, by entry and seed
    shifts: dict[int, Shift] = field(default_factory=dict)  # what embed tuning with a seed shifted


def compare(recipe: Recipe, home: Path) -> None:
    """Runs what is missing, in `home`, and writes down what all have found."""
    comparison = Comparison(recipe, home)
    distributed.run_on_rank0(lambda: create_home(home, recipe))
    entries = entries_of(recipe.compare)
    jobs = [
        (seed, entry) for seed in recipe.compare.seeds for entry in entries if seed in seeds_of(entry, recipe.compare)
    ]
    for number, (seed, entry) in enumerate(jobs, 1):
        logger.info(f"entry {number} of {len(jobs)}: {label_of(entry.key)}, seed {seed}")
        outcome = _outcome(comparison, entry, seed)
        comparison.outcomes.setdefault(entry.key, {})[seed] = outcome
        if outcome.entry.missing is not None:
            logger.warning(f"{label_of(entry.key)}, seed {seed}: {outcome.entry.missing}")
        gc.collect()  # the model of a run must be gone before the next one is loaded
    distributed.run_on_rank0(lambda: finish(recipe, home, comparison.outcomes))
    failed = [
        f"{label_of(key)} (seed {seed})"
        for key, by_seed in comparison.outcomes.items()
        for seed, outcome in by_seed.items()
        if outcome.entry.failed
    ]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} entries failed: {', '.join(failed)}; the same command tries these again"
        )


def _outcome(comparison: Comparison, entry: Entry, seed: int) -> Outcome:
    """What came of an entry: found, run now, or missing for a reason."""
    recipe = comparison.recipe
    home = comparison.home
    num_rows = None
    if entry.spec.needs_embed:
        embedded = comparison.outcomes[Stage.EMBED_TUNING][seed].entry
        if embedded.missing is not None:
            why = "embed tuning with this seed did not succeed, and its rows are needed"
            return Outcome(EntryRun(missing=why, failed=True))
        if seed not in comparison.shifts:
            comparison.shifts[seed] = distributed.run_on_rank0(
                lambda: load_shift(home / embedded.folder / "checkpoints" / DRAW_FILE)
            )
        shift = comparison.shifts[seed]
        draw = entry.recipe(recipe, home, seed, rows_of_controls(recipe, shift)).draw
        if "count_V" in RULES[draw.selection].inputs:  # known before the run, from the KS test alone
            ids = ids_of_draw(shift, draw, seed=seed, frequency_V=torch.zeros(len(shift.count_V))).tolist()
            if not ids:
                return Outcome(EntryRun(missing=explain_empty(shift, draw.alpha, draw.method), empty=True))
            if same := _drawn_before(comparison, entry, seed, ids):
                found = comparison.outcomes[same][seed]
                return Outcome(found.entry.model_copy(update={"same_as": same}), found.results)
        num_rows = rows_of_controls(recipe, shift)
    wanted = entry.recipe(recipe, home, seed, num_rows)
    folder = Path(wanted.run_dir)
    outcome = distributed.run_on_rank0(lambda: _found(entry, folder, wanted, Path(recipe.run_dir), home))
    if outcome is not None:
        logger.info(f"{label_of(entry.key)}, seed {seed}: found in {home / outcome.entry.folder}")
        return outcome
    try:
        _run_entry(comparison, entry, seed, wanted)
    except UnavailableRow as error:
        return Outcome(EntryRun(missing=str(error)))
    except UserError as error:
        return Outcome(EntryRun(missing=str(error), failed=True))
    outcome = distributed.run_on_rank0(lambda: _found(entry, folder, wanted, None, home))
    assert outcome is not None
    return outcome


def _drawn_before(comparison: Comparison, entry: Entry, seed: int, ids: list[int]) -> str | None:
    """The key of an entry that with the same rows: counts are integers, so two levels can draw alike."""
    same = [
        other.key
        for (other, of_seed), others in comparison.drawn.items()
        if of_seed == seed and others == ids and other.stage is entry.stage
    ]
    comparison.drawn[entry, seed] = ids
    return same[0] if same else None


def _found(entry: Entry, folder: Path, wanted: Recipe, lottery: Path | None, home: Path) -> Outcome | None:
    results = finished(entry, folder, wanted)
    if results is None and lottery is not None and lottery != home:
        folder = lottery
        results = scored_by_lottery(entry, lottery, wanted)
    if results is None:
        return None
    place = str(folder.relative_to(home) if folder.is_relative_to(home) else Path(".."))
    return Outcome(EntryRun(folder=place, stage=str(entry.stage), scores=results.stages[entry.stage]), results)


class UnavailableRow(UserError):
    """A single row that this model and prompt do not have: not a failure, but there is nothing to train."""


def _run_entry(comparison: Comparison, entry: Entry, seed: int, wanted: Recipe) -> None:
    """One run with its own folder. Raises UserError."""
    with open_run(wanted, method=entry.method) as run:
        distributed.run_on_rank0(lambda: _check_same_model(comparison, run.dir))
        score_copying(run)
        shard = RowShard(run.model.get_input_embeddings().weight)
        ticket = _ticket(comparison, entry, seed, run, shard) if entry.spec.rows else None
        if ticket is not None and entry.stage is Stage.PARTIAL_TRANSFER:
            save_ticket(run, ticket, run.dir / "ticket")
        run_stage(run, entry.stage, shard, ticket)
        scan_result(run)


def _check_same_model(comparison: Comparison, run_dir: Path) -> None:
    """Raises UserError if an entry that was found has another base model than the starting run in `run_dir`."""
    ours = read_inputs(run_dir)
    for outcome in (outcome for by_seed in comparison.outcomes.values() for outcome in by_seed.values()):
        theirs = read_inputs(comparison.home / outcome.entry.folder) if outcome.entry.folder is not None else None
        name = differing_model(theirs, ours) if theirs and ours else None
        if name:
            (run_dir / INPUTS).unlink()  # so that the entry runs with the model that the others had
            raise UserError(
                f"the model {comparison.recipe.model.path} has changed since {comparison.home / outcome.entry.folder} was run "
                f"({name} differs); restore it or choose another run_dir"
            )


def _ticket(comparison: Comparison, entry: Entry, seed: int, run: RunContext, shard: RowShard) -> Ticket:
    """The rows of an entry, with the values that embed tuning gave them; a single row's are the base model's."""
    frequency_V = token_frequency(run)
    draw = run.recipe.draw
    if entry.spec.rows is Rows.SINGLE:
        return untested_ticket(
            run,
            shard,
            [single_row(entry.method, run, frequency_V)],
            selection=entry.method,
            source={"stage": entry.key},
        )
    shift = comparison.shifts[seed]
    ids_K = ids_of_draw(shift, draw, seed=seed, frequency_V=frequency_V)
    embedded = comparison.home / comparison.outcomes[Stage.EMBED_TUNING][seed].entry.folder
    rows_KD = distributed.run_on_rank0(lambda: _embed_tuned_rows(embedded, ids_K))
    return make_ticket(
        shift,
        ids_K,
        shard.read_rows(ids_K).to(shard.dtype),
        rows_KD,
        selection=draw.selection,
        alpha=draw.alpha,
        method=draw.method,
        tokens=token_strings(run.tokenizer, ids_K.tolist()),
        embedding_scope=run.recipe.model.embedding_scope,
        source={"stage": entry.key, "base": run.recipe.model.path, "train_frequency": frequency_V[ids_K].tolist()},
    )


def single_row(method: str, run: RunContext, frequency_V: Tensor) -> int:
    """The token that stands for "one row". Raises UnavailableRow if there is none, or if the text does not contain it."""
    if method == "newline":
        ids = run.tokenizer("\n", add_special_tokens=False).input_ids  # SentencePiece puts a space before it
        number = ids[-1] if ids and run.tokenizer.decode(ids[-1:]) == "\n" else None
    elif method == "bos":
        number = run.tokenizer.bos_token_id
    else:
        number = run.prompts[0][0]
    name = method.replace("_", " ")
    if number is None:
        raise UnavailableRow(f"this tokenizer has no token for {name}")
    if frequency_V[number] == 0:
        raise UnavailableRow(f"the token for {name} ({number}) does not occur in the training text and its prompts")
    return number


def rows_of_controls(recipe: Recipe, shift: Shift) -> int:
    """How many rows the controls of a seed train."""
    if recipe.compare.rows is not None:
        return recipe.compare.rows
    drawn = choose_rows(shift, selection="alpha", alpha=recipe.draw.alpha, method=recipe.draw.method)
    return len(drawn) or recipe.draw.top_k


def _embed_tuned_rows(folder: Path, ids_K: Tensor) -> Tensor:
    tuned = ModelFolder(folder / "checkpoints" / Stage.EMBED_TUNING)
    return tuned.read_ids(tuned.embedding_name, ids_K.tolist()).float()
