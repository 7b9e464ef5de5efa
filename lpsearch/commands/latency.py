"""The latency model of a study: from a profile file, from its own record, or measured now."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lpsearch.commands.steps import show_steps
from lpsearch.config import Objective
from lpsearch.errors import ConfigError, FamilyError, ResumeError
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.depths import check_profile_kinds
from lpsearch.latency.mix import Workload
from lpsearch.latency.profile import LatencyProfile, describe_profile_error, parse_recorded_profile
from lpsearch.search import StudyStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lpsearch.latency import LatencyModel

__all__ = ["check_profile_use", "get_latency_model"]

logger = logging.getLogger(__name__)


def get_latency_model(
    store: StudyStore,
    model: PreTrainedModel,
    *,
    profile: LatencyProfile | None,
    profile_name: str,
    objective: Objective,
    max_group: int,
    allow: Collection[str] = JOINS,
    mix: Mapping[Workload, float] | None = None,
    model_name: str = "MODEL",
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
        allow: what plans may do, as in :data:`lpsearch.config.Allowed`.
        mix: workloads that ``--workload`` names, with their weights; None for the profile's first.
        model_name: the model as ``--model`` takes it, for messages.

    Returns:
        None for a family that cannot be measured, where latency is not the objective.

    Raises:
        ResumeError: if the study optimises the latency of another profile.
        FamilyError: for a family that cannot be measured, where latency is the objective.
        ConfigError: if the given profile is of another geometry, or lacks a workload or, where plans may drop branches,
            a kind of group.
    """
    from lpsearch.latency import LatencyModel, check_profile_geometry, measure_or_reuse_profile
    from lpsearch.models.placement import find_input_device

    recorded = parse_recorded_profile(store.load_latency_profile())
    name = f"--latency {profile_name}"
    if profile is not None:
        check_profile_geometry(profile, model.config)
        check_profile_use(profile, max_group=max_group, allow=allow, mix=mix, name=name, model_name=model_name)
        if recorded is not None and objective == "latency" and profile != recorded:
            raise ResumeError(
                "--latency: the study optimises the latency of another profile, and its trials cannot be compared "
                "with new ones; leave --latency out, or begin a study with --fresh"
            )
    elif recorded is not None and _covers(recorded, max_group, allow, mix):
        profile, name = recorded, f"{store.where}: the latency profile of the study"
    else:
        name = "the latency profile measured on this device"
        try:
            with show_steps("measuring latency") as on_step:
                profile = measure_or_reuse_profile(
                    model.config,
                    device=find_input_device(model),
                    dtype=model.dtype,
                    workloads=list(mix) if mix else None,
                    max_group=max_group,
                    allow=allow,
                    on_progress=lambda share: on_step(round(1000 * share), 1000),
                )
        except FamilyError as error:
            if objective == "latency":
                raise
            logger.warning("latency is off: %s", error)
            return None
    if profile != recorded:
        store.save_latency_profile(profile.model_dump(mode="json"))
    latency_model = LatencyModel.from_mix(profile, mix or {}, name=name)
    warning = describe_profile_error(latency_model.mean_error, name=name)
    if warning is not None:
        logger.warning("%s", warning)
    return latency_model


def check_profile_use(
    profile: LatencyProfile,
    *,
    max_group: int,
    allow: Collection[str],
    mix: Mapping[Workload, float] | None,
    name: str,
    model_name: str,
) -> None:
    """Refuse a profile that lacks a workload that is searched by, or a kind of group of plans that drop branches.

    That a group of joined layers is too large is said of the plan that has it.

    Args:
        profile: the profile.
        max_group: largest group of a plan.
        allow: what plans may do.
        mix: workloads that are searched by; None for the profile's first.
        name: of the profile, for messages.
        model_name: the model as ``--model`` takes it, for messages.

    Raises:
        ConfigError: naming what is missing, and the command that would measure it.
    """
    from lpsearch.latency import LatencyModel

    LatencyModel.from_mix(profile, mix or {}, name=name)
    if not DROPS.isdisjoint(allow):
        check_profile_kinds(profile, max_group=max_group, allow=allow, name=name, model=model_name)


def _covers(
    profile: LatencyProfile, max_group: int, allow: Collection[str], mix: Mapping[Workload, float] | None
) -> bool:
    """Tell whether every workload that is searched by was measured, with every kind of group that a plan may have."""
    from lpsearch.latency import LatencyModel

    try:
        LatencyModel.from_mix(profile, mix or {}, name="")
        largest = min(max_group, profile.geometry.num_layers)
        check_profile_kinds(profile, max_group=largest, allow=allow, name="")
    except ConfigError:
        return False
    return True
