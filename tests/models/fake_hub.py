"""A small model hub on the loopback interface, so that the hub client is tested without any network."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Serves every directory under ``root`` as a repository ``owner/<directory>`` with one commit.

    ``owner/gated`` is gated; what does not exist is answered as the real hub does; ``owner/slow`` is never answered.
    """

    root: ClassVar[Path]
    release: ClassVar[object]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name = parts[1] if len(parts) > 1 else ""
        if name == "slow":
            self.release.wait()  # type: ignore[attr-defined]
            return
        directory = self.root / name
        if name == "gated" and not api:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif not directory.is_dir() or not name:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts[3] not in ("main", COMMIT):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
            files = [{"type": "file", "path": path, "size": size, "oid": "0"} for path, size in sizes.items()]
            info = {"id": f"owner/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in sizes]}
            body = json.dumps(files if parts[2] == "tree" else info).encode()
            self._answer(200, body, {"Content-Type": "application/json"})
        elif not (directory / parts[4]).is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            body = (directory / parts[4]).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self._answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def serve(root: Path, release: object) -> ThreadingHTTPServer:
    """Make a server for the repositories under a directory; the caller runs and closes it."""
    handler = type("Handler", (FakeHub,), {"root": root, "release": release})
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)
