"""What is estimated, and what each method of it trains.

The model is built on the meta device, so that parameters are counted and not computed, and one training step of each method
is run there without data (model/dry_run.py); the rest is arithmetic (memory.py). The one thing
that is timed, on this machine, is the KS test of a few hundred rows.
"""

from __future__ import annotations

import copy
import inspect
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.methods import ADAPTERS
from ksl_ds.config.schema import EstimateCommand, Recipe
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import MethodCost, ModelDims, Zero
from ksl_ds.lottery.ticket import measure_shift
from ksl_ds.model.adapters import adapter_config, enable_checkpointing, with_adapter
from ksl_ds.model.dry_run import TooSlow, Unmeasured, meta_model, model_config, step_bytes
from ksl_ds.model.row_parameter import TicketRows
from ksl_ds.sharding.engine import TORCH_DTYPE, linear_of_stage, read_config
from ksl_ds.text.packing import Packing, packed_positions
from ksl_ds.text.prompt import Example


class Estimated(str, Enum):
    """What is estimated: the methods that train, a ticket's in each mode; the value is the label in tables."""

    FULL = "full"
    EMBED = "embed"
    TICKET_HOOKS = "ticket, hooks"
    TICKET_ROWS = "ticket, rows"
    LORA = "lora"
    PREFIX = "prefix"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def of(cls, recipe: Recipe) -> Estimated:
        """What a recipe's `method` is here."""
        if recipe.method == "ticket":
            return {"hooks": cls.TICKET_HOOKS, "rows": cls.TICKET_ROWS}[recipe.partial_tuning.mode]
        return cls(recipe.method)


RESERVED = 3 << 29  # 1.5 GiB of a GPU: CUDA's context, NCCL's buffers
TIMED_ROWS = 256


