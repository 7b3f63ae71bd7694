"""Prompts as text and as tokens, with tokenizers of the kinds that models come with."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import SENTENCES, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ksl_ds.errors import UserError
from ksl_ds.text.corpus import Pair
from ksl_ds.text.prompt import AT_ONCE, CHAT_MESSAGE, TEMPLATES, Prompt

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = [*TEMPLATES.values(), CHAT_MESSAGE, *(sentence for pair in SENTENCES for sentence in pair)] * 3


def bos(template: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])


def wrapped(core: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings
    )


def byte_level(ends: str = "$A") -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3, Qwen: a word's space is its first byte."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    core.post_processor = bos(ends)
    return wrapped(core)


def sentencepiece(ends: str = "<s> $A") -> PreTrainedTokenizerFast:
    """As of Llama 2 and Mistral: every text gets a space piece in front, so that " Le" alone starts with two."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *fallback]))
    core.post_processor = bos(ends)
    return wrapped(core)


TOKENIZERS = {"bytes": byte_level(), "pieces": sentencepiece(), "words": make_tokenizer()}
KINDS = pytest.mark.parametrize("kind", list(TOKENIZERS))


def prompt_of(template: str = "plain", tokenizer=TOKENIZERS["bytes"]) -> Prompt:
    return Prompt(template, "English", "French", tokenizer)


# --- as text ---


def test_plain_is_the_papers_wording():
    assert prompt_of().render("A cat.") == (
        "Translate the following sentence from English to French.\nEnglish: A cat.\nFrench:"
    )


def test_alpaca():
    text = prompt_of("alpaca").render("A cat.")
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith(
        "### Instruction:\nTranslate the following sentence from English to French.\n\n### Input:\nA cat.\n\n### Response:"
    )


def test_chat_is_the_tokenizers_own():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    assert prompt_of("chat", tokenizer).render("A cat.") == (
        "<|im_start|>user\nTranslate the following sentence from English to French.\nA cat.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_prompts_are_the_same_every_day_and_ask_for_no_thinking():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{{ strftime_now('%d %b %Y') }}{% else %}{{ date_string }}{% endif %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    assert prompt_of("chat", tokenizer).render("A cat.") == "26 Jul 2024<think></think>"


def test_braces_of_sentence_and_template_stay():
    prompt = prompt_of('{"to": "{target_language}", "text": "{source}", "again": ["{source}"], "x": {}, {a b}}')
    sentence = "a {source} {target_language} {0}"
    assert (
        prompt.render(sentence)
        == f'{{"to": "French", "text": "{sentence}", "again": ["{sentence}"], "x": {{}}, {{a b}}}}'
    )


def test_a_space_at_the_end_of_a_template_belongs_to_the_response():
    own, plain = prompt_of("{source} = "), prompt_of("{source} =")
    assert own.render("A cat.") == "A cat. ="
    assert own.encode([Pair("a cat", "un chat")]) == plain.encode([Pair("a cat", "un chat")])


@pytest.mark.parametrize("template", ["palin", "Translate {sentence}", "", "{Source}"])
def test_a_template_without_source(template):
    with pytest.raises(UserError, match="it must be plain, alpaca, chat, or a text that contains {source}"):
        prompt_of(template)


def test_a_name_that_nothing_fills_in():
    with pytest.raises(
        UserError, match="contains {target}, which nothing fills in; it may contain {source}, {source_lang"
    ):
        prompt_of("{source} => {target}")


def test_chat_without_chat_template_and_a_tokenizer_without_end():
    with pytest.raises(UserError, match="no chat template; use plain or alpaca"):
        prompt_of("chat")
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        prompt_of("plain", endless)


# --- as tokens ---


@KINDS
@pytest.mark.parametrize("template", ["plain", "alpaca", "{source} =>", "{target_language}\n{source}\n", "{source}"])
def test_training_and_generation_see_the_same_prompt_and_every_response_ends(kind, template):
    prompt = prompt_of(template, TOKENIZERS[kind])
    pairs = [Pair(*pair) for pair in SENTENCES]
    for pair, example in zip(pairs, prompt.encode(pairs), strict=True):
        assert example.prompt_ids == prompt.encode_source(pair.source)
        assert example.prompt_ids == TOKENIZERS[kind](prompt.render(pair.source)).input_ids
        assert example.response_ids[-1] == 2 and 2 not in example.response_ids[:-1]
        assert 2 not in example.prompt_ids


@KINDS
@pytest.mark.parametrize("template", ["plain", "alpaca", "{source} =>", "{target_language}\n{source}\n", "{source}"])
def test_prompt_and_response_together_are_the_tokens_of_the_whole_text(kind, template):
    # What a pretrained model knows: no piece at the boundary that running text would not have there.
    tokenizer = TOKENIZERS[kind]
    prompt = prompt_of(template, tokenizer)
    for source, target in SENTENCES:
        (example,) = prompt.encode([Pair(source, target)])
        text = prompt.render(source)
        whole = tokenizer(text + ("" if text.endswith("\n") else " ") + target).input_ids
        assert example.prompt_ids + example.response_ids[:-1] == whole


def test_sentencepiece_puts_no_second_space_before_the_first_word():
    pieces = TOKENIZERS["pieces"]
    (example,) = prompt_of("plain", pieces).encode([Pair("the cat", "chat")])
    alone = pieces(" chat", add_special_tokens=False).input_ids
    assert pieces.convert_ids_to_tokens(alone)[0] == "▁" and alone[1:] == example.response_ids[:-1]
    assert pieces.decode(example.response_ids, skip_special_tokens=True) == "chat"


def test_a_token_that_would_span_the_boundary_is_never_used():
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, ":": 3, "a": 4, " a": 5, ": a": 6, " ": 7, ": ": 8}
    merges = [(" ", "a"), (":", " a"), (":", " ")]
    tokenizer = wrapped(Tokenizer(models.BPE(words, merges, unk_token="<unk>")))
    assert tokenizer(": a").input_ids == [6]
    (example,) = prompt_of("{source}:", tokenizer).encode([Pair("a", "a")])
    assert (example.prompt_ids, example.response_ids) == ([4, 3], [5, 2])


