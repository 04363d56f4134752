"""A Hugging Face Hub of a few repositories on this machine, for tests without a network."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

BRANCHES: Final = ("main", "other")


@dataclass
class FakeHub:
    """What the Hub holds, and what was asked of it.

    `repositories` have folders of files, all of which are at the branch main; `others` those at the
    branch other. Files of which `broken_after` so many bytes were sent are cut short, once each.
    """

    url: str
    repositories: dict[str, Path] = field(default_factory=dict)
    others: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken_after: int | None = None
    fetched: list[tuple[str, int]] = field(default_factory=list)  # names of files, and from which byte on
    tokens: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        """Files that were fetched."""
        return {name for name, _ in self.fetched}


@contextmanager
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that is asked by this process until the end of the block, with a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    _Handler.hub = hub
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ask_at(hub.url, monkeypatch)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        is_api = path[:2] == ["api", "models"]
        repository, rest = "/".join(path[2:4] if is_api else path[:2]), path[4:] if is_api else path[2:]
        if repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif repository not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")
        else:
            self._of_repository(repository, is_api, rest, with_body)

    def _of_repository(self, repository: str, is_api: bool, rest: list[str], with_body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        folders = {"main": self.hub.repositories[repository], "other": self.hub.others.get(repository)}
        commits = {commit_of(repository, name): folder for name, folder in folders.items()}
        folder = {**folders, **commits}.get(revision)
        if folder is None:
            self._refuse(404, "RevisionNotFound")
            return
        commit = next(commit for commit, of in commits.items() if of == folder)
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if is_api and rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._send_json({"id": repository, "sha": commit, "siblings": siblings, "private": False}, with_body)
        elif is_api:
            sizes = {name: file.stat().st_size for name, file in files.items()}
            self._send_json(
                [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()],
                with_body,
            )
        elif (name := "/".join(rest[2:])) in files:
            self._send_file(name, files[name], commit, with_body)
        else:
            self._refuse(404, "EntryNotFound")

    def _send_file(self, name: str, file: Path, commit: str, with_body: bool) -> None:
        content = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
        self.hub.fetched.append((name, start))
        most = self.hub.broken_after
        if most is not None and len(content) > most and name not in self.hub.broken:
            self.hub.broken.add(name)
            self.wfile.write(content[start : start + most])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _send_json(self, value: Any, with_body: bool) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def ask_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process ask at that address, and not wait before it asks again."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))


def commit_of(repository: str, branch: str) -> str:
    """The commit that a branch of a repository is at."""
    return hashlib.sha1(f"{repository} {branch}".encode()).hexdigest()
