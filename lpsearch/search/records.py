"""Finished plans as the search sees them, and how they stand in the attributes of an Optuna trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial

from lpsearch.plan import Plan

__all__ = ["Metric", "PlanRecord", "build_attributes", "compute_perplexity", "finite_or_none", "read_record"]

Metric = Literal["nll", "kl"]


@dataclass(frozen=True)
class PlanRecord:
    """One finished trial. Losses are in nats per token over the proxy windows; nan where a loss was not finite.

    Attributes:
        plan: what was evaluated.
        trial: number of the Optuna trial.
        nll: mean negative log-likelihood.
        delta_nll: ``nll`` minus the baseline's on the same windows.
        delta_nll_se: standard error of ``delta_nll`` over windows; None for a single window.
        kl_nats_per_token: mean KL(base || plan); None unless it was measured.
        kl_se: standard error of that mean over windows; None unless it was measured on several.
        latency_ms: estimated time per output token; None with latency off.
        proxy_tokens: tokens behind the losses.
        origin: what proposed the plan: baseline, enqueued, scan, programme, surrogate, random ...
    """

    plan: Plan
    trial: int
    nll: float
    delta_nll: float
    delta_nll_se: float | None
    kl_nats_per_token: float | None
    kl_se: float | None
    latency_ms: float | None
    proxy_tokens: int
    origin: str

    @property
    def num_joins(self) -> int:
        """Number of joins of the plan."""
        return self.plan.num_joins

    @property
    def depth_reduction(self) -> float:
        """Share of the depth that the plan removes."""
        return self.plan.depth_reduction

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where the loss was not finite."""
        return compute_perplexity(self.nll)

    def get_cost(self, metric: Metric) -> float:
        """Return the loss that the search minimises: ``delta_nll``, or the KL divergence; inf if it is not finite."""
        cost = self.delta_nll if metric == "nll" else self.kl_nats_per_token
        return cost if cost is not None and math.isfinite(cost) else math.inf

    def get_cost_se(self, metric: Metric) -> float | None:
        """Return the standard error of :meth:`get_cost`."""
        return self.delta_nll_se if metric == "nll" else self.kl_se


def compute_perplexity(nll: float) -> float:
    """Return ``exp(nll)``, infinite where that overflows or the loss is not a number."""
    try:
        return math.exp(nll) if not math.isnan(nll) else math.inf
    except OverflowError:
        return math.inf


def build_attributes(record: PlanRecord) -> dict[str, Any]:
    """Return the user attributes of the record's trial, besides ``origin``; JSON has null for what is not finite."""
    attributes: dict[str, Any] = {
        "groups": record.plan.to_groups_json(),
        "num_joins": record.num_joins,
        "nll": finite_or_none(record.nll),
        "delta_nll": finite_or_none(record.delta_nll),
        "delta_nll_se": finite_or_none(record.delta_nll_se),
        "proxy_tokens": record.proxy_tokens,
    }
    if record.kl_nats_per_token is not None:
        attributes["kl_nats_per_token"] = finite_or_none(record.kl_nats_per_token)
        attributes["kl_se"] = finite_or_none(record.kl_se)
    if record.latency_ms is not None:
        attributes["latency_ms"] = record.latency_ms
    return attributes


def read_record(trial: FrozenTrial) -> PlanRecord:
    """Read the record of a finished trial back from its attributes."""
    attributes = trial.user_attrs
    has_kl = "kl_nats_per_token" in attributes
    return PlanRecord(
        plan=Plan.from_groups(json.loads(attributes["groups"])),
        trial=trial.number,
        nll=_number_or_nan(attributes, "nll"),
        delta_nll=_number_or_nan(attributes, "delta_nll"),
        delta_nll_se=attributes["delta_nll_se"],
        kl_nats_per_token=_number_or_nan(attributes, "kl_nats_per_token") if has_kl else None,
        kl_se=attributes.get("kl_se"),
        latency_ms=attributes.get("latency_ms"),
        proxy_tokens=attributes["proxy_tokens"],
        origin=attributes["origin"],
    )


def finite_or_none(value: float | None) -> float | None:
    """Return a number as a database or JSON can hold it: None where it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _number_or_nan(attributes: Mapping[str, Any], name: str) -> float:
    value = attributes[name]
    return math.nan if value is None else float(value)
