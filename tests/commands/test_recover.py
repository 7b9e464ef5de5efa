"""``lpsearch recover`` on a tiny model that really runs, and every command on the directory that it wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lpsearch.evaluation import ModelEvaluator
from lpsearch.models import fingerprint_model, load_model, resolve_source
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, PlanMetrics, ProxyMetrics, load_plan, save_plan
from lpsearch.recovery import apply_recovery
from lpsearch.transform import apply_plan
from tests.commands.conftest import Outcome, Run, Start
from tests.task_files import CHOICES, write_choices
from tests.tolerances import LOSS_AGAIN

GROUPS = ((0,), (1, 2), (3, 4), (5,))
OPTIONS = ("--windows", 40, "--seq-len", 32, "--device", "cpu", "--dtype", "float32")
DISTILL = (*OPTIONS, "--method", "distill", "--tokens", 60_000, "--learning-rate", 3e-4)
"""Two steps of 32768 tokens, with an evaluation and a checkpoint after each."""


@pytest.fixture
def plan_file(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_plan(tmp_path / "plan.json", tiny_model_dir)


def write_plan(
    path: Path,
    directory: Path,
    *,
    groups: object = GROUPS,
    dropped: dict[str, list[int]] | None = None,
    proxy: ProxyMetrics | None = None,
) -> Path:
    identity = load_model(resolve_source(str(directory)), device="cpu", dtype=torch.float32).identity
    metadata = PlanMetadata(model=identity, metrics=PlanMetrics(proxy=proxy))
    save_plan(Plan.from_groups(groups, dropped=dropped, metadata=metadata), path)
    return path


@pytest.fixture
def recover(run_lpsearch: Run, plan_file: Path, text_file: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that recovers the plan into a directory, on the squares if no other text is named."""

    def run(*options: object, out: str = "out", plan: Path = plan_file) -> Outcome:
        data = () if "--data" in options else ("--data", text_file)
        return run_lpsearch("recover", plan, "--out", tmp_path / out, *data, *options)

    return run


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "recovered.safetensors")


# ---- A refit, and what takes the directory ---------------------------------------------------------------------------


