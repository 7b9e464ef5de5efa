"""Killed at random moments: what was finished stays, nothing is done twice, and files are whole or absent."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lpsearch.front_file import load_front_file
from lpsearch.plan import load_plan
from lpsearch.search import StudyStore, read_results
from tests.commands.test_export import write_plan
from tests.faults.nursery import Nursery
from tests.search.evaluators import SyntheticEvaluator

BUDGET = 8
NUM_MOMENTS = 20
NUM_WRITES = 6


def read_study(url: str) -> list[tuple]:
    """Return all that is known of every finished plan, and check that nothing else is left."""
    with StudyStore(url, study_name="demo") as store:
        results = read_results(store)
        study = optuna.load_study(study_name="demo", storage=store.optuna_storage)
        states = [trial.state for trial in study.trials]
        assert store.lock.find_holder() is None
    assert states.count(TrialState.COMPLETE) == len(results) == len({result.plan for result in results})
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    return [(result.plan, result.origin, result.state, result.loss) for result in results]


def draw(number: int, num_parts: int, *, seed: int) -> list[int]:
    """Draw a number, counted from 1, from each of so many equal parts of those up to ``number``."""
    rng = random.Random(seed)
    return [1 + rng.randrange(i * number // num_parts, (i + 1) * number // num_parts) for i in range(num_parts)]


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[tuple]]:
    """Return the number of steps of an unbroken search, and what it finds: what the formula says."""
    url = f"sqlite:///{tmp_path_factory.mktemp('unbroken') / 'study.db'}"
    num_steps = nursery.run("study", url=url, budget=BUDGET)
    found = read_study(url)
    assert len(found) == BUDGET
    evaluator = SyntheticEvaluator(10, num_windows=16)
    assert any(state == "stopped" for _, _, state, _ in found)
    for plan, _, state, loss in found:
        if state == "complete":
            nll = evaluator.evaluate_windows(plan, range(16)).nll_nats_per_token
            assert loss.nll == pytest.approx(sum(nll) / 16)
    return num_steps, found


def test_a_search_that_is_killed_goes_on_as_if_it_had_never_stopped(
    nursery: Nursery, unbroken: tuple[int, list[tuple]], tmp_path: Path
) -> None:
    """Every plan, its order, its origin and its losses are those of an unbroken run, bit for bit."""
    num_steps, expected = unbroken
    num_kept = set()
    for step in draw(num_steps, NUM_MOMENTS, seed=1):
        url = f"sqlite:///{tmp_path / f'{step}.db'}"
        nursery.run("study", url=url, budget=BUDGET, kill_at=step)
        with StudyStore(url, study_name="demo") as store:
            num_kept.add(0 if store.load_settings() is None else len(store.losses.load_plans()))
        nursery.run("study", url=url, budget=BUDGET)
        assert read_study(url) == expected, f"killed at step {step}"
    assert len(num_kept) > 4, "they were killed at many stages"


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_sampler_of_optunas_goes_on_too(nursery: Nursery, tmp_path: Path, sampler: str) -> None:
    urls = [f"sqlite:///{tmp_path / name}" for name in ("unbroken.db", "killed.db")]
    num_steps = nursery.run("study", url=urls[0], budget=14, sampler=sampler)
    nursery.run("study", url=urls[1], budget=14, sampler=sampler, kill_at=num_steps // 2)
    nursery.run("study", url=urls[1], budget=14, sampler=sampler)
    assert read_study(urls[1]) == read_study(urls[0])


def test_a_search_on_a_server_that_is_killed_goes_on_at_once(
    nursery: Nursery, unbroken: tuple[int, list[tuple]], server_url: str
) -> None:
    """Who is gone from this machine keeps nobody waiting for its lease."""
    num_steps, expected = unbroken
    StudyStore(server_url, study_name="demo").close()
    for step in (num_steps // 2, num_steps // 3, num_steps // 4):
        nursery.run("study", url=server_url, budget=BUDGET, lease_s=1e6, kill_at=step)
    nursery.run("study", url=server_url, budget=BUDGET, lease_s=1e6)
    assert read_study(server_url) == expected


# ---- Files that commands write ---------------------------------------------------------------------------------------


def hash_files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_front_that_a_killed_search_leaves_is_whole_or_absent(
    nursery: Nursery, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def build_arguments(out: Path) -> list[str]:
        words = [
            *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 16),
            *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--budget", 6, "--out", out),
        ]
        return list(map(str, words))

    def read_front(out: Path) -> list[dict]:
        file = load_front_file(out)
        assert file is not None
        points = [point.model_dump() for point in file.front]
        for point in points:
            assert load_plan(out / point["plan"]).num_joins == point["num_joins"]
        return points

    unbroken = tmp_path / "unbroken"
    function = "lpsearch.commands.fronts:FrontWriter.write"
    num_steps = nursery.run("command", arguments=build_arguments(unbroken), function=function)
    expected = read_front(unbroken)
    num_absent = 0
    out = tmp_path / "killed"
    arguments = build_arguments(out)
    nursery.run("command", arguments=arguments, function=function, kill_at=1)
    for step in draw(num_steps, NUM_WRITES, seed=2):
        for path in (out / "front.json", *out.glob("plans/*.json")):
            path.unlink(missing_ok=True)
        nursery.run("command", arguments=arguments, function=function, kill_at=step)
        if (out / "front.json").exists():
            assert read_front(out) == expected
        else:
            num_absent += 1
        for path in out.glob("plans/*.json"):
            load_plan(path)
    assert 0 < num_absent < NUM_WRITES
    nursery.run("command", arguments=arguments)
    assert read_front(out) == expected
    report = (out / "report.html").read_text()
    assert report.rstrip().endswith("</html>")


@pytest.fixture
def plan_file(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_plan(tiny_model_dir, tmp_path / "plan.json")


@pytest.mark.parametrize("command", ["export", "recover"])
def test_the_directory_that_a_killed_command_leaves_is_whole_or_absent(
    nursery: Nursery, plan_file: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    def build_arguments(out: Path) -> list[str]:
        if command == "export":
            return ["export", str(plan_file), str(out)]
        options = ("--windows", "40", "--seq-len", "32", "--device", "cpu", "--dtype", "float32")
        return ["recover", str(plan_file), "--out", str(out), "--data", str(text_file), *options]

    function = {
        "export": "lpsearch.export.checkpoint:_write_directory",
        "recover": "lpsearch.recovery:save_recovered",
    }[command]
    unbroken = tmp_path / "unbroken"
    num_steps = nursery.run("command", arguments=build_arguments(unbroken), function=function)
    assert num_steps > 5
    expected = hash_files(unbroken)
    for number, step in enumerate(draw(num_steps, 2, seed=4)):
        out = tmp_path / str(number) / "out"
        nursery.run("command", arguments=build_arguments(out), function=function, kill_at=step)
        if out.exists():  # it was whole when the process was killed
            check_same(hash_files(out), expected)
    out = tmp_path / "0" / "out"
    if not out.exists():
        nursery.run("command", arguments=build_arguments(out))
    check_same(hash_files(out), expected)


def check_same(found: dict[str, str], expected: dict[str, str]) -> None:
    """Compare files; a plan holds the time at which it was written."""
    assert found.keys() == expected.keys()
    for name in found.keys() - {"plan.json", "README.md"}:
        assert found[name] == expected[name], name
