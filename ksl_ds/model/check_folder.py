"""Whether a folder can hold a model that ksl_ds trains, told from its small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ksl_ds.errors import UserError, reason_of

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def needs_code(error: Exception) -> bool:
    """Whether transformers' error for a config says that it takes custom code."""
    return "custom code" in str(error)


def config_problem(error: Exception) -> str:
    """Transformers' error for a config, in a line; for custom code, the key that allows it."""
    if needs_code(error):
        return "the model needs its own Python code; read that code, then set model.trust_remote_code=true in a recipe"
    return reason_of(error)


def check_folder(path: Path) -> None:
    """Checks from the small files that a folder holds a full causal language model.

    Raises
    ------
    UserError
        For git-LFS pointers, an adapter instead of a model or beside it, an invalid config.json, quantised weights, and an
        encoder-decoder.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder")
    for file in sorted(path.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{file} is a git-LFS pointer, not the file itself; run `git lfs pull` in {path}")
    has_adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        if has_adapter:
            raise UserError(
                f"{path} is an adapter, not a model: give its base model, or merge the two first (ksl-ds transfer for a "
                "ticket, PEFT's merge_and_unload for other adapters)"
            )
        raise UserError(f"{path} is not a model folder: it has no config.json")
    if has_adapter:
        raise UserError(
            f"{path} holds adapter_config.json beside a model, and transformers would apply that adapter; "
            "merge the adapter into the model, or move its files elsewhere"
        )
    check_config_json(path / "config.json")


def check_config_json(file: Path) -> None:
    """Raises UserError for an invalid config.json, a quantised model and an encoder-decoder."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {reason_of(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a model's configuration: it is not a JSON object")
    sections = [config, config.get("text_config")]
    for section in sections:
        if not isinstance(section, dict):
            continue
        quantised = next((key for key in ("quantization_config", "compression_config") if section.get(key)), None)
        if quantised:
            raise UserError(f"{file}: {quantised}: quantised folders are not supported; give the 16-bit model")
        if section.get("is_encoder_decoder"):
            raise UserError(
                f"{file}: is_encoder_decoder: encoder-decoders are not supported; give a decoder-only language model"
            )


def check_is_decoder(config: Any, where: str | Path) -> None:
    """Raises UserError for encoder-decoders, also if only their class says so, and for bidirectional encoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.is_encoder_decoder:
        raise UserError(f"{where}: {config.model_type}: encoder-decoders are not supported; give a decoder-only model")
    text = config.get_text_config()
    is_encoder = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and hasattr(text, "is_decoder")
    bidirectional = getattr(text, "use_bidirectional_attention", None)
    if (is_encoder and not text.is_decoder) or bidirectional is True or bidirectional == "all":
        key = "use_bidirectional_attention" if bidirectional else "is_decoder"
        raise UserError(
            f"{where}: {text.model_type} is a bidirectional encoder here ({key}: {getattr(text, key)}), which sees the "
            "tokens that it should predict; give a decoder-only language model"
        )
