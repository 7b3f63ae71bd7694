"""The stages of the method, each one training run on an open run. `lottery` chains them, `tune` runs one.

A stage is complete when results.json has it; its files are then complete too, and a resumed run skips it. A stage that was
interrupted before continues from its last checkpoint and writes its files again.

Legend: V tokens, D coordinates, R rows of this rank, K ticket rows.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.config.methods import METHODS, TUNING_SECTIONS, Stage
from ksl_ds.config.schema import CERTIFIED, Draw, Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import reason, write_text
from ksl_ds.lottery.shift import load_shift, save_shift
from ksl_ds.lottery.ticket import Shift, Ticket, make_ticket
from ksl_ds.lottery.ticket_files import CARD
from ksl_ds.model.adapters import ALL_LINEAR, save_adapter, target_modules, with_adapter
from ksl_ds.model.folder import token_strings
from ksl_ds.model.published import check_tokenizer_is_llama1, published_ids
from ksl_ds.model.row_hooks import TrainedRows, train_only_rows
from ksl_ds.model.row_parameter import TicketRows
from ksl_ds.report.card import licence_of, ticket_card
from ksl_ds.report.tables import rows_of_ticket
from ksl_ds.sharding.draw import DrawMonitor, draw_from_shard, ids_of_draw
from ksl_ds.sharding.partition import full_numel
from ksl_ds.sharding.rows import RowShard
from ksl_ds.text.directions import directions_of
from ksl_ds.training.evaluation import evaluate_stage
from ksl_ds.training.loop import train
from ksl_ds.training.run import RunContext
from ksl_ds.training.saving import save_embedding, save_model

logger = logging.getLogger(__name__)

DRAW_FILE = "draw.safetensors"
CERTIFIED_TICKET = "certified_ticket"  # folder of a run


def draw_of(recipe: Recipe) -> Draw:
    """What embed tuning draws; for the rule `certified` the largest candidate."""
    if recipe.draw.selection != CERTIFIED:
        return recipe.draw
    return replace(recipe.draw, selection="alpha", alpha=max(recipe.certify.alphas))


def tune_embedding(run: RunContext, shard: RowShard, before_RD: Tensor) -> tuple[Shift, Ticket]:
    """Embed tuning: the whole input embedding trains, all else is frozen.

    Returns what the KS test against `before_RD`, this rank's rows before, found, and the ticket, possibly an empty one. They
    are drawn from the fp32 master weights, hence while the engine lives. Leaves, in `checkpoints/`, the tuned model
    (`embed_tuning`), the test of all tokens (`draw.safetensors`) and a ticket that is not empty (`partial_transfer`); and
    the tuned weights in the model, unless the stage was done before.
    """
    embedding = run.model.get_input_embeddings().weight
    recipe = run.recipe
    checkpoints = run.dir / "checkpoints"
    if Stage.EMBED_TUNING in run.stages:
        return load_draw(run, shard)
    frequency_V = token_frequency(run)

    def at_end() -> tuple[Shift, Ticket]:
        save_embedding(run, shard, checkpoints / Stage.EMBED_TUNING)
        shift, ticket = draw_from_shard(
            shard,
            before_RD,
            draw_of(recipe),
            seed=recipe.seed,
            frequency_V=frequency_V,
            tokens=token_strings(run.tokenizer, range(shard.num_rows)),
            embedding_scope=recipe.model.embedding_scope,
            source={"stage": Stage.EMBED_TUNING, "base": recipe.model.path},
        )
        distributed.run_on_rank0(lambda: save_shift(shift, checkpoints / DRAW_FILE))
        if ticket.token_ids:
            save_ticket(run, ticket, checkpoints / Stage.PARTIAL_TRANSFER)
        return shift, ticket

    distributed.reset_peak_memory()
    outcome, drawn = train(
        run,
        [embedding],
        stage=Stage.EMBED_TUNING,
        tuning=recipe.embed_tuning,
        at_end=at_end,
        monitor=DrawMonitor(shard, before_RD, draw_of(recipe), seed=recipe.seed, frequency_V=frequency_V),
    )
    if outcome.settled:
        logger.info(
            f"embed tuning ended after {outcome.steps} of {outcome.planned_steps} steps: the ticket had settled"
        )
    evaluate_stage(
        run,
        Stage.EMBED_TUNING,
        trained_parameters=full_numel(embedding),
        outcome=outcome,
        tuned=checkpoints / Stage.EMBED_TUNING,
    )
    return drawn


def tune_ticket(run: RunContext, shard: RowShard, ticket: Ticket) -> None:
    """Partial tuning: the ticket's rows alone train, from the base weights, which the model holds.

    Leaves the tuned rows in the model and, as a ticket, in `ticket/`.
    """
    if Stage.PARTIAL_TUNING in run.stages:
        return
    tuning = run.recipe.partial_tuning
    ids_K = torch.tensor(ticket.token_ids)
    base_KD = shard.read_rows(ids_K)
    trained_rows: TicketRows | TrainedRows
    distributed.reset_peak_memory()
    if tuning.mode == "rows":
        trained_rows = ticket_rows = TicketRows(run.model, ids_K, base_KD)
        parameters = [ticket_rows.delta_KD]

        def tuned_rows() -> Tensor:
            return ticket_rows.moved(RowShard(ticket_rows.delta_KD).read_rows(torch.arange(len(ids_K))))
    else:
        trained_rows = train_only_rows(run.model, ids_K, base_KD)
        ticket_rows = None
        parameters = [run.model.get_input_embeddings().weight]

        def tuned_rows() -> Tensor:
            return shard.read_rows(ids_K)

    try:
        outcome, rows_KD = train(
            run,
            parameters,
            stage=Stage.PARTIAL_TUNING,
            tuning=tuning,
            at_end=tuned_rows,
            ticket_rows=ticket_rows,
        )
    finally:
        trained_rows.remove()
    if tuning.mode == "rows":
        shard.write_rows(ids_K, rows_KD)
    tuned = ticket.with_rows(rows_KD, stage=Stage.PARTIAL_TUNING, steps=outcome.steps)
    save_ticket(run, tuned, run.dir / "ticket")
    evaluate_stage(
        run, Stage.PARTIAL_TUNING, trained_parameters=rows_KD.numel(), outcome=outcome, tuned=run.dir / "ticket"
    )
    card = card_of(run, tuned, Stage.PARTIAL_TUNING)
    distributed.run_on_rank0(lambda: write_text(run.dir / "ticket" / CARD, card))
    metadata = {
        "base": run.recipe.model.path,
        "direction": _translates(run),
        "selection": tuned.selection,
        "alpha": tuned.alpha,
        "rows": len(tuned),
    }
    run.tracker.ticket(run.dir / "ticket", rows_of_ticket(tuned), metadata)


def tune_all(run: RunContext) -> None:
    """Full tuning: every parameter trains. Leaves a model folder in `checkpoints/full_tuning`."""
    if Stage.FULL_TUNING in run.stages:
        return
    parameters = list(run.model.parameters())
    out = run.dir / "checkpoints" / Stage.FULL_TUNING
    with distributed.raise_on_all_ranks():
        run.folder.file_groups(name for name, _ in run.model.named_parameters())  # can what it trains be written?
    distributed.reset_peak_memory()
    outcome, _ = train(
        run,
        parameters,
        stage=Stage.FULL_TUNING,
        tuning=run.recipe.full_tuning,
        at_end=lambda: save_model(run, out),
    )
    evaluate_stage(
        run, Stage.FULL_TUNING, trained_parameters=sum(map(full_numel, parameters)), outcome=outcome, tuned=out
    )


def tune_adapter(run: RunContext) -> None:
    """LoRA or prefix tuning by PEFT. Leaves PEFT's adapter folder in `checkpoints/`."""
    recipe = run.recipe
    stage = METHODS[recipe.method].stage
    if stage in run.stages:
        return
    torch.manual_seed(recipe.seed)  # of the adapter's first values, the same on every rank
    with distributed.raise_on_all_ranks():
        run.model = with_adapter(run.model, run.adapter)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    trained_parameters = sum(map(full_numel, parameters))
    out = run.dir / "checkpoints" / stage
    if stage is Stage.LORA:
        adapted = target_modules(run.model)
        run.results.target_modules = adapted
        if run.adapter.target_modules == ALL_LINEAR:
            logger.info(
                f"lora: PEFT has no default modules for this architecture; all linear layers: {', '.join(adapted)}"
            )
    distributed.reset_peak_memory()
    outcome, _ = train(
        run,
        parameters,
        stage=stage,
        tuning=getattr(recipe, TUNING_SECTIONS[stage]),
        at_end=lambda: save_adapter(run.model, out),
    )
    evaluate_stage(run, stage, trained_parameters=trained_parameters, outcome=outcome, tuned=out)


