"""A hub of one's own: what the Hugging Face libraries ask for when they download, answered from folders.

`with serving(root) as hub` serves `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`, each at any revision. It
knows downloads alone: nothing is searched, uploaded or counted.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served and where.

    Attributes:
        address: for `HF_ENDPOINT`.
        root: holds `models` and `datasets`.
        asked: paths, as they travelled.
    """

    address: str
    root: Path
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _answer(self, body: bytes) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            # A revision may hold slashes, which travel quoted.
            parts = [unquote(part) for part in path.split("/") if part]
            if "resolve" in parts:
                self._file(*_repository(root, parts))
            elif parts[:1] == ["api"]:
                self._facts(parts[1:], body)
            else:
                self._say(404, {"error": "not found"})

        def _file(self, folder: Path, rest: list[str]) -> None:
            # resolve / revision / path
            file = folder.joinpath(*rest[2:])
            if not folder.is_dir():
                self._say(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
            elif not file.is_file():
                self._say(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                data = file.read_bytes()
                first, last = 0, len(data) - 1
                span = self.headers.get("Range", "").removeprefix("bytes=")
                if span:
                    start, _, end = span.partition("-")
                    first, last = int(start), min(last, int(end or last))
                self.send_response(206 if span else 200)
                if span:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Content-Length", str(last - first + 1))
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[first : last + 1])

        def _facts(self, parts: list[str], body: bytes) -> None:
            folder, rest = _repository(root, parts)
            files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
            if not files:
                self._say(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["tree"]:
                self._say(200, [_entry(folder, file) for file in _below(folder, rest[2:], self.path)])
            elif rest[:1] == ["paths-info"]:
                wanted = _wanted(body)
                self._say(200, [_entry(folder, folder / name) for name in wanted if (folder / name).exists()])
            else:
                names = [{"rfilename": str(file.relative_to(folder))} for file in files]
                facts = {"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "siblings": names}
                self._say(200, {"_id": "0", "private": False, "gated": False, "tags": [], **facts})

        def _say(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _repository(root: Path, parts: list[str]) -> tuple[Path, list[str]]:
    """The folder of a repository, and what follows its name in a path."""
    kind = parts[0] if parts[0] in ("datasets", "models", "spaces") else "models"
    parts = parts[1:] if parts[0] == kind else parts
    return root.joinpath(kind, *parts[:2]), parts[2:]


def _below(folder: Path, path: list[str], address: str) -> list[Path]:
    start = folder.joinpath(*path)
    deep = parse_qs(urlsplit(address).query).get("recursive", [""])[0].lower() in ("true", "1")
    return sorted(start.rglob("*") if deep else start.glob("*")) if start.is_dir() else []


def _wanted(body: bytes) -> list[str]:
    """Paths of a form or of JSON."""
    text = body.decode()
    return json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    if file.is_dir():
        return {"type": "directory", "path": str(file.relative_to(folder)), "oid": "0" * 40, "size": 0}
    data = file.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": str(file.relative_to(folder)), "oid": oid, "size": len(data)}
