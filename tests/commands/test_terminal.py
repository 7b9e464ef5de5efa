"""How commands speak: a live display on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lpsearch.commands.app import app
from lpsearch.commands.lines import ConsoleHandler, JsonFormatter, log_stray_lines
from tests.commands.conftest import Run
from tests.commands.terminal import open_terminal, start_on_terminal

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans that takes seconds."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def read_lines(stderr: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in stderr.splitlines()]
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"]
    return lines


def test_a_terminal_shows_the_search_and_keeps_the_summary(arguments: list, tmp_path: Path) -> None:
    with start_on_terminal(*arguments, "--budget", 13) as terminal:
        assert terminal.wait() == 0, terminal.output
        lines = terminal.draw()
    assert "searching" in terminal.output
    assert "less depth" in terminal.output.split("searching", 1)[1].split("held-out")[0], "the front is drawn meanwhile"
    assert "\x1b[2K" in terminal.output
    assert terminal.output.count(HIDE) == terminal.output.count(SHOW)
    assert terminal.output.rindex(SHOW) > terminal.output.rindex(HIDE)
    assert not [line for line in lines if line.startswith(("searching", "loading")) and "━" in line], "bars are gone"
    assert any(line.startswith("WARNING the unmodified model needs") for line in lines)
    assert not [line for line in lines if line.startswith("{")], "JSON is for programs"
    (title_at,) = (index for index, line in enumerate(lines) if line.startswith("tiny-llama0: all 13 plans evaluated"))
    summary = "\n".join(lines[title_at:])
    for shown in ("held out", "delta nll:", "Plans to start from", str(tmp_path / "study" / "report.html")):
        assert shown in summary
    assert all(len(line) <= 100 for line in lines)


def test_ctrl_c_gives_a_narrow_terminal_back(arguments: list) -> None:
    with start_on_terminal(*arguments, "--budget", 13, "--windows", 30, width=40, height=20) as terminal:
        terminal.wait_for(lambda output: "searching" in output and "less depth" in output.split("searching")[-1])
        terminal.type(b"\x03")
        assert terminal.wait() == 130, terminal.output
        lines = terminal.draw()
    assert terminal.output.rindex(SHOW) > terminal.output.rindex(HIDE)
    assert "searching" not in lines, "the display is gone"
    assert any(line.startswith("ERROR interrupted") for line in lines)
    assert "exit_code" not in terminal.output, "a person is told once"


@pytest.mark.parametrize(("name", "value", "is_live"), [("TERM", "dumb", False), ("NO_COLOR", "1", True)])
def test_a_terminal_gets_what_it_can_show(
    run_lpsearch: Run, arguments: list, monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_live: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    with open_terminal() as terminal:
        with os.fdopen(os.dup(terminal.process_end), "w") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
        terminal.hang_up()
        output = terminal.output
    assert "2 plans evaluated" in output
    assert (HIDE in output) == is_live
    assert ("trial 2/2" in output) == (not is_live)
    assert is_live or "\x1b" not in output
    styles = {code for style in re.findall(r"\x1b\[([0-9;]*)m", output) for code in style.split(";")}
    assert styles <= {"", "0", "1", "2"}, "nothing but bold and dim"


def test_a_pipe_gets_few_lines_and_no_control_characters(
    run_lpsearch: Run, arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = run_lpsearch(*arguments, "--budget", 13, "--out", tmp_path / "[red]out")
    assert not {"\x1b", "\r"} & set(outcome.stderr)
    trials = [line for line in outcome.stderr.splitlines() if line.startswith("INFO trial ")]
    assert 10 <= len(trials) <= 12
    assert trials[0].startswith("INFO trial 1/13")
    assert trials[-1].startswith("INFO trial 13/13")
    assert trials[-1].endswith(" left")
    assert f"  open {tmp_path}/[red]out/report.html\n" in outcome.stderr, "paths are no markup"
    best = outcome.document["front"][1]
    assert f"{best['delta_nll']:.3f} at 1 join" in trials[-1]


def test_a_search_of_divergence_says_kl(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    outcome = run_lpsearch(*arguments, "--budget", 13, "--metric", "kl")
    points = json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))["front"]
    trials = [line for line in outcome.stderr.splitlines() if line.startswith("INFO trial ")]
    assert all(", kl " in line for line in trials)
    assert f"{points[1]['kl_nats_per_token']:.3f} at 1 join" in trials[-1]
    table = outcome.stderr.split("all 13 plans evaluated")[1]
    for point in points[1:]:
        cells = [
            f"{point[name]:.3f} ±{point[error]:.3f}"
            for name, error in (
                ("kl_nats_per_token", "kl_se"),
                ("heldout_kl_nats_per_token", "heldout_kl_se"),
                ("delta_nll", "delta_nll_se"),
            )
        ]
        assert any(all(cell in line for cell in cells) for line in table.splitlines())
    for words in ("held-out kl: the same on windows", "kl: divergence from", "by the kl that you accept"):
        assert words in table


def test_the_summary_lists_what_is_there(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    out = tmp_path / "study"
    stderr = run_lpsearch(*arguments, "--budget", 3).stderr
    assert f"All of it is in {out}: study.db, front.json, plans/, report.html\n" in stderr
    other = tmp_path / "other.db"
    stderr = run_lpsearch(*arguments, "--budget", 3, "--fresh", "--storage", f"sqlite:///{other}").stderr
    assert f"The results are in {out}: front.json, plans/, report.html; the trials in {other}\n" in stderr
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    stderr = run_lpsearch(*arguments, "--budget", 4, "--storage", f"sqlite:///{other}").stderr
    assert f"The results are in {out}: front.json, plans/; the trials in {other}\n" in stderr


def test_json_makes_every_line_an_object(run_lpsearch: Run, arguments: list) -> None:
    outcome = run_lpsearch(*arguments, "--budget", 13, "--json")
    assert outcome.exit_code == 0
    assert outcome.stdout.count("\n") == 1
    lines = read_lines(outcome.stderr)
    assert {line["level"] for line in lines} == {"INFO", "WARNING"}
    progress = [line["progress"] for line in lines if "progress" in line]
    search = [entry for entry in progress if entry["step"] == "search"]
    assert [entry["trials"] for entry in search] == [*range(1, 14)]
    assert {entry["budget"] for entry in search} == {13}
    assert [point["delta_nll"] for point in search[-1]["front"]] == [
        point["delta_nll"] for point in outcome.document["front"]
    ]
    assert search[-1]["trial"].keys() == search[-1]["front"][0].keys()
    steps = [entry["step"] for entry in progress if entry["step"] != "search"]
    assert len(set(steps)) >= 4
    assert all(steps.count(step) >= 2 for step in steps), "each step says when it begins and when it has ended"


def test_optuna_speaks_the_same_way(run_lpsearch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_lpsearch("report", tmp_path, "--json")
    logging.getLogger("optuna.storages").info("not worth a line")
    logging.getLogger("optuna.storages").warning("worth one")
    (line,) = read_lines(capfd.readouterr().err)
    assert (line["level"], line["message"]) == ("WARNING", "worth one")


def test_json_and_quiet_leave_what_matters(run_lpsearch: Run, arguments: list) -> None:
    outcome = run_lpsearch("--json", *arguments, "--budget", 2, "--quiet")
    assert [line["level"] for line in read_lines(outcome.stderr)] == ["WARNING"]
    point = outcome.document["front"][-1]["plan"]
    plan = Path(outcome.document["out"]) / point
    assert run_lpsearch("evaluate", plan, "--device", "cpu", "--quiet").stderr == ""
    generate = ["generate", plan, "--prompt", "The", "--max-new-tokens", 3, "--device", "cpu"]
    for line in read_lines(run_lpsearch(*generate, "--json").stderr):
        assert line["level"] == "INFO"
    assert run_lpsearch("models", "--quiet").stderr == ""
    assert run_lpsearch("plan", "show", "no-such-plan.json", "--quiet").stderr.startswith("ERROR no-such-plan.json: ")
    assert "smollm2-135m" in run_lpsearch("models").stderr


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["optimize", "--jsn", "--json"], 2),
        (["optimize", "--json", "--model", "no-such-alias"], 2),
        (["plan", "show", "no-such-plan.json", "--json"], 2),
        (["optimize", "--json", "--model", "smollm2-135m", "--out", "/proc/study"], 1),
    ],
)
def test_errors_are_objects_too(run_lpsearch: Run, words: list[str], exit_code: int) -> None:
    outcome = run_lpsearch(*words)
    (line,) = read_lines(outcome.stderr)
    error = outcome.document["error"]
    assert (outcome.exit_code, error["exit_code"], line["level"]) == (exit_code, exit_code, "ERROR")
    assert line["message"] == error["message"]


def test_every_command_takes_both_options() -> None:
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [command for group in groups for command in group.registered_commands]
    assert len(commands) >= 13
    for command in commands:
        assert {"quiet", "json"} <= command.callback.__annotations__.keys()


def test_stray_lines_become_warnings() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    stray = logging.getLogger("tests.stray")
    stray.addHandler(handler)
    stray.propagate = False
    with log_stray_lines(stray):
        sys.stderr.write("\r 10%\r 90%")
        print("\r100%", file=sys.stderr)
        print("first\n\nsecond", end="", file=sys.stderr)
    stray.removeHandler(handler)
    lines = read_lines(stream.getvalue())
    assert [line["message"] for line in lines] == ["100%", "first", "second"]
    assert {line["level"] for line in lines} == {"WARNING"}


def test_no_thread_takes_the_lines_of_another() -> None:
    num_threads, num_lines = 8, 200
    logged: list[str] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(1e-5)  # lets the other threads write meanwhile
            logged.append(record.getMessage())

    stray = logging.getLogger("tests.threads")
    handler = Slow()
    stray.addHandler(handler)
    stray.propagate = False

    def write(name: int) -> None:
        for line in range(num_lines):
            sys.stderr.write(f"{name} ")
            sys.stderr.write(f"{line}\n")
        sys.stderr.write(f"{name} end")

    with log_stray_lines(stray):
        threads = [threading.Thread(target=write, args=(name,)) for name in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stray.removeHandler(handler)
    expected = [f"{name} {line}" for name in range(num_threads) for line in [*range(num_lines), "end"]]
    assert sorted(logged) == sorted(expected)


def test_a_failing_handler_does_not_go_round_in_circles() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("gone")

    stray = logging.getLogger("tests.broken")
    handler = logging.StreamHandler(Broken())
    stray.addHandler(handler)
    stray.propagate = False
    with log_stray_lines(stray):
        logging.getLogger("tests.broken").warning("lost")
    stray.removeHandler(handler)


def test_log_lines_keep_their_markup_and_their_length() -> None:
    from rich.console import Console

    stream = io.StringIO()
    handler = ConsoleHandler(Console(file=stream, width=20))
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "[bold]%s", ("a/long/path" * 5,), None)
    handler.emit(record)
    assert stream.getvalue() == "WARNING [bold]" + "a/long/path" * 5 + "\n"
