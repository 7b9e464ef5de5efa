"""How commands end: the JSON line and the exit code, whatever becomes of stderr and of the summary."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, ConsoleOptions, RenderResult

from lpsearch.commands.console import Answer, run_command
from tests.commands.conftest import Run

End = Callable[..., tuple[int, dict[str, Any], str]]


def run_without_reader(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run ``lpsearch ARGUMENTS`` with a pipe as stderr that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-m", "lpsearch", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=writing,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_a_reader_of_stderr_that_left_changes_nothing(options: list[str]) -> None:
    done = run_without_reader("models", *options)
    assert (done.returncode, len(json.loads(done.stdout)["models"]) > 1) == (0, True)
    done = run_without_reader("plan", "show", "no-such-plan.json", *options)
    assert (done.returncode, json.loads(done.stdout)["error"]["exit_code"]) == (2, 2)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_cannot_be_written_changes_nothing(redirection: str) -> None:
    for words, exit_code in ((["models"], 0), (["plan", "show", "no-such-plan.json"], 2)):
        command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "lpsearch", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == exit_code
        assert json.loads(done.stdout)


def test_a_stdout_that_cannot_be_written_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lpsearch", "models", "--quiet"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR the result could not be written to stdout: ")
    assert done.stderr.count("\n") == 1


def test_search_and_generation_go_on_without_a_reader(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    done = run_without_reader(
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--budget", 3),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    )
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["trials"] == 3
    done = run_without_reader(
        *("generate", tmp_path / "study" / document["front"][-1]["plan"], "--prompt", "The", "--max-new-tokens", 5),
        *("--device", "cpu", "--dtype", "float32"),
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["new_tokens"] == 5


@pytest.fixture
def end_with(capfd: pytest.CaptureFixture[str]) -> Iterator[End]:
    """Return a function that runs a command with an answer of a summary: exit code, JSON object and stderr."""
    package = logging.getLogger("lpsearch")
    before = (signal.getsignal(signal.SIGTERM), package.level, package.handlers[:], package.propagate)

    def end(summary: object, **options: bool) -> tuple[int, dict[str, Any], str]:
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: Answer({"found": 1}, summary), **options)
        stdout, stderr = capfd.readouterr()
        return int(caught.value.code or 0), json.loads(stdout), stderr

    yield end
    signal.signal(signal.SIGTERM, before[0])
    package.setLevel(before[1])
    package.handlers[:] = before[2]
    package.propagate = before[3]


class Failing:
    """A summary that cannot be laid out."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Begin, and fail."""
        yield "the first line"
        raise self.error


@pytest.mark.parametrize("as_json", [False, True])
def test_a_summary_that_fails_leaves_the_result(end_with: End, as_json: bool) -> None:
    exit_code, document, stderr = end_with(Failing(ZeroDivisionError("a slip")), as_json=as_json)
    assert (exit_code, document) == (0, {"found": 1})
    assert "the summary could not be printed: ZeroDivisionError: a slip" in stderr
    assert "Traceback" not in stderr


def test_an_interrupt_of_the_summary_leaves_the_result(end_with: End) -> None:
    exit_code, document, stderr = end_with(Failing(KeyboardInterrupt()))
    assert (exit_code, document) == (0, {"found": 1}), "the work is done, so there is nothing to go on with"
    assert stderr.startswith("WARNING interrupted while the summary was printed")


def test_values_named_like_the_shared_options_are_values(run_lpsearch: Run) -> None:
    for words in (
        ["generate", "no-such-plan.json", "--prompt", "--json"],
        ["generate", "--prompt", "--json", "--", "--quiet"],
        ["plan", "validate", "no-such-plan.json", "--model", "--json"],
    ):
        outcome = run_lpsearch(*words)
        assert outcome.exit_code == 2
        assert outcome.stderr.startswith("ERROR "), "lines for a person"
    for words in (
        ["--json", "plan", "show", "no-such-plan.json"],
        ["plan", "--json", "show", "no-such-plan.json"],
        ["generate", "no-such-plan.json", "--prompt", "--quiet", "--json"],
        ["generate", "no-such-plan.json", "--prompt=plan", "--json"],
        ["no-such-command", "--json"],
    ):
        outcome = run_lpsearch(*words)
        assert outcome.exit_code == 2
        assert json.loads(outcome.stderr)["level"] == "ERROR"
