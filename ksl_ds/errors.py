"""Exceptions that end a run with one line instead of a traceback."""

import re

LONGEST_SENTENCE = 2000


def one_line(text: str) -> str:
    """`text` as one line; the middle of a long one is cut out."""
    text = " ".join(text.split())
    if len(text) <= LONGEST_SENTENCE:
        return text
    half = LONGEST_SENTENCE // 2
    return f"{text[:half]} ... {text[-half:]}"


def reason_of(error: BaseException) -> str:
    """A library's error message as part of a sentence: one line, without class names."""
    text = re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", " ".join(str(error).split()))
    if isinstance(error, KeyError):
        text = f"unknown or missing key {text}"
    text = text or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "...").rstrip(".:")


class UserError(ValueError):
    """A mistake in a recipe, file or command line. The message says what is wrong, where, and what to do."""


class MistakeOfThisRank(UserError):
    """A UserError of this rank only, such as in its environment. Each rank prints its own."""


class Interrupted(Exception):
    """The run was stopped by a signal and has saved a checkpoint. The message says how to resume."""


class LostRanks(RuntimeError):
    """Peer ranks are unreachable; no further collectives are possible, so each rank prints its own message."""
