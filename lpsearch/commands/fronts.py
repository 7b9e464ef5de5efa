"""When ``optimize`` writes the front: at every improvement, so that an interrupted search is worth what it found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpsearch.commands.results import build_front_file, name_plan_files, write_front
from lpsearch.config import OptimizeConfig, Split
from lpsearch.errors import StudyError
from lpsearch.front_file import FrontFile
from lpsearch.search import (
    PlanSpace,
    StudyResult,
    StudyStore,
    TrialResult,
    TrialUpdate,
    build_front,
    read_results,
)
from lpsearch.search.results import set_latency
from lpsearch.wording import name_count

if TYPE_CHECKING:
    from lpsearch.data import Windows
    from lpsearch.latency import LatencyModel
    from lpsearch.models import LoadedModel

__all__ = ["FrontWriter"]

logger = logging.getLogger(__name__)


class FrontWriter:
    """Writes ``front.json`` and the plan files of a study, marked unfinished until the search has ended.

    Args:
        values: the configuration.
        out: directory of the study.
        store: its database.
        space: the plans that are searched.
        loaded: the model.
        device_name: what evaluates it.
        windows: what is evaluated on, by split.
        latency_model: estimates of time; None with latency off.
    """

    def __init__(
        self,
        *,
        values: OptimizeConfig,
        out: Path,
        store: StudyStore,
        space: PlanSpace,
        loaded: LoadedModel,
        device_name: str,
        windows: Mapping[Split, Windows],
        latency_model: LatencyModel | None,
    ) -> None:
        self._values = values
        self._out = out
        self._store = store
        self._space = space
        self._loaded = loaded
        self._device_name = device_name
        self._windows = windows
        self._latency_model = latency_model
        self._written: dict[str, TrialResult] = {}
        self._has_failed = False

    def on_trial(self, update: TrialUpdate) -> None:
        """Write the front if a trial has improved it.

        The search goes on where that fails, since its results are in the database.
        """
        known = [result.plan for result in self._written.values()]
        if self._has_failed or known == [result.plan for result in update.front]:
            return
        try:
            self._write_unfinished(update.front, num_trials=update.num_finished, proxy_tokens=update.proxy_tokens)
        except OSError as error:
            self._has_failed = True
            logger.warning("the unfinished front could not be written: %s; the search goes on", error)

    def write_interrupted(self) -> None:
        """Write the front of a search that was interrupted, with the held-out losses that are known by then.

        What fails here is a warning, since the search is interrupted in any case.
        """
        try:
            results = read_results(self._store) if self._store.has_trials() else []
            valid = [result for result in results if result.plan in self._space]
            front = build_front(valid, metric=self._values.metric, objective=self._values.objective)
            if not front:
                return
            self._write_unfinished(
                front, num_trials=len(results), proxy_tokens=sum(result.proxy_tokens for result in results)
            )
        except (OSError, StudyError) as error:
            logger.warning("the unfinished front could not be written: %s", error)
            return
        logger.info("the front by now, %s, is in %s, marked unfinished", name_count(len(front), "plan"), self._out)

    def write(self, result: StudyResult) -> tuple[list[TrialResult], FrontFile]:
        """Write the front of a search that has ended, with the held-out losses.

        Returns:
            The front, and the content of ``front.json``.
        """
        known = {found.plan: found for found in read_results(self._store)}
        return self._write(
            [known[found.plan] for found in result.front],
            num_trials=len(result.results),
            proxy_tokens=result.proxy_tokens,
            exact=result.exact,
            finished=True,
        )

    def _write_unfinished(self, front: Sequence[TrialResult], *, num_trials: int, proxy_tokens: int) -> None:
        self._write(front, num_trials=num_trials, proxy_tokens=proxy_tokens, exact=False, finished=False)

    def _write(
        self, front: Sequence[TrialResult], *, num_trials: int, proxy_tokens: int, exact: bool, finished: bool
    ) -> tuple[list[TrialResult], FrontFile]:
        """Write the plans of a front that are not written yet, then ``front.json``."""
        values, model = self._values, self._latency_model
        named = name_plan_files(front)
        # Trials were noted with the times of the profile of their day, if any.
        times = [None if model is None else model.estimate_latency_ms(found.plan) for found in named]
        named = [set_latency(found, latency_ms, times[0]) for found, latency_ms in zip(named, times, strict=True)]
        file = build_front_file(
            named,
            study=self._store.study_name,
            model=self._loaded.identity,
            objective=values.objective,
            metric=values.metric,
            num_trials=num_trials,
            proxy_tokens=proxy_tokens,
            latency_model=model,
            recover=values.recover,
            freeze=values.freeze,
            exact=exact,
            finished=finished,
        )
        write_front(
            self._out,
            named,
            file,
            windows=self._windows,
            dtype=str(self._loaded.model.dtype).removeprefix("torch."),
            device_name=self._device_name,
            seed=values.seed,
            latency_model=model,
            written={} if finished else self._written,
        )
        self._written = {str(found.plan_file): found for found in named}
        lock = self._store.lock
        if finished:
            lock.wait_for_turn()
            self._store.save_front(file.model_dump(mode="json"))
            lock.end_turn()
        elif self._store.claims.owner is None:  # of several coordinators, each would overwrite what the others found
            self._store.save_front(file.model_dump(mode="json"))
        return named, file
