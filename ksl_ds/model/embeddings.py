"""The modules and weights that `train_only_rows` restricts, and the unsupported cases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ksl_ds.sharding.partition import full_shape


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside wrappers of parallel training, DeepSpeed's engine and torch.compile."""
    while True:
        if type(module).__name__ == "OptimizedModule":
            module = module._orig_mod  # type: ignore[assignment]
        elif is_trainer_of(module):
            module = module.module  # type: ignore[assignment]
        else:
            return module


def is_trainer_of(module: nn.Module) -> bool:
    """Whether a module is a wrapper that has already prepared the model's parameters for training."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    deepspeed = sys.modules.get("deepspeed")
    return isinstance(module, parallel) or (deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine))


def embedding_of(model_or_embedding: nn.Module) -> nn.Module:
    """A model's input embedding, or the module itself if it is one. Raises ValueError."""
    module = _not_fsdp(unwrapped(model_or_embedding))
    get_embedding: Any = getattr(module, "get_input_embeddings", None)
    if get_embedding is not None:
        try:
            embedding = get_embedding()
        except (NotImplementedError, AttributeError):
            embedding = None
        if not isinstance(embedding, nn.Module):
            raise ValueError(
                f"{type(module).__name__} has no input embedding; pass train_only_rows the module whose rows should train"
            )
        module = embedding
    return _below_adapters(module, "embedding")


def head_of(model_or_head: nn.Module) -> nn.Module:
    """A model's output head, or the module itself if it is one. Raises ValueError."""
    module = _not_fsdp(unwrapped(model_or_head))
    get_head: Any = getattr(module, "get_output_embeddings", None)
    if get_head is not None:
        head = get_head()
        if not isinstance(head, nn.Module):
            raise ValueError(f"{type(module).__name__} has no output head, so train_only_rows cannot take head=True")
        module = head
    return _below_adapters(module, "output head")


@dataclass(frozen=True)
class Part:
    """A parameter whose rows can be restricted: what it belongs to, its name there, and how a model gives it."""

    what: str
    name: str
    find: Callable[[nn.Module], nn.Module]


EMBEDDING = Part("embedding", "weight", embedding_of)
HEAD = Part("output head", "weight", head_of)
HEAD_BIAS = Part("output head", "bias", head_of)


def _not_fsdp(module: nn.Module) -> nn.Module:
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            "train_only_rows does not support FSDP; use DeepSpeed's ZeRO, DistributedDataParallel or one process"
        )
    return module


def _below_adapters(embedding: nn.Module, what: str) -> nn.Module:
    """The copy of a module that PEFT trains, if any. Raises ValueError for adapters that change every row."""
    if "peft" not in sys.modules:
        return embedding
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(embedding, ModulesToSaveWrapper):
        return embedding.modules_to_save[embedding.active_adapters[0]]
    if isinstance(embedding, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"an adapter ({type(embedding).__module__}.{type(embedding).__name__}) wraps the {what} and changes rows that "
            f"train_only_rows would freeze; remove the {what} from the adapter's target_modules or trainable tokens"
        )
    return embedding


def is_in_adapter_model(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether PEFT omits the embedding when it saves its adapter of this model."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    peft_model = unwrapped(model)
    return isinstance(peft_model, PeftModel) and peft_model.get_input_embeddings() is embedding


def weight_of(model_or_embedding: nn.Module, module: nn.Module, part: Part = EMBEDDING) -> nn.Parameter:
    """The weight (V, D) or bias (V,) of an embedding or head. Raises ValueError if its rows cannot be restricted."""
    name = type(module).__name__
    weight: Any = module._parameters.get(part.name)
    if weight is None:
        reason = (
            "is computed from other tensors (parametrized or wrapped)" if hasattr(module, part.name) else "is missing"
        )
        raise ValueError(
            f"train_only_rows needs a module with a (V, D) parameter `{part.name}`; that of {name} {reason}"
        )
    if is_dtensor(weight):
        raise ValueError(
            "train_only_rows does not support DTensor weights (FSDP2, tensor parallelism); use DeepSpeed's ZeRO, "
            "DistributedDataParallel or one process"
        )
    shape = full_shape(weight)
    if len(shape) != (1 if part.name == "bias" else 2) or not weight.is_floating_point():
        raise ValueError(
            f"train_only_rows needs a floating weight of shape (V, D); {name} has {tuple(shape)} in {weight.dtype}"
        )
    if weight.is_meta or not weight.is_contiguous():
        kind = "on the meta device" if weight.is_meta else "not contiguous"
        raise ValueError(f"train_only_rows needs a contiguous weight in memory; that of {name} is {kind}")
    if is_trainer_of(model_or_embedding) and not weight.requires_grad:
        raise ValueError(
            f"the {part.what} was frozen when {type(model_or_embedding).__name__} was created, which therefore does not train "
            "it; call train_only_rows before"
        )
    return weight


def is_dtensor(weight: Any) -> bool:
    """Whether a weight is spread over devices by torch itself: FSDP2, tensor parallelism."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)
