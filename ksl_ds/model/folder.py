"""A local Hugging Face model folder: which tensor is the embedding, and how a model's parameters are stored.

Choices and what they cost: names come from building the architecture on the meta device and from transformers' rules for
renaming checkpoint tensors, so any causal model works, at the price of a few calls into its loading code (which PEFT uses
too). `write_folder.py` writes folders.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksl_ds.errors import UserError, reason_of
from ksl_ds.files import read_json
from ksl_ds.hub import hub_reason
from ksl_ds.model.check_folder import check_folder, check_is_decoder, config_problem
from ksl_ds.model.safetensors_io import Shards

TOKENIZER = "tokenizer.json"  # tens of megabytes for large vocabularies
TOKENIZER_SIDES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIDE_FOLDER = "additional_chat_templates"


def local_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The path itself, or a Hub id's folder in the Hub's cache (safetensors, JSON and tokenizer files only).

    Raises
    ------
    UserError
        If there is no such folder and the download fails.
    """
    path = Path(path_or_hub_id)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_hub_id)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(path_or_hub_id),
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as error:  # the Hub's client has a dozen, from "no such repository" to "no network"
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{path_or_hub_id} is not a folder, and cannot be downloaded from the Hub{at}: "
            f"{hub_reason(error, str(path_or_hub_id))}"
        ) from None


