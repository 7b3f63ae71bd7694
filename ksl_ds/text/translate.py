"""Batched generation divided over the ranks, gathered in the order of the text.

Prompts are sorted by length to reduce padding and assigned to the ranks in turn. If the weights are partitioned, every rank
runs the same number of batches and steps (`synced_gpus`), since each forward pass is a collective; if they are gathered
(`evaluation.gather_weights`), ranks do not wait for each other.

Only the recipe sets generation. From the checkpoint's generation_config.json only the end tokens are used: penalties, forced
tokens or several sequences per prompt, meant for chats, would change scores.

Legend: B prompts of a batch, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ksl_ds import distributed
from ksl_ds.config.schema import Evaluation
from ksl_ds.text.batches import collate_prompts, common_length, padding_id


@dataclass
class Translation:
    """One hypothesis: its text, its length in tokens (without the end token), and whether the model ended it itself."""

    text: str
    num_tokens: int
    stopped: bool


@torch.no_grad()
def translate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    evaluation: Evaluation,
    *,
    partitioned: bool,
    label: str,
    shares_prompt: bool = False,
) -> list[Translation]:
    """Translates all prompts. Collective; every rank gets all hypotheses in order.

    Parameters
    ----------
    model
        The causal language model, gathered or under an inference engine.
    tokenizer
        Its transformers tokenizer.
    prompts
        Token ids of the prompts.
    evaluation
        Batch size, beams and maximum length.
    partitioned
        Whether forward passes are collectives (ZeRO-3).
    label
        Of the progress bar.
    shares_prompt
        Compute the beginning that all prompts of a batch share once, where the model's cache allows it. Only for a model that
        is known to take masks and positions as they are given.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    mine = by_length[distributed.rank() :: distributed.world_size()]
    batches = [mine[start : start + evaluation.batch_size] for start in range(0, len(mine), evaluation.batch_size)]
    if partitioned:
        most = -(-len(by_length[:: distributed.world_size()]) // evaluation.batch_size)  # as rank 0 has
        batches += [[]] * (most - len(batches))
    end_ids = end_tokens(model, tokenizer)
    pad_id = padding_id(tokenizer)
    search = search_settings(evaluation, end_ids, pad_id)
    was_training = model.training
    model.eval()
    found: dict[int, Translation] = {}
    with distributed.progress(batches, label) as bar, _only_settings(model, search):
        for indices in bar:
            # A rank without prompts left runs the shortest one with the others and discards the result.
            translated = indices or by_length[-1:]
            some = [prompts[index] for index in translated]
            shared = common_length(some) if shares_prompt and not partitioned and len(some) > 1 else 0
            cache = _prefilled(model, some[0][:shared], len(some) * evaluation.num_beams) if shared else None
            batch = collate_prompts(some, pad_id, shared if cache is not None else 0)
            output_BL = model.generate(
                input_ids=batch["input_ids"].to(distributed.device()),
                attention_mask=batch["attention_mask"].to(distributed.device()),
                generation_config=search,
                synced_gpus=partitioned,
                **({"past_key_values": cache} if cache is not None else {}),
            )
            answers_BL = output_BL[:, batch["input_ids"].shape[1] :].tolist()
            hypotheses = {
                index: _read(answer, end_ids, tokenizer) for index, answer in zip(translated, answers_BL, strict=True)
            }
            found |= {index: hypotheses[index] for index in indices}
    model.train(was_training)
    everything: dict[int, Translation] = {}
    for part in distributed.gather_objects(found):
        everything |= part
    return [everything[index] for index in range(len(prompts))]


def _prefilled(model: Any, ids: list[int], rows: int) -> Any:
    """A cache that holds `ids` for each row, from one forward pass; None for a model with a cache of another kind.

    Other kinds, such as those of sliding windows and of state-space models, do not hold all positions.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    output = model(input_ids=torch.tensor([ids], device=distributed.device()), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(rows)
    return cache


def search_settings(evaluation: Evaluation, end_ids: list[int], pad_id: int) -> Any:
    """A greedy or beam search as `evaluation` says, as transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=evaluation.num_beams,
        max_new_tokens=evaluation.max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )


@contextmanager
def _only_settings(model: Any, settings: Any) -> Iterator[None]:
    """Keeps `generate` from filling what `settings` leaves open from the checkpoint's generation config."""
    checkpoints_own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = checkpoints_own


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, which training teaches, and the model's own."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *configured) if token is not None))


def _read(answer: list[int], end_ids: list[int], tokenizer: Any) -> Translation:
    end = next((position for position, token in enumerate(answer) if token in end_ids), None)
    tokens = answer[:end]
    # "Clean up" would take the space before French question marks.
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return Translation(text, len(tokens), end is not None)
