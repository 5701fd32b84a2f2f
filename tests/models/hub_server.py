"""A model hub on loopback, as far as downloads see it: listing, redirects, ranges, refusals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves one model; use as a context manager.

    Attributes:
        files: Content by file name; weights are kept in large storage, and so have a SHA-256.
        served: Content that is sent in place of what is published.
        breaks: By file name, after how many bytes of the body the next answers break off.
        answers: Statuses that the next requests for a path (its end) are answered with.
        requests: What was asked: path and Range header.
        revisions: By branch, tag or commit other than the default: its commit and files.
        outage: The status, headers and body that every request is answered with, if any.
    """

    def __init__(self, model: str, files: Mapping[str, bytes]) -> None:
        self.model = model
        self.files = dict(files)
        self.served: dict[str, bytes] = {}
        self.breaks: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.gated = False
        self.has_large_storage = True
        self.knows_ranges = True
        self.commit = COMMIT
        self.extra: dict[str, Any] = {}
        self.revisions: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.outage: tuple[int, dict[str, str], bytes] | None = None
        self.requests: list[tuple[str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> list[str]:
        """The files whose content was asked for since the last call, in order of their names."""
        names = [path.rsplit("/", 1)[1] for path, _ in self.requests if "/resolve/" in path]
        self.requests.clear()
        return sorted(names)

    def is_large(self, name: str) -> bool:
        return self.has_large_storage and name.endswith((".safetensors", ".bin"))

    def files_at(self, commit: str) -> dict[str, bytes]:
        """What a commit holds; nothing if there is no such commit."""
        others = dict(self.revisions.values())
        return self.files if commit == self.commit else others.get(commit, {})

    def listing(self, commit: str | None = None) -> dict[str, Any]:
        commit = commit or self.commit
        siblings: list[dict[str, Any]] = []
        for name, content in self.files_at(commit).items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
            if self.is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.model, "sha": commit, "siblings": siblings, "tags": [], **self.extra}


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((path, self.headers.get("Range")))
            if hub.outage is not None and path != "/login":
                status, headers, body = hub.outage
                return self._send(status, body, headers)
            if path == "/login":
                return self._send(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
            for end, statuses in hub.answers.items():
                if path.endswith(end) and statuses:
                    return self._refuse(statuses.pop(0))
            if path == f"/api/models/{hub.model}":
                return self._send(
                    200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"}
                )
            if match := re.fullmatch(rf"/api/models/{hub.model}/revision/(.+)", path):
                commit = hub.revisions.get(match[1], (match[1], None))[0]
                if not hub.files_at(commit):
                    return self._refuse(404, "RevisionNotFound")
                return self._send(
                    200, json.dumps(hub.listing(commit)).encode(), {"Content-Type": "application/json"}
                )
            if path.startswith("/large/"):
                return self._send_file(path.removeprefix("/large/"), hub.files)
            match = re.fullmatch(rf"/{hub.model}/resolve/([0-9a-f]{{40}})/(.+)", path)
            if match and match[2] in (files := hub.files_at(match[1])):
                return self._resolve(match[2], files)
            return self._refuse(404, "RepoNotFound" if path.startswith("/api") else "EntryNotFound")

        def _resolve(self, name: str, files: Mapping[str, bytes]) -> None:
            if hub.gated:
                return self._refuse(403, "GatedRepo")
            if not hub.is_large(name):
                return self._send_file(name, files)
            content = files[name]
            headers = {
                "Location": f"/large/{name}",
                "X-Repo-Commit": hub.commit,
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
            return self._send(302, b"", headers)

        def _send_file(self, name: str, files: Mapping[str, bytes]) -> None:
            content = hub.served.get(name, files[name])
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if start is None or not hub.knows_ranges:
                return self._send(200, content, {"ETag": f'"{_git_sha1(content)}"'}, name)
            first = int(start[1])
            if first >= len(content):
                return self._refuse(416)
            span = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[first:], {"Content-Range": span}, name)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if breaks := hub.breaks.get(name):
                body = body[: breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def _refuse(self, status: int, code: str = "") -> None:
            self._send(status, b"{}", {"X-Error-Code": code} if code else {})

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return Handler
