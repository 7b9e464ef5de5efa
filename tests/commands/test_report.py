"""``lpsearch report``, and the report that ``optimize`` leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lpsearch.search import StudyStore
from tests.commands.conftest import Run, Start
from tests.report.conftest import search_formula


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans that takes seconds."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def test_a_search_leaves_a_report_and_report_writes_the_same(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    document = run_lpsearch(*arguments, "--budget", 13).document
    path = tmp_path / "study" / "report.html"
    written = path.read_text(encoding="utf-8")
    for point in document["front"]:
        assert f"{point['heldout_delta_nll']:.4f}" in written
        assert f"lpsearch evaluate {tmp_path / 'study' / point['plan']} " in written.replace(
            "</span> <span>", " "
        ).replace("<span>", "")
    outcome = run_lpsearch("report", tmp_path / "study", "--out", tmp_path / "again.html")
    assert outcome.exit_code == 0, outcome.stderr
    assert list(outcome.document) == ["report", "study", "trials", "front_plans", "num_bytes", "seconds"]
    assert outcome.document["trials"] == 13
    assert outcome.document["front_plans"] == len(document["front"])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_picks_agree_with_plan_pick(
    run_lpsearch: Run, arguments: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    from lpsearch.report import advice, load_report
    from lpsearch.report.advice import pick_plans

    document = run_lpsearch(*arguments, "--budget", 13, "--metric", metric).document
    with StudyStore(f"sqlite:///{tmp_path}/study/study.db", study_name=document["study"]) as store:
        report = load_report(store, tmp_path / "study")
    losses = [result.get_reported_cost(metric) for result in report.front]
    assert len(losses) > 2
    monkeypatch.setattr(advice, "LOSS_LIMITS", {"none": min(losses[1:]) / 2, **{str(loss): loss for loss in losses}})
    assert any(pick.index is not None for pick in pick_plans(report))
    for pick in pick_plans(report):
        outcome = run_lpsearch("plan", "pick", tmp_path / "study", "--max-delta", repr(pick.max_loss))
        if outcome.exit_code:
            assert pick.index is None
            assert pick.max_loss < 0, "less than the unmodified model loses"
            continue
        expected = 0 if pick.index is None else report.front[pick.index].num_joins
        assert outcome.document["num_joins"] == expected
        assert ("this is the unmodified model" in outcome.stderr) == (expected == 0)


def test_an_interrupted_search_leaves_a_report(start_lpsearch: Start, arguments: list, tmp_path: Path) -> None:
    process = start_lpsearch(*arguments, "--budget", 13)
    for line in process.stderr:
        if "trial 4/13" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert json.loads(stdout.splitlines()[-1])["error"]["type"] == "Interrupted"
    assert "under way or was interrupted" in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")


def test_a_running_study_can_be_looked_at(
    run_lpsearch: Run, start_lpsearch: Start, arguments: list, tmp_path: Path
) -> None:
    process = start_lpsearch(*arguments, "--budget", 13)
    for line in process.stderr:
        if "trial 2/13" in line:
            break
    outcome = run_lpsearch("report", tmp_path / "study", "--out", tmp_path / "now.html")
    assert outcome.exit_code == 0, outcome.stderr
    assert 2 <= outcome.document["trials"] <= 13
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr


def test_a_report_that_cannot_be_written_does_not_fail_the_search(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    (tmp_path / "study" / "report.html").mkdir(parents=True)
    outcome = run_lpsearch(*arguments, "--budget", 5)
    assert outcome.exit_code == 0
    assert outcome.document["trials"] == 5
    assert "the report was not written" in outcome.stderr
    outcome = run_lpsearch("report", tmp_path / "study")
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "UsageError")


def test_the_hint_of_a_report_that_was_not_written_writes_it(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    out = tmp_path / "my study"
    (out / "report.html").mkdir(parents=True)
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    with StudyStore(storage, study_name="other") as store:
        store.save_settings({})
    outcome = run_lpsearch(*arguments, "--budget", 3, "--out", out, "--storage", storage, "--study", "a b")
    assert outcome.exit_code == 0, outcome.stderr
    (out / "report.html").rmdir()
    command = shlex.split(re.search(r"`(lpsearch report .+)` tries again", outcome.stderr).group(1))
    outcome = run_lpsearch(*command[1:])
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["study"] == "a b"
    assert (out / "report.html").is_file()


def test_a_shared_database_is_asked_for_the_study_of_the_directory(run_lpsearch: Run, tmp_path: Path) -> None:
    search_formula(tmp_path, budget=5, heldout=False)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    path = tmp_path / "front.json"
    front = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**front, "study": "gone"}), encoding="utf-8")
    alone = run_lpsearch("report", tmp_path, "--storage", storage)
    assert (alone.exit_code, alone.document["study"]) == (0, "demo"), "the only one"
    assert "of the study 'gone', not 'demo'" in alone.stderr

    with StudyStore(storage, study_name="later") as store:
        store.save_settings({})
    for named in ("gone", None):
        if named is None:
            path.unlink()
        for command in (["report"], ["dashboard", "--port", 0]):
            refused = run_lpsearch(*command, tmp_path, "--storage", storage)
            assert (refused.exit_code, refused.document["error"]["type"]) == (2, "UsageError")
            for part in ("holds 2 studies", "--study: 'demo', 'later'", str(path)):
                assert part in refused.document["error"]["message"]
    assert run_lpsearch("report", tmp_path, "--storage", storage, "--study", "demo").exit_code == 0

    path.write_text(json.dumps({**front, "study": "demo"}), encoding="utf-8")
    chosen = run_lpsearch("report", tmp_path, "--storage", storage)
    assert (chosen.exit_code, chosen.document["study"]) == (0, "demo")
    assert "not 'demo'" not in chosen.stderr


def test_directories_without_a_study_are_refused(run_lpsearch: Run, tmp_path: Path) -> None:
    outcome = run_lpsearch("report", tmp_path / "nowhere")
    assert outcome.exit_code == 2
    assert "no such directory" in outcome.document["error"]["message"]
    outcome = run_lpsearch("report", tmp_path)
    assert outcome.exit_code == 2
    assert "holds no study.db" in outcome.document["error"]["message"]
    assert not (tmp_path / "study.db").exists(), "looking for a study must not make one"


def test_studies_that_cannot_be_read_are_named(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    out = tmp_path / "study"
    run_lpsearch(*arguments, "--budget", 5)
    outcome = run_lpsearch("report", out, "--study", "other")
    assert outcome.exit_code == 2
    assert "holds no study 'other'; it holds 'tiny-llama0'" in outcome.document["error"]["message"]
    outcome = run_lpsearch("report", out, "--out", tmp_path / "nowhere" / "report.html")
    assert outcome.exit_code == 2
    front = json.loads((out / "front.json").read_text(encoding="utf-8"))
    (out / "front.json").write_text(json.dumps({**front, "schema_version": 99}), encoding="utf-8")
    outcome = run_lpsearch("report", out)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "StudyVersionError")
    (out / "front.json").unlink()
    with closing(sqlite3.connect(out / "study.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    outcome = run_lpsearch("report", out)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "StudyVersionError")
    (out / "study.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    outcome = run_lpsearch("report", out)
    assert (outcome.exit_code, outcome.document["error"]["type"]) == (1, "StudyError")


def write_front(directory: Path, points: list[dict[str, Any]], **fields: Any) -> None:
    """Write a ``front.json`` whose points say what they are given, and else what every point says."""
    point = {
        **{"delta_nll": 0.0, "delta_nll_se": 0.0, "heldout_delta_nll": None, "speedup": None},
        **{"heldout_delta_nll_se": None, "kl_nats_per_token": None, "perplexity": 20.0, "latency_ms": None},
        **{"groups": [[0], [1]], "origin": "scan", "trial": 0},
    }
    model = {"id": "m", "revision": None, "num_layers": 2, "fingerprint": "a-b"}
    counts = {"trials": 4, "exact": False, "baseline_nll": 3.0, "proxy_tokens": 1, "heldout_tokens": 1}
    document = {"schema_version": 1, "study": "s", "model": model, **counts, **fields}
    document["front"] = [{**point, "depth_reduction": 0.1 * given.get("num_joins", 0), **given} for given in points]
    (directory / "front.json").write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(("objective", "best"), [("depth", "b.json"), ("latency", "a.json")])
def test_plan_pick_takes_what_saves_most_by_the_objective(
    run_lpsearch: Run, tmp_path: Path, objective: str, best: str
) -> None:
    points = [
        {"plan": name, "num_joins": num_joins, "delta_nll": loss, "speedup": speedup}
        for name, num_joins, loss, speedup in (
            ("base.json", 0, 0.0, 1.0),
            ("a.json", 1, 0.06, 1.2),
            ("b.json", 2, 0.05, 1.1),
            ("lossy.json", 3, 0.5, 1.3),
        )
    ]
    write_front(tmp_path, points, objective=objective, metric="nll")
    picked = run_lpsearch("plan", "pick", tmp_path, "--max-delta", 0.1)
    assert picked.document["plan"] == str(tmp_path / best)


@pytest.mark.parametrize(("metric", "best"), [("nll", "a.json"), ("kl", "b.json"), (None, "a.json")])
def test_plan_pick_compares_the_loss_that_was_searched(
    run_lpsearch: Run, tmp_path: Path, metric: str | None, best: str
) -> None:
    points = [
        {
            **{"plan": name, "num_joins": num_joins, "delta_nll": nll, "heldout_delta_nll": nll},
            "kl_nats_per_token": kl,
            **({} if metric is None else {"heldout_kl_nats_per_token": heldout}),
        }
        for name, num_joins, nll, kl, heldout in (
            ("base.json", 0, 0.0, 0.0, 0.0),
            ("a.json", 1, 0.05, 0.03, 0.04),
            ("b.json", 2, 0.2, 0.3, 0.09),
            ("c.json", 3, 0.3, 0.05, 0.2),
        )
    ]
    named = {} if metric is None else {"metric": metric}
    write_front(tmp_path, points, **named)
    outcome = run_lpsearch("plan", "pick", tmp_path, "--max-delta", 0.1)
    assert outcome.document["plan"] == str(tmp_path / best)
    assert ("written by an older lpsearch" in outcome.stderr) == (metric is None)


def test_plan_pick_prints_the_point_as_the_file_has_it(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 13)
    points = json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))["front"]
    for limit in (0.0, 0.1, 9.0):
        document = run_lpsearch("plan", "pick", tmp_path / "study", "--max-delta", limit).document
        assert {**document, "plan": str(Path(document["plan"]).relative_to(tmp_path / "study"))} in points


@pytest.mark.parametrize(
    ("content", "exit_code", "message"),
    [
        (None, 1, "not there; run `lpsearch optimize --out /"),
        ("nothing", 1, "cannot be read"),
        ('{"schema_version": 99}', 2, "schema_version is 99, this lpsearch reads 1"),
        ('{"schema_version": 1, "front": []}', 1, "not the front of a study: study: Field required"),
    ],
)
def test_fronts_that_cannot_be_read_are_named(
    run_lpsearch: Run, tmp_path: Path, content: str | None, exit_code: int, message: str
) -> None:
    if content is not None:
        (tmp_path / "front.json").write_text(content, encoding="utf-8")
    outcome = run_lpsearch("plan", "pick", tmp_path, "--max-delta", 0.1)
    assert outcome.exit_code == exit_code
    assert message in outcome.document["error"]["message"]
    assert str(tmp_path / "front.json") in outcome.document["error"]["message"]


READ_MOUNTED = """
mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" || exit 77
! touch "$2/x" 2>/dev/null || exit 77
"$3" -m lpsearch report "$2" --out "$4" || exit 1
"$3" -m lpsearch report "$2"
test $? = 1
"""


def test_a_study_on_a_read_only_medium_is_reported(tmp_path: Path) -> None:
    """Root may write whatever the mode of a directory says, so it is mounted."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not on this machine")
    source, mounted = tmp_path / "source", tmp_path / "mounted"
    for directory in (source, mounted):
        directory.mkdir()
    search_formula(source, budget=4)
    command = [
        "unshare",
        "-m",
        "bash",
        "-c",
        READ_MOUNTED,
        "bash",
        source,
        mounted,
        sys.executable,
        tmp_path / "r.html",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=200)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no read-only mount can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    written, refused = map(json.loads, done.stdout.splitlines())
    assert written["trials"] == 4
    assert (tmp_path / "r.html").stat().st_size == written["num_bytes"]
    assert "--out" in refused["error"]["message"]
