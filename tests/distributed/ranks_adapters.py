"""Run by test_adapters.py: LoRA and prefix tuning where PEFT has no default, or derives another shape than the model has."""

import json
from pathlib import Path

from tiny import make_model_folder, write_pairs

from ksl_ds.commands import tune
from ksl_ds.errors import UserError
from ksl_ds.recipe import Recipe, load_recipe
from ksl_ds.sharding import cluster
from ksl_ds.sharding.engine import quiet_libraries

SIZES = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "phi3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
}
WORDS = [
    "text.train=pairs.jsonl", "text.test=pairs.jsonl", "training.batch_size=12", "training.micro_batch_size=6",
    "training.precision=fp32", "tracking.wandb=off", "evaluation.max_new_tokens=4",
    "lora.learning_rate=0.05", "lora.max_steps=6", "prefix.learning_rate=0.05", "prefix.max_steps=6",
    "prefix.num_virtual_tokens=4",
]  # fmt: skip


def tuned(architecture: str, method: str, *words: str) -> str:
    """The sentence with which tuning ends, if it is an error."""
    run_dir = f"{architecture}-{method}"
    words = (f"model.path={architecture}", f"run_dir={run_dir}", f"method={method}", *words)
    try:
        tune.run(load_recipe(Recipe, None, [*WORDS, *words]))
        return ""
    except UserError as error:
        return str(error)


cluster.start()
quiet_libraries(False)
if cluster.is_main():
    write_pairs(Path("pairs.jsonl"))
    for architecture, sizes in SIZES.items():
        make_model_folder(Path(architecture), architecture, **sizes)
cluster.barrier()
said = {
    f"{architecture} {method}": tuned(architecture, method)
    for architecture, method in [
        ("falcon", "prefix"), ("xglm", "prefix"), ("xglm", "lora"), ("phi3", "lora"), ("rwkv", "embed"), ("rwkv", "prefix"),
    ]
}  # fmt: skip
said["phi3 embed, checkpointing"] = tuned(
    "rwkv", "full", "training.gradient_checkpointing=true", "deepspeed=zero2.json"
)
if cluster.is_main():
    Path("said.json").write_text(json.dumps(said))
cluster.stop()
