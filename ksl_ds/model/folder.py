"""A local Hugging Face model folder: which tensor is the embedding, and writing a folder with other rows.

Choices and what they cost: names are found by building the architecture on the meta device and asking transformers how
it renames checkpoint tensors, so any causal model works, at the price of two calls into its loading code (the ones PEFT
uses). A written folder appears whole or not at all.

V tokens, D coordinates of an embedding row, K ticket rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksl_ds.errors import UserError
from ksl_ds.files import reason
from ksl_ds.lottery.ticket_files import whole_folder
from ksl_ds.model.shards import INDEX, SINGLE, Patch, Shards, link_or_copy, patch, write_shard

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
SIDE_FOLDER = "additional_chat_templates"
Added = tuple[torch.dtype, tuple[int, ...], Iterable[Tensor]]  # the blocks are the tensor, cut along its rows


def local_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A folder as it is; a Hub id through the Hub's cache (safetensors, JSON and tokenizer files only).

    Raises
    ------
    UserError
        Where there is no such folder and the Hub does not give one.
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
    except Exception as error:  # the Hub's client has a dozen kinds, from "no such repository" to "no network"
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path_or_hub_id} is no folder here and the Hub does not give it: {reason}") from None


def config_problem(error: Exception) -> str:
    """What transformers has against a config, in a line; code that it did not run is named with the key that allows it."""
    if "custom code" in str(error):
        return "the model needs Python code that it ships; read that code, then set model.trust_remote_code=true in a recipe"
    return str(error).strip().splitlines()[0]


class ModelFolder(Shards):
    """A folder with config.json and safetensors. Tensor names are the file's unless a method says otherwise.

    Raises
    ------
    UserError
        On opening: no folder, no config.json, no weights, only pickled weights. Later: a damaged or missing tensor.
    """

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False):
        self.trust_remote_code = trust_remote_code
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such model folder")
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        super().__init__(Path(path))

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"{self.path / 'config.json'}: {config_problem(error)}") from None

    @cached_property
    def meta_model(self) -> Any:
        """The architecture without weights, on the meta device."""
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import set_zero3_state

        try:
            # That state keeps transformers from partitioning this model where a ZeRO-3 configuration is alive.
            with torch.device("meta"), set_zero3_state():
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.path}: no causal language model: {str(error).strip().splitlines()[0]}") from None

    @cached_property
    def _rename(self) -> Callable[[str], str | None]:
        """From a tensor's name in files to the parameter's in the model; None for one that is fused or reshaped."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self.meta_model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        prefix, state = self.meta_model.base_model_prefix, self.meta_model.state_dict()

        def rename(stored: str) -> str | None:
            renamed, converted = rename_source_key(stored, renamings, converters, prefix, state)
            return renamed if converted is None and renamed in state else None

        return rename

    @cached_property
    def _stored_names(self) -> dict[str | None, str]:
        return {self._rename(name): name for name in self.shard_of}

    def stored_name(self, parameter_name: str) -> str | None:
        """The name in the files of a model's parameter; None where it is stored in another form, or not at all."""
        return self._stored_names.get(parameter_name)

    def new_name(self, parameter_name: str) -> str:
        """The name under which transformers would store a parameter that these files lack, such as an untied head."""
        from transformers.core_model_loading import revert_weight_conversion

        parameter = self.meta_model.get_parameter(parameter_name)
        name = next(iter(revert_weight_conversion(self.meta_model, {parameter_name: parameter})))
        return name if self._rename(name) == parameter_name else parameter_name

    @cached_property
    def embedding_module(self) -> str:
        """Name of the input embedding within the model, such as model.embed_tokens."""
        return self._module_name(self.meta_model.get_input_embeddings())

    @cached_property
    def head_module(self) -> str | None:
        """Name of the output head within the model, such as lm_head, tied or not."""
        head = self.meta_model.get_output_embeddings()
        return None if head is None else self._module_name(head)

    def _module_name(self, module: Any) -> str:
        return next(name for name, other in self.meta_model.named_modules() if other is module)

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix, as transformers decides: the config says so, the files agree."""
        embedding, head = self.meta_model.get_input_embeddings(), self.meta_model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
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
    def head_name(self) -> str | None:
        """The output head's name in the files; None when tied."""
        if self.tied or self.head_module is None:
            return None
        name = self.stored_name(f"{self.head_module}.weight")
        if name is None:
            raise UserError(f"{self.path}: the checkpoint lacks the output head {self.head_module}.weight")
        return name

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises UserError where there is none or the embedding is too small for it."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # transformers, tokenizers and sentencepiece raise whatever they like here
            raise UserError(f"{self.path}: the tokenizer does not load: {str(error).strip().splitlines()[0]}") from None
        rows = self.shape(self.embedding_name)[0]
        if len(tokenizer) > rows:
            raise UserError(
                f"{self.path}: its tokenizer has {len(tokenizer)} tokens, more than the {rows} rows of its embedding; "
                "use the tokenizer that belongs to the model"
            )
        return tokenizer


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The tokenizer's raw pieces; "" for rows of a padded embedding that no token uses."""
    return [tokenizer.convert_ids_to_tokens(number) or "" if number < len(tokenizer) else "" for number in ids]


