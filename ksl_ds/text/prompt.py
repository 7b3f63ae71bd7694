"""Prompts: how a sentence is put to the model.

Choices and what they cost:
- Prompt and response become tokens apart, so that training and generation see the same prompt ids; no token ever spans the
  boundary. The response is tokenized behind the prompt's last character, since tokenizers of the SentencePiece family
  would otherwise put a space piece of its own before the first word, which no pretrained model expects there.
- The space between prompt and response belongs to the response, as in any word within a text, even when the user's
  template ends with one: a prompt that ends with a space asks the model to continue from a token it hardly knows.
- Chat prompts name no date and ask for no thinking aloud, so that they are the same on every day.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from ksl_ds.errors import UserError
from ksl_ds.text.batches import Example
from ksl_ds.text.corpus import Pair

TEMPLATES = {
    "plain": "Translate the following sentence from {source_language} to {target_language}.\n"
    "{source_language}: {source}\n{target_language}:",
    # The Alpaca template, as the KS-Lottery authors' code for a sister paper uses it.
    "alpaca": "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nTranslate the following "
    "sentence from {source_language} to {target_language}.\n\n### Input:\n{source}\n\n### Response:",
}
CHAT_MESSAGE = "Translate the following sentence from {source_language} to {target_language}.\n{source}"
FILLED_IN = ("{source}", "{source_language}", "{target_language}")
# Read by the templates of Llama 3 (which would take today's date) and Qwen 3, ignored by all others.
CHAT_SETTINGS = {"date_string": "26 Jul 2024", "enable_thinking": False}
AT_ONCE = 1000  # texts that the tokenizer takes in one call; a call for each costs half as much again


class Prompt:
    """A template with its languages and tokenizer.

    Parameters
    ----------
    template : "plain", "alpaca", "chat" (the tokenizer's own chat template), or a text with {source} and perhaps
        {source_language} and {target_language}; other {names} are mistakes, other braces are text

    Raises
    ------
    UserError
        For a text without {source} or with an unknown {name}, a tokenizer without chat template, or one without end
        token.
    """

    def __init__(self, template: str, source_language: str, target_language: str, tokenizer: Any):
        self._chat, self._tokenizer = template == "chat", tokenizer
        if self._chat and not tokenizer.chat_template:
            raise UserError("text.prompt is chat, but this tokenizer has no chat template; use plain or alpaca")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token), so no model could learn where to stop")
        text = CHAT_MESSAGE if self._chat else TEMPLATES.get(template, template).rstrip(" ")
        if "{source}" not in text:
            raise UserError(
                f"text.prompt is {template!r}; it must be plain, alpaca, chat, or a text that contains {{source}}"
            )
        unknown = [name for name in re.findall(r"\{\w+\}", text) if name not in FILLED_IN]
        if unknown:
            raise UserError(
                f"text.prompt contains {unknown[0]}, which nothing fills in; it may contain {', '.join(FILLED_IN)}, and "
                "the translation follows it"
            )
        # Not str.format: the user's text and the sentences may hold braces of their own.
        text = text.replace("{source_language}", source_language).replace("{target_language}", target_language)
        self._around = text.split("{source}")
        self._anchor = self.render("x")[-1]
        self._anchor_ids = self._tokens([self._anchor])[0]
        self._gap = self._chat_gap() if self._chat else "" if self._anchor == "\n" else " "

    def render(self, source: str) -> str:
        """The prompt of a sentence as text."""
        text = source.join(self._around)
        return self._dialogue([{"role": "user", "content": text}], add_generation_prompt=True) if self._chat else text

    def encode_sources(self, sources: list[str]) -> list[list[int]]:
        """Token ids of prompts. A begin token comes once, where the tokenizer or the chat template sets it."""
        prompts = self._tokens([self.render(source) for source in sources], add_special_tokens=not self._chat)
        end = self._tokenizer.eos_token_id
        # Some tokenizers close every text with their end token; a prompt goes on.
        return [ids[:-1] if not self._chat and ids[-1:] == [end] else ids for ids in prompts]

    def encode_source(self, source: str) -> list[int]:
        """Token ids of one prompt."""
        return self.encode_sources([source])[0]

    def encode(self, pairs: list[Pair]) -> list[Example]:
        """Prompts and responses; each response ends with the end token."""
        return list(chain.from_iterable(self._encode(pairs[at : at + AT_ONCE]) for at in range(0, len(pairs), AT_ONCE)))

    def _encode(self, pairs: list[Pair]) -> list[Example]:
        prompts = self.encode_sources([pair.source for pair in pairs])
        responses = self._tokens([self._anchor + self._gap + pair.target for pair in pairs])
        size = len(self._anchor_ids)
        for index, ids in enumerate(responses):
            joined = ids[:size] != self._anchor_ids  # a token spans the boundary
            responses[index] = self._tokens([self._gap + pairs[index].target])[0] if joined else ids[size:]
        end = self._tokenizer.eos_token_id
        return [Example(prompt, [*response, end]) for prompt, response in zip(prompts, responses, strict=True)]

    def _tokens(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False).input_ids

    def _dialogue(self, messages: list[dict[str, str]], **settings: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **CHAT_SETTINGS, **settings)

    def _chat_gap(self) -> str:
        """The white space that the chat template sets before an answer: none in most, a space in Llama 2's."""
        turns = [{"role": "user", "content": "x".join(self._around)}, {"role": "assistant", "content": "x"}]
        prompt, dialogue = self.render("x"), self._dialogue(turns)
        gap = dialogue[len(prompt) :].partition("x")[0] if dialogue.startswith(prompt) else ""
        return "" if gap.strip() else gap
