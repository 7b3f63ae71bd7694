"""A small Hub: a local HTTP server that answers what huggingface_hub and datasets ask for models and datasets.

It serves folders of files: what a repository holds at a revision. `HF_ENDPOINT` leads the libraries here.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<what>revision|tree|paths-info|resolve-cache)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)
TOKEN = "hf_OfAUserWithAccess"


@dataclass
class Repository:
    """Folders by revision. `gated`: 401 without a token, 403 with one that has no access."""

    revisions: dict[str, Path]
    gated: bool = False

    def folder(self, revision: str) -> Path | None:
        by_commit = {self.commit(name): name for name in self.revisions}
        return self.revisions.get(by_commit.get(revision, revision))

    def commit(self, revision: str) -> str:
        """The hash that stands for a revision, as Git's would."""
        return hashlib.sha1(f"{revision} {self.revisions[revision]}".encode()).hexdigest()

    def commit_of(self, folder: Path) -> str:
        return next(self.commit(revision) for revision, of in self.revisions.items() if of == folder)


@dataclass
class Hub:
    """The server's address, what it serves by kind and id, and what it was asked."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)  # files whose next answers, so many, end in the middle
    status: int = 0  # of every answer, if the server is out of order

    def add(self, kind: str, name: str, gated: bool = False, **revisions: Path) -> None:
        self.repositories[kind, name] = Repository(revisions, gated)


@contextmanager
def hub() -> Iterator[Hub]:
    """A running server."""
    served = Hub()

    class Handler(Answers):
        hub = served

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        served.endpoint = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield served
        httpd.shutdown()


class Answers(BaseHTTPRequestHandler):
    """What the Hub answers, as far as the libraries look at it."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.hub.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if self.hub.status:
            self.refuse(self.hub.status, "", "Out of order")
        elif match := API.fullmatch(path):
            self.describe(match)
        elif match := FILE.fullmatch(path):
            self.file(match)
        else:
            self.refuse(404, "", "Not Found")

    do_HEAD = do_POST = do_GET

    def repository(self, kind: str, name: str, files: bool) -> Repository | None:
        """The repository; None after an answer that refuses it. What a gated one holds is public, its files are not."""
        found = self.hub.repositories.get((kind, name))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if found is None:
            # Without a token the Hub does not say whether a repository exists.
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif files and found.gated and token != TOKEN:
            page = f"{self.hub.endpoint}/{'' if kind == 'models' else 'datasets/'}{name}"
            self.refuse(
                403 if token else 401,
                "GatedRepo",
                f"Access to {kind.removesuffix('s')} {name} is restricted. Visit {page} to ask for access.",
            )
            return None
        return found

    def describe(self, match: re.Match[str]) -> None:
        found = self.repository(match["kind"], match["id"], files=False)
        if found is None:
            return
        folder = found.folder(match["revision"] or "main")
        if folder is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
            return
        entries = list(entries_of(folder))
        if match["what"] == "tree":
            self.answer([entry for entry in entries if entry["path"].startswith(match["path"] or "")])
        elif match["what"] == "paths-info":
            wanted = json.loads(self.body)["paths"]
            self.answer([entry for entry in entries if entry["path"] in wanted])
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            self.answer(
                {
                    "id": match["id"],
                    "sha": found.commit_of(folder),
                    "private": False,
                    "gated": "manual" if found.gated else False,
                    "tags": [],
                    "siblings": siblings,
                }
            )

    def file(self, match: re.Match[str]) -> None:
        found = self.repository("datasets" if match["kind"] else "models", match["id"], files=True)
        if found is None:
            return
        folder = found.folder(match["revision"])
        if folder is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        elif not (folder / match["path"]).is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = (folder / match["path"]).read_bytes()
            headers = {
                "X-Repo-Commit": found.commit_of(folder),
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            start = 0
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206 if asked else 200, content[start:], headers)

    def answer(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        name = self.path.rpartition("/")[2]
        if self.hub.cuts.get(name, 0) > 0:
            self.hub.cuts[name] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def entries_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Files and folders as the Hub lists them."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            yield {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        else:
            content = path.read_bytes()
            yield {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
