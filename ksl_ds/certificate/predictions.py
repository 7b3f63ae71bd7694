"""What a model predicts at every position of a text when the reference translation is its prefix (teacher forcing).

Where the certified risk is one of quality, also how good its own translations are. One forward pass over the text, spread
over the ranks; of each position only two probabilities and a token are kept, 16 bytes, so that two models can be compared
one after the other and need never be in memory together.

Legend: N predicted tokens, S sentences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ksl_ds import distributed
from ksl_ds.certificate.criterion import Predictions
from ksl_ds.text.packing import Packing
from ksl_ds.text.prompt import Example
from ksl_ds.text.scores import sentence_chrf
from ksl_ds.text.translate import translate
from ksl_ds.training.evaluation import evaluation_model
from ksl_ds.training.loss import can_keep_logits, response_logits
from ksl_ds.training.packing import packing_of
from ksl_ds.training.run import RunContext


def predict_texts(run: RunContext, label: str) -> dict[str, Predictions]:
    """The predictions of the run's model as it stands on test and calibration text, in order, the same on every rank."""
    evaluation = run.recipe.evaluation
    found: dict[str, Predictions] = {}
    with evaluation_model(run) as (module, partitioned):
        packing = packing_of(run, module)
        for part in ("test", "valid"):
            if part not in run.examples:
                continue
            examples = run.examples[part]
            name = f"{label}, {part} text"
            found[part] = predict(module, run.model, examples, run.pad_id, evaluation.batch_size, name, packing)
            if run.recipe.certify.risk == "chrf":
                translations = translate(
                    module,
                    run.tokenizer,
                    [example.prompt_ids for example in examples],
                    evaluation,
                    partitioned=partitioned,
                    label=f"translating, {name}",
                    shares_prompt=packing.layout == "prefix",
                )
                hypotheses = [translation.text for translation in translations]
                references = [pair.target for pair in run.corpora[part].pairs]
                found[part] = replace(found[part], chrf_S=torch.tensor(sentence_chrf(hypotheses, references)))
    return found


@torch.no_grad()
def predict(
    model: Callable[..., Any],
    module: nn.Module,
    examples: list[Example],
    pad_id: int,
    size: int,
    label: str,
    packing: Packing,
) -> Predictions:
    """Predictions at the response tokens of `examples`, end token included, `size` pairs of a rank at once."""
    keeps_logits = can_keep_logits(module)
    was_training = module.training
    module.eval()
    found = {}
    # As many batches on every rank, some perhaps empty: the forward pass of a partitioned model is a collective.
    batches, packed = packing.micro_batches(
        examples, range(len(examples)), distributed.rank(), distributed.world_size(), size
    )
    with distributed.progress(batches, label) as bar:
        for indices in bar:
            batch = [examples[index] for index in indices]
            logits_NV, _ = response_logits(model, packing.collate(batch, pad_id, packed=packed), keeps_logits)
            highest = logits_NV.topk(2, dim=1)
            probability_N2 = (highest.values - logits_NV.logsumexp(dim=1, keepdim=True)).exp().cpu()
            top_N = highest.indices[:, 0].cpu()
            lengths = [len(example.response_ids) for example in batch]
            # numpy, since small torch tensors pickle with all of their storage
            for index, of_both, of_top in zip(
                indices, probability_N2.split(lengths), top_N.split(lengths), strict=True
            ):
                found[index] = of_both.numpy().copy(), of_top.numpy().copy()
    module.train(was_training)
    everything: dict[int, Any] = {}
    for part in distributed.gather_objects(found):
        everything |= part
    in_order = [everything[index] for index in range(len(examples))]
    first_N, second_N = torch.cat([torch.from_numpy(both) for both, _ in in_order]).T.contiguous()
    return Predictions(
        first_N,
        second_N,
        torch.cat([torch.from_numpy(top) for _, top in in_order]),
        torch.tensor([len(top) for _, top in in_order]),
    )
