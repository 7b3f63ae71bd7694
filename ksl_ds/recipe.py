"""What a run is: typed sections, every default once, one clear sentence for every mistake.

A recipe is a YAML file merged over the dataclasses below; `key=value` words of the command line come last.
The help of a key is its `metadata["help"]`; `ksl-ds COMMAND --help` prints it from here, so it is written once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksl_ds.errors import UserError
from ksl_ds.files import write_text

PACKAGE_DIR = Path(__file__).parent


def key(default: Any, text: str) -> Any:
    """A dataclass field with its help text; lists and sections are copied for every recipe."""
    if isinstance(default, (list, dict)) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Model:
    path: str = key(MISSING, "folder or Hub id of a Hugging Face causal language model")
    revision: Optional[str] = key(None, "branch, tag or commit of a Hub model")
    trust_remote_code: bool = key(False, "run Python code that the model's repository ships")
    embedding_scope: Literal["input", "shared"] = key(
        "input", "for tied models: `input` leaves the output head as it is (the paper's), `shared` moves it too"
    )


@dataclass
class Text:
    train: list[str] = key([], "one file (.jsonl .csv .tsv .parquet .po) or Hub id, or two line-aligned text files")
    valid: list[str] = key([], "the same for validation; empty: no validation loss")
    test: list[str] = key([], "the same for the held-out text that every stage is scored on")
    train_split: str = key("train", "split name, for a Hub id in text.train")
    valid_split: str = key("validation", "split name, for a Hub id in text.valid")
    test_split: str = key("test", "split name, for a Hub id in text.test")
    hub_config: Optional[str] = key(None, "configuration name of a Hub dataset, such as en-fr")
    source_column: str = key("source", "column of the source sentence; dots enter nested columns (translation.en)")
    target_column: str = key("target", "column of the translation")
    source_language: str = key("English", "name of the source language, for the prompt")
    target_language: str = key("French", "name of the target language, for the prompt")
    prompt: str = key("plain", "plain, alpaca, chat (the tokenizer's own template), or your own text with {source}")
    max_length: int = key(1024, "longest prompt plus translation in tokens; longer pairs are dropped")
    max_words: Optional[int] = key(None, "longest source or target in words; longer pairs are dropped")
    max_train_pairs: Optional[int] = key(None, "at most so many training pairs, taken after a seeded shuffle")
    max_valid_pairs: Optional[int] = key(None, "at most so many validation pairs")
    max_test_pairs: Optional[int] = key(None, "at most so many test pairs")
    seed: Optional[int] = key(None, "of the shuffle that text.max_..._pairs are taken after; empty: the run's seed")


@dataclass
class Training:
    batch_size: int = key(128, "pairs in a global batch: over all ranks and accumulation steps")
    micro_batch_size: int = key(8, "pairs that one rank runs at once; the accumulation steps follow from it")
    precision: Literal["bf16", "fp16", "fp32"] = key("bf16", "of weights and gradients; the optimizer keeps fp32")
    clip: float = key(1.0, "largest gradient norm; 0 switches clipping off")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    log_every: int = key(1, "steps between two lines of metrics.jsonl")
    valid_every: Optional[int] = key(None, "steps between two validation losses; empty: at the end of training only")


@dataclass
class Tuning:
    learning_rate: float = key(1e-3, "peak learning rate of AdamW")
    epochs: float = key(3.0, "passes over the training text")
    max_steps: Optional[int] = key(None, "optimizer steps; replaces epochs when given")
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "learning rate after the warm-up")
    warmup: float = key(0.03, "share of the steps in which the learning rate rises, the first of W to 1/W of it")
    weight_decay: float = key(0.0, "AdamW's decoupled decay; of ticket rows: towards their base values")
    betas: list[float] = key([0.9, 0.999], "AdamW's averaging coefficients")
    epsilon: float = key(1e-8, "AdamW's denominator term")


@dataclass
class EmbedTuning(Tuning):
    learning_rate: float = key(2e-5, "peak learning rate of AdamW; 2e-5 suits a 7B model, small ones need more")


@dataclass
class PartialTuning(Tuning):
    learning_rate: float = key(1e-2, "peak learning rate of AdamW")
    epochs: float = key(5.0, "passes over the training text")
    mode: Literal["rows", "hooks"] = key(
        "rows", "rows: a parameter of the ticket's size; hooks: the whole matrix, with gradients of other rows dropped"
    )


@dataclass
class FullTuning(Tuning):
    learning_rate: float = key(2e-5, "peak learning rate of AdamW")


@dataclass
class Lora(Tuning):
    learning_rate: float = key(2e-4, "peak learning rate of AdamW")
    r: int = key(8, "rank of the update")
    lora_alpha: int = key(16, "the update is scaled by lora_alpha / r")
    lora_dropout: float = key(0.0, "dropout on the adapter's input")
    target_modules: list[str] = key([], "modules to adapt; empty: PEFT's own choice for the architecture")


@dataclass
class Prefix(Tuning):
    learning_rate: float = key(1e-2, "peak learning rate of AdamW")
    num_virtual_tokens: int = key(20, "trained key/value positions before the prompt, in every layer")


@dataclass
class Settled:
    overlap: float = key(0.95, "least Jaccard overlap of a draw's ticket with the one before")
    draws: int = key(3, "draws in a row that must overlap so much")


@dataclass
class Draw:
    selection: Literal[
        "alpha", "top_k", "bonferroni", "benjamini_hochberg", "frequency", "random", "shift_norm", "shift_ratio"
    ] = key("alpha", "how rows are chosen: by p < alpha, by largest D (top_k), corrected for many tests, or a control")
    alpha: float = key(0.05, "significance level of one token's test; a larger alpha gives a larger ticket")
    method: Literal["exact", "asymp"] = key(
        "exact", "p-value: exact, or asymp as scipy and replications of the paper use"
    )
    top_k: int = key(18, "rows taken by top_k and by the controls frequency, random, shift_norm, shift_ratio")
    every: Optional[int] = key(None, "draw every so many steps of embed tuning too, to watch the ticket settle")
    stop_when_settled: Optional[Settled] = key(
        None, "end embed tuning when the ticket has settled, such as {overlap: 0.95, draws: 3}; needs draw.every"
    )


@dataclass
class Evaluation:
    batch_size: int = key(16, "prompts that one rank translates at once")
    num_beams: int = key(1, "1 is greedy search; the paper reports 4")
    max_new_tokens: int = key(256, "longest translation in tokens")
    tokenize: str = key("13a", "sacrebleu tokenizer: 13a, intl, zh, char, none, or flores101 or flores200 for spBLEU")
    gather_weights: bool = key(
        True, "keep the whole model on every rank while translating (fast); false gathers layer by layer (any size)"
    )


@dataclass
class Certify:
    alphas: list[float] = key(
        [0.05, 0.25, 0.5, 0.75, 0.95],
        "levels whose partial transfer is compared with the reference; a ticket adds its own",
    )


@dataclass
class Tracking:
    wandb: Literal["auto", "online", "offline", "off"] = key(
        "auto", "auto: online where there is a key and a network, else offline"
    )
    project: str = key("ksl_ds", "wandb project")
    entity: Optional[str] = key(None, "wandb user or team")
    name: Optional[str] = key(None, "wandb run name; empty: the run folder's name")


# What `compare` runs, in the order of its table; `compare.methods` chooses among them.
METHODS = (
    "untuned", "full", "embed", "transfer", "ticket",
    "top_k", "frequency", "random", "shift_norm", "shift_ratio",
    "newline", "bos", "first_prompt_token", "lora", "prefix",
)  # fmt: skip
NOT_BY_DEFAULT = ("top_k", "bos", "first_prompt_token")
NEEDS_EMBED = ("transfer", "ticket", "top_k", "frequency", "random", "shift_norm", "shift_ratio")


@dataclass
class Compare:
    methods: list[str] = key(
        [name for name in METHODS if name not in NOT_BY_DEFAULT],
        "what to compare: untuned, full, embed, transfer and ticket (rows with p < alpha, for each of compare.alphas), "
        "controls with as many rows (top_k, frequency, random, shift_norm, shift_ratio), one row (newline, bos or "
        "first_prompt_token), lora, prefix",
    )
    alphas: list[float] = key([0.05, 0.25, 0.5], "levels of the tickets")
    seeds: list[int] = key([0, 1], "every method is trained once with each: another order of the same training text")
    rows: Optional[int] = key(
        None,
        "rows of a control; empty: as many as the ticket of the same seed at the recipe's draw.alpha has, or draw.top_k "
        "where that ticket is empty",
    )


@dataclass
class Checkpoint:
    every: Optional[int] = key(
        None, "steps between two checkpoints of a training; empty: only when SIGTERM or SIGUSR1 asks the run to end"
    )
    keep_last: int = key(2, "checkpoints of a training to keep, the newest; all go when its stage is complete")


# Keys and sections that may change before a run is gone on with, since no training depends on them.
CHANGE_NO_TRAINING = (
    "run_dir", "resume", "verbose", "num_ranks", "timeout_minutes", "checkpoint", "tracking", "certify", "compare",
    "reference", "evaluation.batch_size", "evaluation.gather_weights",
)  # fmt: skip


@dataclass
class Recipe:
    """A run of `lottery`, `tune`, `evaluate`, `compare` or `certify`."""

    run_dir: str = key(MISSING, "folder that this run creates; everything it writes lies there")
    resume: Literal["never", "auto"] = key(
        "never",
        "auto: goes on with the run that run_dir holds, if any, from its last complete stage or checkpoint (compare always "
        "does)",
    )
    seed: int = key(0, "of data order, dropout and controls")
    verbose: bool = key(False, "show what DeepSpeed, transformers and wandb log")
    deepspeed: str = key("zero3.json", "DeepSpeed JSON: a path, or a name in ds_configs/")
    num_ranks: Optional[int] = key(None, "ranks this run expects; another number is an error (empty: any)")
    timeout_minutes: float = key(30.0, "the job ends when a rank has waited so long for the others")
    model: Model = key(Model, "the model")
    text: Text = key(Text, "the parallel text")
    training: Training = key(Training, "what all methods share")
    embed_tuning: EmbedTuning = key(EmbedTuning, "method embed: the whole input embedding")
    draw: Draw = key(Draw, "the KS test and the choice of rows")
    partial_tuning: PartialTuning = key(PartialTuning, "method ticket: the ticket's rows alone")
    full_tuning: FullTuning = key(FullTuning, "method full: every parameter")
    lora: Lora = key(Lora, "method lora, by PEFT")
    prefix: Prefix = key(Prefix, "method prefix, by PEFT")
    evaluation: Evaluation = key(Evaluation, "translation and scores")
    certify: Certify = key(Certify, "the certificate")
    tracking: Tracking = key(Tracking, "wandb and metrics.jsonl")
    checkpoint: Checkpoint = key(Checkpoint, "checkpoints within a training, for resume=auto")
    compare: Compare = key(Compare, "what `compare` puts side by side")
    method: Literal["embed", "full", "ticket", "lora", "prefix"] = key("embed", "what `tune` trains")
    ticket: Optional[str] = key(None, "ticket folder, for `tune method=ticket`, for `evaluate` and for `certify`")
    reference: Optional[str] = key(None, "folder of the embed-tuned model, for `certify`")

    @property
    def text_seed(self) -> int:
        """Of the shuffle that a text's pairs are taken after."""
        return self.seed if self.text.seed is None else self.text.seed


