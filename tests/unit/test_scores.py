"""Scores are what `sacrebleu` prints for the files left behind; hypotheses come in order and as the model wrote them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.tiny import SENTENCES, SHAPES, make_model_folder, make_tokenizer, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from ksl_ds.config.schema import Evaluation
from ksl_ds.errors import UserError
from ksl_ds.text import scores as scores_module
from ksl_ds.text.prompt import Prompt
from ksl_ds.text.scores import Scores, check_tokenizer, first_line, score, write_translations
from ksl_ds.text.translate import translate

REFERENCES = [
    "Le chat voit le chien dans la maison.",
    "Vraiment\u202f? Oui, « vraiment »\u00a0!",
    "Il y a 12,5 % de la population.",
    "La page a été\tdéplacée\u2028hier soir.",
    "Ils ouvrent la vieille porte.",
    "Un oiseau mange du pain.",
    "L'enfant lit un livre ce soir.",
]
# What untuned models write: several lines, nothing, tabs, all of Unicode's line ends, spaces around.
HYPOTHESES = [
    "Le chat voit le chien dans la maison.\nEnglish: The dog sleeps.\nFrench: Le chien dort.",
    "Vraiment\u202f? Oui, « vraiment »\u00a0!",
    "",
    "La page\ta été\u2028déplacée\x0bhier\x85soir\x1c.",
    "  \n\n Ils ouvrent la porte. \r\nIls ouvrent\rla vieille porte.\n",
    "\n \t\n",
    "L&apos;enfant lit un livre ce soir .",
]
STOPPED = [False, True, True, True, False, True, True]
LENGTHS = [30, 9, 0, 12, 20, 1, 9]


def scored(tokenize: str = "13a") -> Scores:
    return score(HYPOTHESES, REFERENCES, STOPPED, LENGTHS, tokenize)


def by_hand(folder: Path, hypotheses: str, *options: str) -> dict:
    """What the command line of sacrebleu says about two of the files, in full precision."""
    command = [sys.executable, "-m", "sacrebleu", "references.txt", "-i", hypotheses, "-w", "12", *options]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "translations" / "untuned"
    write_translations(folder, [f"source\n{index}" for index in range(len(REFERENCES))], REFERENCES, HYPOTHESES)
    return folder


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "none"])
def test_bleu_is_that_of_the_command_line(folder, tokenize):
    ours = scored(tokenize)
    whole = by_hand(folder, "hypotheses.txt", "-m", "bleu", "--tokenize", tokenize)
    assert ours.bleu == pytest.approx(whole["score"], abs=1e-9)
    assert ours.signatures["bleu"] == whole["signature"] and f"tok:{tokenize}" in whole["signature"]
    first = by_hand(folder, "hypotheses_first_line.txt", "-m", "bleu", "--tokenize", tokenize)
    assert ours.first_line_bleu == pytest.approx(first["score"], abs=1e-9)
    assert ours.bleu != ours.first_line_bleu and 0 < ours.bleu < 100


def test_chrf_is_that_of_the_command_line(folder):
    ours = scored()
    whole = by_hand(folder, "hypotheses.txt", "-m", "chrf", "--chrf-word-order", "2")
    assert whole["name"] == "chrF2++"
    assert ours.chrf == pytest.approx(whole["score"], abs=1e-9)
    assert ours.signatures["chrf"] == whole["signature"]


def test_stop_rate_and_length():
    assert scored().stop_rate == 5 / 7
    assert scored().output_length == sum(LENGTHS) / 7


def test_files_have_a_line_a_sentence_in_every_readers_eyes(folder):
    assert {path.name for path in folder.iterdir()} == {
        "sources.txt",
        "references.txt",
        "hypotheses.txt",
        "hypotheses_first_line.txt",
    }
    for path in folder.iterdir():
        text = path.read_bytes().decode("utf-8")
        assert text.count("\n") == len(text.splitlines()) == len(REFERENCES) and text.endswith("\n")
        assert "\t" not in text
    lines = (folder / "hypotheses.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0].endswith("maison. English: The dog sleeps. French: Le chien dort.")
    assert lines[1] == "Vraiment\u202f? Oui, « vraiment »\u00a0!"
    assert lines[2] == lines[5] == ""
    assert lines[4] == "Ils ouvrent la porte. Ils ouvrent la vieille porte."
    assert (folder / "sources.txt").read_text(encoding="utf-8").startswith("source 0\nsource 1\n")


@pytest.mark.parametrize(
    "text, line",
    [
        ("a b\nc", "a b"),
        ("\n\n a\tb \nc", "a b"),
        ("a\r\nb", "a"),
        ("a\u2028b", "a"),
        ("", ""),
        (" \n ", ""),
        ("Oui\u00a0!", "Oui\u00a0!"),
    ],
)
def test_first_line(text, line):
    assert first_line(text) == line


# --- tokenizers of sacrebleu ---


@pytest.mark.parametrize("tokenize", ["13a", "intl", "zh", "char", "none"])
def test_tokenizers_that_need_nothing(tokenize):
    check_tokenizer(tokenize)


def test_an_unknown_tokenizer_is_told_the_known_ones():
    with pytest.raises(UserError, match="evaluation.tokenize is '13b'; sacrebleu has 13a, .*flores101, flores200.*zh"):
        check_tokenizer("13b")


class NoNetwork:
    def __init__(self, failure: BaseException):
        self.failure = failure

    def __call__(self, *words, **more):
        self.patience = socket.getdefaulttimeout()
        raise self.failure


@pytest.mark.parametrize("tokenize", ["flores101", "flores200"])
@pytest.mark.parametrize("failure", [OSError("Name or service\nnot known"), SystemExit(1)])
def test_spbleu_without_network_says_what_to_do(monkeypatch, tmp_path, tokenize, failure):
    from sacrebleu.tokenizers import tokenizer_spm

    network = NoNetwork(failure)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", network)
    with pytest.raises(UserError) as caught:
        check_tokenizer(tokenize)
    message = str(caught.value)
    assert message.startswith(f"sacrebleu cannot set up evaluation.tokenize={tokenize}: ") and "\n" not in message
    file = {"flores101": "sacrebleu_tokenizer_spm.model", "flores200": "flores200sacrebleuspm"}[tokenize]
    assert "; download https://" in message
    assert message.endswith(f" as {tmp_path / 'models' / file}, or use evaluation.tokenize=13a")
    assert network.patience == scores_module.DOWNLOAD_SECONDS and socket.getdefaulttimeout() is None


def test_a_broken_tokenizer_model_is_a_mistake_too(monkeypatch, tmp_path):
    from sacrebleu.tokenizers import tokenizer_spm

    (tmp_path / "models").mkdir()
    for model in tokenizer_spm.SPM_MODELS.values():
        (tmp_path / "models" / Path(model["url"]).name).write_bytes(b"half of it")
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(
        UserError, match="cannot set up evaluation.tokenize=flores200: .*; replace /.* by https://.*13a"
    ):
        check_tokenizer("flores200")


def test_a_tokenizer_model_put_there_by_hand_serves_both(folder, monkeypatch, tmp_path):
    from sacrebleu.tokenizers import tokenizer_spm

    (tmp_path / "models").mkdir()
    words = [word for pair in SENTENCES for sentence in pair for word in sentence.split()]
    with (tmp_path / "models" / "flores200sacrebleuspm").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words * 9), model_writer=file, vocab_size=60, minloglevel=2
        )
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setenv("SACREBLEU", str(tmp_path))  # for the command
    check_tokenizer("flores200")
    ours, whole = scored("flores200"), by_hand(folder, "hypotheses.txt", "-m", "bleu", "--tokenize", "flores200")
    assert ours.bleu == pytest.approx(whole["score"], abs=1e-9) and ours.bleu != pytest.approx(scored().bleu)
    assert ours.signatures["bleu"] == whole["signature"] and "tok:flores200" in whole["signature"]


# --- translation, in one process ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts() -> list[list[int]]:
    prompt = Prompt("{source} :", "English", "French", make_tokenizer())
    return prompt.encode_sources([source for source, _ in SENTENCES])


def test_translations_come_in_the_order_of_the_text_whatever_the_batch(model):
    def texts(size: int, beams: int = 1) -> list:
        settings = Evaluation(batch_size=size, max_new_tokens=6, num_beams=beams)
        return translate(model, make_tokenizer(), prompts(), settings, partitioned=False, label="test")

    for beams in (1, 3):
        one_by_one = texts(1, beams)
        assert texts(5, beams) == one_by_one and len(one_by_one) == len(SENTENCES)
        assert len({translation.text for translation in one_by_one}) > 1
        assert all(translation.num_tokens == 6 or translation.stopped for translation in one_by_one)


NASTY = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.5,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[5], [6], [7], [8]],
    "suppress_tokens": list(range(2, 60)),
    "begin_suppress_tokens": list(range(60, 130)),
    "sequence_bias": [[[9], 50.0]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": [0, 9.0],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "min_length": 40,
    "min_new_tokens": 8,
    "max_length": 3,
    "max_time": 0.0,
    "stop_strings": ["a", "e"],
    "early_stopping": True,
    "length_penalty": -5.0,
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 5.0,
    "penalty_alpha": 0.6,
    "num_return_sequences": 2,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "prompt_lookup_num_tokens": 2,
    "dola_layers": "high",
    "assistant_early_exit": 1,
    "constraints": [1],
    "force_words_ids": [[5]],
    "low_memory": True,
    "cache_implementation": "static",
    "use_cache": False,
    "output_scores": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict_in_generate": True,
    "pad_token_id": 9,
    "bos_token_id": 9,
    "decoder_start_token_id": 9,
    "token_healing": True,
    "made_up": 1,
}


# What changes beams without an exception.
SEARCH = {"length_penalty": -5.0, "early_stopping": True, "num_return_sequences": 2}


@pytest.mark.parametrize("beams", [1, 3])
def test_no_setting_of_a_checkpoints_generation_config_changes_a_translation(model, beams):
    settings = Evaluation(batch_size=2, max_new_tokens=4, num_beams=beams)
    plain = translate(model, make_tokenizer(), prompts()[:2], settings, partitioned=False, label="test")
    own = model.generation_config
    try:
        one_by_one = [{name: value} for name, value in NASTY.items()] if beams == 1 else []
        for changes in [*one_by_one, SEARCH, NASTY]:
            model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
            for name, value in changes.items():
                setattr(model.generation_config, name, value)
            nasty = model.generation_config
            found = translate(model, make_tokenizer(), prompts()[:2], settings, partitioned=False, label="test")
            assert found == plain, changes
            assert model.generation_config is nasty
    finally:
        model.generation_config = own


def test_a_token_that_ends_the_answer_is_neither_text_nor_length(model, monkeypatch):
    # The model is made to say "le chat" and its end token, then anything.
    tokenizer = make_tokenizer()
    said = [*tokenizer("le chat").input_ids, 2, 9]
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1)
    )
    translations = translate(model, tokenizer, prompts()[:3], Evaluation(), partitioned=False, label="test")
    assert [(t.text, t.num_tokens, t.stopped) for t in translations] == [("le chat", 2, True)] * 3


def test_the_space_before_french_punctuation_stays(model, monkeypatch):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "Vraiment": 3, "▁?": 4}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([3, 4]) == "Vraiment?"
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[3, 4, 1]])], dim=1)
    )
    (translation,) = translate(model, tokenizer, [[2]], Evaluation(), partitioned=False, label="test")
    assert translation.text == "Vraiment ?"


# --- the shared beginning of prompts ---


def sharing_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(3, 134, (12,), generator=generator).tolist()
    return [beginning + torch.randint(3, 134, (size,), generator=generator).tolist() for size in (3, 9, 1, 6, 6, 2, 4)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", [*SHAPES, "qwen3", "gemma2", "gpt2"])
def test_a_beginning_computed_once_changes_no_token(architecture, beams):
    """Caches of sliding windows (Mistral's, Gemma 2's) are computed for every prompt instead, with the same answers."""
    model = random_model(architecture, 134, tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that answers differ
    positions = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: positions.append(inputs[0].numel())
    )
    evaluation = Evaluation(batch_size=4, num_beams=beams, max_new_tokens=12)
    found = {}
    computed = {}
    for shares in (False, True):
        positions.clear()
        found[shares] = translate(
            model,
            make_tokenizer(),
            sharing_prompts(),
            evaluation,
            partitioned=False,
            label="test",
            shares_prompt=shares,
        )
        computed[shares] = sum(positions)
    hook.remove()
    assert found[True] == found[False]
    assert len({translation.text for translation in found[True]}) > 1
    if architecture in ("llama", "qwen2", "gpt_neox", "opt"):
        # Two batches of 4 and 3 prompts, each with its beams: 12 positions for all of them.
        assert computed[False] - computed[True] == 12 * (7 * beams - 2)


def test_a_model_without_such_a_cache_computes_every_prompt():
    model = random_model("mamba", 134, tied=False)
    settings = Evaluation(batch_size=4, max_new_tokens=4)
    plain, shared = (
        translate(
            model, make_tokenizer(), sharing_prompts(), settings, partitioned=False, label="t", shares_prompt=shares
        )
        for shares in (False, True)
    )
    assert plain == shared
