"""What ``optimize`` leaves behind: ``front.json`` and one plan file for each of its points."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsearch.config import Metric, Objective, Recover, Split
from lpsearch.errors import LpsearchError, StudyError
from lpsearch.front_file import FRONT_NAME, FRONT_SCHEMA_VERSION, FrontFile, FrontPoint, load_front_file
from lpsearch.plan import (
    KindMetrics,
    ModelIdentity,
    PlanMetadata,
    PlanMetrics,
    Provenance,
    ProxyMetrics,
    save_plan,
    write_json,
)
from lpsearch.search import Loss, TrialResult, build_front
from lpsearch.search.results import RAW, Variant, finite_or_none, list_untouched
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from lpsearch.data import Windows
    from lpsearch.latency import LatencyModel

__all__ = ["build_front_file", "build_proxy_metrics", "build_summary", "check_finite", "name_plan_files", "write_front"]

_SUMMARY_FIELDS = {
    "plan",
    "num_joins",
    "depth_reduction",
    "delta_nll",
    "heldout_delta_nll",
    "perplexity",
    "latency_ms",
    "speedup",
}
_KL_FIELDS = {"kl_nats_per_token", "heldout_kl_nats_per_token"}
_KIND_FIELDS = {"by_kind", "heldout_by_kind"}
_REFIT_FIELDS = {"untouched_delta_nll", "untouched_heldout_delta_nll"}
_WORST_CASE_FIELDS = {"worst_kind_loss", "heldout_worst_kind_loss"}


def check_finite(losses: Sequence[float], *, spec: str, dtype: str) -> None:
    """Refuse losses that no file can hold.

    Args:
        losses: in nats per token.
        spec: what was evaluated on.
        dtype: dtype of the weights.

    Raises:
        LpsearchError: if one is not finite.
    """
    if not all(map(math.isfinite, losses)):
        raise LpsearchError(f"a loss on {spec} is not finite in {dtype}; use --dtype float32 or bfloat16")


def name_plan_files(front: Sequence[TrialResult]) -> list[TrialResult]:
    """Give every plan of a front the path of its file relative to the study's directory.

    The names are stable as the front improves: they tell the joins and the drops, and the trial where several
    plans have as many of both.
    """
    num_with = Counter((result.num_joins, result.num_dropped) for result in front)
    named = []
    for result in front:
        suffix = f"-drops-{result.num_dropped:02d}" if result.num_dropped else ""
        suffix += f"-trial-{result.trial}" if num_with[result.num_joins, result.num_dropped] > 1 else ""
        named.append(dataclasses.replace(result, plan_file=f"plans/joins-{result.num_joins:02d}{suffix}.json"))
    return named


def build_front_file(
    front: Sequence[TrialResult],
    *,
    study: str,
    model: ModelIdentity,
    objective: Objective,
    metric: Metric,
    num_trials: int,
    proxy_tokens: int,
    latency_model: LatencyModel | None = None,
    recover: Recover = "off",
    freeze: tuple[int, ...] = (),
    exact: bool = False,
    finished: bool = True,
) -> FrontFile:
    """Build the content of ``front.json``.

    Args:
        front: the unmodified model, then the plans that no other beats, with the names of their files.
        study: name of the Optuna study.
        model: the model.
        objective: what was traded against the loss.
        metric: the loss that was searched.
        num_trials: finished plans of the study.
        proxy_tokens: tokens behind their losses.
        latency_model: estimates of time; None with latency off.
        recover: what was done to the weights of every plan before its losses were measured.
        freeze: layers that no plan of the front changes.
        exact: every plan of the space is finished.
        finished: the search has ended.
    """
    untouched_front = build_front(list_untouched(front), metric=metric, objective=objective)
    return FrontFile(
        schema_version=FRONT_SCHEMA_VERSION,
        study=study,
        model=model,
        objective=objective,
        metric=metric,
        worst_case=_is_worst_case(front[0]),
        recover=recover,
        untouched_front=tuple(str(found.plan_file) for found in untouched_front),
        freeze=freeze,
        trials=num_trials,
        exact=exact,
        baseline_nll=front[0].loss.nll,
        proxy_tokens=proxy_tokens,
        heldout_tokens=sum(found.heldout.num_tokens for found in front if found.heldout is not None),
        latency_engine=None if latency_model is None else latency_model.profile.engine,
        latency_error=None if latency_model is None else latency_model.mean_error,
        speedup_margin=None if latency_model is None else latency_model.speedup_margin,
        finished=finished,
        front=tuple(_build_point(found, metric) for found in front),
    )


def write_front(
    out: Path,
    front: Sequence[TrialResult],
    file: FrontFile,
    *,
    windows: Mapping[Split, Windows],
    dtype: str,
    device_name: str,
    seed: int,
    latency_model: LatencyModel | None,
    written: Mapping[str, TrialResult],
) -> None:
    """Write the plan files, then ``front.json``; plan files of an earlier front are removed.

    Args:
        out: directory of the study.
        front: the results that the file lists.
        file: content of ``front.json``.
        windows: what was evaluated on.
        dtype: dtype of the weights.
        device_name: what evaluated them.
        seed: of the search.
        latency_model: estimates of time; None with latency off.
        written: results whose plan files stand there already, by the name of the file.

    Raises:
        OSError: if a file cannot be written.
    """
    former = _list_plan_files(out)
    (out / "plans").mkdir(exist_ok=True)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    for result in front:
        assert result.plan_file is not None
        if written.get(result.plan_file) == result:
            continue
        losses: dict[Split, Loss | None] = {"proxy": result.loss, "heldout": result.get_heldout("nll")}
        metrics = {
            split: build_proxy_metrics(
                loss, windows=windows[split], dtype=dtype, device_name=device_name, variant=result.variant
            )
            for split, loss in losses.items()
            if loss is not None
        }
        metadata = PlanMetadata(
            model=file.model,
            metrics=PlanMetrics(
                **metrics, latency=None if latency_model is None else latency_model.build_metrics(result.plan)
            ),
            provenance=Provenance(
                study=file.study, trial=result.trial, seed=seed, versions=read_versions(), created_at=created_at
            ),
        )
        save_plan(dataclasses.replace(result.plan, metadata=metadata), out / result.plan_file)
    write_json(file.model_dump(mode="json"), out / FRONT_NAME)
    for name in former - {result.plan_file for result in front}:
        (out / name).unlink(missing_ok=True)


def build_summary(file: FrontFile, out: Path) -> dict[str, Any]:
    """Build the JSON object that ends the command: study, out, trials, baseline_nll, front.

    The plans of a search by divergence have that too, on several kinds of text the losses by kind, and after a refit
    the losses without it.
    """
    fields = _SUMMARY_FIELDS | _KL_FIELDS if file.metric == "kl" else _SUMMARY_FIELDS
    fields = fields | _KIND_FIELDS if any(point.by_kind or point.heldout_by_kind for point in file.front) else fields
    fields = fields | {"num_dropped"} if any(point.num_dropped for point in file.front) else fields
    fields = fields | _WORST_CASE_FIELDS if file.worst_case else fields
    fields = fields if file.recover == "off" else fields | _REFIT_FIELDS
    return {
        "study": file.study,
        "out": str(out),
        "trials": file.trials,
        "baseline_nll": file.baseline_nll,
        **({} if file.recover == "off" else {"recover": file.recover, "untouched_front": list(file.untouched_front)}),
        "front": [point.model_dump(mode="json", include=fields) for point in file.front],
    }


def build_proxy_metrics(
    loss: Loss, *, windows: Windows, dtype: str, device_name: str, variant: Variant = RAW
) -> ProxyMetrics:
    """Build the entry of a plan file for a loss on some windows.

    Args:
        loss: of the plan.
        windows: what was evaluated on.
        dtype: dtype of the weights.
        device_name: what evaluated it.
        variant: what was done to the plan's weights before.

    Raises:
        LpsearchError: if the loss is not finite.
    """
    check_finite([loss.delta_nll], spec=windows.spec, dtype=dtype)
    return ProxyMetrics(
        variant=variant,
        nll=loss.nll,
        delta_nll=loss.delta_nll,
        delta_nll_se=loss.delta_nll_se,
        perplexity=loss.perplexity,
        kl_nats_per_token=finite_or_none(loss.kl_nats_per_token),
        by_kind=_build_kind_metrics(loss),
        data=windows.spec,
        windows=loss.num_windows,
        seq_len=windows.seq_len,
        num_tokens=loss.num_tokens,
        dtype=dtype,
        device=device_name,
    )


def _build_kind_metrics(loss: Loss | None) -> tuple[KindMetrics, ...]:
    """Build the entries for the losses by kind, which are finite since their mean is."""
    return tuple(
        KindMetrics(
            data=part.kind.spec,
            weight=part.kind.weight,
            nll=part.loss.nll,
            delta_nll=part.loss.delta_nll,
            delta_nll_se=part.loss.delta_nll_se,
            perplexity=part.loss.perplexity,
            kl_nats_per_token=finite_or_none(part.loss.kl_nats_per_token),
            kl_se=finite_or_none(part.loss.kl_se),
            windows=part.loss.num_windows,
            num_tokens=part.loss.num_tokens,
        )
        for part in (() if loss is None else loss.by_kind)
    )


def _list_plan_files(out: Path) -> set[str]:
    """Return the plan files of the front that stands in a directory; other files there are the user's."""
    try:
        file = load_front_file(out)
    except StudyError:
        return set()
    return set() if file is None else {f"plans/{Path(point.plan).name}" for point in file.front}