def transfer_ticket(run: RunContext, shard: RowShard, ticket: Ticket, folder: Path) -> None:
    """Partial transfer: the ticket's rows in the base model, which the model holds; nothing trains.

    Leaves the rows in the model. `folder` is where the ticket lies.
    """
    shard.write_rows(torch.tensor(ticket.token_ids), ticket.rows_KD)
    evaluate_stage(run, Stage.PARTIAL_TRANSFER, trained_parameters=ticket.rows_KD.numel(), tuned=folder)
    card = card_of(run, ticket, Stage.PARTIAL_TRANSFER)
    distributed.run_on_rank0(lambda: write_text(folder / CARD, card))


def run_stage(run: RunContext, stage: Stage, shard: RowShard, ticket: Ticket | None = None) -> None:
    """Trains, saves and scores one stage. The model must hold the base weights. Completed stages are skipped.

    Parameters
    ----------
    run
        The open run, which holds the model.
    stage
        The stage to run.
    shard
        This rank's rows of the input embedding.
    ticket
        For partial transfer (the one in the run's `ticket/`) and partial tuning.
    """
    if stage is Stage.UNTUNED:
        evaluate_stage(run, stage, trained_parameters=0)
    elif stage is Stage.EMBED_TUNING:
        tune_embedding(run, shard, shard.read())
    elif stage is Stage.FULL_TUNING:
        tune_all(run)
    elif stage in (Stage.LORA, Stage.PREFIX_TUNING):
        tune_adapter(run)
    elif ticket is None:
        raise ValueError(f"{stage} needs a ticket")
    elif stage is Stage.PARTIAL_TRANSFER:
        transfer_ticket(run, shard, ticket, run.dir / "ticket")
    else:
        tune_ticket(run, shard, ticket)


