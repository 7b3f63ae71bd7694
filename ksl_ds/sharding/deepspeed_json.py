"""Reads a DeepSpeed JSON and reports every mistake in one sentence, before a model is loaded.

DeepSpeed ignores unknown keys outside its sections, converts "3" and true to numbers, and finds many mistakes only during
training. Here the file is checked against DeepSpeed's classes for its sections and a list of the other keys that ksl_ds
supports. The result is normalised (5e7 is 50000000, old names are replaced, "auto" and null are removed), so that equivalent
files are equal.

Importing this module imports deepspeed.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, Field, ValidationError

from ksl_ds.config.load import shipped_hint
from ksl_ds.errors import UserError

# Keys that the recipe sets, and the recipe's key.
OWNED_BY_RECIPE = {
    "optimizer": "embed_tuning, partial_tuning, ...",
    "scheduler": "embed_tuning.schedule, partial_tuning.schedule, ...",
    "train_batch_size": "training.batch_size",
    "activation_checkpointing": "training.gradient_checkpointing",
    "torch_autocast": "training.precision",
    "bfloat16": "training.precision",
    "wandb": "tracking",
    "tensorboard": "tracking",
    "csv_monitor": "tracking",
    "comet": "tracking",
}
REMOVED_FROM_DEEPSPEED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
# Features that change gradients, partitioning, data or checkpoints in ways that were not tested with the training of rows,
# and settings of parts of DeepSpeed that ksl_ds does not use.
UNSUPPORTED = (
    "aio", "autotuning", "checkpoint", "compile", "data_efficiency", "data_parallel_size", "data_types",
    "datastates_ckpt", "dataloader_drop_last", "disable_allgather", "expert_parallel", "gradient_allreduce_op",
    "gradient_predivide_factor", "hybrid_engine", "managed_gradient_accumulation", "mesh_param", "pipeline",
    "prescale_gradients", "seq_parallel_communication_data_type", "sequence_parallel_size", "tensor_parallel",
    "use_data_before_expert_parallelism", "use_node_local_storage", "weight_quantization", "zenflow",
)  # fmt: skip
UNSUPPORTED_IN_SECTIONS = (
    "bf16.immediate_grad_update", "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states",
    "fp16.fp16_master_weights_and_grads", "zero_optimization.elastic_checkpoint", "zero_optimization.legacy_stage1",
    "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.stage3_module_granularity_threshold", "zero_optimization.module_granularity_threshold",
    "zero_optimization.zenflow", "zero_optimization.zeropp_loco_param",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_optimizer.super_offload",
)  # fmt: skip
HOST_COPIES = "zero_hpz_partition_size"
LARGEST = 2**63 - 1


class FlopsProfiler(DeepSpeedConfigModel):
    """The section flops_profiler, for which DeepSpeed has no class."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class Json(DeepSpeedConfigModel):
    """The keys that a DeepSpeed JSON may have. The first five must agree with the recipe."""

    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float | None = None
    bf16: DeepSpeedBF16Config = Field(default_factory=DeepSpeedBF16Config)
    fp16: DeepSpeedFP16Config = Field(default_factory=DeepSpeedFP16Config)
    zero_optimization: DeepSpeedZeroConfig = Field(default_factory=DeepSpeedZeroConfig)
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = False
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    disable_python_gc: bool = False
    steps_per_print: int | None = Field(None, gt=0)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    comms_logger: CommsLoggerConfig = Field(default_factory=CommsLoggerConfig)
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler)
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None


# Keys that change logging only.
LOGGING_KEYS = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "log_level",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON, checked and normalised. Raises UserError."""
    content = _parse(path)
    given = _without_auto(content)
    _refuse_unsupported(path, given)
    _refuse_unknown_keys(path, content, Json, "")
    try:
        config = Json(**given)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    except (AssertionError, TypeError) as error:  # an old key beside the new one; a section that is not an object
        raise UserError(f"{path}: {error}") from None
    _refuse_other_types(path, given, config, "")
    found: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    if _select(given, "zero_optimization.overlap_comm") is None:  # DeepSpeed's class has set it by the stage
        found.get("zero_optimization", {}).pop("overlap_comm", None)
    if _select(content, f"zero_optimization.{HOST_COPIES}") == "auto":  # engine.py knows the hosts
        found.setdefault("zero_optimization", {})[HOST_COPIES] = "auto"
    return found


def check_with_deepspeed(path: Path, config: dict[str, Any]) -> None:
    """Has DeepSpeed parse a complete configuration, as for training. Raises UserError."""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except Exception as error:  # AssertionError, ValueError and DeepSpeed's own
        raise UserError(f"DeepSpeed does not accept {path}: {' '.join(str(error).split())}") from None


def _parse(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"deepspeed: {path} has the key {name!r} twice; remove one")
        return dict(pairs)

    def finite(word: str) -> float | int:
        number = float(word)
        if not math.isfinite(number):
            raise UserError(f"deepspeed: {path} has the number {word}; numbers must be finite")
        return int(number) if number.is_integer() else number

    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = shipped_hint(str(path), "ds_configs")
        raise UserError(f"deepspeed: no file {path}, here or in ds_configs/{hint}") from None
    except OSError as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: byte {error.start} is not UTF-8") from None
    try:
        config = json.loads(content, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"deepspeed: {path} holds {_shown(config)}; it must be an object, {{...}}, with DeepSpeed's keys"
        )
    return config


def _without_auto(content: Any) -> Any:
    """Hugging Face's Trainer fills in "auto"; DeepSpeed takes its default for it, ksl_ds the ranks of a host for hpZ."""
    if isinstance(content, dict):
        return {name: _without_auto(value) for name, value in content.items() if value != "auto"}
    return content


