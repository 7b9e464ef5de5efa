"""The server: one thread a request, on 127.0.0.1 alone."""

from __future__ import annotations

import errno
import logging
import socketserver
import sys
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from lpsearch.errors import UsageError
from lpsearch.search import StudyStore
from lpsearch_dashboard.app import build_app
from lpsearch_dashboard.live import LiveStudy

__all__ = ["DashboardServer", "build_server"]

logger = logging.getLogger("lpsearch.dashboard")  # below "lpsearch", whose handlers the commands set

HOST = "127.0.0.1"


class _Handler(WSGIRequestHandler):
    """Answers one request, and logs it at level DEBUG."""

    timeout = 60  # of a connection that a browser opened and does not use

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request."""
        logger.debug(format, *args)


class DashboardServer(socketserver.ThreadingMixIn, WSGIServer):
    """Serves until ``serve_forever`` is interrupted; a context manager that closes the port."""

    daemon_threads = True
    allow_reuse_port = False  # newer versions of Python turn it on, and two servers would share a port unseen

    @property
    def url(self) -> str:
        """Address of the live page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind the port, without looking up this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error of a connection that the browser closed."""
        logger.debug("while answering %s", client_address, exc_info=sys.exc_info())


def build_server(store: StudyStore, directory: Path, *, port: int) -> DashboardServer:
    """Build the server of a study and bind its port.

    Args:
        store: the study's database, open for as long as the server runs.
        directory: the study's directory.
        port: where to serve; 0 takes any free port.

    Raises:
        UsageError: for a port that cannot be had.
        StudyError: if the study cannot be read.
    """
    study = LiveStudy(store, directory)
    study.read()  # a study that cannot be read is refused at once
    try:
        server = DashboardServer((HOST, port), _Handler)
    except OSError as error:
        reason = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs a privilege that you do not have"}
        if error.errno not in reason:
            raise
        raise UsageError(
            f"port {port} of {HOST} {reason[error.errno]}; name another with --port, or any free one with --port 0"
        ) from None
    server.set_app(build_app(study, directory))
    return server
