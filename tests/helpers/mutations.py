"""JSON changed in many ways: what a reader of a file must not stumble over."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

REMOVED = object()
REPLACEMENTS = [REMOVED, None, [], [None], {}, {"x": []}, 7, -1.5, 10**400, math.inf, "x", True]
FILES_OF_OTHER_KINDS = [
    b"", b"null", b"7", b"[]", b'"x"', b"true", b"{}", b"{", b"\x00" * 9, b"\xff\xfe{\x00}\x00", b"\x89PNG\r\n\x1a\n",
    b"[" * 100_000, b'{"a": NaN}', b'{"a": "\\ud800"}', '{"a": "é"}'.encode("latin-1"), b"\x1f\x8b\x08\x00\x00",
]  # fmt: skip


def paths(content: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def changed(content: Any, path: tuple[Any, ...], replacement: Any) -> Any:
    """A JSON value with one value within replaced or removed; whatever lies beside the path is shared with the original."""
    key, *rest = path
    content = copy.copy(content)
    if rest:
        content[key] = changed(content[key], tuple(rest), replacement)
    elif replacement is REMOVED:
        del content[key]
    else:
        content[key] = replacement
    return content
