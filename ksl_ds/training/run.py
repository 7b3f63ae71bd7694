"""A run: what was asked for, on which text and model, where it is written.

Everything that a user can get wrong is checked before the run folder exists, on every rank at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ksl_ds.errors import UserError
from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.load import load_model, open_folder
from ksl_ds.recipe import Recipe, save_recipe
from ksl_ds.report.tracking import Tracker, hardware_and_versions, write_json
from ksl_ds.sharding import cluster
from ksl_ds.sharding.engine import deepspeed_config
from ksl_ds.text.batches import Example, encode_corpus
from ksl_ds.text.corpus import Corpus, load_corpus
from ksl_ds.text.prompt import Prompt
from ksl_ds.text.scores import check_tokenizer


@dataclass
class Run:
    """A run in progress: what was asked for, on what, and what has been found so far."""

    recipe: Recipe
    config: dict[str, Any]  # DeepSpeed's
    folder: ModelFolder
    tokenizer: Any
    model: nn.Module
    tracker: Tracker
    corpora: dict[str, Corpus]
    examples: dict[str, list[Example]]
    prompts: list[list[int]]  # of the test text
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def pad_id(self) -> int:
        """Fills short sequences; masked by position, so any id serves."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.results["stages"]

    def save_results(self) -> None:
        if cluster.is_main():
            write_json(self.dir / "results.json", self.results)


@contextmanager
def open_run(recipe: Recipe, *, trains: bool = True) -> Iterator[Run]:
    """Checks the recipe against the world, loads text and model, and creates the run folder.

    Raises
    ------
    UserError
        On every rank, before anything is written.
    """
    if recipe.num_ranks not in (None, cluster.world_size()):
        raise UserError(
            f"the recipe expects num_ranks={recipe.num_ranks}, but {cluster.world_size()} were started; "
            "check the hostfile (deepspeed only warns when it is missing)"
        )
    config = deepspeed_config(recipe)
    run_dir = Path(recipe.run_dir)
    with cluster.together():
        if cluster.is_main():
            if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
                raise UserError(f"run_dir {run_dir} already holds a run; choose another run_dir or move it away")
            check_tokenizer(recipe.evaluation.tokenize)
    folder = open_folder(recipe.model)
    with cluster.together():
        tokenizer = folder.tokenizer()
        prompt = Prompt(recipe.text.prompt, recipe.text.source_language, recipe.text.target_language, tokenizer)
        names = (["train"] if trains else []) + (["valid"] if trains and recipe.text.valid else []) + ["test"]
        corpora = {name: load_corpus(recipe.text, name, recipe.seed) for name in names}  # type: ignore[arg-type]
        examples = {}
        for name, corpus in corpora.items():
            examples[name], dropped = encode_corpus(corpus, prompt, recipe.text.max_length)
            corpus.dropped |= dropped
    for corpus in corpora.values():
        cluster.say(corpus.summary())
    cluster.say(f"loading {folder.path} on {cluster.world_size()} ranks")
    model = load_model(recipe, folder, config)
    with cluster.together():
        if cluster.is_main():
            _create(run_dir, recipe)
    results = {
        "stages": {},
        "baselines": {},
        "text": {name: {"pairs": len(examples[name]), "dropped": corpora[name].dropped} for name in corpora},
        "environment": hardware_and_versions(),
        "recipe": asdict(recipe),
    }
    prompts = [prompt.encode_source(pair.source) for pair in corpora["test"].pairs]
    with Tracker(run_dir, recipe) as tracker:
        yield Run(recipe, config, folder, tokenizer, model, tracker, corpora, examples, prompts, results)


def _create(run_dir: Path, recipe: Recipe) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run_dir / "recipe.yaml")
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written: {error.strerror}") from None


def numel(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter, partitioned or not."""
    return getattr(parameter, "ds_numel", parameter.numel())