def open_model(path: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelFolder:
    """The model folder of a path or Hub id, after `check`. Raises UserError."""
    folder = ModelFolder(local_folder(path, revision), trust_remote_code=trust_remote_code)
    folder.check()
    return folder


@dataclass(frozen=True)
class FileGroup:
    """Parameters that are written together, by name, and what they are called in the files.

    One parameter, under one name or several; or those that the files fuse or reshape, such as a layer's experts.
    """

    parameters: tuple[str, ...]
    stored: tuple[str, ...]
    is_fused: bool


class ModelFolder(Shards):
    """A folder with config.json and safetensors. Tensor names are the files' unless a method says otherwise.

    Raises
    ------
    UserError
        On opening: as `check_folder`, and for missing or pickled weights. Later: for a damaged or missing tensor, or a
        config that does not match the files.
    """

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False):
        self.trust_remote_code = trust_remote_code
        check_folder(Path(path))
        super().__init__(Path(path))

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # config classes may raise anything
            raise UserError(f"{self.path / 'config.json'}: {config_problem(error)}") from None
        check_is_decoder(config, self.path / "config.json")
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > len(self.shard_of):
            raise UserError(
                f"{self.path / 'config.json'}: num_hidden_layers is {layers}, but the files hold {len(self.shard_of)} tensors"
            )
        config.return_dict = True  # outputs are read by name
        return config

    @cached_property
    def meta_model(self) -> Any:
        """The architecture without weights, on the meta device."""
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import set_zero3_state

        try:
            # That state keeps transformers from partitioning this model while a ZeRO-3 configuration is alive.
            with torch.device("meta"), set_zero3_state():
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        except UserError:
            raise
        except Exception as error:  # impossible sizes and missing packages fail anywhere in a model's code
            raise UserError(
                f"{self.path / 'config.json'}: no causal language model can be built from it: {reason_of(error)}"
            ) from None

    def check(self) -> None:
        """Compares the shapes and dtypes in the files' headers with the model that config.json describes.

        Raises
        ------
        UserError
            If no model can be built from the config, and for the first tensor that does not match.
        """
        parameters = dict(self.meta_model.named_parameters(remove_duplicate=False))
        embedding = f"{self.embedding_module}.weight"
        config = self.path / "config.json"
        for name in sorted(parameters, key=lambda name: name != embedding):
            stored = self.stored_name(name)
            if stored is None:
                continue
            shape = self.shape(stored)
            expected = tuple(parameters[name].shape)
            if not self.dtype(stored).is_floating_point:
                raise UserError(f"{self.path}: {stored} holds {self.dtype(stored)}, not floating-point weights")
            if self.dtype(stored).itemsize == 1:
                raise UserError(
                    f"{self.path}: {stored} is FP8: quantised folders are not supported; give the 16-bit model"
                )
            if name == embedding and len(shape) == 2 and shape[1] == expected[1] and shape[0] != expected[0]:
                raise UserError(f"{config}: vocab_size is {expected[0]}, but {stored} has {shape[0]} rows in the files")
            if shape != expected:
                raise UserError(f"{config}: {stored} should have shape {expected}, but has {shape} in the files")
        self._check_names()

    def _check_names(self) -> None:
        """Raises UserError for stored tensors that the model does not have."""
        if self._unexpected_names:
            raise UserError(
                f"{self.path}: {len(self._unexpected_names)} tensors in the files do not belong to a "
                f"{self.config.model_type}, such as {min(self._unexpected_names)}; config.json describes another model"
            )

    @cached_property
    def _unexpected_names(self) -> set[str]:
        """Stored tensors that the model does not have and that transformers does not ignore either."""
        from transformers.utils.loading_report import LoadStateDictInfo

        unplaced = {name for name, (target, _) in self._targets.items() if target is None}
        info = LoadStateDictInfo(set(), unplaced, set(), [], {}, set())
        self.meta_model._adjust_missing_and_unexpected_keys(info)
        return info.unexpected_keys

    @cached_property
    def buffer_names(self) -> set[str]:
        """Stored tensors that training does not change: buffers, and those that transformers ignores on loading."""
        buffers = {name for name, _ in self.meta_model.named_buffers(remove_duplicate=False)}
        return {
            name
            for name, (target, _) in self._targets.items()
            if target in buffers or (target is None and name not in self._unexpected_names)
        }

    def parameter_name(self, stored_name: str) -> str:
        """The model's name of a stored tensor; the files' name if loading fuses or ignores it."""
        target, converted = self._targets[stored_name]
        return stored_name if target is None or converted else target

    @cached_property
    def _conversions(self) -> list[Any]:
        """Transformers' rules of renaming, fusing and reshaping for this architecture."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self.meta_model)

    @cached_property
    def _rename(self) -> Callable[[str], tuple[str | None, bool]]:
        """Maps a name in the files to the model's (None if it has none), and whether it is fused or reshaped."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = self._conversions
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        prefix = self.meta_model.base_model_prefix
        state = self.meta_model.state_dict()

        def rename(stored: str) -> tuple[str | None, bool]:
            renamed, converted = rename_source_key(stored, renamings, converters, prefix, state)
            return renamed if renamed in state else None, converted is not None

        return rename

    @cached_property
    def _targets(self) -> dict[str, tuple[str | None, bool]]:
        return {name: self._rename(name) for name in self.shard_of}

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Names in the files by parameter, without fused or reshaped ones."""
        return {target: name for name, (target, converted) in self._targets.items() if target and not converted}

    def stored_name(self, parameter_name: str) -> str | None:
        """A parameter's name in the files; None if it is stored fused or reshaped, or not at all."""
        return self._stored_names.get(parameter_name)

    def new_name(self, parameter_name: str) -> str:
        """The name under which transformers would store a parameter that is missing here, such as an untied head."""
        from transformers.core_model_loading import revert_weight_conversion

        parameter = self.meta_model.get_parameter(parameter_name)
        name = next(iter(revert_weight_conversion(self.meta_model, {parameter_name: parameter})))
        return name if self._rename(name) == (parameter_name, False) else parameter_name

    def file_groups(self, parameters: Iterable[str]) -> list[FileGroup]:
        """How the parameters of a whole model are written, by their names: in the files' names, forms and order.

        A tied matrix gets all of its names in the files. An untied head that is missing in the files is added.

        Raises
        ------
        UserError
            If the files have a form that transformers cannot write.
        """
        from transformers.core_model_loading import WeightConverter, apply_converters

        parameters = set(parameters)
        ends = {f"{self.embedding_module}.weight", f"{self.head_module}.weight"}
        groups = []
        fused = []
        for name in sorted(parameters):
            aliases = [name, *(other for other in self._aliases.get(name, ()) if other not in parameters)]
            stored = [known for known in map(self.stored_name, aliases) if known]
            if stored or name in ends:
                groups.append(FileGroup((name,), tuple(stored or [self.new_name(name)]), is_fused=False))
            else:
                fused.append(name)
        reverse = [rule.reverse_transform() for rule in reversed(self._used_conversions)]
        converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
        members: dict[str, list[str]] = {}
        for name in fused:
            members.setdefault(apply_converters(name, converters)[0], []).append(name)
        misfits = set()
        for names in members.values():
            made = self._unfused({name: self.meta_model.get_parameter(name) for name in names})
            groups.append(FileGroup(tuple(names), tuple(made), is_fused=True))
            misfits |= {name for name in made if name in self.shard_of and made[name].shape != self.shape(name)}
        written = {name for group in groups for name in group.stored}
        stored_parameters = {
            name for name, (target, converted) in self._targets.items() if converted or target in self._parameter_names
        }
        untied = {self.new_name(name) for name in ends} if self.tied else set()
        misfits |= (written - self.shard_of.keys() - untied) | (stored_parameters - written)
        if misfits:
            raise UserError(
                f"{self.path}: the files store {min(misfits)} in another form than transformers writes, so a fully "
                "tuned model cannot be saved; load the model with transformers, save it, and use that folder"
            )
        # New tensors, which get shards of their own, come last.
        return sorted(groups, key=lambda group: min((self.shard_of.get(name, "~"), name) for name in group.stored))

    def file_tensors(self, group: FileGroup, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of one of `file_groups`, by the files' names; fused tensors are split again."""
        if group.is_fused:
            return self._unfused({name: parameters[name] for name in group.parameters})
        return dict.fromkeys(group.stored, parameters[group.parameters[0]])

    def _unfused(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reverts the conversions of loading, only those that the files needed, as transformers does on a loaded model."""
        from transformers.core_model_loading import revert_weight_conversion

        model = copy.copy(self.meta_model)
        model._weight_conversions = self._used_conversions
        prefix = model.base_model_prefix
        tensors = {}
        for name, tensor in revert_weight_conversion(model, parameters).items():
            candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            tensors[next((known for known in candidates if known in self.shard_of), name)] = tensor
        return tensors

    @property
    def _used_conversions(self) -> list[Any]:
        """The rules that apply to a tensor of these files."""
        assert self._targets  # looking the names up marks them
        return [rule for rule in self._conversions if rule.was_used()]

    @cached_property
    def _parameter_names(self) -> set[str]:
        return {name for name, _ in self.meta_model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _aliases(self) -> dict[str, list[str]]:
        """By parameter, the other names of the same matrix; embedding and head only if tied in the files."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.meta_model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        embedding = f"{self.embedding_module}.weight"
        return {
            name: [other for other in group if other != name]
            for group in names.values()
            if self.tied or embedding not in group
            for name in group
        }

    @cached_property
    def embedding_module(self) -> str:
        """Module name of the input embedding, such as model.embed_tokens."""
        return self._module_name(self.meta_model.get_input_embeddings())

    @cached_property
    def head_module(self) -> str | None:
        """Module name of the output head, such as lm_head, tied or not; None if there is none."""
        head = self.meta_model.get_output_embeddings()
        return None if head is None else self._module_name(head)

    def _module_name(self, module: Any) -> str:
        return next(name for name, other in self.meta_model.named_modules() if other is module)

    @cached_property
    def config_ties(self) -> bool:
        """Whether the architecture ties embedding and head under this config, regardless of the files."""
        head = self.meta_model.get_output_embeddings()
        return head is not None and head.weight is self.meta_model.get_input_embeddings().weight

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix, as in transformers: by the config, and equal in the files."""
        if not self.config_ties:
            return False
        names = [self.stored_name(f"{module}.weight") for module in (self.embedding_module, self.head_module)]
        if None in names:
            return True
        left, right = (self.blocks(str(name)) for name in names)
        return all(torch.equal(*pair) for pair in zip(left, right, strict=True))

    @cached_property
    def embedding_name(self) -> str:
        """The embedding's name in the files."""
        name = self.stored_name(f"{self.embedding_module}.weight")
        if name is None and self.tied:  # some tied checkpoints store the matrix under the head's name
            name = self.stored_name(f"{self.head_module}.weight")
        if name is None:
            raise UserError(f"{self.path}: the checkpoint lacks the input embedding {self.embedding_module}.weight")
        return name

    @cached_property
    def end_ids(self) -> list[int]:
        """End-of-sequence token ids of generation_config.json, or of config.json if that file is missing.

        Ids without an embedding row are dropped, since the model cannot generate them.
        """
        path = self.path / "generation_config.json"
        path = path if path.exists() else self.path / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(settings, dict):
            raise UserError(f"{path} must hold a JSON object, not {json.dumps(settings)[:60]}")
        nested = settings.get("text_config")
        found = settings.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
        if found is None:
            return []
        ids = found if isinstance(found, list) else [found]
        if not all(type(number) is int for number in ids):
            raise UserError(
                f"{path}: eos_token_id is {json.dumps(found)[:60]}; it must be a token id or a list of token ids"
            )
        rows = self.shape(self.embedding_name)[0]
        return [number for number in ids if 0 <= number < rows]

    @cached_property
    def positions(self) -> int | None:
        """Size of the model's position table, as in GPT-2 and OPT; None for a model without such a limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return None
        embedding = self.meta_model.get_input_embeddings()
        # OPT and BioGPT keep spare rows in front.
        learned = (
            module.num_embeddings - getattr(module, "offset", 0)
            for module in self.meta_model.modules()
            if isinstance(module, torch.nn.Embedding) and module is not embedding
        )
        computed = (buffer.shape[0] for buffer in self.meta_model.buffers() if buffer.dim() == 2)  # GPT-J, CTRL
        return limit if limit in (*learned, *computed) else None

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises UserError if it does not load or has more tokens than the embedding rows."""
        from transformers import AutoTokenizer

        for name in TOKENIZER_SIDES:
            self._check_tokenizer_file(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # transformers, tokenizers and sentencepiece may raise anything
            self._check_tokenizer_file(TOKENIZER)  # for a better message
            raise UserError(f"{self.path}: the tokenizer does not load: {reason_of(error)}") from None
        rows = self.shape(self.embedding_name)[0]
        largest = largest_id(tokenizer)
        if largest >= rows:
            raise UserError(
                f"{self.path}: the tokenizer has {len(tokenizer)} tokens with ids up to {largest}, more than the embedding's "
                f"{rows} rows; use the model's own tokenizer"
            )
        return tokenizer

    def _check_tokenizer_file(self, name: str) -> None:
        """Raises UserError for a file that is not a JSON object."""
        file = self.path / name
        if file.is_file() and not isinstance(read_json(file), dict):
            raise UserError(f"{file} belongs to a tokenizer and must hold an object, {{...}}; download it again")


def largest_id(tokenizer: Any) -> int:
    """A tokenizer's largest id, which exceeds its length if ids have gaps."""
    return max(tokenizer.get_vocab().values())


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The tokenizer's raw pieces of `ids`; "" for padding rows of the embedding."""
    largest = largest_id(tokenizer)
    return [tokenizer.convert_ids_to_tokens(number) or "" if number <= largest else "" for number in ids]


def check_same_model(before: ModelFolder, after: ModelFolder) -> None:
    """Raises UserError unless the two folders hold the same model before and after tuning."""
    shapes = [folder.shape(folder.embedding_name) for folder in (before, after)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{before.path} has an embedding of shape {shapes[0]} and {after.path} one of {shapes[1]}; "
            "only two checkpoints of one model can be compared"
        )
    vocabularies = [folder.tokenizer().get_vocab() for folder in (before, after)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(f"{before.path} and {after.path} have different tokenizers; their tokens cannot be compared")
