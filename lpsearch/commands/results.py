"""What ``optimize`` leaves behind: ``front.json`` and one plan file for each of its points."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsearch.errors import LpsearchError
from lpsearch.evaluation.losses import PairedDelta, WindowLosses, compute_paired_delta
from lpsearch.plan import Plan, PlanMetadata, PlanMetrics, Provenance, ProxyMetrics, save_plan, write_json
from lpsearch.search import Split, StudyResult, TrialResult
from lpsearch.search.front import Objective
from lpsearch.search.results import Metric, compute_perplexity, finite_or_none, set_latency
from lpsearch.versions import read_versions

if TYPE_CHECKING:
    from lpsearch.data import Windows
    from lpsearch.latency import LatencyModel
    from lpsearch.models import LoadedModel

__all__ = [
    "FRONT_SCHEMA_VERSION",
    "MeasuredFront",
    "build_proxy_metrics",
    "build_summary",
    "write_front",
]

FRONT_SCHEMA_VERSION = 1
"""Version of the form of ``front.json``."""

_SUMMARY_FIELDS = (
    "plan",
    "num_joins",
    "depth_reduction",
    "delta_nll",
    "heldout_delta_nll",
    "perplexity",
    "latency_ms",
    "speedup",
)


@dataclass(frozen=True)
class MeasuredFront:
    """The front of a study with all that is known of it.

    Attributes:
        study_name: name of the Optuna study.
        seed: seed of the search.
        objective: what was traded against the loss.
        metric: the loss that was searched.
        loaded: the model.
        device_name: what evaluated it.
        result: the study's records and front.
        windows: what was evaluated on, by split.
        heldout_losses: losses on the held-out windows of every plan of the front.
        latency_model: estimates of decode latency; None with latency off.
    """

    study_name: str
    seed: int
    objective: Objective
    metric: Metric
    loaded: LoadedModel
    device_name: str
    result: StudyResult
    windows: Mapping[Split, Windows]
    heldout_losses: Mapping[Plan, WindowLosses]
    latency_model: LatencyModel | None

    @cached_property
    def heldout_deltas(self) -> dict[Plan, PairedDelta]:
        """Held-out loss against the baseline's, of every plan of the front whose loss is finite there."""
        base = self.heldout_losses[self.result.baseline.plan]
        return {
            plan: compute_paired_delta(losses.nll_nats_per_token, base.nll_nats_per_token)
            for plan, losses in self.heldout_losses.items()
            if all(map(math.isfinite, losses.nll_nats_per_token))
        }

    @cached_property
    def heldout_kl(self) -> dict[Plan, PairedDelta]:
        """Held-out divergence from the unmodified model, of every plan of the front where it is known and finite."""
        return {
            plan: compute_paired_delta(losses.kl_nats_per_token, (0.0,) * len(losses.kl_nats_per_token))
            for plan, losses in self.heldout_losses.items()
            if losses.kl_nats_per_token is not None and all(map(math.isfinite, losses.kl_nats_per_token))
        }

    @property
    def heldout_costs(self) -> dict[Plan, PairedDelta]:
        """Held-out loss by the metric of the search."""
        return self.heldout_deltas if self.metric == "nll" else self.heldout_kl

    @cached_property
    def records(self) -> list[TrialResult]:
        """The front with the latencies of this front's latency model, whichever the trials were noted with."""
        if self.latency_model is None:
            return [set_latency(record, None, None) for record in self.result.front]
        estimate = self.latency_model.estimate_latency_ms
        baseline_ms = estimate(self.result.baseline.plan)
        return [set_latency(record, estimate(record.plan), baseline_ms) for record in self.result.front]

    @cached_property
    def plan_names(self) -> dict[Plan, str]:
        """Path of every plan file relative to the study's directory, stable as the front improves."""
        num_with = Counter(record.num_joins for record in self.result.front)
        return {
            record.plan: f"plans/joins-{record.num_joins:02d}"
            + (f"-trial-{record.trial}" if num_with[record.num_joins] > 1 else "")
            + ".json"
            for record in self.result.front
        }


def write_front(front: MeasuredFront, out: Path) -> dict[str, Any]:
    """Write the plan files, then ``front.json``; plan files of an earlier front are removed.

    Args:
        front: what to write.
        out: directory of the study.

    Returns:
        The content of ``front.json``.

    Raises:
        OSError: if a file cannot be written.
    """
    former = _read_plan_names(out)
    directory = out / "plans"
    directory.mkdir(exist_ok=True)
    for record in front.result.front:
        save_plan(
            dataclasses.replace(record.plan, metadata=_build_metadata(front, record)),
            out / front.plan_names[record.plan],
        )
    document = {
        "schema_version": FRONT_SCHEMA_VERSION,
        "study": front.study_name,
        "model": front.loaded.identity.model_dump(mode="json"),
        "objective": front.objective,
        "metric": front.metric,
        "trials": len(front.result.results),
        "exact": front.result.exact,
        "baseline_nll": front.result.baseline.loss.nll,
        "proxy_tokens": front.result.proxy_tokens,
        "heldout_tokens": sum(len(x.nll_nats_per_token) * x.tokens_per_window for x in front.heldout_losses.values()),
        "front": [_build_point(front, record) for record in front.result.front],
    }
    write_json(document, out / "front.json")
    for name in former - {*front.plan_names.values()}:
        (out / name).unlink(missing_ok=True)
    return document


