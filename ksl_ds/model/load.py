"""Loads a causal language model under ZeRO and verifies that the weights are the checkpoint's.

Under stage 3 transformers builds the model inside `zero.Init`: each layer is partitioned when it is created. Its own loading
would read the checkpoint on rank 0 and send every weight whole to every rank. Here each rank reads its own part of each
weight instead: all ranks together read the checkpoint once, each host its ranks' share, and no values are sent (DeepSpeed
sends every weight once, empty, when it builds the model). Only what loading fuses, such as experts, still goes by rank 0,
and only rank 0 reads it. Some library versions silently left weights random, so sums of the values that were read are
compared with those of the weights that the model ends with.

In stages 0 to 2 every rank holds the whole model and reads all of it, through the page cache; then every rank compares an even
share with the files, bit for bit.

Legend: D coordinates of an embedding row; tensors here are flat unless named otherwise.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ksl_ds import distributed
from ksl_ds.config.schema import Model, Recipe
from ksl_ds.errors import UserError
from ksl_ds.model.adapters import enable_checkpointing
from ksl_ds.model.folder import ModelFolder, local_folder, open_model
from ksl_ds.sharding.eight_bits import round_trip, scale_of
from ksl_ds.sharding.engine import TORCH_DTYPE, forget_host_groups, stage_of
from ksl_ds.sharding.partition import (
    drop_host_copy,
    full_shape,
    host_part,
    is_partitioned,
    is_rounded,
    local_part,
    stored_weight,
)
from ksl_ds.sharding.rounding import for_deepspeed

logger = logging.getLogger(__name__)

WORDS_AT_ONCE = 1 << 16


def open_folder(recipe: Model) -> ModelFolder:
    """The model's folder on this host; a Hub model is downloaded once per host. Collective."""
    with distributed.raise_on_all_ranks():
        if distributed.is_local_rank0():
            local_folder(recipe.path, recipe.revision)
    if recipe.trust_remote_code:
        logger.info(f"model.trust_remote_code: running Python code from {recipe.path}")
    with distributed.raise_on_all_ranks():
        return open_model(recipe.path, recipe.revision, trust_remote_code=recipe.trust_remote_code)


