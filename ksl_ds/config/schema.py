"""The recipe: typed sections with defaults, ranges and help texts.

A recipe is a YAML file merged over the dataclasses below; `key=value` words of the command line override it. YAML gives only
the structure; the key's type decides what a value means, so `no`, `1e3` or a date is text if the key takes text.
A key's description is its help and its type holds its range; `ksl-ds COMMAND --help` prints both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ksl_ds.config.methods import METHODS, TUNED
from ksl_ds.lottery.selection import RULES

PACKAGE_DIR = Path(__file__).parent.parent
MISSING = "???"  # of a key that must be given
NULL = ("", "~", "null", "Null", "NULL")  # as in YAML: a key that may be empty is empty
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it must be text that UTF-8 can write") from None
    return text


def _one_line(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("it must be one line without control characters")
    return text


def _wandb_tag(text: str) -> str:
    if not 1 <= len(text) <= 64:
        raise ValueError("wandb takes tags of 1 to 64 characters")
    return text


# Numbers are finite, and small enough that no library overflows.
Count = Annotated[int, Field(gt=0, le=10**9)]
Length = Annotated[int, Field(ge=2, le=10**9)]  # in tokens, of a pair: one of the prompt and one of the translation
BatchSize = Annotated[int, Field(gt=0, le=10**6)]
Rank = Annotated[int, Field(gt=0, le=2**16)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # torch's limit
Alpha = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0.001, le=10**6)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _one_of(names: Iterable[str], *more: str) -> AfterValidator:
    def check(value: str) -> str:
        known = [*names, *more]
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            raise ValueError(f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}")
        return value

    return AfterValidator(check)


Prose = Annotated[str, AfterValidator(_utf8)]
Line = Annotated[Prose, AfterValidator(_one_line)]
Tag = Annotated[Line, AfterValidator(_wandb_tag)]
Selection = Annotated[Line, _one_of(RULES)]
CERTIFIED = "certified"  # a selection that takes more than the KS test
TunedMethod = Annotated[Line, _one_of(TUNED)]
ComparedMethod = Annotated[Line, _one_of(METHODS)]
CONTROLS = [rule.name for rule in RULES.values() if rule.is_control]


def _rules_help() -> str:
    return ", ".join(f"{rule.name} ({rule.label})" for rule in RULES.values())


def key(default: Any, text: str) -> Any:
    """A dataclass field with its help text; lists, mappings and sections are copied for every recipe."""
    if isinstance(default, (list, dict)):
        return Field(default_factory=lambda: default.copy(), description=text)
    if isinstance(default, type):
        return Field(default_factory=default, description=text)
    return Field(default=default, description=text)


@dataclass(config=STRICT)
class Model:
    """The model and where it comes from."""

    path: Line = key(MISSING, "folder or Hub id of a Hugging Face causal language model")
    revision: Line | None = key(None, "branch, tag or commit of a Hub model")
    trust_remote_code: bool = key(False, "run Python code that the model's repository ships")
    embedding_scope: Literal["input", "shared"] = key(
        "input", "for tied models: `input` keeps the output head unchanged (as in the paper), `shared` changes it too"
    )


@dataclass(config=STRICT)
class Text:
    """Parallel text: files or Hub datasets, columns, languages, prompt, limits."""

    train: list[Line] = key(
        [], "one file (.jsonl .csv .tsv .po, also .gz; .parquet) or Hub id, or two line-aligned text files"
    )
    valid: list[Line] = key(
        [], "the validation text, likewise; empty: no validation loss, and `certify` certifies no risk"
    )
    test: list[Line] = key([], "the test text, likewise: every stage is scored on it")
    train_split: Line = key("train", "split name, for a Hub id in text.train")
    valid_split: Line = key("validation", "split name, for a Hub id in text.valid")
    test_split: Line = key("test", "split name, for a Hub id in text.test")
    hub_config: Line | None = key(None, "configuration name of a Hub dataset, such as en-fr")
    revision: Line | None = key(None, "branch, tag or commit of a Hub dataset")
    source_column: Line = key("source", "column of the source sentence; a dot selects a nested column (translation.en)")
    target_column: Line = key("target", "column of the translation")
    source_language: Line = key(
        "English", "name of the source language, for the prompt; text.directions name their own"
    )
    target_language: Line = key("French", "name of the target language, likewise")
    directions: list[Line] = key(
        [],
        "translation directions of one run, such as [en-ca, en-es]; in text.train, text.valid, text.test, text.hub_config and "
        "the columns {direction}, {source} and {target} stand for en-ca, en and ca; max_*_pairs count for each",
    )
    languages: dict[Line, Line] = key({}, "names of languages by code, where the usual English name should not be used")
    prompts: dict[Line, Prose] = key({}, "prompts by direction, where text.prompt should not be used")
    mixing: Literal["proportional", "uniform", "temperature"] = key(
        "proportional",
        "how often each direction occurs in training: by its number of pairs n, all alike, or by n ** (1 / temperature)",
    )
    mixing_temperature: Annotated[float, Field(ge=1)] = key(
        5.0, "temperature of text.mixing=temperature; 1: proportional"
    )
    prompt: Prose = key("plain", "plain, alpaca, chat (the tokenizer's own template), or your own text with {source}")
    max_length: Length = key(1024, "longest prompt plus translation in tokens; longer pairs are dropped")
    max_words: Count | None = key(None, "longest source or target in words; longer pairs are dropped")
    max_train_pairs: Count | None = key(None, "maximum number of training pairs, taken after a seeded shuffle")
    max_valid_pairs: Count | None = key(None, "maximum number of validation pairs")
    max_test_pairs: Count | None = key(None, "maximum number of test pairs")
    seed: Seed | None = key(None, "seed of that shuffle; empty: the run's seed")


@dataclass(config=STRICT)
class Training:
    """Settings that all training methods share: batch sizes in pairs, precision, clipping, logging."""

    batch_size: BatchSize = key(128, "pairs in a global batch, over all ranks and gradient accumulation steps")
    micro_batch_size: BatchSize = key(8, "pairs per rank and forward pass; sets the gradient accumulation steps")
    precision: Literal["bf16", "fp16", "fp32"] = key("bf16", "of weights and gradients; master weights are fp32")
    packing: Literal["auto", "prefix", "sequences", "off"] = key(
        "auto",
        "prefix: pairs in one row, their prompts' shared beginning computed once; sequences: in one row, nothing shared; off: "
        "padding; auto: the first that the model computes exactly, where it is faster",
    )
    max_grad_norm: NotNegative = key(1.0, "gradients are clipped to this norm; 0: no clipping")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    log_every: Count = key(1, "write metrics.jsonl every so many steps")
    eval_every: Count | None = key(None, "compute the validation loss every so many steps; empty: only after training")


@dataclass(config=STRICT)
class Tuning:
    """AdamW and its schedule, for one training method."""

    learning_rate: Positive = key(1e-3, "peak learning rate of AdamW")
    epochs: Amount = key(3.0, "passes over the training text")
    max_steps: Count | None = key(None, "optimizer steps; overrides epochs")
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "learning rate schedule after warm-up")
    warmup_ratio: Share = key(0.03, "share of steps with linear warm-up; step s of W has s/W of the peak")
    weight_decay: NotNegative = key(0.0, "AdamW's decoupled weight decay; ticket rows decay towards their base values")
    betas: list[Share] = key([0.9, 0.999], "AdamW's betas")
    epsilon: Positive = key(1e-8, "AdamW's epsilon")


@dataclass(config=STRICT)
class EmbedTuning(Tuning):
    """Method embed: the whole input embedding."""

    learning_rate: Positive = key(2e-5, "peak learning rate of AdamW; 2e-5 suits a 7B model, small ones need more")


@dataclass(config=STRICT)
class PartialTuning(Tuning):
    """Method ticket: the ticket's rows only."""

    learning_rate: Positive = key(1e-2, "peak learning rate of AdamW")
    epochs: Amount = key(5.0, "passes over the training text")
    mode: Literal["rows", "hooks"] = key(
        "rows",
        "rows: train a parameter of the ticket's size; hooks: train the matrix with the other rows' gradients zeroed",
    )