def write_model(
    base: ModelFolder, out: Path, replace: dict[str, Tensor], config_updates: dict[str, Any] | None = None
) -> None:
    """Writes `base` with other values for some tensors, in the dtype of the file.

    Parameters
    ----------
    replace : by name in the files; a name that `base` lacks (an untied head) is added in a shard of its own
    config_updates : keys of config.json to set, there and in a nested text_config that has them

    Raises
    ------
    UserError
        Where `out` exists, or a tensor has another shape than the one it replaces.
    """
    for name, tensor in replace.items():
        if name in base.shard_of and tuple(tensor.shape) != base.shape(name):
            raise UserError(f"{name} has shape {base.shape(name)} in {base.path}, not {tuple(tensor.shape)}")
    patches = {name: [(0, tensor)] for name, tensor in replace.items() if name in base.shard_of}
    added: dict[str, Added] = {
        name: (tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in replace.items() if name not in patches
    }
    _write(base, out, patches, added, config_updates or {})


def write_model_with_rows(base: ModelFolder, out: Path, ids: list[int], rows_KD: Tensor, scope: str) -> None:
    """Writes `base` with the embedding rows `ids` replaced by `rows_KD`, cast to the dtype of the file.

    A tied base with scope "input" becomes an untied model whose head holds the old embedding; with "shared" head and
    embedding stay one. Raises UserError where `out` exists.
    """
    name, width = base.embedding_name, base.shape(base.embedding_name)[1]
    rows = [(number * width, row_D) for number, row_D in zip(ids, rows_KD, strict=True)]
    patches: dict[str, list[Patch]] = {name: rows}
    added: dict[str, Added] = {}
    config_updates: dict[str, Any] = {}
    if base.tied:
        in_model = [f"{module}.weight" for module in (base.embedding_module, base.head_module)]
        in_files = [base.stored_name(parameter) for parameter in in_model]
        if scope == "shared":
            patches = {stored: rows for stored in in_files if stored is not None}
        else:
            config_updates = {"tie_word_embeddings": False}
            names = [stored or base.new_name(parameter) for stored, parameter in zip(in_files, in_model, strict=True)]
            patches = {names[0]: rows}
            # The one that the files lack becomes a copy of the other, in a shard of its own.
            added = {
                lacking: (base.dtype(name), base.shape(name), base.blocks(name))
                for lacking in names
                if lacking not in base.shard_of
            }
    _write(base, out, patches, added, config_updates)


def _write(
    base: ModelFolder,
    out: Path,
    patches: dict[str, list[Patch]],
    added: dict[str, Added],
    config_updates: dict[str, Any],
) -> None:
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; choose another folder to write the model to")
    shards = sorted(set(base.shard_of.values()))
    total = len(shards) + len(added)
    numbered = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    new_names = numbered if added else shards
    new_name_of = dict(zip([*shards, *added], new_names, strict=True))
    shard_of = {name: new_name_of[shard] for name, shard in base.shard_of.items()}
    shard_of |= {name: new_name_of[name] for name in added}
    try:
        with whole_folder(out) as draft:
            for shard in shards:
                changed = any(shard_of.get(name) == new_name_of[shard] for name in patches)
                link_or_copy(base.path / shard, draft / new_name_of[shard], link=not changed)
            for name, (dtype, shape, blocks) in added.items():
                write_shard(draft / new_name_of[name], name, dtype, shape, blocks)
            for name, changes in patches.items():
                patch(draft / shard_of[name], name, changes)
            if new_names != [SINGLE]:
                _write_index(draft / INDEX, base, shard_of, added)
            _copy_side_files(base.path, draft, config_updates)
    except OSError as error:
        raise UserError(f"{out} could not be written: {reason(error)}") from None


def _write_index(path: Path, base: ModelFolder, shard_of: dict[str, str], added: dict[str, Added]) -> None:
    sizes = [(torch.Size(base.shape(name)).numel(), base.dtype(name)) for name in base.shard_of]
    sizes += [(torch.Size(shape).numel(), dtype) for dtype, shape, _ in added.values()]
    metadata = {
        "total_parameters": sum(count for count, _ in sizes),
        "total_size": sum(count * dtype.itemsize for count, dtype in sizes),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(shard_of.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(source: Path, target: Path, config_updates: dict[str, Any]) -> None:
    """Config, tokenizer, generation config, model card, code: all but weights and hidden files."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
    if (source / SIDE_FOLDER).is_dir():
        shutil.copytree(source / SIDE_FOLDER, target / SIDE_FOLDER)
    if config_updates:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section.update(config_updates)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