def load_model(recipe: Recipe, folder: ModelFolder, config: dict[str, Any]) -> nn.Module:
    """Loads the recipe's model, partitioned by the DeepSpeed `config`, and verifies its weights. Collective.

    With `embedding_scope: input` a tied model is untied: its head becomes a frozen copy of the embedding.

    Raises
    ------
    UserError
        On every rank, if weights are missing from the checkpoint or differ from it after loading.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.integrations import HfDeepSpeedConfig

    forget_host_groups()
    # transformers keeps a weak reference to this configuration: it must live until the model is built.
    zero_config = HfDeepSpeedConfig(for_deepspeed(config))
    model_config = copy.deepcopy(folder.config)
    untie = folder.tied and recipe.model.embedding_scope == "input"
    if untie or (folder.config_ties and not folder.tied):
        # If config.json says tied and the files hold two matrices, transformers compares them, and under stage 3 both are
        # empty.
        model_config.tie_word_embeddings = False
    with _own_parts_read(folder) as sums:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=model_config,
            dtype=TORCH_DTYPE[recipe.training.precision],
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            # The checkpoint's generation_config.json must not change scores (see text/translate.py).
            generation_config=GenerationConfig(eos_token_id=folder.end_ids or None),
        )
    model, info = loaded
    del zero_config
    if stage_of(config) < 3:
        model.to(distributed.device())
    missing = set(info["missing_keys"])
    if untie:
        head = next(name for name, value in model.named_parameters() if value is model.get_output_embeddings().weight)
        missing.discard(head)
        _copy_weight(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    if missing:
        raise UserError(f"{folder.path}: the checkpoint lacks {len(missing)} weights, such as {min(missing)}")
    if info["unexpected_keys"]:
        unexpected = info["unexpected_keys"]
        raise UserError(
            f"{folder.path}: {len(unexpected)} tensors in the files do not belong to the model, such as {min(unexpected)}"
        )
    verify_weights(model, folder, sums)
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def free_weights(model: nn.Module) -> None:
    """Frees this rank's memory of a model, which cannot be used afterwards.

    Deleting the model is not enough, since DeepSpeed's hooks and caches refer to it; so its weights are emptied.
    """
    for parameter in model.parameters():
        drop_host_copy(parameter)
        stored = stored_weight(parameter)
        for weight in (parameter, stored, scale_of(stored)):
            if weight is not None:
                weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


def _copy_weight(source: nn.Parameter, target: nn.Parameter) -> None:
    """Copies between parameters of the same shape, hence the same partition: each rank copies its part."""
    with torch.no_grad():
        stored_weight(target).copy_(stored_weight(source))
    drop_host_copy(target)


Sums = tuple[int, int]


@contextmanager
def _own_parts_read(folder: ModelFolder) -> Iterator[dict[str, Sums]]:
    """Within the block, transformers' loading under ZeRO-3 has every rank read its own parts. The loading is collective.

    Yields the sums of what this rank has read, by parameter; it stays empty if transformers does not load this way.
    """
    from transformers import modeling_utils

    sums: dict[str, Sums] = {}
    load_whole = getattr(modeling_utils, "_load_state_dict_into_zero3_model", None)
    if load_whole is None:  # a version of transformers that calls it otherwise
        yield sums
        return

    def load(model: nn.Module, state_dict: dict[str, torch.Tensor], load_config: Any = None) -> tuple[Any, set[str]]:
        sums.update(_read_own_parts(model, folder))
        # What the files store in another form, and buffers.
        rest = {name: value for name, value in state_dict.items() if folder.parameter_name(name) not in sums}
        errors, missing = load_whole(model, rest, load_config)
        return errors, missing - sums.keys()

    modeling_utils._load_state_dict_into_zero3_model = load
    try:
        yield sums
    finally:
        modeling_utils._load_state_dict_into_zero3_model = load_whole


def _read_own_parts(model: nn.Module, folder: ModelFolder) -> dict[str, Sums]:
    """Reads this rank's part of every weight that the files store as it is. Collective.

    Returns the sums of each part in the model's dtype, as read. The progress shown is rank 0's, as if all ranks were as fast.

    Raises
    ------
    UserError
        On every rank, if any of them cannot read its parts or finds NaN.
    """
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    in_files = {name: folder.stored_name(name) for name in parameters}
    found = {name: stored for name, stored in in_files.items() if stored is not None}
    size = {name: math.prod(folder.shape(stored)) * folder.dtype(stored).itemsize for name, stored in found.items()}
    sums = {}
    with (
        distributed.raise_on_all_ranks(),
        torch.no_grad(),
        distributed.byte_progress("loading", sum(size.values())) as bar,
    ):
        for number, (name, stored) in enumerate(found.items(), start=1):
            part, start = local_part(parameters[name])
            values = folder.read_flat(stored, start, start + part.numel()).to(part.dtype)
            part.copy_(values)
            drop_host_copy(parameters[name])
            if part.isnan().any():
                raise UserError(f"{folder.path}: {name} contains NaN in the files; give a model without NaN")
            sums[name] = _word_sums(values, start)
            parameters[name]._is_hf_initialized = True  # else transformers gathers it and starts it with random values
            bar.set_postfix_str(f"{number}/{len(found)} tensors", refresh=False)
            bar.update(size[name])
    return sums


def verify_weights(model: nn.Module, folder: ModelFolder, sums: dict[str, Sums]) -> None:
    """Proves that the weights are the checkpoint's, each rank for its part. Raises UserError on every rank.

    Tensors that the model stores in another form than the file, such as fused experts, are not compared; the input
    embedding always is.

    Parameters
    ----------
    model
        The loaded model.
    folder
        Its checkpoint.
    sums
        Of what this rank has read, by parameter. If it is empty, the files are read instead.
    """
    if sums:
        parts = {name: local_part(weight) for name, weight in model.named_parameters(remove_duplicate=False)}
        name = next((name for name in sums if _word_sums(*parts[name]) != sums[name]), None)
    else:
        name = differing_weight(model, folder)
    failure = None
    if name:
        why = "differs from the checkpoint after loading; report this library mismatch"
        stored = folder.stored_name(name)
        if stored and folder.read_flat(stored, 0, math.prod(folder.shape(stored))).isnan().any():
            why = "contains NaN in the files; give a model without NaN"
        failure = f"{folder.path}: {name} {why}"
    distributed.raise_if_any_rank(failure)


def differing_weight(model: nn.Module, folder: ModelFolder, leave_out: nn.Parameter | None = None) -> str | None:
    """The first weight whose part on this rank, or its part of the host's copy, differs from a checkpoint; or None.

    Compared in the model's dtype, or as rounded to 8 bits.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = folder.stored_name(name)
        if stored is None or parameter is leave_out:
            continue
        for part, start in filter(None, (_own_share(parameter), host_part(parameter))):
            expected = folder.read_flat(stored, start, start + part.numel()) if part.numel() else part.cpu()
            expected = expected.to(part.dtype)
            if is_rounded(parameter):
                expected = round_trip(expected)
            if not torch.equal(part.cpu(), expected):
                return name
    return None


def weight_digests(model: nn.Module) -> dict[str, str]:
    """A checksum of every weight by name, the same for any number of ranks: each sums its part. Collective.

    Two sums over a weight's 16-bit words modulo 2^64, one weighted by position. They detect changes, not forgeries.
    """
    sums = {name: _word_sums(*_own_share(parameter)) for name, parameter in model.named_parameters()}
    sums_of_ranks = distributed.gather_objects(sums)
    digests = {}
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, full_shape(parameter)))
        totals = [sum(numbers) % 2**64 for numbers in zip(*(of_rank[name] for of_rank in sums_of_ranks), strict=True)]
        digests[name] = f"{shape} {totals[0]:016x}{totals[1]:016x}"
    return digests


def _word_sums(part: torch.Tensor, start: int) -> tuple[int, int]:
    """The exact sums of a flat part's words, and of words times positions in the whole weight."""
    words = part.contiguous().view(torch.int16 if part.element_size() % 2 == 0 else torch.int8)
    position = start * part.element_size() // words.element_size()
    # Sums within a block stay below 2^53, so the fast float64 product is exact.
    factors = torch.ones(2, WORDS_AT_ONCE, dtype=torch.float64, device=words.device)
    factors[1] = torch.arange(WORDS_AT_ONCE)
    total = weighted = 0
    for block in words.split(WORDS_AT_ONCE):
        plain, by_position = (factors[:, : len(block)] @ block.double()).tolist()
        total += int(plain)
        weighted += int(by_position) + position * int(plain)
        position += len(block)
    return total, weighted


def _own_share(parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
    """This rank's flat part of a parameter without padding, and its offset; an even share of an unpartitioned one."""
    if is_partitioned(parameter):
        return local_part(parameter)
    size = -(-parameter.numel() // distributed.world_size())
    start = min(size * distributed.rank(), parameter.numel())
    return parameter.detach().flatten()[start : start + size], start
