"""What can be trained or compared: the stages of a run, and the methods that lead to them. Each is declared once, here.

A new method is an entry of `METHODS` and, where it trains in a new way, a `Stage` with its branch in
`training/stages.py: run_stage`. The controls that draw rows by a rule come from `lottery/selection.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ksl_ds.lottery.selection import RULES


class Stage(str, Enum):
    """A scored state of the model; the value is its key in results.json. In the order of the tables."""

    COPYING_SOURCE = "copying_source"  # no model at all: the source sentence as its own translation
    UNTUNED = "untuned"
    FULL_TUNING = "full_tuning"
    EMBED_TUNING = "embed_tuning"
    PARTIAL_TRANSFER = "partial_transfer"
    PARTIAL_TUNING = "partial_tuning"
    LORA = "lora"
    PREFIX_TUNING = "prefix_tuning"
    TICKET = "ticket"  # rows that `evaluate` is given

    def __format__(self, spec: str) -> str:  # Python 3.12 would print "Stage.LORA"
        return format(self.value, spec)

    def __str__(self) -> str:
        return self.value

    @property
    def label(self) -> str:
        """As tables and messages call it."""
        return label_of(self)


class Rows(Enum):
    """Which embedding rows a method takes."""

    TICKET = "the ticket at a level alpha"
    CONTROL = "as many as a ticket has, by another rule"
    SINGLE = "one"


@dataclass(frozen=True)
class Method:
    """A way to train, or not to train, that a comparison can hold.

    Attributes
    ----------
    name : str
        As in `compare.methods`, and in `method` where `tune` takes it.
    key : str
        In results.json of a comparison and in the names of its run folders.
    label : str
        In tables.
    stage : Stage
        What its run scores.
    tune_as : str or None
        `method` of its run; None where nothing is trained.
    rows : Rows or None
        The rows that it trains or transfers; None for all other methods.
    """

    name: str
    key: str
    label: str
    stage: Stage
    tune_as: str | None
    rows: Rows | None = None

    @property
    def needs_embed(self) -> bool:
        """Whether its rows, or how many there are, follow from embed tuning with the same seed."""
        return self.rows in (Rows.TICKET, Rows.CONTROL)

    @property
    def reads(self) -> frozenset[str]:
        """The recipe sections that its result depends on, of those that not all methods read."""
        sections = {TUNING_SECTIONS[self.stage]} if self.stage in TUNING_SECTIONS else set()
        if self.needs_embed or self.stage is Stage.EMBED_TUNING:
            sections |= {"embed_tuning", "draw"}
        return frozenset(sections)


# The recipe section that holds the optimizer's settings of a stage.
TUNING_SECTIONS = {
    Stage.EMBED_TUNING: "embed_tuning",
    Stage.PARTIAL_TUNING: "partial_tuning",
    Stage.FULL_TUNING: "full_tuning",
    Stage.LORA: "lora",
    Stage.PREFIX_TUNING: "prefix",
}
METHOD_SECTIONS = frozenset({*TUNING_SECTIONS.values(), "draw"})  # those that not all methods read

METHODS = {
    method.name: method
    for method in (
        Method("untuned", "untuned", "untuned", Stage.UNTUNED, None),
        Method("full", "full_tuning", "full tuning", Stage.FULL_TUNING, "full"),
        Method("embed", "embed_tuning", "embed tuning", Stage.EMBED_TUNING, "embed"),
        Method("transfer", "partial_transfer", "partial transfer", Stage.PARTIAL_TRANSFER, "ticket", Rows.TICKET),
        Method("ticket", "partial_tuning", "partial tuning", Stage.PARTIAL_TUNING, "ticket", Rows.TICKET),
        *(
            Method(rule.name, rule.key, rule.label, Stage.PARTIAL_TUNING, "ticket", Rows.CONTROL)
            for rule in RULES.values()
            if rule.is_control
        ),
        *(
            Method(name, f"one_row_{name}", f"one row: {label}", Stage.PARTIAL_TUNING, "ticket", Rows.SINGLE)
            for name, label in (
                ("newline", "newline"),
                ("bos", "BOS"),
                ("first_prompt_token", "first prompt token"),
            )
        ),
        Method("lora", "lora", "lora", Stage.LORA, "lora"),
        Method("prefix", "prefix_tuning", "prefix tuning", Stage.PREFIX_TUNING, "prefix"),
    )
}
TUNED = tuple(method.name for method in METHODS.values() if method.tune_as == method.name)  # what `tune` takes
ADAPTERS = tuple(name for name in TUNED if METHODS[name].stage in (Stage.LORA, Stage.PREFIX_TUNING))

_LABELS = {
    Stage.COPYING_SOURCE.value: "copying the source",
    **{method.key: method.label for method in METHODS.values()},
}


def label_of(key: str) -> str:
    """The label of a stage or of a comparison's entry, from its key in results.json.

    A key that no method has, such as one of an older version, is shown with spaces.
    """
    name, at_alpha, alpha = key.partition("_alpha_")
    label = _LABELS.get(str(name), name.replace("_", " "))
    return f"{label} alpha {alpha}" if at_alpha else label
