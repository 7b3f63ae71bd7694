"""Draws and new tokens in other trainers: Hugging Face Trainer and what derives from it, such as TRL's SFTTrainer.

Legend: V tokens, D coordinates, R rows of this rank, K chosen rows.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ksl_ds import distributed
from ksl_ds.config.load import explain
from ksl_ds.config.schema import Draw, EarlyStopping
from ksl_ds.errors import UserError
from ksl_ds.files import atomic_folder, write_json
from ksl_ds.lottery.pvalues import PValueMethod
from ksl_ds.lottery.ticket import explain_empty
from ksl_ds.lottery.ticket_files import ADAPTER_CONFIG, ADAPTER_MODEL
from ksl_ds.model.embeddings import embedding_of, head_of, is_dtensor, unwrapped
from ksl_ds.model.folder import open_model, token_strings
from ksl_ds.sharding.draw import DrawMonitor, draw_from_shard
from ksl_ds.sharding.rows import RowShard

__all__ = ["DrawCallback", "add_tokens", "save_token_adapter"]

logger = logging.getLogger(__name__)

LOGGED = ("ticket_size", "ticket_overlap", "largest_statistic")


class DrawCallback(TrainerCallback):
    """Draws tickets while a Trainer trains the input embedding, and writes the last one.

    Every draw is logged by the trainer itself (`state.log_history`, wandb, TensorBoard): the ticket's size, its Jaccard
    overlap with the draw before, and the largest D. Under DeepSpeed's ZeRO the embedding stays sharded. Weights are only read.

    Parameters
    ----------
    every : int
        Optimizer steps between two draws.
    alpha : float
        Level of one token's test, in (0, 1).
    method : {'exact', 'asymp'}
        How p-values are computed.
    out : path, optional
        Ticket folder to write when training ends: an adapter of PEFT's, as `ksl-ds draw` leaves it.
    base : path or Hub id, optional
        The model before training. Default: the trained model as it is when training begins; when a training is resumed from a
        checkpoint, the model's own `config._name_or_path`.
    stop_overlap : float, optional
        Ends the training once that many draws in a row overlap by at least this much with the one before.
    stop_draws : int
        How many draws in a row `stop_overlap` takes.

    Raises
    ------
    ValueError
        For an argument out of its range; when training begins, for an embedding under FSDP or tensor parallelism, or one that
        does not train.
    UserError
        For a base that is another model, or NaN in a row.

    Examples
    --------
    ::

        trainer = Trainer(model, args, train_dataset=text, callbacks=[DrawCallback(every=50, alpha=0.05, out="ticket")])
    """

    def __init__(
        self,
        *,
        every: int = 50,
        alpha: float = 0.05,
        method: PValueMethod = "exact",
        out: str | Path | None = None,
        base: str | Path | None = None,
        stop_overlap: float | None = None,
        stop_draws: int = 3,
    ):
        settles = None
        if stop_overlap is not None:
            settles = _checked(EarlyStopping, "stop_", overlap=stop_overlap, draws=stop_draws)
        self._draw = _checked(Draw, alpha=alpha, method=method, every=every, early_stopping=settles)
        self._out = None if out is None else Path(out)
        self._base = base

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Copies this rank's rows of the embedding."""
        self._model = unwrapped(others["model"])
        self._tokenizer = others.get("processing_class")
        self._seed = args.seed
        self._embedding = embedding_of(self._model)
        weight: Any = self._embedding._parameters["weight"]
        if is_dtensor(weight):
            raise ValueError("DrawCallback does not support FSDP and tensor parallelism; use DeepSpeed's ZeRO or DDP")
        if not weight.requires_grad:
            raise ValueError("DrawCallback: the input embedding is frozen, so no row of it will shift")
        self._shard = RowShard(weight)
        self._before_RD = self._rows_before(resumed=state.global_step > 0)
        self._monitor = DrawMonitor(self._shard, self._before_RD, self._draw, seed=self._seed, frequency_V=None)
        self._trainer = _trainer_of(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Draws, logs, and ends the training where the ticket has settled."""
        numbers, settled = self._monitor(state.global_step)
        if numbers:
            self._trainer.log({name: numbers[name] for name in LOGGED})
        if settled:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Draws a last time and writes the ticket."""
        if self._out is None:
            return
        head = _own_head(self._model)
        tied = head is not None and head._parameters.get("weight") is self._embedding._parameters["weight"]
        everything = range(self._shard.num_rows)
        shift, ticket = draw_from_shard(
            self._shard,
            self._before_RD,
            self._draw,
            seed=self._seed,
            frequency_V=None,
            tokens=token_strings(self._tokenizer, everything) if self._tokenizer is not None else None,
            embedding_scope="shared" if tied else "input",
            source={"stage": "trainer", "steps": state.global_step},
        )
        if not ticket.token_ids:
            logger.warning("%s; no ticket is written", explain_empty(shift, self._draw.alpha, self._draw.method))
            return
        base = self._base or getattr(self._model.config, "_name_or_path", None) or None
        names = [
            _name_of(self._model, self._embedding),
            _name_of(self._model, head) if head is not None and tied else None,
        ]
        out = self._out
        distributed.run_on_rank0(
            lambda: ticket.save(out, str(names[0]), names[1], base_model=None if base is None else str(base))
        )

    def _rows_before(self, *, resumed: bool) -> Tensor:
        if self._base is None and not resumed:
            return self._shard.read()
        path = self._base or getattr(self._model.config, "_name_or_path", None)
        if not path:
            raise UserError(
                "DrawCallback: a resumed training has lost the rows before it; give base=, the model's folder"
            )
        with distributed.raise_on_all_ranks():
            folder = open_model(path)
            shape = (self._shard.num_rows, self._shard.row_length)
            if folder.shape(folder.embedding_name) != shape:
                raise UserError(
                    f"DrawCallback: the embedding of base {path} is not {shape[0]:,} x {shape[1]:,}, as trained"
                )
            return folder.read_rows(folder.embedding_name, self._shard.start, self._shard.stop).float()


def add_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[str], *, pad_to_multiple_of: int | None = None
) -> list[int]:
    """Adds tokens to a tokenizer and rows for them to a model; each starts as the mean of the pieces that it replaces.

    Their rows alone are then trained by `train_only_rows(model, ids, head=True)`.

    Parameters
    ----------
    model : transformers model
        Whole in memory: before DeepSpeed, DDP or an adapter.
    tokenizer : transformers tokenizer
        Its own.
    tokens : sequence of str
        None of them in the vocabulary.
    pad_to_multiple_of : int, optional
        The number of rows is rounded up to such a multiple, 64 say, for the speed of the output head.

    Returns
    -------
    list of int
        Their ids, in order.

    Raises
    ------
    ValueError
        For no token, one that comes twice, or one that is in the vocabulary.
    """
    tokens = list(tokens)
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if not tokens or known or len(set(tokens)) < len(tokens):
        reason = f"{known[0]!r} is in the vocabulary" if known else "name at least one, none twice"
        raise ValueError(f"add_tokens: {reason}")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    resizable: Any = model
    rows = max(len(tokenizer), resizable.get_input_embeddings().weight.shape[0])
    resizable.resize_token_embeddings(rows, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    with torch.no_grad():
        for weight_VD in {id(weight): weight for weight in _weights_with_rows(resizable)}.values():
            for number, replaced in zip(ids, pieces, strict=True):
                weight_VD[number] = weight_VD[replaced or slice(0, min(ids))].float().mean(dim=0).to(weight_VD)
    return ids


def save_token_adapter(model: nn.Module, ids: Sequence[int], folder: str | Path, base_model: str | None = None) -> None:
    """Writes some rows of a model's embedding, and of an output head of its own, as an adapter that PEFT loads. Collective.

    The model that loads it must have rows for these ids: `model.resize_token_embeddings(len(tokenizer))` first.

    Parameters
    ----------
    model : transformers model
        Plain, or under DeepSpeed's ZeRO.
    ids : sequence of int
        Rows to save.
    folder : path
        To create, or an adapter's, which is replaced.
    base_model : str, optional
        Recorded as the adapter's base model.

    Raises
    ------
    ValueError
        For an output head with a bias, which such an adapter cannot hold.
    """
    plain = unwrapped(model)
    ids_K = torch.tensor(sorted(set(ids)))
    modules = [embedding_of(plain)]
    head = _own_head(plain)
    if head is not None:
        if head._parameters.get("bias") is not None:
            raise ValueError(
                "save_token_adapter: PEFT's adapter of tokens cannot hold the bias of an output head; save the model"
            )
        modules.append(head)
    names = [_name_of(plain, module) for module in modules]
    tied = len({id(module._parameters["weight"]) for module in modules}) < len(modules)
    rows = {
        f"base_model.model.{name}.trainable_tokens_delta": RowShard(module._parameters["weight"]).read_rows(ids_K)  # type: ignore[arg-type]
        for name, module in zip(names, modules, strict=True)
    }
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": names[:1] if tied else names,  # PEFT finds a tied head by itself
        "token_indices": ids_K.tolist(),
        "init_weights": True,
        "inference_mode": True,
    }

    def write() -> None:
        with atomic_folder(Path(folder)) as draft:
            (draft / ADAPTER_MODEL).write_bytes(safetensors.torch.save(rows, metadata={"format": "pt"}))
            write_json(draft / ADAPTER_CONFIG, config)

    distributed.run_on_rank0(write)