@pytest.mark.parametrize("ends", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_begin_token_once_and_no_end_token_in_a_prompt(ends, make):
    (example,) = prompt_of("plain", make(ends)).encode([Pair("the cat", "le chat")])
    assert example.prompt_ids.count(1) == ends.count("<s>") == (example.prompt_ids[0] == 1)
    assert 2 not in example.prompt_ids
    assert example.response_ids.count(2) == 1 and 1 not in example.response_ids


def test_chat_has_one_begin_token_and_the_templates_own_space_before_the_answer():
    tokenizer = sentencepiece("<s> $A </s>")
    tokenizer.chat_template = LLAMA_2
    prompt = prompt_of("chat", tokenizer)
    (example,) = prompt.encode([Pair("the cat", "le chat")])
    assert example.prompt_ids == prompt.encode_source("the cat")
    assert example.prompt_ids[:2] == tokenizer.convert_tokens_to_ids(["<s>", "[INST]"])
    assert example.prompt_ids.count(1) == 1 and example.prompt_ids[-1] == tokenizer.convert_tokens_to_ids("[/INST]")
    turns = [
        {"role": "user", "content": prompt_of(CHAT_MESSAGE).render("the cat")},
        {"role": "assistant", "content": "le chat"},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == prompt.render("the cat") + " le chat </s>"
    assert tokenizer.convert_ids_to_tokens(example.response_ids)[0].startswith("▁l")


def test_chatml_answers_start_without_a_space():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    (example,) = prompt_of("chat", tokenizer).encode([Pair("the cat", "le chat")])
    assert tokenizer.decode(example.response_ids) == "le chat</s>"
    assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")


def test_many_pairs_are_encoded_as_each_alone():
    prompt = prompt_of()
    pairs = [Pair(f"number {index}", f"nombre {index}") for index in range(2 * AT_ONCE + 1)]
    together = prompt.encode(pairs)
    assert len(together) == len(pairs)
    for index in (0, AT_ONCE - 1, AT_ONCE, 2 * AT_ONCE):
        assert [together[index]] == prompt.encode([pairs[index]])


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@given(target=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_any_response_can_be_read_back(kind, target):
    tokenizer = TOKENIZERS[kind]
    assume("▁" not in target and not any(token in target for token in SPECIAL))
    (example,) = prompt_of("plain", tokenizer).encode([Pair("a", target)])
    assert tokenizer.decode(example.response_ids[:-1]).strip() == target
