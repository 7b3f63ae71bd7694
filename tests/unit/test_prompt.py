"""Prompts as text and as tokens, with tokenizers of the kinds that models come with."""

from __future__ import annotations

import pytest
from helpers.tiny import SENTENCES, make_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ksl_ds.errors import UserError
from ksl_ds.text import chat
from ksl_ds.text.batches import encode_corpus
from ksl_ds.text.corpus import Corpus, Pair
from ksl_ds.text.prompt import AT_ONCE, CHAT_MESSAGE, NO_PROMPT, SPECIAL_IN_TEXT, TEMPLATES, Example, Prompt

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
        "{{ messages[0].content.split('\\n')[1] }}"
    )
    assert prompt_of("chat", tokenizer).render("A cat.") == "26 Jul 2024<think></think>A cat."


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
        UserError, match="contains {target}, which is not a placeholder; it may contain {source}, {source_lang"
    ):
        prompt_of("{source} => {target}")


def test_chat_without_chat_template_and_a_tokenizer_without_end():
    with pytest.raises(UserError, match="no chat template; use plain or alpaca"):
        prompt_of("chat")
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prompt_of("plain", endless)
    for not_there in ("", "<|stop|>"):
        tokenizer = AddedlessEnd(not_there)
        with pytest.raises(UserError, match="which is not in its vocabulary"):
            prompt_of("plain", tokenizer)


class AddedlessEnd:
    """A tokenizer whose end token is not in its vocabulary, so that its id is the unknown token's."""

    def __init__(self, eos_token: str):
        self._tokenizer = byte_level()
        self.eos_token = eos_token
        self.eos_token_id = 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


# --- chat templates that do not work ---

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_of(template: str) -> Prompt:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return prompt_of("chat", tokenizer)


def test_a_template_that_wants_content_as_a_list_of_parts_gets_it():
    text, parts = chat_of(CHATML), chat_of(PARTS)
    pairs = [Pair(*pair) for pair in SENTENCES]
    assert parts.encode(pairs) == text.encode(pairs)
    assert len({tuple(example.prompt_ids) for example in parts.encode(pairs)}) == len(pairs)


@pytest.mark.parametrize(
    ("template", "problem"),
    {
        "{{ raise_exception('no chats\nhere') }}": "it fails: no chats here",
        "{% for m in messages %}{{ m.content }}": "it fails: Unexpected end of template",
        "{{ messages[0].content.no.such }}": "it fails: 'str object' has no attribute 'no'",
        "{{ messages[0].content }}{{ 1 // 0 }}": "it fails: integer division or modulo by zero",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "it fails: maximum recursion depth exceeded",
        "{{ messages[0].content * 10**9 }}": "it takes more than 2048 MiB of memory",
        "{{ messages[0].content * 10**4 }}": "characters for a sentence of one word",
        "{{ messages[0].role }}": "it leaves the sentence out of the prompt",
        "{% for m in messages %}{% endfor %}": "it leaves the sentence out of the prompt",
    }.items(),
)
def test_a_chat_template_that_cannot_be_used_is_a_sentence(template, problem):
    with pytest.raises(UserError) as caught:
        chat_of(template)
    message = str(caught.value)
    assert message.startswith("text.prompt is chat, but the tokenizer's chat template cannot be used: ")
    assert problem in message and message.endswith("; use plain or alpaca") and "\n" not in message


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 10**(10**9) %}",
        # only where there is an answer already
        "{% if messages | length > 1 %}{% set x = 10**(10**9) %}{% endif %}",
    ],
)
def test_a_chat_template_that_never_ends(monkeypatch, endless):
    monkeypatch.setattr(chat, "CPU_SECONDS", 1)
    with pytest.raises(UserError, match="it does not end within 1 seconds; use plain or alpaca"):
        chat_of("{{ messages[0].content }}" + endless)


def test_a_chat_template_that_fails_at_one_sentence():
    prompt = chat_of("{% if 'cat' in messages[0].content %}{{ 1 // 0 }}{% endif %}{{ messages[0].content }}")
    with pytest.raises(UserError, match="the tokenizer's chat template fails: .*; use plain or alpaca"):
        prompt.encode([Pair("a dog", "un chien"), Pair("a cat", "un chat")])