def load_draw(run: RunContext, shard: RowShard) -> tuple[Shift, Ticket]:
    """What an embed tuning that is done has left: the test of all tokens, and the ticket drawn from it."""
    recipe = run.recipe
    draw = draw_of(recipe)
    checkpoints = run.dir / "checkpoints"
    with distributed.raise_on_all_ranks():
        shift = load_shift(checkpoints / DRAW_FILE)
        if (len(shift.count_V), shift.num_samples) != (shard.num_rows, shard.row_length):
            raise UserError(f"{checkpoints / DRAW_FILE} is of another model; choose another run_dir")
        ids_K = ids_of_draw(shift, draw, seed=recipe.seed, frequency_V=token_frequency(run))
    if len(ids_K):
        ticket = load_ticket(run, shard, str(checkpoints / Stage.PARTIAL_TRANSFER))
        if ticket.token_ids != ids_K.tolist():
            raise UserError(
                f"{checkpoints / 'partial_transfer'} is not the ticket that {checkpoints / DRAW_FILE} selects; restore "
                "both, or choose another run_dir"
            )
        return shift, ticket
    empty_KD = torch.empty(0, shard.row_length)
    return shift, make_ticket(
        shift, ids_K, empty_KD, empty_KD, selection=draw.selection, alpha=draw.alpha, method=draw.method
    )


