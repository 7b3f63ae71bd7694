"""Run by test_lottery.py on several ranks: the methods that need no ticket, one after the other."""

import json
from functools import partial
from pathlib import Path

from helpers.cases import run_cases
from helpers.tiny import make_model_folder

from ksl_ds import distributed
from ksl_ds.commands import tune
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.model.published import published_pieces

SETTINGS = {
    "embed": [
        "embed_tuning.max_steps=6",
        "embed_tuning.schedule=linear",
        "training.precision=bf16",
        "training.gradient_checkpointing=true",
        "evaluation.num_beams=2",
    ],
    "full": ["full_tuning.learning_rate=0.01", "full_tuning.max_steps=6"],
    "lora": ["lora.learning_rate=0.01", "lora.max_steps=6"],
    "prefix": ["prefix.learning_rate=0.05", "prefix.max_steps=6", "prefix.num_virtual_tokens=4"],
}


def check(method: str) -> None:
    # All pairs are the test text, in one batch a step, so that the losses of the steps can be compared.
    everything = ["text.max_test_pairs=null", "training.batch_size=12"]
    words = [f"method={method}", f"run_dir={method}", *SETTINGS[method], *everything]
    tune.main(load_recipe(Recipe, "recipe.yaml", words))


def check_published() -> None:
    """A published ticket, on a model with LLaMA-1's vocabulary as far as these ids go."""
    if distributed.is_rank0():
        make_model_folder(Path("llama"), vocab_size=32000)
        tokenizer = json.loads(Path("llama/tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        size = len(vocabulary)
        pieces = published_pieces()
        vocabulary |= {f"<unused{number}>": number for number in range(size, 32000)}
        by_number = {number: piece for piece, number in vocabulary.items()}
        for number, piece in pieces.items():
            # The word that was here moves to the place that the piece had, if any, else to a new name.
            displaced, former = by_number[number], vocabulary.get(piece)
            vocabulary[piece] = number
            by_number[number] = piece
            del vocabulary[displaced]
            if former is not None:
                vocabulary[displaced] = former
                by_number[former] = displaced
        Path("llama/tokenizer.json").write_text(json.dumps(tokenizer))
    distributed.barrier()
    words = [
        "method=ticket",
        "ticket=published:en-da",
        "run_dir=published",
        "model.path=llama",
        "partial_tuning.max_steps=2",
    ]
    tune.main(load_recipe(Recipe, "recipe.yaml", words))


CASES = {method: partial(check, method) for method in SETTINGS} | {"published": check_published}
if __name__ == "__main__":
    run_cases(CASES)
