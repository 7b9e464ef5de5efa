"""The latency model of a study: from a profile file, from its own record, or measured now."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lpsearch.commands.steps import show_steps
from lpsearch.config import Objective
from lpsearch.errors import ConfigError, FamilyError, ResumeError
from lpsearch.latency.profile import LatencyProfile, describe_profile_error, parse_recorded_profile
from lpsearch.plan import Plan
from lpsearch.search import StudyStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.latency import LatencyModel

__all__ = ["get_latency_model"]

logger = logging.getLogger(__name__)


def get_latency_model(
    store: StudyStore,
    model: PreTrainedModel,
    *,
    profile: LatencyProfile | None,
    profile_name: str,
    objective: Objective,
    max_group: int,
) -> LatencyModel | None:
    """Return the latency model of a study: of the given profile, of its own record, or measured now and recorded.

    A profile whose estimates are far off is used with a warning.

    Args:
        store: the study's database.
        model: the model.
        profile: the one that ``--latency`` names; None without.
        profile_name: what ``--latency`` is.
        objective: of the study.
        max_group: largest group of a plan.

    Returns:
        None for a family that cannot be measured, where latency is not the objective.

    Raises:
        ResumeError: if the study optimises the latency of another profile.
        FamilyError: for a family that cannot be measured, where latency is the objective.
    """
    from lpsearch.latency import LatencyModel, check_profile_geometry, measure_or_reuse_profile

    recorded = parse_recorded_profile(store.load_latency_profile())
    name = f"--latency {profile_name}"
    if profile is not None:
        check_profile_geometry(profile, model.config)
        if recorded is not None and objective == "latency" and profile != recorded:
            raise ResumeError(
                "--latency: the study optimises the latency of another profile, and its trials cannot be compared "
                "with new ones; leave --latency out, or begin a study with --fresh"
            )
    elif recorded is not None and _covers(LatencyModel(recorded), max_group):
        profile, name = recorded, f"{store.where}: the latency profile of the study"
    else:
        name = "the latency profile measured on this device"
        try:
            with show_steps("measuring latency") as on_step:
                profile = measure_or_reuse_profile(
                    model.config,
                    device=model.device,
                    dtype=model.dtype,
                    max_group=max_group,
                    on_progress=lambda share: on_step(round(1000 * share), 1000),
                )
        except FamilyError as error:
            if objective == "latency":
                raise
            logger.warning("latency is off: %s", error)
            return None
    if profile != recorded:
        store.save_latency_profile(profile.model_dump(mode="json"))
    latency_model = LatencyModel(profile)
    warning = describe_profile_error(latency_model.workload.mean_error, name=name)
    if warning is not None:
        logger.warning("%s", warning)
    return latency_model


def _covers(latency_model: LatencyModel, max_group: int) -> bool:
    """Tell whether every group that a plan may have was measured."""
    num_layers = latency_model.profile.geometry.num_layers
    try:
        for first in range(num_layers):
            for size in range(2, min(max_group, num_layers - first) + 1):
                plan = Plan.from_joins(num_layers, range(first, first + size - 1))
                latency_model.estimate_latency_ms(plan)
    except ConfigError:
        return False
    return True
