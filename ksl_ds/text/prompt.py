"""Prompts: how a sentence becomes the model's input.

Choices and what they cost:
- Prompt and response are tokenized separately, so that training and generation have the same prompt ids; no token spans the
  boundary. The response is tokenized after the prompt's last character, since SentencePiece tokenizers would otherwise put
  a separate space piece before the first word, which pretrained models do not expect there.
- The space between prompt and response belongs to the response, as for any word in a text, even if the user's template ends
  with one: models have rarely seen a text continue after a token that ends with a space.
- Chat prompts have a fixed date and no thinking mode, so that they do not change from day to day.
- A sentence is data: text that looks like a special token, such as "</s>", is tokenized as plain text. If tokenizer or
  template cannot distinguish the two (a chat template renders text and markers together), the pair is dropped and counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ksl_ds.errors import UserError
from ksl_ds.text.chat import ChatTemplate
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
SPECIAL_IN_TEXT = "with a special token of the tokenizer in their text"
NO_PROMPT = "whose prompt has no tokens"
AT_ONCE = 1000  # texts that the tokenizer takes in one call; a call for each costs half as much again


@dataclass
class Example:
    """A prompt and the response to learn, end token included, as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Prompt:
    """A template with its languages and tokenizer.

    Parameters
    ----------
    template : "plain", "alpaca", "chat" (the tokenizer's own chat template), or a text with {source} and perhaps
        {source_language} and {target_language}; other {names} are mistakes, other braces are text

    Raises
    ------
    UserError
        For a text without {source} or with an unknown {name}, a tokenizer without end token, or one without a chat template
        that works.
    """

    def __init__(self, template: str, source_language: str, target_language: str, tokenizer: Any):
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token (eos_token), so a model cannot learn to stop")
        if tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) != tokenizer.eos_token:
            raise UserError(
                f"the tokenizer's end token (eos_token) is {tokenizer.eos_token!r}, which is not in its vocabulary; name one "
                "that is in tokenizer_config.json"
            )
        text = CHAT_MESSAGE if template == "chat" else TEMPLATES.get(template, template).rstrip(" ")
        if "{source}" not in text:
            raise UserError(
                f"text.prompt is {template!r}; it must be plain, alpaca, chat, or a text that contains {{source}}"
            )
        unknown = [name for name in re.findall(r"\{\w+\}", text) if name not in FILLED_IN]
        if unknown:
            raise UserError(
                f"text.prompt contains {unknown[0]}, which is not a placeholder; it may contain {', '.join(FILLED_IN)}, and "
                "the translation follows it"
            )
        # Not str.format: the user's text and the sentences may hold braces of their own.
        text = text.replace("{source_language}", source_language).replace("{target_language}", target_language)
        self._around = text.split("{source}")
        self._chat = ChatTemplate(tokenizer, self._around) if template == "chat" else None
        template_text = self.render("x")
        self._anchor = template_text[-1]
        self._anchor_ids = self._tokens([self._anchor])[0]
        if self._chat:
            self._gap = self._chat.gap()
        else:
            self._gap = "" if self._anchor == "\n" else " "
        self._special = self._special_tokens(template_text)
        self._reads_like_special = re.compile(
            "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)"
        )
        self._has_markers = self._reads_like_special.search(template_text) is not None
        self._plain_ids = self.encode_source("x")

    def render(self, source: str) -> str:
        """The prompt of a sentence as text."""
        return self._chat.prompt(source) if self._chat else source.join(self._around)

    def encode_sources(self, sources: list[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of prompts. A begin token comes once, where the tokenizer or the chat template sets it."""
        prompts = self._tokens(
            [self.render(source) for source in sources],
            add_special_tokens=not self._chat,
            split_special_tokens=split_special_tokens,
        )
        end = self._tokenizer.eos_token_id
        # Some tokenizers append their end token to every text; a prompt must not end with it.
        return [ids[:-1] if not self._chat and ids[-1:] == [end] else ids for ids in prompts]

    def encode_source(self, source: str) -> list[int]:
        """Token ids of one prompt."""
        return self.encode_sources([source])[0]

    def encode(self, pairs: list[Pair]) -> list[Example | str]:
        """Prompts and responses; each response ends with the end token. A text is the reason to leave that pair out."""
        return list(chain.from_iterable(self._encode(pairs[at : at + AT_ONCE]) for at in range(0, len(pairs), AT_ONCE)))

    def _encode(self, pairs: list[Pair]) -> list[Example | str]:
        prompts = self.encode_sources([pair.source for pair in pairs])
        responses = self._responses([pair.target for pair in pairs])
        return [self._example(*parts) for parts in zip(pairs, prompts, responses, strict=True)]

    def _example(self, pair: Pair, prompt: list[int], response: list[int]) -> Example | str:
        in_source, in_target = (
            {self._special[text] for text in self._reads_like_special.findall(side)} - {self._tokenizer.unk_token_id}
            for side in (pair.source, pair.target)
        )
        if self._reads_like_special.search(pair.source):
            if self._has_markers:  # they would become plain text as well
                return SPECIAL_IN_TEXT
            (prompt,) = self.encode_sources([pair.source], split_special_tokens=True)
        if self._reads_like_special.search(pair.target):
            (response,) = self._responses([pair.target], split_special_tokens=True)
        forged = any(prompt.count(number) > self._plain_ids.count(number) for number in in_source)
        if forged or not in_target.isdisjoint(response):
            return SPECIAL_IN_TEXT
        return Example(prompt, [*response, self._tokenizer.eos_token_id]) if prompt else NO_PROMPT

    def _responses(self, targets: list[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of translations as they stand behind a prompt, without the end token."""
        texts = [self._gap + target for target in targets]
        found = self._tokens([self._anchor + text for text in texts], split_special_tokens=split_special_tokens)
        size = len(self._anchor_ids)
        for index, ids in enumerate(found):
            if ids[:size] == self._anchor_ids:
                found[index] = ids[size:]
            else:  # a token spans the boundary
                (found[index],) = self._tokens([texts[index]], split_special_tokens=split_special_tokens)
        return found

    def _tokens(
        self, texts: list[str], *, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> list[list[int]]:
        return self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
        ).input_ids

    def _special_tokens(self, template_text: str) -> dict[str, int]:
        """Ids by text of the tokens that no sentence may hold: special ones, and added ones that the template holds."""
        tokenizer = self._tokenizer
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        for number, token in tokenizer.added_tokens_decoder.items():
            if token.content.strip() and (token.special or token.content in template_text):
                special[token.content] = number
        return special
