"""``front.json``: the front of a study as a file, and its one reader. Imports neither torch nor Optuna."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from lpsearch.config import Metric, Objective, Recover
from lpsearch.errors import StudyError, StudyVersionError
from lpsearch.json_file import describe_first_finding, load_json, shorten_value
from lpsearch.plan import KindMetrics, ModelIdentity

__all__ = ["FRONT_NAME", "FRONT_SCHEMA_VERSION", "FrontFile", "FrontPoint", "is_plan_name", "load_front_file"]

FRONT_NAME = "front.json"
"""Name of the file in a study's directory."""

FRONT_SCHEMA_VERSION: Literal[1] = 1
"""Version of its form. Fields that have a default are those that the first files of this version lack."""


def _check_plan_name(name: str) -> str:
    """Refuse a name that leads out of the study's directory: the file is read, and deleted when it is stale."""
    if not is_plan_name(name):
        raise ValueError(f"{shorten_value(name)} is no plan file of the study itself; expected plans/NAME.json")
    return name


def is_plan_name(name: object) -> bool:
    """Say whether a text names a file in a study's directory or its ``plans``, and nothing elsewhere."""
    return isinstance(name, str) and _PLAN_NAME.fullmatch(name) is not None


PlanName = Annotated[str, AfterValidator(_check_plan_name)]
_PLAN_NAME = re.compile(r"(?:plans/)?[\w-][\w.-]{0,200}\.json", re.ASCII)


class FrontPoint(BaseModel):
    """A plan of the front. Losses are in nats per token; None where they were not measured or not finite.

    Of several kinds of text, losses are weighted means over the kinds.

    Attributes:
        plan: its plan file, relative to the study's directory.
        num_joins: its joins; the unmodified model has none, and drops nothing.
        num_dropped: branches that it drops.
        depth_reduction: share of the depth that it removes.
        delta_nll: negative log-likelihood on the proxy windows, minus the unmodified model's.
        delta_nll_se: standard error of it over windows.
        heldout_delta_nll: the same on the held-out windows.
        heldout_delta_nll_se: standard error of it over windows.
        kl_nats_per_token: divergence from the unmodified model on the proxy windows.
        kl_se: standard error of it over windows.
        heldout_kl_nats_per_token: the same on the held-out windows.
        heldout_kl_se: standard error of it over windows.
        untouched_delta_nll: what the plan loses on the proxy windows without repair; None where losses are those of
            plans without repair.
        untouched_heldout_delta_nll: the same on the held-out windows.
        worst_kind_loss: the loss that was searched where that is the worst kind's; None where it is the mean.
        heldout_worst_kind_loss: the same on the held-out windows.
        by_kind: losses on each kind of text of the proxy windows, where there are several.
        heldout_by_kind: losses on each kind of text of the held-out windows, where there are several.
        perplexity: exp of the negative log-likelihood on the proxy windows.
        latency_ms: estimated time per output token; None with latency off.
        speedup: estimated time of the unmodified model over that of the plan; None with latency off.
        groups: its groups of layers.
        dropped: layers without their ``attention``, and without their ``mlp``; None where nothing is dropped.
        origin: what proposed it.
        trial: number of its trial.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    plan: PlanName
    num_joins: int
    num_dropped: int = 0
    depth_reduction: float
    delta_nll: float
    delta_nll_se: float | None
    heldout_delta_nll: float | None
    heldout_delta_nll_se: float | None
    kl_nats_per_token: float | None
    kl_se: float | None = None
    heldout_kl_nats_per_token: float | None = None
    heldout_kl_se: float | None = None
    untouched_delta_nll: float | None = None
    untouched_heldout_delta_nll: float | None = None
    worst_kind_loss: float | None = None
    heldout_worst_kind_loss: float | None = None
    by_kind: tuple[KindMetrics, ...] = ()
    heldout_by_kind: tuple[KindMetrics, ...] = ()
    perplexity: float
    latency_ms: float | None
    speedup: float | None
    groups: tuple[tuple[int, ...], ...]
    dropped: dict[str, tuple[int, ...]] | None = None
    origin: str
    trial: int

    def get_reported_cost(self, metric: Metric) -> float:
        """Return its loss: held out where that is known."""
        if self.worst_kind_loss is not None:
            return self.worst_kind_loss if self.heldout_worst_kind_loss is None else self.heldout_worst_kind_loss
        if metric == "nll":
            return self.delta_nll if self.heldout_delta_nll is None else self.heldout_delta_nll
        cost = self.kl_nats_per_token if self.heldout_kl_nats_per_token is None else self.heldout_kl_nats_per_token
        return math.inf if cost is None else cost


class FrontFile(BaseModel):
    """What ``front.json`` holds.

    Attributes:
        schema_version: of the file.
        study: name of the Optuna study.
        model: the model.
        objective: what was traded against the loss.
        metric: the loss that was searched; None in files of older versions, which do not say.
        worst_case: plans were compared by the loss on their worst kind of text, not by the mean.
        recover: what was done to the weights of every plan before its losses were measured.
        untouched_front: the plan files that no other of ``front`` beats without repair; empty without repair.
        freeze: layers that no plan of the front changes; None in files of older versions, which do not say.
        trials: finished plans of the study.
        exact: every plan of the space is finished.
        baseline_nll: of the unmodified model on the proxy windows, nats per token.
        proxy_tokens: tokens behind the proxy losses of all finished plans.
        heldout_tokens: tokens behind the held-out losses of the front.
        latency_engine: engine whose times the front has, e.g. ``runtime`` or ``vllm``; None with latency off, and in
            files of older versions, whose times are of the runtime.
        latency_error: mean relative error of the latency model on depths that it was not fitted to; None where that is
            not known.
        speedup_margin: by what share a speed-up may be off; None where that is not known.
        finished: whether the search has ended. While it is under way, and after it was interrupted, the front is the
            best by then, and its plans may not have been checked on held-out windows.
        front: the unmodified model, then the plans that no other beats, fewest joins first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1]
    study: str
    model: ModelIdentity
    objective: Objective = "depth"
    metric: Metric | None = None
    worst_case: bool = False
    recover: Recover = "off"
    untouched_front: tuple[str, ...] = ()
    freeze: tuple[int, ...] | None = None
    trials: int
    exact: bool
    baseline_nll: float
    proxy_tokens: int
    heldout_tokens: int
    latency_engine: str | None = None
    latency_error: float | None = None
    speedup_margin: float | None = None
    finished: bool = True
    front: tuple[FrontPoint, ...]


def load_front_file(directory: Path) -> FrontFile | None:
    """Read the front in a study's directory.

    Args:
        directory: of the study.

    Returns:
        None where no front is written yet.

    Raises:
        StudyVersionError: for a front of another version.
        StudyError: for a file that cannot be read, or is not a front.
    """
    path = directory / FRONT_NAME
    mend = "run the same `lpsearch optimize` again to rewrite it"
    try:
        document: Any = load_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: cannot be read: {error}; {mend}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != FRONT_SCHEMA_VERSION:
        raise StudyVersionError(
            f"{path}: schema_version is {shorten_value(version)}, this lpsearch reads {FRONT_SCHEMA_VERSION}; {mend}, "
            "or use the version that wrote it"
        )
    try:
        return FrontFile.model_validate(document)
    except ValidationError as error:
        raise StudyError(f"{path}: not the front of a study: {describe_first_finding(error)}; {mend}") from None
