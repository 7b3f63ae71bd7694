"""Decides how micro-batches are laid out, and proves it on the loaded model before anything is trained or measured.

A packed row is exact only where an architecture takes position ids and the mask as they are given. Many do not: ALiBi counts
distances in the row, state-space models carry their state over, some attention applies a window by distance in the row. So
the longest pairs of the text are computed in one row, some of them padded as well, and every token's loss is compared.
Rows longer than that one are never packed.

Legend: N response tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ksl_ds import distributed
from ksl_ds.errors import UserError
from ksl_ds.sharding.partition import full_shape, is_partitioned
from ksl_ds.text.packing import MAX_POSITIONS, Layout, Packing, packed_positions
from ksl_ds.text.prompt import Example
from ksl_ds.training.loss import can_keep_logits, forward_parameters, response_logits
from ksl_ds.training.run import RunContext

logger = logging.getLogger(__name__)

# Largest and mean difference of a token's loss, divided by 1 + loss. Rounding of SmolLM2-135M: 6e-6 and 1e-6 in float32, 0.12
# and 0.009 in bfloat16; with wrong positions it is 5 and 0.3.
ROUNDING = {torch.float32: (2e-4, 2e-5), torch.float16: (0.25, 0.03), torch.bfloat16: (0.5, 0.06)}


def packing_of(run: RunContext, forward: Callable[..., Any]) -> Packing:
    """How the micro-batches of the run's model are laid out: `training.packing`, as far as the model computes it exactly.

    Parameters
    ----------
    run
        Its model is proved once; its texts are what the rows of the proof are made of.
    forward
        The model as it is called now: itself or the engine around it. Calls are collective.

    Raises
    ------
    UserError
        Where the recipe names a layout that the model does not compute exactly.
    """
    if run.proved is None or run.proved[0] is not run.model:
        run.proved = run.model, _choose(run, forward)
    return run.proved[1]


def _choose(run: RunContext, forward: Callable[..., Any]) -> Packing:
    asked = run.recipe.training.packing
    if asked == "off":
        return Packing()
    model = run.model
    size = max(run.recipe.training.micro_batch_size, run.recipe.evaluation.batch_size)
    examples = sorted(chain.from_iterable(run.examples.values()), key=len, reverse=True)[:size]
    dtype = next(model.parameters()).dtype
    layouts: tuple[Layout, ...] = ("prefix", "sequences") if asked == "auto" else (asked,)
    problems: list[str] = []
    for layout in layouts:
        shares = layout == "prefix"
        while len(examples) > 1 and packed_positions(examples, shares_prompt=shares) > MAX_POSITIONS:
            examples.pop()
        width = full_shape(model.get_input_embeddings().weight)[-1] if asked == "auto" else 0
        packing = Packing(layout, width, packed_positions(examples, shares_prompt=shares), dtype)
        problem = _known_problem(model, examples, layout) or _difference(forward, model, packing, examples, run.pad_id)
        # One answer for all ranks, though their roundings may differ.
        problem = next((some for some in distributed.gather_objects(problem) if some), "")
        if not problem:
            return packing
        problems.append(problem)
    if asked != "auto":
        raise UserError(
            f"training.packing={asked} does not work with {run.recipe.model.path}: {problems[0]}; use training.packing=auto "
            "or off"
        )
    logger.info(f"micro-batches are padded, not packed: {problems[0]}")
    return Packing()


def _known_problem(model: Any, examples: list[Example], layout: Layout) -> str:
    """Why a layout cannot be exact, as far as the model's code and config tell."""
    if "position_ids" not in forward_parameters(model):
        return f"the code of {model.config.model_type} takes no position_ids"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "prefix tuning by PEFT takes no position_ids"
    if layout == "prefix":
        if "flash" in (model.config._attn_implementation or ""):
            return "flash attention takes no mask of its own"
        config = model.config.get_text_config(decoder=True)
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(config, name, None)
            if window and getattr(config, "use_sliding_window", True) and len(examples[0]) > window:
                return f"pairs have up to {len(examples[0])} tokens, more than the model's {name} of {window}"
    return ""


@torch.no_grad()
def _difference(forward: Callable[..., Any], model: Any, packing: Packing, examples: list[Example], pad_id: int) -> str:
    """How far the losses of tokens in a packed row are from those of padded pairs; empty where it is rounding."""
    keeps_logits = can_keep_logits(model)
    # The longest pair, and those farthest from the beginning of the row.
    compared = sorted({0, *range(len(examples))[-3:]})
    was_training = model.training
    model.eval()

    def losses(some: list[Example], *, packed: bool) -> list[Tensor]:
        logits_NV, targets_N = response_logits(forward, packing.collate(some, pad_id, packed=packed), keeps_logits)
        nll_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        return list(nll_N.split([len(example.response_ids) for example in some]))

    padded_N = torch.cat(losses([examples[index] for index in compared], packed=False))
    try:
        of_pairs = losses(examples, packed=True)
    except Exception as error:  # the architecture's code, on inputs that it may not know
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            raise UserError(
                f"a packed micro-batch does not run in {model.config.model_type}: {error}; use training.packing=off"
            ) from None
        return f"a packed micro-batch does not run in {model.config.model_type}: {type(error).__name__}"
    finally:
        model.train(was_training)
    packed_N = torch.cat([of_pairs[index] for index in compared])
    difference_N = (packed_N - padded_N).abs() / (1 + padded_N)
    largest, mean = ROUNDING[packing.dtype]
    if difference_N.max() <= largest and difference_N.mean() <= mean:
        return ""
    return f"losses of tokens differ by up to {float((packed_N - padded_N).abs().max()):.1g} from those of padded pairs"
