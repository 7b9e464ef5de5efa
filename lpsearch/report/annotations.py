"""What optuna-dashboard shows of a study besides its trials: the front as a figure, notes, and the plan files.

All of it is in the study's system attributes and in ``artifacts/`` beside its plan files, so optuna-dashboard finds it
however it is started. Metric names are set where the study is opened (:mod:`lpsearch.search.settings`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
import plotly.graph_objects as go
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.storages import BaseStorage

from lpsearch.latency.profile import describe_estimate
from lpsearch.models.aliases import name_model
from lpsearch.report.advice import list_commands
from lpsearch.report.figures import build_front_figure, describe_groups
from lpsearch.report.front_columns import format_loss
from lpsearch.report.kind_figure import describe_kind_losses
from lpsearch.report.study import StudyReport, describe_cache
from lpsearch.report.tables import Table, build_front_table
from lpsearch.search import StudyStore, TrialResult
from lpsearch.search.settings import list_study_options
from lpsearch.wording import describe_changes, escape_controls

__all__ = ["ARTIFACTS_NAME", "FRONT_FIGURE_ID", "annotate_study", "is_annotated"]

ARTIFACTS_NAME = "artifacts"
"""Directory of the plan files as optuna-dashboard reads them, in the study's directory."""

FRONT_FIGURE_ID = "lpsearch-front"
"""Id of the front's figure, by which a later one replaces it."""

MAX_FIGURE_TRIALS = 300
"""Trials behind the front; optuna-dashboard stores a figure in pieces of 2 KB, each in a transaction of its own."""

_OWN_END = "*lpsearch renews the text above this line and keeps what is written below it.*"
_NOTED_TRIALS = "lpsearch:noted_trials"
"""System attribute of the study: the trials whose notes are of a front."""

_PLAN_FILE_NAME = re.compile(r"joins-\d+(-drops-\d+)?(-trial-\d+)?\.json")


class Dashboard(Protocol):
    """The functions of ``optuna_dashboard`` that are used."""

    def save_note(self, study_or_trial: Any, body: str) -> None:
        """Replace a note."""

    def get_note(self, study_or_trial: Any) -> str:
        """Return a note; empty where there is none."""

    def save_plotly_graph_object(self, study: optuna.Study, figure: go.Figure, *, graph_object_id: str) -> str:
        """Replace a figure."""


@dataclass(frozen=True)
class _FinishedTrial:
    """What optuna-dashboard's functions for notes read of a trial: its names are theirs.

    Optuna makes its own ``Trial`` for running trials only.
    """

    storage: BaseStorage
    study: optuna.Study
    _trial_id: int


def is_annotated(store: StudyStore, report: StudyReport) -> bool:
    """Tell whether optuna-dashboard shows the present front of a study.

    Args:
        store: its database.
        report: the study.

    Raises:
        StudyError: if the database fails.
    """
    with store.translate_errors():
        study_id = store.optuna_storage.get_study_id_from_name(store.study_name)
        noted = store.optuna_storage.get_study_system_attrs(study_id).get(_NOTED_TRIALS)
    return noted == sorted(result.trial for result in report.front)


def annotate_study(store: StudyStore, report: StudyReport, directory: Path) -> None:
    """Bring what optuna-dashboard shows of a study up to its present front.

    Notes that people wrote stay: in a note that both wrote, what stands below lpsearch's text.

    Args:
        store: its database, whose lock the caller holds.
        report: the study.
        directory: its directory; the plan files are copied into ``artifacts/`` there.

    Raises:
        ImportError: if optuna-dashboard is not installed.
        StudyError: if the database fails.
        OSError: if a plan file cannot be copied.
    """
    import optuna_dashboard

    with store.translate_errors():
        study = optuna.load_study(study_name=store.study_name, storage=store.optuna_storage)
        _save_figure(optuna_dashboard, study, report)
        _save_notes(optuna_dashboard, store, study, report)
        _save_plan_files(store, study, report, directory)


def _save_figure(dashboard: Dashboard, study: optuna.Study, report: StudyReport) -> None:
    on_front = {result.trial for result in report.front}
    others = [result for result in report.results if result.trial not in on_front]
    others.sort(key=lambda result: result.get_cost(report.metric))
    shown = {result.trial for result in others[:MAX_FIGURE_TRIALS]} | on_front
    results = tuple(result for result in report.results if result.trial in shown)
    figure = build_front_figure(dataclasses.replace(report, results=results))
    figure.update_layout(title={"text": "Front of plans", "font": {"size": 16}, "x": 0.02}, margin_t=48)
    dashboard.save_plotly_graph_object(study, figure, graph_object_id=FRONT_FIGURE_ID)


# ---- Notes -----------------------------------------------------------------------------------------------------------


