"""What can be known before a model is loaded is refused before: here no model has weights that could be loaded."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import lpsearch
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, save_plan
from tests.commands.advice import find_foreign_options, list_commands, list_options
from tests.commands.conftest import Run
from tests.models.gguf_files import build_llama, write_gguf

MAX_POSITIONS = 2048


@pytest.fixture(scope="module")
def weightless_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model of six layers, whose weights are no safetensors file."""
    directory = tmp_path_factory.mktemp("weightless")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    (directory / "model.safetensors").write_bytes(b"not weights")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = MAX_POSITIONS
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_plan(path: Path, model: Path | str, *, num_layers: int = 6, first: int = 1) -> Path:
    identity = ModelIdentity(id=str(model), revision=None, num_layers=num_layers, fingerprint="0" * 16)
    plan = Plan.from_joins(num_layers, [first])
    save_plan(Plan(plan.groups, PlanMetadata(model=identity)), path)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seq-len", MAX_POSITIONS + 1], "--seq-len is 2049, but the model reads at most 2048 tokens"),
        (["--max-group", 7], "max_group is 7; the model has only 6 layers"),
        (["--freeze", "6"], "frozen layer 6 does not exist; the model has layers 0 to 5"),
        (["--freeze", "1", "--enqueue", "PLAN"], "is outside the space"),
        (["--enqueue", "DEEPER"], "has 8 layers, the model 6"),
        (["--latency", "PROFILE"], "the latency profile is of another geometry"),
        (["--storage", "sqlite://"], "kept in memory only"),
        (["--storage", "sqlite:///:memory:"], "kept in memory only"),
        (["--storage", "sqlite+pysqlite:///"], "kept in memory only"),
        (["--data", "BLANK"], "holds no text"),
        (["--heldout", "BLANK"], "holds no text"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("is_fresh", [False, True])
def test_optimize_refuses_before_it_loads(
    run_lpsearch: Run,
    weightless_dir: Path,
    text_file: Path,
    tmp_path: Path,
    options: list[object],
    words: str,
    is_fresh: bool,
) -> None:
    (tmp_path / "blank.txt").write_text(" \n\t\n", encoding="utf-8")
    files = {
        "PLAN": write_plan(tmp_path / "plan.json", weightless_dir),
        "DEEPER": write_plan(tmp_path / "deeper.json", weightless_dir, num_layers=8),
        "BLANK": tmp_path / "blank.txt",
    }
    if "PROFILE" in options:
        files["PROFILE"] = write_profile(tmp_path / "profile.json")
    out = tmp_path / "study"
    outcome = run_lpsearch(
        *("optimize", "--model", weightless_dir, "--data", text_file, "--windows", 2, "--seq-len", 16),
        *("--latency", "off", "--device", "cpu", "--out", out),
        *[files.get(str(option), option) for option in options],
        *(["--fresh"] if is_fresh else []),
    )
    assert outcome.exit_code == 2, outcome.stderr
    assert words in outcome.document["error"]["message"]
    assert not (out / "front.json").exists()


def write_profile(path: Path) -> Path:
    """Measure a profile of a model of another shape."""
    import torch

    from lpsearch.latency import Workload, measure_profile, save_profile
    from tests.tiny_models import build_tiny_model

    config = build_tiny_model("llama", vocab_size=384).config
    profile = measure_profile(
        config,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workloads=[Workload("decode", 1, 16)],
        max_group=2,
        budget_s=0,
    )
    save_profile(profile, path)
    return path


def test_a_model_that_could_be_searched_is_loaded(run_lpsearch: Run, weightless_dir: Path, tmp_path: Path) -> None:
    outcome = run_lpsearch(
        *("optimize", "--model", weightless_dir, "--data", "self", "--windows", 2, "--seq-len", MAX_POSITIONS),
        *("--latency", "off", "--device", "cpu", "--out", tmp_path / "study", "--max-group", 6, "--freeze", 5),
    )
    assert outcome.exit_code == 2
    assert "safetensors" in outcome.document["error"]["message"], "nothing else was wrong"


def test_every_command_counts_the_layers_first(run_lpsearch: Run, weightless_dir: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.json", weightless_dir, num_layers=8)
    for words in (
        ["evaluate", plan, "--data", "self"],
        ["generate", plan, "--prompt", "The"],
        ["export", plan, tmp_path / "exported"],
        ["plan", "validate", plan, "--model", weightless_dir],
        ["recover", plan, "--data", "self", "--out", tmp_path / "recovered"],
    ):
        outcome = run_lpsearch(*words)
        assert outcome.exit_code == 2, outcome.stderr
        assert "cover 8 layers and this model (llama) has 6" in outcome.document["error"]["message"]
    outcome = run_lpsearch("profile", "--model", weightless_dir, "--max-group", 7, "--out", tmp_path / "p.json")
    assert outcome.exit_code == 2
    assert "--max-group is 7; the model has only 6 layers" in outcome.document["error"]["message"]


def test_the_weights_of_a_gguf_file_are_read_last(run_lpsearch: Run, tmp_path: Path) -> None:
    model = build_llama(max_position_embeddings=64)
    file = write_gguf(tmp_path / "tiny.gguf", model, extra={"blk.0.unknown.weight": np.zeros((4, 4), np.float32)})
    plan = write_plan(tmp_path / "plan.json", file, num_layers=8)
    for words in (
        ["evaluate", plan, "--data", "self"],
        ["generate", plan, "--prompt", "The"],
        ["export", plan, tmp_path / "exported"],
        ["plan", "validate", plan, "--model", file],
        ["recover", plan, "--data", "self", "--out", tmp_path / "recovered"],
    ):
        outcome = run_lpsearch(*words)
        assert outcome.exit_code == 2, outcome.stderr
        assert "cover 8 layers and this model (llama) has 3" in outcome.document["error"]["message"]
    search = ["optimize", "--model", file, "--data", "self", "--latency", "off", "--out", tmp_path / "study"]
    outcome = run_lpsearch(*search, "--seq-len", 65)
    assert "--seq-len is 65, but the model reads at most 64 tokens" in outcome.document["error"]["message"]
    outcome = run_lpsearch(*search, "--seq-len", 64)
    assert "leaves out 1 tensors" in outcome.document["error"]["message"], "nothing else was wrong"


def test_evaluate_refuses_windows_that_the_model_cannot_read(
    run_lpsearch: Run, weightless_dir: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "plan.json", weightless_dir)
    outcome = run_lpsearch("evaluate", plan, "--data", "self", "--seq-len", MAX_POSITIONS + 1, "--windows", 1)
    assert outcome.exit_code == 2
    assert "--seq-len is 2049, but the model reads at most 2048 tokens" in outcome.document["error"]["message"]


def test_a_quantised_model_is_refused_by_its_configuration(
    run_lpsearch: Run, weightless_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "quantised"
    shutil.copytree(weightless_dir, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = write_plan(tmp_path / "plan.json", directory)
    for words in (
        ["export", plan, tmp_path / "exported"],
        ["plan", "validate", plan, "--model", directory],
        [*("recover", plan, "--data", "self", "--out", tmp_path / "recovered")],
    ):
        outcome = run_lpsearch(*words)
        assert outcome.exit_code == 2
        assert "the weights are quantised (gptq)" in outcome.document["error"]["message"]


# ---- What to generate ------------------------------------------------------------------------------------------------


def test_generate_refuses_more_tokens_than_the_model_reads(
    run_lpsearch: Run, weightless_dir: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "plan.json", weightless_dir)
    arguments = ["generate", plan, "--device", "cpu", "--prompt", "Twelve bytes", "--max-new-tokens"]
    outcome = run_lpsearch(*arguments, MAX_POSITIONS)
    assert outcome.exit_code == 2
    assert "give 2047 or less" in outcome.document["error"]["message"]
    outcome = run_lpsearch(*arguments, MAX_POSITIONS - 11)
    assert outcome.exit_code == 2
    assert "--prompt has 12 tokens and --max-new-tokens asks for 2037" in outcome.document["error"]["message"]
    assert "give --max-new-tokens 2036 or less, or a shorter --prompt" in outcome.document["error"]["message"]
    outcome = run_lpsearch(*arguments, MAX_POSITIONS - 12)
    assert "safetensors" in outcome.document["error"]["message"], "so many fit, and the weights are read"


def test_generate_fills_what_the_model_reads(run_lpsearch: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The longest text that is not refused is generated whole, by the plan and by its export."""
    directory = tmp_path / "short"
    shutil.copytree(tiny_model_dir, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 20
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "generation_config.json").unlink(missing_ok=True)  # which may name an end
    plan = write_own_plan(tmp_path / "plan.json", directory)
    exported = tmp_path / "exported"
    assert run_lpsearch("export", plan, exported).exit_code == 0
    for where in (plan, exported):
        arguments = ["generate", where, "--device", "cpu", "--dtype", "float32", "--prompt", "Twelve bytes"]
        outcome = run_lpsearch(*arguments, "--max-new-tokens", 9)
        assert outcome.exit_code == 2
        assert "give --max-new-tokens 8 or less" in outcome.document["error"]["message"]
        outcome = run_lpsearch(*arguments, "--max-new-tokens", 8)
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.document["new_tokens"] <= 8
        outcome = run_lpsearch(*arguments[:-1], "More bytes than the model reads", "--max-new-tokens", 1)
        assert outcome.document["error"]["message"].endswith("give a shorter --prompt")


def write_own_plan(path: Path, directory: Path) -> Path:
    import torch

    from lpsearch.models import load_model, resolve_source

    identity = load_model(resolve_source(str(directory)), device="cpu", dtype=torch.float32).identity
    save_plan(Plan(Plan.from_joins(6, [1]).groups, PlanMetadata(model=identity)), path)
    return path


def test_a_prompt_without_tokens_is_refused(run_lpsearch: Run, weightless_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path / "words"
    shutil.copytree(weightless_dir, directory)
    tokenizer = Tokenizer(models.WordLevel({"unknown": 0, "The": 1}, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="unknown").save_pretrained(directory)
    plan = write_plan(tmp_path / "plan.json", directory)
    for prompt in (" ", "\t \n"):
        outcome = run_lpsearch("generate", plan, "--device", "cpu", "--prompt", prompt)
        assert outcome.exit_code == 2
        assert "the tokenizer of this model makes no token of" in outcome.document["error"]["message"]
    outcome = run_lpsearch("generate", plan, "--device", "cpu", "--prompt", "")
    assert outcome.exit_code == 2
    assert "--prompt is empty" in outcome.document["error"]["message"]


# ---- Options without a value -----------------------------------------------------------------------------------------


def list_valued() -> list[tuple[str, ...]]:
    """List every option of every command that takes a value, and every argument by its place."""
    import typer.main

    from lpsearch.commands.app import app

    cases = []
    for words in list_commands():
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                required = [p.opts[0] for p in command.params if p.required and p.param_type_name == "option"]
                others = [word for name in required if name != parameter.opts[0] for word in (name, "x")]
                cases.append((*words, *["x"] * len(arguments), *others, parameter.opts[0], ""))
        places = range(len(arguments))
        cases += [(*words, *["x"] * place, "", *["x"] * (len(arguments) - place - 1)) for place in places]
    return cases


@pytest.mark.parametrize("words", list_valued(), ids=" ".join)
def test_no_empty_value_is_taken_for_another(run_lpsearch: Run, words: tuple[str, ...]) -> None:
    outcome = run_lpsearch(*words)
    if words[-2] == "--freeze":  # no layers
        assert "freeze" not in outcome.document["error"]["message"]
        return
    assert outcome.exit_code == 2, outcome.stderr
    assert any(word in outcome.document["error"]["message"] for word in ("empty", "Invalid value")), outcome.stderr


def test_a_configuration_file_has_no_empty_paths(run_lpsearch: Run, tmp_path: Path) -> None:
    config = tmp_path / "search.toml"
    for line in ('out = ""', 'enqueue = [""]', 'heldout = ""', 'study = ""', 'storage = ""', 'data = ""'):
        config.write_text(f'model = "smollm2-135m"\n{line}\n', encoding="utf-8")
        outcome = run_lpsearch("optimize", "--config", config)
        assert outcome.exit_code == 2
        message = outcome.document["error"]["message"]
        assert message.startswith(f"--{line.split()[0]}:")
        assert "empty" in message or "at least 1 character" in message


def test_a_database_in_memory_holds_no_study_to_look_at(run_lpsearch: Run, tmp_path: Path) -> None:
    for command in ("report", "dashboard"):
        outcome = run_lpsearch(command, tmp_path, "--storage", "sqlite://")
        assert outcome.exit_code == 2
        assert "kept in memory only" in outcome.document["error"]["message"]


def test_foreign_options_are_found() -> None:
    assert find_foreign_options(["report", "x"], "ERROR use --fresh or --out") == ["--fresh"]
    assert find_foreign_options(["report", "x"], "ERROR run `lpsearch optimize --fresh`") == []
    assert find_foreign_options(["report", "x"], "ERROR run `lpsearch plan pick --fresh`") == ["--fresh"]
    assert find_foreign_options(["report", "--no"], "ERROR No such option: --no") == []
    assert {"--max-delta", "--json"} <= list_options(["plan", "pick", "x"])


# ---- Advice ----------------------------------------------------------------------------------------------------------

_SAID_BY = {
    "commands": ["optimize", "evaluate", "export", "generate", "profile", "report", "dashboard", "plan pick"],
    "commands/app.py": [],  # it looks for the option that it names
    "commands/console.py": ["optimize", "profile", "report"],  # for those with --out
    "commands/dry_run.py": ["optimize"],
    "commands/examples.py": [],  # command lines, which test_help.py parses
    "commands/export.py": ["export"],
    "commands/generate.py": ["generate"],
    "commands/hardware.py": ["optimize"],
    "commands/workers.py": ["optimize"],
    "commands/latency.py": ["optimize"],
    "commands/loading.py": ["optimize", "evaluate", "generate", "recover"],
    "commands/optimize.py": ["optimize"],
    "commands/plan.py": ["plan pick"],
    "commands/plan_texts.py": ["evaluate", "recover"],
    "commands/profile.py": ["profile"],
    "commands/recover.py": ["recover"],
    "commands/report.py": ["report"],
    "commands/results.py": ["optimize", "evaluate"],
    "commands/search.py": ["optimize"],
    "commands/studies.py": ["optimize"],
    "commands/summary.py": ["optimize"],
    "commands/tasks.py": ["evaluate"],
    "commands/worker.py": ["worker"],
    "config.py": ["optimize"],
    "data": ["optimize", "evaluate", "recover"],
    "evaluation": ["optimize", "evaluate"],
    "evaluation/harness.py": ["evaluate"],
    "evaluation/probe.py": ["optimize"],
    "evaluation/tasks.py": ["evaluate"],
    "export": ["export"],
    "latency": ["optimize", "profile"],
    "latency/engines": ["profile"],
    "latency/profile.py": ["optimize"],  # which reads it
    "latency/ranks": ["profile"],
    "latency/workload.py": ["profile"],
    "models": ["optimize", "evaluate", "export", "generate", "profile", "plan validate", "recover"],
    "models/fingerprint.py": ["optimize"],
    "models/packaged.py": ["optimize", "evaluate", "export", "generate", "profile", "plan validate", "recover"],
    "models/tokenizer_check.py": ["optimize"],
    "recovery": ["recover"],
    "recovery/refit.py": ["optimize", "recover"],
    "recovery/evaluator.py": ["optimize"],
    "report": [],  # pages, with commands to copy
    "report/study.py": ["optimize", "report", "dashboard"],
    "search": ["optimize", "report", "dashboard"],
    "search/coordinator.py": ["optimize"],
    "search/locks.py": ["optimize"],
    "search/settings.py": ["optimize"],
    "search/space.py": ["optimize"],
    "search/workers": ["optimize"],
}
"""Which commands the messages of a module may come from."""


def list_messages() -> list[tuple[str, str]]:
    """List the texts of the package that name an option, other than docstrings, by module."""
    package = Path(lpsearch.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in inner:
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}"
                for part in parts
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
            if (
                " " in text
                and re.search(r"(^|[ (`])--[a-z]", text)
                and not text.startswith(("vllm serve ", "llama-gguf-split "))
            ):
                found.append((path.relative_to(package).as_posix(), text))
    return found


@pytest.mark.parametrize(("module", "text"), list_messages())
def test_messages_name_options_of_every_command_that_may_say_them(module: str, text: str) -> None:
    places = [module, *(parent.as_posix() for parent in Path(module).parents)]
    commands = next(_SAID_BY[place] for place in places if place in _SAID_BY)
    for command in commands:
        assert find_foreign_options(command.split(), text) == [], command
