"""Tasks of lm-evaluation-harness over local files: multiple choice, and one that has the model write text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHOICES", "WORDS", "write_choices", "write_task", "write_words"]

CHOICES = "tiny_choices"
WORDS = "tiny_words"


def write_task(directory: Path, name: str, documents: Sequence[Mapping[str, Any]], **config: Any) -> None:
    """Write a task with its documents; JSON is YAML too."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1},
        **config,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def write_choices(
    directory: Path, *, num_documents: int = 30, name: str = CHOICES, **config: Any
) -> list[dict[str, Any]]:
    """Write a task of questions with two to four choices of unlike lengths; return its documents."""
    documents = [
        {
            "question": f"The sum of {i} and {i + 3} is",
            "choices": [("a" * (1 + (i * 7 + k) % 5)) + f" {(i * 5 + k * 3) % 17}" for k in range(2 + i % 3)],
            "answer": i % 2,
        }
        for i in range(num_documents)
    ]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    write_task(
        directory,
        name,
        documents,
        **{
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": metrics,
            **config,
        },
    )
    return documents


def write_words(directory: Path, answers: Mapping[str, str], *, max_new_tokens: int = 4, name: str = WORDS) -> None:
    """Write a task whose answer to each prompt must be exactly that given here."""
    write_task(
        directory,
        name,
        [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["~~~"], "max_gen_toks": max_new_tokens, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