@dataclass
class DrawCommand:
    """`ksl-ds draw before=DIR after=DIR out=DIR`."""

    before: str = key(MISSING, "model folder before tuning")
    after: str = key(MISSING, "model folder after tuning")
    out: str = key(MISSING, "ticket folder to create")
    selection: str = key("alpha", "as draw.selection in a recipe")
    alpha: float = key(0.05, "significance level of one token's test")
    method: Literal["exact", "asymp"] = key("exact", "p-value: exact, or scipy's asymp")
    top_k: int = key(18, "rows taken by top_k and by the controls")
    seed: int = key(0, "of selection=random")
    embedding_scope: Literal["input", "shared"] = key("input", "recorded in the ticket: whether a tied head moves too")
    verbose: bool = key(False, "show what libraries log")


@dataclass
class TransferCommand:
    """`ksl-ds transfer base=DIR ticket=DIR out=DIR`."""

    base: str = key(MISSING, "model folder that the ticket was drawn on")
    ticket: str = key(MISSING, "ticket folder")
    out: str = key(MISSING, "model folder to create")
    force: bool = key(False, "apply the ticket although the base model differs in these rows or was resized")
    verbose: bool = key(False, "show what libraries log")


@dataclass
class EstimateCommand:
    """`ksl-ds estimate MODEL gpus=N gpu_memory=GIB`."""

    model: str = key(MISSING, "a built-in shape (llama-3-70b), config.json, model folder, Hub id, or a recipe")
    gpus: int = key(1, "ranks, one a GPU")
    gpu_memory: Optional[float] = key(None, "GiB of one GPU; empty: only sizes are shown, not what fits")
    network: Optional[float] = key(None, "Gbit/s that a rank receives; shows the seconds of a step's traffic")
    rows: Optional[int] = key(None, "rows of the ticket; empty: the recipe's draw.top_k")
    length: Optional[int] = key(None, "tokens of every pair; empty: the recipe's text.max_length")
    response_length: Optional[int] = key(None, "of these, tokens of the response; empty: half")
    micro_batch_size: Optional[int] = key(None, "pairs that a rank runs at once; empty: the recipe's")
    precision: Optional[Literal["bf16", "fp16", "fp32"]] = key(None, "of weights and gradients; empty: the recipe's")
    deepspeed: Optional[str] = key(None, "DeepSpeed JSON; empty: the recipe's")
    embedding_scope: Optional[Literal["input", "shared"]] = key(None, "of tied models; empty: the recipe's")
    verbose: bool = key(False, "show what libraries log")


