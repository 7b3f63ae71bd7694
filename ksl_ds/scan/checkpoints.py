"""A checkpoint by the names of its parameters: a model folder, or the base model with a LoRA adapter merged as it is read.

Names are the model's, so that files with and without transformers' prefix can be compared. Nothing is loaded as a whole.

Legend: O outputs, I inputs, r rank of an adapter.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ksl_ds.errors import UserError
from ksl_ds.files import Number, Record, checked, read_json
from ksl_ds.model.folder import ModelFolder, local_folder
from ksl_ds.model.safetensors_io import Shards

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
TRANSPOSED_EXPERTS = ("Llama4TextExperts",)  # (experts, inputs, outputs), and they do not say so as others do


class Checkpoint(Protocol):
    """What is read of a checkpoint. `names` are the model's, in no order."""

    path: Path

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        ...

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """The part of a tensor; may be a view of the mapped file."""
        ...


class ModelCheckpoint:
    """A model folder. A tied head is no tensor of its own, even where the files hold it."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        self.path = folder.path

    @cached_property
    def _stored(self) -> dict[str, str]:
        """The names in the files by the names in the model. Raises UserError where the embedding is missing."""
        folder = self.folder
        embedding = folder.embedding_name
        stored = {folder.parameter_name(name): name for name in folder.tensor_names}
        if folder.tied:
            stored.pop(str(self.head), None)
            stored[self.embedding] = embedding
        return stored

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.folder.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        return self.folder.dtype(self._stored[name])

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """The part of a tensor; may be a view of the mapped file."""
        return self.folder.read_slices(self._stored[name], slices)

    @property
    def embedding(self) -> str:
        """Name of the input embedding's weight."""
        return f"{self.folder.embedding_module}.weight"

    @property
    def head(self) -> str | None:
        """Name of the output head's weight; None if the model has none."""
        return self.folder.head_module and f"{self.folder.head_module}.weight"

    @property
    def buffers(self) -> set[str]:
        """Names of the tensors that are buffers."""
        return {name for name, stored in self._stored.items() if stored in self.folder.buffer_names}

    @cached_property
    def embeddings(self) -> set[str]:
        """The lookup tables: their rows are tokens or positions, which are inputs and have one row each."""
        return self._weights_of(nn.Embedding)

    @cached_property
    def conv1d(self) -> set[str]:
        """The weights of GPT-2's kind of linear layer, which are stored as (inputs, outputs)."""
        from transformers.pytorch_utils import Conv1D

        return self._weights_of(Conv1D)

    @cached_property
    def inputs_first(self) -> set[str]:
        """The matrices that are stored as (inputs, outputs), while nn.Linear's are (outputs, inputs)."""
        experts = {
            f"{prefix}.{name}"
            for prefix, module in self.folder.meta_model.named_modules()
            if getattr(module, "is_transposed", False) or type(module).__name__ in TRANSPOSED_EXPERTS
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        }
        return self.conv1d | experts

    def _weights_of(self, kind: type) -> set[str]:
        return {f"{name}.weight" for name, module in self.folder.meta_model.named_modules() if isinstance(module, kind)}


class AdapterConfig(Record):
    """The numbers of an adapter_config.json that scale LoRA's update; a module's rank is read off its tensors."""

    lora_alpha: Number
    alpha_pattern: dict[str, Number] = {}
    use_rslora: bool = False


# Of PEFT's LoraConfig: what makes the merged weight something else than W + scale * B @ A.
VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "megatron_config", "velora_config", "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip
# Others of PEFT's ways to start an adapter also change the base weights.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
MERGE_FIRST = "merge it with PEFT (merge_and_unload), save the model and give that folder"


