"""What the hub says of a dataset, in one form for texts and for tasks; the hub is a server here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lpsearch.data.hub import check_hub_reachable
from lpsearch.errors import DataError, SourceError

ANSWERS = {"/api/datasets/who/gone": (404, "RepoNotFound"), "/api/datasets/who/gated": (403, "GatedRepo")}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a dataset that it lacks, one that is gated, and one that breaks it."""

    def do_GET(self) -> None:
        status, code = ANSWERS.get(self.path.partition("?")[0], (500, "Broken"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("subject", ["dataset", "task arc: its dataset"])
def test_what_the_hub_says_is_one_message_for_texts_and_tasks(endpoint: str, subject: str) -> None:
    with pytest.raises(DataError, match=f"^{subject} who/gone is neither a local file nor on the hub at {endpoint}"):
        check_hub_reachable("who/gone", subject=subject)
    with pytest.raises(SourceError, match=f"^{subject} who/gated is gated; accept its terms at {endpoint}/datasets/"):
        check_hub_reachable("who/gated", subject=subject)
    with pytest.raises(SourceError, match=f"^{subject} who/broken cannot be reached at {endpoint}: .*; do this$"):
        check_hub_reachable("who/broken", subject=subject, mend="do this")


def test_the_hub_is_not_asked_where_it_is_set_to_offline(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    check_hub_reachable("who/gone")