def dotted_keys(section: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every key of a recipe class in dotted form, with its default and its help text."""
    keys: dict[str, tuple[Any, str]] = {}
    for entry in dataclasses.fields(section):
        factory = entry.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            keys |= dotted_keys(factory, f"{prefix}{entry.name}.")
        else:
            default = entry.default if entry.default is not dataclasses.MISSING else factory()  # type: ignore[misc]
            keys[prefix + entry.name] = (default, entry.metadata["help"])
    return keys


def differing_keys(left: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two recipes differ and a training may depend on, with both values.

    Each is a Recipe, or one as results.json records it.
    """

    def flat(section: Any, prefix: str = "") -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for name, value in section.items():
            keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return keys

    ours, theirs = (
        flat(dataclasses.asdict(recipe) if isinstance(recipe, Recipe) else recipe) for recipe in (left, right)
    )
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
        and name not in CHANGE_NO_TRAINING
        and name.partition(".")[0] not in CHANGE_NO_TRAINING
    }


def shipped_file(name: str, folder: str) -> Path:
    """The file `name` as a path, or of that file name among those shipped in `folder` (ds_configs, recipes)."""
    path = Path(name)
    shipped = PACKAGE_DIR / folder / path.name
    if not path.exists() and shipped.exists():
        return shipped
    return path


