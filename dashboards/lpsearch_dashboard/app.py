"""The WSGI application: the live page, its parts, and optuna-dashboard for every other address."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import optuna_dashboard
import plotly
from optuna.artifacts import FileSystemArtifactStore
from plotly.offline import get_plotlyjs

from lpsearch.errors import LpsearchError
from lpsearch.report.annotations import ARTIFACTS_NAME
from lpsearch.report.html import read_asset
from lpsearch_dashboard.live import LiveStudy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["build_app"]

_LOCAL_NAMES = {"127.0.0.1", "localhost"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'"
)
"""What the browser may load for the live page."""

_NOTE_PATH = re.compile(r"/api/studies/\d+(/\d+)?/note")

_READ_ONLY = "because only notes can be written here; lpsearch writes the rest of the study"

_BACK_LINK = (
    # A plan's groups are one long word.
    b"<style>body{overflow-wrap:anywhere}th,td,button{overflow-wrap:normal}</style>"
    b'<a href="/" style="position:fixed;right:16px;bottom:16px;z-index:2000;padding:6px 12px;border-radius:16px;'
    b"background:#0b5fc0;color:#fff;font:14px system-ui,sans-serif;text-decoration:none;"
    b'box-shadow:0 1px 4px rgba(0,0,0,.4)">lpsearch</a>'
)

_UNAVAILABLE = "503 Service Unavailable"

_Answer = tuple[str, str, bytes, dict[str, str]]
"""Status, content type, body and further headers."""


def build_app(study: LiveStudy, directory: Path) -> WSGIApplication:
    """Build the application.

    Requests that do not come to this machine by one of its own names are refused, so that a page elsewhere cannot reach
    the study through its reader's browser (DNS rebinding).

    Args:
        study: what is shown.
        directory: its directory, with the plan files as artifacts.
    """

    @lru_cache(maxsize=1)
    def build_optuna_app(inode: int | None) -> WSGIApplication:
        """Build optuna-dashboard again for each database file: it caches trials by numbers that both files have."""
        artifacts = FileSystemArtifactStore(directory / ARTIFACTS_NAME)
        app: WSGIApplication = optuna_dashboard.wsgi(study.store.optuna_storage, artifact_store=artifacts)
        return app

    scripts: dict[str, Callable[[], str]] = {
        "/lpsearch/page.js": lambda: read_asset("page.js"),
        "/lpsearch/live.js": lambda: files("lpsearch_dashboard").joinpath("live.js").read_text(encoding="utf-8"),
    }

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO") or "/", environ["REQUEST_METHOD"]
        if not _is_local(environ):
            answer = _refuse("Open this dashboard as 127.0.0.1 or localhost.")
        elif path in ("/", "/lpsearch/study.json"):
            answer = _answer_live(study, path, environ)
        elif path == "/lpsearch/plotly.js":
            answer = _answer_plotly(environ)
        elif path in scripts:
            answer = ("200 OK", "text/javascript; charset=utf-8", scripts[path]().encode(), {})
        elif method not in ("GET", "HEAD") and not (method == "PUT" and _NOTE_PATH.fullmatch(path.rstrip("/"))):
            answer = _refuse(_READ_ONLY)
        elif method == "PUT" and study.store.is_read_only:
            answer = _refuse(f"because {study.store.where} cannot be written here")
        elif path == "/dashboard" or path.startswith("/dashboard/"):
            return _add_back_link(build_optuna_app(study.inode), environ, start_response)
        elif (failure := _follow_database(study, path)) is not None:
            answer = failure
        else:
            return build_optuna_app(study.inode)(environ, start_response)
        status, content_type, body, headers = answer
        length = {"Content-Type": content_type, "Content-Length": str(len(body))}
        start_response(status, [*length.items(), ("X-Content-Type-Options", "nosniff"), *headers.items()])
        return [b"" if method == "HEAD" else body]

    return app


def _answer_live(study: LiveStudy, path: str, environ: WSGIEnvironment) -> _Answer:
    headers = {"Cache-Control": "no-store"}
    try:
        if path == "/":
            page = study.render_page().encode()
            return "200 OK", "text/html; charset=utf-8", page, {**headers, "Content-Security-Policy": _POLICY}
        snapshot = study.read()
    except LpsearchError as error:
        if path == "/":
            page = study.render_failure(str(error)).encode()
            return _UNAVAILABLE, "text/html; charset=utf-8", page, {**headers, "Content-Security-Policy": _POLICY}
        return _build_json(_UNAVAILABLE, {"reason": str(error)}, headers)
    headers["ETag"] = snapshot.etag
    if environ.get("HTTP_IF_NONE_MATCH") == snapshot.etag:
        return "304 Not Modified", "application/json", b"", headers
    return "200 OK", "application/json", snapshot.to_json().encode(), headers


def _answer_plotly(environ: WSGIEnvironment) -> _Answer:
    """Answer with plotly.js, whose 5 MB a browser that has this version already need not read again."""
    kind, etag = "text/javascript; charset=utf-8", f'"plotly-{plotly.__version__}"'
    headers = {"Cache-Control": "no-cache", "ETag": etag}  # kept, but asked for each time
    if environ.get("HTTP_IF_NONE_MATCH") == etag:
        return "304 Not Modified", kind, b"", headers
    return "200 OK", kind, get_plotlyjs().encode(), headers


def _follow_database(study: LiveStudy, path: str) -> _Answer | None:
    """Have optuna-dashboard use the study's present file; return what to answer where there is none."""
    if path.startswith("/static/"):  # read from no database
        return None
    try:
        study.follow_database()
    except LpsearchError as error:
        return _build_json(_UNAVAILABLE, {"reason": str(error)}, {"Cache-Control": "no-store"})
    return None


def _is_local(environ: WSGIEnvironment) -> bool:
    """Say whether a request names this machine, and was not sent by a page from elsewhere."""
    try:
        host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname
        origin = environ.get("HTTP_ORIGIN")
        return host in _LOCAL_NAMES and (origin is None or urlsplit(origin).hostname in _LOCAL_NAMES)
    except ValueError:  # brackets that hold no address
        return False


def _refuse(reason: str) -> _Answer:
    return _build_json("403 Forbidden", {"reason": reason}, {})


def _build_json(status: str, document: dict[str, Any], headers: dict[str, str]) -> _Answer:
    return status, "application/json", json.dumps(document).encode(), headers


def _add_back_link(app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer with optuna-dashboard's page and a link to the live page on it."""
    begun: list[tuple[str, list[tuple[str, str]]]] = []

    def keep(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], object]:
        begun.append((status, headers))
        return lambda data: None

    # A page that the browser kept may be of optuna-dashboard alone, under the same address.
    answer = app({**environ, "HTTP_IF_MODIFIED_SINCE": "", "HTTP_IF_NONE_MATCH": ""}, keep)
    try:
        body = b"".join(answer)
    finally:
        getattr(answer, "close", lambda: None)()
    status, headers = begun[-1]
    if body:
        body = body.replace(b"</body>", _BACK_LINK + b"</body>")
        replaced = ("content-length", "etag", "last-modified")
        headers = [(name, value) for name, value in headers if name.lower() not in replaced]
        headers += [("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    start_response(status, headers)
    return [body]
