"""Runs a lottery for each direction and one for all, and tries every ticket on every direction.

Every part is a run of its own in `runs/`, by the same functions as `lottery`, `tune` and `evaluate`; a stopped comparison
continues, and what is there is not run again. For each seed:

    DIRECTION               a lottery of one direction: its own ticket
    joint                   a lottery of all directions: the joint ticket, and the untuned model on every direction
    SOURCE-for-DIRECTION    the rows of a ticket, trained from their base values on one direction. Sources: the ticket of every
                            direction, the joint one, the union and the intersection of all, and random rows as many as the
                            direction's own ticket has
    rows-of-SOURCE          the rows that a direction's (or the joint) lottery has tuned, as they are, on every direction

Tickets of the same rows share a run. A run that fails costs one sentence; the others still run.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ksl_ds import distributed
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.selection import select_random
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.multilingual.records import INTERSECTION, JOINT, RANDOM, UNION, Kind, TransferRun
from ksl_ds.multilingual.results import finish
from ksl_ds.sharding.rows import RowShard
from ksl_ds.training.evaluation import score_copying
from ksl_ds.training.lottery import run_lottery
from ksl_ds.training.parts import create_home, finished_run
from ksl_ds.training.run import RunContext, open_run
from ksl_ds.training.stages import run_stage, score_ticket, untested_ticket

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """A comparison of directions in progress."""

    recipe: Recipe
    tickets: dict[int, dict[str, Ticket]] = field(default_factory=dict)  # by seed and source
    runs: list[TransferRun] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """Its folder."""
        return Path(self.recipe.run_dir)


def compare_directions(recipe: Recipe) -> None:
    """Runs what is missing and writes down what all have found. Raises UserError for a mistake or when a run failed."""
    directions = recipe.text.directions
    if len(directions) < 2:
        raise UserError(f"multilingual compares directions: text.directions is {directions}; name at least two")
    progress = Progress(recipe)
    distributed.run_on_rank0(lambda: create_home(progress.home, recipe))
    for seed in recipe.multilingual.seeds:
        progress.tickets[seed] = _draw_all(progress, seed)
        for direction in directions:
            _try_rows_on(progress, direction, seed)
        for source in progress.tickets[seed]:
            _apply_rows_of(progress, source, seed)
    distributed.run_on_rank0(lambda: finish(recipe, progress.tickets, progress.runs))
    if progress.failed:
        raise UserError(
            f"{len(progress.failed)} runs failed: {', '.join(progress.failed)}; the same command tries these again"
        )


def _recipe_of(recipe: Recipe, name: str, seed: int, directions: list[str]) -> Recipe:
    """The recipe of one part. All seeds see the same pairs."""
    own = copy.deepcopy(recipe)
    own.run_dir = str(Path(recipe.run_dir) / "runs" / f"{name}-seed{seed}")
    own.seed = seed
    own.resume = "auto"
    own.ticket = None
    own.text.seed = recipe.text_seed
    own.text.directions = directions
    own.text.prompts = {key: value for key, value in recipe.text.prompts.items() if key in directions}
    own.tracking.name = f"{recipe.tracking.name or Path(recipe.run_dir).name}-{name}-seed{seed}"
    return own


def _run(progress: Progress, wanted: Recipe, stage: Stage, work: Callable[[RunContext], None], *, trains: bool) -> bool:
    """Runs a part unless its folder has scored `stage` with this recipe. Returns whether it has now."""
    folder = Path(wanted.run_dir)
    name = folder.name
    try:
        if distributed.run_on_rank0(lambda: finished_run(folder, wanted, stage)) is not None:
            logger.info(f"{name}: found in {folder}")
            return True
        logger.info(f"running {name}")
        with open_run(wanted, trains=trains, method=wanted.method if trains else None) as run:
            work(run)
    except UserError as error:
        logger.warning(f"{name}: {error}")
        progress.failed.append(name)
        return False
    finally:
        gc.collect()  # the model of a run must be gone before the next one is loaded
    return True


def _draw_all(progress: Progress, seed: int) -> dict[str, Ticket]:
    """The tuned tickets of all directions and the joint one, as far as their lotteries succeeded."""
    directions = progress.recipe.text.directions
    tickets = {}
    for source, of in {**{name: [name] for name in directions}, JOINT: directions}.items():
        wanted = _recipe_of(progress.recipe, source, seed, of)
        if not _run(progress, wanted, Stage.PARTIAL_TUNING, run_lottery, trains=True):
            continue
        folder = Path(wanted.run_dir)
        tickets[source] = distributed.run_on_rank0(partial(_load, folder))
        progress.runs.append(TransferRun(Kind.UNTUNED, source, of, seed, folder, Stage.UNTUNED))
        progress.runs.append(TransferRun(Kind.EMBED, source, of, seed, folder, Stage.EMBED_TUNING))
        if source in directions:
            progress.runs.append(TransferRun(Kind.TRAINED, source, of, seed, folder, Stage.PARTIAL_TUNING))
    return tickets


def _load(folder: Path) -> Ticket:
    """The ticket of a run. Raises UserError."""
    try:
        return Ticket.load(folder / "ticket")
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; delete {folder} to run it again") from None


def rows_to_try(tickets: dict[str, Ticket], directions: list[str], direction: str, seed: int) -> dict[str, list[int]]:
    """Token ids by source: every ticket, what they have together and in common, and random rows as many as the own has."""
    ids = {source: ticket.token_ids for source, ticket in tickets.items()}
    own = [set(ids[name]) for name in directions if name in ids]
    rows = {**ids, UNION: sorted(set().union(*own)), INTERSECTION: sorted(set.intersection(*own))}
    ticket = tickets[direction]
    rows[RANDOM] = select_random(ticket.vocab_size, len(ticket), seed).tolist()
    return rows


def _try_rows_on(progress: Progress, direction: str, seed: int) -> None:
    """Trains the rows of every source on one direction."""
    tickets = progress.tickets[seed]
    if direction not in tickets:
        return
    folders = {tuple(tickets[direction].token_ids): Path(_recipe_of(progress.recipe, direction, seed, []).run_dir)}
    for source, ids in rows_to_try(tickets, progress.recipe.text.directions, direction, seed).items():
        if source == direction or not ids:
            continue
        wanted = _recipe_of(progress.recipe, f"{source}-for-{direction}", seed, [direction])
        wanted.method = "ticket"
        folder = folders.setdefault(tuple(ids), Path(wanted.run_dir))
        if folder == Path(wanted.run_dir):

            def work(run: RunContext, source: str = source, ids: list[int] = ids) -> None:
                score_copying(run)
                shard = RowShard(run.model.get_input_embeddings().weight)
                ticket = untested_ticket(run, shard, ids, selection=f"rows of {source}", source={"stage": source})
                run_stage(run, Stage.PARTIAL_TUNING, shard, ticket)

            if not _run(progress, wanted, Stage.PARTIAL_TUNING, work, trains=True):
                continue
            if distributed.run_on_rank0(partial(_load, folder)).token_ids != ids:
                logger.warning(f"{folder} has trained other rows than those of {source}; move it away to run it again")
                progress.failed.append(folder.name)
                continue
        progress.runs.append(TransferRun(Kind.TRAINED, source, [direction], seed, folder, Stage.PARTIAL_TUNING))


def _apply_rows_of(progress: Progress, source: str, seed: int) -> None:
    """Scores the rows that a lottery has tuned, as they are, on every direction."""
    wanted = _recipe_of(progress.recipe, f"rows-of-{source}", seed, progress.recipe.text.directions)
    lottery = _recipe_of(progress.recipe, source, seed, []).run_dir
    path = str(Path(lottery) / "ticket")
    wanted.ticket = path
    if _run(progress, wanted, Stage.TICKET, lambda run: score_ticket(run, path), trains=False):
        run = TransferRun(Kind.APPLIED, source, wanted.text.directions, seed, Path(wanted.run_dir), Stage.TICKET)
        progress.runs.append(run)