def _is_worst_case(result: TrialResult) -> bool:
    """Say whether plans were compared by their worst kind of text on either split; of one kind there is no worst."""
    return any(loss is not None and loss.is_worst_case for loss in (result.loss, result.heldout))


def _read_delta(loss: Loss | None) -> float | None:
    return None if loss is None else finite_or_none(loss.delta_nll)


def _build_point(result: TrialResult, metric: Metric) -> FrontPoint:
    assert result.plan_file is not None
    judged, judged_heldout = (
        finite_or_none(found.get_cost(metric)) if found is not None and _is_worst_case(result) else None
        for found in (result.loss, result.heldout)
    )
    loss, nll, kl = result.loss, result.get_heldout("nll"), result.get_heldout("kl")
    return FrontPoint(
        plan=result.plan_file,
        num_joins=result.num_joins,
        num_dropped=result.num_dropped,
        depth_reduction=result.depth_reduction,
        delta_nll=loss.delta_nll,
        delta_nll_se=loss.delta_nll_se,
        heldout_delta_nll=None if nll is None else nll.delta_nll,
        heldout_delta_nll_se=None if nll is None else nll.delta_nll_se,
        kl_nats_per_token=loss.kl_nats_per_token,
        kl_se=finite_or_none(loss.kl_se),
        heldout_kl_nats_per_token=None if kl is None else kl.kl_nats_per_token,
        heldout_kl_se=None if kl is None else kl.kl_se,
        untouched_delta_nll=_read_delta(result.untouched),
        untouched_heldout_delta_nll=_read_delta(result.untouched_heldout),
        worst_kind_loss=judged,
        heldout_worst_kind_loss=judged_heldout,
        by_kind=_build_kind_metrics(loss),
        heldout_by_kind=_build_kind_metrics(nll),
        perplexity=loss.perplexity,
        latency_ms=result.latency_ms,
        speedup=result.speedup,
        groups=tuple(map(tuple, result.plan.to_lists())),
        dropped={name: tuple(layers) for name, layers in result.plan.dropped.items()} if result.num_dropped else None,
        origin=result.origin,
        trial=result.trial,
    )
