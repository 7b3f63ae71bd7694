"""Batched generation spread over the ranks, gathered in the order of the text.

Prompts are sorted by length, so that a batch pads little, and dealt to the ranks in turn. When the weights stay
partitioned every rank runs the same number of batches and steps (`synced_gpus`), since each forward pass is a collective;
when they are whole (`evaluation.gather_weights`) ranks do not wait for each other.

Legend: B prompts of a batch, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ksl_ds.recipe import Evaluation
from ksl_ds.sharding import cluster
from ksl_ds.text.batches import collate_prompts


@dataclass
class Translation:
    """One hypothesis: its text, its length in tokens (without the end token), and whether the model ended it itself."""

    text: str
    num_tokens: int
    stopped: bool


@torch.no_grad()
def translate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    evaluation: Evaluation,
    *,
    partitioned: bool,
    label: str,
) -> list[Translation]:
    """Hypotheses of all prompts, in order, on every rank. `partitioned`: forward passes are collectives (ZeRO-3)."""
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    mine = by_length[cluster.rank() :: cluster.world_size()]
    batches = [mine[start : start + evaluation.batch_size] for start in range(0, len(mine), evaluation.batch_size)]
    if partitioned:
        most = -(-len(by_length[:: cluster.world_size()]) // evaluation.batch_size)  # as rank 0 has
        batches += [[]] * (most - len(batches))
    end_ids = end_tokens(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    was_training = model.training
    model.eval()
    found: dict[int, Translation] = {}
    with cluster.progress(batches, label) as bar:
        for indices in bar:
            # A rank that has run out translates one shortest prompt along with the others and drops the result.
            batch = collate_prompts([prompts[index] for index in indices or by_length[-1:]], pad_id)
            output_BL = model.generate(
                input_ids=batch["input_ids"].to(cluster.device()),
                attention_mask=batch["attention_mask"].to(cluster.device()),
                do_sample=False,
                num_beams=evaluation.num_beams,
                max_new_tokens=evaluation.max_new_tokens,
                # What a checkpoint's generation config may carry for chats: sampling means nothing in a search, and
                # penalties on repeated words would keep a translation from repeating what the source repeats.
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=end_ids,
                pad_token_id=pad_id,
                synced_gpus=partitioned,
            )
            answers_BL = output_BL[:, batch["input_ids"].shape[1] :].tolist()
            for index, answer in zip(indices, answers_BL, strict=False):
                found[index] = _read(answer, end_ids, tokenizer)
    model.train(was_training)
    everything: dict[int, Translation] = {}
    for part in cluster.gather_objects(found):
        everything |= part
    return [everything[index] for index in range(len(prompts))]


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
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