def load_ticket(run: RunContext, shard: RowShard, path: str) -> Ticket:
    """A ticket folder, or `published:en-ca`, checked against the run's model on every rank."""
    name, is_published, direction = path.partition("published:")
    if is_published and not name:
        return published_ticket(run, shard, direction)
    with distributed.raise_on_all_ranks():
        try:
            ticket = Ticket.load(path)
            ticket.check_shape(shard.num_rows, shard.row_length)
        except (OSError, ValueError) as error:
            raise UserError(f"ticket {path}: {error}") from None
    weight = run.model.get_input_embeddings().weight
    base_KD = shard.read_rows(torch.tensor(ticket.token_ids)).to(weight.dtype)
    with distributed.raise_on_all_ranks():
        try:
            ticket.check_base(base_KD, token_strings(run.tokenizer, ticket.token_ids))
        except ValueError as error:
            raise UserError(f"ticket {path}: {error}") from None
    return ticket


def score_ticket(run: RunContext, path: str) -> None:
    """Scores the base model with the rows of a ticket, as they are. Collective."""
    shard = RowShard(run.model.get_input_embeddings().weight)
    ticket = load_ticket(run, shard, path)
    shard.write_rows(torch.tensor(ticket.token_ids), ticket.rows_KD)
    evaluate_stage(run, Stage.TICKET, trained_parameters=ticket.rows_KD.numel())


def published_ticket(run: RunContext, shard: RowShard, direction: str) -> Ticket:
    """A published choice of rows with the base model's values, to be trained. Nothing was tested: every k is 0."""
    with distributed.raise_on_all_ranks():
        ids = published_ids(direction)
        check_tokenizer_is_llama1(run.tokenizer)
    source = {"stage": "published", "direction": direction}
    return untested_ticket(run, shard, ids, selection=f"published:{direction}", source=source)


def untested_ticket(
    run: RunContext, shard: RowShard, ids: list[int], *, selection: str, source: dict[str, Any]
) -> Ticket:
    """Given rows with the base model's values. Every k is 0: no test chose them."""
    untested_V = torch.zeros(shard.num_rows)
    base_KD = shard.read_rows(torch.tensor(ids)).to(shard.dtype)
    return make_ticket(
        Shift(untested_V.int(), untested_V, untested_V, shard.row_length, "untested"),
        torch.tensor(ids),
        base_KD,
        base_KD,
        selection=selection,
        alpha=0.05,
        method="asymp",
        tokens=token_strings(run.tokenizer, ids),
        embedding_scope=run.recipe.model.embedding_scope,
        source=source,
    )


def card_of(run: RunContext, ticket: Ticket, stage: Stage | None = None) -> str:
    """The model card of a ticket, with the scores of `stage` beside untuned and copying."""
    shown = (Stage.COPYING_SOURCE, Stage.UNTUNED, stage)
    stages = {name: scores for name, scores in {**run.results.baselines, **run.stages}.items() if name in shown}
    return ticket_card(
        ticket,
        base_model=run.recipe.model.path,
        licence=licence_of(run.folder.path),
        translates=_translates(run),
        languages=list(dict.fromkeys(code for one in directions_of(run.recipe.text) for code in one.codes)),
        stages=stages,
        seed=run.recipe.seed,
        environment=run.results.environment,
    )


def _translates(run: RunContext) -> str:
    """Such as "English to French"."""
    directions = directions_of(run.recipe.text)
    return ", ".join(f"{one.text.source_language} to {one.text.target_language}" for one in directions)


def save_ticket(run: RunContext, ticket: Ticket, out: Path) -> None:
    """Writes a ticket folder with its model card from rank 0."""
    shared_head = run.folder.head_module if run.folder.tied and ticket.embedding_scope == "shared" else None
    with distributed.raise_on_all_ranks():
        if distributed.is_rank0():
            try:
                out.parent.mkdir(exist_ok=True)
                base_model = run.recipe.model.path
                card = card_of(run, ticket)
                ticket.save(out, run.folder.embedding_module, shared_head, base_model=base_model, card=card)
            except (OSError, ValueError) as error:
                raise UserError(f"{out} could not be written: {reason(error)}") from None


def token_frequency(run: RunContext) -> Tensor:
    """How often each token occurs in the training text, prompts included: int64 (V,)."""
    ids = [number for example in run.examples["train"] for number in example.prompt_ids + example.response_ids]
    return torch.bincount(torch.tensor(ids), minlength=run.folder.shape(run.folder.embedding_name)[0])
