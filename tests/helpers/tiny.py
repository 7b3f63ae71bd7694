"""Tiny random models with real tokenizers, as Hugging Face folders: what tests train and draw on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.write_folder import Changes, folder_writer

SENTENCES = [
    ("the cat sees the dog", "le chat voit le chien"),
    ("the dog sees the bird", "le chien voit l oiseau"),
    ("a bird eats bread", "un oiseau mange du pain"),
    ("the child reads a book", "l enfant lit un livre"),
    ("we drink cold water", "nous buvons de l eau froide"),
    ("they open the old door", "ils ouvrent la vieille porte"),
    ("the house is very small", "la maison est tres petite"),
    ("she writes a long letter", "elle ecrit une longue lettre"),
    ("the train leaves at noon", "le train part a midi"),
    ("my brother likes green apples", "mon frere aime les pommes vertes"),
    ("it rains on the city", "il pleut sur la ville"),
    ("the shop closes early today", "le magasin ferme tot aujourd hui"),
]

# Sizes named as each architecture's config names them.
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-and-character tokenizer over SENTENCES and the prompts; pad 0, unknown 1, end 2."""
    words = sorted({word for pair in SENTENCES for sentence in pair for word in sentence.split()})
    prompt_words = [*["Translate", "the", "following", "sentence", "from", "English", "to", "French", ".", ":"], "\n"]
    entries = ["<pad>", "<unk>", "</s>", *dict.fromkeys([*words, *prompt_words, *"abcdefghijklmnopqrstuvwxyz,!?'"])]
    core = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=" ", behavior="removed"),
            pre_tokenizers.Split(pattern="\n", behavior="isolated"),
            pre_tokenizers.Punctuation(),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def random_model(architecture: str, vocab_size: int, *, tied: bool, seed: int = 0, **sizes: int):
    """A model of ARCHITECTURE, a key of SHAPES or any other that takes Llama's sizes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        **{**SHAPES.get(architecture, LLAMA_LIKE), **sizes},
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


def make_model_folder(
    folder: Path,
    architecture: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **sizes: int,
) -> Path:
    """Writes a random model of ARCHITECTURE and its tokenizer, whose size is the default vocab_size."""
    tokenizer = make_tokenizer()
    model = random_model(architecture, vocab_size or len(tokenizer), tied=tied, seed=seed, **sizes).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, repeat: int = 1) -> Path:
    """SENTENCES as JSON lines with the columns source and target."""
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for _ in range(repeat) for s, t in SENTENCES))
    return path


def write_model(base: ModelFolder, out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes BASE with other values for some tensors, by their names in the files."""
    with folder_writer(base, out, Changes(rewritten=tensors)) as write:
        for name, values in tensors.items():
            write(name, 0, values)
