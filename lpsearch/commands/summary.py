"""The summary of a search: the front, what it cost, where it is, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult

from lpsearch.commands.facts import Facts, Row, keep_line, wrap_line
from lpsearch.commands.report import REPORT_NAME
from lpsearch.commands.steps import format_seconds
from lpsearch.commands.tables import build_front_table
from lpsearch.config import Metric, Objective
from lpsearch.kinds import normalise_weights
from lpsearch.latency.profile import describe_estimate
from lpsearch.models.aliases import describe_weights, name_model
from lpsearch.plan import LatencyMetrics
from lpsearch.report.front_columns import choose_kind_losses
from lpsearch.search import StudyResult, TrialResult, build_front
from lpsearch.search.results import list_untouched
from lpsearch.wording import describe_changes, describe_delta, describe_speedup, name_count

if TYPE_CHECKING:
    from lpsearch.report import StudyReport
    from lpsearch.report.advice import Pick

__all__ = ["SearchSummary"]


@dataclass(frozen=True)
class SearchSummary:
    """The summary of a search, laid out when it is printed.

    Attributes:
        study_name: name of the study.
        model_id: what its model is, as plan files name it.
        metric: the loss that was searched.
        objective: what was traded against it.
        front: the unmodified model, then the plans that no other beats.
        result: what the study has evaluated.
        latency: of the unmodified model; None with latency off.
        out: directory of the study.
        storage: its database as messages name it, without a password; None where that is ``study.db`` in ``out``.
        report: what its report shows; None where it was not written.
        elapsed_s: seconds that the command took.
    """

    study_name: str
    model_id: str
    metric: Metric
    objective: Objective
    front: Sequence[TrialResult]
    result: StudyResult
    latency: LatencyMetrics | None
    out: Path
    storage: str | None
    report: StudyReport | None
    elapsed_s: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the summary out to the width of the console."""
        yield ""
        yield wrap_line(self._describe_search(), "bold")
        yield ""
        yield build_front_table(self.front, width=options.max_width)
        yield ""
        yield wrap_line(self._explain_columns(), "dim")
        yield ""
        yield keep_line(self._list_files())
        if self.report is not None:
            yield from self._advise(self.report)

    def _describe_search(self) -> str:
        result = self.result
        num_plans = len(result.results)
        line = f"{name_count(num_plans, 'plan')} evaluated, {len(self.front):,} of them on the front"
        if result.exact:
            line = f"all {num_plans:,} plans evaluated, {len(self.front):,} of them on the front"
        if num_plans == 1:
            line = "the unmodified model evaluated" + ", the only plan there is" * result.exact
        is_local = Path(self.model_id).is_absolute()  # after which the study is named, by default
        line = f"{self.study_name}{'' if is_local else f', {name_model(self.model_id)}'}: {line}"
        line += f" ({result.proxy_tokens:,} tokens, {result.share_evaluated:.0%} of all windows)"
        if result.num_resumed:
            line += f"; this run added {name_count(result.num_new, 'plan')} and {result.num_new_tokens:,} tokens"
        line += f" in {format_seconds(self.elapsed_s)}"
        return line + ("; --timeout ended it" if result.timed_out else "")

    def _explain_columns(self) -> str:
        """Explain the columns whose names do not, and what losses are measured against."""
        delta = "delta nll: nats per token lost against the unmodified model on the search's windows, ± standard error."
        unseen = "the same on windows that the search never saw. Trust this one: the best of many is optimistic."
        if self.metric == "kl":
            lines = [
                "kl: divergence from the unmodified model in nats per token on the search's windows, ± standard error.",
                f"held-out kl: {unseen}",
                delta,
            ]
        else:
            lines = [delta, f"held out: {unseen}"]
        if len(self.front) > 1 and self.front[-1].untouched is not None:
            lines.append(
                "Losses are after a refit of each plan's weights; unrepaired: the same plans without it, "
                f"{self._describe_untouched()}."
            )
        lines += self._explain_kinds()
        lines += filter(None, [describe_weights(self.model_id)])
        if self.latency is not None:
            workload = f"decoding, batch {self.latency.batch_size}, {self.latency.context_len:,} cached tokens"
            lines.append(
                f"speed-up: {describe_estimate(self.latency.mean_error)}, for {self.latency.workload or workload}, "
                f"{self.latency.dtype} on {self.latency.device}, engine {self.latency.engine or 'runtime'}; each group "
                "fused into one wide layer."
            )
        return "\n".join(lines)

    def _describe_untouched(self) -> str:
        """Say how many plans would also be the best of these without the repair."""
        untouched = list_untouched(self.front)
        front = build_front(untouched, metric=self.metric, objective=self.objective)
        return f"of which {len(front) - 1} of {len(self.front) - 1} would still be the best of these"

    def _explain_kinds(self) -> list[str]:
        """Say what losses of several kinds of text are; nothing where there is one kind."""
        (parts, *_), is_heldout = choose_kind_losses(self.front)
        if not parts:
            return []
        loss = self.front[0].loss
        if loss.is_worst_case:
            judged = "the loss on the worst kind"
        elif loss.by_kind:
            weights = ", ".join(f"{weight:.0%}" for weight in normalise_weights([part.kind for part in loss.by_kind]))
            judged = f"the mean over the kinds, weighted {weights}"
        else:
            judged = "the loss on the one kind that was searched on"
        where = "on windows that the search never saw" if is_heldout else "on the search's windows"
        return [
            f"on ...: the loss on one kind of text, {where}. Plans were compared by {judged}, on the search's windows."
        ]

    def _list_files(self) -> str:
        names = ["front.json", "plans/"]
        names += [] if self.report is None else [REPORT_NAME]
        if self.storage is None:
            return f"All of it is in {self.out}: {', '.join(['study.db', *names])}"
        return f"The results are in {self.out}: {', '.join(names)}; the trials in {self.storage}"

    def _advise(self, report: StudyReport) -> RenderResult:
        """Name three plans to start from, and the commands for one of them."""
        from lpsearch.report.advice import REPAIR, describe_no_gain, list_commands, pick_plans

        yield ""
        picks = {pick.name: pick for pick in pick_plans(report)}
        loss = "loss" if report.metric == "nll" else "kl"
        yield wrap_line(f"Plans to start from, by the {loss} that you accept:", "bold")
        rows: list[Row] = []
        for pick in picks.values():
            rows.append((f"  {pick.name}", _describe_pick(report, pick)))
            if pick.index is not None:
                rows.append(("", self.out / (report.front[pick.index].plan_file or "")))
        yield Facts(rows)
        no_gain = describe_no_gain(report)
        if no_gain is not None:
            yield wrap_line(no_gain, "bold")
        chosen = next((picks[name] for name in ("balanced", "free", "fast") if picks[name].index is not None), None)
        yield wrap_line("Next:" if chosen is None else f"Next, with the {chosen.name} one:", "bold")
        yield keep_line(f"  open {self.out / REPORT_NAME}")
        if chosen is None or chosen.index is None:
            return
        for command in list_commands(report, report.front[chosen.index]):
            if command.purpose in (REPAIR, "see the text it writes", "export a fused checkpoint"):
                yield keep_line(f"  {command.line}")


def _describe_pick(report: StudyReport, pick: Pick) -> str:
    limit = f"≤ {pick.max_loss}"
    if pick.index is None:
        if pick.gains is False:
            return f"{limit}: none is measurably faster than the unmodified model"
        return f"{limit}: only the unmodified model loses so little"
    result = report.front[pick.index]
    words = [describe_changes(result.plan), f"{result.depth_reduction:.1%} less depth"]
    words += [] if result.speedup is None else [describe_speedup(result.speedup, report.speedup_margin)]
    cost = result.get_reported_cost(report.metric)
    words += [describe_delta(cost) if report.metric == "nll" else f"kl {cost:.3f}"]
    no_gain = "no faster here that could be measured; of least depth: " if pick.gains is False else ""
    return f"{limit}: {no_gain}{', '.join(words)}"
