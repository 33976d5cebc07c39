"""A small stand-in for the Hugging Face hub: listings, ranges, redirects, closed repositories, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM_BYTES = 1000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories (name -> path -> content) and what goes wrong with them."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # Repositories that only this token opens.
    closed: set[str] = field(default_factory=set)
    token: str = "hf_good"
    # Sizes and hashes that the listing states instead of the true ones, by path.
    stated: dict[str, dict] = field(default_factory=dict)
    # Paths of which the next answer breaks off half way; those whose answers after the first never come.
    break_once: set[str] = field(default_factory=set)
    stall_after_first: set[str] = field(default_factory=set)
    # (path, first byte, last byte) of every piece of content that was asked for.
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def fetched(self, path: str) -> list[tuple[int, int]]:
        """The ranges asked of a file, but for the single byte that tries the door."""
        return [(first, last) for name, first, last in self.asked if name == path and last > first]


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start serving `hub` on a free port, whose URL it gets."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main(?:/(.*))?", path):
            self._tree(match[1], match[2] or "")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            if match[1] in self.hub.repositories:
                self._json({"id": match[1], "sha": COMMIT, "siblings": []})
            else:
                self._error(401, "RepoNotFound")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.*)", path):
            if match[1] in self.hub.closed and self.headers["Authorization"] != f"Bearer {self.hub.token}":
                self._error(401, "GatedRepo")
            else:
                self._answer(302, b"", {"Location": f"{self.hub.url}/cdn/{match[1]}/{match[2]}"})
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.*)", path):
            self._content(match[2], self.hub.repositories[match[1]][match[2]])
        else:
            self._error(404, "EntryNotFound")

    def _tree(self, repository: str, under: str) -> None:
        files = self.hub.repositories[repository]
        if under in files or (under and not any(path.startswith(f"{under}/") for path in files)):
            self._error(404, "EntryNotFound")
            return
        recursive = "recursive=true" in self.path.lower()
        entries = {}
        for path, content in files.items():
            if under and not path.startswith(f"{under}/"):
                continue
            head, slash, _ = path[len(under) + bool(under) :].partition("/")
            if slash:
                folder = f"{under}/{head}".strip("/")
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if not slash or recursive:
                entries[path] = self._entry(path, content)
        self._json(list(entries.values()))

    def _entry(self, path: str, content: bytes) -> dict:
        stated = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **self.hub.stated.get(path, {})}
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": stated.get("git", git), "size": stated["size"], "path": path}
        if len(content) >= LFS_FROM_BYTES:
            entry["lfs"] = {"oid": stated["sha256"], "size": stated["size"], "pointerSize": 134}
        return entry

    def _content(self, path: str, content: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        first, last = (int(match[1]), min(int(match[2]), len(content) - 1)) if match else (0, len(content) - 1)
        begun = bool(self.hub.fetched(path))
        self.hub.asked.append((path, first, last))
        if path in self.hub.stall_after_first and begun and last > first:
            self.hub.stalled.set()
            self.hub.go_on.wait(60)
        piece = content[first : last + 1]
        facts = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "ETag": '"etag"'}
        if path in self.hub.break_once and last > first:
            self.hub.break_once.discard(path)
            self.send_response(206)
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            self.wfile.write(piece[: len(piece) // 2])
            self.close_connection = True
        else:
            self._answer(206 if match else 200, piece, facts)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass
