"""Run by test_lottery.py on several ranks: users' mistakes reach every rank as the same sentence, and write nothing."""

import json
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

from helpers.cases import run_cases
from helpers.runs import prepare_job
from helpers.tiny import make_model_folder

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError


def prepare(folder: Path) -> None:
    """What the mistakes are made with, in a folder of `prepare_job`."""
    prepare_job(folder)
    (folder / "empty.jsonl").write_text("")
    (folder / "one_sided.jsonl").write_text('{"source": "the cat", "target": ""}\n' * 3)
    (folder / "other.jsonl").write_text('{"en": "the cat", "fr": "le chat"}\n')
    shutil.copytree(folder / "model", folder / "no_weights")
    (folder / "no_weights/model.safetensors").unlink()
    make_model_folder(folder / "small", vocab_size=50)
    (folder / "clip.json").write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}))
    (folder / "optimizer.json").write_text(json.dumps({"optimizer": {"type": "Adam"}}))


# overrides: words that the sentence must contain
MISTAKES = {
    ("text.train=nowhere.jsonl",): ["nowhere.jsonl"],
    ("text.train=other.jsonl",): ["source", "en", "fr"],
    ("text.train=empty.jsonl",): ["empty.jsonl"],
    ("text.train=one_sided.jsonl",): ["one_sided.jsonl"],
    ("text.max_length=3",): ["text.max_length", "3"],
    ("model.path=nowhere/model",): ["nowhere/model"],
    ("model.path=no_weights",): ["no_weights", "weights"],
    ("model.path=small",): ["50", "tokenizer"],
    ("draw.alpha=1",): ["draw.alpha"],
    ("text.prompt=say {sentence}",): ["{source}"],
    ("deepspeed=clip.json",): ["gradient_clipping", "0.5", "training.max_grad_norm"],
    ("deepspeed=optimizer.json",): ["optimizer", "embed_tuning"],
    ("deepspeed=nowhere.json",): ["nowhere.json"],
    ("num_ranks=7",): ["num_ranks=7", "2 were started"],
    ("evaluation.tokenize=13b",): ["13b"],
    ("training.batch_size=many",): ["training.batch_size", "many"],
    ("method=ticket",): ["ticket="],
    ("method=ticket", "ticket=nowhere"): ["nowhere"],
    ("method=ticket", "ticket=published:en-xx"): ["en-xx", "en-ca"],
    ("method=ticket", "ticket=published:en-ca"): ["LLaMA-1", "<0x0A>"],
    ("embed_tuning.learning_rate=1e39",): ["loss", "embed_tuning", "learning_rate"],
}


def check(overrides: tuple[str, ...]) -> None:
    words = MISTAKES[overrides]
    try:
        recipe = load_recipe(Recipe, "recipe.yaml", [*overrides, "run_dir=mistaken"])
        import_module("ksl_ds.commands.tune").main(recipe)
    except UserError as error:
        message = str(error)
    else:
        message = "no error"
    assert len(set(distributed.gather_objects(message))) == 1, message
    assert message != "no error"
    assert "\n" not in message, message
    assert all(word in message for word in words), message
    if "learning_rate" not in overrides[0]:  # everything else is found before the run folder is made
        assert not Path("mistaken").exists() or overrides[-1].startswith("ticket=")
    distributed.barrier()
    if distributed.is_rank0():
        shutil.rmtree("mistaken", ignore_errors=True)
    distributed.barrier()


CASES = {" ".join(overrides): partial(check, overrides) for overrides in MISTAKES}
if __name__ == "__main__":
    run_cases(CASES)
