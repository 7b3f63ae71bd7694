"""The tokenizer's chat template, tested with resource limits before it is used.

A chat template is a program that comes with the checkpoint. It is first rendered in a separate process with limits on CPU
time, memory and length, since Python cannot stop an endless loop or a huge string in its own process. That costs about a
second, for chat prompts only.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from ksl_ds.errors import UserError

# Read by the templates of Llama 3 (which would take today's date) and Qwen 3, ignored by all others.
CHAT_SETTINGS = {"date_string": "26 Jul 2024", "enable_thinking": False}
PROBES = ("alpha", "omega")
CPU_SECONDS = 10
MEMORY = 2 * 1024**3
LENGTH = 100_000  # characters of a prompt around its sentence

# Limits are set after the imports, which need memory of their own; CPU time, so that a slow machine makes no difference.
CHILD = """
import json, resource, sys, time
from transformers.utils.chat_template_utils import render_jinja_template
asked = json.load(sys.stdin)
seconds = int(time.process_time()) + asked["cpu_seconds"]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + asked["memory"],) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
outcomes = []
for messages, settings in asked["dialogues"]:
    try:
        text = render_jinja_template([messages], **asked["settings"], **settings)[0][0]
        outcomes.append({"length": len(text)})
    except MemoryError:
        outcomes.append({"error": f"it takes more than {asked['memory'] // 1024**2} MiB of memory"})
    except BaseException as error:
        outcomes.append({"error": f"it fails: {error}"})
print(json.dumps(outcomes))
"""


class ChatTemplate:
    """Renders dialogues by a tokenizer's chat template; `around` is what stands before and after each sentence.

    Raises
    ------
    UserError
        For a tokenizer without chat template, and for one that fails, does not end, or leaves the sentence out, whether a
        message's content is a text or a list of parts.
    """

    def __init__(self, tokenizer: Any, around: list[str]):
        if not tokenizer.chat_template:
            raise UserError("text.prompt is chat, but this tokenizer has no chat template; use plain or alpaca")
        self._tokenizer = tokenizer
        self._around = around
        self._parts = False
        problems = []
        for self._parts in (False, True):
            problem = self._problem()
            if problem is None:
                return
            problems.append(problem)
        raise UserError(
            f"text.prompt is chat, but the tokenizer's chat template cannot be used: {problems[0]}; use plain or alpaca"
        )

    def prompt(self, source: str) -> str:
        """The prompt of a sentence, up to where the answer starts."""
        return self._render([self._message("user", source.join(self._around))], add_generation_prompt=True)

    def dialogue(self, source: str, answer: str) -> str:
        """The prompt of a sentence and an answer."""
        turns = [self._message("user", source.join(self._around)), self._message("assistant", answer)]
        return self._render(turns)

    def gap(self) -> str:
        """The white space that the template sets before an answer: none in most, a space in Llama 2's."""
        prompt = self.prompt("x")
        try:
            dialogue = self.dialogue("x", "x")
        except UserError:  # a template that takes no answers
            return ""
        gap = dialogue[len(prompt) :].partition("x")[0] if dialogue.startswith(prompt) else ""
        return "" if gap.strip() else gap

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._parts else text}

    def _render(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **CHAT_SETTINGS, **settings)
        except Exception as error:  # a template is a program: it can fail in any way
            raise UserError(f"the tokenizer's chat template fails: {_in_a_line(error)}; use plain or alpaca") from None

    def _problem(self) -> str | None:
        """What is wrong with the template, if anything is."""
        user = self._message("user", PROBES[0].join(self._around))
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default one
            return _in_a_line(error)
        problem = _try_out(
            [([user], {"add_generation_prompt": True}), ([user, self._message("assistant", "x")], {})],
            self._tokenizer.special_tokens_map | CHAT_SETTINGS | {"chat_template": template},
        )
        if problem is None and any(probe not in self.prompt(probe) for probe in PROBES):
            problem = "it leaves the sentence out of the prompt"
        return problem


def _try_out(dialogues: list[tuple[list[dict[str, Any]], dict[str, Any]]], settings: dict[str, Any]) -> str | None:
    """Renders dialogues in a process with limits: what is wrong, if anything is. Only the first may not raise."""
    asked = {"dialogues": dialogues, "settings": settings, "cpu_seconds": CPU_SECONDS, "memory": MEMORY}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asked, default=str), capture_output=True, text=True
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it does not end within {CPU_SECONDS} seconds"
    if done.returncode:
        return f"Python ends with code {done.returncode} in it"
    first, *others = json.loads(done.stdout.splitlines()[-1])
    if "error" in first:
        return _in_a_line(first["error"])
    longest = max(outcome.get("length", 0) for outcome in (first, *others))
    return f"it gives {longest:,} characters for a sentence of one word" if longest > LENGTH else None


def _in_a_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:200]