def _checked(section: Any, prefix: str = "", **values: Any) -> Any:
    """A section of the recipe from arguments, which are named as its keys after `prefix`."""
    try:
        return section(**values)
    except ValidationError as error:
        raise ValueError(f"DrawCallback: {prefix}{explain(error.errors()[0], section)}") from None


def _trainer_of(callback: TrainerCallback) -> Trainer:
    """The trainer that a callback was given to: transformers tells callbacks everything else."""
    # By type(): some objects have a false __class__, or raise when it is read.
    trainers = [thing for thing in gc.get_objects() if issubclass(type(thing), Trainer)]
    return next(trainer for trainer in trainers if callback in trainer.callback_handler.callbacks)


def _own_head(model: nn.Module) -> nn.Module | None:
    """The output head of a causal language model; None for a model without one."""
    return head_of(model) if getattr(model, "get_output_embeddings", lambda: None)() is not None else None


def _weights_with_rows(model: nn.Module) -> list[nn.Parameter]:
    modules = [embedding_of(model), _own_head(model)]
    return [module._parameters["weight"] for module in modules if module is not None]  # type: ignore[misc]


def _name_of(model: nn.Module, module: nn.Module) -> str:
    """A module's name in the model that PEFT would wrap."""
    name = next(name for name, found in model.named_modules() if found is module)
    return name.removeprefix("base_model.model.")
