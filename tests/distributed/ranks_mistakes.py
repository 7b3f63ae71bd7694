"""Run by test_lottery.py on several ranks: users' mistakes reach every rank as the same sentence, and write nothing."""

import json
import shutil
from importlib import import_module
from pathlib import Path

from helpers.tiny import make_model_folder

from ksl_ds import distributed
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.sharding.engine import set_library_verbosity

distributed.initialize()
set_library_verbosity(False)

if distributed.is_rank0():
    Path("empty.jsonl").write_text("")
    Path("one_sided.jsonl").write_text('{"source": "the cat", "target": ""}\n' * 3)
    Path("other.jsonl").write_text('{"en": "the cat", "fr": "le chat"}\n')
    shutil.copytree("model", "no_weights")
    Path("no_weights/model.safetensors").unlink()
    make_model_folder(Path("small"), vocab_size=50)
    Path("clip.json").write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}))
    Path("optimizer.json").write_text(json.dumps({"optimizer": {"type": "Adam"}}))
distributed.barrier()

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
    ("num_ranks=7",): ["num_ranks=7", str(distributed.world_size())],
    ("evaluation.tokenize=13b",): ["13b"],
    ("training.batch_size=many",): ["training.batch_size", "many"],
    ("method=ticket",): ["ticket="],
    ("method=ticket", "ticket=nowhere"): ["nowhere"],
    ("method=ticket", "ticket=published:en-xx"): ["en-xx", "en-ca"],
    ("method=ticket", "ticket=published:en-ca"): ["LLaMA-1", "<0x0A>"],
    ("embed_tuning.learning_rate=1e39",): ["loss", "embed_tuning", "learning_rate"],
}

for overrides, words in MISTAKES.items():
    try:
        recipe = load_recipe(Recipe, "recipe.yaml", [*overrides, "run_dir=mistaken"])
        import_module("ksl_ds.commands.tune").main(recipe)
    except UserError as error:
        message = str(error)
    else:
        message = "no error"
    assert len(set(distributed.gather_objects(message))) == 1, message
    assert message != "no error", overrides
    assert "\n" not in message, message
    assert all(word in message for word in words), (overrides, message)
    if "learning_rate" not in overrides[0]:  # everything else is found before the run folder is made
        assert not Path("mistaken").exists() or overrides[-1].startswith("ticket="), overrides
    distributed.barrier()
    if distributed.is_rank0():
        shutil.rmtree("mistaken", ignore_errors=True)
    distributed.barrier()
distributed.shutdown()
