"""A Hub on 127.0.0.1: the few routes that a download uses, with faults to order."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """Serves `repos` (name -> file -> bytes) at revision main = COMMIT; every request is kept in `log`."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # when set, other callers get 401
    corrupt: set[str] = field(default_factory=set)  # files whose bytes differ from the announced sha256
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes to send before hanging up, one per GET
    stall: dict[str, int] = field(default_factory=dict)  # file -> bytes to send before falling silent
    stalled: threading.Event = field(default_factory=threading.Event)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def gets(self, suffix: str) -> list[Request]:
        return [request for request in self.log if request.method == "GET" and request.path.endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(Request(self.command, path, self.headers["Range"], self.headers["Authorization"]))
        repo = next((name for name in hub.repos if f"/{name}/" in f"{path}/"), None)
        if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.fail(401, "RepoNotFound")
        if repo is None:
            return self.fail(404, "RepoNotFound")
        if repo in hub.gated:
            return self.fail(403, "GatedRepo")
        if path.startswith("/api/models/"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", COMMIT):
                return self.fail(404, "RevisionNotFound")
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()} | _lfs(name, data)
                for name, data in hub.repos[repo].items()
            ]
            return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        revision, _, name = path.partition(f"/{repo}/resolve/")[2].partition("/")
        if revision not in ("main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        if name not in hub.repos[repo]:
            return self.fail(404, "EntryNotFound")
        data = hub.repos[repo][name]
        etag = _lfs(name, data).get("lfs", {}).get("sha256") or hashlib.sha1(data).hexdigest()
        if name in hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send(data, name=name, etag=etag)

    def send(self, data: bytes, *, name: str = "", etag: str = "-") -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut.get(name):
            self.wfile.write(data[start : start + self.hub.cut[name].pop(0)])
            self.close_connection = True
        elif name in self.hub.stall:
            self.wfile.write(data[start : start + self.hub.stall.pop(name)])
            self.wfile.flush()
            self.hub.stalled.set()
            self.connection.recv(1)  # returns when the client is gone
            self.close_connection = True
        else:
            self.wfile.write(data[start:])

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _lfs(name: str, data: bytes) -> dict[str, dict[str, object]]:
    if not name.endswith((".safetensors", ".gguf", ".onnx", ".bin")):
        return {}
    return {"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}}