def build_summary(front: MeasuredFront, out: Path) -> dict[str, Any]:
    """Build the JSON object that ends the command: study, out, trials, baseline_nll, front."""
    points = [_build_point(front, record) for record in front.result.front]
    return {
        "study": front.study_name,
        "out": str(out),
        "trials": len(front.result.results),
        "baseline_nll": front.result.baseline.loss.nll,
        "front": [{name: point[name] for name in _SUMMARY_FIELDS} for point in points],
    }


def build_proxy_metrics(
    *,
    losses: WindowLosses,
    base_losses: WindowLosses,
    windows: Windows,
    dtype: str,
    device_name: str,
) -> ProxyMetrics:
    """Build the entry of a plan file for losses on some windows.

    Args:
        losses: of the plan.
        base_losses: of the unmodified model on the same windows.
        windows: what was evaluated on.
        dtype: dtype of the weights.
        device_name: what evaluated it.

    Raises:
        LpsearchError: if a loss is not finite.
    """
    if not all(map(math.isfinite, (*losses.nll_nats_per_token, *base_losses.nll_nats_per_token))):
        raise LpsearchError(f"a loss on {windows.spec} is not finite in {dtype}; use --dtype float32 or bfloat16")
    num_windows = len(losses.nll_nats_per_token)
    nll = math.fsum(losses.nll_nats_per_token) / num_windows
    paired = compute_paired_delta(losses.nll_nats_per_token, base_losses.nll_nats_per_token)
    kl = losses.kl_nats_per_token
    return ProxyMetrics(
        nll=nll,
        delta_nll=paired.delta,
        delta_nll_se=paired.standard_error,
        perplexity=compute_perplexity(nll),
        kl_nats_per_token=None if kl is None else math.fsum(kl) / num_windows,
        data=windows.spec,
        windows=num_windows,
        seq_len=windows.seq_len,
        num_tokens=num_windows * losses.tokens_per_window,
        dtype=dtype,
        device=device_name,
    )


def _read_plan_names(out: Path) -> set[str]:
    """Return the plan files of the front that stands in a directory; other files there are the user's."""
    try:
        document = json.loads((out / "front.json").read_text(encoding="utf-8"))
        return {f"plans/{Path(point['plan']).name}" for point in document["front"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _build_metadata(front: MeasuredFront, record: TrialResult) -> PlanMetadata:
    """Build what a plan file says besides the groups."""
    dtype = str(front.loaded.model.dtype).removeprefix("torch.")
    windows = front.windows["proxy"]
    proxy = ProxyMetrics(
        nll=record.loss.nll,
        delta_nll=record.loss.delta_nll,
        delta_nll_se=record.loss.delta_nll_se,
        perplexity=record.perplexity,
        kl_nats_per_token=record.loss.kl_nats_per_token,
        data=windows.spec,
        windows=windows.num_windows,
        seq_len=windows.seq_len,
        num_tokens=record.proxy_tokens,
        dtype=dtype,
        device=front.device_name,
    )
    heldout = None
    if record.plan in front.heldout_deltas:
        heldout = build_proxy_metrics(
            losses=front.heldout_losses[record.plan],
            base_losses=front.heldout_losses[front.result.baseline.plan],
            windows=front.windows["heldout"],
            dtype=dtype,
            device_name=front.device_name,
        )
    latency = None if front.latency_model is None else front.latency_model.build_metrics(record.plan)
    return PlanMetadata(
        model=front.loaded.identity,
        metrics=PlanMetrics(proxy=proxy, heldout=heldout, latency=latency),
        provenance=Provenance(
            study=front.study_name,
            trial=record.trial,
            seed=front.seed,
            versions=read_versions(),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )


def _build_point(front: MeasuredFront, record: TrialResult) -> dict[str, Any]:
    """Build the entry of one point of the front."""
    heldout = front.heldout_deltas.get(record.plan)
    heldout_kl = front.heldout_kl.get(record.plan)
    latency = front.latency_model
    return {
        "plan": front.plan_names[record.plan],
        "num_joins": record.num_joins,
        "depth_reduction": record.depth_reduction,
        "delta_nll": record.loss.delta_nll,
        "delta_nll_se": record.loss.delta_nll_se,
        "heldout_delta_nll": None if heldout is None else heldout.delta,
        "heldout_delta_nll_se": None if heldout is None else heldout.standard_error,
        "kl_nats_per_token": record.loss.kl_nats_per_token,
        "kl_se": finite_or_none(record.loss.kl_se),
        "heldout_kl_nats_per_token": None if heldout_kl is None else heldout_kl.delta,
        "heldout_kl_se": None if heldout_kl is None else heldout_kl.standard_error,
        "perplexity": record.perplexity,
        "latency_ms": None if latency is None else latency.estimate_latency_ms(record.plan),
        "speedup": None if latency is None else latency.estimate_speedup(record.plan),
        "groups": [list(group) for group in record.plan.groups],
        "origin": record.origin,
        "trial": record.trial,
    }
