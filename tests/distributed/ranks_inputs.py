"""Run by test_resume.py on several ranks: resume notices what has changed in the model, the ticket and the DeepSpeed JSON."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ksl_ds import distributed
from ksl_ds.commands import evaluate
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.log import messages_on_stderr
from ksl_ds.lottery.ticket import Shift, make_ticket
from ksl_ds.sharding.engine import set_library_verbosity

distributed.initialize()
set_library_verbosity(False)
WORDS = ["run_dir=run", "ticket=ticket", "text.max_test_pairs=2", "evaluation.max_new_tokens=2", "resume=auto"]
WEIGHTS, JSON, INPUTS = Path("model/model.safetensors"), Path("ds.json"), Path("run/inputs.json")


def score() -> str:
    """What the user is told: the sentence of a mistake, or nothing."""
    try:
        with messages_on_stderr():
            evaluate.main(load_recipe(Recipe, "recipe.yaml", WORDS))
    except UserError as error:
        return str(error)
    return ""


def on_rank0(work) -> None:
    distributed.barrier()
    if distributed.is_rank0():
        work()
    distributed.barrier()


def write_ticket(value: float) -> None:
    base_KD = load_file(WEIGHTS)["model.embed_tokens.weight"][[3, 5]]
    zeros_V = torch.zeros(134)
    shift = Shift(zeros_V.int(), zeros_V, zeros_V, 32, "untested")
    ticket = make_ticket(
        shift, torch.tensor([3, 5]), base_KD, base_KD + value, selection="ids", alpha=0.05, method="exact"
    )
    ticket.save(Path("ticket"), "model.embed_tokens")


def change_weight(name: str) -> None:
    weights = load_file(WEIGHTS)
    weights[name].view(-1)[-1] += 2**-10
    save_file(weights, WEIGHTS, metadata={"format": "pt"})


def change_json(**section: object) -> None:
    content = json.loads(JSON.read_text())
    logged = {name: section.pop(name) for name in ("steps_per_print",) if name in section}
    content["zero_optimization"] |= section
    JSON.write_text(json.dumps(content | logged))


def digest(weight: torch.Tensor) -> str:
    """As the docstring of `weight_digests` describes it, in whole numbers."""
    words = weight.flatten().view(torch.int16).tolist()
    sums = [sum(words), sum(position * word for position, word in enumerate(words))]
    return f"{'x'.join(map(str, weight.shape))} " + "".join(f"{number % 2**64:016x}" for number in sums)


on_rank0(lambda: write_ticket(0.5))
assert score() == ""
recorded = json.loads(INPUTS.read_text())
stored = load_file(WEIGHTS)
assert {name: recorded["weights"][name] for name in stored} == {name: digest(weight) for name, weight in stored.items()}
assert recorded["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] == 0
results = Path("run/results.json").read_text()
assert score() == ""
stages = json.loads(results)["stages"]

embedding, middle = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
CHANGES = {
    "a weight": (lambda: change_weight(middle), ["the model model has changed", "run", f"({middle} differs)"]),
    "the embedding": (lambda: change_weight(embedding), ["the model model has changed", f"({embedding} differs)"]),
    "the tokenizer": (
        lambda: Path("model/tokenizer_config.json").write_text("{}"),
        ["the model model has changed", "(tokenizer_config.json differs)"],
    ),
    "its generation": (
        lambda: Path("model/generation_config.json").unlink(), ["model model has changed", "(generation_config.json differs)"],
    ),
    "the ticket": (lambda: write_ticket(0.25), ["the ticket ticket has changed since the run in run was started"]),
    "the JSON": (
        lambda: change_json(reduce_bucket_size=1000),
        ["ds.json has changed", "zero_optimization.reduce_bucket_size was None and is 1000"],
    ),
    "the stage": (lambda: change_json(stage=2), ["ds.json has changed", "zero_optimization.stage was 3 and is 2"]),
    "the record": (lambda: INPUTS.write_text("[]"), ["run/inputs.json", "another kind of file"]),
    "what is logged": (lambda: change_json(steps_per_print=5), []),
    "nothing but the form": (lambda: change_json(stage=3.0, offload_param=None), []),
}  # fmt: skip
on_rank0(lambda: [shutil.copytree(name, f"kept/{name}") for name in ("model", "ticket", "run")])
on_rank0(lambda: shutil.copy(JSON, "kept"))


def restore() -> None:
    for name in ("model", "ticket", "run"):
        shutil.rmtree(name)
        shutil.copytree(f"kept/{name}", name)
    shutil.copy(f"kept/{JSON}", JSON)


for name, (change, words) in CHANGES.items():
    on_rank0(change)
    sentence = score()
    assert len(set(distributed.gather_objects(sentence))) == 1, name
    assert bool(sentence) == bool(words) and "\n" not in sentence, (name, sentence)
    assert all(word in sentence for word in words), (name, sentence)
    assert json.loads(Path("run/results.json").read_text())["stages"] == stages, name
    on_rank0(restore)

# A run of a version that recorded nothing goes on, and is watched from then on.
on_rank0(INPUTS.unlink)
assert score() == ""
assert json.loads(INPUTS.read_text()) == recorded
distributed.shutdown()