@dataclass
class Plan:
    """What is estimated: a model under a DeepSpeed configuration, and what one rank computes at once."""

    name: str
    config: Any  # transformers'
    recipe: Recipe
    zero: Zero
    response_length: int
    ticket_rows: int
    shared_length: int = 0  # tokens that all prompts begin with, which a packed row holds once
    too_slow: str = ""  # why no further dry run is tried

    def meta_model(self) -> Any:
        """A fresh model on the meta device, untied as `embedding_scope: input` has it."""
        untied = self.recipe.model.embedding_scope == "input"
        trust = self.recipe.model.trust_remote_code
        return meta_model(
            self.config, TORCH_DTYPE[self.recipe.training.precision], untied=untied, trust_remote_code=trust
        )

    def packed_positions(self, model: Any) -> int:
        """Positions of a micro-batch in one row; 0 where it is padded: training.packing, and what is less work."""
        training = self.recipe.training
        prompt_length = self.recipe.text.max_length - self.response_length
        shares = training.packing in ("auto", "prefix") and 0 < self.shared_length < prompt_length
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not shares or "position_ids" not in inspect.signature(base.forward).parameters:
            return 0
        width = model.get_input_embeddings().weight.shape[1] if training.packing == "auto" else 0
        beginning = [0] * self.shared_length
        pairs = [
            Example(beginning + [number] * (prompt_length - self.shared_length), [0] * self.response_length)
            for number in range(training.micro_batch_size)
        ]
        (indices,), packed = Packing("prefix", width).micro_batches(pairs, range(len(pairs)), 0, 1, len(pairs))
        return packed_positions([pairs[index] for index in indices], shares_prompt=True) if packed else 0

    def training(self) -> ModelDims:
        """The numbers of the recipe for the arithmetic."""
        vocab_size, width = self.meta_model().get_input_embeddings().weight.shape
        if self.ticket_rows > vocab_size:
            raise UserError(
                f"rows (or draw.top_k of the recipe) is {self.ticket_rows:,}, but the embedding has {vocab_size:,} rows"
            )
        return ModelDims(TORCH_DTYPE[self.recipe.training.precision].itemsize, vocab_size, width, reserved=RESERVED)

    def embedding(self) -> MethodCost:
        """Embed tuning without a dry run: what a draw costs follows from the embedding alone."""
        weight = self.meta_model().get_input_embeddings().weight
        return MethodCost(Estimated.EMBED, [weight.numel()], [], 0, snapshots=True)

    def method(self, name: Estimated, *, checkpointing: bool, dry_run: bool = True) -> MethodCost:
        """What method `name` trains, and the peak of its dry run. Raises UserError if the architecture does not support it."""
        model = self.meta_model()
        if checkpointing:
            enable_checkpointing(self.meta_model())  # a model of its own: the dry run switches without random states
        training = self.recipe.training
        linear = linear_of_stage(self.zero.stage)

        def passes() -> dict[str, Any]:
            if self.too_slow or not dry_run:
                return {"working": None, "unknown": self.too_slow}
            try:
                working = step_bytes(
                    model, training.micro_batch_size, self.recipe.text.max_length, self.response_length,
                    checkpointing=checkpointing, linear=linear,
                    packed_positions=0 if name is Estimated.PREFIX else self.packed_positions(model),
                )  # fmt: skip
            except Unmeasured as error:
                if isinstance(error, TooSlow):
                    self.too_slow = str(error)
                return {"working": None, "unknown": str(error)}
            return {"working": working}

        if name in ADAPTERS:
            recipe = copy.deepcopy(self.recipe)
            recipe.training.gradient_checkpointing = checkpointing
            model = with_adapter(model, adapter_config(self.config, recipe, name))
        elif name is not Estimated.FULL:
            model.requires_grad_(False)
        if name in (Estimated.EMBED, Estimated.TICKET_HOOKS):
            model.get_input_embeddings().weight.requires_grad_(True)
        if name is Estimated.TICKET_HOOKS:
            model.get_input_embeddings().weight.register_hook(torch.zeros_like)
        again = frozen_in_layers(model) if checkpointing and self.zero.stage == 3 else 0
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        frozen = [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
        if name is Estimated.TICKET_ROWS:
            width = model.get_input_embeddings().weight.shape[1]
            rows = TicketRows(model, torch.arange(self.ticket_rows), torch.empty(self.ticket_rows, width))
            method = MethodCost(name, [rows.delta_KD.numel()], frozen, **passes(), gathered_again=again)
            rows.remove()
            return method
        return MethodCost(name, trained, frozen, **passes(), snapshots=name is Estimated.EMBED, gathered_again=again)


def frozen_in_layers(model: Any) -> int:
    """Elements of the frozen matrices of all layers that checkpointing recomputes, without the last of each layer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    matrices = [[p.numel() for p in layer.parameters() if p.dim() > 1 and not p.requires_grad] for layer in layers]
    return sum(sum(numels[:-1]) for numels in matrices)


def plan_of(
    recipe: Recipe, response_length: int | None = None, ticket_rows: int | None = None, shared_length: int = 0
) -> Plan:
    """The plan of a recipe, whose `text.max_length` is the length of every pair. Raises UserError."""
    model = recipe.model
    config = model_config(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    length = recipe.text.max_length
    if response_length is not None and not 0 < response_length < length:
        raise UserError(f"response_length is {response_length}; it lies between 0 and length ({length}), both excluded")
    prompt_length = length - (response_length or length // 2)
    if shared_length and shared_length >= prompt_length:
        raise UserError(f"shared_length is {shared_length}; it lies below the length of a prompt, {prompt_length}")
    return Plan(
        model.path, config, recipe, Zero.of(read_config(recipe.deepspeed)), response_length or length // 2,
        ticket_rows or recipe.draw.top_k, shared_length,
    )  # fmt: skip


def recipe_of(command: EstimateCommand) -> Recipe:
    """A recipe with what the command says: the one given as `model`, or one of defaults."""
    words = {
        "deepspeed": command.deepspeed,
        "training.precision": command.precision,
        "training.micro_batch_size": command.micro_batch_size,
        "text.max_length": command.length,
        "model.embedding_scope": command.embedding_scope,
    }
    overrides = [f"{name}={value}" for name, value in words.items() if value is not None]
    if Path(command.model).suffix in (".yaml", ".yml"):
        return load_recipe(Recipe, command.model, [*overrides, "method=lora"])
    return load_recipe(Recipe, None, ["run_dir=unused", f"model.path={command.model}", *overrides, "method=lora"])


def seconds_of_a_row(width: int) -> float:
    """Time of the KS test of one changed row of so many coordinates, measured here."""
    generator = torch.Generator().manual_seed(0)
    before_RD = torch.randn(TIMED_ROWS, width, generator=generator).to(distributed.device())
    after_RD = before_RD + 0.1
    times = []
    for _ in range(3):  # the first one starts up the kernel
        started = time.perf_counter()
        measure_shift(before_RD, after_RD)
        times.append(time.perf_counter() - started)
    return min(times) / TIMED_ROWS
