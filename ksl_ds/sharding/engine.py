"""DeepSpeed engines, and the DeepSpeed configuration of a recipe.

The recipe sets batch size, precision and clipping; a DeepSpeed JSON with other values is an error that names both. An
engine is used for one training run and then destroyed. The model stays partitioned for the next engine, so it is loaded
once for all stages.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ksl_ds import distributed
from ksl_ds.config.load import shipped_file
from ksl_ds.config.schema import Recipe, Tuning
from ksl_ds.errors import UserError
from ksl_ds.sharding.partition import gathered
from ksl_ds.sharding.rounding import ROUNDED, for_deepspeed, rounds_frozen

ROUNDS_ON = ("cuda",)  # devices where frozen weights may be kept in 8 bits
TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_config(name: str) -> dict[str, Any]:
    """Reads and checks a DeepSpeed JSON, given as a path or a name in ds_configs/. Raises UserError."""
    from ksl_ds.sharding.deepspeed_json import read_json

    return read_json(shipped_file(name, "ds_configs"))


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a recipe for the current world size. Does not communicate.

    Raises
    ------
    UserError
        If the JSON is missing or invalid, contradicts the recipe, or uses an unsupported feature.
    """
    from ksl_ds.sharding.deepspeed_json import check_with_deepspeed

    path = shipped_file(recipe.deepspeed, "ds_configs")
    config = read_config(recipe.deepspeed)
    _set_host_copies(path, config)
    _check_rounding(path, config)
    training = recipe.training
    decided = {
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation_steps(recipe), "training.batch_size"),
        "gradient_clipping": (training.max_grad_norm, "training.max_grad_norm"),
        "bf16.enabled": (training.precision == "bf16", "training.precision"),
        "fp16.enabled": (training.precision == "fp16", "training.precision"),
    }
    for name, (value, owner) in decided.items():
        section, _, entry = name.rpartition(".")
        node = config.setdefault(section, {}) if section else config
        if node.setdefault(entry, value) != value:
            raise UserError(
                f"{path} has {name} = {node[entry]}, but {owner} in the recipe makes it {value}; remove {name} from the JSON"
            )
    # torch's fused AdamW runs on the CPU too, so offload needs no compiled DeepSpeedCPUAdam.
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 10**9)
    check_with_deepspeed(path, config)
    return config


def _set_host_copies(path: Path, config: dict[str, Any]) -> None:
    """Sets how many ranks share a copy of the weights (hpZ): those of a host, where the JSON says `"auto"`.

    Raises
    ------
    UserError
        Where copies would not lie on one host each.
    """
    from ksl_ds.sharding.deepspeed_json import HOST_COPIES

    zero = config.get("zero_optimization", {})
    size = zero.get(HOST_COPIES, 1)
    here = distributed.ranks_of_host()
    ranks = distributed.world_size()
    if size == "auto":
        size = here if here < ranks else 1  # one host has its weights already
        zero[HOST_COPIES] = size
    if size > 1 and (here % size or ranks % size):
        raise UserError(
            f"{path} has zero_optimization.{HOST_COPIES} = {size}, but a host has {here} of the {ranks} ranks, so a "
            'copy of the weights would not lie on one host; write "auto"'
        )


def _check_rounding(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError if frozen weights in 8 bits are asked for where that cannot work, or has no use."""
    if not rounds_frozen(config):
        return
    has = f"{path} has zero_optimization.{ROUNDED}"
    if stage_of(config) < 3:
        raise UserError(f"{has}, but below stage 3 weights are not partitioned, and DeepSpeed ignores it; remove it")
    if config["zero_optimization"].get("offload_param", {}).get("device", "none") != "none":
        raise UserError(f"{has}, which was not tested with weights in host memory; remove it or offload_param")
    if distributed.device().type not in ROUNDS_ON:
        raise UserError(
            f"{has}, which is for CUDA devices: it spares a GPU's memory, and this rank has none; remove it"
        )


def forget_host_groups() -> None:
    """Makes DeepSpeed ready for another model under hpZ: it makes the groups of ranks once and refuses a second time."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def check_precision(precision: str) -> None:
    """Raises UserError if this rank's device cannot train in `precision`. Does not communicate."""
    from deepspeed.accelerator import get_accelerator

    device = distributed.device()
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        where = "no GPU found, and this CPU" if device.type == "cpu" else f"{device}"
        raise UserError(f"{where} does not support fp16; use training.precision=fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} does not support bf16; use training.precision=fp16 and deepspeed=zero3_fp16.json")


def accumulation_steps(recipe: Recipe) -> int:
    """Gradient accumulation steps of a recipe for the current world size."""
    return -(-recipe.training.batch_size // (recipe.training.micro_batch_size * distributed.world_size()))


def stage_of(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration; 0 if it names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def adamw(parameters: list[nn.Parameter], tuning: Tuning) -> torch.optim.AdamW:
    """Torch's fused AdamW with a recipe's settings."""
    return torch.optim.AdamW(
        parameters,
        lr=tuning.learning_rate,
        betas=(tuning.betas[0], tuning.betas[1]),
        eps=tuning.epsilon,
        weight_decay=tuning.weight_decay,
        fused=True,
    )


@contextmanager
def training_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, config: dict[str, Any]
) -> Iterator[Any]:
    """A DeepSpeed engine that trains the optimizer's parameters; it is destroyed at the end of the block.

    Parameters
    ----------
    model
        The model, partitioned or not.
    optimizer
        Holds the parameters to train; all others are frozen.
    scheduler
        A learning rate scheduler of torch for `optimizer`.
    config
        As from `deepspeed_config`.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=for_deepspeed(config)
    )
    try:
        yield engine
    finally:
        destroy_engine(engine)


@contextmanager
def inference_engine(model: nn.Module, config: dict[str, Any]) -> Iterator[nn.Module]:
    """The model under a DeepSpeed engine without optimizer, which gathers ZeRO-3's weights layer by layer."""
    import deepspeed

    without_training = {name: value for name, value in for_deepspeed(config).items() if name != "gradient_clipping"}
    engine, *_ = deepspeed.initialize(model=model, config=without_training)
    try:
        yield engine.module
    finally:
        destroy_engine(engine)


def destroy_engine(engine: Any) -> None:
    """Frees an engine's hooks, gradients and optimizer states; the model keeps its weights."""
    for parameter in engine.module.parameters():
        parameter.grad = None
        # DeepSpeed leaves this reference: the old optimizer's masters would be taken for the weights, and stay in memory.
        parameter.__dict__.pop("_z3_optimizer", None)
    for module in engine.module.modules():
        # DeepSpeed keeps the first engine's backward hooks, with that engine's record of what is gathered. With gradient
        # checkpointing, the next engine would lose frozen weights in the recomputation.
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            module.__dict__.pop(name, None)
    engine.destroy()
    engine.optimizer = None
    engine.module = None
    gc.collect()  # engines are in reference cycles that keep the optimizer's states
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Gathers the whole model on every rank for the block; only while no engine is alive."""
    with gathered(model.parameters()):
        yield model


def linear_of_stage(stage: int) -> Callable[..., Tensor]:
    """The function of linear layers: ZeRO-3 replaces torch's by one that saves the input even for frozen weights."""
    if stage < 3:
        return F.linear
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap


def set_library_verbosity(verbose: bool) -> None:
    """Silences the logs of DeepSpeed, transformers, datasets and wandb unless `verbose`."""
    if verbose:
        return
    import datasets
    import deepspeed
    import transformers

    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed and PEFT use deprecated names of torch and transformers, which users cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning)
