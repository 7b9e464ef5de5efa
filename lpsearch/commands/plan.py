"""``lpsearch plan``: look at plan files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lpsearch.errors import StudyError, UsageError
from lpsearch.picking import Candidate, pick_candidate
from lpsearch.plan import build_plan_document, load_plan

__all__ = ["diff_plans", "pick_plan", "show_plan", "validate_plan"]

logger = logging.getLogger(__name__)


def show_plan(path: Path) -> dict[str, Any]:
    """Return the content of a plan file.

    Raises:
        PlanError: if it is not a valid plan.
    """
    return build_plan_document(load_plan(path))


def validate_plan(path: Path, *, model: str | None) -> dict[str, Any]:
    """Check a plan file, and that it is for a model if one is named.

    Args:
        path: the plan file.
        model: alias, hub id, directory or ``.gguf`` file; None checks the file alone.

    Raises:
        PlanError: if it is not a valid plan, or one for another model.
    """
    plan = load_plan(path)
    if model is not None:
        import torch

        from lpsearch.models import load_model, resolve_source
        from lpsearch.transform import check_plan_model

        loaded = load_model(resolve_source(model), device="cpu", dtype=torch.float32)
        check_plan_model(plan, loaded.model)
    return {"plan": str(path), "valid": True, "num_layers": plan.num_layers, "depth": plan.depth, "model": model}


def diff_plans(first: Path, second: Path) -> dict[str, Any]:
    """Return the joins that only one of two plans has.

    Raises:
        PlanError: if either is not a valid plan.
        UsageError: if they are for models of different depth.
    """
    plans = load_plan(first), load_plan(second)
    if plans[0].num_layers != plans[1].num_layers:
        raise UsageError(
            f"{first} is for {plans[0].num_layers} layers and {second} for {plans[1].num_layers}; "
            "only plans of one model can be compared"
        )
    joins = set(plans[0].joins), set(plans[1].joins)
    return {
        "first": str(first),
        "second": str(second),
        "joins_only_in_first": sorted(joins[0] - joins[1]),
        "joins_only_in_second": sorted(joins[1] - joins[0]),
        "joins_in_both": sorted(joins[0] & joins[1]),
    }


def pick_plan(study_dir: Path, *, max_delta: float | None, min_speedup: float | None) -> dict[str, Any]:
    """Return the point of a study's front that a user with these limits wants.

    Within a loss it is the point of least depth, or of least latency where that was optimised; among points beyond a
    speed-up, the one of least loss. The loss is the one that was searched, held out where that is known. Where no plan
    with a join meets the limits but the unmodified model does, it is the answer.

    Args:
        study_dir: directory that ``optimize`` wrote.
        max_delta: largest loss against the unmodified model, or divergence from it, in nats per token.
        min_speedup: smallest speed-up.

    Raises:
        UsageError: if neither limit is given, or no point meets them.
        StudyError: if there is no front.
    """
    if max_delta is None and min_speedup is None:
        raise UsageError("say what you need: --max-delta NATS, --min-speedup X, or both")
    document = load_front(study_dir)
    front = document["front"]
    metric = document.get("metric", "nll")
    if "metric" not in document and any(point.get("kl_nats_per_token") is not None for point in front):
        logger.warning(
            "%s: written by an older lpsearch, without held-out divergences, so the added nll decides; run the same "
            "`lpsearch optimize` again to rewrite it",
            study_dir / "front.json",
        )
    index = pick_candidate(
        [Candidate(point["num_joins"], _get_loss(point, metric), point["speedup"]) for point in front],
        objective=document.get("objective", "depth"),
        max_loss=max_delta,
        min_speedup=min_speedup,
    )
    if index is None:
        raise UsageError(f"no plan of {study_dir} meets that; its front: {json.dumps(front)}")
    chosen = front[index]
    if chosen["num_joins"] == 0:
        logger.warning("no plan of %s with a join meets that; this is the unmodified model", study_dir)
    return {**chosen, "plan": str(study_dir / chosen["plan"])}


def load_front(study_dir: Path) -> dict[str, Any]:
    """Read ``front.json`` of a study.

    Raises:
        UsageError: if there is no such directory.
        StudyError: if it is not there or not readable.
    """
    path = study_dir / "front.json"
    if not study_dir.is_dir():
        raise UsageError(f"{study_dir}: no such directory; give one that `lpsearch optimize` wrote")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not isinstance(document.get("front"), list):
            raise ValueError("not the front of a study")
    except FileNotFoundError:
        raise StudyError(f"{path}: no front here; run `lpsearch optimize` with --out {study_dir} first") from None
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path}: cannot be read: {error}; run the same `lpsearch optimize` again to rewrite it"
        ) from None
    return document


def _get_loss(point: dict[str, Any], metric: str) -> float:
    """Return the loss of a point by the metric of the search: held out where that is known."""
    name = "kl_nats_per_token" if metric == "kl" else "delta_nll"
    heldout = point[f"heldout_{name}"]
    return float(point[name] if heldout is None else heldout)