class MergedAdapter:
    """The base model with a LoRA adapter: W + scale * B @ A in float32, rounded to W's dtype, as PEFT merges.

    Parameters
    ----------
    base : the model that the adapter is for
    path : the adapter's folder, with adapter_config.json and adapter_model.safetensors

    Raises
    ------
    UserError
        For an adapter that is not merged by this sum, and one that does not fit `base`.
    """

    def __init__(self, base: ModelCheckpoint, path: Path):
        self.path = path
        self._base = base
        self._config = _adapter_config(path)
        if not (path / ADAPTER_FILE).is_file():
            raise UserError(f"{path} is an adapter without {ADAPTER_FILE}; save it again with PEFT, as safetensors")
        self._file = _AdapterFile(path)
        self._updates: dict[str, str] = {}  # by parameter: what the names of its A and B begin with
        self._replaced: dict[str, str] = {}  # by parameter: the tensor that takes its place (modules_to_save, biases)
        for key in self._file.tensor_names:
            self._sort_in(key)
        for name, key in self._updates.items():
            self._check_update(name, key)

    def _sort_in(self, key: str) -> None:
        name = key.removeprefix("base_model.model.")
        update = re.fullmatch(r"(.+)\.lora_(embedding_)?[AB](\.weight)?", name)
        if update:
            self._updates[f"{update[1]}.weight"] = re.sub(r"[AB](\.weight)?$", "", key)
        elif ".lora_" in name:
            raise UserError(f"{self.path}: {key} is not a part of plain LoRA; {MERGE_FIRST}")
        else:
            self._replaced[name.replace(".base_layer.", ".")] = key

    def _check_update(self, name: str, key: str) -> None:
        if name not in self._base.names:
            raise UserError(f"{self.path}: {key}A adapts {name}, which {self._base.path} does not hold as one tensor")
        A_rI, B_Or = self._factors(name)
        shape = (B_Or.shape[0], A_rI.shape[-1])
        shape = shape[::-1] if self._is_transposed(name) else shape
        if A_rI.ndim != 2 or B_Or.ndim != 2 or A_rI.shape[0] != B_Or.shape[1] or self.shape(name) != shape:
            raise UserError(
                f"{self.path}: {key}A and B have shapes {tuple(A_rI.shape)} and {tuple(B_Or.shape)}, which do not fit {name} "
                f"of shape {self.shape(name)}; the adapter is for another model"
            )

    def _is_transposed(self, name: str) -> bool:
        return name in self._base.conv1d or self._of_embedding(name)

    def _of_embedding(self, name: str) -> bool:
        return self._updates[name].endswith("embedding_")

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        key = self._updates[name]
        ending = "" if self._of_embedding(name) else ".weight"
        A_rI, B_Or = (self._file.read_slices(f"{key}{letter}{ending}", (slice(None),)).float() for letter in "AB")
        return A_rI, B_Or

    def _scale(self, name: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        pattern = self._config.alpha_pattern
        alpha = pattern.get(get_pattern_key(list(pattern), name.removesuffix(".weight")), self._config.lora_alpha)
        return alpha / (rank**0.5 if self._config.use_rslora else rank)

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return self._base.names | self._replaced.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._file.shape(self._replaced[name]) if name in self._replaced else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, as in the base model."""
        return self._base.dtype(name if name in self._base.names else self._base.embedding)

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """The part of a tensor, with LoRA's update added."""
        if name in self._replaced:
            part = self._file.read_slices(self._replaced[name], slices).to(self.dtype(name))
        else:
            part = self._base.read(name, slices)
        if name not in self._updates:
            return part
        A_rI, B_Or = self._factors(name)
        rows, columns = (*slices, slice(None))[:2]
        delta = (B_Or[columns] @ A_rI[:, rows]).T if self._is_transposed(name) else B_Or[rows] @ A_rI[:, columns]
        delta = delta * self._scale(name, A_rI.shape[0])
        if self._of_embedding(name):
            delta = delta.to(part.dtype)  # PEFT rounds it here and, for linear layers, only the sum
        return (part + delta).to(part.dtype)


class _AdapterFile(Shards):
    def _read_index(self) -> dict[str, str]:
        return dict.fromkeys(self._file(ADAPTER_FILE).keys(), ADAPTER_FILE)


def _adapter_config(path: Path) -> AdapterConfig:
    """Raises UserError for an adapter of another kind."""
    file = path / ADAPTER_CONFIG
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    kind = content.get("peft_type")
    if kind == "TRAINABLE_TOKENS":
        raise UserError(
            f"{path} is a ticket or another adapter of single tokens, not LoRA; write a model with its rows by ksl-ds "
            "transfer and give that folder"
        )
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind}; only LoRA can be merged on the fly: {MERGE_FIRST}")
    for name in VARIANTS:
        if content.get(name):
            raise UserError(f"{file}: {name} is set, and such an adapter is not merged as plain LoRA; {MERGE_FIRST}")
    start = content.get("init_lora_weights")
    if start not in INITIALIZATIONS:
        raise UserError(f"{file}: init_lora_weights is {start}, which changes the base weights too; {MERGE_FIRST}")
    return AdapterConfig.model_validate(checked(content, AdapterConfig, str(file)))


def open_checkpoints(before: ModelFolder, after: str | Path) -> tuple[ModelCheckpoint, Checkpoint]:
    """Both sides of a scan: `after` is a model folder, a Hub id, or the folder of a LoRA adapter for `before`.

    Raises
    ------
    UserError
        For a folder that is neither, and for two architectures.
    """
    base = ModelCheckpoint(before)
    path = local_folder(after)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return base, MergedAdapter(base, path)
    tuned = ModelCheckpoint(ModelFolder(path, trust_remote_code=before.trust_remote_code))
    kinds = [folder.config.model_type for folder in (before, tuned.folder)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{before.path} is a {kinds[0]} and {path} a {kinds[1]}; only two checkpoints of one model can be compared"
        )
    return base, tuned
