"""``lpsearch optimize`` from end to end, on a tiny model that really runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from safetensors.torch import load_file, save_file

from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, load_plan, save_plan
from lpsearch.search import StudyStore
from tests.commands.conftest import Run, Start
from tests.tolerances import FLOAT32_LOSS, LOSS_AGAIN

SUMMARY_FIELDS = [
    "plan",
    "num_joins",
    "depth_reduction",
    "delta_nll",
    "heldout_delta_nll",
    "perplexity",
    "latency_ms",
    "speedup",
]


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans that takes seconds."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "study"),
    ]


def test_search_leaves_a_front_whose_plans_hold_what_they_promise(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    outcome = run_lpsearch(*arguments, "--budget", 10)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.count("\n") == 1, "stdout carries the JSON line alone"
    document = outcome.document
    assert list(document) == ["study", "out", "trials", "baseline_nll", "front"]
    assert (document["study"], document["out"], document["trials"]) == ("tiny-llama0", str(out), 10)
    assert [list(point) for point in document["front"]] == [SUMMARY_FIELDS] * len(document["front"])
    baseline, *others = document["front"]
    assert (baseline["num_joins"], baseline["depth_reduction"], baseline["delta_nll"]) == (0, 0, 0)
    assert baseline["latency_ms"] is None
    assert others, "ten of thirteen plans hold some with joins"
    for better, worse in itertools.pairwise(others):
        assert better["num_joins"] < worse["num_joins"]
        assert better["delta_nll"] < worse["delta_nll"]
    front_file = json.loads((out / "front.json").read_text(encoding="utf-8"))
    assert [point["plan"] for point in front_file["front"]] == [point["plan"] for point in document["front"]]
    assert {path.name for path in (out / "plans").iterdir()} == {
        Path(point["plan"]).name for point in document["front"]
    }
    for point in document["front"]:
        plan = load_plan(out / point["plan"])
        assert plan.num_joins == point["num_joins"]
        metrics = plan.metadata.metrics
        assert metrics.proxy.delta_nll == point["delta_nll"]
        assert metrics.heldout.delta_nll == point["heldout_delta_nll"]
        assert point["perplexity"] == pytest.approx(math.exp(metrics.proxy.nll))


def test_study_is_what_other_tools_expect(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 8, "--study", "named")
    study = optuna.load_study(study_name="named", storage=f"sqlite:///{tmp_path}/study/study.db")
    assert study.metric_names == ["depth_reduction", "perplexity"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert len(study.trials) == 8
    for trial in study.trials:
        assert list(trial.params) == [f"join_{i:03d}" for i in range(5)]
        plan = Plan.from_groups(json.loads(trial.user_attrs["groups"]))
        assert plan.num_joins == trial.user_attrs["num_joins"]
        assert trial.values[0] == plan.depth_reduction
        assert trial.user_attrs["proxy_tokens"] == 3 * 23
    assert study.trials[0].user_attrs["origin"] == "baseline"


@pytest.mark.parametrize("split", ["proxy", "heldout"])
def test_evaluate_repeats_the_values_of_a_plan(run_lpsearch: Run, arguments: list, tmp_path: Path, split: str) -> None:
    document = run_lpsearch(*arguments, "--budget", 8).document
    point = document["front"][-1]
    outcome = run_lpsearch("evaluate", tmp_path / "study" / point["plan"], "--split", split, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr
    expected = point["delta_nll" if split == "proxy" else "heldout_delta_nll"]
    assert outcome.document["delta_nll"] == pytest.approx(expected, abs=LOSS_AGAIN)
    assert outcome.document["windows"] == 3
    assert outcome.document["dtype"] == "float32"
    assert {"nll", "delta_nll", "delta_nll_se"} <= outcome.document.keys()


def test_evaluate_on_other_data(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    point = run_lpsearch(*arguments, "--budget", 8).document["front"][-1]
    (tmp_path / "other.txt").write_text("Nothing is as it was, they said. " * 99, encoding="utf-8")
    outcome = run_lpsearch(
        *("evaluate", tmp_path / "study" / point["plan"], "--data", tmp_path / "other.txt"),
        *("--windows", 2, "--seq-len", 16, "--metric", "kl", "--device", "cpu"),
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["num_tokens"] == 2 * 15
    assert outcome.document["kl_nats_per_token"] > 0


def test_generate_and_pick_take_a_plan_of_the_front(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 8)
    picked = run_lpsearch("plan", "pick", tmp_path / "study", "--max-delta", 1000)
    assert picked.exit_code == 0
    assert picked.document["num_joins"] == max(p.num_joins for p in _load_plans(tmp_path / "study"))
    outcome = run_lpsearch(
        *("generate", picked.document["plan"], "--prompt", "The square of 12 is", "--max-new-tokens", 5, "--compare"),
        *("--dtype", "float32", "--device", "cpu"),
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["new_tokens"] == outcome.document["base"]["new_tokens"] == 5
    assert outcome.document["text"] != outcome.document["base"]["text"], "random layers in parallel give another text"
    nothing = run_lpsearch("plan", "pick", tmp_path / "study", "--max-delta", -1000)
    assert nothing.exit_code == 2


def test_the_same_command_resumes(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    first = run_lpsearch(*arguments, "--budget", 7)
    again = run_lpsearch(*arguments, "--budget", 7)
    assert again.document == first.document
    more = run_lpsearch(*arguments, "--budget", 100)
    assert more.document["trials"] == 13, "all plans of six layers in pairs"
    assert json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))["exact"]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study/study.db")
    groups = [trial.user_attrs["groups"] for trial in study.trials]
    assert len(groups) == len(set(groups)) == 13


def test_resuming_keeps_what_the_study_was_begun_with(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    model = arguments[2]
    bare = run_lpsearch(*("optimize", "--model", model, "--budget", 3, "--latency", "off", "--out", tmp_path / "study"))
    assert bare.exit_code == 0, bare.stderr
    assert load_plan(tmp_path / "study/plans/joins-00.json").metadata.metrics.proxy.windows == 3


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("--windows", 4, "--windows was 3, now 4"),
        ("--seq-len", 30, "--seq-len was 24, now 30"),
        ("--max-group", 3, "--max-group was 2, now 3"),
        ("--metric", "kl", "--metric was nll, now kl"),
        ("--dtype", "bfloat16", "--dtype was float32, now bfloat16"),
        ("--data", "self", 'squares.txt", "self"]'),  # one more kind of text
        ("--heldout", "self", "--heldout was null, now self"),
        ("--study", "another", "holds the study 'tiny-llama0', not 'another'"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    run_lpsearch: Run, arguments: list, option: str, value: object, shown: str
) -> None:
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    outcome = run_lpsearch(*arguments, "--budget", 3, option, value)
    assert outcome.exit_code == 2
    assert shown in outcome.document["error"]["message"]


def test_another_model_in_the_same_directory_is_refused(
    run_lpsearch: Run, arguments: list, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    before = (tmp_path / "study/front.json").read_bytes()
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    outcome = run_lpsearch(*arguments, "--budget", 3, "--model", tmp_path / "copy")
    assert outcome.exit_code == 2
    assert f"--model was {tiny_model_dir}, now {tmp_path}/copy" in outcome.document["error"]["message"]
    assert (tmp_path / "study/front.json").read_bytes() == before


def test_a_study_knows_its_model_and_data_by_any_spelling_of_their_paths(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    (tmp_path / "model").symlink_to(tiny_model_dir)
    (tmp_path / "link.txt").symlink_to(text_file)
    rest = ["--windows", 3, "--seq-len", 24, "--latency", "off", "--dtype", "float32", "--out", tmp_path / "study"]
    begun = run_lpsearch("optimize", "--model", tiny_model_dir, "--data", f"./{text_file.name}", *rest, "--budget", 2)
    assert begun.exit_code == 0, begun.stderr
    again = ("optimize", "--model", tmp_path / "model", "--data", tmp_path / "link.txt", *rest, "--budget", 3)
    resumed = run_lpsearch(*again)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.document["trials"] == 3
    with sqlite3.connect(tmp_path / "study" / "study.db") as database:  # as an older version recorded it
        (stored,) = database.execute("select settings from lpsearch_studies").fetchone()
        settings = json.loads(stored) | {"model": str(tmp_path / "model"), "data": f"./{text_file.name}"}
        del settings["parts"]
        database.execute("update lpsearch_studies set settings = ?", (json.dumps(settings),))
    resumed = run_lpsearch(*again)
    assert resumed.exit_code == 0, resumed.stderr


def test_a_model_of_which_one_part_was_replaced_is_refused_by_its_name(
    run_lpsearch: Run, arguments: list, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    arguments = [copied if argument == tiny_model_dir else argument for argument in arguments]
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    weights = load_file(copied / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0).contiguous()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    outcome = run_lpsearch(*arguments, "--budget", 3)
    assert outcome.exit_code == 2
    assert "begun with another model: the head differs" in outcome.document["error"]["message"]
    assert "--fresh" in outcome.document["error"]["message"]


@pytest.mark.parametrize("is_empty", [False, True])
def test_results_without_their_study_are_not_overwritten(
    run_lpsearch: Run, arguments: list, tmp_path: Path, is_empty: bool
) -> None:
    assert run_lpsearch(*arguments, "--budget", 3).exit_code == 0
    (tmp_path / "study/study.db").unlink()
    if is_empty:
        (tmp_path / "study/study.db").touch()
    outcome = run_lpsearch(*arguments, "--budget", 3)
    assert outcome.exit_code == 1
    assert "put its study.db back" in outcome.document["error"]["message"]


def test_a_resumed_study_keeps_sampler_seed_and_frozen_layers(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    assert run_lpsearch(*arguments, "--budget", 3, "--sampler", "random", "--seed", 5, "--freeze", "0-1").exit_code == 0
    assert run_lpsearch(*arguments, "--budget", 5, "--seed", 6).exit_code == 0
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study/study.db")
    assert {trial.user_attrs["origin"] for trial in study.trials} <= {"baseline", "random", "enumeration"}
    assert not any(trial.params["join_000"] or trial.params["join_001"] for trial in study.trials)
    assert load_plan(tmp_path / "study/plans/joins-00.json").metadata.provenance.seed == 5


def test_a_layer_that_is_frozen_later_leaves_the_front(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 13)
    document = run_lpsearch(*arguments, "--budget", 13, "--freeze", "2,3").document
    assert len(document["front"]) > 1
    for point in document["front"]:
        groups = load_plan(tmp_path / "study" / point["plan"]).to_lists()
        assert [2] in groups
        assert [3] in groups


def test_files_of_the_user_among_the_plans_stay(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 3)
    mine = tmp_path / "study/plans/joins-01-mine.json"
    shutil.copy(tmp_path / "study/plans/joins-00.json", mine)
    run_lpsearch(*arguments, "--budget", 13)
    assert mine.is_file()


def test_latencies_of_another_profile_are_not_mixed(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    model = arguments[2]
    made = run_lpsearch(
        *("profile", "--model", model, "--out", tmp_path / "a.json", "--context", 8, "--seconds", 1, "--device", "cpu")
    )
    assert made.exit_code == 0, made.stderr
    other = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    for workload in other["workloads"]:
        workload["cost_ms"] = {kind: 10 * cost + 1 for kind, cost in workload["cost_ms"].items()}
    (tmp_path / "b.json").write_text(json.dumps(other), encoding="utf-8")
    by_latency = [*arguments, "--budget", 4, "--objective", "latency", "--latency"]
    assert run_lpsearch(*by_latency, tmp_path / "a.json").exit_code == 0
    refused = run_lpsearch(*by_latency, tmp_path / "b.json")
    assert refused.exit_code == 2
    assert "latency of another profile" in refused.document["error"]["message"]
    assert run_lpsearch(*arguments, "--latency", "off").exit_code == 2


def test_a_directory_may_have_any_name(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    out = tmp_path / "a?b=c d%41#e"
    assert run_lpsearch(*arguments, "--budget", 2, "--out", out).exit_code == 0
    assert (out / "study.db").is_file()


def test_an_enqueued_plan_comes_first_and_must_be_of_this_model(
    run_lpsearch: Run, arguments: list, tmp_path: Path
) -> None:
    plans = tmp_path / "study/plans"
    deepest = run_lpsearch(*arguments, "--budget", 13).document["front"][-1]["plan"]
    enqueue = ["--enqueue", tmp_path / "study" / deepest, "--out", tmp_path / "other"]
    assert run_lpsearch(*arguments, "--budget", 2, *enqueue).exit_code == 0
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/other/study.db")
    assert study.trials[1].user_attrs["groups"] == load_plan(tmp_path / "study" / deepest).key
    plan = load_plan(plans / "joins-00.json")
    identity = plan.metadata.model.model_copy(update={"fingerprint": "1" * 16 + "-" + "1" * 16})
    save_plan(Plan(plan.groups, plan.metadata.model_copy(update={"model": identity})), tmp_path / "foreign.json")
    outcome = run_lpsearch(*arguments, "--budget", 3, "--enqueue", tmp_path / "foreign.json", "--out", tmp_path / "new")
    assert outcome.exit_code == 2
    assert "--enqueue" in outcome.document["error"]["message"]


def _save_plan_of_three(directory: Path, num_layers: int = 6) -> Path:
    """Write a plan that joins layers 0 to 2, for a model with so many layers."""
    identity = ModelIdentity(id="m", num_layers=num_layers, fingerprint="1" * 16 + "-" + "1" * 16)
    groups = [[0, 1, 2], *([i] for i in range(3, num_layers))]
    path = directory / f"three-of-{num_layers}.json"
    save_plan(Plan.from_groups(groups, metadata=PlanMetadata(model=identity)), path)
    return path


@pytest.mark.parametrize(
    ("num_layers", "options", "message"),
    [
        (6, [], "groups have at most 2 layers"),
        (6, ["--max-group", 3, "--freeze", 1], "groups have at most 3 layers, and --freeze keeps 1 out of them"),
        (7, ["--max-group", 3], "has 7 layers, the model 6"),
        (6, ["--max-group", 3], "fingerprint"),
    ],
)
def test_an_enqueued_plan_outside_the_space_is_refused_before_windows_are_sampled(
    run_lpsearch: Run, arguments: list, tmp_path: Path, num_layers: int, options: list, message: str
) -> None:
    path = _save_plan_of_three(tmp_path, num_layers)
    command = [*arguments, "--data", "self", "--latency", "auto", "--enqueue", path, *options]
    outcome = run_lpsearch(*command)
    assert outcome.exit_code == 2
    assert outcome.document["error"]["message"].startswith(f"--enqueue {path}")
    assert message in outcome.document["error"]["message"]
    loading = ["loading"] if message == "fingerprint" else []  # which the weights have
    said = [line.split()[1] for line in outcome.stderr.splitlines()]
    assert said == [*loading, "--enqueue"], "nothing else is done"
    assert not list((tmp_path / "cache").rglob("*")), "no windows were sampled"
    with StudyStore(f"sqlite:///{tmp_path}/study/study.db", study_name="tiny-llama0") as store:
        assert store.list_studies() == []


def test_an_enqueued_plan_is_refused_before_the_model_is_loaded_where_its_layers_are_known(
    run_lpsearch: Run, arguments: list, text_file: Path, tmp_path: Path
) -> None:
    path = _save_plan_of_three(tmp_path)
    of_alias = ["optimize", "--model", "llama2-7b", "--data", text_file, "--enqueue", path, "--out", tmp_path / "alias"]
    for fresh in ([], ["--fresh"]):
        outcome = run_lpsearch(*of_alias, *fresh)
        assert (outcome.exit_code, outcome.document["error"]["type"]) == (2, "PlanError")
        assert "has 6 layers, the model 32" in outcome.document["error"]["message"]
    assert run_lpsearch(*arguments, "--budget", 2).exit_code == 0
    outcome = run_lpsearch(*arguments, "--budget", 3, "--enqueue", path)
    assert "groups have at most 2 layers" in outcome.document["error"]["message"]
    assert outcome.stderr.count("\n") == 1, "a study records how many layers its model has"


def test_fresh_moves_the_old_study_aside(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 3)
    before = hashlib.sha256((tmp_path / "study/study.db").read_bytes()).hexdigest()
    outcome = run_lpsearch(*arguments, "--budget", 2, "--windows", 2, "--fresh")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.document["trials"] == 2
    (aside,) = (tmp_path / "study").glob("before-*")
    assert hashlib.sha256((aside / "study.db").read_bytes()).hexdigest() == before
    assert (aside / "front.json").is_file()
    assert (aside / "plans").is_dir()


def test_the_last_line_of_a_search_by_divergence_tells_it(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    document = run_lpsearch(*arguments, "--budget", 8, "--metric", "kl").document
    assert list(document["front"][0]) == [
        *("plan", "num_joins", "depth_reduction", "delta_nll", "heldout_delta_nll"),
        *("kl_nats_per_token", "heldout_kl_nats_per_token", "perplexity", "latency_ms", "speedup"),
    ]
    assert document["front"][0]["kl_nats_per_token"] == 0
    assert len(document["front"]) > 1
    for point in document["front"][1:]:
        metrics = load_plan(tmp_path / "study" / point["plan"]).metadata.metrics
        assert point["kl_nats_per_token"] == metrics.proxy.kl_nats_per_token > 0
        assert point["heldout_kl_nats_per_token"] == metrics.heldout.kl_nats_per_token > 0


def test_of_two_searches_that_begin_at_once_one_is_told_of_the_other(
    start_lpsearch: Start, arguments: list, tmp_path: Path
) -> None:
    """As torchrun starts them, in a directory that is new, whose name means something in a URL."""
    out = tmp_path / "50% of {model}?lr=1#2"
    searches = [start_lpsearch(*arguments, "--out", out, "--budget", 13) for _ in range(2)]
    ends = []
    for search in searches:
        stdout, stderr = search.communicate(timeout=200)
        ends.append((search.returncode, json.loads(stdout.splitlines()[-1]), stderr))
    (won, document, _), (lost, refusal, stderr) = sorted(ends, key=lambda end: end[0])
    assert (won, document["trials"], document["out"]) == (0, 13, str(out))
    assert lost in (0, 1), stderr
    if lost == 1:  # else it began when the first one had ended
        assert f"is being run by process {searches[ends[0][0] != 0].pid}" in refusal["error"]["message"]
    assert (out / "study.db").is_file()


@pytest.mark.usefixtures("brief_timing")
def test_self_sampled_data_kl_and_measured_latency(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    outcome = run_lpsearch(
        *("optimize", "--model", tiny_model_dir, "--data", "self", "--windows", 3, "--seq-len", 16, "--metric", "kl"),
        *("--budget", 8, "--out", tmp_path / "study", "--device", "cpu"),
    )
    assert outcome.exit_code == 0, outcome.stderr
    for point in outcome.document["front"]:
        assert point["latency_ms"] > 0
        assert point["speedup"] > 0
        plan = load_plan(tmp_path / "study" / point["plan"])
        assert plan.metadata.metrics.latency.kind == "estimated"
        assert plan.metadata.metrics.proxy.kl_nats_per_token >= 0
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study/study.db")
    assert study.metric_names == ["depth_reduction", "kl_nats_per_token"]
    assert all(trial.user_attrs["latency_ms"] > 0 for trial in study.trials)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_search_goes_on_where_it_stopped(
    run_lpsearch: Run,
    start_lpsearch: Start,
    arguments: list,
    tmp_path: Path,
    how: signal.Signals,
) -> None:
    process = start_lpsearch(*arguments, "--budget", 13)
    for line in process.stderr:
        if "trial 4/13" in line:
            break
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130, stderr
        assert json.loads(stdout.splitlines()[-1])["error"]["type"] == "Interrupted"
    storage = f"sqlite:///{tmp_path}/study/study.db"
    complete = optuna.trial.TrialState.COMPLETE
    kept = optuna.load_study(study_name=None, storage=storage).get_trials(states=(complete,))
    assert len(kept) >= 4
    assert run_lpsearch(*arguments, "--budget", 13).document["trials"] == 13
    study = optuna.load_study(study_name=None, storage=storage)
    trials = study.get_trials(states=(complete,))
    assert [trial.values for trial in trials[: len(kept)]] == [trial.values for trial in kept]
    assert len({trial.user_attrs["groups"] for trial in trials}) == len(trials) == 13
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))


def test_a_second_search_of_the_same_study_is_refused(
    run_lpsearch: Run, start_lpsearch: Start, arguments: list
) -> None:
    process = start_lpsearch(*arguments, "--budget", 13)
    for line in process.stderr:
        if "trial 1/13" in line:
            break
    process.send_signal(signal.SIGSTOP)
    try:
        outcome = run_lpsearch(*arguments, "--budget", 13)
    finally:
        process.send_signal(signal.SIGCONT)
    assert outcome.exit_code == 1
    assert f"process {process.pid}" in outcome.document["error"]["message"]
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("changed", "exit_code", "message"),
    [
        (["--model", "llama2-7"], 2, "did you mean llama2-7b"),
        (["--model", "./no/such/model"], 2, "no such model directory"),
        (["--budget", "0"], 2, "--budget"),
        (["--data", "./no/such/text.txt"], 2, "no such file"),
        (["--windows", "100000"], 2, "too short"),
        (["--seq-len", "4096"], 2, "at most 128 tokens"),
        (["--max-group", "1"], 2, "--max-group"),
        (["--max-group", "99"], 2, "the model has only"),
        (["--freeze", "99"], 2, "frozen layer 99 does not exist"),
        (["--device", "tpu"], 2, "--device tpu"),
        (["--latency", "./no/profile.json"], 2, "no such file"),
        (["--storage", "nonsense"], 2, "not a database URL"),
        (["--out", "/proc/study"], 1, "cannot be written"),
    ],
)
def test_bad_input_is_named(
    run_lpsearch: Run, arguments: list, changed: list[str], exit_code: int, message: str
) -> None:
    outcome = run_lpsearch(*arguments, *changed)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert message in outcome.document["error"]["message"]
    assert "Traceback" not in outcome.stderr


def test_empty_data_are_named(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    outcome = run_lpsearch(*arguments, "--data", tmp_path / "empty.txt")
    assert outcome.exit_code == 2
    assert "holds no text" in outcome.document["error"]["message"]


def test_a_plan_of_another_model_is_refused(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 2)
    plan = load_plan(tmp_path / "study/plans/joins-00.json")
    identity = plan.metadata.model.model_copy(update={"fingerprint": "0" * 16 + "-" + "0" * 16})
    other = Plan(plan.groups, plan.metadata.model_copy(update={"model": identity}))
    save_plan(other, tmp_path / "other.json")
    outcome = run_lpsearch("generate", tmp_path / "other.json", "--prompt", "The", "--device", "cpu")
    assert outcome.exit_code == 2
    assert "fingerprint" in outcome.document["error"]["message"]


def test_a_corrupt_study_is_named_and_left_untouched(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    run_lpsearch(*arguments, "--budget", 4)
    database = tmp_path / "study/study.db"
    content = bytearray(database.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    database.write_bytes(content)
    outcome = run_lpsearch(*arguments, "--budget", 5)
    assert outcome.exit_code == 1
    assert str(database) in outcome.document["error"]["message"]
    assert database.read_bytes() == bytes(content)


def test_a_full_disk_loses_nothing(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert run_lpsearch(*arguments, "--out", disk / "study", "--budget", 3).exit_code == 0
        filler = disk / "filler"
        free_bytes = shutil.disk_usage(disk).free
        filler.write_bytes(b"\0" * free_bytes)
        outcome = run_lpsearch(*arguments, "--out", disk / "study", "--budget", 13)
        assert outcome.exit_code == 1
        filler.unlink()
        assert run_lpsearch(*arguments, "--out", disk / "study", "--budget", 13).document["trials"] == 13
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _load_plans(study: Path) -> list[Plan]:
    return [load_plan(path) for path in (study / "plans").iterdir()]


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    on_cpu = run_lpsearch(*arguments, "--budget", 13).document
    outcome = run_lpsearch(
        *(*arguments, "--budget", 13, "--device", "cuda", "--latency", "auto", "--out", tmp_path / "gpu")
    )
    assert outcome.exit_code == 0, outcome.stderr
    on_gpu = outcome.document
    assert [point["num_joins"] for point in on_gpu["front"]] == [point["num_joins"] for point in on_cpu["front"]]
    for gpu_point, cpu_point in zip(on_gpu["front"], on_cpu["front"], strict=True):
        assert gpu_point["delta_nll"] == pytest.approx(cpu_point["delta_nll"], abs=FLOAT32_LOSS)
        assert gpu_point["latency_ms"] > 0
