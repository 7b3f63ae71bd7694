"""What a run depends on besides its recipe and its text, recorded in `inputs.json` when it starts and compared on resume.

- the base model: a digest of every weight as loaded, SHA-256 of its configuration, tokenizer and code
- the ticket that the recipe names: SHA-256 of its ticket.json, which covers the ticket's other files
- the DeepSpeed JSON, without what only changes the log or follows from the number of ranks

Only rank 0 reads files here; the digests of the weights are computed by all ranks (ksl_ds/model/load.py).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ksl_ds.config.load import differing_keys
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import Record, checked, file_sha256, read_json, write_json
from ksl_ds.lottery.ticket_files import TICKET_JSON
from ksl_ds.model.folder import SIDE_FOLDER, ModelFolder

logger = logging.getLogger(__name__)

INPUTS = "inputs.json"
SIDE_SUFFIXES = (".json", ".model", ".jinja", ".py", ".tiktoken", "merges.txt", "vocab.txt")


class Inputs(Record):
    """What `inputs.json` holds."""

    deepspeed: dict[str, Any]
    model_files: dict[str, str]
    weights: dict[str, str]
    ticket: str | None


def inputs_of(recipe: Recipe, folder: ModelFolder, config: dict[str, Any]) -> dict[str, Any]:
    """All but the weights, which are known when the model is loaded. `config` is DeepSpeed's."""
    from ksl_ds.sharding.deepspeed_json import HOST_COPIES, LOGGING_KEYS

    sides = [path for path in folder.path.iterdir() if path.name.endswith(SIDE_SUFFIXES) and path.is_file()]
    sides = [path for path in sides if not path.name.endswith(".index.json") and not path.name.startswith(".")]
    sides += (folder.path / SIDE_FOLDER).glob("*")
    ticket = Path(recipe.ticket or "", TICKET_JSON)
    of_ranks = (*LOGGING_KEYS, "gradient_accumulation_steps", HOST_COPIES)
    deepspeed = {name: value for name, value in config.items() if name not in of_ranks}
    if "zero_optimization" in deepspeed:
        zero = deepspeed["zero_optimization"]
        deepspeed["zero_optimization"] = {name: value for name, value in zero.items() if name not in of_ranks}
    return {
        "deepspeed": deepspeed,
        "model_files": {str(path.relative_to(folder.path)): file_sha256(path) for path in sorted(sides)},
        "ticket": file_sha256(ticket) if recipe.ticket and ticket.is_file() else None,
    }


def check_inputs(run_dir: Path, recipe: Recipe, found: dict[str, Any]) -> None:
    """Compares what is `found` now with what the run in `run_dir` recorded, if there is one.

    Raises
    ------
    UserError
        Naming the first thing that changed.
    """
    recorded = read_inputs(run_dir)
    if recorded is None:
        return
    since = f"since the run in {run_dir} was started"
    restore = "restore it or choose another run_dir"
    if name := differing_model(recorded, found):
        raise UserError(f"the model {recipe.model.path} has changed {since} ({name} differs); {restore}")
    if recorded["ticket"] != found["ticket"]:
        raise UserError(f"the ticket {recipe.ticket} has changed {since}; {restore}")
    for name, (old, new) in differing_keys(recorded["deepspeed"], found["deepspeed"]).items():
        raise UserError(f"{recipe.deepspeed} has changed {since} ({name} was {old} and is {new}); {restore}")


def differing_model(left: dict[str, Any], right: dict[str, Any]) -> str | None:
    """The first file, or else weight, in which the base models of two runs differ, as far as both are known."""
    for part in ("model_files", "weights"):
        if part in left and part in right:
            for name in (*right[part], *left[part]):  # in the model's order
                if left[part].get(name) != right[part].get(name):
                    return name
    return None


def read_inputs(run_dir: Path) -> dict[str, Any] | None:
    """The inputs that a run has recorded, or None. Raises UserError for a damaged file."""
    path = Path(run_dir) / INPUTS
    return checked(read_json(path), Inputs, str(path)) if path.exists() else None


def record_inputs(run_dir: Path, found: dict[str, Any], *, resumes: bool) -> None:
    """Writes inputs.json unless it exists; warns for a run that was started by a version without it."""
    if (run_dir / INPUTS).exists():
        return
    if resumes:
        logger.warning(
            f"the run in {run_dir} recorded no {INPUTS} when it was started, so whether its model, ticket or "
            "DeepSpeed JSON has changed is not checked"
        )
    write_json(run_dir / INPUTS, found)