@dataclass(config=STRICT)
class FullTuning(Tuning):
    """Method full: every parameter."""

    learning_rate: Positive = key(2e-5, "peak learning rate of AdamW")


@dataclass(config=STRICT)
class Lora(Tuning):
    """Method lora, by PEFT."""

    learning_rate: Positive = key(2e-4, "peak learning rate of AdamW")
    r: Rank = key(8, "rank of the update")
    lora_alpha: Count = key(16, "the update is scaled by lora_alpha / r")
    lora_dropout: Share = key(0.0, "dropout on the adapter's input")
    target_modules: list[Line] = key(
        [], "modules to adapt; empty: PEFT's default for the architecture, else all-linear"
    )


@dataclass(config=STRICT)
class Prefix(Tuning):
    """Method prefix, by PEFT."""

    learning_rate: Positive = key(1e-2, "peak learning rate of AdamW")
    num_virtual_tokens: Rank = key(20, "trained key/value positions before the prompt, in every layer")


@dataclass(config=STRICT)
class EarlyStopping:
    """When embed tuning stops because the ticket no longer changes."""

    overlap: Annotated[float, Field(gt=0, le=1)] = key(0.95, "minimum Jaccard overlap of consecutive tickets")
    draws: Count = key(3, "number of consecutive draws that must reach this overlap")