def _save_notes(dashboard: Dashboard, store: StudyStore, study: optuna.Study, report: StudyReport) -> None:
    _save_note(dashboard, study, _describe_study(store, report))
    storage = store.optuna_storage
    study_id = storage.get_study_id_from_name(store.study_name)
    front = {result.trial: result for result in report.front}
    noted = storage.get_study_system_attrs(study_id).get(_NOTED_TRIALS, [])
    # Written first: a run that ends in between leaves a trial in the list without a note, and not the reverse.
    storage.set_study_system_attr(study_id, _NOTED_TRIALS, sorted({*noted, *front}))
    for number in sorted({*noted, *front}):
        text = _describe_result(report, front[number]) if number in front else ""
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        _save_note(dashboard, _FinishedTrial(storage, study, trial_id), text)
    storage.set_study_system_attr(study_id, _NOTED_TRIALS, sorted(front))


def _save_note(dashboard: Dashboard, subject: optuna.Study | _FinishedTrial, text: str) -> None:
    """Replace lpsearch's former text in a note, and keep what people wrote.

    Args:
        dashboard: reads and writes notes.
        subject: what the note is of.
        text: Markdown; empty removes the former one.
    """
    former = dashboard.get_note(subject)
    _, end, theirs = former.rpartition(_OWN_END)
    theirs = theirs.strip() if end else former.strip()
    note = f"{text}\n\n---\n{_OWN_END}\n\n{theirs}".rstrip() + "\n" if text else theirs
    if note != former:
        dashboard.save_note(subject, note)


def _describe_study(store: StudyStore, report: StudyReport) -> str:
    model = name_model(str(report.settings.get("model", "the model")))
    options = list_study_options(store, Path(report.directory))
    command = shlex.join(["lpsearch", "dashboard", report.directory, *options])
    state = "" if report.is_current else " The search is under way or was interrupted."
    return "\n".join(
        [
            f"## {_escape(report.name)}: layer parallelism",
            "",
            f"{_escape(model)} has {report.num_layers} layers. Evaluated: "
            f"{len(report.results)} plans, {report.proxy_tokens:,} tokens. "
            f"Unmodified: {report.baseline.loss.nll:.4f} nats per token, "
            f"perplexity {report.baseline.perplexity:.2f}.{state}",
            "",
            *_render_markdown(build_front_table(report)),
            "",
            f"The page with all figures: `{command}`",
        ]
    )


def _describe_result(report: StudyReport, result: TrialResult) -> str:
    metric, heldout = report.metric, result.get_heldout(report.metric)
    lines = [
        f"### On the front: {describe_changes(result.plan)}, {result.depth_reduction:.1%} less depth",
        "",
        f"- layers together: {describe_groups(result.plan)}",
        f"- loss: {format_loss(result.loss, metric)} nats per token",
    ]
    if heldout is not None:
        lines.append(f"- held out: {format_loss(heldout, metric)} nats per token")
    lines += [f"- {_escape(name)}: {value}" for name, value in describe_kind_losses(report, result).items()]
    lines.append(f"- perplexity: {result.perplexity:.3f}")
    if result.speedup is not None:
        estimated = describe_estimate(report.latency_error)
        lines.append(f"- time of a step: {result.latency_ms:.3f} ms, {result.speedup:.3f}x ({estimated})")
    cached = describe_cache(report, result)
    if cached:
        lines.append(f"- KV cache: {cached}")
    commands = list_commands(report, result)
    if commands:
        rows = [line for command in commands for line in (f"# {command.purpose}", command.line)]
        lines += ["", "```sh", *rows, "```"]
    return "\n".join(lines)


def _render_markdown(table: Table) -> list[str]:
    rows: Iterable[Sequence[str]] = (table.columns, ["---"] * len(table.columns), *table.rows)
    return ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", escape_controls(text))


# ---- Plan files ------------------------------------------------------------------------------------------------------


def _save_plan_files(store: StudyStore, study: optuna.Study, report: StudyReport, directory: Path) -> None:
    """Keep one artifact a plan file of the front, under the same id for as long as the front has a plan of its name."""
    artifacts = FileSystemArtifactStore(directory / ARTIFACTS_NAME)
    (directory / ARTIFACTS_NAME).mkdir(exist_ok=True)
    paths = {Path(name).name: directory / name for result in report.front if (name := result.plan_file)}
    storage = store.optuna_storage
    ids = _list_plan_artifacts(storage.get_study_system_attrs(storage.get_study_id_from_name(store.study_name)))
    for name, path in sorted(paths.items()):
        if name in ids:
            with path.open("rb") as content:
                artifacts.write(ids[name], content)
        else:
            upload_artifact(artifact_store=artifacts, file_path=str(path), study_or_trial=study)
    for name in ids.keys() - paths.keys():
        store.delete_study_attribute(f"artifacts:{ids[name]}")
        (directory / ARTIFACTS_NAME / ids[name]).unlink(missing_ok=True)


def _list_plan_artifacts(attributes: dict[str, Any]) -> dict[str, str]:
    """Return the ids of the plan files among a study's artifacts by name; other artifacts are people's."""
    entries = [json.loads(value) for key, value in attributes.items() if key.startswith("artifacts:")]
    return {
        entry["filename"]: entry["artifact_id"]
        for entry in entries
        if entry is not None and _PLAN_FILE_NAME.fullmatch(entry["filename"])  # None: deleted in optuna-dashboard
    }
