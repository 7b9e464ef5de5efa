"""Real runs of lm-evaluation-harness on a tiny model and local tasks, compared with one forward a question."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import DataError, SourceError, UsageError
from lpsearch.evaluation.task_scores import TaskResult
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.task_files import CHOICES, WORDS, write_choices, write_task, write_words
from tests.tiny_models import build_tiny_model
from tests.tolerances import FLOAT64_MEAN

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `tasks`)")

from lpsearch.evaluation.harness import load_tasks
from lpsearch.evaluation.tasks import evaluate_tasks

PLAN = Plan.from_groups([[0], [1, 2], [3, 4], [5]])
MAX_NEW_TOKENS = 4
PROMPTS = [f"Count on from {i}:" for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_tiny_model("llama", vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the directory of a task of each kind; the unmodified model knows every word."""
    directory = tmp_path_factory.mktemp("tasks")
    write_choices(directory)
    write_words(directory, {prompt: write(model, tokenizer, prompt) for prompt in PROMPTS})
    return directory


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Continue a prompt by the likeliest token, by one whole forward a token."""
    ids = tokenizer(prompt)["input_ids"]
    length = len(ids)
    for _ in range(MAX_NEW_TOKENS):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


@torch.no_grad()
def choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, choices: list[str], *, per_character: bool
) -> int:
    """Return the likeliest choice, by one forward a choice."""
    found = []
    for choice in choices:
        start, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {choice}")["input_ids"]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(float(log_probs[position - 1, ids[position]]) for position in range(start, len(ids)))
        found.append(total / (len(choice) if per_character else 1))
    return max(range(len(found)), key=found.__getitem__)


def find(results: list[TaskResult], task: str, metric: str) -> TaskResult:
    return next(result for result in results if (result.metric.task, result.metric.metric) == (task, metric))


def planned(model: PreTrainedModel) -> Mapping[str, Any]:
    return {"base": nullcontext, "plan": lambda: applied_plan(model, PLAN)}


def get_values(result: TaskResult) -> dict[str, tuple[float, ...]]:
    return {name: score.parts[0].values for name, score in result.scores.items()}


def test_choices_are_scored_as_one_forward_a_choice_scores_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path
) -> None:
    suite = load_tasks([CHOICES], task_path=tasks)
    results = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model), batch_size=4)
    documents = [json.loads(line) for line in (tasks / f"{CHOICES}.jsonl").read_text().splitlines()]
    for metric, per_character in {"acc": False, "acc_norm": True}.items():
        result = find(results, CHOICES, metric)
        for variant, enter in planned(model).items():
            with enter():
                expected = tuple(
                    float(
                        choose(model, tokenizer, document["question"], document["choices"], per_character=per_character)
                        == document["answer"]
                    )
                    for document in documents
                )
            assert get_values(result)[variant] == expected
            assert result.scores[variant].value == pytest.approx(sum(expected) / len(expected), abs=FLOAT64_MEAN)
        assert result.metric.chance == pytest.approx(
            sum(1 / len(document["choices"]) for document in documents) / len(documents), abs=FLOAT64_MEAN
        )
    assert [result.metric.is_main for result in results] == [False, True]
    scores = get_values(find(results, CHOICES, "acc"))
    assert scores["base"] != scores["plan"], "a plan that changes no answer would show nothing here"


def test_written_answers_are_those_of_one_forward_a_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path
) -> None:
    suite = load_tasks([WORDS], task_path=tasks)
    (result,) = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model), batch_size=5)
    assert get_values(result)["base"] == (1.0,) * len(PROMPTS)
    with applied_plan(model, PLAN):
        planned_answers = [write(model, tokenizer, prompt) for prompt in PROMPTS]
    own_answers = [write(model, tokenizer, prompt) for prompt in PROMPTS]
    expected = tuple(float(a == b) for a, b in zip(planned_answers, own_answers, strict=True))
    assert get_values(result)["plan"] == expected
    assert 0 <= sum(expected) < len(PROMPTS)
    assert result.retained["plan"] == sum(expected) / len(PROMPTS)
    assert result.metric.chance is None


def test_variants_do_not_mix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path) -> None:
    """Every variant has the values that it has alone, whatever was scored before it."""

    @contextmanager
    def repaired() -> Iterator[None]:
        weight = model.model.layers[2].mlp.down_proj.weight
        original = weight.data
        weight.data = original * -2
        try:
            with applied_plan(model, PLAN):
                yield
        finally:
            weight.data = original

    variants = {**planned(model), "repaired": repaired, "again": nullcontext}
    suite = load_tasks([CHOICES, WORDS], task_path=tasks)
    together = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=variants)
    reverse = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=dict(reversed(variants.items())))
    alone = {
        name: evaluate_tasks(
            load_tasks([CHOICES, WORDS], task_path=tasks), model=model, tokenizer=tokenizer, variants={name: enter}
        )
        for name, enter in variants.items()
    }
    for index, result in enumerate(together):
        assert get_values(result) == get_values(reverse[index])
        for name, values in get_values(result).items():
            assert values == get_values(alone[name][index])[name]
        assert result.deltas["again"] == 0
        assert result.delta_ses["again"] == 0
    choices = get_values(find(together, CHOICES, "acc"))
    assert len({choices["base"], choices["plan"], choices["repaired"]}) == 3


def test_the_model_and_tokenizer_are_left_as_they_were(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path
) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
    suite = load_tasks([CHOICES, WORDS], task_path=tasks)
    torch.manual_seed(7)
    random.seed(7)
    states = torch.get_rng_state(), random.getstate()
    evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model), limit=3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert tokenizer.pad_token is None
    assert "tie_weights" not in model.__dict__


def test_a_head_of_its_own_is_not_tied(tokenizer: PreTrainedTokenizerBase, tasks: Path) -> None:
    model = build_tiny_model("llama", vocab_size=257, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(257, model.config.hidden_size))
    suite = load_tasks([CHOICES], task_path=tasks)
    evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants={"base": nullcontext}, limit=2)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_every_variant_sees_the_same_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    documents = write_choices(tmp_path)
    suite = load_tasks([CHOICES], task_path=tmp_path, num_fewshot=2)
    seen: list[list[str]] = []

    @contextmanager
    def noting() -> Iterator[None]:
        yield
        seen.append([instance.args[0] for instance in suite.tasks[CHOICES].instances])

    results = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants={"base": noting, "again": noting})
    assert seen[0] == seen[1]
    assert all(text.count("The sum of") == 3 for text in seen[0])
    assert len({text.split("\n")[0] for text in seen[0]}) > 1, "examples are drawn for each question"
    assert results[0].metric.num_fewshot == 2
    assert results[0].metric.num_documents == len(documents)


def test_a_limit_takes_the_first_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path
) -> None:
    suite = load_tasks([CHOICES], task_path=tasks)
    seen: list[tuple[int, int]] = []
    full = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model))
    cut = evaluate_tasks(
        suite,
        model=model,
        tokenizer=tokenizer,
        variants=planned(model),
        limit=7,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    for variant in ("base", "plan"):
        assert get_values(cut[0])[variant] == get_values(full[0])[variant][:7]
    assert cut[0].metric.num_documents == 7
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert any(0.4 < share < 0.6 for share in shares)


def test_a_group_is_averaged_over_its_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_choices(tmp_path, name="first", num_documents=20)
    write_choices(tmp_path, name="second", num_documents=9)
    group = {
        "group": "both",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    suite = load_tasks(["both"], task_path=tmp_path)
    results = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model))
    whole = find(results, "both", "acc")
    first, second = find(results, "first", "acc"), find(results, "second", "acc")
    assert (whole.metric.group, first.metric.group, second.metric.group) == (None, "both", "both")
    assert whole.metric.num_documents == 29
    for variant in ("base", "plan"):
        correct = sum(get_values(first)[variant]) + sum(get_values(second)[variant])
        assert whole.scores[variant].value == pytest.approx(correct / 29, abs=FLOAT64_MEAN)
    expected = (20 / 29 * first.delta_ses["plan"]) ** 2 + (9 / 29 * second.delta_ses["plan"]) ** 2
    assert whole.delta_ses["plan"] == pytest.approx(expected**0.5, abs=FLOAT64_MEAN)
    assert whole.metric.chance == pytest.approx(
        (20 * first.metric.chance + 9 * second.metric.chance) / 29, abs=FLOAT64_MEAN
    )


def test_a_chat_template_is_applied_to_every_question(
    model: PreTrainedModel, tiny_model_dir: Path, tasks: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    suite = load_tasks([CHOICES], task_path=tasks)
    options = {"model": model, "tokenizer": tokenizer, "variants": {"base": nullcontext}}
    with pytest.raises(UsageError, match="no chat template"):
        evaluate_tasks(suite, **options, apply_chat_template=True)
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %}[answer]"
    evaluate_tasks(suite, **options, apply_chat_template=True, limit=3)
    asked = [instance.args[0] for instance in suite.tasks[CHOICES].instances]
    assert asked
    assert all(text.startswith("[user] The sum of") and text.endswith("[answer]") for text in asked)


def test_accuracy_that_a_task_computes_by_itself_has_no_known_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_choices(tmp_path)
    own = "import numpy\n\n\ndef score(doc, results):\n    return {'acc': numpy.bool_('of 1' in doc['question'])}\n"
    (tmp_path / "own.py").write_text(own)
    config = json.loads((tmp_path / f"{CHOICES}.yaml").read_text())
    config["metric_list"] = config["metric_list"][:1]
    text = json.dumps(config)[:-1] + ', "process_results": !function own.score}'
    (tmp_path / f"{CHOICES}.yaml").write_text(text)
    suite = load_tasks([CHOICES], task_path=tmp_path)
    (result,) = evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model))
    assert result.scores["base"].value == pytest.approx(11 / 30, abs=FLOAT64_MEAN)
    assert sum(get_values(result)["base"]) == 11
    assert result.metric.chance is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"doc_to_text": "{{question"}, "cannot be loaded: unexpected end of template"),
        ({"doc_to_text": "{{question.nothing.at.all}}"}, "no question can be built|cannot be loaded"),
        ({"output_type": "telepathy"}, "telepathy"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/at/all.jsonl"}}}, "/nowhere/at/all.jsonl"),
        ({"test_split": "other"}, "other"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "/dev/null"}}}, "tiny_choices"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_before_a_model_runs(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    write_choices(tmp_path, **config)
    with pytest.raises(DataError, match=message) as caught:
        load_tasks([CHOICES], task_path=tmp_path)
    assert CHOICES in str(caught.value)


def test_more_examples_than_documents_are_refused(tmp_path: Path) -> None:
    write_choices(tmp_path, num_documents=3)
    with pytest.raises(DataError, match="--num-fewshot"):
        load_tasks([CHOICES], task_path=tmp_path, num_fewshot=5)


def test_a_task_that_shows_no_examples_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_choices(tmp_path, num_fewshot=0)
    with caplog.at_level(logging.WARNING, logger="lpsearch"):
        suite = load_tasks([CHOICES], task_path=tmp_path, num_fewshot=2)
    assert "--num-fewshot leaves it so" in caplog.text
    assert suite.tasks[CHOICES].get_config("num_fewshot") == 0


@pytest.mark.parametrize(
    ("config", "message"), [({"unsafe_code": True}, "runs code"), ({"doc_to_image": "image"}, "images")]
)
def test_tasks_that_need_more_than_text_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_choices(tmp_path, **config)
    with pytest.raises(UsageError, match=message):
        load_tasks([CHOICES], task_path=tmp_path)


def test_a_task_that_two_names_hold_is_refused(tmp_path: Path) -> None:
    write_choices(tmp_path, tag=["small"])
    with pytest.raises(UsageError, match="name it once"):
        load_tasks([CHOICES, "small"], task_path=tmp_path)


def test_a_directory_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        load_tasks([CHOICES], task_path=tmp_path / "none")
    with pytest.raises(UsageError, match="has no task"):
        load_tasks([CHOICES], task_path=tmp_path)


def test_data_on_a_hub_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    write_task(tmp_path, "far", [], dataset_path="someone/something", dataset_kwargs={}, output_type="multiple_choice")
    with pytest.raises(SourceError, match="someone/something") as caught:
        load_tasks(["far"], task_path=tmp_path)
    assert "HF_DATASETS_OFFLINE=1" in str(caught.value)
    assert "--task-path" in str(caught.value)


def test_warnings_of_the_harness_are_logged_each_once_and_not_without_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_choices(tmp_path, doc_to_target="{{0 if 'of 0 ' in question else 9}}")  # beyond the choices, but the first
    suite = load_tasks([CHOICES], task_path=tmp_path)
    caplog.clear()
    evaluate_tasks(suite, model=model, tokenizer=tokenizer, variants=planned(model))
    said = [record.message for record in caplog.records if "Label index" in record.message]
    assert len(said) == len(set(said)) == 5
    assert "and 24 more warnings" in caplog.text


@pytest.mark.slow  # the harness reads its own 14,000 task files
def test_near_names_are_given_for_an_unknown_one(tasks: Path) -> None:
    with pytest.raises(UsageError, match="arc_easy"):
        load_tasks(["arc_esy"])
    with pytest.raises(UsageError, match=f"near it are .*{CHOICES}.* has .*{WORDS}"):
        load_tasks(["tiny_choice"], task_path=tasks)
