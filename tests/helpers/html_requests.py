"""Everything in an HTML page that could make a browser ask for something outside it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

ADDRESSES = {"src", "href", "xlink:href", "srcset", "data", "action", "formaction", "poster", "background", "ping"}
INSIDE = ("data:", "#")


class Page(HTMLParser):
    """Collects a page's elements, its ids, and the requests that it would make."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []  # to ids of the page
        self.requests: list[str] = []
        self.text: list[str] = []
        self._in_style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_style = tag == "style"
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.requests.append(f"{name}={value}")
            if name in ADDRESSES:
                self._address(value or "")
            self._css(value or "")
        if tag in ("script", "iframe", "object", "embed", "base"):
            self.requests.append(f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, text: str) -> None:
        if self._in_style:
            self._css(text)
        else:
            self.text.append(text)

    def _css(self, text: str) -> None:
        for address in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text):
            self._address(address)
        if "@import" in text:
            self.requests.append("@import")

    def _address(self, address: str) -> None:
        if not address.startswith(INSIDE):
            self.requests.append(address)
        elif address.startswith("#"):
            self.references.append(address[1:])
