"""README.md of a ticket folder: a model card for people and for the Hub, which shows it as the page of an uploaded ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ksl_ds import __version__
from ksl_ds.environment import Environment
from ksl_ds.lottery.ticket import Ticket
from ksl_ds.lottery.ticket_files import CARD
from ksl_ds.report.records import Scores
from ksl_ds.report.tables import Table, rows_of_ticket, stage_table, ticket_table

TOKENS_SHOWN = 50
LOAD = """```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS FOLDER")
```

As a model folder for any library. Needed for a model with a tied output head, which PEFT would move too:

```bash
ksl-ds transfer base={base} ticket=THIS_FOLDER out=MODEL
```"""


def ticket_card(
    ticket: Ticket,
    *,
    base_model: str,
    licence: str | None = None,
    translates: str = "",
    languages: Sequence[str] = (),
    stages: Mapping[str, Scores] | None = None,
    seed: int | None = None,
    environment: Environment | None = None,
) -> str:
    """The card of a ticket, Markdown with a head that the Hub reads.

    Parameters
    ----------
    ticket
        What the folder holds.
    base_model
        Folder or Hub id of the base model.
    licence
        Of the base model, as the Hub names it, which holds for the rows too; None if it is not known.
    translates
        Such as "English to French".
    languages
        Codes of the languages.
    stages
        Scores to show, such as the untuned model's and those of this ticket.
    seed
        Of the run.
    environment
        Of the run.
    """
    head: dict[str, Any] = {"library_name": "peft", "tags": ["ks-lottery", "ksl_ds", "translation"]}
    if not Path(base_model).exists():  # the Hub knows no local folders
        head["base_model"] = base_model
    if licence:
        head["license"] = licence
    if languages:
        head["language"] = list(languages)
    parts = [
        f"---\n{yaml.safe_dump(head, allow_unicode=True)}---",
        f"# {len(ticket):,} embedding rows of {base_model}{translates and f', {translates}'}",
        f"A ticket of [KS-Lottery](https://arxiv.org/abs/2402.02801): {len(ticket):,} of {ticket.vocab_size:,} rows of the "
        f"input embedding, {ticket.rows_KD.numel():,} numbers; the rest of the model is the base model's.",
        f"Base model: {base_model}. Licence of the base model, which holds for these rows too: {licence or 'see there'}.",
    ]
    if stages:
        parts += ["## Scores", markdown(stage_table(stages))]
    parts += [
        "## Tokens",
        markdown(ticket_table(rows_of_ticket(ticket), limit=TOKENS_SHOWN)),
        "## Loading",
        LOAD.format(base=base_model),
        "## How it was made",
        f"Rows chosen by: {ticket.selection} (alpha {ticket.alpha}, {ticket.method} p-values, d = {ticket.num_samples}, "
        f"{ticket.tested_dtype}). Values: {ticket.source.get('stage', 'as drawn')}"
        + (f" of {ticket.source['steps']} steps" if "steps" in ticket.source else "")
        + (f", seed {seed}" if seed is not None else "")
        + f". Written by ksl_ds {__version__}"
        + (f" with {_versions(environment)}" if environment else "")
        + "; the run folder's recipe.yaml reruns it.",
    ]
    return "\n\n".join(parts) + "\n"


def markdown(content: Table) -> str:
    """A table in Markdown, with its notes below it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = ["---:" if column.numeric else "---" for column in content.columns]
    lines = [line([column.name for column in content.columns]), line(rule), *map(line, content.rows)]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in content.notes)


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's own README.md names in its head; None where there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        _, head, _ = text.split("---\n", 2)
        licence = yaml.safe_load(head)["license"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _versions(environment: Environment) -> str:
    shown = ("torch", "deepspeed", "transformers", "peft")
    return ", ".join(f"{name} {environment.versions[name]}" for name in shown if name in environment.versions)
