"""A run: its recipe, text, model and folder, and its results so far.

All inputs are checked before the run folder is created, on every rank at once. resume=auto resumes an existing folder: the
recipe, the text and what inputs.json records must be unchanged, and stages in its results.json are skipped.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksl_ds import distributed
from ksl_ds.config.load import differing_keys, load_recipe, save_recipe
from ksl_ds.config.methods import Stage
from ksl_ds.config.schema import CERTIFIED, Evaluation, Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import blocks_sha256, write_text
from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.load import free_weights, load_model, open_folder, weight_digests
from ksl_ds.model.methods import prepare_method
from ksl_ds.report.records import (
    RecordedRecipe,
    RunResults,
    StageResult,
    TextPart,
    read_metrics,
    read_results,
)
from ksl_ds.report.tracking import Tracker
from ksl_ds.sharding.checkpoint import Checkpoints
from ksl_ds.sharding.engine import check_precision, deepspeed_config
from ksl_ds.sharding.rounding import round_frozen
from ksl_ds.text.batches import check_positions, padding_id
from ksl_ds.text.comet import check_comet
from ksl_ds.text.corpus import Corpus, Split
from ksl_ds.text.directions import load_texts
from ksl_ds.text.packing import Packing
from ksl_ds.text.prompt import Example
from ksl_ds.text.scores import check_tokenizer
from ksl_ds.training.inputs import check_inputs, inputs_of, record_inputs

logger = logging.getLogger(__name__)

LOCK = ".lock"


@dataclass
class RunContext:
    """A run in progress: what was asked for, on what, and what has been found so far."""

    recipe: Recipe
    config: dict[str, Any]  # DeepSpeed's
    folder: ModelFolder
    tokenizer: Any
    model: Any  # a transformers causal language model
    tracker: Tracker
    corpora: dict[str, Corpus]
    examples: dict[str, list[Example]]
    prompts: list[list[int]]  # of the test text
    results: RunResults
    adapter: Any = None  # PEFT's config, for the methods lora and prefix
    proved: tuple[Any, Packing] | None = (
        None  # a model, and how its micro-batches are laid out: see training/packing.py
    )

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run_dir)

    @property
    def pad_id(self) -> int:
        """Fills short sequences."""
        return padding_id(self.tokenizer)

    @property
    def stages(self) -> dict[str, StageResult]:
        """The completed stages in results.json, by stage."""
        return self.results.stages

    def save_results(self) -> None:
        """Writes results.json, on rank 0. Collective."""
        distributed.run_on_rank0(lambda: write_text(self.dir / "results.json", self.results.to_json()))

    def checkpoints(self, stage: Stage) -> Checkpoints:
        """The checkpoints within the training of a stage."""
        return Checkpoints(self.dir / "checkpoints" / f"{stage}_steps", self.recipe.checkpoint.keep_last)


@contextmanager
def open_run(
    recipe: Recipe,
    *,
    trains: bool = True,
    validates: bool | None = None,
    method: str | None = None,
    certifies: bool = False,
) -> Iterator[RunContext]:
    """Checks the recipe against machine and inputs, loads text and model, and creates the run folder. Collective.

    Parameters
    ----------
    recipe
        The run's recipe, already checked in itself.
    trains
        Whether training text is needed.
    validates
        Whether validation text is needed, if the recipe names one; as `trains` unless given.
    method
        The training method, as `recipe.method`, if only one trains; it is checked against the architecture.
    certifies
        Whether `draw.selection: certified` can be done.

    Raises
    ------
    UserError
        On every rank, before anything is written.
    """
    if trains and recipe.draw.selection == CERTIFIED and not certifies:
        raise UserError("draw.selection=certified is a rule of lottery alone; choose another one")
    if recipe.num_ranks not in (None, distributed.world_size()):
        raise UserError(
            f"the recipe expects num_ranks={recipe.num_ranks}, but {distributed.world_size()} were started; "
            "check the hostfile (deepspeed only warns when it is missing)"
        )
    config = distributed.run_on_rank0(lambda: deepspeed_config(recipe))
    with distributed.raise_on_all_ranks():
        check_precision(recipe.training.precision)
    run_dir = Path(recipe.run_dir)
    before = distributed.run_on_rank0(lambda: previous_results(run_dir, recipe))
    distributed.run_on_rank0(lambda: check_scores(recipe.evaluation))
    folder = open_folder(recipe.model)
    adapter = (
        distributed.run_on_rank0(lambda: prepare_method(recipe, folder.config, config, method)) if trains else None
    )
    inputs = distributed.run_on_rank0(lambda: inputs_of(recipe, folder, config))
    distributed.run_on_rank0(lambda: check_inputs(run_dir, recipe, inputs))
    with distributed.raise_on_all_ranks():
        tokenizer = folder.tokenizer()
        _ = folder.end_ids  # checks generation_config.json before the model is loaded
        validates = (trains if validates is None else validates) and bool(recipe.text.valid)
        needed: dict[Split, bool] = {"train": trains, "valid": validates, "test": True}
        splits = [split for split, is_needed in needed.items() if is_needed]
        corpora, examples = load_texts(recipe.text, splits, recipe.text_seed, tokenizer)
        text = {}
        for name, corpus in corpora.items():
            text[name] = text_part(corpus)
            if before and before.text.get(name, text[name]).sha256 != text[name].sha256:
                raise UserError(
                    f"{corpus.name} has changed since the run in {run_dir} started, so it cannot be resumed; restore the text "
                    "or choose another run_dir"
                )
        check_positions(examples, folder.positions, recipe.evaluation.max_new_tokens, virtual_tokens(recipe))
    for corpus in corpora.values():
        logger.info(corpus.summary())
    logger.info(f"loading {folder.path} on {distributed.world_size()} ranks")
    model = load_model(recipe, folder, config)
    inputs["weights"] = weight_digests(model)
    round_frozen(model, config)
    prompts = [example.prompt_ids for example in examples["test"]]
    with run_lock(run_dir):
        # Again, since another process may have resumed the run while this one loaded the model.
        before = distributed.run_on_rank0(lambda: previous_results(run_dir, recipe))
        environment = hardware_and_versions()
        recorded = RecordedRecipe(**asdict(recipe))
        results = before or RunResults(stages={}, baselines={}, text=text, environment=environment, recipe=recorded)
        results.environment = environment
        distributed.run_on_rank0(lambda: check_inputs(run_dir, recipe, inputs))
        distributed.run_on_rank0(lambda: _begin(run_dir, recipe, inputs, results.stages))
        with Tracker(run_dir, recipe) as tracker:
            run = RunContext(
                recipe, config, folder, tokenizer, model, tracker, corpora, examples, prompts, results, adapter
            )
            run.save_results()
            try:
                yield run
            finally:
                free_weights(run.model)  # a command may open one run after the other


def check_scores(evaluation: Evaluation) -> None:
    """Makes sure that the test text can be scored, before anything is trained. On rank 0 only. Raises UserError."""
    check_tokenizer(evaluation.tokenize)
    if evaluation.comet:
        check_comet(evaluation.comet)


def virtual_tokens(recipe: Recipe) -> int:
    """Positions that prefix tuning adds before every prompt."""
    return recipe.prefix.num_virtual_tokens if recipe.method == "prefix" else 0


def previous_results(run_dir: Path, recipe: Recipe) -> RunResults | None:
    """The results of the run in `run_dir` if it is resumed; None for a new run.

    Raises
    ------
    UserError
        If `run_dir` is not empty and the recipe does not resume, or it holds anything but a run of this recipe.
    """
    # Hidden names are the lock, and temporary files of a run that was killed at its start.
    if not run_dir.exists() or (run_dir.is_dir() and all(path.name.startswith(".") for path in run_dir.iterdir())):
        return None
    if not run_dir.is_dir():
        raise UserError(f"run_dir {run_dir} is a file, not a folder; choose another run_dir")
    if recipe.resume == "never":
        raise UserError(
            f"run_dir {run_dir} already holds a run; choose another run_dir, move it away, or resume it with resume=auto"
        )
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"run_dir {run_dir} does not hold a run (no recipe.yaml); choose another run_dir")
    try:
        recorded = load_recipe(Recipe, str(run_dir / "recipe.yaml"), [])
    except UserError as error:
        raise UserError(f"{run_dir / 'recipe.yaml'}, the recipe of the run there: {error}") from None
    for name, (old, new) in differing_keys(recorded, recipe).items():
        raise UserError(
            f"the run in {run_dir} was started with {name}={old}, and now it is {new}; resume=auto needs the same recipe, "
            f"which is in {run_dir / 'recipe.yaml'}"
        )
    read_metrics(run_dir)  # the report at the end needs it
    return read_results(run_dir)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Creates run_dir and holds an exclusive lock on it for the block. Raises UserError."""
    lock: Any = None
    with distributed.raise_on_all_ranks():
        if distributed.is_rank0():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = (folder / LOCK).open("w")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"run_dir {folder} is in use by another run; choose another one") from None
            except OSError as error:
                if lock is None or error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise UserError(f"run_dir {folder} cannot be written: {error.strerror}") from None
                logger.warning(
                    f"{folder} cannot be locked ({error.strerror}); make sure that no other run writes there"
                )
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _begin(run_dir: Path, recipe: Recipe, inputs: dict[str, Any], stages: Iterable[str]) -> None:
    """Writes recipe.yaml and inputs.json, and deletes checkpoints of complete stages that a killed process left."""
    resumes = (run_dir / "recipe.yaml").exists()
    if not resumes:
        save_recipe(recipe, run_dir / "recipe.yaml")
    record_inputs(run_dir, inputs, resumes=resumes)
    for stage in stages:
        shutil.rmtree(run_dir / "checkpoints" / f"{stage}_steps", ignore_errors=True)


def corpus_sha256(corpus: Corpus) -> str:
    """SHA-256 of the pairs in their order, which must not change on resume."""
    lines = ("\t".join((*filter(None, [pair.direction]), pair.source, pair.target)) + "\n" for pair in corpus.pairs)
    return blocks_sha256(line.encode("utf-8", "surrogatepass") for line in lines)


def text_part(corpus: Corpus) -> TextPart:
    """What results.json says about a text."""
    part = TextPart(pairs=len(corpus.pairs), dropped=corpus.dropped, sha256=corpus_sha256(corpus))
    by_direction = corpus.by_direction()
    if list(by_direction) != [""]:
        part.directions = {name: len(indices) for name, indices in by_direction.items()}
    return part
