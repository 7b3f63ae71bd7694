"""What a comparison runs: its entries, the recipe of each, and what a run folder already holds of it.

An entry with a seed is an ordinary run in a folder of its own, `runs/ENTRY-seedN`, with the recipe that `tune` or `lottery`
would take for it. So a stopped comparison loses at most the entry it was at, and any entry can be looked at, repeated or
certified by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksl_ds.config.load import with_current_names
from ksl_ds.config.methods import METHOD_SECTIONS, METHODS, Method, Rows, Stage
from ksl_ds.config.schema import Compare, Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import clean
from ksl_ds.report.records import RunResults, read_results
from ksl_ds.training.parts import finished_run, first_difference


@dataclass(frozen=True)
class Entry:
    """A row of the comparison's table: a method of `METHODS` by its name, for tickets at a level."""

    method: str
    alpha: float | None = None

    @property
    def spec(self) -> Method:
        """The method of the entry."""
        return METHODS[self.method]

    @property
    def key(self) -> str:
        """In results.json: partial_tuning_alpha_0.05."""
        return self.spec.key if self.alpha is None else f"{self.spec.key}_alpha_{self.alpha:g}"

    @property
    def stage(self) -> Stage:
        """What its run scores."""
        return self.spec.stage

    def folder(self, home: Path, seed: int) -> Path:
        """The run_dir of this entry with one seed."""
        return home / "runs" / f"{self.key}-seed{seed}"

    def recipe(self, recipe: Recipe, home: Path, seed: int, num_rows: int | None) -> Recipe:
        """The recipe of its run: the comparison's, with this seed, and with the choice of rows written out.

        All seeds see the same pairs: which are taken is decided by `text.seed`, by default the comparison's own seed.
        """
        own = copy.deepcopy(recipe)
        own.run_dir = str(self.folder(home, seed))
        own.seed = seed
        own.compare = Compare()
        own.ticket = None
        own.resume = "auto"
        own.text.seed = recipe.text_seed
        for section in METHOD_SECTIONS - self.spec.reads:  # a change there does not concern this run
            setattr(own, section, type(getattr(own, section))())
        own.tracking.name = f"{recipe.tracking.name or Path(recipe.run_dir).name}-{self.key}-seed{seed}"
        own.method = self.spec.tune_as or own.method
        if self.spec.rows is not None:
            own.draw.every = None
            own.draw.early_stopping = None
        if self.alpha is not None:
            own.draw.selection = "alpha"
            own.draw.alpha = self.alpha
        elif num_rows is not None and self.spec.rows is Rows.CONTROL:
            own.draw.selection = self.method
            own.draw.top_k = num_rows
        return own


def entries_of(compare: Compare) -> list[Entry]:
    """The rows of the table, in the order in which they run: embed tuning first, since tickets need it."""
    first = ["untuned", "embed", "transfer", "ticket"]
    methods = [name for name in first if name in compare.methods]
    methods += [name for name in METHODS if name in compare.methods and name not in first]
    return [
        Entry(method, alpha)
        for method in methods
        for alpha in (compare.alphas if METHODS[method].rows is Rows.TICKET else [None])
    ]


def seeds_of(entry: Entry, compare: Compare) -> list[int]:
    """The seeds that an entry runs with: the untuned model does not depend on a seed."""
    return compare.seeds[:1] if entry.stage is Stage.UNTUNED else compare.seeds


def comparison_dir(recipe: Recipe) -> Path:
    """Where a comparison lies: its run folder, or `compare/` within the run folder of a lottery, whose stages it reuses.

    Raises
    ------
    UserError
        For a folder that holds something else.
    """
    run_dir = Path(recipe.run_dir)
    if not run_dir.exists() or (run_dir.is_dir() and all(path.name.startswith(".") for path in run_dir.iterdir())):
        return run_dir
    if (run_dir / "runs").is_dir():
        return run_dir
    if (run_dir / "results.json").is_file() and (run_dir / "recipe.yaml").is_file():
        return run_dir / "compare"
    raise UserError(f"run_dir {run_dir} holds neither a comparison nor a finished run; choose another run_dir")


def finished(entry: Entry, folder: Path, wanted: Recipe) -> RunResults | None:
    """The results.json of a run that has scored an entry as `wanted` asks; None where there is none.

    Raises
    ------
    UserError
        When the run there was of another recipe.
    """
    return finished_run(folder, wanted, entry.stage, unread_by(entry.method))


def scored_by_lottery(entry: Entry, run_dir: Path, wanted: Recipe) -> RunResults | None:
    """The results.json of a lottery (or `tune`) that has scored an entry as `wanted` asks; None where none has.

    A lottery of another recipe is not an error here: its stages are not used.
    """
    results = read_results(run_dir)
    in_lottery = entry.stage in (Stage.UNTUNED, Stage.EMBED_TUNING) or entry.spec.rows is Rows.TICKET
    if not in_lottery or results is None:
        return None
    theirs = with_current_names(results.recipe.content())
    if entry.stage not in results.stages or theirs["seed"] != wanted.seed:
        return None
    drawn = theirs["draw"]
    own = clean(wanted)["draw"]
    if entry.alpha is not None:
        # Draws during training change nothing unless they stopped it.
        drawn = {**drawn, "every": None, "top_k": own["top_k"]}
    if drawn != own and "draw" in entry.spec.reads:
        return None
    text = {**theirs["text"], "seed": wanted.text.seed}
    same_text = theirs["text"].get("seed") in (None, wanted.text.seed) and theirs["seed"] == wanted.text.seed
    return results if same_text and not differs({**theirs, "text": text, "draw": drawn}, wanted, entry.method) else None


def differs(theirs: Mapping[str, Any], wanted: Recipe, method: str) -> str:
    """The first key in which a recorded recipe differs from a wanted one, as far as `method` reads it; empty for none."""
    return first_difference(theirs, wanted, unread_by(method))


def unread_by(method: str) -> frozenset[str]:
    """The sections of a recipe that a method does not read."""
    return frozenset(METHOD_SECTIONS - METHODS[method].reads | {"method", "ticket"})
