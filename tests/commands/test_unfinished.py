"""A search that was interrupted, or killed, leaves the front that it had found."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lpsearch.front_file import load_front_file
from lpsearch.plan import Plan, load_plan
from tests.commands.conftest import Run, Start


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 12, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def end_after(process: subprocess.Popen, line: str, signal_number: int) -> tuple[int, str]:
    """Send a signal after a line of stderr; return the exit code and what stood on stdout."""
    for found in process.stderr:
        if line in found:
            break
    process.send_signal(signal_number)
    stdout, _ = process.communicate(timeout=120)
    return process.returncode, stdout


def check_front(directory: Path) -> dict[str, Any]:
    """Check that every plan of the front has its file, and no other plan has one; return the front."""
    file = load_front_file(directory)
    assert file is not None
    for point in file.front:
        assert load_plan(directory / point.plan) == Plan.from_groups(point.groups)
    assert {f"plans/{path.name}" for path in (directory / "plans").iterdir()} == {point.plan for point in file.front}
    document: dict[str, Any] = json.loads((directory / "front.json").read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_search_is_worth_what_it_found(
    run_lpsearch: Run, start_lpsearch: Start, arguments: list, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "study"
    exit_code, _ = end_after(start_lpsearch(*arguments, "--budget", 13), "trial 6/13", how)
    assert exit_code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    front = check_front(out)
    assert front["finished"] is False
    assert front["exact"] is False
    assert front["trials"] >= 6 if how == signal.SIGINT else front["trials"] >= 2
    assert len(front["front"]) >= 2
    assert front["front"][1]["heldout_delta_nll"] is None

    picked = run_lpsearch("plan", "pick", out, "--max-delta", 99)
    assert picked.exit_code == 0, picked.stderr
    assert picked.document["finished"] is False
    assert "unfinished" in picked.stderr
    shown = run_lpsearch("plan", "show", picked.document["plan"])
    assert "unfinished" in shown.stderr
    assert "not measured" in shown.stderr
    reported = run_lpsearch("report", out)
    assert "unfinished" in reported.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "under way or was interrupted" in page
    name = Path(picked.document["plan"]).name
    assert name in page, "the page gives the commands for the plans that are there"

    ended = run_lpsearch(*arguments, "--budget", 13)
    assert ended.exit_code == 0, ended.stderr
    front = check_front(out)
    assert front["finished"] is True
    assert front["exact"] is True
    assert all(point["heldout_delta_nll"] is not None for point in front["front"])
    picked = run_lpsearch("plan", "pick", out, "--max-delta", 99)
    assert "finished" not in picked.document
    assert "unfinished" not in picked.stderr + run_lpsearch("plan", "show", picked.document["plan"]).stderr


def test_a_search_that_goes_on_keeps_the_held_out_losses(
    run_lpsearch: Run, start_lpsearch: Start, arguments: list, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    run_lpsearch(*arguments, "--budget", 6)
    known = {json.dumps(point["groups"]): point for point in check_front(out)["front"]}
    end_after(start_lpsearch(*arguments, "--budget", 13), "trial 8/13", signal.SIGINT)
    front = check_front(out)
    assert front["finished"] is False
    kept = [point for point in front["front"] if json.dumps(point["groups"]) in known]
    assert kept[0]["num_joins"] == 0
    for point in kept:
        former = known[json.dumps(point["groups"])]
        assert point["heldout_delta_nll"] == former["heldout_delta_nll"] is not None


def test_a_search_that_is_interrupted_before_its_first_trial_is_interrupted_all_the_same(
    run_lpsearch: Run, arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to write yet, which is no error of the study."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lpsearch.evaluation.ModelEvaluator.evaluate_windows", interrupt)
        outcome = run_lpsearch(*arguments, "--budget", 4)
    assert outcome.exit_code == 130
    assert outcome.document["error"]["type"] == "Interrupted"
    assert "holds no study" not in outcome.stderr
    assert not (tmp_path / "study" / "front.json").exists()
    assert run_lpsearch(*arguments, "--budget", 4).document["trials"] == 4


def test_a_front_of_an_older_version_counts_as_finished(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    out = tmp_path / "study"
    run_lpsearch(*arguments, "--budget", 3)
    document = check_front(out)
    assert document.pop("finished") is True
    document.pop("speedup_margin")
    (out / "front.json").write_text(json.dumps(document), encoding="utf-8")
    file = load_front_file(out)
    assert file is not None
    assert file.finished


def test_a_directory_that_cannot_be_written_meanwhile_does_not_end_the_search(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    """What is in the way of ``plans/`` ends the search only when its last step needs the place."""
    out = tmp_path / "study"
    out.mkdir()
    (out / "plans").write_text("in the way", encoding="utf-8")
    outcome = run_lpsearch(*arguments, "--budget", 4)
    assert outcome.exit_code == 1
    assert outcome.stderr.count("the unfinished front could not be written") == 1
    (out / "plans").unlink()
    outcome = run_lpsearch(*arguments, "--budget", 4)
    assert (outcome.exit_code, outcome.document["trials"]) == (0, 4)


def test_freezing_more_layers_says_what_it_hides(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    assert run_lpsearch(*arguments, "--budget", 13).exit_code == 0
    outcome = run_lpsearch(*arguments, "--budget", 13, "--freeze", "0-3")
    assert outcome.exit_code == 0, outcome.stderr
    hidden = 13 - 2  # only layers 4 and 5 may still join
    assert f"{hidden} of the 13 finished plans change" in outcome.stderr
    assert [point["num_joins"] for point in outcome.document["front"]] == [0, 1]
    reported = run_lpsearch("report", tmp_path / "study")
    assert (reported.document["trials"], reported.document["front_plans"]) == (13, 2)
    assert "unfinished" not in reported.stderr
    outcome = run_lpsearch(*arguments, "--budget", 13)
    assert "--freeze keeps" not in outcome.stderr
    assert outcome.document["front"][-1]["num_joins"] == 3


def test_report_writes_the_notes_of_a_dashboard_that_came_later(
    run_lpsearch: Run, arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna_dashboard", reason="the extra dashboard is not installed")
    from lpsearch.report.annotations import is_annotated
    from lpsearch.report.study import load_report
    from lpsearch.search import StudyStore

    def look() -> bool:
        with StudyStore(f"sqlite:///{out / 'study.db'}", study_name=name) as store:
            return is_annotated(store, load_report(store, out))

    out = tmp_path / "study"
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "optuna_dashboard", None)  # as if it were not installed
        name = run_lpsearch(*arguments, "--budget", 4).document["study"]
    assert not look()
    assert run_lpsearch("report", out).exit_code == 0
    assert look()
    assert {path.suffix for path in (out / "artifacts").iterdir()} != set()