def test_a_refit_is_written_with_what_it_won_back(
    recover: Callable[..., Outcome], tiny_model_dir: Path, text_file: Path, plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = recover(*OPTIONS)
    assert outcome.exit_code == 0, outcome.stderr
    document = outcome.document
    assert document.keys() == {*("plan", "out", "method", "num_tokens", "steps", "seconds", "num_bytes", "losses")}
    assert (document["plan"], document["out"]) == (str(plan_file), str(out))
    assert (document["method"], document["steps"]) == ("refit", None)
    assert document["num_tokens"] == 38 * 32 * 2, "each token in each of two passes"
    assert document["num_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert sorted(file.name for file in out.iterdir()) == ["plan.json", "recovered.safetensors"]
    inputs, outputs = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}
    assert {name.rsplit(".", 2)[1] for name in read_weights(out)} == inputs | outputs
    (loss,) = document["losses"]
    assert (loss["data"], loss["windows"], loss["seq_len"], loss["num_tokens"]) == (str(text_file), 10, 32, 10 * 31)
    assert loss["delta_nll"] < loss["untouched_delta_nll"]
    assert loss["recovered_share"] == pytest.approx(1 - loss["delta_nll"] / loss["untouched_delta_nll"])
    assert "won back" in outcome.stderr
    assert f"{loss['recovered_share']:.0%}" in outcome.stderr

    plan = load_plan(out)
    recovery = plan.metadata.provenance.recovery
    assert (recovery.method, recovery.data, recovery.num_tokens) == ("refit", (str(text_file),), document["num_tokens"])
    assert (recovery.dtype, recovery.device, recovery.settings["passes"]) == ("float32", "cpu", 2)
    assert (recovery.settings["windows"], recovery.settings["seq_len"]) == (40, 32)
    assert recovery.versions["torch"] == torch.__version__
    assert plan.without_recovery() == load_plan(plan_file)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    assert recovery.fingerprint != fingerprint_model(model) == plan.metadata.model.fingerprint
    apply_recovery(model, out)
    assert fingerprint_model(model) == recovery.fingerprint


def test_the_losses_are_those_of_windows_that_were_not_fitted(
    recover: Callable[..., Outcome], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The windows to measure on follow those to fit to, in a text of one split."""
    from lpsearch.data import build_windows

    (loss,) = recover(*OPTIONS).document["losses"]
    loaded = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32)
    options = {"tokenizer": loaded.tokenizer, "seq_len": 32, "model": loaded.model}
    fitted = build_windows(str(text_file), num_windows=40, split="proxy", **options)
    unseen = build_windows(str(text_file), num_windows=10, split="heldout", after=fitted, **options)
    assert not set(map(bytes, fitted.input_ids)) & set(map(bytes, unseen.input_ids))

    def measure(plan: Plan) -> float:
        losses = ModelEvaluator(model=loaded.model, windows=unseen).evaluate_windows(plan, range(10))
        return sum(losses.nll_nats_per_token) / 10

    base, untouched = measure(Plan.baseline(6)), measure(Plan.from_groups(GROUPS))
    assert loss["untouched_delta_nll"] == pytest.approx(untouched - base, abs=LOSS_AGAIN)
    plan = apply_recovery(loaded.model, tmp_path / "out")
    assert loss["delta_nll"] == pytest.approx(measure(plan) - base, abs=LOSS_AGAIN)


def test_every_command_takes_the_directory(
    run_lpsearch: Run,
    recover: Callable[..., Outcome],
    tiny_model_dir: Path,
    text_file: Path,
    plan_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    recover(*OPTIONS)
    measured = ("--data", text_file, "--split", "heldout", "--windows", 10, "--seq-len", 32, "--device", "cpu")
    for path in (out, out / "plan.json"):
        evaluated = run_lpsearch("evaluate", path, *measured, "--dtype", "float32")
        assert evaluated.exit_code == 0, evaluated.stderr
        raw = run_lpsearch("evaluate", plan_file, *measured, "--dtype", "float32").document
        assert raw["untouched_delta_nll"] is None
        assert evaluated.document["untouched_delta_nll"] == pytest.approx(raw["delta_nll"], abs=LOSS_AGAIN)
        assert evaluated.document["delta_nll"] < 0.9 * raw["delta_nll"]
        assert evaluated.document["baseline_nll"] == pytest.approx(raw["baseline_nll"], abs=LOSS_AGAIN)

    words = ("--prompt", "The square", "--max-new-tokens", 8, "--device", "cpu", "--dtype", "float32")
    exported = run_lpsearch("export", out, tmp_path / "exported")
    assert exported.exit_code == 0, exported.stderr
    repaired, fused = (run_lpsearch("generate", path, *words, "--compare") for path in (out, tmp_path / "exported"))
    untouched = run_lpsearch("generate", plan_file, *words)
    assert repaired.document["text"] == fused.document["text"] != untouched.document["text"]
    assert repaired.document["base"]["text"] == fused.document["base"]["text"], "of the unmodified model"

    shown = run_lpsearch("plan", "show", out)
    assert shown.document["provenance"]["recovery"]["method"] == "refit"
    assert run_lpsearch("plan", "validate", out, "--model", tiny_model_dir).document["valid"] is True
    assert run_lpsearch("plan", "diff", out, plan_file).exit_code == 0
    study = run_lpsearch(
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 2, "--seq-len", 16, "--budget", 2),
        *("--latency", "off", "--device", "cpu", "--out", tmp_path / "study", "--enqueue", out),
    )
    assert study.exit_code == 0, study.stderr
    found = {tuple(map(tuple, load_plan(path).groups)) for path in (tmp_path / "study" / "plans").iterdir()}
    assert GROUPS in found, "as a plan of the unmodified weights"


DROPPED = {"attention": [1, 3, 4], "mlp": [3, 4]}
"""One member of a pair without its attention, and a pair of which nothing is left."""


@pytest.mark.parametrize("options", [OPTIONS, (*DISTILL, "--train", "grouped")], ids=["refit", "distill"])
def test_plans_that_drop_branches_are_repaired_and_run(
    run_lpsearch: Run,
    recover: Callable[..., Outcome],
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    options: tuple[object, ...],
) -> None:
    path = write_plan(tmp_path / "dropping.json", tiny_model_dir, dropped=DROPPED)
    recovered = recover(*options, plan=path)
    assert recovered.exit_code == 0, recovered.stderr
    (loss,) = recovered.document["losses"]
    assert loss["delta_nll"] < loss["untouched_delta_nll"]
    unused = ("layers.1.self_attn.", "layers.3.", "layers.4.")
    assert not any(name.startswith(unused) for name in read_weights(tmp_path / "out"))
    assert any(name.startswith("layers.2.") for name in read_weights(tmp_path / "out"))

    other = write_plan(tmp_path / "other.json", tiny_model_dir, dropped={"attention": [1, 2], "mlp": []})
    difference = run_lpsearch("plan", "diff", tmp_path / "out", other).document
    assert difference["dropped_only_in_first"] == {"attention": [3, 4], "mlp": [3, 4]}
    assert difference["dropped_only_in_second"] == {"attention": [2], "mlp": []}
    assert difference["dropped_in_both"] == {"attention": [1], "mlp": []}

    measured = ("--data", text_file, "--split", "heldout", "--windows", 10, "--seq-len", 32, "--device", "cpu")
    evaluated = run_lpsearch("evaluate", tmp_path / "out", *measured, "--dtype", "float32")
    assert evaluated.exit_code == 0, evaluated.stderr
    found = evaluated.document
    assert (found["num_joins"], found["num_dropped"], found["depth_reduction"]) == (2, 5, 0.5)
    assert found["delta_nll"] < found["untouched_delta_nll"]
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    apply_plan(model, apply_recovery(model, tmp_path / "out"))
    loaded = load_model(resolve_source(str(tiny_model_dir)), device="cpu", dtype=torch.float32)
    prompt = loaded.tokenizer("The square", return_tensors="pt").input_ids
    expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=False)[0]
    words = ("--prompt", "The square", "--max-new-tokens", 8, "--device", "cpu", "--dtype", "float32")
    generated = run_lpsearch("generate", tmp_path / "out", *words)
    assert generated.exit_code == 0, generated.stderr
    new_ids = expected[prompt.shape[1] :]
    assert generated.document["text"] == loaded.tokenizer.decode(new_ids, skip_special_tokens=True)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_tasks_score_the_repaired_weights(run_lpsearch: Run, recover: Callable[..., Outcome], tmp_path: Path) -> None:
    recover(*OPTIONS)
    (tmp_path / "tasks").mkdir()
    write_choices(tmp_path / "tasks")
    outcome = run_lpsearch(
        *("evaluate", tmp_path / "out", "--windows", 2, "--seq-len", 16, "--device", "cpu", "--dtype", "float32"),
        *("--data", "self", "--tasks", CHOICES, "--task-path", tmp_path / "tasks", "--limit", 8),
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert all(task["scores"].keys() == {"base", "plan", "repaired"} for task in outcome.document["tasks"])


def test_a_damaged_directory_is_refused_by_every_command(
    run_lpsearch: Run, recover: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recover(*OPTIONS)
    recover(*OPTIONS[2:], "--windows", 30, out="other")
    content = (out / "recovered.safetensors").read_bytes()
    commands = (
        ["evaluate", out, "--data", "self", "--windows", 1, "--seq-len", 16, "--device", "cpu"],
        ["generate", out, "--prompt", "a", "--device", "cpu"],
        ["export", out, tmp_path / "exported"],
    )
    for change, message in (
        (content[:100], "is damaged"),
        ((tmp_path / "other" / "recovered.safetensors").read_bytes(), "they are not those of the plan"),
        (None, "there is no recovered.safetensors beside it"),
    ):
        (out / "recovered.safetensors").unlink()
        if change is not None:
            (out / "recovered.safetensors").write_bytes(change)
        for words in commands:
            outcome = run_lpsearch(*words)
            assert outcome.exit_code == 2, words
            assert message in outcome.document["error"]["message"]
        if change is None:
            break
    assert not (tmp_path / "exported").exists()


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_several_kinds_of_text_are_repaired_and_shown(
    recover: Callable[..., Outcome], text_file: Path, code_file: Path, tmp_path: Path
) -> None:
    one = recover(*OPTIONS, "--heldout", text_file, "--heldout", code_file, out="one").document["losses"]
    both = recover(*OPTIONS, "--data", text_file, "--data", f"{code_file}@3", out="both")
    assert both.exit_code == 0, both.stderr
    losses = both.document["losses"]
    assert [loss["data"] for loss in losses] == [loss["data"] for loss in one] == [str(text_file), str(code_file)]
    assert [loss["windows"] for loss in losses] == [10, 10]
    assert both.document["num_tokens"] == 2 * 38 * 32 * 2
    assert load_plan(tmp_path / "both").metadata.provenance.recovery.data == (str(text_file), f"{code_file}@3")
    assert losses[1]["untouched_delta_nll"] == pytest.approx(one[1]["untouched_delta_nll"], abs=0.1)
    # With random weights more than the whole may be won back by chance; a repair is good where it is near to the whole.
    missed, missed_elsewhere = (abs(1 - loss["recovered_share"]) for loss in (losses[1], one[1]))
    assert missed < missed_elsewhere, "a kind is repaired best where it is fitted"
    for name in (text_file.name, code_file.name):
        assert name in both.stderr


def test_without_options_the_text_is_the_plans_own_and_sampled(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    proxy = ProxyMetrics(
        nll=3.25, delta_nll=0.5, delta_nll_se=0.01, perplexity=25.79, data=str(text_file), windows=2, seq_len=24,
        num_tokens=46, dtype="float32", device="cpu",
    )  # fmt: skip
    plan = write_plan(tmp_path / "plan.json", tiny_model_dir, proxy=proxy)
    outcome = run_lpsearch("recover", plan, "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.exit_code == 0, outcome.stderr
    assert [(loss["data"], loss["windows"], loss["seq_len"]) for loss in outcome.document["losses"]] == [
        (str(text_file), 16, 24),
        ("self", 16, 24),
    ]
    recovered = load_plan(tmp_path / "out").metadata
    assert recovered.provenance.recovery.settings["windows"] == 2 * 64
    assert recovered.metrics.proxy == proxy, "what was measured of the unmodified weights stays"


def test_a_directory_is_repaired_again_from_the_unmodified_weights(
    recover: Callable[..., Outcome], plan_file: Path, tmp_path: Path
) -> None:
    recover(*OPTIONS)
    again = recover(*OPTIONS, plan=tmp_path / "out", out="again")
    assert again.exit_code == 0, again.stderr
    assert "begins again from the unmodified weights" in again.stderr
    first, second = read_weights(tmp_path / "out"), read_weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    itself = recover(*OPTIONS, plan=tmp_path / "out", out="out")
    assert itself.exit_code == 2
    assert "is not empty" in itself.document["error"]["message"]


# ---- Distilling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "grouped"])
def test_distilling_goes_on_from_the_refit(recover: Callable[..., Outcome], tmp_path: Path, train: str) -> None:
    outcome = recover(*DISTILL, "--train", train)
    assert outcome.exit_code == 0, outcome.stderr
    document = outcome.document
    assert (document["method"], document["steps"]) == ("distill", 2)
    assert document["num_tokens"] == 38 * 32 * 2 + 2 * 32768
    assert document["losses"][0]["delta_nll"] < document["losses"][0]["untouched_delta_nll"]
    settings = load_plan(tmp_path / "out").metadata.provenance.recovery.settings
    assert settings == {
        "windows": 40, "seq_len": 32, "passes": 2, "num_tokens": 60_000, "learning_rate": 3e-4, "train": train,
        "checkpointing": False, "seed": 0,
    }  # fmt: skip
    assert any("layernorm" in name for name in read_weights(tmp_path / "out")), "which a refit does not change"
    assert recover(*OPTIONS, out="refit").exit_code == 0
    layers, refitted = ({int(n.split(".")[1]) for n in read_weights(tmp_path / out)} for out in ("out", "refit"))
    assert layers == (refitted | {1, 2, 3, 4} if train == "grouped" else {0, 1, 2, 3, 4, 5})
    assert "won back on validation windows" in outcome.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")], "nothing is left beside it"


def test_an_interrupted_distilling_goes_on(
    recover: Callable[..., Outcome],
    start_lpsearch: Start,
    plan_file: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    recover(*DISTILL, out="whole")
    checkpoints = tmp_path / ".out.checkpoints"
    process = start_lpsearch("recover", plan_file, "--out", tmp_path / "out", "--data", text_file, *DISTILL)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-????????/state.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()

    other = recover(*DISTILL, "--learning-rate", 1e-3)
    assert other.exit_code == 2
    assert "settings.learning_rate" in other.document["error"]["message"]
    resumed = recover(*DISTILL)
    assert resumed.exit_code == 0, resumed.stderr
    assert "training goes on after step 1 of 2" in resumed.stderr
    whole, pieces = read_weights(tmp_path / "whole"), read_weights(tmp_path / "out")
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert not checkpoints.exists()


@pytest.mark.parametrize("method", ["refit", "distill"])
def test_two_processes_write_one_directory(
    recover: Callable[..., Outcome], plan_file: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    options = DISTILL if method == "distill" else OPTIONS
    alone = recover(*options, out="alone").document
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lpsearch"]
    words = ["recover", plan_file, "--out", tmp_path / "out", "--data", text_file, *options]
    done = subprocess.run(
        [*launch, *map(str, words)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    documents = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(len(document) for document in documents) == [1, len(alone)]
    (document,) = (document for document in documents if "losses" in document)
    assert {"recovered": None} in documents
    assert document["losses"][0]["delta_nll"] == pytest.approx(alone["losses"][0]["delta_nll"], abs=0.01)
    assert read_weights(tmp_path / "out").keys() == read_weights(tmp_path / "alone").keys()


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", 129], "--seq-len is 129, but the model reads at most 128 tokens"),
        (["--data", "/no/such/file.txt"], "/no/such/file.txt: no such file"),
        (["--windows", 4], "Invalid value"),
        (["--method", "distill", "--learning-rate", 0], "learning_rate is 0"),
        (["--method", "distil"], "Invalid value"),
    ],
    ids=str,
)
def test_what_cannot_be_recovered_is_refused_before_weights_are_read(
    recover: Callable[..., Outcome], tiny_model_dir: Path, plan_file: Path, tmp_path: Path, options: list, message: str
) -> None:
    directory = tmp_path / "weightless"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "model.safetensors").write_bytes(b"not weights")
    outcome = recover("--device", "cpu", "--seq-len", 32, *options, "--model", directory)
    assert outcome.exit_code == 2
    assert message in outcome.document["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_plans_and_places_that_cannot_be_used_are_refused_first(
    recover: Callable[..., Outcome], plan_file: Path, tmp_path: Path
) -> None:
    identity = ModelIdentity(id="/nowhere", num_layers=6, fingerprint="0" * 16)
    save_plan(Plan(Plan.baseline(6).groups, PlanMetadata(model=identity)), tmp_path / "baseline.json")
    outcome = recover(plan=tmp_path / "baseline.json")
    assert outcome.exit_code == 2
    assert "joins and drops nothing, so there is nothing to recover; give a plan with groups" in outcome.stderr
    outcome = recover(out="plan.json")
    assert outcome.exit_code == 2
    assert "plan.json is a file; name a new directory" in outcome.document["error"]["message"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    outcome = recover()
    assert outcome.exit_code == 2
    assert "is not empty; name a new directory" in outcome.document["error"]["message"]


def test_too_little_text_is_refused_with_how_much_is_needed(recover: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = recover(*OPTIONS[2:], "--seq-len", 8, "--windows", 10)
    assert outcome.exit_code == 2
    message = outcome.document["error"]["message"]
    assert (
        "64 tokens to fit are too few for the 96 inputs of a group's projections; give at least 15 windows" in message
    )
    assert not (tmp_path / "out").exists()


def test_a_repair_that_does_not_help_is_not_written(
    recover: Callable[..., Outcome], code_file: Path, tmp_path: Path
) -> None:
    """The plan happens to lose less than the unmodified model on one letter, and a repair takes that back."""
    (tmp_path / "one.txt").write_text("a" * 20_000, encoding="utf-8")
    outcome = recover(*OPTIONS, "--data", code_file, "--heldout", tmp_path / "one.txt")
    assert outcome.exit_code == 1
    assert "does not lower the loss on windows that it did not see, so nothing is written" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_adapters_without_peft_are_refused_first(
    recover: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    outcome = recover(*DISTILL, "--lora", 2)
    assert outcome.exit_code == 2
    assert "pip install 'lpsearch[recover]'" in outcome.document["error"]["message"]
    assert "loading" not in outcome.stderr


@pytest.mark.parametrize("method", ["refit", "distill"])
def test_a_loss_that_is_not_finite_is_said_as_evaluate_says_it(
    run_lpsearch: Run,
    recover: Callable[..., Outcome],
    tiny_model_dir: Path,
    plan_file: Path,
    text_file: Path,
    tmp_path: Path,
    method: str,
) -> None:
    """The weights are finite, and the logits overflow."""
    directory = tmp_path / "overflowing"
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight * 3e38
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, directory)
    plan = write_plan(tmp_path / "overflowing.json", directory)
    evaluated = run_lpsearch("evaluate", plan, "--data", text_file, *OPTIONS)
    outcome = recover(*OPTIONS, "--method", method, plan=plan)
    for found in (evaluated, outcome):
        assert found.exit_code == 1, found.stderr
        assert found.document["error"]["message"] == (
            f"a loss on {text_file} is not finite in float32; use --dtype float32 or bfloat16"
        )
        assert "Traceback" not in found.stderr
    assert "refitting" not in outcome.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("command", ["recover", "evaluate"])
def test_a_text_that_is_too_short_is_refused_before_weights_are_read(
    run_lpsearch: Run, tiny_model_dir: Path, plan_file: Path, tmp_path: Path, command: str
) -> None:
    directory = tmp_path / "weightless"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "short.txt").write_text("Too short by far. " * 20, encoding="utf-8")
    options = [*OPTIONS, "--model", directory, "--data", tmp_path / "short.txt"]
    out = ["--out", tmp_path / "out"] if command == "recover" else []
    outcome = run_lpsearch(command, plan_file, *options, *out)
    assert outcome.exit_code == 2
    message = outcome.document["error"]["message"]
    assert f"{tmp_path / 'short.txt'} is too short: 40 windows of 32 tokens need 1280 tokens" in message
    assert not (tmp_path / "out").exists()