def load_recipe(schema: type, file: str | None, overrides: list[str]) -> Any:
    """The recipe `schema` from a YAML file and `key=value` words, checked.

    Raises
    ------
    UserError
        For a missing file, broken YAML, an unknown key (the nearest known one is named), a wrong type or value.
    """
    where = ""
    try:
        merged = OmegaConf.structured(schema)
        if file is not None:
            path = shipped_file(file, "recipes")
            if not path.is_file():
                raise UserError(f"recipe {file}: no such file")
            where = f"{file}: "
            merged = OmegaConf.merge(merged, _as_meant(schema, _read_yaml(path)))
            where = ""
        for word in overrides:
            name, equals, _ = word.partition("=")
            if not equals or not re.fullmatch(r"[\w.]+", name):
                raise UserError(f"{word!r} is not of the form key=value (a recipe comes first, then key=value words)")
            merged = OmegaConf.merge(merged, _as_meant(schema, OmegaConf.from_dotlist([word])))
        missing = sorted(OmegaConf.missing_keys(merged))
    except OmegaConfBaseException as error:
        raise UserError(where + _explain(error, schema)) from None
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given, in the recipe or as {missing[0]}=...")
    recipe = OmegaConf.to_object(merged)
    if isinstance(recipe, Recipe):
        from ksl_ds.recipe_checks import check_recipe  # which needs this file's schema

        check_recipe(recipe)
    return recipe


def _read_yaml(path: Path) -> Any:
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # omegaconf passes on whatever its YAML parser raises
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(content):
        raise UserError(f"{path} must hold `key: value` lines")
    return content


def _as_meant(schema: type, content: Any) -> Any:
    """`train: a.jsonl` means `train: [a.jsonl]`, and YAML reads a bare `off` as false.

    A section that is given a value instead of keys is a mistake.
    """
    for name, (default, _) in dotted_keys(schema).items():
        section = name.rpartition(".")[0]
        given = OmegaConf.select(content, section) if section else None
        if given is not None and not OmegaConf.is_dict(given):
            raise UserError(f"{section} is {given!r}, but it is a section with keys of its own, such as {name}")
        value = OmegaConf.select(content, name)
        if isinstance(default, list) and value is not None and not OmegaConf.is_list(value):
            OmegaConf.update(content, name, [value])
        if name == "tracking.wandb" and value is False:
            OmegaConf.update(content, name, "off")
    return content


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    name = getattr(error, "full_key", None) or ""
    known = dotted_keys(schema)
    sections = sorted({known_key.rpartition(".")[0] for known_key in known} - {""})
    if type(error).__name__.startswith("ConfigKey") or type(error).__name__ == "ConfigAttributeError":
        by_last_part = {known_key.rpartition(".")[2]: known_key for known_key in known}
        near = difflib.get_close_matches(name, [*known, *sections], n=1, cutoff=0.6)
        near = near or [
            by_last_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1)
        ]
        return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "; see ksl-ds COMMAND --help")
    reason = str(error).split("\n")[0].rstrip(".")
    return f"{name or 'recipe'}: {reason[0].lower() + reason[1:]}"


def save_recipe(recipe: Any, path: Path) -> None:
    """Writes the complete, resolved recipe; `load_recipe` of that file gives the same recipe. Raises UserError."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))
