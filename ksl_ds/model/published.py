"""The tickets that were published for LLaMA-1, shipped as data with their source."""

from __future__ import annotations

import json
from typing import Any

from ksl_ds.config.schema import PACKAGE_DIR
from ksl_ds.errors import UserError
from ksl_ds.model.folder import largest_id


def published_ids(direction: str) -> list[int]:
    """Token ids of the published ticket of a direction such as en-ca. Raises UserError for one that was not."""
    tickets = _data()["tickets"]
    if direction not in tickets:
        raise UserError(f"no ticket was published for {direction!r}; there are {', '.join(tickets)}")
    return tickets[direction]


def published_directions() -> list[str]:
    """The directions of which tickets were published."""
    return list(_data()["tickets"])


def published_pieces() -> dict[int, str]:
    """What some of the published ids are in LLaMA-1's tokenizer."""
    return {int(number): piece for number, piece in _data()["tokenizer_check"].items()}


def check_tokenizer_is_llama1(tokenizer: Any) -> None:
    """Raises UserError unless the tokenizer gives the published ids the strings that they have in LLaMA-1's.

    Llama 2 has the same tokenizer and passes.
    """
    largest = largest_id(tokenizer)
    for number, piece in published_pieces().items():
        found = tokenizer.convert_ids_to_tokens(number) if number <= largest else None
        if found != piece:
            raise UserError(
                f"published tickets are ids of LLaMA-1's tokenizer, where {number} is {piece!r}; in this model's it is "
                f"{found!r}"
            )


def _data() -> dict[str, Any]:
    return json.loads((PACKAGE_DIR / "data" / "published_tickets.json").read_text(encoding="utf-8"))