@dataclass(config=STRICT)
class Draw:
    """The KS test and the selection rule."""

    selection: Annotated[Line, _one_of(RULES, CERTIFIED)] = key(
        "alpha",
        f"how rows are chosen: {_rules_help()}, {CERTIFIED} (lottery only: the smallest of certify.alphas' tickets with a "
        "guarantee on text.valid)",
    )
    alpha: Alpha = key(0.05, "significance level of one token's test; a larger alpha gives a larger ticket")
    method: Literal["exact", "asymp"] = key(
        "exact", "p-value: exact, or scipy's asymptotic one (asymp), which replications of the paper use"
    )
    top_k: Count = key(18, f"rows taken by {', '.join(CONTROLS)}")
    every: Count | None = key(None, "also draw every so many steps of embed tuning, to see the ticket converge")
    early_stopping: EarlyStopping | None = key(
        None, "stop embed tuning when the ticket no longer changes, such as {overlap: 0.95, draws: 3}; needs draw.every"
    )


@dataclass(config=STRICT)
class Evaluation:
    """Translation of the test text and its scores."""

    batch_size: BatchSize = key(16, "prompts per rank and generate call")
    num_beams: Rank = key(1, "1 is greedy search; the paper reports 4")
    max_new_tokens: Count = key(256, "longest translation in tokens")
    tokenize: Line = key("13a", "sacrebleu tokenizer: 13a, intl, zh, char, none, or flores101 or flores200 for spBLEU")
    comet: Line | None = key(
        None, "also score with this COMET model: a Hub id or folder; needs the command comet-score (launch/README.md)"
    )
    gather_weights: bool = key(
        True, "ZeRO-3: gather the whole model on every rank for translation (fast); false: layer by layer (any size)"
    )


@dataclass(config=STRICT)
class Certify:
    """The certificate."""

    alphas: list[Alpha] = key(
        [0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999],
        "levels whose partial transfer is compared with the reference; a ticket adds its own",
    )
    comparison: Line | None = key(
        None, "folder of a finished `compare`: its partially tuned tickets, with the recipe's seed, are candidates too"
    )
    risk: Literal["tokens", "sentence", "lost_tokens", "chrf"] = key(
        "tokens",
        "what is certified, a number for every sentence of text.valid: the share of its tokens on which the top tokens of "
        "both models differ (tokens), whether any does (sentence), the share that only the reference predicts as the "
        "reference translation has them (lost_tokens), or how far its translation's chrF++ falls below that of the "
        "reference's, over 100 (chrf; generates)",
    )
    epsilon: Alpha = key(0.05, "the mean risk that a certified ticket does not exceed")
    confidence: Alpha = key(0.95, "with which probability no certificate of a run is false")


@dataclass(config=STRICT)
class Tracking:
    """wandb."""

    wandb: Literal["auto", "online", "offline", "off"] = key(
        "auto", "auto: online if there is an API key and a network, else offline"
    )
    project: Line = key("ksl_ds", "wandb project")
    entity: Line | None = key(None, "wandb user or team")
    name: Line | None = key(None, "wandb run name; empty: the run folder's name")
    tags: list[Tag] = key([], "tags of the wandb run")


