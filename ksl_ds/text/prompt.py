"""Prompts: how a sentence is put to the model.

Prompt and response are tokenized apart, so that training and generation see the same prompt ids; no token ever spans the
boundary.
"""

from __future__ import annotations

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


class Prompt:
    """A template with its languages and tokenizer.

    Parameters
    ----------
    template : "plain", "alpaca", "chat" (the tokenizer's own chat template), or a text with {source} and perhaps
        {source_language} and {target_language}

    Raises
    ------
    UserError
        For a text without {source}, a tokenizer without chat template, or one without end token.
    """

    def __init__(self, template: str, source_language: str, target_language: str, tokenizer: Any):
        self._chat = template == "chat"
        if self._chat and not tokenizer.chat_template:
            raise UserError("text.prompt is chat, but this tokenizer has no chat template; use plain or alpaca")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token), so no model could learn where to stop")
        text = CHAT_MESSAGE if self._chat else TEMPLATES.get(template, template)
        if "{source}" not in text:
            raise UserError(
                f"text.prompt is {template!r}; it must be plain, alpaca, chat, or a text that contains {{source}}"
            )
        # Not str.format: the user's text and the sentences may hold braces of their own.
        text = text.replace("{source_language}", source_language).replace("{target_language}", target_language)
        self._before, _, self._after = text.partition("{source}")
        self._tokenizer = tokenizer

    def render(self, source: str) -> str:
        """The prompt of a sentence as text."""
        text = self._before + source + self._after
        if not self._chat:
            return text
        message = [{"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def encode_source(self, source: str) -> list[int]:
        """Token ids of the prompt. A begin token comes once, where the tokenizer or the chat template sets it."""
        ids = self._tokenizer(self.render(source), add_special_tokens=not self._chat).input_ids
        # Some tokenizers close every text with their end token; a prompt goes on.
        return ids[:-1] if not self._chat and ids and ids[-1] == self._tokenizer.eos_token_id else ids

    def encode(self, pair: Pair) -> Example:
        """Prompt and response ids; the response starts with a space, as a word within a text, and ends with EOS."""
        gap = "" if self._chat or self._after.endswith(("\n", " ")) else " "
        response = self._tokenizer(gap + pair.target, add_special_tokens=False).input_ids
        return Example(self.encode_source(pair.source), [*response, self._tokenizer.eos_token_id])