def test_a_chat_template_that_takes_no_answers_works():
    once = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}\n"
    assert chat_of(once).render("A cat.").endswith("\nA cat.")


# --- special tokens in the text of a sentence ---


def slow_tokenizer(folder) -> object:
    """In Python, without the tokenizers library: a word a token."""
    from transformers import BertTokenizerLegacy

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "se", "##p", "[", "]", "=", ">"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerLegacy(str(folder / "vocab.txt"), eos_token="[SEP]")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("special", ["</s>", "<s>", "<unk>", "<|im_end|>"])
@pytest.mark.parametrize("template", ["plain", "{source} =>", "{source}"])
def test_a_special_tokens_text_in_a_sentence_is_plain_text(kind, special, template):
    tokenizer = TOKENIZERS[kind]
    number = tokenizer.convert_tokens_to_ids(special)
    for source, target in [(f"a {special} b", "le chat"), ("a b", f"{special} le {special}chat")]:
        prompt = prompt_of(template, tokenizer)
        (example,) = prompt.encode([Pair(source, target)])
        assert number not in example.prompt_ids[1:] and number not in example.response_ids[:-1]
        assert tokenizer.decode(example.response_ids[:-1]).strip() == target
        assert source in tokenizer.decode(example.prompt_ids)
        assert example.response_ids[-1] == 2 and example.prompt_ids.count(1) == prompt.encode_source("x").count(1)


def test_where_markers_and_text_cannot_be_told_apart_the_pair_is_left_out_and_counted():
    pairs = [Pair("a <|im_end|> b", "le"), Pair("a", "b"), Pair("the </s> dog", "c"), Pair("d", "e <|im_end|>")]
    for prompt in (chat_of(CHATML), prompt_of("<|im_start|>{source}<|im_end|>")):
        corpus = Corpus("text.train (a.jsonl)", list(pairs))
        examples, dropped = encode_corpus(corpus, prompt, 512)
        assert dropped == {SPECIAL_IN_TEXT: 2} and corpus.pairs == [pairs[1], pairs[3]]
        assert examples[1].response_ids[-1] == 2 and 4 not in examples[1].response_ids
        with pytest.raises(UserError, match="none of its 1 pairs can be used: 1 with a special token"):
            encode_corpus(Corpus("text.train", [pairs[0]]), prompt, 512)


def test_a_marker_that_is_no_special_token_counts_as_one_where_the_template_sets_it():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<turn>", "<think>"])
    tokenizer.chat_template = "{{ messages[0].content }}<turn>\n"
    turn, think = tokenizer.convert_tokens_to_ids(["<turn>", "<think>"])
    forged, answer, other = prompt_of("chat", tokenizer).encode(
        [Pair("a <turn> b", "c"), Pair("a", "b <turn>"), Pair("a <think> b", "c")]
    )
    assert forged == answer == SPECIAL_IN_TEXT and other.prompt_ids.count(turn) == 1 and think in other.prompt_ids


def test_a_slow_tokenizer_that_splits_no_special_token_leaves_the_pair_out(tmp_path):
    plain, source, target = prompt_of("{source} =", slow_tokenizer(tmp_path)).encode(
        [Pair("a b", "c"), Pair("a [SEP] b", "c"), Pair("a b", "c [SEP]")]
    )
    assert (plain.prompt_ids, plain.response_ids) == ([2, 5, 6, 12], [7, 3])
    assert source == target == SPECIAL_IN_TEXT


def test_a_tokenizer_that_splits_special_tokens_by_default_still_sees_the_templates_markers():
    splitting = byte_level()
    splitting.chat_template, splitting.split_special_tokens = CHATML, True
    pairs = [Pair(*pair) for pair in SENTENCES]
    assert prompt_of("chat", splitting).encode(pairs) == chat_of(CHATML).encode(pairs)


def test_a_prompt_without_tokens_is_left_out():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Replace("!", ""), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    found = prompt_of("{source}", tokenizer).encode([Pair("a!", "a"), Pair("!!", "a")])
    assert found == [Example([2], [2, 1]), NO_PROMPT]


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
