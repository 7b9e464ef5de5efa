"""``lpsearch optimize``: from a model's name to the front of plans, resumable at any point.

What can be refused cheaply is refused first; a study's record decides where the user said nothing; everything that was
measured is in the database before it is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsearch.commands.console import Answer, adopt_optuna_log
from lpsearch.commands.loading import describe_device, load_for_search, resolve_device, settle_dtype
from lpsearch.commands.progress import show_search, show_steps
from lpsearch.commands.report import try_write_report
from lpsearch.commands.results import MeasuredFront, build_summary, write_front
from lpsearch.commands.studies import RECORDED_OPTIONS, check_new_study, follow_record, open_study_store
from lpsearch.commands.summary import SearchSummary
from lpsearch.config import OptimizeConfig, ResolvedConfig, slug_of_model
from lpsearch.errors import ConfigError, FamilyError, PlanError, ResumeError, StudyError
from lpsearch.latency.profile import load_profile, parse_recorded_profile
from lpsearch.models import resolve_source
from lpsearch.plan import Plan, load_plan
from lpsearch.search import (
    PlanSpace,
    Split,
    StoredWindows,
    StudyResult,
    StudyStore,
    compare_settings,
    evaluate_stored_plan,
    run_study,
)
from lpsearch.search.settings import has_own_database

if TYPE_CHECKING:
    import torch

    from lpsearch.data import Windows
    from lpsearch.evaluation import ModelEvaluator
    from lpsearch.evaluation.losses import WindowLosses
    from lpsearch.latency import LatencyModel
    from lpsearch.models import LoadedModel

__all__ = ["optimize"]

logger = logging.getLogger(__name__)

_SPLITS: tuple[Split, ...] = ("proxy", "heldout")


def optimize(config: ResolvedConfig, *, fresh: bool) -> Answer:
    """Search a model's plans until the budget, then write the front, its plans and the report.

    Args:
        config: what was asked for, and which of it by name.
        fresh: move an existing study aside first.

    Returns:
        The front, with the summary that a person reads.

    Raises:
        UsageError: for input that cannot be used.
        ResumeError: if the study was begun with other settings.
        StudyError: if the study cannot be read or written.
        SourceError: if model or data cannot be fetched.
    """
    began_at = time.monotonic()
    adopt_optuna_log()
    values = config.values
    source = resolve_source(values.model)
    enqueued = [load_plan(path) for path in values.enqueue]
    if values.latency not in ("auto", "off"):
        load_profile(values.latency)
    device = resolve_device(values.device)
    out = values.out or Path("studies") / slug_of_model(values.model)
    with open_study_store(values, out, fresh=fresh) as store:
        recorded = store.load_settings()
        if recorded is not None:
            values, source = follow_record(recorded, config, source)
        else:
            check_new_study(values, store, out)
        loaded = load_for_search(source, device=device, dtype=values.dtype, trust_remote_code=values.trust_remote_code)
        for path, plan in zip(values.enqueue, enqueued, strict=True):
            from lpsearch.transform import check_plan_model

            try:
                check_plan_model(plan, loaded.model)
            except PlanError as error:
                raise PlanError(f"--enqueue {path}: {error}") from None
        windows = _begin_or_resume(store, recorded, values, loaded, device=device)
        latency_model = _get_latency_model(store, values, loaded)
        try:
            result = _search(store, values, loaded, windows["proxy"], latency_model, enqueued)
            front = MeasuredFront(
                study_name=store.study_name,
                seed=values.seed,
                objective=values.objective,
                metric=values.metric,
                loaded=loaded,
                device_name=describe_device(device),
                result=result,
                windows=windows,
                heldout_losses=_evaluate_heldout(store, values, loaded, windows["heldout"], result),
                latency_model=latency_model,
            )
            store.save_front(write_front(front, out))
        except KeyboardInterrupt:
            try_write_report(store, out)
            raise
        with show_steps("writing the report"):
            report = try_write_report(store, out)
    summary = SearchSummary(
        front=front,
        out=out,
        storage=None if has_own_database(store, out) else store.where,
        report=report,
        elapsed_s=time.monotonic() - began_at,
    )
    return Answer(build_summary(front, out), summary)


def _begin_or_resume(
    store: StudyStore,
    recorded: Mapping[str, Any] | None,
    values: OptimizeConfig,
    loaded: LoadedModel,
    *,
    device: torch.device,
) -> dict[Split, Windows]:
    """Record what a study is begun with, or check that the model is still the same; return its windows.

    Raises:
        ResumeError: if the model is not the one that the study was begun with.
        StudyError: if the study has lost its windows.
    """
    from lpsearch.data import Windows, name_text
    from lpsearch.models import check_parts, fingerprint_parts

    parts = fingerprint_parts(loaded.model, loaded.tokenizer)
    identity = {"fingerprint": loaded.identity.fingerprint, "num_layers": loaded.identity.num_layers}
    PlanSpace(loaded.identity.num_layers, values.max_group, values.freeze)
    if recorded is not None:
        check_parts(recorded.get("parts", {}), parts, name=loaded.source.id)
        compare_settings(recorded, identity)
        stored = {split: store.load_windows(split) for split in _SPLITS}
        windows = {split: Windows(kept.input_ids, kept.spec) for split, kept in stored.items() if kept is not None}
        if len(windows) < len(_SPLITS):
            raise StudyError(
                f"{store.where}: the study has lost its windows; restore a copy, or begin one with --fresh"
            )
        return windows
    windows = _build_windows(values, loaded)
    dtype = settle_dtype(loaded.model, dtype=values.dtype, device=device, windows=windows["proxy"])
    options = values.model_dump(mode="json", include={*RECORDED_OPTIONS})
    options |= {name: name_text(options[name]) for name in ("data", "heldout") if options[name]}
    source = {"model": loaded.source.id, "source": loaded.source.to_dict()}
    store.begin(
        {**options, **identity, **source, "parts": parts, "dtype": dtype},
        {split: StoredWindows(built.input_ids, built.spec) for split, built in windows.items()},
    )
    return windows


def _build_windows(values: OptimizeConfig, loaded: LoadedModel) -> dict[Split, Windows]:
    from lpsearch.data import build_windows

    windows: dict[Split, Windows] = {}
    for split in _SPLITS:
        with show_steps(f"preparing {split} windows") as on_progress:
            windows[split] = build_windows(
                values.heldout if split == "heldout" and values.heldout else values.data,
                tokenizer=loaded.tokenizer,
                num_windows=values.windows,
                seq_len=values.seq_len,
                split=split,
                seed=values.seed,
                model=loaded.model,
                after=windows.get("proxy"),
                on_progress=on_progress,
            )
    return windows


def _get_latency_model(store: StudyStore, values: OptimizeConfig, loaded: LoadedModel) -> LatencyModel | None:
    """Return the latency model of the study: from a file, from its own record, or measured now and recorded."""
    from lpsearch.latency import LatencyModel, check_profile_geometry, measure_or_reuse_profile

    if values.latency == "off":
        if values.objective == "latency":
            raise ConfigError("--objective latency needs a latency to optimise; drop --latency off")
        return None
    model = loaded.model
    recorded = parse_recorded_profile(store.load_latency_profile())
    if values.latency != "auto":
        profile = load_profile(values.latency)
        check_profile_geometry(profile, model.config)
        if recorded is not None and values.objective == "latency" and profile != recorded:
            raise ResumeError(
                f"--latency {values.latency}: the study optimises the latency of another profile, and its trials "
                "cannot be compared with new ones; leave --latency out, or begin a study with --fresh"
            )
        if profile != recorded:
            store.save_latency_profile(profile.model_dump(mode="json"))
        return LatencyModel(profile)
    if recorded is not None and _covers(LatencyModel(recorded), values.max_group):
        return LatencyModel(recorded)
    try:
        with show_steps("measuring latency") as on_step:
            profile = measure_or_reuse_profile(
                model.config,
                device=model.device,
                dtype=model.dtype,
                max_group=values.max_group,
                on_progress=lambda share: on_step(round(1000 * share), 1000),
            )
    except FamilyError as error:
        if values.objective == "latency":
            raise
        logger.warning("latency is off: %s", error)
        return None
    store.save_latency_profile(profile.model_dump(mode="json"))
    return LatencyModel(profile)


def _covers(latency_model: LatencyModel, max_group: int) -> bool:
    """Tell whether every group that a plan may have was measured."""
    num_layers = latency_model.profile.geometry.num_layers
    try:
        for first in range(num_layers):
            for size in range(2, min(max_group, num_layers - first) + 1):
                groups = [[i] for i in range(first)] + [list(range(first, first + size))]
                plan = Plan.from_groups(groups + [[i] for i in range(first + size, num_layers)])
                latency_model.estimate_latency_ms(plan)
    except ConfigError:
        return False
    return True


def _search(
    store: StudyStore,
    values: OptimizeConfig,
    loaded: LoadedModel,
    windows: Windows,
    latency_model: LatencyModel | None,
    enqueued: list[Plan],
) -> StudyResult:
    """Evaluate plans until the budget."""
    from lpsearch.evaluation import ModelEvaluator

    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric=values.metric)
    _warn_of_odd_baseline(store, evaluator, loaded)
    with show_search() as progress:
        return run_study(
            evaluator=evaluator,
            space=PlanSpace(loaded.identity.num_layers, values.max_group, values.freeze),
            budget=values.budget,
            store=store,
            sampler=values.sampler,
            seed=values.seed,
            metric=values.metric,
            objective=values.objective,
            estimate_latency_ms=None if latency_model is None else latency_model.estimate_latency_ms,
            enqueue=enqueued,
            timeout_s=values.timeout,
            staged=values.staged,
            on_trial=progress.on_trial,
            on_evaluation=progress.on_evaluation,
        )


def _warn_of_odd_baseline(store: StudyStore, evaluator: ModelEvaluator, loaded: LoadedModel) -> None:
    """Say so where the unmodified model reads its text worse than any healthy one would."""
    from lpsearch.models import check_baseline_nll

    with show_steps("evaluating the unmodified model"):
        losses = evaluate_stored_plan(store, evaluator, Plan.baseline(loaded.identity.num_layers)).losses
    windows = evaluator.windows
    if windows.spec == "self":  # sampled at temperature 1, which is harder to predict than people's text
        return
    texts = loaded.tokenizer.batch_decode(windows.input_ids, skip_special_tokens=True)
    warning = check_baseline_nll(
        sum(losses.nll_nats_per_token) / windows.num_windows,
        num_tokens=windows.num_windows * losses.tokens_per_window,
        num_bytes=sum(len(text.encode()) for text in texts),
    )
    if warning is not None:
        logger.warning("%s", warning)


def _evaluate_heldout(
    store: StudyStore,
    values: OptimizeConfig,
    loaded: LoadedModel,
    windows: Windows,
    result: StudyResult,
) -> dict[Plan, WindowLosses]:
    """Evaluate the front on windows that the search never saw: the best of many noisy values is optimistic."""
    from lpsearch.evaluation import ModelEvaluator

    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric=values.metric)
    losses = {}
    with show_steps("checking the front on held-out windows") as on_step:
        for index, record in enumerate(result.front):
            losses[record.plan] = evaluate_stored_plan(store, evaluator, record.plan, split="heldout").losses
            on_step(index + 1, len(result.front))
    return losses