@dataclass(config=STRICT)
class Compare:
    """What `compare` trains and tests."""

    methods: list[ComparedMethod] = key(
        [
            "untuned", "full", "embed", "transfer", "ticket", "frequency", "random", "shift_norm", "shift_ratio", "newline",
            "lora", "prefix",
        ],
        "what to compare: untuned, full, embed; transfer and ticket (rows with p < alpha, for each of compare.alphas); "
        f"controls with as many rows ({', '.join(CONTROLS)}), one row (newline, bos or first_prompt_token), lora, prefix",
    )  # fmt: skip
    alphas: list[Alpha] = key([0.05, 0.25, 0.5], "levels of the tickets")
    seeds: list[Seed] = key([0, 1], "every method is trained once per seed, which orders the same training text")
    rows: Count | None = key(
        None,
        "rows of a control; empty: the size of the same seed's ticket at draw.alpha, or draw.top_k if that ticket is empty",
    )


@dataclass(config=STRICT)
class Multilingual:
    """What `multilingual` repeats."""

    seeds: list[Seed] = key([0, 1], "every part is run once per seed, which orders the same training text")


@dataclass(config=STRICT)
class Checkpoint:
    """Checkpoints within a training run."""

    every: Count | None = key(
        None, "save a checkpoint every so many steps; empty: only when SIGTERM or SIGUSR1 stops the run"
    )
    keep_last: Count = key(2, "number of newest checkpoints to keep; all are deleted when their stage is complete")


# Old key names, which are still accepted, and their replacements.
RENAMED = {
    "training.clip": "training.max_grad_norm",
    "training.valid_every": "training.eval_every",
    "draw.stop_when_settled": "draw.early_stopping",
    "embed_tuning.warmup": "embed_tuning.warmup_ratio",
    "partial_tuning.warmup": "partial_tuning.warmup_ratio",
    "full_tuning.warmup": "full_tuning.warmup_ratio",
    "lora.warmup": "lora.warmup_ratio",
    "prefix.warmup": "prefix.warmup_ratio",
}

# What a run did that was recorded before a key existed, where that is not the key's default.
BEFORE_A_KEY = {"training.packing": "off"}

# Keys and sections that may change when a run is resumed, since training does not depend on them.
KEYS_THAT_MAY_CHANGE_ON_RESUME = (
    "run_dir", "resume", "verbose", "num_ranks", "timeout_minutes", "checkpoint", "tracking", "certify", "compare",
    "multilingual", "scan", "reference", "evaluation.batch_size", "evaluation.comet",
    "evaluation.gather_weights",
)  # fmt: skip


@dataclass(config=STRICT)
class Recipe:
    """A run of `lottery`, `tune`, `evaluate`, `compare`, `multilingual` or `certify`."""

    run_dir: Line = key(MISSING, "folder to create; all output is written there")
    resume: Literal["never", "auto"] = key(
        "never",
        "auto: resume the run in run_dir, if any, from its last complete stage or checkpoint (compare always does)",
    )
    seed: Seed = key(0, "of data order, dropout and controls")
    verbose: bool = key(False, "show the logs of DeepSpeed, transformers and wandb")
    deepspeed: Line = key("zero3.json", "DeepSpeed JSON: a path, or a name in ds_configs/")
    num_ranks: Count | None = key(None, "expected number of ranks; another number is an error (empty: any)")
    timeout_minutes: Amount = key(30.0, "the job ends when a rank has waited this long for another")
    model: Model = key(Model, "the model")
    text: Text = key(Text, "the parallel text")
    training: Training = key(Training, "settings of all training methods")
    embed_tuning: EmbedTuning = key(EmbedTuning, "method embed: the whole input embedding")
    draw: Draw = key(Draw, "the KS test and the selection rule")
    partial_tuning: PartialTuning = key(PartialTuning, "method ticket: the ticket's rows only")
    full_tuning: FullTuning = key(FullTuning, "method full: every parameter")
    lora: Lora = key(Lora, "method lora, by PEFT")
    prefix: Prefix = key(Prefix, "method prefix, by PEFT")
    evaluation: Evaluation = key(Evaluation, "translation and scores")
    certify: Certify = key(Certify, "the certificate")
    tracking: Tracking = key(Tracking, "wandb and metrics.jsonl")
    checkpoint: Checkpoint = key(Checkpoint, "checkpoints during training, for resume=auto")
    compare: Compare = key(Compare, "what `compare` trains and tests")
    multilingual: Multilingual = key(Multilingual, "what `multilingual` repeats")
    method: TunedMethod = key("embed", f"what `tune` trains: {', '.join(TUNED)}")
    scan: bool = key(
        False,
        "`tune`, `lottery` and `compare` scan what embed, full or LoRA tuning made of the model, at draw.alpha, into scan/ of "
        "its run folder",
    )
    ticket: Line | None = key(None, "ticket folder, for `tune method=ticket`, for `evaluate` and for `certify`")
    reference: Line | None = key(None, "folder of the embed-tuned model, for `certify`")

    @property
    def text_seed(self) -> int:
        """Seed of the shuffle before text.max_..._pairs are taken."""
        return self.seed if self.text.seed is None else self.text.seed


