"""``lpsearch evaluate --tasks``, with real runs of lm-evaluation-harness on a tiny model."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lpsearch.commands.tasks import list_variants
from lpsearch.models import fingerprint_model, load_model, resolve_source
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, Recovery, load_plan, save_plan
from lpsearch.recovery import read_recovery, save_recovered
from lpsearch.transform import applied_plan
from tests.commands.conftest import Outcome, Run
from tests.task_files import CHOICES, WORDS, write_choices, write_words
from tests.tiny_models import build_tiny_model

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra `tasks`)"
)


@pytest.fixture
def plan_file(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a plan of the tiny model."""
    loaded = load_model(resolve_source(str(tiny_model_dir)), device=torch.device("cpu"), dtype=torch.float32)
    path = tmp_path / "plan.json"
    save_plan(Plan.from_groups([[0], [1, 2], [3, 4], [5]], metadata=PlanMetadata(model=loaded.identity)), path)
    return path


@pytest.fixture
def evaluate(run_lpsearch: Run, plan_file: Path, text_file: Path) -> Run:
    """Return a function that runs ``lpsearch evaluate`` on a plan and a little text."""

    def run(*options: object) -> Outcome:
        data = ["--data", text_file, "--windows", 2, "--seq-len", 16, "--device", "cpu", "--dtype", "float32"]
        return run_lpsearch("evaluate", plan_file, *data, *options)

    return run


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """Return the directory of a task of each kind."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    write_choices(directory)
    write_words(directory, {f"Word {i}:": "none such" for i in range(4)})
    return directory


@needs_harness
def test_losses_and_scores_stand_side_by_side(evaluate: Run, task_dir: Path) -> None:
    without = evaluate()
    outcome = evaluate("--tasks", f"{CHOICES}, {WORDS}", "--task-path", task_dir, "--limit", 20, "--batch-size", 3)
    assert outcome.exit_code == 0, outcome.stderr
    document = dict(outcome.document)
    tasks, settings = document.pop("tasks"), document.pop("task_settings")
    assert document == without.document, "the losses are those without tasks"
    assert [(task["task"], task["metric"]) for task in tasks] == [
        (CHOICES, "acc"),
        (CHOICES, "acc_norm"),
        (WORDS, "exact_match"),
    ]
    for task in tasks:
        assert task["num_documents"] == (20 if task["task"] == CHOICES else 4)
        base, plan = task["scores"]["base"], task["scores"]["plan"]
        assert plan["delta"] == pytest.approx(plan["value"] - base["value"])
        assert base.keys() == {"value", "standard_error"}
        assert plan.keys() == {"value", "standard_error", "delta", "delta_standard_error", "retained"}
    assert [task["retained_of"] for task in tasks] == ["score above chance"] * 2 + ["score"]
    assert (settings["limit"], settings["batch_size"], settings["apply_chat_template"]) == (20, 3, False)
    header, shown = (line for line in outcome.stderr.splitlines() if line.startswith(("task ", CHOICES)))
    assert header.split() == ["task", "metric", "documents", "base", "plan", "difference", "retained"]
    main = tasks[1]["scores"]
    assert f"{main['base']['value']:.3f} ±{main['base']['standard_error']:.3f}" in shown
    assert f"{main['plan']['delta']:+.3f} ±{main['plan']['delta_standard_error']:.3f}" in shown
    assert "WARNING" not in outcome.stderr
    assert " ".join(outcome.stderr.split()).endswith("empty where it is not clearly above that.")


@needs_harness
def test_a_task_that_has_the_model_write_is_recommended_once(evaluate: Run, task_dir: Path) -> None:
    outcome = evaluate("--tasks", CHOICES, "--task-path", task_dir, "--limit", 2)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stderr.count("gsm8k") == 1


@needs_harness
@pytest.mark.parametrize("width", range(50, 150, 10))
def test_the_table_fits_the_terminal(tmp_path: Path, width: int) -> None:
    from lpsearch.commands.tasks import TaskTable, prepare_tasks
    from lpsearch.evaluation.task_scores import Score, compare_scores
    from tests.evaluation.test_task_scores import METRIC

    write_choices(tmp_path)
    run = prepare_tasks(
        CHOICES,
        task_path=tmp_path,
        num_fewshot=None,
        limit=None,
        batch_size=8,
        apply_chat_template=False,
    )
    assert run is not None
    scores = {"base": Score(0.7, 0.01), "plan": Score(0.5, 0.01), "refit": Score(0.6, 0.01)}
    table = TaskTable([compare_scores(METRIC, scores)], tuple(scores), run, 1.0)
    stream = io.StringIO()
    Console(file=stream, width=width).print(table, soft_wrap=True)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith("arc"))
    for shown in ("0.700 ±0.010", "0.500 ±0.010", "56%", "0.600 ±0.010", "78%"):
        assert shown in (row if width >= 80 else stream.getvalue()), "numbers are whole"
    assert ("-0.200" in row) == (width >= 120)


@needs_harness
def test_every_line_is_json_where_it_was_asked_for(evaluate: Run, task_dir: Path) -> None:
    outcome = evaluate("--tasks", f"{CHOICES},{WORDS}", "--task-path", task_dir, "--limit", 2, "--json")
    lines = [json.loads(line) for line in outcome.stderr.splitlines()]
    assert any("scoring base, plan" in line["message"] for line in lines)
    assert {line["level"] for line in lines} == {"INFO"}
    assert len(outcome.stdout.splitlines()) == 1


@needs_harness
@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--tasks", " , "], 2, "names no task"),
        (["--tasks", CHOICES, "--task-path", "nowhere"], 2, "no such directory"),
        (["--limit", 3, "--num-fewshot", 0], 2, "--num-fewshot, --limit without --tasks"),
        (["--tasks", CHOICES, "--task-path", "TASKS", "--apply-chat-template"], 2, "no chat template"),
    ],
)
def test_what_cannot_be_done_is_refused(
    evaluate: Run, task_dir: Path, options: list[object], exit_code: int, message: str
) -> None:
    outcome = evaluate(*(task_dir if option == "TASKS" else option for option in options))
    assert outcome.exit_code == exit_code
    assert message in outcome.document["error"]["message"]


@needs_harness
def test_a_missing_chat_template_is_found_before_weights_are_read(
    evaluate: Run, tiny_model_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "weightless"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "model.safetensors").write_bytes(b"not weights")
    tasks = ["--tasks", CHOICES, "--task-path", task_dir, "--model", directory]
    outcome = evaluate(*tasks, "--apply-chat-template")
    assert outcome.exit_code == 2
    assert "no chat template" in outcome.document["error"]["message"]
    assert "no chat template" not in evaluate(*tasks).document["error"]["message"]


@needs_harness
def test_a_hub_that_does_not_answer_is_no_wrong_usage(
    evaluate: Run, task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    write_choices(task_dir, name="far", dataset_path="someone/something", dataset_kwargs={})
    outcome = evaluate("--tasks", "far", "--task-path", task_dir)
    assert outcome.exit_code == 1
    assert "HF_DATASETS_OFFLINE=1" in outcome.document["error"]["message"]
    assert "loading tiny" not in outcome.stderr, "before the model is loaded"


def test_the_extra_is_named_where_the_harness_is_missing(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = evaluate("--tasks", CHOICES)
    assert outcome.exit_code == 2
    assert "lpsearch[tasks]" in outcome.document["error"]["message"]


def test_repaired_weights_are_there_for_their_variant_alone(tmp_path: Path) -> None:
    model, plan = build_tiny_model("llama"), Plan.from_groups([[0], [1, 2], [3, 4], [5]])
    original = fingerprint_model(model)
    twin = copy.deepcopy(model)
    weights = {}
    for layer_idx in (2, 4):
        name = f"model.layers.{layer_idx}.mlp.down_proj.weight"
        weights[name] = twin.get_parameter(name).data.mul_(0.5)
    recovery = Recovery(
        method="refit",
        data=("text.txt",),
        num_tokens=100,
        seconds=1,
        fingerprint=fingerprint_model(twin),
        dtype="float32",
        device="cpu",
    )
    identity = ModelIdentity(id="tiny", num_layers=6, fingerprint=original)
    plan = Plan(plan.groups, PlanMetadata(model=identity))
    save_recovered(tmp_path / "recovered", plan=plan, model=model, weights=weights, recovery=recovery)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = {"base": model(ids).logits}
        with applied_plan(model, plan):
            expected["plan"] = model(ids).logits
        with applied_plan(twin, Plan(plan.groups)):
            expected["repaired"] = twin(ids).logits
        assert not torch.equal(expected["plan"], expected["repaired"])
        for path in (tmp_path / "recovered", tmp_path / "recovered" / "plan.json"):
            found = load_plan(path)
            variants = list_variants(model, found, read_recovery(model, found, path))
            assert list(variants) == ["base", "plan", "repaired"]
            for name in ("repaired", "base", "plan", "repaired", "base"):
                with variants[name]():
                    assert torch.equal(model(ids).logits, expected[name]), name
    assert fingerprint_model(model) == original
    assert list(list_variants(model, plan, read_recovery(model, plan, tmp_path))) == ["base", "plan"]