def _refuse_unsupported(path: Path, given: dict[str, Any]) -> None:
    for name in given:
        if name in OWNED_BY_RECIPE:
            raise UserError(f"{path} has {name!r}, which the recipe sets ({OWNED_BY_RECIPE[name]}); remove it")
        if name in REMOVED_FROM_DEEPSPEED:
            raise UserError(f"{path} has {name!r}, a feature that was removed from DeepSpeed; remove it")
        if name in UNSUPPORTED:
            raise UserError(f"{path} has {name!r}, which ksl_ds does not support; remove it")
    for name in UNSUPPORTED_IN_SECTIONS:
        value = _select(given, name)
        used = value if isinstance(value, bool) else value not in (None, 0, 1, -1)
        if used:
            raise UserError(f"{path} sets {name}, which ksl_ds does not support; remove it")
    for name in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        if _select(given, name) == "nvme":
            raise UserError(f"{path} has {name} = nvme, which ksl_ds does not support; use cpu")
    bucket = _select(given, "zero_optimization.allgather_bucket_size")
    if isinstance(bucket, int) and bucket % 2:
        raise UserError(
            f"{path} has zero_optimization.allgather_bucket_size = {bucket}; DeepSpeed needs an even number"
        )
    if _select(given, "zero_optimization.compute_grad_norm") is False:
        raise UserError(f"{path} has zero_optimization.compute_grad_norm = false, but the norm is logged; remove it")


def _select(content: Any, dotted: str) -> Any:
    """The value of a dotted key; None if it or one of its sections is missing."""
    for name in dotted.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _refuse_unknown_keys(path: Path, given: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    sections = _sections(model)
    for name, value in given.items():
        if not prefix and name in OWNED_BY_RECIPE:  # "auto", or refused before
            continue
        if name not in sections:
            _unknown_key(path, prefix + name)
        section = sections[name]
        if section is not None and isinstance(value, dict):
            _refuse_unknown_keys(path, value, section, f"{prefix}{name}.")


def _unknown_key(path: Path, name: str) -> NoReturn:
    known = _known_keys(Json, "")
    last_parts = {known_name.rpartition(".")[2]: known_name for known_name in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [last_parts[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1)]
    hint = f"did you mean {near[0]}?" if near else "remove it"
    raise UserError(f"{path} has the unknown key {name!r}; {hint}")


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The keys of a section by all of their names, each with its class if it is a section itself."""
    sections: dict[str, type[BaseModel] | None] = {}
    for name, entry in model.model_fields.items():
        kinds = [kind for kind in (entry.annotation, *get_args(entry.annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        sections |= {known: section for known in (entry.alias, name) if known is not None}
    return sections


def _known_keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, section in _sections(model).items():
        keys.append(prefix + name)
        if section is not None:
            keys += _known_keys(section, f"{prefix}{name}.")
    return keys


def _refuse_other_types(path: Path, given: dict[str, Any], config: BaseModel, prefix: str) -> None:
    """Refuses text and booleans that were converted to numbers, and numbers beyond 64 bits."""
    name_of = {entry.alias: name for name, entry in type(config).model_fields.items() if entry.alias is not None}
    for name, value in given.items():
        taken = getattr(config, name_of.get(name, name), value)
        if isinstance(taken, BaseModel) and isinstance(value, dict):
            _refuse_other_types(path, value, taken, f"{prefix}{name}.")
        elif isinstance(value, str) and not isinstance(taken, (str, Path)):
            raise UserError(f"{path}: {prefix}{name} is the text {_shown(value)}; write {_shown(taken)}")
        elif isinstance(value, bool) and not isinstance(taken, bool):
            raise UserError(f"{path}: {prefix}{name} is {_shown(value)}; it must be a number")
        elif isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise UserError(f"{path}: {prefix}{name} is {_shown(value)}; it must be less than 2^63")


def _explain(error: ValidationError) -> str:
    """The first validation error of DeepSpeed's classes, in a sentence."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] in ("value_error", "assertion_error"):
        return f"{where}: {first['msg'].partition(', ')[2]}"
    rule = (
        "an object, {...}"
        if first["type"] in ("model_type", "dict_type")
        else first["msg"].replace("Input should be ", "")
    )
    if first["type"] == "enum":  # DeepSpeed's list of stages has its last one twice
        options = first["ctx"]["expected"].replace(" or ", ", ").split(", ")
        rule = f"one of {', '.join(dict.fromkeys(options))}"
    return f"{where} is {_shown(first['input'])}; it must be {rule}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
