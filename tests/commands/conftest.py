"""Running the command line, in this process or in one that can be killed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lpsearch.commands.app import main
from tests.commands.advice import find_foreign_options
from tests.warm import WarmProcess


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, the JSON object of its last line, and what it said on stderr."""

    exit_code: int
    document: dict[str, Any]
    stdout: str
    stderr: str


Run = Callable[..., Outcome]
Start = Callable[..., WarmProcess]


@pytest.fixture
def code_file(tmp_path: Path) -> Path:
    """Return a text of another kind than ``text_file``."""
    path = tmp_path / "code.txt"
    path.write_text("".join(f"def f{i}(x): return {i} * x\n" for i in range(800)), encoding="utf-8")
    return path


@pytest.fixture
def brief_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a search time a workload for about a second, as ``lpsearch profile --seconds 1`` does, instead of 15."""
    from lpsearch.latency import measure_or_reuse_profile

    monkeypatch.setitem(measure_or_reuse_profile.__kwdefaults__, "budget_s", 1.0)


@pytest.fixture
def run_lpsearch(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a function that runs ``lpsearch ARGUMENTS`` in this process, with a cache of its own.

    Whatever fails: an error or a warning names only options that the command has.
    """
    import signal

    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path / "cache"))
    # A profile that is far off would be measured again, and the commands of a test are to use the same.
    monkeypatch.setattr("lpsearch.latency.reuse.LARGEST_QUIET_ERROR", math.inf)
    handler = signal.getsignal(signal.SIGTERM)
    loggers = {
        name: (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in ("lpsearch", "optuna")
    }

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        stdout, stderr = capfd.readouterr()
        words = [str(argument) for argument in arguments]
        for line in stderr.splitlines():
            if line.startswith(("ERROR ", "WARNING ")):
                foreign = find_foreign_options(words, line)
                assert not foreign, f"{foreign} are no options of this command: {line}"
        return Outcome(int(caught.value.code or 0), json.loads(stdout.splitlines()[-1]), stdout, stderr)

    yield run
    signal.signal(signal.SIGTERM, handler)
    for name, (level, handlers) in loggers.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers
    logging.getLogger("lpsearch").propagate = True


@pytest.fixture
def start_lpsearch() -> Iterator[Start]:
    """Return a function that starts ``lpsearch ARGUMENTS`` as a process; what still runs at the end is killed."""
    started: list[WarmProcess] = []

    def start(*arguments: object) -> WarmProcess:
        started.append(WarmProcess(*arguments))
        return started[-1]

    yield start
    for process in started:
        process.close()
