"""One search, from its configuration to its front.

Cheap checks come first. Where the user named no value, the study's record decides. Everything that is measured is in
the database before it is used, so a search may be interrupted at any step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lpsearch.commands.checks import read_config, read_num_layers
from lpsearch.commands.console import Answer, adopt_optuna_log
from lpsearch.commands.evaluators import EvaluatorName, choose_search_variant
from lpsearch.commands.fronts import FrontWriter
from lpsearch.commands.latency import check_profile_use, get_latency_model
from lpsearch.commands.loading import describe_device, load_for_search, resolve_device
from lpsearch.commands.progress import show_search
from lpsearch.commands.report import try_write_report
from lpsearch.commands.results import build_summary
from lpsearch.commands.steps import show_steps
from lpsearch.commands.studies import (
    RECORDED_OPTIONS,
    begin_study,
    follow_record,
    open_study_store,
    refuse_orphaned_results,
    resume_study,
)
from lpsearch.commands.summary import SearchSummary
from lpsearch.commands.workers import SearchPools, check_workers, open_pools, uses_workers
from lpsearch.config import Allowed, OptimizeConfig, ResolvedConfig, Split, check_device_map, slug_of_model
from lpsearch.data import Windows, check_seq_len, check_text_kinds
from lpsearch.errors import PlanError
from lpsearch.latency.mix import parse_mix
from lpsearch.latency.profile import check_profile_geometry, load_profile
from lpsearch.latency.workload import check_workloads
from lpsearch.models import resolve_source
from lpsearch.plan import Plan, load_plan
from lpsearch.search import (
    PlanSpace,
    Pool,
    StudyResult,
    StudyStore,
    TrialResult,
    TrialUpdate,
    evaluate_stored_plans,
    read_results,
    run_study,
)
from lpsearch.search.results import RAW
from lpsearch.search.settings import has_own_database

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.evaluation.losses import Variant
    from lpsearch.latency import LatencyModel
    from lpsearch.models import LoadedModel

__all__ = ["search"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """A study that is open, locked and ready to be searched.

    Attributes:
        values: the configuration; the study's record has settled what the user did not name.
        out: directory of the study.
        store: its database.
        loaded: the model.
        device_name: what evaluates it.
        windows: what is evaluated on, by split.
        calibration: what plans are refitted on before they are evaluated; None without repair.
        space: the plans to search.
        enqueued: plans to evaluate first; all are in the space.
        latency_model: estimates of time; None with latency off.
    """

    values: OptimizeConfig
    out: Path
    store: StudyStore
    loaded: LoadedModel
    device_name: str
    windows: Mapping[Split, Windows]
    calibration: Windows | None
    space: PlanSpace
    enqueued: Sequence[Plan]
    latency_model: LatencyModel | None


def search(config: ResolvedConfig, *, fresh: bool) -> Answer:
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
    with _prepare(config, fresh=fresh) as run:
        writer = FrontWriter(
            values=run.values,
            out=run.out,
            store=run.store,
            space=run.space,
            loaded=run.loaded,
            device_name=run.device_name,
            windows=run.windows,
            latency_model=run.latency_model,
        )
        try:
            with open_pools(run.values, run.loaded, run.windows, run.calibration, device_name=run.device_name) as pools:
                result = _evaluate_plans(run, pools, writer)
                _check_front(run, pools, result.front)
            front, file = writer.write(result)
        except KeyboardInterrupt:
            writer.write_interrupted()
            try_write_report(run.store, run.out)
            raise
        with show_steps("writing the report"):
            report = try_write_report(run.store, run.out)
        latency_model = run.latency_model
        summary = SearchSummary(
            study_name=file.study,
            model_id=file.model.id,
            metric=run.values.metric,
            objective=run.values.objective,
            front=front,
            result=result,
            latency=None if latency_model is None else latency_model.build_metrics(front[0].plan),
            out=run.out,
            storage=None if has_own_database(run.store, run.out) else run.store.where,
            report=report,
            elapsed_s=time.monotonic() - began_at,
        )
        return Answer(build_summary(file, run.out), summary)


@contextmanager
def _prepare(config: ResolvedConfig, *, fresh: bool) -> Iterator[_Run]:
    """Check what was asked for, open the study and load what it needs; see :func:`search` for what raises."""
    values = config.values
    check_workers(values)
    device = resolve_device(values.device)
    parse_mix(values.workload)  # before anything is opened
    check_device_map(values)
    enqueued = {path: load_plan(path).without_recovery() for path in values.enqueue}

    def build_space(num_layers: int) -> PlanSpace:
        return _build_space(
            num_layers, max_group=values.max_group, freeze=values.freeze, allow=values.allow, enqueued=enqueued
        )

    profile = None if values.latency in ("auto", "off") else load_profile(values.latency)
    source = resolve_source(values.model)

    def check_config(config: PretrainedConfig) -> None:
        build_space(read_num_layers(config))
        mix = parse_mix(values.workload)
        check_workloads(config, [*mix], are_named=True)
        if profile is not None:
            check_profile_geometry(profile, config)
            check_profile_use(
                profile,
                max_group=values.max_group,
                allow=values.allow,
                mix=mix,
                name=f"--latency {values.latency}",
                model_name=values.model,
            )

    def check_new_config(config: PretrainedConfig) -> None:
        check_config(config)
        check_seq_len(values.seq_len, config)

    def check_new_study() -> None:
        check_text_kinds(values.data, split="proxy")
        check_text_kinds(values.heldout or values.data, split="heldout")
        if values.worst_case and max(len(values.data), len(values.heldout)) == 1:
            logger.warning("--worst-case changes nothing where there is one kind of text; give --data several times")
        config = read_config(source, trust_remote_code=values.trust_remote_code)
        if config is not None:
            check_new_config(config)

    if fresh:  # before anything is moved
        check_new_study()
    slug = slug_of_model(values.model)
    out = values.out or Path("studies") / slug
    with open_study_store(out, storage=values.storage, study=values.study, slug=slug, fresh=fresh) as store:
        store.lock.announce(values.budget)
        recorded = store.load_settings()
        if recorded is not None:
            if values.latency == "off" or store.load_latency_profile() is not None:
                store.lock.end_turn()  # nothing is left to begin
            values, source = follow_record(recorded, config, source)
            build_space(recorded["num_layers"])
        elif not fresh:
            refuse_orphaned_results(store, out)
            check_new_study()
        loaded = load_for_search(
            source,
            device=device,
            dtype=values.dtype,
            trust_remote_code=values.trust_remote_code,
            check=check_new_config if recorded is None else check_config,
            spread=values.device_map == "auto",
        )
        space = build_space(loaded.identity.num_layers)
        _check_fingerprints(enqueued, loaded)
        if recorded is None:
            options = values.model_dump(mode="json", include={*RECORDED_OPTIONS})
            windows, calibration = begin_study(store, options, loaded, device=device)
        else:
            windows, calibration = resume_study(store, recorded, loaded)
        latency_model = None
        if values.latency != "off":
            latency_model = get_latency_model(
                store,
                loaded.model,
                profile=profile,
                profile_name=str(values.latency),
                objective=values.objective,
                max_group=values.max_group,
                allow=values.allow,
                mix=parse_mix(values.workload),
                model_name=values.model,
            )
        if recorded is not None:
            _warn_of_hidden_plans(store, space)
        store.lock.end_turn()
        yield _Run(
            values=values,
            out=out,
            store=store,
            loaded=loaded,
            device_name=describe_device(device),
            windows=windows,
            calibration=calibration,
            space=space,
            enqueued=tuple(enqueued.values()),
            latency_model=latency_model,
        )


# ---- Preparing -------------------------------------------------------------------------------------------------------


def _build_space(
    num_layers: int,
    *,
    max_group: int,
    freeze: tuple[int, ...],
    allow: tuple[Allowed, ...],
    enqueued: Mapping[Path, Plan],
) -> PlanSpace:
    """Return the plans to search, among which the enqueued ones must be.

    Raises:
        ConfigError: for layers or groups that the model does not have.
        PlanError: for an enqueued plan outside the space.
    """
    space = PlanSpace(num_layers, max_group, freeze, allow)
    for path, plan in enqueued.items():
        space.check_plan(plan, where=f"--enqueue {path}")
    return space


def _warn_of_hidden_plans(store: StudyStore, space: PlanSpace) -> None:
    """Say how many plans of a resumed study change layers that are frozen now, so that its front leaves them out."""
    results = read_results(store) if store.has_trials() else []
    num_hidden = sum(result.plan not in space for result in results)
    if num_hidden:
        logger.warning(
            "--freeze keeps layers alone that %d of the %d finished plans change: front.json and plans/ leave these "
            "plans out, the study keeps them; leave --freeze out to have them back",
            num_hidden,
            len(results),
        )


def _check_fingerprints(enqueued: Mapping[Path, Plan], loaded: LoadedModel) -> None:
    """Refuse enqueued plans of another model with as many layers.

    Raises:
        PlanError: naming the file.
    """
    from lpsearch.transform.apply import check_plan_numbers

    identity = loaded.identity
    for path, plan in enqueued.items():
        try:
            check_plan_numbers(
                plan,
                num_layers=identity.num_layers,
                fingerprint=identity.fingerprint,
                name=type(loaded.model).__name__,
            )
        except PlanError as error:
            raise PlanError(f"--enqueue {path}: {error}") from None


# ---- Evaluating ------------------------------------------------------------------------------------------------------


def _evaluate_plans(run: _Run, pools: SearchPools, writer: FrontWriter) -> StudyResult:
    """Evaluate plans until the budget, and write the front whenever it improves."""
    values = run.values
    pool = pools["proxy"]
    if not uses_workers(values):
        _warn_of_odd_baseline(run, pool)
    with show_search() as progress:

        def on_trial(update: TrialUpdate) -> None:
            if uses_workers(values) and update.result.is_baseline:  # by now; before, all but one would idle for it
                _warn_of_odd_baseline(run, pool)
            writer.on_trial(update)
            progress.on_trial(update)

        return run_study(
            pool=pool,
            space=run.space,
            budget=values.budget,
            store=run.store,
            sampler=values.sampler,
            seed=values.seed,
            metric=values.metric,
            objective=values.objective,
            estimate_latency_ms=None if run.latency_model is None else run.latency_model.estimate_latency_ms,
            enqueue=run.enqueued,
            timeout_s=values.timeout,
            staged=values.staged,
            kinds=run.windows["proxy"].kinds,
            worst_case=values.worst_case,
            variant=choose_search_variant(run.calibration),
            on_trial=on_trial,
            on_evaluation=progress.on_evaluation,
        )


def _warn_of_odd_baseline(run: _Run, pool: Pool) -> None:
    """Warn where the unmodified model predicts its text worse than any healthy model would."""
    from lpsearch.models import check_baseline_nll

    with show_steps("evaluating the unmodified model"):
        (stored,) = evaluate_stored_plans(run.store, pool, [Plan.baseline(run.loaded.identity.num_layers)])
    losses = stored.losses
    if not stored.num_new_tokens and not all(map(math.isfinite, losses.nll_nats_per_token)):
        return  # what is wrong is in the study, which is refused
    kinds = run.windows["proxy"].split_kinds()
    for index, windows in enumerate(kinds):
        if windows.spec == "self":  # sampled at temperature 1, which is harder to predict than people's text
            continue
        texts = run.loaded.tokenizer.batch_decode(windows.input_ids, skip_special_tokens=True)
        warning = check_baseline_nll(
            sum(losses.nll_nats_per_token[index :: len(kinds)]) / windows.num_windows,
            num_tokens=windows.num_windows * losses.tokens_per_window,
            num_bytes=sum(len(text.encode()) for text in texts),
        )
        if warning is not None:
            logger.warning("%s%s", f"{windows.spec}: " if len(kinds) > 1 else "", warning)


def _check_front(run: _Run, pools: SearchPools, front: Sequence[TrialResult]) -> None:
    """Evaluate the front on windows that the search never saw: the best of many noisy values is optimistic.

    Where plans were repaired, they are also evaluated without the repair, which says what that won back.
    """
    searched = choose_search_variant(run.calibration)
    plans = [result.plan for result in front]

    def evaluate(name: EvaluatorName, split: Split, variant: Variant, title: str) -> None:
        with show_steps(title) as on_step:
            evaluate_stored_plans(
                run.store,
                pools[name],
                plans,
                split=split,
                variant=variant,
                on_plan=lambda num_ended: on_step(num_ended, len(plans)),
            )

    if searched != RAW:
        evaluate("raw", "proxy", RAW, "evaluating the front without repair")
    evaluate("heldout", "heldout", searched, "checking the front on held-out windows")
    if searched != RAW:
        evaluate("raw_heldout", "heldout", RAW, "checking the front without repair")