@dataclass(config=STRICT)
class DrawCommand:
    """`ksl-ds draw before=DIR after=DIR out=DIR`."""

    before: Line = key(MISSING, "model folder before tuning")
    after: Line = key(MISSING, "model folder after tuning")
    out: Line = key(MISSING, "ticket folder to create")
    selection: Selection = key("alpha", "as draw.selection in a recipe")
    alpha: Alpha = key(0.05, "significance level of one token's test")
    method: Literal["exact", "asymp"] = key("exact", "p-value: exact, or scipy's asymp")
    top_k: Count = key(18, "as draw.top_k in a recipe")
    seed: Seed = key(0, "of selection=random")
    embedding_scope: Literal["input", "shared"] = key("input", "recorded in the ticket: whether a tied head moves too")
    verbose: bool = key(False, "show the logs of libraries")


@dataclass(config=STRICT)
class ScanCommand:
    """`ksl-ds scan before=DIR after=DIR out=DIR`."""

    before: Line = key(MISSING, "model folder before tuning")
    after: Line = key(MISSING, "model folder after tuning, or the folder of a LoRA adapter, which is merged on the fly")
    out: Line = key(MISSING, "folder to create: results.json, scan.safetensors, report.html")
    alpha: Alpha = key(0.05, "significance level of one row's test")
    rows: Literal["output", "input"] = key(
        "output", "what a row of a matrix is: the weights of one output neuron, or those of one input"
    )
    verbose: bool = key(False, "show the logs of libraries")


@dataclass(config=STRICT)
class TransferCommand:
    """`ksl-ds transfer base=DIR ticket=DIR out=DIR`."""

    base: Line = key(MISSING, "model folder that the ticket was drawn on")
    ticket: Line = key(MISSING, "ticket folder")
    out: Line = key(MISSING, "model folder to create")
    force: bool = key(False, "apply the ticket even if the base model differs in these rows or was resized")
    verbose: bool = key(False, "show the logs of libraries")


@dataclass(config=STRICT)
class EstimateCommand:
    """`ksl-ds estimate MODEL gpus=N gpu_memory=GIB`."""

    model: Line = key(MISSING, "a built-in shape (llama-3-70b), config.json, model folder, Hub id, or a recipe")
    gpus: Count = key(1, "ranks, one a GPU")
    gpus_per_host: Count | None = key(None, "GPUs of a host; shows what travels between hosts; hpZ needs it")
    gpu_memory: Amount | None = key(None, "GiB of one GPU; empty: show sizes, not what fits")
    network: Amount | None = key(None, "Gbit/s per rank; shows the seconds of communication per step")
    rows: Count | None = key(None, "rows of the ticket; empty: the recipe's draw.top_k")
    length: Length | None = key(None, "tokens of every pair; empty: the recipe's text.max_length")
    response_length: Count | None = key(None, "response tokens among these; empty: half")
    shared_length: Count | None = key(
        None, "tokens that all prompts begin with, which a packed micro-batch computes once; empty: as if padded"
    )
    micro_batch_size: BatchSize | None = key(None, "pairs per rank and forward pass; empty: the recipe's")
    precision: Literal["bf16", "fp16", "fp32"] | None = key(None, "of weights and gradients; empty: the recipe's")
    deepspeed: Line | None = key(None, "DeepSpeed JSON; empty: the recipe's")
    embedding_scope: Literal["input", "shared"] | None = key(None, "of tied models; empty: the recipe's")
    verbose: bool = key(False, "show the logs of libraries")
